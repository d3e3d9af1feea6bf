"""Lookup in a table without a module around it: ``HashTable.__call__``."""

from __future__ import annotations

from torch import Tensor

from recis_lightning.arguments import check_ids
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature
from recis_lightning.lookup.group import LookupGroup, look_up_groups
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import name_before_use


class TableLookup:
    """``table.hash_table.Lookup`` by a group of one feature, which each called table keeps."""

    def groups_of(self, table: HashTable) -> list[LookupGroup]:
        """Return the group of a table's one feature."""
        if not isinstance(table.groups, CurrentGroups):
            table.groups = CurrentGroups()
        return table.groups.of(lambda: [Feature("ids", table, "none")])

    def look_up(self, table: HashTable, ids: Tensor) -> Tensor:
        """Return the rows of ids, [*, embedding_dim], as ``DynamicEmbedding`` does."""
        flat = check_ids(ids).reshape(-1).contiguous()
        if table.training:
            name_before_use(table)
        groups = self.groups_of(table)
        rows = look_up_groups(groups, [FeatureBags([flat])], table.training)[0][0]
        return rows.view(*ids.shape, table.embedding_dim)


__all__ = ["TableLookup"]
