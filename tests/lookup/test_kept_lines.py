"""What a lookup keeps for the next one of the same sizes: void when what it depends on changes.

A twin that keeps nothing does the same steps, and must agree with it to the bit.
"""

import copy
import pickle
import threading

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, HashTable, Jagged, hash_tables
from recis_lightning.admission import MinCount, ReadOnly
from recis_lightning.eviction import GlobalStepFilter, MinNorm
from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu import embedding_bag, hash_index
from recis_lightning.ops.gpu.runtime import Kernel
from recis_lightning.optim import SparseAdam, SparseSGD

pytestmark = pytest.mark.interpreted
NAMES, SIZE = ("user", "item", "tags"), 6


@pytest.fixture(autouse=True)
def _beside_a_gpu():
    with backend.use("triton"):
        yield


class _Run:
    """An engine that trains; if ``keeps`` is False, each of its lookups is like a first one."""

    def __init__(self, keeps, **policies):
        modes = dict(zip(NAMES, ("none", "none", "sum"), strict=True))
        options = {name: EmbeddingOption(2, mode=mode, **policies) for name, mode in modes.items()}
        self.engine, self.keeps = EmbeddingEngine(options), keeps
        self.optimizer = SparseSGD(hash_tables(self.engine), lr=0.1)

    @property
    def tables(self):
        return hash_tables(self.engine)

    def forget(self):
        for group in [] if self.keeps else self.engine.current_groups():
            group.layout._last = None

    def look_up(self, first=0):
        self.forget()
        return self.engine(_batch(first))

    def train(self, first=0):
        for table in self.tables:
            table.update_step()
        outputs = list(self.look_up(first).values())
        sum(out.square().sum() for out in outputs if out.requires_grad).backward()
        self.optimizer.step()
        return outputs

    def look_up_often(self, first=0, times=4):
        for _ in range(times):
            self.look_up(first)

    def state(self):
        found = []
        for table in self.tables:
            ids, order = table.ids().sort()
            weights = table.embeddings(ids)
            found += [ids, weights, order]
            if table.storage.keeps_last_seen:
                found.append(table.last_seen(ids))
        return found


def _batch(first):
    ids = torch.arange(first, first + SIZE) % (first + 4)
    return {"user": ids, "item": 7 * ids, "tags": Jagged(3 * ids, torch.tensor([0, 2, 2, SIZE]))}


