import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.lookup.buffers import allocate_outputs, output_runs

FLOAT = torch.empty(0)


def _allocate(counts, widths):
    return allocate_outputs(output_runs(counts, widths, FLOAT.element_size()), FLOAT)


def _pieces(outputs):
    return {out.untyped_storage().data_ptr() for out in outputs}


def test_outputs_have_their_shapes_and_no_byte_in_common():
    """Whatever counts and widths, each output is contiguous and none overlaps another."""
    counts, widths = [3, 0, 5, 5000, 7, 7, 1], [4, 4, 4, 4, 4, 8, 8]
    outputs = _allocate(counts, widths)
    assert [tuple(out.shape) for out in outputs] == list(zip(counts, widths, strict=True))
    for number, out in enumerate(outputs):
        assert out.is_contiguous()
        out.fill_(number)
    for number, out in enumerate(outputs):
        assert (out == number).all()


def test_small_outputs_share_memory_in_small_pieces():
    """Hundreds of small ones cost few allocations; keeping one keeps at most a megabyte."""
    outputs = _allocate([256] * 400, [16] * 400)
    assert 1 < len(_pieces(outputs)) < 10
    assert max(out.untyped_storage().nbytes() for out in outputs) <= 1 << 20
    large = _allocate([2048] * 3, [16] * 3)
    assert len(_pieces(large)) == 3


def test_outputs_are_no_views_of_each_other():
    """Each has its own version, so that one changed in place does not spoil another's gradient."""
    first, second = _allocate([4, 4], [2, 2])
    assert not first._is_view()
    first.add_(1)
    assert (first._version, second._version) == (1, 0)
    options = {name: EmbeddingOption(4) for name in "abc"}
    engine = EmbeddingEngine(options)
    out = engine({name: torch.arange(3) for name in options})
    squared = out["b"].square()
    out["a"].mul_(2)
    (out["a"].sum() + squared.sum()).backward()
    assert all(len(engine.tables[name].pending) == 1 for name in "ab")
