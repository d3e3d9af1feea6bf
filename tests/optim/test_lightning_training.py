"""Training under Lightning: accumulation, clipping, precision, schedulers, manual steps."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.multiprocessing import ProcessRaisedException

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.optim import SparseAdam
from tests.helpers.click_data import Looking, loader
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def fitted(path, model=None, data=None, **kwargs):
    model = Model() if model is None else model
    trainer(path, **kwargs).fit(model, loader() if data is None else data)
    return model


def test_two_runs_are_alike_bit_by_bit(tmp_path):
    """Same seed, same data, same bits; and tables have their names from the module."""
    one, other = fitted(tmp_path), fitted(tmp_path)
    assert [table.name for table in hash_tables(one)] == ["user", "item", "tags"]
    assert differences(everything(one), everything(other)) == []
    assert one.user.table.step == 8
    assert one.user.table.num_updates == 8
    assert 0 < len(one.user.table) < 40  # some were evicted


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Gradients of micro-batches add up, and Lightning decides when to step."""
    small = fitted(tmp_path, filters=False, accumulate_grad_batches=2)
    large = fitted(tmp_path, data=loader(batch_size=16), filters=False)
    assert small.user.table.num_updates == large.user.table.num_updates == 4
    one, other = everything(small), everything(large)
    for key in one:
        if key.startswith("dense") or key.endswith("weights"):
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)


def test_ids_of_a_micro_batch_survive_until_the_step(tmp_path):
    """The filter runs between micro-batches."""
    model = fitted(tmp_path, accumulate_grad_batches=8)
    assert model.user.table.num_updates == 1
    held = model.user.table.get_extra_state()
    assert held["slots"]["exp_avg"].any(1).all()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_trainer_clips_the_dense_part_as_without_tables(tmp_path, algorithm):
    """gradient_clip_val finds dense parameters only, and the same ones."""
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    with_tables = fitted(tmp_path, Model(separate=True), **settings)
    without = fitted(tmp_path, Model(separate=True, tables=False), **settings)
    unclipped = fitted(tmp_path, Model(separate=True))
    for name, value in without.named_parameters():
        assert torch.equal(with_tables.get_parameter(name), value)
        assert not torch.equal(unclipped.get_parameter(name), value)
    sparse, free = everything(with_tables), everything(unclipped)
    assert torch.equal(sparse["user weights"], free["user weights"])


# ---- precision


def test_bf16_mixed(tmp_path):
    """Tables keep float32 rows and train as close to full precision as bfloat16 allows."""
    plain = everything(fitted(tmp_path))
    mixed = fitted(tmp_path, precision="bf16-mixed")
    assert mixed.user.table.dtype is torch.float32
    for key, value in everything(mixed).items():
        if key.endswith("ids"):
            assert torch.equal(value, plain[key])
        if key.endswith("weights"):
            torch.testing.assert_close(value, plain[key], rtol=0.2, atol=0.05)


