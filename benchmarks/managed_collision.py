"""TorchRec's managed-collision ``EmbeddingBagCollection``, a peer with tables of fixed size.

It remaps ids to the slots of a table, in Python with torch ops, before the lookup.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EVICTION_INTERVAL = 2  # batches between updates of the mapping from ids to slots


class ManagedCollision:
    """Tables with a slot for every id and one spare slot, warmed up on all batches.

    Args:
        names: Features, each with its own table.
        embedding_dim: Size of a row.
        num_ids: Ids per feature.
        batches: For each batch and feature, int64 [batch].

    Raises:
        ImportError: TorchRec or FBGEMM is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        embedding_dim: int,
        num_ids: int,
        batches: Sequence[Sequence[Tensor]],
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fbgemm_gpu  # noqa: F401 - registers its ops before TorchRec
            import torchrec
            from torchrec.modules import mc_modules
            from torchrec.modules.mc_embedding_modules import (
                ManagedCollisionEmbeddingBagCollection,
            )
        cpu, slots = torch.device("cpu"), num_ids + 1
        configs = [
            torchrec.EmbeddingBagConfig(
                name=name,
                embedding_dim=embedding_dim,
                num_embeddings=slots,
                feature_names=[name],
            )
            for name in names
        ]
        remap = {
            name: mc_modules.MCHManagedCollisionModule(
                zch_size=slots,
                device=cpu,
                eviction_policy=mc_modules.LFU_EvictionPolicy(),
                eviction_interval=EVICTION_INTERVAL,
            )
            for name in names
        }
        self.module = ManagedCollisionEmbeddingBagCollection(
            torchrec.EmbeddingBagCollection(tables=configs, device=cpu),
            mc_modules.ManagedCollisionCollection(remap, configs),
            return_remapped_features=True,
        )
        self._names, self._keyed = list(names), torchrec.KeyedJaggedTensor.from_lengths_sync
        self.set_batches(batches)
        self.num_lookups = 0
        for _ in range(max(len(batches), EVICTION_INTERVAL)):
            self.look_up()

    def set_batches(self, batches: Sequence[Sequence[Tensor]]) -> None:
        """Replace the batches that lookups go through."""
        self.batches = [
            self._keyed(
                keys=self._names,
                values=torch.cat(list(batch)),
                lengths=torch.ones(sum(len(part) for part in batch), dtype=torch.int32),
            )
            for batch in batches
        ]

    def look_up(self) -> Any:
        """Look up one batch in the module's mode; return the outputs and the remapped features."""
        batch = self.batches[self.num_lookups % len(self.batches)]
        self.num_lookups += 1
        return self.module(batch)

    def reader(self) -> Callable[[], Any]:
        """Return an evaluation lookup."""
        self.module.eval()
        return torch.no_grad()(self.look_up)

    def num_slots(self, batch: Sequence[Tensor]) -> list[int]:
        """Return the number of slots that a batch's ids fill, for each feature."""
        self.module.eval()
        features = self.module(self.batches[0])[1]
        assert len(batch) == len(features.keys())
        return [features[name].values().unique().numel() for name in features.keys()]  # noqa: SIM118
