"""EmbeddingOption: what its fields may be."""

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.admission import ReadOnly
from recis_lightning.eviction import GlobalStepFilter


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mode": "max"}, ValueError, r"mode: expected one of .*, got 'max'"),
        ({"mode": "tile"}, ValueError, "tile_len: mode 'tile' needs one"),
        ({"tile_len": 3}, ValueError, "tile_len: .*got tile_len=3 with mode='none'"),
        ({"mode": "tile", "tile_len": 0}, ValueError, "tile_len: expected an int >= 1, got 0"),
        ({"padding_idx": "0"}, TypeError, "padding_idx: expected an int or None, got '0'"),
        ({"embedding_dim": -2}, ValueError, "embedding_dim: expected an int >= 1, got -2"),
        ({"dtype": "float64"}, ValueError, "dtype: expected .*got 'float64'"),
        ({"device": "meta"}, ValueError, "device: .*got 'meta'"),
        ({"table": 16}, TypeError, r"table: expected a str, got int \(16\)"),
        ({"trainable": 1}, TypeError, "trainable: expected a bool, got 1"),
        ({"use_weights": None}, TypeError, "use_weights: expected a bool, got None"),
        ({"mean_by": "ids"}, ValueError, "mean_by: expected 'weights' or 'count', got 'ids'"),
        ({"mean_by": "count", "mode": "sum"}, ValueError, "mean_by: only mode 'mean' takes"),
        ({"initializer": "normal"}, TypeError, r"got 'normal'; write initializer=Normal\(\)"),
        ({"admission": ReadOnly}, TypeError, r"admission: .*; write admission=ReadOnly\(\)"),
        ({"admission": GlobalStepFilter(3)}, TypeError, r"write eviction=GlobalStepFilter\("),
        ({"eviction": "max-rows"}, TypeError, r"eviction: .*; write eviction=MaxRows\(n=\.\.\.\)"),
        ({"combiner": "sum"}, TypeError, "combiner: expected a function .*'sum'; write mode='sum'"),
        ({"combiner": torch.add, "mode": "sum"}, ValueError, "combiner: only mode 'none' takes"),
        ({"combiner": torch.add, "combiner_width": 0}, ValueError, "combiner_width: expected an"),
        ({"combiner_width": 3}, ValueError, "combiner_width: expected None without a combiner"),
        ({"shared_name": "t"}, TypeError, "shared_name: .*; write table="),
        ({"trainabel": False}, TypeError, "trainabel: .*did you mean trainable"),
        ({"block_size": 8}, TypeError, "block_size: .*does not exist here: leave it out"),
    ],
)
def test_wrong_options(arguments, error, words):
    """An error names the argument, the value got and what was expected."""
    with pytest.raises(error, match=words):
        EmbeddingEngine({"a": EmbeddingOption(**{"embedding_dim": 4, **arguments})})


@pytest.mark.parametrize(("mode", "width"), [("none", 4), ("sum", 4), ("mean", 4), ("tile", 12)])
def test_width_of_the_output(mode, width):
    """It is the number of columns that the engine gives the feature."""
    option = EmbeddingOption(4, mode=mode, tile_len=3 if mode == "tile" else None)
    assert option.width == width
    assert EmbeddingEngine({"a": option})({"a": torch.arange(2)})["a"].shape == (2, width)


def test_a_checkpoint_of_0_1_0_names_another_module(tmp_path, monkeypatch):
    """Hyperparameters that were saved then load, with weights_only=True."""
    monkeypatch.setattr(EmbeddingOption, "__module__", "recis_lightning.engine")
    torch.save({"option": EmbeddingOption(4, mode="sum")}, tmp_path / "old.ckpt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "old.ckpt", weights_only=True)["option"].mode == "sum"
