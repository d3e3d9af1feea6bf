"""Calls that must be refused, and must change nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recis_lightning import HashTable, Jagged
from recis_lightning.eviction import MaxRows
from tests.fuzz import forms

Call = tuple[str, Callable[[], Any]]


def choose(rng: random.Random, kind: str, module: nn.Module, tables: Sequence[HashTable]) -> Call:
    """Return a bad call and its name; its ids are new ones, so that a claimed row is noticed."""
    table = rng.choice(tables)
    kinds: list[Callable[[], Call]] = [
        lambda: _of_table(rng, table),
        lambda: _bad_state(rng, table),
        lambda: _of_module(rng, kind, module),
        lambda: _of_module(rng, kind, module),
    ]
    return rng.choice(kinds)()


def _fresh(rng: random.Random, count: int = 3) -> torch.Tensor:
    return torch.tensor([rng.randrange(2**40, 2**41) for _ in range(count)])


def _of_module(rng: random.Random, kind: str, module: nn.Module) -> Call:
    if kind == "embedding":
        if rng.random() < 0.2:
            return "fake ids", lambda: _fake(module, lambda ids: (ids,))
        name, ids = forms.wrong_ids(rng)
        return f"ids {name}", lambda: module(ids)
    if kind == "bag":
        return _of_bag(rng, module)
    feature = rng.choice(("sum", "mean"))
    ids, kind = _fresh(rng), rng.choice(("ids", "offsets", "weights", "fake"))
    if kind == "ids":
        name, wrong = forms.wrong_ids(rng)
    elif kind == "offsets":
        name, offsets = forms.wrong_offsets(rng, len(ids))
        wrong = Jagged(ids, offsets)
    elif kind == "weights":
        name, weights = forms.wrong_weights(rng, len(ids))
        wrong = Jagged(ids, torch.tensor([0, 1, 3]), weights)
    else:
        return "fake ids", lambda: _fake(module, lambda ids: (_features(rng, {feature: ids}),))
    return f"{kind} {name}", lambda: module(_features(rng, {feature: wrong}))


def _features(rng: random.Random, some: dict[str, Any]) -> dict[str, Any]:
    good = {name: _fresh(rng, 4).view(2, 2) for name in ("id", "sum", "mean", "tile")}
    return {**good, **some}


def _fake(module: nn.Module, arguments: Callable[[Any], tuple[Any, ...]]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return module(*arguments(torch.zeros((2, 2), dtype=torch.int64)))


def _of_bag(rng: random.Random, module: Any) -> Call:
    ids = _fresh(rng)
    good = torch.tensor([0, 1, 3] if module.include_last_offset else [0, 1])
    kind = rng.choice(("ids", "offsets", "offsets", "weights", "other"))
    if kind == "ids":
        name, wrong = forms.wrong_ids(rng)
        return f"ids {name}", lambda: module(wrong, good)
    if kind == "offsets":
        if not module.include_last_offset:
            name = rng.choice(("falling", "negative", "behind the end", "not from zero", "on meta"))
            offsets = {
                "falling": torch.tensor([0, 2, 1]),
                "negative": torch.tensor([0, -1]),
                "behind the end": torch.tensor([0, 9]),
                "not from zero": torch.tensor([1, 2]),
                "on meta": torch.empty(2, dtype=torch.int64, device="meta"),
            }[name]
        else:
            name, offsets = forms.wrong_offsets(rng, len(ids))
        return f"offsets {name}", lambda: module(ids, offsets)
    if kind == "weights":
        if module.mode == "mean":
            return "weights of a mean", lambda: module(ids, good, torch.ones(3))
        name, weights = forms.wrong_weights(rng, len(ids))
        return f"weights {name}", lambda: module(ids, good, weights)
    others: dict[str, Callable[[], Any]] = {
        "1-D ids without offsets": lambda: module(ids),
        "2-D ids with offsets": lambda: module(ids[None], good),
        "3-D ids": lambda: module(ids[None, None]),
        "0-D ids": lambda: module(ids[0], good),
        "fake ids": lambda: _fake(module, lambda fake: (fake,)),
    }
    name = rng.choice(list(others))
    return name, others[name]


def _of_table(rng: random.Random, table: HashTable) -> Call:
    ids, dim = _fresh(rng), table.embedding_dim
    what, wrong = forms.wrong_ids(rng)
    on_meta = torch.empty(3, dim, device="meta")
    calls: dict[str, Callable[[], Any]] = {
        f"insert of ids {what}": lambda: table.insert(wrong, torch.ones(3, dim)),
        f"delete of ids {what}": lambda: table.delete(wrong),
        f"pin of ids {what}": lambda: table.pin(wrong),
        f"unpin of ids {what}": lambda: table.unpin(wrong),
        f"embeddings of ids {what}": lambda: table.embeddings(wrong),
        f"last_seen of ids {what}": lambda: table.last_seen(wrong),
        "insert of too few rows": lambda: table.insert(ids, torch.ones(2, dim)),
        "insert of too wide rows": lambda: table.insert(ids, torch.ones(3, dim + 1)),
        "insert of rows on meta": lambda: table.insert(ids, on_meta),
        "insert of no rows": lambda: table.insert(ids, None),  # type: ignore[arg-type]
        "evict by a word": lambda: table.evict("old"),  # type: ignore[arg-type]
        "evict by a column that is not kept": lambda: table.evict(MaxRows(1, by="count")),
        "a survey out of range": lambda: table.survey(0.5, 1.5),
        "a step of text": lambda: table.update_step("one"),  # type: ignore[arg-type]
    }
    name = rng.choice(list(calls))
    return name, calls[name]


def _bad_state(rng: random.Random, table: HashTable) -> Call:
    """Return the loading of a state with one thing wrong."""
    state = table.get_extra_state()
    del state["checksum"]  # changed on purpose
    if not len(state["ids"]):
        return "a state that is text", lambda: table.set_extra_state("state")  # type: ignore
    slots, weights, ids = state["slots"], state["weights"], state["ids"]
    changes: dict[str, dict[str, Any]] = {
        "no schema": {"schema": None},
        "another schema": {"schema": 10**6},
        "another dim": {"embedding_dim": table.embedding_dim + 1},
        "an unknown dtype": {"dtype": "int8"},
        "an id twice": {"ids": ids.new_full(ids.shape, 5)},
        "too few ids": {"ids": ids[1:]},
        "ids that are floats": {"ids": ids.double()},
        "ids on meta": {"ids": ids.to("meta")},
        "sparse ids": {"ids": ids.to_sparse()},
        "ids in two dimensions": {"ids": ids[None]},
        "weights on meta": {"weights": weights.to("meta")},
        "sparse weights": {"weights": weights.to_sparse()},
        "wide weights": {"weights": weights.repeat(1, 1000)},
        "no weights": {"weights": None},
        "slots on meta": {"slots": {key: slot.to("meta") for key, slot in slots.items()}},
        "sparse slots": {"slots": {key: slot.to_sparse() for key, slot in slots.items()}},
        "slots that are a list": {"slots": []},
        "slots under a number": {"slots": {7: torch.zeros(len(ids))}},
        "a slot that is text": {"slots": {"sum": "text"}},
        "a step of 2**63": {"step": 2**63},
        "num_updates of 2**63": {"num_updates": 2**63},
        "num_updates of -1": {"num_updates": -1},
        "state_fill of 1e300": {"state_fill": 1e300},
        "state_fill of nan": {"state_fill": float("nan")},
        "last_seen on meta": {"last_seen": torch.empty(len(ids), dtype=torch.int64, device="meta")},
        "pinned ids that are floats": {"pinned_ids": torch.ones(2)},
    }
    if len(ids) == 1:
        del changes["an id twice"]
    name = rng.choice(list(changes))
    return f"a state with {name}", lambda: table.set_extra_state({**state, **changes[name]})
