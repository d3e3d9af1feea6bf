"""Functions that ranks run in tests of chains of deltas, each in every process of a group."""

import os

import torch

from recis_lightning import serving
from recis_lightning.distributed import collectives
from tests.helpers.rank_checkpoints import filled, held, owned, tables


def _change(made, step):
    """Overwrite, add and delete rows of this rank's shard, in tables of two kinds."""
    for table in made:
        known = table.ids().cpu().sort().values
        some = known[step::97]
        table.insert(some, torch.full((len(some), table.embedding_dim), float(step)))
        table.delete(known[step + 3 :: 101])
        new = owned(torch.arange(50) + 1000 * step)
        table.insert(new, torch.full((len(new), table.embedding_dim), step + 0.5))


def write(folder, full_rank=None):
    """Write a base and deltas, compacted once; of one rank the disk is full at first."""
    made, _ = filled(count=2000)
    mark = serving.ModelMark(made, state=True)
    sink = serving.ChainSink(folder, compact_every=None)
    errors = []
    for step in range(4):
        delta = mark.take(step)
        real = os.fsync
        if full_rank == collectives.rank() and step == 2:

            def fail(file):
                raise OSError(28, "No space left on device")

            os.fsync = fail
        try:
            sink.write(delta)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            mark.put_back()
        finally:
            os.fsync = real
        if step == 1 and collectives.rank() == 0:
            serving.compact(folder)
        if step < 3:
            _change(made, step)
    sink.close()
    mark.close()
    return held(made), errors


def restore(folder):
    """Restore the chain, and return what this rank has."""
    made, keep = tables()
    step = serving.restore(folder, made)
    del keep
    return held(made), step
