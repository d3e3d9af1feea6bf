"""Warnings at the start of ``fit``: settings of tables that nothing in the run acts on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers.logger import DummyLogger
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from recis_lightning.engine import EmbeddingEngine
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables

__all__ = ["check_fit", "check_table_names", "summary"]

_log = logging.getLogger(__name__)

_KEY = "_recis_lightning_checked"
_SHOWN_NAMES = 5


def check_fit(trainer: Any, module: Any) -> None:
    """Warn once of each setting that does nothing, on rank 0; a second call for a run is silent.

    Args:
        trainer: The Trainer, whose optimizers are made.
        module: Its LightningModule.
    """
    if vars(trainer).get(_KEY) is module:
        return
    if _is_tuning(trainer):
        return
    vars(trainer)[_KEY] = module
    if trainer.is_global_zero:
        if any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):
            tables = hash_tables(module)
            if tables:
                _log.info("%s", summary(tables))
        for warning in _warnings(trainer, module):
            _log.warning("%s", warning)


def _is_tuning(trainer: Any) -> bool:
    """Return whether Lightning's Tuner tries a rate or a batch size, without the callbacks."""
    tries_batch_size = isinstance(trainer.logger, DummyLogger) and not trainer.fast_dev_run
    return tries_batch_size or any(type(c).__name__ == "_LRCallback" for c in trainer.callbacks)


def summary(tables: Sequence[HashTable]) -> str:
    """Return tables as lines, for which ``ModelSummary`` shows 0 parameters: rows are none.

    Example:
        >>> from recis_lightning import HashTable
        >>> lines = summary([HashTable(4, name="user"), HashTable(16, name="item")]).splitlines()
        >>> [cell.strip() for cell in lines[3].split("|")][:3]
        ['1', 'item', '0']
    """
    lines: list[tuple[str, ...]] = [("", "Table", "Rows", "Dim", "Bytes")]
    for number, table in enumerate(tables):
        cells = (len(table), table.embedding_dim, table.nbytes)
        lines.append((str(number), table.name, *(f"{cell:,}" for cell in cells)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def check_table_names(owner: str, tables: Sequence[HashTable]) -> None:
    """Raise a ValueError if two tables have the same name.

    Args:
        owner: Of the check, for the message.
        tables: The tables.
    """
    names = [table.name for table in tables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{owner}: expected tables of different names, got {twice} more than once among "
            f"{names}; give each a name (name='user')"
        )


def _warnings(trainer: Any, module: Any) -> Iterable[str]:
    tables = hash_tables(module)
    for callback in trainer.callbacks:
        reason = getattr(callback, "idle_reason", None)
        if reason is not None and (why := reason(tables)):
            yield f"{type(callback).__name__} has nothing to do: {why}"
    with_policy = [table for table in tables if table.eviction is not None]
    if with_policy and not any(getattr(c, "runs_eviction", False) for c in trainer.callbacks):
        yield (
            f"{_list(with_policy)} an eviction policy that nothing runs: add "
            "HashTableFilterHook(filter_interval=...) to the Trainer's callbacks"
        )
    bound = trainer.gradient_clip_val
    unclipped = [
        type(optimizer).__name__
        for optimizer in _sparse_optimizers(trainer)
        if optimizer.clip_grad_norm is None and optimizer.clip_grad_value is None
    ]
    if bound and unclipped:
        by_value = trainer.gradient_clip_algorithm == "value"
        wanted = "value" if by_value else "norm"
        hook = "" if by_value else f"use ClipGradNormHook({bound}) in its place, or "
        yield (
            f"gradient_clip_val={bound} clips dense parameters and no tables: {hook}give "
            f"{', '.join(unclipped)} clip_grad_{wanted}={bound} too"
        )
    untrained = [t for t in tables if t.optimizer is None and getattr(t, "trainable", True)]
    if untrained and trainer.optimizers:
        yield (
            f"{_list(untrained)} no optimizer and will not be trained{_features(module, untrained)}"
            ": give it to a sparse optimizer, SparseAdamW(hash_tables(self), lr=...), or set "
            "trainable=False"
        )
    if forgotten := _forgotten(trainer, module):
        shown = ", ".join(forgotten[:_SHOWN_NAMES])
        more = f" and {len(forgotten) - _SHOWN_NAMES} more" if len(forgotten) > _SHOWN_NAMES else ""
        yield (
            f"No optimizer trains {shown}{more}: return SparseDenseOptimizer(torch.optim.AdamW("
            "self.parameters()), sparse) from configure_optimizers, or freeze them with "
            "requires_grad_(False)"
        )


def _forgotten(trainer: Any, module: Any) -> list[str]:
    """Return the names of dense parameters that would be trained, had they an optimizer.

    An average of a model is no part of it that is trained, and parameters that a strategy has
    replaced are not to be found: then none is named, unless all optimizers are of tables.
    """
    sparse = _sparse_optimizers(trainer)
    if not sparse:
        return []
    given = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    averaged = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, AveragedModel)
        for parameter in part.parameters()
    }
    dense = {
        name: id(parameter)
        for name, parameter in module.named_parameters()
        # One of a lazy module has no shape yet.
        if parameter.requires_grad
        and (is_lazy(parameter) or parameter.numel())
        and id(parameter) not in averaged
    }
    forgotten = [name for name, number in dense.items() if number not in given]
    only_sparse = all(isinstance(optimizer, SparseOptimizer) for optimizer in trainer.optimizers)
    return forgotten if only_sparse or len(forgotten) < len(dense) else []


def _sparse_optimizers(trainer: Any) -> list[SparseOptimizer]:
    found: list[SparseOptimizer] = []
    for optimizer in trainer.optimizers:
        parts = getattr(optimizer, "sparse", [optimizer])
        found += [part for part in parts if isinstance(part, SparseOptimizer)]
    return found


def _list(tables: Sequence[HashTable]) -> str:
    names = ", ".join(repr(table.name) for table in tables)
    return f"Table {names} has" if len(tables) == 1 else f"Tables {names} have"


def _features(module: Any, tables: Sequence[HashTable]) -> str:
    """Name the features of engines that read tables under other names."""
    names = {table.name for table in tables}
    features = [
        feature
        for part in module.modules()
        if isinstance(part, EmbeddingEngine)
        for feature, option in part.options.items()
        if (option.table or feature) in names and feature not in names
    ]
    return f" (features {', '.join(map(repr, features))} too)" if features else ""
