"""RecBole's own models on the parts of ``movielens``; needs ``pip install recbole==1.2.1``."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.movielens import HISTORY, Likes, LikesSplit, Split
from recis_lightning import Jagged
from recis_lightning.cli.movielens import FEATURES, Examples

_PARTS = ("train", "val", "test")
# RecBole 1.2.1 asks for names that NumPy 2 has dropped.
_GONE_FROM_NUMPY = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}
_NAMES = {"user": "user_id", "item": "item_id", "history": "item_id_list"}  # of RecBole
_PERCEPTRON = {"embedding_size": 16, "mlp_hidden_size": [128, 64], "dropout_prob": 0.2}
_SETTINGS: dict[str, dict[str, Any]] = {
    "DCNV2": _PERCEPTRON,
    "DIN": _PERCEPTRON,
    "PNN": _PERCEPTRON,
    "NPE": {"embedding_size": 64, "loss_type": "CE"},
    "SASRec": {
        **{"hidden_size": 32, "inner_size": 64, "n_layers": 2, "n_heads": 2},
        **{"hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2, "loss_type": "CE"},
    },
}


class Peer:
    """A model of RecBole, with its own data sets of the same examples.

    Args:
        name: Of a model in RecBole: ``"DCNV2"``, ``"PNN"`` or ``"DIN"``, which score ratings, or
            ``"NPE"`` or ``"SASRec"``, which score all items.
        data: Ratings, or likes.
    """

    def __init__(self, name: str, data: Split | LikesSplit) -> None:
        items: dict[str, str] = {}
        if isinstance(data, LikesSplit):
            columns = [_columns_of_likes(likes) for likes in (data.train, data.val, data.test)]
        else:
            columns = [_columns_of(examples, name == "DIN") for examples in data]
            items = _genres(data) if name == "DIN" else {}
        self._name, self._items = name, None
        self._config, self._parts = _build(name, columns, items)
        if isinstance(data, LikesSplit):
            tokens = [str(item) for item in data.items.tolist()]
            # Nobody but RecBole's padding has the token of an item that is in none of its files.
            known = self._parts["train"].field2token_id["item_id"]
            self._items = torch.tensor([known.get(token, 0) for token in tokens])

    def begin(self, seed: int) -> nn.Module:
        """Return a new model, whose weights begin by a seed."""
        from recbole.utils import get_model, init_seed

        init_seed(seed, True)
        model: nn.Module = get_model(self._name)(self._config, self._parts["train"])
        return model

    def losses(self, model: Any, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the model's own loss of each batch of training examples."""
        return (model.calculate_loss(b) for b in self._batches("train", size, generator))

    def scores(self, model: Any, part: str, size: int) -> Tensor:
        """Return the model's own predictions: logits [N], or scores [num_users, num_items]."""
        batches = self._batches(part, size, None)
        if self._items is None:
            return torch.cat([model.predict(batch) for batch in batches]).logit(1e-7)
        found = [model.full_sort_predict(batch)[:, self._items] for batch in batches]
        return torch.cat(found)

    def _batches(self, part: str, size: int, generator: torch.Generator | None) -> Iterator[Any]:
        """Yield batches in the order that ``movielens.batches`` has."""
        data = self._parts[part]
        num = len(data.inter_feat)
        order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
        return (data.join(data.inter_feat[index]) for index in order.split(size))


def _build(
    name: str, parts: Sequence[Mapping[str, Iterable[str]]], items: Mapping[str, str]
) -> tuple[Any, dict[str, Any]]:
    """Return a model's settings, and its data sets by part."""
    from recbole.config import Config
    from recbole.data import create_dataset

    for alias, kind in _GONE_FROM_NUMPY.items():
        vars(np).setdefault(alias, kind)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of pandas, for RecBole
        fields = write(Path(folder) / "ml", parts, items)
        argv, sys.argv = sys.argv, sys.argv[:1]  # which Config would read
        try:
            config = Config(
                model=name,
                dataset="ml",
                config_dict={
                    **_SETTINGS[name],
                    **fields,
                    "data_path": folder,
                    "benchmark_filename": list(_PARTS),
                    "LABEL_FIELD": "label",
                    "MAX_ITEM_LIST_LENGTH": HISTORY,
                    "train_neg_sample_args": None,
                    "use_gpu": False,
                    "show_progress": False,
                },
            )
        finally:
            sys.argv = argv
        logging.getLogger().setLevel(logging.WARNING)
        dataset = create_dataset(config)
        return config, dict(zip(_PARTS, dataset.build(), strict=True))


def write(
    folder: Path, parts: Sequence[Mapping[str, Iterable[str]]], items: Mapping[str, str]
) -> dict[str, Any]:
    """Write RecBole's atomic files; return the settings that name their columns.

    Args:
        folder: Made, for files ``<folder>.<part>.inter``.
        parts: Columns of training, validation and test, by ``name:type``.
        items: Genres by item; empty for none.
    """
    folder.mkdir()
    for part, columns in zip(_PARTS, parts, strict=True):
        lines = ["\t".join(columns), *map("\t".join, zip(*columns.values(), strict=True))]
        (folder / f"{folder.name}.{part}.inter").write_text("\n".join(lines) + "\n")
    names = [head.partition(":")[0] for head in parts[0]]
    load_col: dict[str, list[str]] = {"inter": names}
    fields: dict[str, Any] = {"load_col": load_col}
    if "item_id_list" in names:
        fields |= {"alias_of_item_id": ["item_id_list"], "LIST_SUFFIX": "_list"}
    if items:
        lines = ["item_id:token\tgenres:token_seq", *map("\t".join, items.items())]
        (folder / f"{folder.name}.item").write_text("\n".join(lines) + "\n")
        load_col["item"] = ["item_id", "genres"]
    return fields


def _columns_of(examples: Examples, sequential: bool) -> dict[str, Iterable[str]]:
    names = ["user", "item", "history"] if sequential else list(FEATURES)
    kinds = {"genres": "token_seq", "history": "token_seq"}
    columns: dict[str, Iterable[str]] = {
        f"{_NAMES.get(name, name)}:{kinds.get(name, 'token')}": _texts(examples, name)
        for name in names
    }
    return columns | {"label:float": map(str, examples.label.tolist())}


def _columns_of_likes(likes: Likes) -> dict[str, Iterable[str]]:
    bags = (" ".join(str(item) for item in row if item) for row in likes.histories.tolist())
    return {
        "user_id:token": map(str, likes.users.tolist()),
        "item_id:token": map(str, likes.items.tolist()),
        "item_id_list:token_seq": bags,
    }


def _genres(split: Split) -> dict[str, str]:
    found: dict[str, str] = {}
    for examples in split:
        found |= dict(zip(_texts(examples, "item"), _texts(examples, "genres"), strict=True))
    return found


def _texts(examples: Examples, name: str) -> list[str]:
    """Return a feature of each example as RecBole writes it."""
    value = examples.features[name]
    if not isinstance(value, Jagged):
        return [str(one) for one in value.tolist()]
    bags = value.values.split(value.lengths().tolist())
    # RecBole reads no empty bag: a token that nothing else has stands for it.
    return [" ".join(str(one) for one in bag.tolist()) or "none" for bag in bags]
