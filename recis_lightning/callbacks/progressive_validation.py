"""``ProgressiveValidation``: each window of data is evaluated before the model learns it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerFn

from recis_lightning.arguments import check_bool, explain_arguments
from recis_lightning.callbacks.hook import Hook
from recis_lightning.callbacks.windows import WindowOrder, Windows, follow_windows

__all__ = ["ProgressiveValidation"]


@explain_arguments()
class ProgressiveValidation(Hook):
    """Train windows of data one after the other, and evaluate each before the model learns it.

    A window is an epoch: Lightning's epochs, what runs at their ends, and ``before_window`` and
    ``after_window`` of hooks are those of windows. At the end of each, Lightning validates as
    always, with the batches of the next window: what ``validation_step`` logs is how a model that
    learned up to now does on what comes. So ``ModelCheckpoint`` and ``EarlyStopping`` see it too.
    The first window is evaluated before training begins. A model without ``validation_step`` is
    trained by windows all the same. After the last window the run ends, whatever ``max_epochs``.

    The windows are what ``fit`` is given: a ``WindowList``, any other ``Windows``, or a data module
    that has some as its attribute ``windows``. They take the place of the Trainer's validation
    data. A checkpoint of a window's end (``WindowCheckpoint``) resumes with the next window. One
    within a window goes on there with a ``ColumnarDataModule``; a ``WindowList`` begins it anew.

    Args:
        first: Whether the first window is evaluated before training.

    Raises:
        MisconfigurationException: At the start of ``fit``, there are no windows, or the Trainer has
            ``max_steps``.
        TypeError: ``first`` is no bool.

    Example:
        >>> from recis_lightning.callbacks import WindowList
        >>> days = WindowList({"monday": [], "tuesday": []})
        >>> callback = ProgressiveValidation()
        >>> # Trainer(max_epochs=-1, callbacks=[callback]).fit(model, days)
    """

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self._first = check_bool("first", first)
        self._order: WindowOrder | None = None
        self._training: _Training | None = None
        self._limit: Any = None  # of validation batches, while there is nothing to validate

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer the windows as data of training and validation."""
        if stage != TrainerFn.FITTING:
            return
        if trainer.max_steps != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Lightning, resuming such a run, counts one epoch more: a window would be left out.
            raise MisconfigurationException(
                f"ProgressiveValidation: expected Trainer(max_steps=-1), got {trainer.max_steps}; "
                "limit a run over windows by their number, max_epochs"
            )
        loop: Any = trainer.fit_loop
        given = loop._data_source.instance
        windows = given.windows if isinstance(given, _Training) else _windows_of(given)
        self._order, self._limit = follow_windows(trainer, windows), None
        self._training = _Training(trainer, self._order)
        loop._data_source = _DataLoaderSource(self._training, "")
        loop.epoch_loop.val_loop._data_source = _DataLoaderSource(_Next(trainer, self._order), "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the first window, or one whose evaluation a checkpoint came before."""
        assert self._training is not None
        is_due = (self._first and trainer.global_step == 0) or self._training.is_evaluation_due
        if is_due and trainer.enable_validation and self._order_name(trainer) is not None:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def _order_name(self, trainer: Trainer) -> str | None:
        assert self._order is not None
        progress: Any = trainer.fit_loop.epoch_progress.current
        return self._order.name(progress.started)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out that would have no window."""
        assert self._order is not None
        if self._order.name(trainer.current_epoch + 1) is None:
            self._limit, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run after the last window."""
        assert self._order is not None
        if self._order.name(trainer.current_epoch + 1) is None:
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let later runs validate."""
        if self._limit is not None:
            trainer.limit_val_batches, self._limit = self._limit, None


def _windows_of(given: Any) -> Windows:
    """Return the windows that ``fit`` was given; an error says what to give."""
    # A data set of files selects a window too, but goes through its windows for ever.
    is_files = hasattr(given, "num_windows") and not isinstance(given, LightningDataModule)
    for one in () if is_files else (given, getattr(given, "windows", None)):
        if isinstance(one, Windows):
            return one
    raise MisconfigurationException(
        "ProgressiveValidation: expected windows of data in fit(model, WindowList([...])), or a "
        "data module with an attribute windows, such as ColumnarDataModule(window='1h'), got "
        f"{type(given).__name__}"
    )


class _Training:
    """Loader of the window of the epoch that begins.

    Attributes:
        is_evaluation_due: Whether the run resumed between a window's last step and the evaluation
            of the next one.
    """

    def __init__(self, trainer: Trainer, order: WindowOrder) -> None:
        self.windows, self._order = order.windows, order
        self.is_evaluation_due = False
        self._loop: Any = trainer.fit_loop
        # Attributes of its own: Lightning looks for a loader's state without ``__getattr__``.
        for name in ("state_dict", "load_state_dict"):
            if hasattr(self.windows, name):
                setattr(self, name, getattr(self.windows, name))

    def __iter__(self) -> Iterator[Any]:
        if self._loop.restarting:
            self.is_evaluation_due = _end_window(self._loop)
        # Not ``current_epoch``: a run that resumes at an epoch's end counts that one later as done.
        yield from self._order.batches(self._loop.epoch_progress.current.processed, trains=True)


def _end_window(loop: Any) -> bool:
    """Count a window as done whose last step was saved, but not its end; return whether it was so.

    Lightning counts it later, and then trains the next one as if that had begun before.
    """
    epoch, batch = loop.epoch_progress, loop.epoch_loop.batch_progress
    total = batch.total
    is_open = epoch.current.processed == epoch.current.started - 1
    if not (is_open and batch.is_last_batch and total.completed == total.processed - 1):
        return False
    epoch.increment_processed()
    epoch.increment_completed()
    batch.increment_completed()
    loop.epoch_loop._batches_that_stepped += 1
    loop.restarting = False
    return True


class _Next:
    """Loader of the window that is trained next."""

    def __init__(self, trainer: Trainer, order: WindowOrder) -> None:
        self._order = order
        self._loop: Any = trainer.fit_loop

    def __iter__(self) -> Iterator[Any]:
        progress = self._loop.epoch_progress.current
        yield from self._order.batches(progress.started)
