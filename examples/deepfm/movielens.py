"""MovieLens-100k: likes of films, in the order of time."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from examples.deepfm.batch import Batch, as_is
from recis_lightning import Jagged

_PACKAGE = "recbole==1.2.1"  # its wheel contains the data set
_MEMBERS = "recbole/dataset_example/ml-100k"
_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}


class MovieLens(Dataset[Batch]):
    """A slice of the interactions, as columns; a list of indices gives one batch."""

    def __init__(
        self, ids: dict[str, Tensor], genres: Jagged, label: Tensor, rows: range | None = None
    ) -> None:
        """Keep the columns; ``rows`` is the part of them in this data set."""
        self.ids = ids
        self.genres = genres
        self.label = label
        self.rows = range(len(label)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Return one example, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the examples at ``indices`` as one batch; the DataLoader calls this."""
        rows = torch.tensor(indices, dtype=torch.int64) + self.rows.start
        ids = {name: column[rows] for name, column in self.ids.items()}
        return Batch(
            features={**ids, "genres": take_bags(self.genres, rows)},
            dense=torch.empty(len(rows), 0),
            label=self.label[rows],
            group=ids["user"],
        )

    def split(self, *ends: float) -> Iterator[MovieLens]:
        """Cut into consecutive parts that end at these fractions of the rows."""
        start = 0
        for end in ends:
            stop = round(end * len(self))
            yield MovieLens(self.ids, self.genres, self.label, self.rows[start:stop])
            start = stop


class MovieLensDataModule(L.LightningDataModule):
    """MovieLens-100k in the order of time: first 80% to train on, last 20% to test on.

    A rating of 4 or 5 is a like. The features are the ids ``user, item, age, gender, occupation,
    zip, year, hour`` and the bag ``genres``. The data set (5 MB) is downloaded once, with pip.

    Args:
        root: Folder of the downloaded files.
        batch_size: Examples in a batch.
        val_fraction: Share of the training part, cut from its end, that is used for validation.
        num_workers: Worker processes of each DataLoader; 0 loads in the main process.
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
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        self.root = Path(root)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed

    def prepare_data(self) -> None:
        """Download missing files."""
        download(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split them by time."""
        if hasattr(self, "train"):
            return
        everything = read(self.root)
        train_end = 0.8 * (1 - self.val_fraction)
        self.train, self.val, self.test = everything.split(train_end, 0.8, 1.0)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training part, in an order that depends on the seed and the epoch only."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the validation part, or no loader if ``val_fraction`` is 0."""
        return self._loader(self.val) if len(self.val) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the last 20%."""
        return self._loader(self.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the last 20%."""
        return self._loader(self.test)

    def _loader(self, part: MovieLens, shuffle: bool = False) -> DataLoader[Batch]:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # Lightning sets this sampler's epoch, also after a resume: no other state is needed.
        sampler: DistributedSampler[Batch] = DistributedSampler(
            part, ranks, rank, shuffle=shuffle, seed=self.seed
        )
        return DataLoader(
            part,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=as_is,  # type: ignore[arg-type]
        )


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


def read(root: Path) -> MovieLens:
    """Read the three files under ``root`` into columns sorted by time."""
    users = {row["user_id"]: row for row in _rows(root / "ml-100k.user")}
    items = {row["item_id"]: row for row in _rows(root / "ml-100k.item")}
    rows = sorted(_rows(root / "ml-100k.inter"), key=lambda row: float(row["timestamp"]))
    genres = {item: [stable_id(g) for g in row["class"].split()] for item, row in items.items()}
    tokens: dict[str, list[str]] = {
        "user": [row["user_id"] for row in rows],
        "item": [row["item_id"] for row in rows],
        "age": [users[row["user_id"]]["age"] for row in rows],
        "gender": [users[row["user_id"]]["gender"] for row in rows],
        "occupation": [users[row["user_id"]]["occupation"] for row in rows],
        "zip": [users[row["user_id"]]["zip_code"][:3] for row in rows],
        "year": [items[row["item_id"]]["release_year"] for row in rows],
        "hour": [str(int(float(row["timestamp"])) // 3600 % 24) for row in rows],
    }
    bags = [genres[row["item_id"]] for row in rows]
    return MovieLens(
        ids={name: torch.tensor([*map(stable_id, column)]) for name, column in tokens.items()},
        genres=Jagged(
            values=torch.tensor([genre for bag in bags for genre in bag]),
            offsets=torch.tensor([0, *map(len, bags)]).cumsum(0),
        ),
        label=torch.tensor([float(row["rating"]) >= 4 for row in rows], dtype=torch.float32),
    )


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a tab-separated file whose header has ``name:type`` fields."""
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [field.partition(":")[0] for field in next(reader)]
        for row in reader:
            yield dict(zip(names, row, strict=True))


def stable_id(token: str) -> int:
    """Return a number as itself and any other text as a 64-bit hash, the same on every machine.

    Example:
        >>> stable_id("1995"), stable_id("Drama")
        (1995, -3780808780974187119)
    """
    if token.isdecimal():
        return int(token)
    digest = hashlib.blake2b(token.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def take_bags(bags: Jagged, rows: Tensor) -> Jagged:
    """Return the bags at ``rows``, in that order, including repeats.

    Example:
        >>> bags = Jagged(values=torch.tensor([7, 8, 9]), offsets=torch.tensor([0, 1, 1, 3]))
        >>> take_bags(bags, torch.tensor([2, 0]))[:2]
        (tensor([8, 9, 7]), tensor([0, 2, 3]))
    """
    return bags.select(rows)
