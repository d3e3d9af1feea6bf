"""``PredictionWriter``: predictions beside keys, as Parquet files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_bool, check_folder, check_str, explain_arguments
from recis_lightning.close_names import did_you_mean
from recis_lightning.jagged import Jagged

__all__ = ["PredictionWriter"]

_FILE = re.compile(r"(?:loader-(\d+)/)?rank-(\d{5,})\.parquet")


@explain_arguments()
class PredictionWriter(Callback):
    """Write what ``predict_step`` returns, beside entries of its batch, to Parquet files.

    Rank r writes ``{path}/rank-0000r.parquet``, rows in the order in which it predicted them; those
    of a second loader lie in ``{path}/loader-1``. ``ColumnarDataModule`` gives ranks consecutive
    runs, so files in the order of names have all rows in the order of the data. A file has a
    hidden name until prediction ends, and is removed if it fails. Memory holds one batch:
    use ``trainer.predict(..., return_predictions=False)``.

    A folder that has files of an earlier prediction is refused before a batch is predicted.

    Args:
        path: Folder of the files.
        keys: Entries of the batch, a dict, to write beside predictions.
        name: Column of predictions that are a tensor; those in a dict are named by their keys.
        overwrite: Whether files of an earlier prediction in the folder, of any number of ranks
            and loaders, are replaced. They stay until the new ones are whole.

    Raises:
        ImportError: pyarrow is not installed.
        TypeError: An argument is of a wrong type.

    Example:
        >>> writer = PredictionWriter("outputs/scores", keys=["user"])
        >>> writer.name
        'prediction'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keys: Sequence[str] = (),
        name: str = "prediction",
        overwrite: bool = False,
    ) -> None:
        import recis_lightning.data.writing  # noqa: F401 - says what to install

        if isinstance(keys, str):
            raise TypeError(f"keys: expected a list of names, got {keys!r}; write keys=[{keys!r}]")
        self.path = check_folder("path", path)
        self.keys = [check_str("keys", key) for key in keys]
        self.name = check_str("name", name)
        self.overwrite = check_bool("overwrite", overwrite)
        self._files: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for files of an earlier prediction; Lightning's ranks wait for each other here.

        Raises:
            FileExistsError: There are some, and ``overwrite`` is False.
        """
        if stage == "predict" and not self.overwrite and (found := self._earlier_files()):
            raise FileExistsError(
                f"path: {self.path} has files of an earlier prediction, such as "
                f"{min(found.values()).name}; name another folder, remove them, or set "
                "overwrite=True"
            )

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        from recis_lightning.data.writing import RowFile

        columns = self._keys_of(batch)
        predicted = outputs if isinstance(outputs, Mapping) else {self.name: outputs}
        if twice := sorted(columns.keys() & predicted.keys()):
            raise ValueError(f"keys: {twice} are names of predictions, too")
        if dataloader_idx not in self._files:
            folder = self.path / f"loader-{dataloader_idx}" if dataloader_idx else self.path
            name = f"rank-{trainer.global_rank:05d}.parquet"
            self._files[dataloader_idx] = RowFile(folder / name, self.overwrite)
        self._files[dataloader_idx].append({**columns, **predicted})

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for file in self._files.values():
            file.finish()
        written, self._files = set(self._files), {}
        if self.overwrite:
            for (loader, rank), file in self._earlier_files().items():
                is_own = rank == trainer.global_rank and loader not in written
                if is_own or (trainer.is_global_zero and rank >= trainer.world_size):
                    file.unlink(missing_ok=True)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for file in self._files.values():
            file.abandon()
        self._files = {}

    def _earlier_files(self) -> dict[tuple[int, int], Path]:
        """Return the files of predictions that the folder has, by loader and rank."""
        files = [*self.path.glob("rank-*.parquet"), *self.path.glob("loader-*/rank-*.parquet")]
        found = {file: _FILE.fullmatch(file.relative_to(self.path).as_posix()) for file in files}
        return {(int(name[1] or 0), int(name[2])): file for file, name in found.items() if name}

    def _keys_of(self, batch: Any) -> dict[str, Tensor | Jagged]:
        if not self.keys:
            return {}
        if not isinstance(batch, Mapping):
            raise TypeError(f"keys: expected batches that are dicts, got {type(batch).__name__}")
        if absent := [key for key in self.keys if key not in batch]:
            advice = did_you_mean(absent, batch)
            raise ValueError(f"keys: the batch lacks {absent}; it has {sorted(batch)}{advice}")
        return {key: batch[key] for key in self.keys}
