"""MovieLens-100k: likes of films, in the order of time."""

from __future__ import annotations

import glob
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv, parquet

from examples.deepfm.batch import Batch, no_batches
from recis_lightning.data import Bucketize, ColumnarDataModule, Features, Id, IdList, Label

_PACKAGE = "recbole==1.2.1"  # its wheel contains the data set
_MEMBERS = "recbole/dataset_example/ml-100k"
_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}

IDS = ["user", "item", "age", "gender", "occupation", "zip", "year", "hour", "genres"]
FEATURES = Features(
    [
        *(Id(name) for name in ("user", "item", "age", "hour")),
        *(Id(name, hash="xxh64") for name in ("gender", "occupation", "zip", "year")),
        IdList("genres", hash="xxh64"),
        Label("label", source="rating"),
    ],
    [Bucketize("label", [4.0])],
)


def to_batch(entries: dict[str, Any]) -> Batch:
    """Return the model's batch; of files or requests without ratings one without likes."""
    num_samples = entries["user"].shape[0]
    label = entries["label"].float() if "label" in entries else torch.zeros(num_samples)
    dense = torch.zeros(num_samples, 0)
    features = {name: entries[name] for name in IDS}
    return Batch(features=features, dense=dense, label=label, group=entries["user"])


class MovieLensDataModule(ColumnarDataModule):
    """MovieLens-100k in the order of time: first 80% to train on, last 20% to test on.

    A rating of 4 or 5 is a like. The features are the ids ``user, item, age, gender, occupation,
    zip, year, hour`` and the bag ``genres``. The data set (5 MB) is downloaded once, with pip, and
    its three text files are joined to Parquet files of one percent of the interactions each.

    Args:
        root: Folder of the downloaded files.
        batch_size: Examples in a batch of one rank.
        val_fraction: Share of the training part, cut from its end, that is used for validation;
            rounded to whole percents of the interactions.
        num_workers: Processes that read; 0 reads in threads.
        seed: Of the order of training examples.
    """

    def __init__(
        self,
        root: str = "data/ml-100k",
        batch_size: int = 512,
        val_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        self.root = Path(root)
        files = [glob.escape(str(path)) for path in part_files(self.root)]
        train_end = round(80 * (1 - val_fraction))
        super().__init__(
            train=files[:train_end],
            val=files[train_end:80] or None,
            test=files[80:],
            batch_size=batch_size,
            shuffle_rows=100_000,  # all of it
            num_workers=num_workers,
            seed=seed,
            features=FEATURES,
            convert=to_batch,
        )
        if train_end == 80:  # on purpose: Lightning need not warn of it
            self.val_dataloader = no_batches  # type: ignore[method-assign]

    def prepare_data(self) -> None:
        """Download missing files, and join them."""
        download(self.root)
        if not all(path.is_file() for path in part_files(self.root)):
            write_parts(self.root)


def part_files(root: Path) -> list[Path]:
    """Return the Parquet files of ``write_parts``, a hundred."""
    return [root / "by-time" / f"part-{n:02}.parquet" for n in range(100)]


def download(root: Path) -> None:
    """Download the files of MovieLens-100k to ``root``, unless they are there.

    Every file is checked and then moved into place, so an interrupted download leaves no partial
    file, and the next one continues from there.

    Args:
        root: Folder of the files. A wheel of recbole in it is used instead of a download.

    Raises:
        RuntimeError: The data cannot be downloaded; the message says how to provide it by hand.
    """
    root.mkdir(parents=True, exist_ok=True)
    if all((root / name).is_file() for name in _SHA256):
        return
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        wheel = next(root.glob("recbole-*.whl"), None) or _fetch_wheel(root, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            for name, sha256 in _SHA256.items():
                content = archive.read(f"{_MEMBERS}/{name}")
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise RuntimeError(f"{name} in {wheel} is not the file that was expected")
                checked = Path(scratch) / name
                checked.write_bytes(content)
                checked.replace(root / name)


def _fetch_wheel(root: Path, scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(scratch), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise RuntimeError(
            f"MovieLens-100k is not in {root} and pip could not download it. Where there is a "
            f"network, run `python -m pip download --no-deps {_PACKAGE}`, put the wheel into "
            f"{root.resolve()} and start again. pip said:\n{(done.stderr or done.stdout).strip()}"
        )
    return wheel


def write_parts(root: Path) -> None:
    """Join the three files under ``root``, sort them by time and write ``part_files``.

    A folder appears when it is complete.
    """
    users, items = _table(root / "ml-100k.user"), _table(root / "ml-100k.item")
    seen = _table(root / "ml-100k.inter")
    time = pc.cast(pc.cast(seen["timestamp"], pa.float64()), pa.int64())
    by_time = pa.table({"time": time, "row": range(len(time))})
    order = pc.sort_indices(by_time, [("time", "ascending"), ("row", "ascending")])
    seen, time = seen.take(order), time.take(order)
    user = users.take(pc.index_in(seen["user_id"], users["user_id"].combine_chunks()))
    item = items.take(pc.index_in(seen["item_id"], items["item_id"].combine_chunks()))
    genres = pc.split_pattern_regex(item["class"], "\\s+")
    table = pa.table(
        {
            "user": pc.cast(seen["user_id"], pa.int64()),
            "item": pc.cast(seen["item_id"], pa.int64()),
            "age": pc.cast(user["age"], pa.int64()),
            "gender": user["gender"],
            "occupation": user["occupation"],
            "zip": pc.utf8_slice_codeunits(user["zip_code"], 0, 3),
            "year": item["release_year"],
            "hour": pc.subtract(pc.divide(time, 3600), pc.multiply(pc.divide(time, 86400), 24)),
            "genres": pc.if_else(pc.equal(item["class"], ""), pa.scalar([], genres.type), genres),
            "rating": pc.cast(seen["rating"], pa.float32()),
        }
    )
    ends = [table.num_rows * n // 100 for n in range(101)]
    final = part_files(root)[0].parent
    with tempfile.TemporaryDirectory(dir=root, prefix=".parts-") as scratch:
        done = Path(scratch) / final.name
        done.mkdir()
        for path, start, end in zip(part_files(root), ends, ends[1:], strict=False):
            parquet.write_table(table.slice(start, end - start), done / path.name)
        shutil.rmtree(final, ignore_errors=True)
        done.rename(final)


def _table(path: Path) -> pa.Table:
    """Read a tab-separated file whose header has ``name:type`` fields, as strings."""
    with path.open(encoding="utf-8") as lines:
        names = next(lines).rstrip("\n").split("\t")
    return csv.read_csv(
        path,
        csv.ReadOptions(column_names=[name.partition(":")[0] for name in names], skip_rows=1),
        csv.ParseOptions(delimiter="\t", quote_char=False),
        csv.ConvertOptions(
            column_types={name.partition(":")[0]: pa.string() for name in names},
            strings_can_be_null=False,
        ),
    )
