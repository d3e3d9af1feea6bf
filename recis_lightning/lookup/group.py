"""Lookup of a group: features of one device, dtype and dim, together.

However many features ask the group's tables and however these pool, a lookup is one index op and
one gather; backward leaves the gradients where they are and only notes them as pending.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import compress
from operator import attrgetter

import torch
from torch import Tensor

from recis_lightning.arguments import check_not_traced
from recis_lightning.distributed import collectives
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup import transfer
from recis_lightning.lookup.autograd import record_lookup
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.row_source import RowSource
from recis_lightning.lookup.signature import broadcast_signature, digest
from recis_lightning.lookup.surroundings import Runner

# For maps over hundreds of tables and tensors.
_pending, _device, _is_cpu = map(attrgetter, ("pending", "device", "is_cpu"))


class LookupGroup:
    """Features of one device, dtype and dim, and the source of their rows.

    Args:
        layout: The features.
        rows: The source of their rows.
        runner: The loop that runs the lookups.

    Attributes:
        num_ranks: Number of ranks that the group was made for.
    """

    def __init__(self, layout: FeatureLayout, rows: RowSource, runner: Runner) -> None:
        self.layout, self.rows, self.runner = layout, rows, runner
        self.num_ranks = collectives.world_size()

    def is_current(self) -> bool:
        """Return whether the tables' storage and the ranks are as they were for the layout."""
        return self.layout.is_current() and self.num_ranks == collectives.world_size()

    def look_up(self, bags: FeatureBags, training: bool) -> Generator[None, None, list[Tensor]]:
        """Look features up and pool their rows; pause while messages are under way.

        Args:
            bags: One for each feature.
            training: Insert unknown ids, stamp rows and leave gradients; otherwise only read.

        Returns:
            For each feature [n, dim] ("none"), [B, dim] or [B, tile_len * dim] ("tile").
        """
        device = bags.ids[0].device
        is_remote = self.layout.device.type == "cpu" and device.type == "cuda"
        if is_remote:
            bags = transfer.bags_from_device(bags, device)
        if training:
            self._check_trained()
        self._check_devices(bags)
        layout = self.layout
        layout.set_sizes(bags)
        outputs, plan = layout.allocate(bags)
        # A lookup inside a backward pass repeats one that was made: torch.utils.checkpoint's.
        inserts = training and torch._C._current_graph_task_id() == -1
        fetched = yield from self.rows.fetch(bags.ids, plan, inserts)
        if training or bags.details:
            outputs = record_lookup(layout, bags, plan, fetched, outputs, training)
        return transfer.outputs_to_device(outputs, device) if is_remote else outputs

    def _check_devices(self, bags: FeatureBags) -> None:
        """Raise if a feature is not where its table is."""
        device = self.layout.device
        if device.type == "cpu":
            if all(map(_is_cpu, bags.ids)):
                return
        elif not bags.details and set(map(_device, bags.ids)) == {device}:
            return
        # Kernels are given addresses: nothing else would tell.
        for name, bag in zip(self.layout.names, bags, strict=True):
            for argument in ("ids", "offsets", "weights"):
                tensor = getattr(bag, argument)
                if tensor is not None and tensor.device != device:
                    raise ValueError(
                        f"{name}: its table is on {device}, its {argument} on {tensor.device}"
                    )

    def _check_trained(self) -> None:
        tables = self.layout.tables
        for table in compress(tables, map(_pending, tables)):
            if table.optimizer is None:
                raise RuntimeError(
                    f"table {table.name!r} has a gradient and no optimizer that would use it; add "
                    "SparseAdamW(hash_tables(self), lr=...) to configure_optimizers, as in "
                    "SparseDenseOptimizer(torch.optim.AdamW(self.parameters()), "
                    "SparseAdamW(hash_tables(self))), or make the table trainable=False"
                )
        kind = self.layout.device.type
        if (
            torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) is torch.float16
            and torch.is_grad_enabled()
        ):
            raise RuntimeError(
                "precision '16-mixed' scales the loss, and its GradScaler cannot unscale the "
                "gradients of tables; use precision='bf16-mixed' or '32-true'"
            )


def look_up_groups(
    groups: Sequence[LookupGroup], bags: Sequence[FeatureBags], training: bool
) -> list[list[Tensor]]:
    """Look groups up together: each sends its messages before any waits for one.

    Args:
        groups: The groups of a module.
        bags: For each group, those of its features.
        training: As for ``LookupGroup.look_up``.

    Returns:
        For each group, the outputs of its features.
    """
    check_not_traced("lookup", bags[0].ids)
    if training or groups[0].num_ranks == 1:
        return run_lookups(groups, bags, training)
    for group in groups:
        group.runner.join_evaluation()
    # Ranks that have finished learn from it what to answer; the others have nothing to wait for.
    _, work = broadcast_signature(signature_of(groups), groups[0].layout.device)
    outputs = run_lookups(groups, bags, training)
    work.wait()
    return outputs


def run_lookups(
    groups: Sequence[LookupGroup], bags: Sequence[FeatureBags], training: bool
) -> list[list[Tensor]]:
    """Run the groups' lookups in turn, each up to its next pause, until all are done."""
    outputs: list[list[Tensor]] = [[] for _ in groups]
    running = [
        (i, group.look_up(parts, training))
        for i, (group, parts) in enumerate(zip(groups, bags, strict=True))
    ]
    while running:
        paused = []
        for i, lookup in running:
            try:
                next(lookup)
            except StopIteration as end:
                outputs[i] = end.value
            else:
                paused.append((i, lookup))
        running = paused
    return outputs


def signature_of(groups: Sequence[LookupGroup]) -> int:
    """Return a number, not negative, by which ranks recognise what is looked up."""
    return digest([group.layout.signature for group in groups])


__all__ = ["LookupGroup", "look_up_groups", "run_lookups", "signature_of"]
