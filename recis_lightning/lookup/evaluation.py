"""Evaluation on ranks that have unequal numbers of batches."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from recis_lightning.distributed import collectives
from recis_lightning.distributed.heads import Head, Kind, exchange_heads
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.agreement import lookup_digest, read_counts
from recis_lightning.lookup.gradient_ledger import ledger_of
from recis_lightning.lookup.group import LookupGroup, run_lookups


def finish_evaluation(module: nn.Module) -> None:
    """Answer the evaluation lookups of other ranks until all have finished theirs.

    Every rank has a part of every table, so an evaluation lookup needs all of them. In a loop of
    one's own where ranks may have unequal numbers of batches, each calls this after its last.
    Under Lightning a callback does.

    Args:
        module: The module that is evaluated; a lookup of another one cannot be answered.

    Raises:
        RuntimeError: Another rank looks up what ``module`` does not have, or does something else;
            says which rank does what.
    """
    if collectives.world_size() == 1:
        return
    known: dict[ProcessGroup | None, dict[int, list[LookupGroup]]] = {}
    for part in module.modules():
        current_groups = getattr(part, "current_groups", None)
        if current_groups is not None:
            groups = current_groups()
            its = known.setdefault(groups[0].process_group, {})
            its[lookup_digest(groups, training=False)] = groups
    for process_group, lookups in known.items():
        if collectives.world_size(process_group) > 1:
            _answer(type(module).__name__, lookups, process_group)


def _answer(
    name: str, known: dict[int, list[LookupGroup]], process_group: ProcessGroup | None
) -> None:
    """Answer the lookups of other ranks of a group until all have finished.

    Args:
        name: Of the module's class.
        known: Its lookups, by digest.
        process_group: The group; None means all ranks.
    """
    ledger = ledger_of(process_group)
    while True:
        heads = exchange_heads(
            Head(
                Kind.FINISHED,
                0,
                lambda: f"has finished the evaluation of a {name}",
                ledger.num_lookups,
            ),
            None,
            process_group,
        )
        asked = set(heads.digests[heads.kinds == Kind.EVALUATION].tolist())
        if not asked:
            return
        (wanted,) = asked  # else the heads differ
        exchange_heads(
            Head(
                Kind.ANSWER,
                wanted if wanted in known else 0,
                lambda: f"evaluates a {name}, which has not what other ranks look up",
                ledger.num_lookups,
            ),
            None,
            process_group,
        )
        groups = known[wanted]
        no_ids = [_no_ids(group) for group in groups]
        run_lookups(
            groups, no_ids, False, None, lambda _: None, partial(read_counts, groups, heads)
        )


def _no_ids(group: LookupGroup) -> FeatureBags:
    no_ids = torch.empty(0, dtype=torch.int64, device=group.layout.device)
    return FeatureBags([no_ids] * len(group.layout.features))


__all__ = ["finish_evaluation"]
