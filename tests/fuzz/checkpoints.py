"""Damaged checkpoints: each is refused in clear words, or loads exactly what was saved.

A shard whose checksums an attacker fixed may hold other rows: then the table must be whole.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam
from tests.fuzz import mutations
from tests.fuzz.harness import Failed, Part, Tries
from tests.fuzz.interrupts import SILENT
from tests.helpers.sample_tables import EXTREMES, by_id, same

TRIES = 12  # of a round


class Tables(NamedTuple):
    """Tables of two layouts, and the optimizer that gives them state."""

    tables: list[HashTable]
    optimizer: SparseAdam

    def contents(self) -> dict[str, Any]:
        """Return all that they hold, whatever the order of their rows."""
        return {table.name: {**table.get_extra_state(), **by_id(table)} for table in self.tables}


def make_tables() -> Tables:
    made = [
        HashTable(3, name="user", eviction=GlobalStepFilter(50)),
        HashTable(2, name="item", eviction=GlobalStepFilter(50), dtype=torch.bfloat16,
                  admission=MinCount(2)),
    ]  # fmt: skip
    return Tables(made, SparseAdam(made, lr=0.1))


def fill(made: Tables, number: float) -> None:
    """Give tables rows with stamps, a pin and a gap."""
    for table in made.tables:
        ids = torch.cat([EXTREMES, torch.arange(10, 40)])
        table.insert(ids, number + ids.double()[:, None].expand(-1, table.embedding_dim) % 7)
        table.update_step(3)
        table.pin(torch.tensor([11]))
        table.delete(torch.tensor([20]))


def check_whole(made: Tables) -> None:
    """Raise unless tables agree with themselves and can be used further."""
    for table in made.tables:
        ids = table.ids()
        if len(ids) != len(table) or len(ids.unique()) != len(ids):
            raise Failed("a crafted file leaves a broken table", "len and ids disagree")
        table.embeddings(ids)
        more = torch.arange(7000, 7300)
        values = torch.full((len(more), table.embedding_dim), 3.0)
        table.insert(more, values)
        if not (table.embeddings(more) == 3).all():
            raise Failed("a crafted file leaves a broken table", "rows go elsewhere")
        table.get_extra_state()
        table.evict()


def try_to_load(path: Path, crafted: bool, saved: dict[str, Any]) -> None:
    """Load into tables with other rows; raise unless that is refused well, or right."""
    made = make_tables()
    fill(made, 100.0)
    before = made.contents()
    try:
        checkpoint.load(path, made.tables, **SILENT)
    except ValueError as error:
        if not same(made.contents(), before):
            raise Failed("a refused checkpoint changed a table", str(error)[:200]) from None
        named = str(path) in str(error) or any(f"{t.name!r}" in str(error) for t in made.tables)
        if not named:
            raise Failed("an error does not name the file", str(error)[:200]) from None
    except Exception as error:
        kind = f"refused by {type(error).__name__}, not ValueError"
        raise Failed(kind, str(error)[:200]) from None
    else:
        if crafted:
            check_whole(made)
        elif not same(made.contents(), saved):
            raise Failed("a damaged checkpoint loads other rows")


def _damage_folder(rng: random.Random, folder: Path, older: Path) -> tuple[str, bool]:
    """Damage a copy of a folder; return how, and whether its checksums are right."""
    kind = rng.choice(("bytes", "bytes", "bytes", "replace", "swap", "commit", "craft", "craft"))
    if kind == "swap":
        return mutations.swap_files(rng, folder, older), False
    if kind == "commit":
        return mutations.edit_commit(rng, folder), False
    if kind == "craft":
        return mutations.craft(rng, folder), True
    file = rng.choice(mutations.files_of(folder))
    change: Callable[..., str]
    change = mutations.replace_file if kind == "replace" else rng.choice(mutations.BYTES)
    return f"{file.name.split('.')[0]}: {change(rng, file)}", False


def run_round(rng: random.Random, folder: Path, tries: Tries) -> None:
    """Save tables to a folder and into a file, and load damaged copies of these."""
    made, older, good, file = make_tables(), folder / "older", folder / "good", folder / "good.ckpt"
    fill(made, 1.0)
    checkpoint.save(older, made.tables, **SILENT)
    fill(made, float(rng.randrange(2, 9)))
    checkpoint.save(good, made.tables, **SILENT)
    states = {f"{table.name}._extra_state": table.get_extra_state() for table in made.tables}
    torch.save({"state_dict": states, "epoch": 1}, file)
    saved = made.contents()
    for number in range(TRIES):
        bad = folder / f"bad{number}"
        if rng.random() < 0.75:
            shutil.copytree(good, bad)
            what, crafted = _damage_folder(rng, bad, older)
        else:
            shutil.copy(file, bad)
            change = mutations.replace_file if rng.random() < 0.1 else rng.choice(mutations.BYTES)
            what, crafted = f"Lightning's file: {change(rng, bad)}", False
        with tries.attempt(what):
            try_to_load(bad, crafted, saved)


def warm_up() -> None:
    """Compile what loading needs."""
    made = make_tables()
    fill(made, 1.0)
    check_whole(made)


PART = Part("checkpoints", "damaged files", run_round, warm_up)
