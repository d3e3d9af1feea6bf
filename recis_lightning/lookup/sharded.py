"""A group of tables whose rows are spread over ranks.

A lookup is a few local ops with three messages between: counts, ids, rows. The groups of an engine
take their steps in turn, so that one group's messages travel while another one works.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.jagged import Bags
from recis_lightning.lookup import surroundings, transfer
from recis_lightning.lookup.dedup import DistinctIdFinder
from recis_lightning.lookup.exchange import ShardExchange
from recis_lightning.lookup.group import Feature, TableGroup
from recis_lightning.ops import embedding_bag
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient


class ShardedGroup(TableGroup):
    """Features whose tables are sharded over the ranks of torch's default process group.

    Every rank looks up the same features in the same order, with empty ids where it has none, and
    runs the same backward passes: a lookup or backward pass is one collective operation.

    Args:
        features: As for ``TableGroup``.

    Attributes:
        signature: By which ranks recognise the group.
        no_bags: A feature of which a rank has nothing.

    Raises:
        RuntimeError: Lightning runs a strategy that tables do not work under.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        runner = surroundings.runner_of([feature.table for feature in features])
        super().__init__(features)
        self.runner = runner
        collectives.check_backend(self.tables[0].name, self.device)
        for table in self.tables:
            table.needs_reshard = True  # those of a time with another number of ranks
        self._distinct = DistinctIdFinder(
            self._training,
            self.segment_tables,
            len(self.tables),
            collectives.world_size(),
            self.device,
        )
        said = [
            (f.table.name, f.table.seed, f.mode, f.padding_idx, f.tile_len) for f in self.features
        ]
        self.signature = _digest((said, self.embedding_dim, self.dtype))
        no_ids = torch.empty(0, dtype=torch.int64, device=self.device)
        self.no_bags = Bags(no_ids, 0, 1, None, None, (0,))

    def look_up(self, bags: Sequence[Bags], training: bool) -> list[Tensor]:
        """See ``TableGroup.look_up``; ids that this rank does not own are asked of their owners."""
        return look_up_groups([self], [bags], training)[0]

    def steps(self, bags: Sequence[Bags], training: bool, outputs: list[Tensor]) -> Iterator[None]:
        """Look up, pausing while messages are under way; at the end ``outputs`` is filled."""
        asking = bags[0].ids.device
        crosses = self.device.type == "cpu" and asking.type == "cuda"
        if crosses:
            bags = transfer.bags_from_device(bags, asking)
        ids = self._check(bags, training)
        for table in self.tables:
            if table.needs_reshard:
                keep_own_rows(table)
        distinct = self._distinct.find(ids)
        signature = self.signature << 1 | training
        way = ShardExchange(self.tables, distinct, training, signature)
        yield from way.steps()
        pooled, plan = self._allocate(bags)
        places = distinct.places
        plan[:, embedding_bag.HEADER] = way.header.address
        plan[:, embedding_bag.ROWS] = places.data_ptr() + 8 * self._starts
        embedding_bag.gather(plan, self.embedding_dim, self.dtype, self.device)
        found = self._recorded(bags, places, plan, pooled, training, way)
        outputs += transfer.outputs_to_device(found, asking) if crosses else found

    def _leave_gradients(
        self,
        plan: Plan,
        used: Sequence[int],
        bags: Sequence[Bags],
        rows: Tensor,
        kept: list[Tensor],
        way: ShardExchange | None,
    ) -> None:
        """Send gradients to the owners of ids, and leave those that come with the tables."""
        assert way is not None
        touched = self._touched(plan, used, bags, len(way.rows), rows)
        applied = way.return_gradients(plan, touched)
        # Ids of other ranks: nothing to apply here, but the table's update has this rank's part.
        for table in dict.fromkeys(self.features[index].table for index in used):
            if table not in applied:
                table.pending.append(PendingGradient([], plan[:0], rows[:0], []))

    def _touched(
        self, plan: Plan, used: Sequence[int], bags: Sequence[Bags], size: int, places: Tensor
    ) -> Tensor | None:
        """Return bool [size], which distinct ids have a gradient; None if all do."""
        tiled = any(self.features[index].mode == "tile" for index in used)
        if len(used) == len(self.features) and not tiled:
            return None
        found = torch.zeros(size + 1, dtype=torch.bool, device=self.device)
        for line, index in zip(plan, used, strict=True):
            first = int(line[embedding_bag.FIRST_ID])
            mine = places[first : first + int(line[embedding_bag.NUM_IDS])]
            feature, bag = self.features[index], bags[index]
            if feature.mode == "tile":
                within = torch.arange(mine.numel(), device=self.device)
                if bag.offsets is None:
                    within = within % max(bag.bag_length, 1)
                else:
                    bags_of = torch.searchsorted(bag.offsets[1:], within, right=True)
                    within = within - bag.offsets[bags_of.clamp(max=max(bag.num_bags - 1, 0))]
                mine = mine.masked_fill(within >= feature.tile_len, -1)
            found[torch.where(mine < 0, size, mine)] = True  # no mask: a GPU's would wait
        return found[:size]


