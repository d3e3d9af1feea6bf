"""Averaged models, torch's and Lightning's: dense weights are averaged, rows are shared."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.lightning_model import Model, differences, everything, trainer
from tests.helpers.sample_tables import filled

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]


def averaging():
    """Return a callback that changes dense weights by much."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    return callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.slow_except(dict(fits=2, filters=True), dict(fits=1, filters=False))
def test_a_checkpoint_holds_what_was_validated(tmp_path, fits, filters):
    """All rows, with the averaged dense weights, whether or not one of our hooks is there."""
    model = Model()
    for _ in range(fits):
        keep = ModelCheckpoint(tmp_path, monitor="val_loss")
        run = trainer(
            tmp_path, averaging(), keep, filters=filters, enable_checkpointing=True, max_epochs=2
        )
        run.fit(model, loader(), loader(40))
    loaded = Model.load_from_checkpoint(keep.best_model_path, weights_only=True)
    assert len(loaded.user.table) > 10
    quiet = trainer(tmp_path, filters=False)
    (seen,) = quiet.validate(loaded, loader(40), verbose=False)
    assert seen["val_loss"] == keep.best_model_score.item()

    run.save_checkpoint(tmp_path / "end.ckpt")
    end = Model.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert differences(everything(model), everything(end)) == []


def test_resuming_an_averaged_run(tmp_path):
    """It goes on as if nothing had happened: dense weights, averages and rows, bit by bit."""

    def saving(path):
        keep = ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=5)
        return trainer(path, averaging(), keep, enable_checkpointing=True, max_epochs=2)

    whole, resumed = Model(), Model(seed=1)
    saving(tmp_path).fit(whole, ResumableLoader())
    saving(tmp_path / "again").fit(resumed, ResumableLoader(), ckpt_path=tmp_path / "step=10.ckpt")
    assert differences(everything(whole), everything(resumed)) == []


@pytest.mark.parametrize("device", [None, "cpu"])
def test_an_averaged_model_reads_current_rows(device):
    """Tables by themselves, in an embedding and in an engine."""
    table = filled()
    assert AveragedModel(table, device).module is table
    user, engine = DynamicEmbedding(2), EmbeddingEngine({"item": EmbeddingOption(2)})
    averaged = AveragedModel(torch.nn.ModuleDict({"user": user, "engine": engine}), device).eval()
    ids = torch.tensor([3, 4])
    for module in (user.train(), lambda ids: engine.train()({"item": ids})):
        module(ids)
    assert averaged.module["user"](ids).equal(user.table.embeddings(ids))
    found = averaged.module["engine"]({"item": ids})["item"]
    assert found.equal(engine.tables["item"].embeddings(ids))
    assert found.any()


def test_other_copies_are_on_their_own():
    """Of a model and of an averaged model; averaging a copy shares the copy's tables."""
    user = DynamicEmbedding(2)
    twin = copy.deepcopy(user)
    assert twin.table is not user.table
    averaged = AveragedModel(twin, "cpu")
    assert averaged.module.table is twin.table
    assert copy.deepcopy(averaged).module.table is not twin.table
    assert twin.table.original is user.table
    del user
    assert twin.table.original is None
    assert AveragedModel(twin).module.table is twin.table
