"""Evaluation on ranks that have unequal numbers of batches."""

from __future__ import annotations

import torch
from torch import nn

from recis_lightning.distributed import collectives
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.group import LookupGroup, run_lookups, signature_of
from recis_lightning.lookup.signature import FINISHED, broadcast_signature


def finish_evaluation(module: nn.Module) -> None:
    """Answer the evaluation lookups of other ranks until all have finished theirs.

    Every rank has a part of every table, so an evaluation lookup needs all of them. In a loop of
    one's own where ranks may have unequal numbers of batches, each calls this after its last.
    Under Lightning a callback does.

    Args:
        module: The module that is evaluated; a lookup of another one cannot be answered.

    Raises:
        RuntimeError: Another rank looks up what ``module`` does not have.
    """
    if collectives.world_size() == 1:
        return
    known: dict[int, list[LookupGroup]] = {}
    for part in module.modules():
        current_groups = getattr(part, "current_groups", None)
        if current_groups is not None:
            groups = current_groups()
            known[signature_of(groups)] = groups
    if not known:
        return
    device = next(iter(known.values()))[0].layout.device
    while True:
        answer, work = broadcast_signature(FINISHED, device)
        work.wait()
        asked = {signature for signature in answer.tolist() if signature != FINISHED}
        if not asked:
            return
        if len(asked) > 1 or not asked <= known.keys():
            raise RuntimeError(
                "this rank has finished its evaluation, and others look up features that it does "
                "not know, or each others; all ranks must evaluate the same module"
            )
        groups = known[asked.pop()]
        run_lookups(groups, [_no_ids(group) for group in groups], False, None, lambda _: None)


def _no_ids(group: LookupGroup) -> FeatureBags:
    no_ids = torch.empty(0, dtype=torch.int64, device=group.layout.device)
    return FeatureBags([no_ids] * len(group.layout.features))


__all__ = ["finish_evaluation"]
