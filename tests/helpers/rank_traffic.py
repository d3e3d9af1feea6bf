"""What ranks run in the test of the bytes that docs/many_ranks.md names."""

import re
from pathlib import Path

import torch
from torch import distributed

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.admission import MinCount
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.optim import SparseSGD
from recis_lightning.table.listing import hash_tables
from tests.helpers.rank_messages import sent_bytes

PAGE = Path(__file__).parents[2] / "docs" / "many_ranks.md"
RANKS_OF_NODE, IDS_OF_OWNER = 2, 6
CASES = {  # (embedding_dim, tables, settings of options and of the engine)
    "plain": (5, 2, {}, {}),
    "counted": (3, 1, {"admission": MinCount(2)}, {}),
    "bfloat16 table": (5, 1, {"dtype": torch.bfloat16}, {}),
    "rounded": (5, 2, {}, {"exchange_dtype": "bfloat16"}),
    "many tables": (1, 61, {}, {}),
}


def formulas():
    """Return the formulas by message, each with a bar behind it, and that of the far share."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| message | bytes |") :].split("\n\n")[0]
    found = re.findall(r"^\| (.*) \| `(.*)` \|$", table, re.MULTILINE)
    assert len(found) == 8
    share = re.search(r"share `(.*?)` goes to other nodes", text)
    assert share is not None
    return {f"{message}|": formula for message, formula in found}, share[1]


def ids_of_all_owners():
    """Return as many ids of each rank, each of them twice."""
    ids = torch.arange(1000)
    owners = owner_of(ids, distributed.get_world_size())
    parts = [ids[owners == owner][:IDS_OF_OWNER] for owner in owners.unique()]
    return torch.cat(parts).repeat(2)


def as_the_page_says(case):
    """Each message has the bytes of its formula, and the share that leaves the node."""
    dim, num_tables, of_options, of_engine = CASES[case]
    option = EmbeddingOption(dim, **of_options)
    engine = EmbeddingEngine({f"t{i}": option for i in range(num_tables)}, **of_engine)
    sparse, ids = SparseSGD(hash_tables(engine), lr=0.1), ids_of_all_owners()
    features = dict.fromkeys(engine.options, ids)
    with sent_bytes() as asked:
        outputs = engine(features)
    with sent_bytes() as updated:
        sum(out.float().sum() for out in outputs.values()).backward()
        sparse.step()

    ranks = distributed.get_world_size()
    names = {"R": ranks, "U": len(ids) // 2 * num_tables, "D": dim, "T": num_tables}
    names |= {"E": 2 if case == "bfloat16 table" else 4, "G": RANKS_OF_NODE}
    by_message, share = formulas()

    def wanted(message):
        (formula,) = [its for name, its in by_message.items() if name.startswith(message)]
        return eval(formula, {}, names)

    is_rounded, is_counted = case == "rounded", case == "counted"
    counts = wanted("counts ") if num_tables > 59 else 0
    rows_kind = "bfloat16" if is_rounded or case == "bfloat16 table" else "float32"
    expected = {
        "heads": wanted("heads "),
        "ids and counts": wanted("ids, if " if is_counted else "ids|") + counts,
        "rows": wanted("rows with " if is_rounded else "rows|"),
        "gradients": wanted("gradients with " if is_rounded else "gradients|"),
    }
    found = {
        "heads": _total(asked, "heads") + _total(updated, "heads"),
        "ids and counts": _total(asked, "int64"),
        "rows": _total(asked, rows_kind),
        "gradients": _total(updated, "bfloat16" if is_rounded else "float32"),
    }
    assert found == expected
    total = sum(expected.values()) - expected["heads"] - counts
    far = sum(_to_other_nodes(sent) for sent in (asked, updated))
    far_counts = counts * (ranks - RANKS_OF_NODE) // (ranks - 1)
    # ``total`` leaves out what a rank keeps, (R - 1) / R of all goes to other ranks.
    assert far - far_counts == total * ranks / (ranks - 1) * eval(share, {}, names)


def _total(sent, kind):
    return sum(size for (its, _), size in sent.items() if its == kind)


def _to_other_nodes(sent):
    node = distributed.get_rank() // RANKS_OF_NODE
    return sum(
        size for (kind, to), size in sent.items() if kind != "heads" and to // RANKS_OF_NODE != node
    )


def all_cases():
    """Each case."""
    for case in CASES:
        as_the_page_says(case)
