"""Bridge to Lightning: answers for lookups and ops what they ask of the Trainer that runs them.

A lookup knows its tables, not the LightningModule that holds them, and users need not pass any
callback of ours. So the bridge searches the live LightningModules for those that hold the tables:
once for each group of tables on several ranks. That takes a tenth of a second and more, as it walks
the heap. What only a run of a Trainer needs takes the Trainer from the stack instead: the check
before an optimizer's first step; and, in the first op after tables were given their device, as each
run of a Trainer begins, the search for a profiler that lists our ops, and what ``self.log`` must
know of ragged batches.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from recis_lightning.lookup import surroundings
from recis_lightning.ops import backend
from recis_lightning.optim.first_step import on_first_step
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.versions import move_version

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")

# Lightning's strategies that tables do not work under, and what to use for them. A strategy that
# starts processes by multiprocessing returns rank 0's module alone to the process that called fit.
_ADVICE = "use Trainer(strategy='ddp'), launched by Lightning or by torchrun"
_REFUSED = {
    "DeepSpeedStrategy": "its engine owns the optimizer and never steps that of tables",
    "FSDPStrategy": "it steps and saves an optimizer of sharded parameters only",
    "ModelParallelStrategy": "it steps and saves an optimizer of sharded parameters only",
}

# Profilers that list nothing, or list what torch's profiler records: our ops are in it anyhow.
_NOT_LISTING = {"PassThroughProfiler", "PyTorchProfiler", "TimelineProfiler"}


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


class ProfilerRegions:
    """Regions of our ops in the profiler of the Trainer that runs: a recorder of ``ops.backend``.

    Only on the thread that runs the Trainer: Lightning's profilers know one thread.
    """

    def __init__(self) -> None:
        self._moves = -1  # of tables, for which the following is right
        self._trainer: weakref.ref[Any] | None = None  # the one that ran then

    def __call__(self, name: str) -> AbstractContextManager[object] | None:
        """Return the region, or None if no Trainer runs, or one whose profiler lists nothing."""
        if move_version.thread != threading.get_ident():  # so without any Trainer
            return None
        if self._moves != move_version():
            self._find_trainer()
        if self._trainer is None:
            return None
        trainer = self._trainer()
        if trainer is None or not _runs(trainer):
            return None
        profiler = trainer.profiler
        profiler = getattr(profiler, "inner", profiler)  # RegionRecorder: torch has ours already
        region: AbstractContextManager[object] = profiler.profile(name)
        return region

    def _find_trainer(self) -> None:
        """Find the Trainer that runs, if it has a profiler that lists what it is told."""
        self._moves, self._trainer = move_version(), None
        trainer = _running_trainer()
        if trainer is not None and _runs(trainer):
            from recis_lightning.callbacks.batch_size import weigh_by_samples

            weigh_by_samples(trainer)
            profiler = getattr(trainer.profiler, "inner", trainer.profiler)
            kinds = type(profiler).__mro__
            if not _NOT_LISTING.intersection(kind.__name__ for kind in kinds):
                self._trainer = weakref.ref(trainer)


def _runs(trainer: Any) -> bool:
    return bool(getattr(getattr(trainer, "state", None), "status", None) == "running")


def register() -> None:
    """Let lookups and ops ask the bridge, and Trainers be checked when tables first train."""
    surroundings.register(TrainerBridge())
    backend.set_recorder(ProfilerRegions())
    on_first_step(_check_fit)


def _check_fit(tables: Sequence[HashTable]) -> None:
    """Warn of settings that do nothing in a Trainer that has no hook of ours to do so.

    Hooks do it when ``fit`` starts, before any optimizer steps.
    """
    trainer = _running_trainer()
    module = None if trainer is None else trainer.lightning_module
    if module is not None and _holds_one(module, tables):
        from recis_lightning.callbacks.fit_checks import check_fit

        check_fit(trainer, module)


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
    return [module for module in _lightning_modules() if _holds_one(module, tables)]


def _holds_one(module: Any, tables: Sequence[HashTable]) -> bool:
    wanted = {id(table) for table in tables}
    return any(id(part) in wanted for part in module.modules())


def _running_trainer() -> Any | None:
    """Return the Trainer whose run has called this, of either of Lightning's packages, or None."""
    kinds = [getattr(sys.modules.get(name), "Trainer", None) for name in _PACKAGES]
    runs = {kind._run.__code__ for kind in kinds if kind is not None}
    frame: FrameType | None = sys._getframe(1) if runs else None
    while frame is not None and frame.f_code not in runs:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _lightning_modules() -> list[Any]:
    """List the live LightningModules of whichever of Lightning's packages is imported."""
    kinds = [sys.modules[name].LightningModule for name in _PACKAGES if name in sys.modules]
    for kind in kinds:  # grows while it is read: subclasses of subclasses
        kinds += type.__subclasses__(kind)
    # Types are asked, not objects: a proxy may do anything when its class is asked for. An object
    # refers to its type; a list of all objects takes several times as long.
    wanted = frozenset(kinds)
    found = gc.get_referrers(*wanted) if wanted else []
    return [part for part in found if type(part) in wanted and _is_made(part)]


def _is_made(module: Any) -> bool:
    """Tell whether a module is whole: one whose ``__init__`` failed lives on in its traceback."""
    return "_modules" in vars(module) and "_trainer" in vars(module)


__all__ = ["ProfilerRegions", "TrainerBridge", "TrainerRunner", "register"]
