"""Number of samples of a batch, and what ``self.log`` makes of it where entries are ragged."""

import dataclasses
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import data as lightning_data

from recis_lightning import DynamicEmbeddingBag, Jagged, hash_tables
from recis_lightning.callbacks.batch_size import batch_size_of
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.optim import SparseSGD
from tests.helpers.quiet_trainer import quiet_trainer


@dataclasses.dataclass
class Batch:
    name: str
    ids: torch.Tensor


RAGGED = SimpleNamespace(values=torch.zeros(9), offsets=torch.tensor([0, 3, 3, 9]))


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        (torch.tensor(1.0), None),
        ({"name": "x", "history": RAGGED, "label": torch.zeros(3)}, 3),
        ([torch.tensor(0), (torch.zeros(4), torch.zeros(7))], 4),
        (Batch("x", torch.zeros(6)), 6),
        (SimpleNamespace(stride=lambda: 8), 8),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(5)], layout=torch.jagged), 2),
        (NestedJagged(torch.zeros(9), torch.tensor([0, 3, 3, 9]), torch.tensor([0, 1, 3])), 2),
        ("text", None),
        (None, None),
        ({}, None),
    ],
)
def test_batch_size(batch, size):
    assert batch_size_of(batch) == size


def batch(lengths, value):
    """Return a batch of bags, each of whose samples is worth ``value``."""
    lengths = torch.tensor(lengths)
    ids = Jagged.from_lengths(torch.arange(int(lengths.sum())), lengths)
    return {"tags": ids, "value": torch.full((len(lengths),), value)}


class Model(L.LightningModule):
    """Logs the mean of a batch, with no word of its size; the batch's first entry is ragged."""

    def __init__(self, **given):
        super().__init__()
        self.tags, self.given = DynamicEmbeddingBag(2, mode="sum", name="tags"), given

    def step(self, batch, stage):
        ids = batch["tags"]
        loss = self.tags(ids.values, ids.offsets).sum()
        self.log(stage, batch["value"].mean(), on_step=False, on_epoch=True, **self.given)
        return loss

    def training_step(self, batch):
        return self.step(batch, "train")

    def validation_step(self, batch):
        self.step(batch, "val")

    def test_step(self, batch):
        self.step(batch, "test")

    def configure_optimizers(self):
        return SparseSGD(hash_tables(self), lr=0.1)


BATCHES = [batch([2, 0, 3], 1.0), batch([1], 5.0)]  # of 3 samples and of 1; of 5 ids and of 1


def loader(batches=BATCHES):
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.fixture(autouse=True)
def _warns_again(monkeypatch):
    """Let Lightning give a warning that it gives once in a process."""
    monkeypatch.setattr(lightning_data.warning_cache, "warn", lambda text: pytest.fail(text))


def test_means_are_over_samples(tmp_path):
    """In fit, its validation, and the loops of their own; Lightning warns of nothing."""
    model, trainer = Model(), quiet_trainer(tmp_path, num_sanity_val_steps=1)
    trainer.fit(model, loader(), loader())
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == {
        "train": 2.0,
        "val": 2.0,
    }
    assert trainer.validate(model, loader(), verbose=False) == [{"val": 2.0}]
    assert trainer.test(model, loader(), verbose=False) == [{"test": 2.0}]
    fresh = quiet_trainer(tmp_path)
    assert fresh.test(model, loader(), verbose=False) == [{"test": 2.0}]


def test_a_size_that_is_given_counts(tmp_path):
    trainer = quiet_trainer(tmp_path)
    assert trainer.test(Model(batch_size=1), loader(), verbose=False) == [{"test": 3.0}]


def test_what_is_really_ambiguous_is_left_to_lightning(tmp_path, monkeypatch):
    """Entries with other numbers of samples: it takes the first tensor's length, and warns."""
    said = []
    monkeypatch.setattr(lightning_data.warning_cache, "warn", said.append)
    batches = [{**one, "more": torch.zeros(7)} for one in BATCHES]
    trainer = quiet_trainer(tmp_path)
    trainer.test(Model(), loader(batches), verbose=False)
    assert float(trainer.callback_metrics["test"]) == pytest.approx((5 * 1 + 1 * 5) / 6)
    assert len(said) == 2
    assert "ambiguous" in said[0]
