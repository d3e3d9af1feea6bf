"""What ranks run in the tests of process groups: of the package, and of users."""

import time

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, HashTable
from recis_lightning.checkpoint import save
from recis_lightning.distributed import collectives, process_group
from recis_lightning.eviction import MaxRows
from recis_lightning.lookup import finish_evaluation
from recis_lightning.optim import SparseDenseOptimizer, SparseSGD, clip_grad_norm_

IDS = torch.arange(-3, 9)


def own_group():
    """Return how long the package's group waits, and whether its ranks are those of torch's."""
    module = DynamicEmbedding(2, name="t")
    module(IDS)
    own, default = process_group.communicator(), distributed.group.WORLD
    assert own is process_group.communicator()
    assert own is not default
    assert process_group.message_device() == torch.device("cpu")
    ranks = distributed.get_process_group_ranks(own)
    return ranks, own._get_backend(torch.device("cpu")).options._timeout.total_seconds()


class Unused(nn.Module):
    """A bottom MLP that rank 1 leaves unused, under rows that backward looks up again."""

    def __init__(self):
        super().__init__()
        self.rows = DynamicEmbedding(4, name="t")
        self.top = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
        self.head = nn.Linear(4, 1)
        # Last, so that DDP sends its gradients first: on rank 1 with the first gradient of all, on
        # rank 0 after backward has looked rows up again.
        self.bottom = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

    def forward(self, ids, dense):
        def part(dense):
            return self.top(self.rows(ids) + dense)

        if distributed.get_rank() == 0:
            dense = self.bottom(dense)
        return self.head(checkpoint(part, dense, use_reentrant=False))


def unused_parameters():
    """Train with ``find_unused_parameters``: DDP's messages go in another order on each rank."""
    torch.manual_seed(0)
    model = Unused()
    # A bucket a parameter: DDP sends many messages in a backward pass.
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1e-5)
    both = SparseDenseOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.numel()], lr=0.1),
        SparseSGD([model.rows.table], lr=0.1),
    )
    for _ in range(3):
        wrapped(IDS, torch.ones(len(IDS), 4)).sum().backward()
        both.step()
        both.zero_grad()
    return [parameter.detach().sum().item() for parameter in model.top.parameters()]


def _trained(process_group, share):
    """Train an engine on a rank's share of ids; return its rows as all ranks of the group see."""
    torch.manual_seed(0)
    options = {"a": EmbeddingOption(2), "b": EmbeddingOption(3, eviction=MaxRows(20))}
    engine = EmbeddingEngine(options, process_group=process_group)
    tables = list(engine.tables.values())
    sparse = SparseSGD(tables, lr=0.5)
    for step in range(3):
        ids = IDS[share] + 4 * step
        rows = engine({"a": ids, "b": -ids})
        (rows["a"].sum() + rows["b"].pow(2).sum()).backward()
        norm = clip_grad_norm_(sparse, 1.0)
        sparse.step()
        for table in tables:
            table.update_step()
            table.evict()
    engine.eval()
    found = engine({"a": torch.arange(-9, 20), "b": torch.arange(-20, 9)})
    finish_evaluation(engine)
    return [norm, *found.values(), *(table.ids(all_ranks=True) for table in tables)]


def two_dimensions():
    """Two groups of two ranks train on the same data: each as if it were alone."""
    rank = distributed.get_rank()
    groups = [distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine, other = groups[rank % 2], groups[1 - rank % 2]
    found = _trained(mine, slice(rank // 2, None, 2))
    assert len(found[-1]) == 20
    of_all = collectives.gather([value.tolist() for value in found])
    assert of_all == [of_all[0]] * 4
    module = DynamicEmbedding(2, name="t", process_group=mine)
    refused = {}
    for what, work in {
        "differs": lambda: module(IDS) if rank < 2 else module.eval()(IDS),
        "other": lambda: HashTable(2, process_group=other),
        "save": lambda: save("/nowhere", module),
    }.items():
        try:
            work()
        except (RuntimeError, ValueError) as error:
            refused[what] = str(error)
    return of_all[0], refused


def one_dimension():
    """The same two shares on two ranks, as of all."""
    return [value.tolist() for value in _trained(None, slice(distributed.get_rank(), None, 2))]


def lost(where):
    """Rank 2 leaves its groups, as if it ended; the others say which went, and during what."""
    module = DynamicEmbedding(2, name="user")
    sparse = SparseSGD([module.table], lr=1.0)
    module(IDS).sum().backward()  # compiles what the rest needs
    sparse.step()
    module.table.ids(all_ranks=True)
    module(IDS).sum().backward()
    if distributed.get_rank() == 2:
        return None
    start = time.monotonic()
    try:
        if where == "lookup":
            module(IDS)
        elif where == "step":
            sparse.step()
        else:
            module.table.ids(all_ranks=True)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    raise AssertionError("nobody noticed")
