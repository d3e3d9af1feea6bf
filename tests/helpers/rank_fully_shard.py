"""What ranks run in the tests of FSDP2: the dense part under fully_shard, or under DDP."""

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from recis_lightning import checkpoint, hash_tables, optim
from tests.helpers.rank_training import GLOBAL_BATCH, Model, local_batch, shard


def made(kind):
    model = Model()
    if kind == "ddp":
        model.tower = DistributedDataParallel(model.tower)
    else:
        fully_shard(model.tower, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    return model


def full(tower):
    """Return whole parameters, by the names they have without a wrapper."""
    values = {
        name.removeprefix("module."): value.detach() for name, value in tower.named_parameters()
    }
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).numpy()
        for name, value in values.items()
    }


def train(kind, accumulate, path):
    """Train; return losses, weights and rows, and those of a model that loads what was saved."""
    model, losses = made(kind), []
    tables = hash_tables(model)
    both = optim.SparseDenseOptimizer(
        torch.optim.AdamW(model.tower.parameters(), lr=0.05), optim.SparseAdam(tables, lr=0.05)
    )
    for step in range(4):
        for part in range(accumulate):
            batch = local_batch(accumulate * step + part)
            error = (model(batch) - batch["label"]).pow(2).sum()
            (error * distributed.get_world_size() / GLOBAL_BATCH).backward()
            distributed.all_reduce(total := error.detach().clone())
            losses.append(total.item())
        both.step()
        both.zero_grad()
    held = full(model.tower), {table.name: shard(table)["weights"] for table in tables}
    dcp.save({"tower": get_model_state_dict(model.tower)}, checkpoint_id=path / kind)
    checkpoint.save(path / kind / "tables", model)
    other = made(kind)
    state = {"tower": get_model_state_dict(other.tower)}
    dcp.load(state, checkpoint_id=path / kind)
    set_model_state_dict(other.tower, state["tower"])
    checkpoint.load(path / kind / "tables", other)
    loaded = full(other.tower), {t.name: shard(t)["weights"] for t in hash_tables(other)}
    try:
        dcp.save({"model": model.state_dict()}, checkpoint_id=path / "refused")
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    return losses, held, loaded, refused
