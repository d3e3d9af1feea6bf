"""Insertion beside a GPU that fails at any allocation, or at any launch."""

from unittest.mock import patch

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.initializers import Constant
from recis_lightning.ops import backend
from recis_lightning.ops.backend import module as backend_module
from recis_lightning.ops.gpu import hash_insert

pytestmark = pytest.mark.interpreted

_MAKERS = ("empty", "empty_like", "full", "zeros")


def _out_of_memory_at(number):
    """Return patches by which torch's allocation of that number fails, counted from 0."""
    left = [number]

    def failing(maker):
        def make(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return maker(*args, **kwargs)

        return make

    makers = [(torch, name) for name in _MAKERS] + [(torch.Tensor, "new_empty")]
    return [patch.object(of, name, failing(getattr(of, name))) for of, name in makers]


def _check_as_before(module, known):
    """Fail unless exactly the ids before are known, and the next lookup gives small rows."""
    table = module.table
    assert sorted(table.ids().tolist()) == known
    assert len(table) == len(known)
    for _ in range(3):  # at later positions than before: a claim left behind would win
        module(torch.cat([torch.arange(10).repeat(5), torch.arange(10, 30)]))
    rows = table.storage.find(torch.arange(30))
    assert sorted(rows.tolist()) == list(range(30))
    assert torch.equal(module.eval()(torch.arange(30)), torch.ones(30, 2))


def _module(admission=None):
    made = DynamicEmbedding(2, name="t", initializer=Constant(1.0), admission=admission)
    for _ in range(2):
        made(torch.arange(20))
    # Room for all that follows: a new index would have no claims in it.
    made.table.storage.reserve_ids(1000)
    made.table.storage.reserve_rows(1000)
    return made


@pytest.mark.parametrize("admission", [None, MinCount(2), BloomCount(2, 4096)])
@pytest.mark.slow_except(dict(admission=None), dict(id="admission2"))
def test_no_memory_in_an_insertion_changes_nothing(admission):
    """Each allocation of a lookup fails in turn; the error is torch's own where it is an output."""
    errors = (MemoryError, torch.OutOfMemoryError)
    with backend.use("triton"):
        for number in range(20):
            module = _module(admission)
            patches = _out_of_memory_at(number)
            for each in patches:
                each.start()
            try:
                with pytest.raises(errors, match=r"no memory|out of memory"):
                    module(torch.arange(10, 30).repeat(2))
            except pytest.fail.Exception:  # it has fewer allocations
                break
            finally:
                for each in patches:
                    each.stop()
            _check_as_before(module, list(range(20)))
        assert 2 <= number < 19


@pytest.mark.parametrize("failing", range(5))
def test_an_interrupted_launch_changes_nothing(failing):
    """Ctrl-C between claiming entries and assigning rows leaves no claim behind."""
    with backend.use("triton"):
        module = _module()
        launch, left = backend_module("hash_index", torch.device("cpu"))._find_kernel, [failing]
        kind = type(launch)
        original = kind.launch

        def interrupted(kernel, *args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            original(kernel, *args, **kwargs)

        with patch.object(kind, "launch", interrupted), pytest.raises(KeyboardInterrupt):
            module(torch.arange(10, 30))
        _check_as_before(module, list(range(20)))


def test_new_ids_are_counted_by_table():
    """Each distinct id once, for each of the tables that lack it, also the smallest of int64."""
    smallest = torch.iinfo(torch.int64).min
    with backend.use("triton"):
        engine = EmbeddingEngine({name: EmbeddingOption(2) for name in ("a", "b", "c")})
        engine({"a": torch.tensor([3]), "b": torch.tensor([4]), "c": torch.tensor([4])})
        counted = []
        original = hash_insert._count_distinct
        with patch.object(
            hash_insert,
            "_count_distinct",
            lambda *args: counted.append(original(*args)) or counted[-1],
        ):
            ids = torch.tensor([5, smallest, 3, 5, -1, 5, smallest]).repeat(40_000)
            engine({"a": ids, "b": ids + 1, "c": torch.tensor([4])})
    assert counted == [[3, 3, 0]]
    assert [len(table) for table in hash_tables(engine)] == [4, 4, 1]
