"""Memory of an update that is kept for the next one: results are those of memory made anew."""

import copy
import threading
from unittest.mock import patch

import numpy as np
import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.row_update import RowLayout, sort_gradients, update_rows_
from recis_lightning.optim import SparseAdam, SparseAdamW, SparseSGD

pytestmark = pytest.mark.interpreted
NAMES = ["one", "two"]


class Run:
    """A model of two tables in training, on small batches of always the same sizes."""

    def __init__(self, optimizer=SparseAdam, mode="sum", **options):
        self.engine = EmbeddingEngine({name: EmbeddingOption(4, mode=mode) for name in NAMES})
        self.optimizer = optimizer(hash_tables(self.engine), lr=0.1, **options)
        self.generator = torch.Generator().manual_seed(0)
        self.tables = list(self.engine.tables.values())

    def ids(self, least=0, most=20):
        return {
            name: torch.randint(least, most, (4, 3), generator=self.generator) for name in NAMES
        }

    def step(self, batch=None, gradient=None):
        outputs = self.engine(self.ids() if batch is None else batch)
        grads = [
            torch.randn(4, 4, generator=self.generator) if gradient is None else gradient
            for _ in outputs
        ]
        torch.autograd.backward(list(outputs.values()), grads)
        self.optimizer.step()

    def state(self):
        """Return all that the tables and the optimizer have, as numbers."""
        found = {"groups": self.optimizer.state_dict()["param_groups"]}
        for number, table in enumerate(self.tables):
            state = table.state_dict()["_extra_state"]
            order = state["ids"].argsort()
            for name, value in [*state.items(), *state["slots"].items()]:
                is_of_rows = isinstance(value, torch.Tensor) and len(value) == len(order)
                found[f"{number}.{name}"] = value[order] if is_of_rows else value
            del found[f"{number}.slots"], found[f"{number}.checksum"]
        return found


def _change_lr(run):
    for lr in (0.3, 0.01, 0.2):
        run.optimizer.param_groups[0]["lr"] = lr
        run.step()


def _schedule(run):
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    for _ in range(3):
        run.step()
        schedule.step()


def _change_decay(run):
    run.optimizer.param_groups[0]["weight_decay"] = 0.4
    run.step()


def _set_clip_value(run):
    run.optimizer.clip_grad_value = 1e-3
    run.step()
    run.optimizer.clip_grad_value = None
    run.step()


def _set_clip_norm(run):
    run.optimizer.clip_grad_norm = 1e-3
    run.step()
    run.step()
    run.optimizer.clip_grad_norm = None
    run.step()


def _set_cow_clip(run):
    run.optimizer.cow_clip = (1e-3, 1e-5)
    run.step()
    run.optimizer.cow_clip = None
    run.step()


def _grow(run):
    """Rows get other blocks, and the index other entries."""
    run.tables[0].insert(torch.arange(100, 2500), torch.ones(2400, 4))
    run.step()
    run.tables[1].insert(torch.arange(100, 2500), torch.ones(2400, 4))
    run.step()
    run.step(run.ids(0, 2500))


def _remove(run):
    run.tables[0].delete(torch.arange(0, 10))
    run.step()
    run.tables[0].compact()
    run.step(run.ids(5, 15))
    run.tables[1].clear()
    run.step()


def _load(run):
    states = run.engine.state_dict(), run.optimizer.state_dict()
    states = copy.deepcopy(states)
    run.step()
    run.engine.load_state_dict(states[0])
    run.optimizer.load_state_dict(states[1])
    run.step()


def _add_group(run):
    more = EmbeddingEngine({"three": EmbeddingOption(4, mode="sum")})
    run.optimizer.add_param_group({"params": hash_tables(more), "lr": 0.5})
    run.step()
    run.tables += more.tables.values()
    run.engine(run.ids())
    sum(out.sum() for out in more({"three": torch.arange(6).view(2, 3)}).values()).backward()
    run.step()
    run.step()


def _copy_all(run):
    """The copy goes on by itself, and so does what it is a copy of."""
    first = copy.deepcopy((run.engine, run.optimizer))
    run.step()
    run.engine, run.optimizer = first
    run.tables += run.engine.tables.values()
    run.step()
    run.step()


def _give_away(run):
    """Another optimizer takes the tables over and gives one of them back."""
    before, run.optimizer = run.optimizer, SparseSGD(hash_tables(run.engine), lr=0.5)
    run.step()
    run.step()
    run.optimizer = type(before)(hash_tables(run.engine), lr=0.3)
    run.step()


