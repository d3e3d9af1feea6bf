"""ClipGradNormHook: in a Trainer, what torch's clipping does to the model with nn.Embedding."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import ClipGradNormHook, LoggerHook
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseSGD
from tests.helpers.quiet_trainer import quiet_trainer

IDS = torch.randint(12, (48,), generator=torch.Generator().manual_seed(3))


class Model(L.LightningModule):
    """An embedding and a tower, as tables or as ``nn.Embedding``, from the same weights."""

    def __init__(self, tables=True, factor=20.0):
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.tables, self.factor = nn.Linear(4, 1), tables, factor
        self.table = DynamicEmbedding(4, name="x", seed=1)
        self.table(torch.arange(12))
        self.twin = nn.Embedding.from_pretrained(
            self.table.table.embeddings(torch.arange(12)).clone(), freeze=False
        )
        self.norms = []

    def loss(self, ids):
        rows = self.table(ids) if self.tables else self.twin(ids)
        return self.tower(rows + 1).pow(2).mean() * self.factor

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        dense = torch.optim.SGD(self.tower.parameters(), lr=0.05)
        if not self.tables:
            dense.add_param_group({"params": self.twin.parameters()})
            return dense
        return SparseDenseOptimizer(dense, SparseSGD(hash_tables(self), lr=0.05))

    def train_dataloader(self):
        return DataLoader(IDS, batch_size=8)

    def held(self):
        ids = torch.arange(12)
        rows = self.table.table.embeddings(ids) if self.tables else self.twin.weight.detach()
        return {
            "rows": rows,
            "weight": self.tower.weight.detach(),
            "bias": self.tower.bias.detach(),
        }


class Norms(L.Callback):
    """Keeps the norm that was logged for each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        if "grad_norm" in trainer.callback_metrics:  # not before the first step
            self.seen.append(trainer.callback_metrics["grad_norm"].item())


def fit(tmp_path, model, *callbacks, **settings):
    quiet_trainer(tmp_path, *callbacks, limit_val_batches=0, **settings).fit(model)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}]
)
def test_it_clips_as_lightning_clips_the_dense_twin(tmp_path, settings):
    bound, norms = 0.5, Norms()
    ours = fit(tmp_path, Model(), ClipGradNormHook(bound), norms, max_epochs=2, **settings)
    theirs = fit(tmp_path, Model(tables=False), max_epochs=2, gradient_clip_val=bound, **settings)
    free = fit(tmp_path, Model(), max_epochs=2, **settings)
    rtol, atol = (1e-2, 1e-3) if "precision" in settings else (1e-5, 1e-6)
    torch.testing.assert_close(ours.held(), theirs.held(), rtol=rtol, atol=atol)
    assert not torch.allclose(ours.held()["weight"], free.held()["weight"], atol=0.01)
    assert max(norms.seen) > bound


def test_the_logged_norm_is_torchs(tmp_path):
    norms, wanted = Norms(), []

    class Listening(Model):
        def on_before_optimizer_step(self, optimizer):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            wanted.append(nn.utils.get_total_norm(gradients).item())

    fit(tmp_path, Model(), ClipGradNormHook(0.5), norms)
    fit(tmp_path, Listening(tables=False), gradient_clip_val=0.5)
    assert norms.seen == pytest.approx(wanted, rel=1e-5)
    assert len(norms.seen) == 6


def test_manual_optimization_of_several_optimizers(tmp_path, recwarn):
    hook = ClipGradNormHook(0.5)

    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            optimizers = self.optimizers()
            self.norms.append(hook.clip_gradients(optimizers))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            joined = super().configure_optimizers()
            return [joined.dense, *joined.sparse]

    norms = Norms()
    ours = fit(tmp_path, Manual(), hook, norms)
    theirs = fit(tmp_path, Model(tables=False), gradient_clip_val=0.5)
    torch.testing.assert_close(ours.held(), theirs.held())
    assert norms.seen == [norm.item() for norm in ours.norms]
    assert not [warning for warning in recwarn if "ClipGradNormHook" in str(warning.message)]


def test_manual_optimization_that_never_clips_is_warned_of_once(tmp_path):
    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    with pytest.warns(UserWarning, match=r"clips nothing by itself in manual.*clip_gradients"):
        fit(tmp_path, Manual(), ClipGradNormHook(0.5))


def test_the_trainers_own_clipping_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=0.3\) would both clip"):
        fit(tmp_path, Model(), ClipGradNormHook(0.5), gradient_clip_val=0.3)


def test_a_norm_that_is_not_finite_stops_training(tmp_path):
    with pytest.raises(RuntimeError, match=r"gradients' norm of order 2\.0 is nan"):
        fit(tmp_path, Model(factor=torch.nan), ClipGradNormHook(0.5, error_if_nonfinite=True))


def test_adam_and_other_hooks_beside_it(tmp_path):
    class Adam(Model):
        def configure_optimizers(self):
            dense = torch.optim.Adam(self.tower.parameters())
            return SparseDenseOptimizer(dense, SparseAdam(hash_tables(self)))

    norms = Norms()
    fit(tmp_path, Adam(), ClipGradNormHook(0.5, norm_type=1), LoggerHook(2), norms)
    assert min(norms.seen) > 0


def test_barebones_logs_nothing(tmp_path):
    hook = ClipGradNormHook(0.5)
    trainer = L.Trainer(
        max_steps=2,
        barebones=True,
        callbacks=[hook],
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(Model())
    assert "grad_norm" not in trainer.callback_metrics


def test_outside_a_trainer():
    model = Model()
    optimizer = model.configure_optimizers()
    model.loss(IDS).backward()
    assert ClipGradNormHook(0.5).clip_gradients(optimizer) > 0.5


@pytest.mark.parametrize(
    ("arguments", "error"), [((-1.0,), ValueError), ((1.0, -2), ValueError), ((None,), TypeError)]
)
def test_arguments_are_checked(arguments, error):
    with pytest.raises(error, match=r"(max_norm|norm_type): expected a number"):
        ClipGradNormHook(*arguments)
