"""MovieLens-100k for the demo: the three text files in recbole's wheel, read without extras."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.jagged import Jagged

_FILES = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")
_IN_WHEEL = "recbole/dataset_example/ml-100k"
FEATURES = ("user", "item", "age", "gender", "occupation", "zip", "year", "genres")


class Examples(NamedTuple):
    """Ratings in the order of time.

    Attributes:
        features: By name int64 [N]; ``genres`` a :class:`Jagged` of N bags.
        label: float32 [N]: 1 for a rating of 4 or 5.
    """

    features: dict[str, Tensor | Jagged]
    label: Tensor

    def part(self, index: Tensor) -> Examples:
        """Return the examples at some positions, int64 [n]."""
        features: dict[str, Tensor | Jagged] = {}
        for name, value in self.features.items():
            features[name] = value[index] if isinstance(value, Tensor) else _bags(value, index)
        return Examples(features, self.label[index])


def _bags(jagged: Jagged, index: Tensor) -> Jagged:
    starts = jagged.offsets[index]
    lengths = jagged.offsets[index + 1] - starts
    offsets = torch.zeros(len(index) + 1, dtype=torch.int64, device="cpu")
    offsets[1:] = lengths.cumsum(0)
    within = torch.arange(int(offsets[-1]), device="cpu") - offsets[:-1].repeat_interleave(lengths)
    return Jagged(jagged.values[starts.repeat_interleave(lengths) + within], offsets)


def find_texts(given: str | None) -> dict[str, str]:
    """Return the text of the three files, by the ends of their names.

    Args:
        given: Folder of the files, or of recbole's wheel, or that wheel. None: those of the
            package recbole, if it is installed.

    Raises:
        FileNotFoundError: They are not there; says how to get them.
    """
    advice = (
        "get it by `pip download --no-deps --dest FOLDER recbole==1.2.1`, whose wheel has the "
        "data, and name that folder with --data FOLDER"
    )
    if given is None:
        spec = find_spec("recbole")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"data: MovieLens-100k is not in this package; {advice}")
        given = str(Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k")
    path = Path(given)
    wheels = [path] if path.suffix == ".whl" else sorted(path.glob("recbole-*.whl"))
    for folder in (path, path / "ml-100k"):
        if all((folder / name).is_file() for name in _FILES):
            return {name: (folder / name).read_text(encoding="utf-8") for name in _FILES}
    for wheel in (wheel for wheel in wheels if wheel.is_file()):
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(f"{_IN_WHEEL}/{name}").decode() for name in _FILES}
    raise FileNotFoundError(f"data: {path} has no {_FILES[0]} and no recbole-*.whl; {advice}")


def examples_of(texts: Mapping[str, str]) -> Examples:
    """Join ratings, users and items, in the order of time.

    Args:
        texts: From ``find_texts``.

    Raises:
        ValueError: A file is not as in recbole's wheel.
    """
    try:
        ratings, users, items = (_table(texts[name]) for name in _FILES)
        user = dict(
            zip(users["user_id"], zip(*(users[n] for n in _OF_USERS), strict=True), strict=True)
        )
        item = dict(
            zip(items["item_id"], zip(*(items[n] for n in _OF_ITEMS), strict=True), strict=True)
        )
        order = sorted(range(len(ratings["rating"])), key=lambda n: float(ratings["timestamp"][n]))
        ids = [[ratings[name][n] for n in order] for name in ("user_id", "item_id")]
        of_users = list(zip(*(user[one] for one in ids[0]), strict=True))
        years, genres = zip(*(item[one] for one in ids[1]), strict=True)
        labels = [float(float(ratings["rating"][n]) >= 4) for n in order]
        numbers = [[int(value) for value in column] for column in (*ids, of_users[0])]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"data: these are not the files of recbole's wheel: {error!r}") from error
    zips = [code[:3] for code in of_users[3]]
    columns = [*numbers, *(_hashes(column) for column in (*of_users[1:3], zips, years))]
    features: dict[str, Tensor | Jagged] = {
        name: torch.tensor(column, device="cpu")
        for name, column in zip(FEATURES, columns, strict=False)
    }
    bags = [one.split() for one in genres]
    ends = torch.tensor([0, *map(len, bags)], device="cpu").cumsum(0)
    values = _hashes(genre for bag in bags for genre in bag)
    features["genres"] = Jagged(torch.tensor(values, device="cpu"), ends)
    return Examples(features, torch.tensor(labels, device="cpu"))


_OF_USERS = ("age", "gender", "occupation", "zip_code")
_OF_ITEMS = ("release_year", "class")


def _table(text: str) -> dict[str, Sequence[str]]:
    """Return the columns of tab-separated text, whose first line has ``name:type`` fields."""
    head, *lines = text.splitlines()
    names = [field.partition(":")[0] for field in head.split("\t")]
    columns = zip(*(line.split("\t") for line in lines), strict=True)
    return dict(zip(names, columns, strict=True))


def _hashes(words: Iterable[str]) -> list[int]:
    """Return an int64 for each word: a table takes any id, so no vocabulary is needed."""
    known: dict[str, int] = {}
    for word in (words := list(words)):
        if word not in known:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little", signed=True)
    return [known[word] for word in words]
