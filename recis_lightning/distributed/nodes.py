"""Nodes of ranks: which ranks share one, and by which of them what goes to other nodes travels."""

from __future__ import annotations

from typing import NamedTuple

from recis_lightning.distributed.process_group import ProcessGroup, rank, world_size


class Nodes(NamedTuple):
    """Nodes of equally many ranks, one after the other, as launchers number them.

    What the ranks of a node send to the ranks with one place on the other nodes goes through the
    rank with that place on their own.

    Attributes:
        num_nodes: How many there are.
        size: Ranks of each.
        node: That of this rank.
        place: Of this rank on its node.
    """

    num_nodes: int
    size: int
    node: int
    place: int

    @property
    def own(self) -> slice:
        """Ranks of this node, by place."""
        return slice(self.node * self.size, (self.node + 1) * self.size)

    @property
    def peers(self) -> slice:
        """Ranks with this rank's place, by node."""
        return slice(self.place, None, self.size)


def nodes_of(ranks_per_node: int | None, process_group: ProcessGroup | None) -> Nodes | None:
    """Return the nodes of a group's ranks; None where they ask by themselves.

    They do if ``ranks_per_node`` is None, on one node, and where each rank has its own.

    Raises:
        ValueError: The number of ranks is no multiple of ``ranks_per_node``.
    """
    num_ranks = world_size(process_group)
    if ranks_per_node is None or ranks_per_node == 1 or num_ranks == 1:
        return None
    num_nodes, left = divmod(num_ranks, ranks_per_node)
    if left:
        raise ValueError(
            f"ranks_per_node: expected a divisor of the number of ranks, {num_ranks}, got "
            f"{ranks_per_node}"
        )
    if num_nodes == 1:
        return None
    return Nodes(num_nodes, ranks_per_node, *divmod(rank(process_group), ranks_per_node))


__all__ = ["Nodes", "nodes_of"]
