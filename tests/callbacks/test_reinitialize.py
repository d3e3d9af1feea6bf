"""ReinitializeRowsHook: rows start anew with each epoch, the dense part goes on."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import ReinitializeRowsHook
from recis_lightning.optim import SparseDenseOptimizer, SparseSGD

IDS = torch.arange(8)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.user = DynamicEmbedding(2, name="user")
        self.item = DynamicEmbedding(2, name="item")
        self.frozen = DynamicEmbedding(2, name="frozen", trainable=False)
        self.dense = torch.nn.Linear(2, 1)
        self.seeds, self.norms = [], []

    def training_step(self, batch, batch_idx):
        self.seeds.append((self.trainer.current_epoch, self.user.table.seed, self.item.table.seed))
        self.norms.append(self.user.table.embeddings(IDS).abs().max().item())
        self.frozen(batch)
        return (self.dense(self.user(batch) + self.item(batch)) - 1).pow(2).mean()

    def configure_optimizers(self):
        dense = torch.optim.SGD(self.dense.parameters(), lr=0.1)
        return SparseDenseOptimizer(dense, SparseSGD(hash_tables(self), lr=1.0))


def fit(model, hook, tmp_path, max_epochs=3, ckpt_path=None, **kwargs):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[hook, saver],
        **kwargs,
    )
    # Twice the same batch: a run that is resumed begins its loader anew.
    loader = torch.utils.data.DataLoader(torch.cat([IDS, IDS]), batch_size=8)
    trainer.fit(model, loader, ckpt_path=ckpt_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("every", [1, 2])
def test_rows_live_for_epochs(tmp_path, every):
    """From the second on, of trainable tables; the last epoch's rows are those of the model."""
    model = Model()
    fit(model, ReinitializeRowsHook(every), tmp_path)
    expected = [0, 0, 1, 1, 2, 2] if every == 1 else [0, 0, 0, 0, 1, 1]
    assert [seed for _, seed, _ in model.seeds] == expected
    assert model.frozen.table.seed == 0
    first = {seed: model.norms[expected.index(seed)] for seed in set(expected) - {0}}
    assert all(norm < 0.06 for norm in first.values())  # initial weights: std 0.01
    fresh = DynamicEmbedding(2, name="user", seed=expected[-1])(IDS)
    assert not torch.isclose(model.user.table.embeddings(IDS), fresh).any()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_is_resumed_keeps_the_rows_of_its_epoch(tmp_path):
    """Within an epoch nothing starts anew; rows end as those of a run in one piece."""
    whole = Model()
    torch.manual_seed(0)
    state = whole.state_dict()
    fit(whole, ReinitializeRowsHook(), tmp_path / "whole", max_epochs=2)
    resumed = Model()
    resumed.load_state_dict(state)
    path = next((tmp_path / "whole").glob("step=3.ckpt"))
    fit(resumed, ReinitializeRowsHook(), tmp_path / "resumed", max_epochs=2, ckpt_path=path)
    assert [seed for _, seed, _ in resumed.seeds] == [1]
    assert torch.equal(resumed.user.table.embeddings(IDS), whole.user.table.embeddings(IDS))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tables_by_name(tmp_path):
    """Others go on; an unknown name is an error before anything is trained."""
    model = Model()
    fit(model, ReinitializeRowsHook(tables=["item"]), tmp_path, max_epochs=2)
    assert model.seeds[-1] == (1, 0, 1)
    model = Model()
    with pytest.raises(
        ValueError, match=r"tables: the module has .*, got \['users'\]; did you mean 'user'"
    ):
        fit(model, ReinitializeRowsHook(tables=["users"]), tmp_path)
    assert not model.seeds
    with pytest.raises(TypeError, match="tables: expected a list of tables' names"):
        ReinitializeRowsHook(tables="user")
    with pytest.raises(ValueError, match="every_n_epochs: expected an int >= 1, got 0"):
        ReinitializeRowsHook(0)
