"""Batches without samples: the same form, whatever it is."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged
from recis_lightning.callbacks.empty_batch import without_samples


class Pair(NamedTuple):
    ids: torch.Tensor
    name: str


@dataclass
class Sample:
    ids: torch.Tensor
    parts: tuple


def test_every_part_loses_its_samples():
    """And nothing else: keys, dtypes, widths, and what counts no samples."""
    batch = {
        "a": torch.ones(3, 2, dtype=torch.bfloat16),
        "b": [torch.arange(3), {"c": torch.arange(6).view(3, 2)}],
        "d": Pair(torch.arange(3), "x"),
        "e": Sample(torch.arange(3), (torch.arange(3), 5)),
        "names": ["u", "v", "w"],
        "scale": torch.tensor(2.0),
        "none": None,
    }
    empty = without_samples(batch)
    assert empty["a"].shape == (0, 2)
    assert empty["a"].dtype is torch.bfloat16
    assert empty["b"][0].shape == (0,)
    assert empty["b"][1]["c"].shape == (0, 2)
    assert empty["d"].ids.numel() == 0
    assert empty["d"].name == "x"
    assert empty["e"].parts[1] == 5
    assert empty["e"].ids.numel() == 0
    assert empty["names"] == []
    assert empty["scale"] == 2
    assert empty["none"] is None
    assert batch["a"].shape == (3, 2)


@pytest.mark.parametrize("weights", [None, torch.ones(3)])
def test_an_engine_takes_ragged_features_without_samples(weights):
    """Of shape [0, dim], with weights and without."""
    tags = without_samples(Jagged(torch.arange(3), torch.tensor([0, 1, 3]), weights))
    engine = EmbeddingEngine({"tags": EmbeddingOption(4, mode="sum")})
    rows = engine({"tags": tags})["tags"]
    assert rows.shape == (0, 4)
    rows.sum().backward()


def test_a_nested_tensor_is_refused():
    """There is none without samples."""
    nested = torch.nested.nested_tensor([torch.arange(2), torch.arange(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"on_uneven='pad'.*NestedTensor.*use Jagged"):
        without_samples({"tags": nested})
