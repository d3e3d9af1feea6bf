"""HashTableFilterHook: steps of eviction, under a Trainer and in a loop written by hand."""

import copy
import logging
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.callbacks import HashTableFilterHook, Hook
from recis_lightning.callbacks import filter as filter_module
from recis_lightning.distributed import collectives
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseSGD
from tests.helpers.quiet_trainer import quiet_trainer


class Model(pl.LightningModule):
    """Looks up the given ids, batch after batch; ``plain`` has no eviction policy."""

    def __init__(self, batches, filter_step=1):
        super().__init__()
        self.batches = batches
        self.filtered = DynamicEmbedding(
            2, eviction=GlobalStepFilter(filter_step=filter_step), name="filtered"
        )
        self.plain = DynamicEmbedding(2, name="plain")

    @property
    def table(self):
        return hash_tables(self.filtered)[0]

    def training_step(self, batch, batch_idx):
        return self.filtered(batch).sum() + self.plain(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.filtered(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return SparseSGD(hash_tables(self), lr=0.1)

    def train_dataloader(self):
        return DataLoader([torch.tensor(ids) for ids in self.batches], batch_size=None)

    def val_dataloader(self):
        return DataLoader([torch.tensor([1, 99])] * 3, batch_size=None)

    test_dataloader = val_dataloader


class Watch(Hook):
    """Records the ids of the filtered table after each batch."""

    def __init__(self):
        self.ids = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.ids.append(sorted(pl_module.table.ids().tolist()))


@pytest.fixture
def make_trainer(tmp_path):
    return partial(quiet_trainer, tmp_path, limit_val_batches=0)


@pytest.fixture
def evictions(monkeypatch):
    """Record (name, step) of each eviction of a table with a policy."""
    calls = []
    evict = HashTable.evict

    def recording(table):
        calls.append((table.name, table.step))
        return evict(table)

    monkeypatch.setattr(HashTable, "evict", recording)
    return calls


@pytest.mark.parametrize("filter_step", [1, 2, 3])
def test_an_id_goes_after_the_kth_batch_in_a_row_that_missed_it(make_trainer, filter_step):
    # 7 is seen in batches 0 and 3, then no more.
    batches = [[7, 1], [1], [1], [7, 1], [1], [1], [1], [1]]
    watch = Watch()
    make_trainer(HashTableFilterHook(filter_interval=1), watch).fit(Model(batches, filter_step))
    missed = 0
    for batch, ids in zip(batches, watch.ids, strict=True):
        missed = 0 if 7 in batch else missed + 1
        assert (7 in ids) == (missed < filter_step)
        assert 1 in ids


@pytest.mark.parametrize("filter_interval", [1, 2, 3, 5])
def test_filtering_happens_at_anchor_plus_multiples(make_trainer, evictions, filter_interval):
    model = Model([[i] for i in range(12)])
    make_trainer(HashTableFilterHook(filter_interval)).fit(model)
    expected = range(1 + filter_interval, 13, filter_interval)
    assert evictions == [("filtered", step) for step in expected]


def test_every_table_counts_steps_and_those_with_a_policy_filter(make_trainer, evictions):
    model = Model([[1]] * 5)
    make_trainer(HashTableFilterHook(2)).fit(model)
    assert [table.step for table in hash_tables(model)] == [5, 5]
    assert {name for name, _ in evictions} == {"filtered"}


def test_none_filters_nothing_and_counts_steps(make_trainer, evictions):
    model = Model([[i] for i in range(6)])
    make_trainer(HashTableFilterHook(None)).fit(model)
    assert evictions == []
    assert model.table.step == 6
    assert len(model.table) == 6


def test_accumulation_counts_batches(make_trainer, evictions):
    model = Model([[i] for i in range(6)])
    make_trainer(HashTableFilterHook(2), accumulate_grad_batches=3).fit(model)
    assert evictions == [("filtered", 3), ("filtered", 5)]
    assert model.table.step == 6


def test_several_optimizers_count_batches(make_trainer, evictions):
    class Manual(Model):
        def __init__(self, batches):
            super().__init__(batches)
            self.automatic_optimization = False

        def configure_optimizers(self):
            tables = hash_tables(self)
            return [SparseSGD(tables[:1], lr=0.1), SparseSGD(tables[1:], lr=0.1)]

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

    model = Manual([[i] for i in range(5)])
    trainer = make_trainer(HashTableFilterHook(2))
    trainer.fit(model)
    assert trainer.global_step == 10
    assert evictions == [("filtered", 3), ("filtered", 5)]


def test_evaluation_ages_nothing(make_trainer, evictions):
    model = Model([[1], [2], [3]])
    trainer = make_trainer(
        HashTableFilterHook(1), limit_val_batches=3, num_sanity_val_steps=2, val_check_interval=1
    )
    trainer.fit(model)
    assert model.table.step == 3
    before = list(evictions)
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    assert model.table.step == 3
    assert evictions == before == [("filtered", 2), ("filtered", 3)]
    assert 99 not in model.table.ids().tolist()


@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode")
def test_a_table_in_eval_keeps_its_rows(make_trainer, evictions):
    """It stamps no row, so each would soon be old; in train mode a frozen one is filtered."""
    model = Model([[1], [2], [3], [4], [5], [6]])
    model.filtered(torch.tensor([7, 8]))
    model.filtered.requires_grad_(False).eval()
    make_trainer(HashTableFilterHook(1), max_epochs=1).fit(model)
    assert sorted(model.table.ids().tolist()) == [7, 8]
    assert (model.table.step, hash_tables(model.plain)[0].step) == (0, 6)
    model.filtered.train()
    make_trainer(HashTableFilterHook(1), max_epochs=1).fit(model)
    assert 7 not in model.table.ids().tolist()


class OneBatchEpochs(Model):
    """Has one batch in each epoch, so that a run can resume from the end of any step."""

    def training_step(self, batch, batch_idx):
        return super().training_step(torch.tensor(self.batches[self.global_step]), batch_idx)

    def train_dataloader(self):
        return DataLoader(torch.zeros(1))


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.slow_except(dict(stop=[1, 3]))
def test_the_position_survives_a_resume(make_trainer, evictions, tmp_path, stop):
    batches = [[i] for i in range(8)]
    watch = Watch()
    make_trainer(HashTableFilterHook(3), watch, max_epochs=8).fit(OneBatchEpochs(batches, 2))
    whole, unbroken = list(evictions), watch.ids
    assert whole == [("filtered", 4), ("filtered", 7)]

    evictions.clear()
    first, second = Watch(), Watch()
    trainer = make_trainer(HashTableFilterHook(3), first, max_epochs=stop)
    trainer.fit(OneBatchEpochs(batches, 2))
    path = tmp_path / "stop.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["HashTableFilterHook"]
    assert state == {"num_batches": stop, "last_filter_step": 4 if stop >= 4 else 1}

    model = OneBatchEpochs(batches, 2)
    make_trainer(HashTableFilterHook(3), second, max_epochs=8).fit(model, ckpt_path=path)
    assert evictions == whole
    assert first.ids + second.ids == unbroken
    assert model.table.step == 8


def test_a_hook_goes_on_counting_in_a_second_fit(make_trainer, evictions):
    hook = HashTableFilterHook(3)
    model, trainer = Model([[1]] * 5), make_trainer(hook)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model)
    assert evictions == [("filtered", 4), ("filtered", 7), ("filtered", 10)]


def test_two_hooks_are_refused(make_trainer):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        make_trainer(HashTableFilterHook(1), HashTableFilterHook(2))


def test_counts_before_and_after_are_logged(make_trainer, caplog):
    caplog.set_level(logging.INFO)
    make_trainer(HashTableFilterHook(3)).fit(Model([[1, 2], [2, 3], [3], [3], [3]]))
    lines = [r.getMessage() for r in caplog.records if r.name == filter_module.__name__]
    assert lines == ["Filtered 1 table at step 4: filtered 3 -> 1"]


def test_a_filtering_is_one_line_and_only_if_rows_went(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    tables = [HashTable(2, name=name, eviction=GlobalStepFilter(2)) for name in "abc"]
    for table, number in zip(tables, (3, 2, 1), strict=True):
        table.insert(torch.arange(number), torch.ones(number, 2))
    tables[2].pin(torch.tensor([0]))
    hook = HashTableFilterHook(1)
    hook._tables = tables
    for step in range(6):
        hook.after_step(None, step)
    lines = [r.getMessage() for r in caplog.records if r.name == filter_module.__name__]
    assert lines == ["Filtered 2 tables at step 2: a 3 -> 0, b 2 -> 0"]


def test_the_line_has_the_rows_of_all_ranks(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    others = [("a", 10, 4), ("b", 5, 5)]
    monkeypatch.setattr(collectives, "gather", lambda mine, _: [mine, others, others[:1]])
    tables = [HashTable(2, name=name, eviction=GlobalStepFilter(1)) for name in "ab"]
    hook = HashTableFilterHook(1)
    hook._tables = tables
    hook.after_step(None, 0)
    hook.after_step(None, 1)
    lines = [r.getMessage() for r in caplog.records if r.name == filter_module.__name__]
    assert lines == ["Filtered 1 table at step 1: a 20 -> 8"]


def test_by_hand_a_deep_copy_stays_as_it_is():
    model = torch.nn.Sequential(DynamicEmbedding(2, eviction=GlobalStepFilter(1), name="m"))
    hook = HashTableFilterHook(1)
    model(torch.tensor([1, 2, 3]))
    hook.after_step(None, 1)
    best = copy.deepcopy(model)
    for step in range(2, 6):
        model(torch.tensor([9]))
        hook.after_step(None, step)
    assert hash_tables(model)[0].ids().tolist() == [9]
    assert sorted(hash_tables(best)[0].ids().tolist()) == [1, 2, 3]
    assert hash_tables(best)[0].step == 1
    del model  # the copy takes its place
    best(torch.tensor([7]))
    for step in range(6, 9):
        hook.after_step(None, step)
    assert hash_tables(best)[0].step == 4


@pytest.mark.parametrize("gone", ["none", "middle", "first"])
def test_by_hand_a_copy_of_a_copy_stays_as_long_as_one_before_it_lives(gone):
    first = torch.nn.Sequential(DynamicEmbedding(2, eviction=GlobalStepFilter(1), name="m"))
    first(torch.tensor([1, 2, 3]))
    middle = copy.deepcopy(first)
    last = copy.deepcopy(middle)
    if gone == "middle":
        del middle
    elif gone == "first":
        del first
    hook = HashTableFilterHook(1)
    for step in range(4):
        hook.after_step(None, step)
    assert len(hash_tables(last)[0]) == 3
    if gone != "middle":
        assert len(hash_tables(middle)[0]) == (0 if gone == "first" else 3)


def test_by_hand_without_a_table_it_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(filter_module, "live_hash_tables", list)
    hook = HashTableFilterHook(1)
    for step in range(3):
        hook.after_step(None, step)
    lines = [r.getMessage() for r in caplog.records if r.name == filter_module.__name__]
    assert lines == ["HashTableFilterHook has nothing to do: of tables with a policy none"]


def test_in_another_trainer_a_hook_starts_anew(make_trainer, evictions):
    hook = HashTableFilterHook(3)
    make_trainer(hook).fit(Model([[i] for i in range(5)]))
    assert evictions == [("filtered", 4)]
    evictions.clear()
    make_trainer(hook).fit(Model([[i] for i in range(5)]))
    assert evictions == [("filtered", 4)]
    assert hook.state_dict() == {"num_batches": 5, "last_filter_step": 4}


def test_state_that_was_loaded_by_hand_is_kept(make_trainer, evictions):
    hook = HashTableFilterHook(3)
    hook.load_state_dict({"num_batches": 10, "last_filter_step": 9})
    make_trainer(hook).fit(Model([[i] for i in range(3)]))
    assert evictions == [("filtered", 2)]


def test_other_ranks_filter_in_silence(make_trainer, evictions, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    model = Model([[1], [2], [3]])
    make_trainer(HashTableFilterHook(1)).fit(model)
    assert model.table.ids().tolist() == [3]
    assert not [r for r in caplog.records if r.name == filter_module.__name__]


def test_an_override_of_after_step_runs_once_a_batch(make_trainer):
    class Recording(HashTableFilterHook):
        def __init__(self):
            super().__init__(2)
            self.steps = []

        def after_step(self, _, gstep):
            super().after_step(_, gstep)
            self.steps.append(gstep)

        def before_step(self, batch_idx):
            self.steps.append(-batch_idx)

    hook, model = Recording(), Model([[1]] * 3)
    make_trainer(hook).fit(model)
    assert hook.steps == [0, 1, -1, 2, -2, 3]
    assert model.table.step == 3


def live_table(name="by hand"):
    return HashTable(2, eviction=GlobalStepFilter(filter_step=1), name=name)


def test_a_loop_by_hand_reaches_every_live_table_with_a_policy():
    tables = [live_table("a"), live_table("b")]
    plain = HashTable(2, name="plain")
    hook = HashTableFilterHook(filter_interval=2)
    for table in [*tables, plain]:
        table.insert(torch.tensor([1, 2]), torch.ones(2, 2))
    for gstep in (10, 11):
        hook.after_step(None, gstep)
    assert [len(table) for table in tables] == [2, 2]
    hook.after_step(None, torch.tensor(12))
    assert [len(table) for table in tables] == [0, 0]
    assert [table.step for table in [*tables, plain]] == [3, 3, 0]
    assert len(plain) == 2
    assert hook.last_filter_step == 12
    assert type(hook.last_filter_step) is int


def test_a_loop_by_hand_may_follow_a_trainer(make_trainer):
    hook, model, other = HashTableFilterHook(1), Model([[1]] * 2), live_table()
    make_trainer(hook).fit(model)
    assert (model.table.step, other.step) == (2, 0)
    hook.after_step(None, 3)
    assert (model.table.step, other.step) == (3, 1)


def test_a_loop_by_hand_may_follow_a_crash(make_trainer):
    class Failing(Model):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no more")

    hook, other = HashTableFilterHook(1), live_table()
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(hook).fit(Failing([[1]]))
    hook.after_step(None, 1)
    assert other.step == 1


@settings(max_examples=50, deadline=None)
@given(
    filter_interval=st.none() | st.integers(1, 6),
    first=st.integers(1, 5),
    strides=st.lists(st.integers(0, 4), max_size=20),
)
def test_the_schedule_is_that_of_recis(filter_interval, first, strides):
    gsteps = [first]
    for stride in strides:
        gsteps.append(gsteps[-1] + stride)
    table, filtered = live_table(), []
    table.evict = lambda: filtered.append(table.step) or 0
    hook = HashTableFilterHook(filter_interval)
    last, expected = gsteps[0], []
    for count, gstep in enumerate(gsteps, start=1):
        hook.after_step(None, gstep)
        if filter_interval is not None and gstep - last >= filter_interval:
            expected.append(count)
            last = gstep
    assert filtered == expected
    assert hook.last_filter_step == last


def test_a_first_step_of_zero_anchors():
    table = live_table()
    table.insert(torch.tensor([1]), torch.ones(1, 2))
    hook = HashTableFilterHook(2)
    sizes = []
    for gstep in range(4):
        hook.after_step(None, gstep)
        sizes.append(len(table))
    assert sizes == [1, 1, 0, 0]


def test_reset_filter_interval(evictions):
    table, hook = live_table("reset"), HashTableFilterHook(None)
    for gstep in range(1, 4):
        hook.after_step(None, gstep)
    hook.reset_filter_interval(2)
    assert hook.filter_interval == 2
    for gstep in range(4, 8):
        hook.after_step(None, gstep)
    assert [step for name, step in evictions if name == "reset"] == [4, 6]
    hook.reset_filter_interval()
    assert hook.filter_interval == 100
    hook.reset_filter_interval(None)
    assert hook.filter_interval is None
    assert table.step == 7


@pytest.mark.parametrize(
    ("interval", "error", "got"),
    [
        (0, ValueError, "0"),
        (-5, ValueError, "-5"),
        (True, TypeError, "True"),
        (2.0, TypeError, r"2\.0"),
        ("3", TypeError, "'3'"),
    ],
)
def test_intervals_are_checked(interval, error, got):
    with pytest.raises(error, match=rf"^filter_interval: expected an int >= 1 or None, got {got}$"):
        HashTableFilterHook(interval)
    hook = HashTableFilterHook()
    with pytest.raises(error, match=rf"^interval: expected an int >= 1 or None, got {got}$"):
        hook.reset_filter_interval(interval)
    assert hook.filter_interval == 100
