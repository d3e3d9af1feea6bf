"""Averaged models share the tables of the model that they average.

torch's ``AveragedModel``, and with it Lightning's ``WeightAveraging``, copies a model and then
averages parameters and buffers. Rows are neither: tables of the copy would stay what they were
when training began, in evaluation and in the checkpoints that are written from it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from recis_lightning.table.hash_table import HashTable


def share_tables_with_averaged_models() -> None:
    """From now on, give each new ``AveragedModel`` the tables of its model for their copies.

    Example:
        >>> from recis_lightning import DynamicEmbedding
        >>> user = DynamicEmbedding(4)
        >>> AveragedModel(user).module.table is user.table
        True
    """
    # torch's annotation forgets that a hook may return another module.
    register_module_module_registration_hook(_share_tables)  # type: ignore[arg-type]


def _share_tables(module: nn.Module, name: str, child: Any) -> nn.Module | None:
    """Put originals for copies where an ``AveragedModel`` first takes its deep copy of a model."""
    if not isinstance(module, AveragedModel) or name != "module" or name in module._modules:
        return None
    for parent in child.modules():
        for key, table in parent._modules.items():
            if isinstance(table, HashTable):
                parent._modules[key] = table.original or table
    return child.original if isinstance(child, HashTable) else None


__all__ = ["share_tables_with_averaged_models"]
