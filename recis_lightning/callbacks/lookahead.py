"""``Lookahead``: ids of the next batch are exchanged while this one trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from recis_lightning.arguments import check_bool
from recis_lightning.callbacks.hook import Hook
from recis_lightning.callbacks.read_ahead import next_batch, stop_reading_ahead
from recis_lightning.engine import EmbeddingEngine
from recis_lightning.lookup import look_ahead, overlap_backward
from recis_lightning.lookup.prepared import prepared_of
from recis_lightning.table.listing import hash_tables

__all__ = ["Lookahead"]

_log = logging.getLogger(__name__)
_TRIED = 10  # batches, after which it is said if nothing came of them


class Lookahead(Hook):
    """Deduplicate the ids of the next batch and send them to their owners while this one trains.

    On several ranks a lookup waits for two messages less. Losses, rows, admissions and evictions
    are those without it, to the bit; a batch that is skipped or changed is looked up as without it.
    The next batch is read one step early, which no checkpoint counts. (A loader in this process
    that draws random numbers then draws them before the model does.)

    It does nothing on one rank, for tables on a GPU, or if ``training_step`` takes a
    ``dataloader_iter``. ``recis_lightning.lookup.look_ahead`` does the same in a loop of your own.

    Args:
        inputs: Function of the module and a batch, as the loader gives it, or the name of a method
            of the module with a batch: returns the batch's lookups, as ``look_ahead`` takes them,
            in the order of the forward pass. None is for a module with one ``EmbeddingEngine``
            whose features are a dict: the batch, or an item of it.
        gradients: Let gradients of tables travel from the backward pass on, as
            ``recis_lightning.lookup.overlap_backward`` does, and not first at the step.

    Raises:
        TypeError: ``inputs`` is neither a function nor a name, or ``gradients`` no bool.
        ValueError: When training begins, None though the module has not one engine, or a name that
            is no method of it.

    Example:
        >>> def lookups(module, batch):
        ...     return [(module.user, batch["user"]), (module.tags, batch["tags"])]
        >>> Lookahead(lookups).inputs is lookups
        True
    """

    def __init__(
        self,
        inputs: Callable[[LightningModule, Any], Sequence[Sequence[Any]]] | str | None = None,
        gradients: bool = False,
    ) -> None:
        super().__init__()
        self.gradients = check_bool("gradients", gradients)
        if inputs is not None and not isinstance(inputs, str) and not callable(inputs):
            raise TypeError(f"inputs: expected a function, a method's name or None, got {inputs!r}")
        self.inputs = inputs
        self._lookups_of: Callable[[Any], Sequence[Sequence[Any]]] | None = None
        self._num_batches = self._num_begun = self._num_used = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lookups_of = self._bind(pl_module)
        if trainer.world_size == 1:
            self._lookups_of = None
            _log.info("Lookahead does nothing on one rank: there is no exchange of ids")
            return
        if self.gradients:
            overlap_backward()
        self._num_batches = self._num_begun = 0
        self._num_used = _num_used(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._lookups_of is None or 0 <= trainer.max_steps <= trainer.global_step + 1:
            return
        following = next_batch(trainer.fit_loop._data_fetcher)
        if following is None:
            return
        self._num_begun += look_ahead(*self._lookups_of(following))
        self._num_batches += 1
        if self._num_batches == _TRIED and _num_used(pl_module) == self._num_used:
            _warn(self._num_begun)

    @override
    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if self.gradients:
            overlap_backward(False)
        self._lookups_of = None
        stop_reading_ahead(trainer.fit_loop._data_fetcher)

    def _bind(self, module: Any) -> Callable[[Any], Sequence[Sequence[Any]]]:
        """Return the function of a batch that returns its lookups."""
        inputs = self.inputs
        if isinstance(inputs, str):
            method = getattr(module, inputs, None)
            if not callable(method):
                raise ValueError(
                    f"inputs: expected the name of a method of {type(module).__name__}, got "
                    f"{inputs!r}"
                )
            found: Callable[[Any], Sequence[Sequence[Any]]] = method
            return found
        if inputs is not None:
            function = inputs
            return lambda batch: function(module, batch)
        engines = [part for part in module.modules() if isinstance(part, EmbeddingEngine)]
        if len(engines) != 1:
            raise ValueError(
                "inputs: expected a function of module and batch, or a method's name, that returns "
                f"the batch's lookups, for a module with {len(engines)} EmbeddingEngines; got None"
            )
        engine = engines[0]
        return lambda batch: [(engine, _features_of(engine, batch))]


def _features_of(engine: EmbeddingEngine, batch: Any) -> dict[str, Any]:
    """Return the features of an engine that a batch, or an item of it, has."""
    for part in (batch, *(batch if isinstance(batch, (tuple, list)) else ())):
        if isinstance(part, Mapping):
            found = {name: part[name] for name in engine.options if name in part}
            if found:
                return found
    raise ValueError(
        f"inputs: expected a batch that is or has a dict with features of the engine "
        f"({', '.join(list(engine.options)[:6])}), got {type(batch).__name__}; pass a function of "
        "module and batch that returns the batch's lookups"
    )


def _num_used(module: Any) -> int:
    """Return how many lookups used what came ahead, in the process groups of a module's tables."""
    groups = dict.fromkeys(table.process_group for table in hash_tables(module))
    return sum(prepared_of(group).num_used for group in groups)


@rank_zero_only
def _warn(num_begun: int) -> None:
    if num_begun:
        _log.warning(
            f"Lookahead: of {num_begun} lookups begun ahead in {_TRIED} batches none was used; the "
            "ids are changed between the loader and the lookup, or inputs names other lookups than "
            "the forward pass makes"
        )
    else:
        _log.warning(
            f"Lookahead: nothing was begun ahead in {_TRIED} batches; it does so for sharded "
            "tables on the CPU, in modules that train"
        )