def _weigh(run):
    """Gradients have factors in some steps, in batches of the same sizes."""
    for is_weighted in (False, True, False, True, True):
        batch = {}
        for name, ids in run.ids().items():
            weights = torch.rand(12, generator=run.generator) if is_weighted else None
            batch[name] = Jagged(ids.view(-1), torch.tensor([0, 5, 5, 9, 12]), weights)
        run.step(batch)


def _give_askew(run):
    """Gradients that do not lie at multiples of 16 bytes, and then again such that do."""
    base = torch.arange(33.0)
    run.step(gradient=base[1:17].view(4, 4))
    run.step(gradient=base[:16].view(4, 4))
    run.step(gradient=base[2:18].view(4, 4))


def _accumulate(run):
    for _ in range(2):
        outputs = run.engine(run.ids())
        sum(out.square().sum() for out in outputs.values()).backward()
    run.step()
    run.step()


def _freeze(run):
    run.tables[0].trainable = False
    run.step()
    run.tables[0].trainable = True
    run.step()


def _watch(run):
    """Rows get marks, which an update clears."""
    marks = [table.storage.watch_changes() for table in run.tables]
    run.step()
    assert len(marks) == 2
    run.tables[0].storage.end_changes()
    run.step()


def _other_sizes(run):
    for num_bags in (2, 1, 1, 4):
        batch = {name: torch.arange(6).view(num_bags, -1) for name in NAMES if 6 % num_bags == 0}
        run.step(batch or None, torch.ones(num_bags, 4))


def _step_elsewhere(run):
    """In inference mode, and on another thread."""
    outputs = run.engine(run.ids())
    sum(out.sum() for out in outputs.values()).backward()
    with torch.inference_mode():
        run.optimizer.step()
    thread = threading.Thread(target=run.step)
    thread.start()
    thread.join()


SCENARIOS = {
    f.__name__.strip("_"): f
    for f in (
        *(_change_lr, _schedule, _set_clip_value, _set_clip_norm, _set_cow_clip, _grow),
        *(_remove, _load, _add_group, _copy_all, _give_away, _weigh, _give_askew),
        *(_accumulate, _freeze, _watch, _other_sizes, _step_elsewhere),
    )
}


def _train(scenario, most_bytes, optimizer=SparseAdam, **options):
    """Return what a model has after a scenario, where so much memory may be kept."""
    with backend.use("triton"):
        from recis_lightning.ops.gpu import gradient_sort

        with patch.object(gradient_sort, "_KEPT_BYTES", most_bytes):
            run = Run(optimizer, **options)
            run.step()
            run.step()
            scenario(run)
            run.step()
            return run.state()


def _assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.slow_except(dict(id=["grow", "weigh", "set_clip_norm"]))
def test_what_is_kept_goes_when_it_is_out_of_date(scenario):
    """A training is the same, bit for bit, as one where every step begins anew."""
    _assert_same(_train(scenario, 1 << 24), _train(scenario, -1))


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.slow_except(dict(mode="mean"))
def test_the_rule_may_change(mode):
    """Weight decay in the gradient makes another kernel of it, and momentum another rule."""
    options = {"momentum": 0.9, "mode": mode}
    kept = _train(_change_decay, 1 << 24, SparseSGD, **options)
    _assert_same(kept, _train(_change_decay, -1, SparseSGD, **options))
    decayed = _train(_change_decay, 1 << 24, SparseAdamW, mode=mode)
    _assert_same(decayed, _train(_change_decay, -1, SparseAdamW, mode=mode))


def test_a_steady_step_sorts_in_the_memory_of_the_one_before():
    with backend.use("triton"):
        from recis_lightning.ops.gpu import gradient_sort

        run, made = Run(), []
        run.step()
        whole = gradient_sort.SortedGradients
        with patch.object(
            gradient_sort, "SortedGradients", lambda *what: made.append(what) or whole(*what)
        ):
            for lr in (0.1, 0.2, 0.3):
                run.optimizer.param_groups[0]["lr"] = lr
                run.step()
            assert not made
            run.tables[0].insert(torch.arange(100, 2500), torch.ones(2400, 4))
            run.step()
            assert len(made) == 1


