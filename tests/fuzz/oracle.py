"""A dict in place of a table, and a lookup in plain torch in place of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.optim import SparseAdagrad
from tests.fuzz.harness import Failed
from tests.helpers.sample_tables import same

LR, FIRST_SUM, EPS = 0.25, 1.0, 1e-10  # of the optimizer; the first sum keeps gradients tame
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def optimizer_of(tables: Sequence[HashTable]) -> SparseAdagrad:
    return SparseAdagrad(tables, LR, initial_accumulator_value=FIRST_SUM, eps=EPS)


class Bags(NamedTuple):
    """What a lookup asks for, without the form in which it is given.

    Attributes:
        ids: All ids in turn.
        bag: The bag of each, or None if each id is read by itself.
        num_bags: Number of bags.
        weights: Factor of each id, or None.
    """

    ids: list[int]
    bag: list[int] | None = None
    num_bags: int = 0
    weights: list[float] | None = None


class Entry:
    """What a table should hold of an id."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.sum = weights, torch.full_like(weights, FIRST_SUM)
        self.last_seen = 0


class TableOracle:
    """What a table should hold.

    Args:
        table: The table, empty still; a table that is never trained tells the initial rows.
    """

    def __init__(self, table: HashTable) -> None:
        self.dim, self.step = table.embedding_dim, 0
        self.rows: dict[int, Entry] = {}
        self.gradients: dict[int, Tensor] = {}
        self.pinned: set[int] = set()
        self._initial: dict[int, Tensor] = {}
        self._fresh = DynamicEmbedding(
            self.dim, initializer=table.initializer, seed=table.seed, name=table.name
        )

    def see(self, ids: Sequence[int]) -> None:
        """Note a training lookup: the unknown ids come in."""
        unknown = sorted({i for i in ids if i not in self._initial})
        if unknown:
            rows = self._fresh(torch.tensor(unknown)).detach().double()
            self._initial.update(zip(unknown, rows, strict=True))
        for i in ids:
            if i not in self.rows:
                self.rows[i] = Entry(self._initial[i].clone())
            self.rows[i].last_seen = self.step

    def insert(self, ids: Sequence[int], weights: Tensor) -> None:
        for i, row in zip(ids, weights.double(), strict=True):
            if i in self.rows:
                self.rows[i].weights = row
            else:
                self.rows[i] = Entry(row)
            self.rows[i].last_seen = self.step

    def delete(self, ids: Sequence[int]) -> int:
        gone = set(ids) & self.rows.keys()
        for i in gone:
            del self.rows[i]
            self.gradients.pop(i, None)
        return len(gone)

    def evict(self, filter_step: int) -> int:
        stay = self.gradients.keys() | self.pinned
        gone = {
            i
            for i, entry in self.rows.items()
            if i not in stay and entry.last_seen < self.step - filter_step
        }
        for i in gone:
            del self.rows[i]
        return len(gone)

    def take_a_step(self) -> None:
        for i, gradient in self.gradients.items():
            entry = self.rows[i]
            entry.sum = entry.sum + gradient**2
            entry.weights = entry.weights - LR * gradient / (entry.sum.sqrt() + EPS)
        self.gradients = {}

    def leaf(self, ids: Sequence[int], padding: int | None) -> tuple[Tensor, dict[int, int]]:
        """Return the rows of distinct ids and a row of zeros, and each id's place in them."""
        known = sorted({i for i in ids if i in self.rows and i != padding})
        rows = [self.rows[i].weights for i in known]
        leaf = torch.stack([*rows, torch.zeros(self.dim, dtype=torch.float64)])
        return leaf.requires_grad_(), {i: place for place, i in enumerate(known)}

    def check(self, table: HashTable) -> None:
        """Raise unless the table holds the same."""
        held = list(self.rows)
        _agree("len", len(table), len(held))
        _agree("ids", sorted(table.ids().tolist()), sorted(held))
        _agree("step", table.step, self.step)
        _agree("pinned", table.pinned.tolist(), sorted(self.pinned))
        ids = torch.tensor(held, dtype=torch.int64)
        seen = [entry.last_seen for entry in self.rows.values()]
        _agree("last_seen", table.last_seen(ids).tolist(), seen)
        weights = [entry.weights for entry in self.rows.values()]
        check_close("rows", table.embeddings(ids), stack(weights, self.dim))
        state = table.get_extra_state()
        sums = [self.rows[i].sum for i in state["ids"].tolist()]
        check_close("optimizer state", state["slots"]["sum"], stack(sums, self.dim))


def stack(rows: Sequence[Tensor], dim: int) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.empty(0, dim, dtype=torch.float64)


def pool(leaf: Tensor, places: dict[int, int], bags: Bags, mode: str) -> Tensor:
    """Pool rows in plain torch; ids without a row read as zeros."""
    zeros = len(leaf) - 1
    index = torch.tensor([places.get(i, zeros) for i in bags.ids], dtype=torch.int64)
    rows = leaf[index]
    if bags.weights is not None:
        rows = rows * torch.tensor(bags.weights, dtype=torch.float64)[:, None]
    if bags.bag is None:
        return rows
    bag = torch.tensor(bags.bag, dtype=torch.int64)
    out = torch.zeros(bags.num_bags, leaf.shape[1], dtype=torch.float64).index_add(0, bag, rows)
    if mode == "mean":
        counts = bag.bincount(minlength=bags.num_bags)
        out = out / counts.clamp(min=1)[:, None]
    return out


def without_padding(bags: Bags, padding: int | None) -> Bags:
    """Leave the padding id out of bags, as it adds nothing and is not counted."""
    if bags.bag is None or padding is None:
        return bags
    kept = [at for at, i in enumerate(bags.ids) if i != padding]
    weights = None if bags.weights is None else [bags.weights[at] for at in kept]
    return Bags(
        [bags.ids[at] for at in kept], [bags.bag[at] for at in kept], bags.num_bags, weights
    )


def check_close(what: str, got: Tensor, expected: Tensor) -> None:
    if tuple(got.shape) != tuple(expected.shape):
        raise Failed(f"wrong shape of {what}", f"{tuple(got.shape)} for {tuple(expected.shape)}")
    got, expected = got.detach().double(), expected.detach()
    if not torch.allclose(got, expected, **_CLOSE):
        worst = (got - expected).abs().max().item() if got.numel() else math.nan
        raise Failed(f"wrong {what}", f"they differ by {worst:g}")


def _agree(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise Failed(f"wrong {what}", f"{str(got)[:80]} for {str(expected)[:80]}")


def snapshot(tables: Sequence[HashTable]) -> list[dict[str, Any]]:
    """Return all that tables hold, and how many gradients are pending."""
    return [{**table.get_extra_state(), "pending": len(table.pending)} for table in tables]


def must_refuse(call: Callable[[], Any], tables: Sequence[HashTable]) -> bool:
    """Raise unless a call is refused with an error of the right kind and changes nothing."""
    before = snapshot(tables)
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        refusal: BaseException | None = error
    except Exception as error:
        raise Failed("refused with the wrong kind of error", repr(error)[:200]) from None
    else:
        refusal = None
    after = snapshot(tables)
    if not all(map(same, before, after)):
        how = "accepted" if refusal is None else f"refused ({str(refusal)[:100]})"
        raise Failed("a bad call changed a table", how)
    if refusal is None:
        raise Failed("a bad call was accepted")
    return True
