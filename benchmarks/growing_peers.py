"""Peers of a table that grows by training steps whose ids are all new, for ``bench_memory``.

Each has its size from the start, as its kind asks, or is copied into one of twice the size when it
is full. The ids of ``nn.Embedding`` and FBGEMM are positions: they keep none, and a user's own
mapping from ids to positions would come on top.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.managed_collision import ManagedCollision

LR = 1e-3


class Peer(Protocol):
    """Table of some kind."""

    def step(self) -> None:
        """Train on a batch of new ids."""


class Static:
    """``nn.Embedding`` with ``torch.optim.SparseAdam``; ``grows``: copied when it is full."""

    def __init__(self, num_ids: int, batch: int, dim: int, grows: bool = False) -> None:
        self.batch, self.num_ids = batch, 0
        self.gradient = torch.ones(batch, dim)
        self._put(torch.nn.Embedding(batch if grows else num_ids, dim, sparse=True))

    def _put(self, table: torch.nn.Embedding) -> None:
        self.table = table
        self.optimizer = torch.optim.SparseAdam([table.weight], lr=LR)

    def _double(self) -> None:
        old, state = self.table.weight, self.optimizer.state[self.table.weight]
        self._put(torch.nn.Embedding(2 * len(old), old.shape[1], sparse=True))
        new = self.table.weight
        new.data[: len(old)] = old.data
        self.optimizer.state[new] = {"step": state["step"]}
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[new][name] = torch.zeros_like(new.data)
            self.optimizer.state[new][name][: len(old)] = state.pop(name)

    def step(self) -> None:
        end = self.num_ids + self.batch
        if end > self.table.num_embeddings:
            self._double()
        self.table(torch.arange(self.num_ids, end)).backward(self.gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_ids = end


class Fbgemm:
    """FBGEMM's CPU table with Adagrad (it has no Adam there), which is updated in backward."""

    def __init__(self, num_ids: int, batch: int, dim: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        self.table = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_ids, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ADAGRAD,
            learning_rate=LR,
        )
        self.batch, self.num_ids = batch, 0
        self.gradient, self.offsets = torch.ones(batch, dim), torch.arange(batch + 1)

    def step(self) -> None:
        end = self.num_ids + self.batch
        self.table(torch.arange(self.num_ids, end), self.offsets).backward(self.gradient)
        self.num_ids = end


class Managed:
    """TorchRec's managed collisions with ``torch.optim.Adam``: on one process, without fusion."""

    def __init__(self, num_ids: int, batch: int, dim: int, spread: int) -> None:
        self.batch, self.num_ids, self.spread = batch, 0, spread
        self.peer = ManagedCollision(["growing"], dim, num_ids, [[self._ids()]])
        self.optimizer = torch.optim.Adam(self.peer.module.parameters(), lr=LR)
        self.gradient = torch.ones(batch, dim)

    def _ids(self) -> Tensor:
        return torch.arange(self.num_ids, self.num_ids + self.batch) * self.spread

    def step(self) -> None:
        self.peer.set_batches([[self._ids()]])
        self.num_ids += self.batch
        outputs, _ = self.peer.look_up()
        outputs.values().backward(self.gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()


def peers(dim: int, spread: int) -> dict[str, tuple[int, Callable[[int, int], Peer]]]:
    """Return peers by name: words of optimizer state for each weight, and what makes one.

    Args:
        dim: Size of a row.
        spread: Distance of ids that follow each other.
    """
    return {
        "nn.Embedding + SparseAdam, sized": (2, lambda n, batch: Static(n, batch, dim)),
        "nn.Embedding + SparseAdam, doubled": (2, lambda n, batch: Static(n, batch, dim, True)),
        "FBGEMM, Adagrad, sized": (1, lambda n, batch: Fbgemm(n, batch, dim)),
        "TorchRec managed collisions + Adam, sized": (
            2,
            lambda n, batch: Managed(n, batch, dim, spread),
        ),
    }