def keep_own_rows(table: HashTable) -> None:
    """Forget what a table knows of ids that other ranks own.

    Loading one state on every rank, and inserting the same ids on each, brings such rows.
    """
    ids, rows = table.ids_map()
    gone = torch.zeros(table.storage.rows.num_rows, dtype=torch.bool, device=table.device)
    gone[rows[_is_foreign(ids)]] = True
    if bool(gone.any()):
        table.storage.remove_rows(gone)
    counter = table.storage.admission_counter
    if counter is not None:
        counted = counter.state().get("pending_ids", ids[:0])
        counter.forget(counted[_is_foreign(counted)])
    table.needs_reshard = False


def _is_foreign(ids: Tensor) -> Tensor:
    return owner_of(ids, collectives.world_size()) != collectives.rank()


def make_group(features: Sequence[Feature]) -> TableGroup:
    """Return a group of features: sharded if there are several ranks."""
    return ShardedGroup(features) if collectives.world_size() > 1 else TableGroup(features)


def look_up_groups(
    groups: Sequence[TableGroup], bags: Sequence[Sequence[Bags]], training: bool
) -> list[list[Tensor]]:
    """Look groups up together; sharded ones send their messages before they wait for any.

    Args:
        groups: All sharded, or none.
        bags: For each group what ``look_up`` takes.
        training: See ``TableGroup.look_up``.

    Returns:
        For each group what ``look_up`` returns.
    """
    sharded = [group for group in groups if isinstance(group, ShardedGroup)]
    if not sharded:
        pairs = zip(groups, bags, strict=True)
        return [group.look_up(parts, training) for group, parts in pairs]
    if training:
        return _take_steps(sharded, bags, training)
    for group in sharded:
        group.runner.join_evaluation()
    # Ranks that have finished learn from it what to answer; the others have nothing to wait for.
    _, work = _say(_signature(sharded), sharded[0].device)
    found = _take_steps(sharded, bags, training)
    work.wait()
    return found


def finish_evaluation(module: nn.Module) -> None:
    """Answer the evaluation lookups of other ranks until all have finished theirs.

    Every rank has a part of every table, so an evaluation lookup needs all of them. In a loop of
    one's own where ranks may have unequal numbers of batches, each calls this after its last.
    Under Lightning a callback does.

    Args:
        module: Whose evaluation it is; a lookup of another one cannot be answered.

    Raises:
        RuntimeError: Another rank looks up what ``module`` does not have.
    """
    known: dict[int, list[ShardedGroup]] = {}
    for part in module.modules():
        current_groups = getattr(part, "current_groups", None)
        if current_groups is not None and collectives.world_size() > 1:
            groups = [group for group in current_groups() if isinstance(group, ShardedGroup)]
            known[_signature(groups)] = groups
    if not known:
        return
    device = next(iter(known.values()))[0].device
    while True:
        answer, work = _say(_FINISHED, device)
        work.wait()
        asked = {signature for signature in answer.tolist() if signature != _FINISHED}
        if not asked:
            return
        if len(asked) > 1 or not asked <= known.keys():
            raise RuntimeError(
                "this rank has finished its evaluation, and others look up features that it does "
                "not know, or each others; all ranks must evaluate the same module"
            )
        groups = known[asked.pop()]
        empty = [[group.no_bags for _ in group.features] for group in groups]
        _take_steps(groups, empty, training=False)


def _take_steps(
    groups: Sequence[ShardedGroup], bags: Sequence[Sequence[Bags]], training: bool
) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[] for _ in groups]
    running = [
        group.steps(parts, training, outputs)
        for group, parts, outputs in zip(groups, bags, found, strict=True)
    ]
    while running:
        running = [steps for steps in running if next(steps, _DONE) is not _DONE]
    return found


def _say(word: int, device: torch.device) -> tuple[Tensor, Any]:
    """Tell every rank a number; return what each says, and the work to wait for before."""
    ones = [1] * collectives.world_size()
    return collectives.all_to_all(
        torch.full((collectives.world_size(),), word, device=device), ones, ones
    )


def _signature(groups: Sequence[ShardedGroup]) -> int:
    """Return a number, not negative, by which ranks recognise what is looked up."""
    return _digest([group.signature for group in groups])


def _digest(what: object) -> int:
    digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


_FINISHED = -1
_DONE = object()

__all__ = ["ShardedGroup", "finish_evaluation", "look_up_groups", "make_group"]