def test_16_mixed_is_refused(tmp_path):
    """A GradScaler would leave gradients of tables scaled."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="precision '16-mixed' scales the loss"):
        fitted(tmp_path, plugins=[plugin])


def test_bf16_true(tmp_path):
    """Rows become bfloat16; optimizer state stays float32."""
    model = fitted(tmp_path, precision="bf16-true")
    assert model.user.table.dtype is torch.bfloat16
    held = model.user.table.get_extra_state()
    assert held["weights"].dtype is torch.bfloat16
    assert held["slots"]["exp_avg"].dtype is torch.float32
    assert model.user.table.num_updates == 8


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("16-true", torch.float16)]
)
def test_precision_of_other_rows_is_refused(tmp_path, precision, dtype):
    """There are rows of float32 and bfloat16; the error names a table and the precisions."""
    wanted = rf"table '\w+': .*got {dtype}, from .*precision=.*; use precision '32-true'"
    with pytest.raises(ValueError, match=wanted):
        fitted(tmp_path, precision=precision)


# ---- schedulers


class Scheduled(Model):
    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler, interval = self.schedule(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]


SCHEDULERS = {
    "StepLR by epoch": lambda o: (torch.optim.lr_scheduler.StepLR(o, 1, 0.1), "epoch"),
    "StepLR by step": lambda o: (torch.optim.lr_scheduler.StepLR(o, 2, 0.1), "step"),
    "OneCycleLR": lambda o: (
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.4], total_steps=20),
        "step",
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_sparse_group(tmp_path, name):
    """What they set is what rows are updated with, and LearningRateMonitor logs it."""
    monitor = LearningRateMonitor("step")
    model = Scheduled()
    model.schedule = SCHEDULERS[name]
    run = trainer(
        tmp_path,
        monitor,
        max_epochs=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    run.fit(model, loader())
    rates = torch.tensor(model.rates)
    assert rates[:, 1].unique().numel() > 1
    ratio = 4.0 if name == "OneCycleLR" else 1.0
    torch.testing.assert_close(rates[:, 1], rates[:, 0] * ratio)
    logged = torch.tensor(monitor.lrs["lr-SparseDenseOptimizer/user+item+tags"])
    torch.testing.assert_close(logged, rates[:, 1])
    sparse = run.optimizers[0].sparse[0]
    assert sparse.param_groups[0] is run.optimizers[0].param_groups[1]


def test_a_rate_of_zero_stands_still(tmp_path):
    """The scheduled rate reaches the rows."""
    model = Scheduled()
    model.schedule = lambda o: (torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.0), "step")
    initial = Model()
    initial.user.table.set_default_name("user")
    fitted(tmp_path, model, filters=False)
    ids = model.user.table.ids()
    assert torch.equal(model.user.table.embeddings(ids), initial.user(ids))


# ---- other ways to train


class Manual(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        both = super().configure_optimizers()
        return both.dense, both.sparse[0]


def test_manual_optimization_is_the_same(tmp_path):
    """Two optimizers stepped by hand, or one that steps both."""
    assert differences(everything(fitted(tmp_path, Manual())), everything(fitted(tmp_path))) == []


class Factors(L.LightningModule):
    """Nothing but tables."""

    def __init__(self):
        super().__init__()
        self.user, self.item = DynamicEmbedding(4), DynamicEmbedding(4)

    def training_step(self, batch, batch_idx):
        scores = (self.user(batch["user"]) * (self.item(batch["item"]) + 1)).sum(1)
        return (scores - batch["label"]).pow(2).mean()

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self), lr=0.1)


@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")  # nothing to clip
def test_a_sparse_optimizer_alone(tmp_path):
    """A model without dense parameters, with clipping on for good measure."""
    model = Factors()
    loss = [model.training_step(batch, 0).item() for batch in loader()]
    fitted(tmp_path, model, max_epochs=20, gradient_clip_val=1.0, filters=False)
    assert sum(model.training_step(batch, 0).item() for batch in loader()) < 0.7 * sum(loss)


class Forgetful(Model):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def test_a_missing_sparse_optimizer_is_an_error(tmp_path):
    """It names the table and the line to add."""
    with pytest.raises(RuntimeError, match=r"'user' has a gradient and no optimizer .* add"):
        fitted(tmp_path, Forgetful())


class Pair(Model):
    def configure_optimizers(self):
        both = super().configure_optimizers()
        return both.dense, both.sparse[0]


def test_two_optimizers_are_lightnings_own_error(tmp_path):
    """Automatic optimization takes one: that is what SparseDenseOptimizer is for."""
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual"):
        fitted(tmp_path, Pair())


@pytest.mark.slow
def test_a_compiled_module_trains_the_same(tmp_path):
    """torch.compile breaks its graph at every lookup."""
    torch._dynamo.reset()
    model = Model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        fitted(tmp_path, torch.compile(model, backend="eager"))
    plain = everything(fitted(tmp_path))
    for key, value in everything(model).items():
        if torch.is_tensor(value):
            torch.testing.assert_close(value, plain[key])


def test_two_fits_in_a_row(tmp_path):
    """The second trains on with an optimizer of its own, whatever became of the first."""
    model = fitted(tmp_path)
    first = everything(model)
    fitted(tmp_path, model)
    assert model.user.table.num_updates == 16
    assert differences(first, everything(model))
    fitted(tmp_path, model, data=loader(16, 4))
    assert model.user.table.num_updates == 20


def test_fast_dev_run(tmp_path):
    """One batch of everything."""
    model = fitted(tmp_path, fast_dev_run=True)
    assert model.user.table.num_updates == 1


def test_evaluation_changes_no_table(tmp_path):
    """validate, test and predict, and validation inside fit."""
    model = fitted(tmp_path)
    before = everything(model)
    run = trainer(tmp_path)
    run.validate(model, loader(200), verbose=False)
    run.test(model, loader(200), verbose=False)
    run.predict(model, loader(200))
    assert differences(before, everything(model)) == []
    other = Model()
    trainer(tmp_path, val_check_interval=2, num_sanity_val_steps=2).fit(
        other, loader(), loader(200)
    )
    assert differences(before, everything(other)) == []


# ---- processes


@pytest.mark.filterwarnings("ignore")  # what ddp says of itself on the way
def test_processes_that_keep_their_shards_are_refused(tmp_path):
    """Of forked processes only rank 0's module comes back; without our hooks it is said too."""
    with pytest.raises(ProcessRaisedException, match="with processes started by 'fork'"):
        fitted(tmp_path, filters=False, devices=2, strategy="ddp_fork")


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.slow_except(dict(context="fork"))
def test_loader_workers(tmp_path, context):
    """Processes started by fork or spawn, kept over epochs, feed the same training."""
    data = loader(num_workers=1, persistent_workers=True, multiprocessing_context=context)
    model = fitted(tmp_path, data=data, max_epochs=2)
    assert differences(everything(model), everything(fitted(tmp_path, max_epochs=2))) == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_tables_can_be_read_in_workers(context):
    """Kernels run in a forked process, whose OpenMP threads are gone, and in a fresh one."""
    table = DynamicEmbedding(4).table
    table.insert(torch.arange(20_000), torch.randn(20_000, 4))
    read = torch.cat(
        list(
            torch.utils.data.DataLoader(
                Looking(table), 8, num_workers=1, multiprocessing_context=context
            )
        )
    )
    assert torch.equal(read, table.embeddings(torch.arange(16)))
