"""What ranks run in the tests of retrieval: the example of docs/many_ranks.md."""

from pathlib import Path

import torch
from torch import nn

from recis_lightning import DynamicEmbedding
from recis_lightning.distributed import collectives
from recis_lightning.initializers import Normal
from tests.helpers.manual import blocks
from tests.helpers.rank_training import rank

PAGE = Path(__file__).parents[2] / "docs" / "many_ranks.md"
USERS, ITEMS = torch.arange(40), torch.arange(-60, 60) * 2**40


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = DynamicEmbedding(3, name="user", initializer=Normal(std=1.0))
        self.item = DynamicEmbedding(3, name="item", initializer=Normal(std=1.0))


def example():
    """Return the page's function."""
    [code] = [block for block in blocks(PAGE, "python") if "def recall_at" in block]
    names = {}
    exec(code, names)
    return names["recall_at"]


def evaluate():
    """Return what the page's function returns, what ``gather`` does, and the shard's size."""
    model, size, own = TwoTowers(), collectives.world_size(), rank()
    model.user(USERS[own::size])
    model.item(ITEMS[own::size])  # new ids get rows that depend on nothing but them
    ids, rows = model.item.table.gather()
    last = size - 1  # one rank has more batches than others, and with four one has none
    own_users = USERS.tensor_split([7] if size == 2 else [7, 7, 20] if size == 4 else [])[own]
    batches = [
        {"user": users, "item": ITEMS[(users * 7) % len(ITEMS)]}
        for users in own_users.split(5 if own == last else 9)
        if len(users)
    ]
    recall = example()(model, batches, 9)
    again = model.item.table.gather()
    assert all(map(torch.equal, again, (ids, rows)))
    return recall, ids.numpy(), rows.numpy(), len(model.item.table)


def gather_what_was_inserted():
    """Rows that all ranks insert are gathered once, in bfloat16 and of an empty table too."""
    made = DynamicEmbedding(2, name="half", dtype=torch.bfloat16)
    assert [len(part) for part in made.table.gather()] == [0, 0]
    made.table.insert(ITEMS, torch.arange(240.0).view(120, 2))
    ids, rows = made.table.gather()
    assert rows.dtype is torch.bfloat16
    return ids.tolist(), rows.float().tolist()
