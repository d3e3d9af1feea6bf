"""Groups of modules that are looked up together: kept while these are there, not longer."""

import gc
import weakref

import torch

from recis_lightning import DynamicEmbedding, look_up_together
from recis_lightning.lookup import together

IDS = torch.tensor([1])


def test_many_combinations_do_not_pile_up():
    """Of other modules, and of other settings of the same."""
    parts = [DynamicEmbedding(1, name=f"t{i}") for i in range(20)]
    for part in parts[1:]:
        look_up_together((parts[0], IDS), (part, IDS))
    assert len(together._kept) <= 16
    for padding_idx in range(20):
        parts[0].padding_idx = padding_idx
        look_up_together((parts[0], IDS), (parts[1], IDS))
    kept = together._kept._kept[id(parts[0]), id(parts[1])]
    assert 1 <= len(kept._by_features) <= 16


def test_the_groups_are_made_once():
    """As long as modules and settings stay."""
    one, other = DynamicEmbedding(1, name="one"), DynamicEmbedding(1, name="other")
    look_up_together((one, IDS), (other, IDS))
    kept = together._kept._kept[id(one), id(other)]
    (before,) = [groups._groups for groups in kept._by_features.values()]
    look_up_together((one, IDS), (other, IDS))
    (after,) = [groups._groups for groups in kept._by_features.values()]
    assert after is before


def test_tables_of_a_dead_module_are_freed():
    """Though the module that was looked up with it lives, first or second."""
    lasting = DynamicEmbedding(1, name="lasting")
    for first in (True, False):
        passing = DynamicEmbedding(1, name="passing")
        calls = [(passing, IDS), (lasting, IDS)]
        look_up_together(*(calls if first else reversed(calls)))
        table = weakref.ref(passing.table)
        del passing, calls
        gc.collect()
        assert table() is None
    assert not any(id(lasting) in key for key in together._kept._kept)
