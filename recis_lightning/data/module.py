"""``ColumnarDataModule``: the files of training, validation, test and prediction, for a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from recis_lightning.arguments import check_int
from recis_lightning.data.columns import Column
from recis_lightning.data.dataset import ColumnarDataset
from recis_lightning.data.features import Features, features_of
from recis_lightning.data.filter import columns_of
from recis_lightning.data.follow import Follow, check_follow
from recis_lightning.data.mixing import MixedDataset, place_after
from recis_lightning.data.rows import Batch
from recis_lightning.data.window_batches import WindowBatches
from recis_lightning.data.windows import Window, check_window
from recis_lightning.distributed import collectives

__all__ = ["ColumnarDataModule"]

_PARTS = ("train", "val", "test", "predict")


class ColumnarDataModule(L.LightningDataModule):
    """Columnar files for each part of a run, read as ``ColumnarDataset`` reads them.

    Its place in the training files is saved with Lightning's checkpoint, and so in the same commit
    as the tables. A run that resumes, on any number of ranks, trains the rest of its epoch, from
    what ``ModelCheckpoint`` saved after a step, validation or an epoch, or on an exception in a
    training step. Validation, test and prediction keep the order of files and rows, and all
    of their rows.

    With ``window`` or ``follow`` an epoch of training is a window (``max_epochs`` counts them). A
    followed stream that ends, ends the run as ``max_epochs`` does; and a run that is stopped
    (``trainer.should_stop``, SIGTERM) does not wait for files any longer.

    Args:
        columns: Entries of a batch; None, if ``features`` has them. ``Label`` columns, and what is
            made of them, are left out in prediction.
        train: Files or glob patterns of the part; None if there is none. With ``mix`` a dict of
            them.
        val: The same, for validation.
        test: The same, for the test.
        predict: The same, for prediction.
        batch_size: Rows of a batch on one rank.
        shuffle_rows: Rows within which training rows are shuffled; 0 keeps their order.
        seed: Of that order.
        filter: Rows to keep, of all parts.
        drop_last: Whether training leaves out rows that do not fill a batch on every rank.
        on_bad_file: ``"error"`` or ``"skip"``.
        window: Windows of time of the training files, as for ``ColumnarDataset``.
        follow: Whether new training files are taken up, as for ``ColumnarDataset``.
        mix: Name -> proportion, of the names in ``train``: each batch has rows of each, as in
            ``MixedDataset``.
        mix_until: End of an epoch of a mixture, ``"all"`` or ``"first"``.
        lanes: Runs of a rank's rows that take turns; a multiple of ``num_workers``.
        num_workers: Processes that read; 0 reads in threads of this one, which is enough unless
            their work holds Python's lock.
        prefetch: Batches made ahead by each reader.
        pin_memory: Whether batches lie in pinned memory; None means: where there is a GPU.
        features: Columns and transforms, in place of ``columns``.
        convert: Function of a batch whose result takes its place.

    Raises:
        TypeError, ValueError: An argument is invalid; at the start of ``fit``, the training files
            have no row that ``filter`` keeps, or too few for a batch on each rank.

    Example:
        >>> from recis_lightning.data import ColumnarDataModule, Id, Label
        >>> data = ColumnarDataModule([Id("user", hash="xxh64"), Label("click")], train="*.parquet")
        >>> data.batch_size
        512
    """

    def __init__(
        self,
        columns: list[Column] | None = None,
        train: str | list[str] | dict[str, str | list[str]] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        batch_size: int = 512,
        shuffle_rows: int = 0,
        seed: int = 0,
        filter: str | None = None,
        drop_last: bool = False,
        on_bad_file: str = "error",
        window: str | Window | None = None,
        follow: bool | Follow = False,
        mix: dict[str, float] | None = None,
        mix_until: str = "all",
        lanes: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        features: Features | None = None,
        convert: Callable[[Batch], Any] | None = None,
    ) -> None:
        super().__init__()
        self.features = features_of(columns, features)
        self.columns, self.convert = self.features.columns, convert
        self.paths = dict(zip(_PARTS, (train, val, test, predict), strict=True))
        self.batch_size = check_int("batch_size", batch_size, least=1)
        self.shuffle_rows = check_int("shuffle_rows", shuffle_rows, least=0)
        self.num_workers = check_int("num_workers", num_workers, least=0)
        self.lanes = check_int("lanes", lanes, least=1)
        self.seed = check_int("seed", seed, least=0)
        self.prefetch = check_int("prefetch", prefetch, least=0)
        if on_bad_file not in ("error", "skip"):
            raise ValueError(f"on_bad_file: expected 'error' or 'skip', got {on_bad_file!r}")
        if filter is not None:
            columns_of(filter)  # so that one that is none is refused at once
        self.filter, self.drop_last, self.on_bad_file = filter, drop_last, on_bad_file
        self._divided, self._follow = check_window(window), check_follow(follow)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._mix, self._mix_until = mix, mix_until
        if isinstance(train, Mapping) != (mix is not None):
            raise ValueError(
                f"mix: expected proportions of the names in train, and None where train has no "
                f"names, got {mix!r} with train={train!r}"
            )
        if isinstance(train, Mapping) and mix is not None and set(train) != set(mix):
            raise ValueError(
                f"mix: expected proportions of {sorted(train)}, the names in train, got "
                f"{sorted(mix)}"
            )
        if mix is not None and self._is_in_windows():
            raise ValueError("mix: data in windows, or followed, cannot be mixed")
        self._datasets: dict[str, ColumnarDataset | MixedDataset] = {}
        self._has_begun = False  # whether the Trainer has had a loader since it began to fit
        if val is None:  # so Lightning sees no validation; an empty loader is worth a warning
            self.val_dataloader = None  # type: ignore[assignment,method-assign]
        self._loaded: dict[str, Any] | None = None
        self._windows: WindowBatches | None = None  # that were given out
        self._loaded_window: dict[str, Any] | None = None  # place in them
        self._begin: dict[str, Any] | None = None  # place where the current iteration began

    def dataset(self, part: str) -> ColumnarDataset | MixedDataset:
        """Return the data set of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: The part has no files; names the argument.
        """
        if part not in self._datasets:
            paths = self.paths[part]
            if not paths:
                raise ValueError(f"{part}: expected files or patterns, got {paths!r}")
            self._datasets[part] = self._make(part, paths)
        return self._datasets[part]

    @property
    def window(self) -> str | None:
        """Name of the window of training files that was selected last."""
        return self.dataset("train").window

    @property
    def num_windows(self) -> int | None:
        """Number of windows of training files; None if they are followed."""
        return self.dataset("train").num_windows

    @property
    def windows(self) -> WindowBatches:
        """Windows of training files, for ``ProgressiveValidation``, from the first one on.

        Raises:
            ValueError: The training files are not in windows, or are followed.
        """
        if self._divided is None or self._follow is not None:
            got = "follow" if self._follow is not None else "no window"
            raise ValueError(
                "windows: ProgressiveValidation evaluates the next window before it is trained, so "
                f"files must be there and in windows (window='1h', without follow); got {got}"
            )
        pins = self.pin_memory and not self.num_workers
        paths = cast(Any, self.paths["train"])  # data in windows are not mixed
        data = self._columnar("train", paths, self.convert, pins)
        self._windows = WindowBatches(data, self.num_workers, self.pin_memory, owner=self)
        if self._loaded_window is not None:
            self._windows.go_to(self._loaded_window)
        return self._windows

    def _make(self, part: str, paths: Any) -> ColumnarDataset | MixedDataset:
        pins = self.pin_memory and not self.num_workers
        if self._mix is None or part != "train":
            return self._columnar(part, paths, self.convert, pins)
        return MixedDataset(
            {name: self._columnar(part, paths[name], None, False) for name in paths},
            self._mix,
            self.batch_size,
            until=self._mix_until,
            convert=self.convert,
            pin_memory=pins,
        )

    def _columnar(
        self,
        part: str,
        paths: str | Sequence[str],
        convert: Callable[[Batch], Any] | None,
        pin_memory: bool,
    ) -> ColumnarDataset:
        training = part == "train"
        return ColumnarDataset(
            paths,
            batch_size=self.batch_size,
            features=self.features.without_labels() if part == "predict" else self.features,
            shuffle_rows=self.shuffle_rows if training else 0,
            seed=self.seed,
            filter=self.filter,
            drop_last=self.drop_last and training,
            on_bad_file=self.on_bad_file,
            window=self._divided if training else None,
            follow=(self._follow or False) if training else False,
            lanes=self.lanes,
            prefetch=self.prefetch,
            pin_memory=pin_memory,
            convert=convert,
        )

    @override
    def setup(self, stage: str) -> None:
        self._has_begun = False

    @override
    def train_dataloader(self) -> Any:
        data, trainer = self.dataset("train"), cast(Any, self.trainer)
        is_first, self._has_begun = not self._has_begun, True
        _check_same_files(data)
        if (reason := data.why_empty()) is not None:
            raise ValueError(f"train: there is nothing to train on: {reason}")
        if isinstance(data, ColumnarDataset) and self._is_in_windows() and trainer is not None:
            data.stop_waiting = lambda: bool(trainer.should_stop or trainer.received_sigterm)
            trainer.reload_dataloaders_every_n_epochs = 1  # windows have their own lengths
        if self._loaded is not None:
            data.load_state_dict(self._loaded)
            self._begin, self._loaded = self._loaded, None
            if trainer is not None:
                # On other ranks the rest of this epoch has another length than the next epoch, and
                # Lightning asks for it once, unless it reloads.
                trainer.reload_dataloaders_every_n_epochs = 1
                _forget_unfinished_step(trainer.fit_loop)
        elif trainer is not None and trainer.fit_loop.epoch_loop.restarting:
            _begin_next_epoch(trainer.fit_loop, len(_Loader(self, data, training=True)))
        loader = _Loader(self, data, training=True)
        if self._follow is not None and not len(loader) and not is_first:
            raise StopIteration  # by which Lightning's loop over epochs ends
        return loader

    def _is_in_windows(self) -> bool:
        return self._divided is not None or self._follow is not None

    @override
    def val_dataloader(self) -> Any:
        return self._loader("val")

    @override
    def test_dataloader(self) -> Any:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> Any:
        return self._loader("predict")

    def _loader(self, part: str) -> Any:
        return _Loader(self, self.dataset(part), training=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        window = self._loaded_window if self._windows is None else self._windows.place()
        if window is not None:
            return {"window": window}
        if self._loaded is not None:
            return {"train": self._loaded}
        if self._begin is None or self.trainer is None:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        # Not what the loader has given out: Lightning may have asked for a batch ahead.
        return {"train": place_after(self._begin, progress.processed)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded, self._loaded_window = state_dict.get("train"), state_dict.get("window")
        if self._windows is not None and self._loaded_window is not None:
            self._windows.go_to(self._loaded_window)


class _Loader:
    """Batches of a data set for Lightning, epoch by epoch, whether or not processes read them."""

    tells_trained_batches = True  # and not those that were read

    def __init__(self, module: ColumnarDataModule, data: Any, training: bool) -> None:
        self._module, self._data, self._training = module, data, training

    def __len__(self) -> int:
        self._set_epoch()
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning makes the iterator before it knows the epoch that it resumes in.
        self._set_epoch()
        if self._training:
            self._module._begin = self._data.state_dict()
        if not self._module.num_workers:
            yield from self._data
            return
        yield from DataLoader(
            self._data,
            batch_size=None,
            num_workers=self._module.num_workers,
            pin_memory=self._module.pin_memory,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the data module: by these methods Lightning knows that it has one."""
        return self._module.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the data module has loaded its place before it made this."""

    def _set_epoch(self) -> None:
        trainer = self._module.trainer
        if self._training and trainer is not None:
            self._data.set_epoch(trainer.current_epoch)
        elif not self._training:
            self._data.set_epoch(0)


def _check_same_files(data: ColumnarDataset | MixedDataset) -> None:
    """Raise on all ranks if their files differ: each would leave out rows, or repeat them."""
    found = collectives.gather(data.fingerprint())
    if len(set(found)) > 1:
        raise ValueError(
            f"train: the files, or how they are read, differ between ranks: rank 0 found what "
            f"ranks {[rank for rank, one in enumerate(found) if one == found[0]]} found, but not "
            f"ranks {[rank for rank, one in enumerate(found) if one != found[0]]}"
        )


def _forget_unfinished_step(fit_loop: Any) -> None:
    """Make Lightning, resumed from a save on an exception, count a step that was not taken as such.

    It does so for the epoch's count, but tells by the total where later checkpoints were made.
    """
    total = fit_loop.epoch_loop.batch_progress.total
    if total.processed < total.ready:
        total.reset_on_restart()


def _begin_next_epoch(fit_loop: Any, length: int) -> None:
    """Make Lightning, resumed after the last step of an epoch, begin the next one.

    It counts the resumed epoch as done before it reloads the loader. But it goes on as if the next
    one had begun, so that checkpoints made in that look like those of an epoch's end; and it keeps
    the count of batches, unless the last epoch had as many as the next one.
    """
    epoch, batch = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress.current
    if epoch.ready == epoch.processed:
        fit_loop.reset_restart_stage()
        batch.completed = max(batch.completed, length)
