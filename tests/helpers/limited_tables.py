"""Training of tables whose lookups make room, and a dict that does the same."""

import torch
from torch import distributed

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.distributed import collectives
from recis_lightning.eviction import DistanceLFU, MaxRows
from recis_lightning.initializers import Uniform
from recis_lightning.optim import SparseSGD

LIMITS = [
    MaxRows(8, when="lookup"),
    MaxRows(8, by="count", when="lookup"),
    MaxRows(8, by="count", half_life=3, when="lookup"),
    DistanceLFU(8, when="lookup"),
    DistanceLFU(8, decay_exponent=0.3, when="lookup"),
]


class Loop:
    """Training loop by hand: a lookup, a backward pass, a step."""

    def __init__(self, eviction, admission=None, module=None, optimizer=SparseSGD):
        if module is None:
            module = DynamicEmbedding(
                *(3,), eviction=eviction, admission=admission, initializer=Uniform(-1, 1), name="t"
            )
        self.module, self.table = module, module.table
        self.optimizer = optimizer(hash_tables(module), lr=0.5)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.table.update_step()

    def train(self, batch):
        # The last loss is still there when the next batch is looked up.
        self.loss = self.module(torch.tensor(batch, dtype=torch.int64)).sum()
        self.loss.backward()
        self.step()


class Truth:
    """A dict of rows: id -> [count, last-seen step, occurrences since it came]."""

    def __init__(self, limit, min_count=1):
        self.limit, self.min_count = limit, min_count
        self.rows, self.seen, self.step, self.num_evicted = {}, {}, 0, 0

    def key(self, item):
        i, (count, last, _) = item
        if isinstance(self.limit, DistanceLFU):
            distance = self.step - last + 1
            return (count / distance**self.limit.decay_exponent, last, i)
        return (last, i) if self.limit.by == "last_seen" else (count, last, i)

    def train(self, batch):
        new = []
        for i in dict.fromkeys(batch):
            if i not in self.rows:
                self.seen[i] = self.seen.get(i, 0) + batch.count(i)
                if self.seen[i] >= self.min_count:
                    new.append(i)
                    del self.seen[i]
        excess = len(self.rows) + len(new) - self.limit.n if new else 0
        may_go = sorted((item for item in self.rows.items() if item[0] not in batch), key=self.key)
        for i, _ in may_go[: max(excess, 0)]:
            del self.rows[i]
            self.num_evicted += 1
        for i in new:
            self.rows[i] = [0, 0, 0]
        for i in batch:
            if i in self.rows:
                count, _, used = self.rows[i]
                self.rows[i] = [count + 1, self.step, used + 1]
        self.step += 1
        half_life = getattr(self.limit, "half_life", None)
        if half_life and self.step % half_life == 0:
            for row in self.rows.values():
                row[0] //= 2


def batches_of(count):
    """Return lists of up to six ids, few of them frequent, with repetitions and negative ones."""
    generator = torch.Generator().manual_seed(5)
    drawn = (torch.rand(count, 6, generator=generator) ** 2 * 30 - 4).long()
    return [batch[: 6 - number % 3].tolist() for number, batch in enumerate(drawn)]


def expected_weights(truth, known):
    """Return rows trained by SGD on their sum: a step of 0.5 for each occurrence."""
    module = DynamicEmbedding(3, initializer=Uniform(-1, 1), name="t")
    initial = module(known).detach()
    used = torch.tensor([truth.rows[i][2] for i in known.tolist()])
    return initial - 0.5 * used[:, None]


def ranks_train(limit):
    """Return ids and weights of this rank's shard, after batches that ranks share."""
    loop, size = Loop(limit), collectives.world_size()
    rank = distributed.get_rank() if size > 1 else 0
    for batch in batches_of(10):
        loss = size * loop.module(torch.tensor(batch[rank::size], dtype=torch.int64)).sum()
        loss.backward()
        loop.step()
    known = loop.table.ids()
    return known.tolist(), loop.table.embeddings(known).tolist()
