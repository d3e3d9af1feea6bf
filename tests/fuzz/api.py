"""Random sequences of calls on modules and tables, next to a dict that should agree.

Bad calls are among them: they must raise TypeError, ValueError or RuntimeError, and change nothing.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Uniform
from tests.fuzz import bad_calls, forms
from tests.fuzz.harness import Failed, Part, Tries
from tests.fuzz.oracle import (
    Bags,
    TableOracle,
    check_close,
    must_refuse,
    optimizer_of,
    pool,
    without_padding,
)

CALLS = 25  # of a round
PADDING, TILE = 3, 4

# feature -> (mode, padding_idx, table)
_ENGINE = {
    "id": ("none", None, "a"),
    "sum": ("sum", PADDING, "a"),
    "mean": ("mean", None, "b"),
    "tile": ("tile", None, "b"),
}


# What every table here has; nothing is evicted but by a policy that the call names.
_SETTINGS: dict[str, Any] = {
    "initializer": Uniform(-1.0, 1.0),
    "eviction": GlobalStepFilter(10**9),
}


class Subject:
    """A module, and what it should hold and answer.

    Attributes:
        features: Feature -> mode, padding id and table.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.kind = rng, rng.choice(("embedding", "bag", "engine"))
        dim, padding = rng.choice((1, 3, 8)), rng.choice((None, PADDING))
        self.module: nn.Module
        if self.kind == "embedding":
            self.module = DynamicEmbedding(dim, padding_idx=padding, name="a", **_SETTINGS)
            self.features = {"ids": ("none", padding, "a")}
        elif self.kind == "bag":
            mode, self.ends = rng.choice(("sum", "mean")), rng.random() < 0.5
            self.module = DynamicEmbeddingBag(
                dim, mode=mode, padding_idx=padding, name="a",
                include_last_offset=self.ends, **_SETTINGS,
            )  # fmt: skip
            self.features = {"ids": (mode, padding, "a")}
        else:
            options = {
                name: EmbeddingOption(
                    dim, table=table, mode=mode, padding_idx=padding,
                    tile_len=TILE if mode == "tile" else None, **_SETTINGS,
                )
                for name, (mode, padding, table) in _ENGINE.items()
            }  # fmt: skip
            self.module, self.features = EmbeddingEngine(options), dict(_ENGINE)
        self.bad_call: bad_calls.Call = ("", lambda: None)
        self.oracles = {table.name: TableOracle(table) for table in self.tables}
        self.optimizer = optimizer_of(self.tables)

    @property
    def tables(self) -> list[HashTable]:
        return hash_tables(self.module)

    def one(self) -> tuple[HashTable, TableOracle]:
        table = self.rng.choice(self.tables)
        return table, self.oracles[table.name]

    def check(self) -> None:
        for table in self.tables:
            self.oracles[table.name].check(table)

    # ---- lookups

    def ask(self) -> tuple[tuple[Any, ...], dict[str, Bags], dict[str, tuple[int, ...]]]:
        """Return arguments of a call, what each feature asks for, and the shapes of the answers."""
        rng, dim = self.rng, self.tables[0].embedding_dim
        if self.kind == "embedding":
            ids, bags = forms.plain(rng)
            return (ids,), {"ids": bags}, {"ids": (*ids.shape, dim)}
        if self.kind == "bag":
            arguments, bags = self._ask_bag(self.features["ids"][0])
            return arguments, {"ids": bags}, {"ids": (bags.num_bags, dim)}
        given, asked, shapes = {}, {}, {}
        for name, (mode, _, _) in self.features.items():
            if mode == "none":
                given[name], asked[name] = forms.plain(rng)
                while given[name].dim() == 0:
                    given[name], asked[name] = forms.plain(rng)
                shapes[name] = (*given[name].shape, dim)
            elif mode == "tile":
                given[name], asked[name] = forms.dense_bags(rng, longest=TILE)
                shapes[name] = (asked[name].num_bags, TILE * dim)
            else:
                form = rng.choice((forms.dense_bags, forms.ragged_bags))
                given[name], asked[name] = form(rng)
                shapes[name] = (asked[name].num_bags, dim)
                if mode == "sum" and isinstance(given[name], Tensor) and rng.random() < 0.3:
                    weights, asked[name] = forms.with_weights(rng, asked[name], given[name].shape)
                    given[name] = (given[name], weights)
        return (given,), asked, shapes

    def _ask_bag(self, mode: str) -> tuple[tuple[Any, ...], Bags]:
        rng, weights = self.rng, None
        weighted = mode == "sum" and rng.random() < 0.4
        if rng.random() < 0.5:
            ids, bags = forms.dense_bags(rng)
            if weighted:
                weights, bags = forms.with_weights(rng, bags, ids.shape)
            return (ids, None, weights), bags
        (ids, offsets, _), bags = forms.ragged_bags(rng)
        if weighted:
            weights, bags = forms.with_weights(rng, bags, ids.shape)
        if bags.num_bags == 0 and not self.ends:
            offsets = offsets[:0]
            return (ids, offsets, weights), bags
        return (ids, offsets if self.ends else offsets[:-1], weights), bags

    def expected(
        self, asked: dict[str, Bags], shapes: dict[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], dict[str, list[tuple[Tensor, dict[int, int]]]]]:
        """Return the answers, and by table the leaves that they were made from."""
        answers, leaves = {}, {name: [] for name in self.oracles}
        for name, bags in asked.items():
            mode, padding, table = self.features[name]
            leaf, places = self.oracles[table].leaf(bags.ids, padding)
            leaves[table].append((leaf, places))
            kept = without_padding(bags, padding)
            if mode == "tile":
                width = len(bags.ids) // max(bags.num_bags, 1) * leaf.shape[1]
                out = pool(leaf, places, Bags(bags.ids), mode).view(bags.num_bags, width)
                out = nn.functional.pad(out, (0, shapes[name][1] - out.shape[1]))
            else:
                out = pool(leaf, places, kept, mode)
            answers[name] = out.view(shapes[name])
        return answers, leaves

    def see(self, asked: dict[str, Bags]) -> None:
        for name, bags in asked.items():
            _, padding, table = self.features[name]
            self.oracles[table].see([i for i in bags.ids if i != padding])

    def answers(self, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
        out = self.module(*arguments)
        return out if self.kind == "engine" else {"ids": out}

    def keep_gradients(
        self,
        asked: dict[str, Bags],
        leaves: dict[str, list[tuple[Tensor, dict[int, int]]]],
    ) -> None:
        for table, parts in leaves.items():
            gradients = self.oracles[table].gradients
            for leaf, places in parts:
                for i, place in places.items():
                    add = 0 if leaf.grad is None else leaf.grad[place]
                    gradients[i] = gradients.get(i, torch.zeros(leaf.shape[1]).double()) + add


# ---- calls


def look_up_in_training(subject: Subject) -> None:
    arguments, asked, shapes = subject.ask()
    subject.module.train()
    got = subject.answers(arguments)
    subject.see(asked)
    expected, leaves = subject.expected(asked, shapes)
    compare(got, expected)
    if subject.rng.random() < 0.7:
        scale = subject.rng.randrange(-2, 3)
        for answers, dtype in ((got, torch.float32), (expected, torch.float64)):
            total = torch.zeros((), dtype=dtype)
            for name in sorted(answers):
                flat = answers[name].reshape(-1)
                total = total + (flat * (scale + torch.arange(len(flat)) % 3).to(dtype)).sum()
            total.backward()
        subject.keep_gradients(asked, leaves)


def look_up_in_evaluation(subject: Subject) -> None:
    arguments, asked, shapes = subject.ask()
    subject.module.eval()
    got = subject.answers(arguments)
    subject.module.train()
    compare(got, subject.expected(asked, shapes)[0])


def compare(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    for name, answer in expected.items():
        check_close(f"answer of {name}", got[name], answer)


def look_up_from_two_threads(subject: Subject) -> None:
    subject.module.eval()
    asks = [subject.ask() for _ in range(2)]
    wanted = [subject.expected(asked, shapes)[0] for _, asked, shapes in asks]
    wrong: list[BaseException] = []

    def predict(at: int) -> None:
        try:
            for _ in range(20):
                compare(subject.answers(asks[at][0]), wanted[at])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=predict, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    subject.module.train()
    if wrong:
        raise Failed("two threads disturb one another", repr(wrong[0])[:200])


def take_a_step(subject: Subject) -> None:
    subject.optimizer.step()
    for oracle in subject.oracles.values():
        oracle.take_a_step()


def let_time_pass(subject: Subject) -> None:
    steps = subject.rng.randrange(4)
    for table in subject.tables:
        table.update_step(steps)
        subject.oracles[table.name].step += steps


def evict(subject: Subject) -> None:
    (table, oracle), filter_step = subject.one(), subject.rng.randrange(1, 4)
    policy = GlobalStepFilter(filter_step)
    wished, gone = int(table.evict(policy, dry_run=True)), int(table.evict(policy))
    expected = oracle.evict(filter_step)
    if not wished == gone == expected:
        raise Failed("wrong number of evicted ids", f"{wished} and {gone} for {expected}")


def insert(subject: Subject) -> None:
    (table, oracle), rng = subject.one(), subject.rng
    ids, bags = forms.plain(rng)
    values = torch.randint(-8, 8, (*ids.shape, table.embedding_dim)).float() / 4
    table.insert(ids, forms.strided(rng, values))
    oracle.insert(bags.ids, values.reshape(-1, table.embedding_dim))


def delete(subject: Subject) -> None:
    table, oracle = subject.one()
    ids, bags = forms.plain(subject.rng)
    gone, expected = table.delete(ids), oracle.delete(bags.ids)
    if gone != expected:
        raise Failed("wrong number of deleted ids", f"{gone} for {expected}")


def pin(subject: Subject) -> None:
    table, oracle = subject.one()
    ids, bags = forms.plain(subject.rng)
    if subject.rng.random() < 0.5:
        table.pin(ids)
        oracle.pinned |= set(bags.ids)
    else:
        table.unpin(ids)
        oracle.pinned -= set(bags.ids)


def read(subject: Subject) -> None:
    table, oracle = subject.one()
    ids, bags = forms.plain(subject.rng)
    leaf, places = oracle.leaf(bags.ids, None)
    expected = pool(leaf, places, bags, "none").view(*ids.shape, table.embedding_dim)
    check_close("rows", table.embeddings(ids), expected)


def forget(subject: Subject) -> None:
    """Have the gradients dropped, and be copied, saved and loaded, or emptied."""
    how = subject.rng.choice(("zero_grad", "copy", "load", "load into new", "clear", "compact"))
    if how in ("zero_grad", "compact"):
        subject.optimizer.zero_grad()
        for table in subject.tables if how == "compact" else ():
            table.compact()
    elif how == "copy":
        subject.module, subject.optimizer = copy.deepcopy((subject.module, subject.optimizer))
    elif how == "clear":
        for table in subject.tables:
            table.clear()
            subject.oracles[table.name].rows.clear()
    else:
        file = io.BytesIO()
        torch.save(subject.module.state_dict(), file)
        file.seek(0)
        if how == "load into new":
            for table in subject.tables:
                table.clear()
                table.insert(torch.tensor([99]), torch.ones(1, table.embedding_dim))
        subject.module.load_state_dict(torch.load(file, weights_only=True))
    for oracle in subject.oracles.values():
        oracle.gradients = {}


def call_badly(subject: Subject) -> None:
    """Make the bad call that was chosen before."""
    _, call = subject.bad_call
    must_refuse(call, subject.tables)


CALLS_BY_WEIGHT: dict[Callable[[Subject], None], float] = {
    look_up_in_training: 6,
    look_up_in_evaluation: 2,
    look_up_from_two_threads: 0.2,
    take_a_step: 3,
    let_time_pass: 2,
    evict: 2,
    insert: 2,
    delete: 1,
    pin: 1,
    read: 1,
    forget: 2,
    call_badly: 6,
}


def run_round(rng: random.Random, folder: Path, tries: Tries) -> None:
    """Make a module and call it in random ways, to the first wrong answer."""
    torch.manual_seed(rng.randrange(2**31))
    torch.set_num_threads(rng.choice((1, 1, 2)))
    subject = Subject(rng)
    for _ in range(CALLS):
        (call,) = rng.choices(list(CALLS_BY_WEIGHT), list(CALLS_BY_WEIGHT.values()))
        what = call.__name__.replace("_", " ")
        if call is call_badly:
            subject.bad_call = bad_calls.choose(rng, subject.kind, subject.module, subject.tables)
            what = subject.bad_call[0]
        held = False
        with tries.attempt(f"{subject.kind}, {what}"):
            call(subject)
            subject.check()
            held = True
        if not held:
            return  # what the tables hold from here on would differ too


def warm_up() -> None:
    """Compile what most rounds need."""
    calls = (look_up_in_training, take_a_step, let_time_pass, evict, insert, delete, read)
    for seed in range(6):
        subject = Subject(random.Random(seed))
        for call in calls:
            with contextlib.suppress(Exception):
                call(subject)


PART = Part("api", "calls next to a dict", run_round, warm_up)
