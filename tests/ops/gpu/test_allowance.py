from recis_lightning.ops.gpu.allowance import Allowance
from recis_lightning.ops.header import Header


def test_an_allowance_starts_small_and_is_void_with_the_headers_version():
    """Each grant is larger than the one before; after a change of any header the first is none."""
    found = Allowance()
    granted = []
    for _ in range(6):
        assert not found.take()
        granted.append(found.most_ahead())
        found.grant(granted[-1])
        for _ in range(granted[-1]):
            assert found.take()
    assert granted == [0, 1, 3, 7, 15, 15]
    found.grant(5)
    Header.advance_version()
    assert not found.take()
    assert found.most_ahead() == 0
    found.grant(-3)
    assert not found.take()
