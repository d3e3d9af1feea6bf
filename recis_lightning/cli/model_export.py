"""``recis-lightning export``: a model, of its settings and checkpoint, to a served folder."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from recis_lightning import checkpoint, serving
from recis_lightning.cli.command_parser import PROGRAM, guarded
from recis_lightning.cli.recis_cli import RecisCLI
from recis_lightning.serving.exporter import check_replaceable

_NUM_ROWS = 4  # of the example; two would do
_TABLE_STATE = "_extra_state"  # end of the keys of tables in a state_dict


class ExportCLI(RecisCLI):
    """Command line with the settings of a training run, and those of an export."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint of the trained model")
        parser.add_argument("--folder", type=str, default="served", help="where to export it")
        parser.add_argument(
            "--rows",
            type=str | None,
            help="float32, bfloat16 or int8: as what rows are kept; by default as they are",
        )
        parser.add_argument(
            "--weights_only", type=bool | None, help="of a run's settings; it is always True here"
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with warnings.catch_warnings():
            # Its words are those of the process, without "export".
            warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
            super().parse_arguments(parser, args)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
        )


def export_command(args: Sequence[str]) -> RecisCLI:
    """Export the model that settings and a checkpoint describe; print the folder.

    Args:
        args: The command line behind ``export``.

    Raises:
        SystemExit: A mistake, after two lines on stderr (status 2).
    """
    options: dict[str, Any] = {"parser_kwargs": {"prog": f"{PROGRAM} export"}}
    cli = ExportCLI(run=False, seed_everything_default=False, args=list(args), **options)

    def write() -> str:
        check_replaceable(cli.config["folder"])
        path = cli.config["ckpt_path"]
        if path is None:
            raise ValueError("ckpt_path: expected the checkpoint of a trained model, got None")
        if cli.datamodule is None:
            raise ValueError("data: expected the data of the run, of which an example is taken")
        load_model(cli.model, path)
        example = example_of(cli.model, cli.datamodule)
        serving.export(cli.model, cli.config["folder"], rows=cli.config["rows"], **example)
        return str(cli.config["folder"])

    print(guarded("export", write))
    return cli


def load_model(model: L.LightningModule, path: str) -> None:
    """Load tables and parameters, of any number of ranks, into a model of one process.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path: expected a checkpoint of Lightning, got {path}")
    checkpoint.load(path, model)  # refuses what is no checkpoint
    state = torch.load(path, map_location="cpu", weights_only=True)
    dense = {
        key: value for key, value in state["state_dict"].items() if not key.endswith(_TABLE_STATE)
    }
    found = model.load_state_dict(dense, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith(_TABLE_STATE)]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"ckpt_path: {path} is of another model: it lacks {missing}, and has also "
            f"{found.unexpected_keys}"
        )


def example_of(model: L.LightningModule, data: L.LightningDataModule) -> dict[str, Any]:
    """Return the arguments of ``serving.export`` that say how the model is called.

    Of a ``ColumnarDataModule`` these are rows of its first file, with the features that make
    batches of them, so that the served model takes raw records. Of other data it is the first
    batch; where that is a tuple, as many of it as the model's ``forward`` takes.

    Raises:
        ValueError: The data has no batch.
    """
    data.prepare_data()
    raw = _raw_rows(data)
    if raw is not None:
        return {"example": raw, "features": data.features, "convert": data.convert}  # type: ignore[attr-defined]
    data.setup("fit")
    for make in (data.val_dataloader, data.train_dataloader):
        try:
            batch = next(iter(make()), None) if callable(make) else None
        except MisconfigurationException:  # the part has no loader
            continue
        if batch is not None:
            return {"example": _arguments(model, batch)}
    raise ValueError("data: expected an example, got no batch of validation or training")


def _raw_rows(data: L.LightningDataModule) -> dict[str, list[Any]] | None:
    """Return some rows of columnar files; None for other data, and columns that a path says."""
    try:
        from pyarrow import dataset

        from recis_lightning.data.files import patterns_of
        from recis_lightning.data.module import ColumnarDataModule
    except ImportError:
        return None
    if not isinstance(data, ColumnarDataModule):
        return None
    for part in ("val", "train", "test"):
        paths = data.paths[part]
        for one in paths.values() if isinstance(paths, Mapping) else [paths or []]:
            for pattern in patterns_of(one) if one else []:
                for path in pattern.matches():
                    file = dataset.dataset(
                        path, filesystem=pattern.system, format=Path(path).suffix[1:]
                    )
                    sources = {source for column in data.columns for source in column.sources}
                    if not sources <= set(file.schema.names):
                        return None
                    rows = file.head(_NUM_ROWS, columns=sorted(sources))
                    if rows.num_rows > 1:
                        return rows.to_pydict()  # type: ignore[no-any-return]
    return None


def _arguments(model: L.LightningModule, batch: Any) -> Any:
    """Return as much of a batch as ``forward`` takes."""
    if not isinstance(batch, (tuple, list)) or hasattr(batch, "_fields"):
        return batch
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(batch[: sum(parameter.kind in kinds for parameter in parameters)])
