"""Bridge to Lightning: answers for a sharded lookup what it asks of the Trainer that runs it.

A lookup knows its tables, not the LightningModule that holds them, and users need not pass any
callback of ours. So the bridge searches the live LightningModules for those that hold the tables:
once for each group of tables on several ranks, and once before an optimizer's first step.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from recis_lightning.lookup import surroundings
from recis_lightning.optim.first_step import on_first_step
from recis_lightning.table.hash_table import HashTable

# Lightning's strategies that tables do not work under, and what to use for them. A strategy that
# starts processes by multiprocessing returns rank 0's module alone to the process that called fit.
_ADVICE = "use Trainer(strategy='ddp'), launched by Lightning or by torchrun"
_REFUSED = {
    "DeepSpeedStrategy": "its engine owns the optimizer and never steps that of tables",
    "FSDPStrategy": "it steps and saves an optimizer of sharded parameters only",
    "ModelParallelStrategy": "it steps and saves an optimizer of sharded parameters only",
}


class TrainerBridge:
    """``lookup.surroundings.Surroundings`` under Lightning, or outside it."""

    def runner_of(self, tables: Sequence[HashTable]) -> TrainerRunner:
        """Find the LightningModules that hold one of ``tables``.

        Raises:
            RuntimeError: A Trainer runs one under a strategy that cannot train sharded tables;
                names the strategy and the one to use.
        """
        modules = _modules_with(tables)
        for module in modules:
            if module._trainer is not None:
                _check_strategy(module._trainer.strategy)
        return TrainerRunner(modules)


class TrainerRunner:
    """``lookup.surroundings.Runner``: the Trainers that LightningModules have at the moment."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = [weakref.ref(module) for module in modules]

    def join_evaluation(self) -> None:
        """Give each Trainer the callback that serves other ranks when its own batches end."""
        for reference in self._modules:
            trainer = getattr(reference(), "_trainer", None)
            if trainer is not None:
                from recis_lightning.callbacks.sharded_evaluation import ShardedEvaluation

                ShardedEvaluation.attach(trainer)


def register() -> None:
    """Let sharded lookups ask the bridge, and Trainers be checked when tables first train."""
    surroundings.register(TrainerBridge())
    on_first_step(_check_fit)


def _check_fit(tables: Sequence[HashTable]) -> None:
    """Warn of settings that do nothing in a Trainer that has no hook of ours to do so.

    Hooks do it when ``fit`` starts, before any optimizer steps.
    """
    for module in _modules_with(tables):
        if module._trainer is not None:
            from recis_lightning.callbacks.fit_checks import check_fit

            check_fit(module._trainer, module)


def _check_strategy(strategy: Any) -> None:
    for kind in type(strategy).__mro__:
        if kind.__name__ in _REFUSED:
            raise RuntimeError(
                f"tables do not work under {type(strategy).__name__}: "
                f"{_REFUSED[kind.__name__]}; {_ADVICE}"
            )
    if (method := getattr(strategy, "_start_method", "popen")) != "popen":
        raise RuntimeError(
            f"tables do not work under {type(strategy).__name__} with processes started by "
            f"{method!r} (ddp_spawn, ddp_fork, ddp_notebook): of all shards only rank 0's would "
            f"come back from fit; {_ADVICE}"
        )


def _modules_with(tables: Sequence[HashTable]) -> list[Any]:
    """List the live LightningModules that hold one of ``tables``."""
    wanted = {id(table) for table in tables}
    return [
        module
        for module in _lightning_modules()
        if any(id(part) in wanted for part in module.modules())
    ]


def _lightning_modules() -> list[Any]:
    """List the live LightningModules of whichever of Lightning's packages is imported."""
    names = ("lightning.pytorch", "pytorch_lightning")
    kinds = {sys.modules[name].LightningModule for name in names if name in sys.modules}
    todo = list(kinds)
    while todo:
        found = set(type.__subclasses__(todo.pop())) - kinds
        kinds |= found
        todo += found
    # Types are asked, not objects: a proxy may do anything when its class is asked for. An object
    # refers to its type; a list of all objects takes several times as long.
    return [part for part in gc.get_referrers(*kinds) if type(part) in kinds] if kinds else []


__all__ = ["TrainerBridge", "TrainerRunner", "register"]