def _assert_equal(one, two):
    assert len(one) == len(two)
    for mine, other in zip(one, two, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def _grow(run):
    for first in range(100, 100 + 8 * SIZE, SIZE):
        run.look_up(first)


def _insert(run):
    ids = torch.arange(1000, 1500)  # more than there is room for
    run.tables[0].insert(ids, torch.ones(500, 2))


def _load(run):
    state = copy.deepcopy(run.engine.state_dict())
    run.look_up(50)
    run.engine.load_state_dict(state)


def _set(name, value):
    def change(run):
        for table in run.tables:
            setattr(table, name, value)

    return change


def _freeze(run):
    run.tables[1].requires_grad_(False)


def _copy(run):
    run.engine = copy.deepcopy(run.engine)
    run.optimizer = SparseSGD(run.tables, lr=0.1)


def _pickle(run):
    run.engine = pickle.loads(pickle.dumps(run.engine))
    run.optimizer = SparseSGD(run.tables, lr=0.1)


def _evaluate(run):
    run.engine.eval()
    with torch.inference_mode():
        run.look_up(2)
    run.look_up()
    run.engine.train()


CHANGES = {
    "delete": lambda run: run.tables[0].delete(torch.arange(3)),
    "evict": lambda run: [table.evict(MinNorm(1.0)) for table in run.tables],
    "clear": lambda run: run.tables[0].clear(),
    "compact": lambda run: (run.tables[0].delete(torch.arange(3)), run.tables[0].compact()),
    "count": lambda run: [len(table) for table in run.tables],
    "grow": _grow,
    "insert": _insert,
    "load": _load,
    "copy": _copy,
    "pickle": _pickle,
    "move": lambda run: run.engine.to("cpu"),
    "freeze": _freeze,
    "evaluate": _evaluate,
    "optimizer": lambda run: setattr(run, "optimizer", SparseAdam(run.tables, lr=0.1)),
    "admission": _set("admission", MinCount(2)),
    "admits none": _set("admission", ReadOnly()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.slow_except(dict(id=["delete", "grow", "load", "admission"]))
def test_a_change_voids_what_is_kept(change):
    """Outputs and tables are those of lookups of which each is like a first one."""
    runs = [_Run(keeps) for keeps in (True, False)]
    for run in runs:
        run.look_up_often()
        change(run)
    _assert_agree(runs)


@pytest.mark.parametrize(
    ("name", "value"), [("eviction", None), ("admission", None), ("admission", MinCount(1))]
)
@pytest.mark.slow_except(dict(name="eviction"))
def test_a_change_of_policies_voids_what_is_kept(name, value):
    policies = {"eviction": GlobalStepFilter(1000), "admission": MinCount(2)}
    runs = [_Run(keeps, **policies) for keeps in (True, False)]
    for run in runs:
        run.look_up_often()
        _set(name, value)(run)
    _assert_agree(runs)


def test_steps_are_those_of_each_lookup_from_the_first_row_on():
    """Also of a table beside one that keeps none; its column has no address before it has rows."""
    policies = {"user": GlobalStepFilter(9), "item": None}
    engine = EmbeddingEngine(
        {name: EmbeddingOption(2, eviction=policy) for name, policy in policies.items()}
    )
    ids = torch.arange(4)
    for step in (1, 2, 3, 4):
        for table in hash_tables(engine):
            table.update_step()
        engine({name: ids for name in policies})
        assert engine.tables["user"].last_seen(ids).tolist() == [step] * 4
        engine({name: ids + 1 for name in policies})
        assert engine.tables["user"].last_seen(ids + 1).tolist() == [step] * 4


def _assert_agree(runs):
    """Assert that outputs, rows and last-seen steps of all are the same from now on."""
    _assert_equal(*(run.train() for run in runs))
    _assert_equal(*(run.train() for run in runs))
    _assert_equal(*(run.train(9) for run in runs))
    _assert_equal(*(run.state() for run in runs))
    for run in runs:
        run.engine.eval()
    _assert_equal(*(list(run.look_up(9).values()) for run in runs))
    _assert_equal(*(list(run.look_up(200).values()) for run in runs))


def test_outputs_that_a_caller_holds_are_its_own():
    """No later lookup writes to them, of whatever kind, and each finds its ids where they are."""
    run = _Run(True)
    run.look_up_often()
    run.look_up(20)
    for is_training in (True, False):
        run.engine.train(is_training)
        held = [run.look_up(first) for first in (0, 20, 0)]
        before = [[out.detach().clone() for out in outputs.values()] for outputs in held]
        for first in (20, 0):
            run.look_up(first)
        for outputs, copies in zip(held, before, strict=True):
            _assert_equal([out.detach() for out in outputs.values()], copies)
        _assert_equal(before[0], before[2])
        assert not torch.equal(before[0][0], before[1][0])


@pytest.mark.parametrize("is_training", [True, False])
def test_joined_and_single_outputs_take_turns(is_training):
    """Their rows lie at other strides, in lookups of the same sizes."""
    options = {name: EmbeddingOption(2) for name in NAMES}
    engine = EmbeddingEngine(options)
    batch = {name: torch.arange(i, i + SIZE) for i, name in enumerate(NAMES)}
    engine(batch)
    engine.train(is_training)
    for _ in range(2):
        outputs = torch.cat(list(engine(batch).values()), 1)
        assert torch.equal(engine.concat(batch), outputs)


@pytest.mark.parametrize("is_training", [True, False])
def test_offsets_and_weights_are_those_of_each_batch(is_training):
    """Their addresses are not kept, nor what they hold."""
    engine = EmbeddingEngine({"tags": EmbeddingOption(2, mode="sum")})
    ids = torch.arange(4)
    engine({"tags": Jagged(ids, torch.tensor([0, 2, 4]))})
    rows = engine.tables["tags"].embeddings(ids)
    engine.train(is_training)
    for end, scale in ((1, 1.0), (3, 2.0), (2, 3.0)):
        offsets, weights = torch.tensor([0, end, 4]), torch.full((4,), scale)
        out = engine({"tags": Jagged(ids, offsets, weights)})["tags"]
        expected = torch.stack([rows[:end].sum(0), rows[end:].sum(0)]) * scale
        torch.testing.assert_close(out, expected)


def test_threads_share_what_is_kept(monkeypatch):
    """Each sends where its own ids and outputs are, whatever the others look up meanwhile."""
    engine = EmbeddingEngine({name: EmbeddingOption(2) for name in NAMES}).eval()
    sent, stage = threading.local(), embedding_bag.stage
    monkeypatch.setattr(Kernel, "launch", lambda *numbers, **constants: None)  # one thread's alone
    monkeypatch.setattr(embedding_bag, "stage", lambda *args: _note(sent, args[0]) or stage(*args))
    wrong = []

    def look_up():
        batch = {name: torch.arange(SIZE) for name in NAMES}
        for _ in range(200):
            outputs = engine(batch)
            for line, name in zip(sent.lines, NAMES, strict=True):
                segment = line[fields.PLAN_SIZE :]
                ids = segment[fields.SEGMENT_IDS] + 8 * segment[fields.SEGMENT_START]
                if (ids, line[fields.PLAN_DATA]) != (
                    batch[name].data_ptr(),
                    outputs[name].data_ptr(),
                ):
                    wrong.append(name)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _note(sent, lines):
    sent.lines = lines.copy()


def test_tables_are_asked_for_room_once_in_a_while(monkeypatch):
    """What the host notes stays a bound of what is inserted, and no table is ever too small."""
    asked, ask = [], hash_index.tables_without_room
    monkeypatch.setattr(
        hash_index, "tables_without_room", lambda *args: asked.append(1) or ask(*args)
    )
    table = HashTable(2)
    table.storage.reserve_ids(1000)
    table.storage.reserve_rows(1000)
    header, room = table.storage.header, table.storage.guaranteed_free()
    for first in range(0, 4 * 20, 4):
        table(torch.arange(first, first + 4))
        num_ids = first + 4
        assert int(header.tensor[fields.NUM_IDS]) == num_ids
        assert header.fields.item(fields.NUM_IDS) + header.unacknowledged() >= num_ids
        assert table.storage.guaranteed_free() <= room - num_ids
    assert len(asked) == 5
    asked.clear()
    for _ in range(3):
        assert len(table) == num_ids  # takes the notes back
        table(torch.arange(4))
    assert len(asked) == 3