class Memory:
    """One table's rows and gradients, as an update takes them."""

    def __init__(self, lr=1.0):
        self.rows, self.gradients = torch.zeros(8, 4), torch.ones(3, 4)
        self.numbers = torch.tensor([5, 2, 5])
        self.blocks = np.array([[self.rows.data_ptr(), 0]], np.int64)
        self.on_device = torch.from_numpy(self.blocks.copy())
        self.hyper = np.ones((1, fields.HYPER_SIZE), np.float32)
        self.hyper[:, fields.HYPER_LR], self.hyper[:, fields.HYPER_CLIP] = lr, np.inf
        self.hyper[:, fields.HYPER_MARKS :] = 0
        self.layout = RowLayout(4, torch.float32, 16, 3, self.rows.device)

    def plan(self, gradients=None, weights=None):
        gradients = self.gradients if gradients is None else gradients
        plan = np.zeros((1, fields.PLAN_SIZE), np.int64)
        plan[0, fields.PLAN_MODE] = fields.SUM
        plan[0, [fields.PLAN_NUM_BAGS, fields.PLAN_NUM_IDS, fields.PLAN_BAG_LENGTH]] = 3, 3, 1
        plan[0, fields.PLAN_DATA] = gradients.data_ptr()
        plan[0, fields.PLAN_DATA_STRIDE] = 4 * gradients.stride(0)
        plan[0, fields.PLAN_ROWS] = self.numbers.data_ptr()
        plan[0, fields.PLAN_WEIGHTS] = 0 if weights is None else weights.data_ptr()
        return plan

    def update(self, kept, plan=None):
        plan = self.plan() if plan is None else plan
        where = self.blocks, self.layout, self.on_device, self.hyper
        update_rows_(sort_gradients(plan, *where, kept), fields.SGD)
        return self.rows[[2, 5], 0].tolist()


@pytest.fixture
def on_triton():
    with backend.use("triton"):
        yield


@pytest.mark.usefixtures("on_triton")
def test_each_update_reads_its_own_numbers():
    memory, kept = Memory(), {}
    assert memory.update(kept) == [-1, -2]
    memory.hyper[:, fields.HYPER_LR] = 10
    assert memory.update(kept) == [-11, -22]
    memory.hyper[:, fields.HYPER_LR] = 1
    memory.numbers = torch.tensor([2, 2, 5])
    assert memory.update(kept) == [-13, -23]
    assert memory.update(kept, memory.plan(2 * memory.gradients)) == [-17, -25]
    assert len(kept["sorted"].updates) == 1


@pytest.mark.usefixtures("on_triton")
def test_rows_or_hyperparameters_elsewhere_void_what_is_kept():
    kept, first, second = {}, Memory(), Memory(3.0)
    first.update(kept)
    assert second.update(kept) == [-3, -6]
    assert first.rows[5, 0] == -2
    second.hyper = second.hyper.copy()
    second.hyper[:, fields.HYPER_LR] = 10
    assert second.update(kept) == [-13, -26]
    third = Memory()
    third.hyper = second.hyper
    assert third.update(kept) == [-10, -20]
    assert second.rows[5, 0] == -26


@pytest.mark.usefixtures("on_triton")
def test_weights_and_gradients_askew_void_what_is_kept():
    kept, memory = {}, Memory()
    memory.update(kept)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert memory.update(kept, memory.plan(weights=weights)) == [-3, -6]
    assert memory.update(kept) == [-4, -8]
    launched = []
    from recis_lightning.ops.gpu.runtime import Kernel

    launch = Kernel.launch

    def recorded(kernel, *numbers, **constants):
        launched.append(constants.get("ALIGNED"))
        launch(kernel, *numbers, **constants)

    with patch.object(Kernel, "launch", recorded):
        askew = torch.ones(13)[1:].view(3, 4)
        assert memory.update(kept, memory.plan(askew)) == [-5, -10]
        assert set(launched) == {None, False}
        launched.clear()
        assert memory.update(kept) == [-6, -12]
        assert set(launched) == {None, True}


@pytest.mark.usefixtures("on_triton")
def test_another_stream_has_memory_of_its_own(monkeypatch):
    """What is freed is reused by the stream that it was allocated for, and nobody else waits."""
    from recis_lightning.ops.gpu import gradient_sort

    kept, memory = {}, Memory()
    memory.update(kept)
    first = kept["sorted"]
    memory.update(kept)
    assert kept["sorted"] is first
    monkeypatch.setattr(gradient_sort, "_stream_of", lambda device: 7)
    assert memory.update(kept) == [-3, -6]
    assert kept["sorted"] is not first


@pytest.mark.usefixtures("on_triton")
def test_much_memory_is_not_kept(monkeypatch):
    from recis_lightning.ops.gpu import gradient_sort

    monkeypatch.setattr(gradient_sort, "_KEPT_BYTES", 100)
    kept, memory = {}, Memory()
    memory.update(kept)
    assert memory.update(kept) == [-2, -4]
    assert "sorted" not in kept
