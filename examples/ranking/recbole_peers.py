"""RecBole's own DCNV2 and DIN on the split of ``data``; needs ``pip install recbole==1.2.1``."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.ranking.data import HISTORY, Split
from recis_lightning import Jagged
from recis_lightning.cli.movielens import FEATURES, Examples

_PARTS = ("train", "val", "test")
# RecBole 1.2.1 asks for names that NumPy 2 has dropped.
_GONE_FROM_NUMPY = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}
_NAMES = {"user": "user_id", "item": "item_id", "history": "item_id_list"}  # of RecBole
_SETTINGS = {
    "DCNV2": {"embedding_size": 16, "mlp_hidden_size": [128, 64], "dropout_prob": 0.2},
    "DIN": {"embedding_size": 16, "mlp_hidden_size": [128, 64], "dropout_prob": 0.2},
}


class Peer:
    """A model of RecBole, with its own data sets of the same examples.

    Args:
        name: Of the model, ``"DCNV2"`` or ``"DIN"``.
        split: The examples.
        seed: Of its weights.

    Attributes:
        model: The model.
    """

    def __init__(self, name: str, split: Split, seed: int) -> None:
        from recbole.config import Config
        from recbole.data import create_dataset
        from recbole.utils import get_model, init_seed

        for alias, kind in _GONE_FROM_NUMPY.items():
            vars(np).setdefault(alias, kind)
        with tempfile.TemporaryDirectory() as folder:
            fields = _write(Path(folder) / "ml", split, name)
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
                        "eval_args": {"mode": "labeled", "order": "TO", "group_by": None},
                        "metrics": ["AUC"],
                        "valid_metric": "AUC",
                        "use_gpu": False,
                        "seed": seed,
                        "show_progress": False,
                    },
                )
            finally:
                sys.argv = argv
            logging.getLogger().setLevel(logging.WARNING)
            dataset = create_dataset(config)
            self._parts: dict[str, Any] = dict(zip(_PARTS, dataset.build(), strict=True))
        init_seed(seed, True)
        self.model: nn.Module = get_model(name)(config, self._parts["train"])

    def batches(self, part: str, size: int, generator: torch.Generator | None) -> Iterator[Any]:
        """Yield batches of a part, as RecBole has them."""
        data = self._parts[part]
        num = len(data.inter_feat)
        order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
        return (data.join(data.inter_feat[index]) for index in order.split(size))

    def loss(self, batch: Any) -> Tensor:
        """Return the model's own loss."""
        return self.model.calculate_loss(batch)  # type: ignore[no-any-return, operator]

    def probabilities(self, batch: Any) -> Tensor:
        """Return the model's own predictions [B]."""
        return self.model.predict(batch)  # type: ignore[no-any-return, operator]


def _write(folder: Path, split: Split, name: str) -> dict[str, Any]:
    """Write RecBole's atomic files; return the settings that name their columns."""
    folder.mkdir()
    sequential = name == "DIN"
    names = ["user", "item"] if sequential else list(FEATURES)
    if sequential:
        names.append("history")
    kinds = {"genres": "token_seq", "history": "token_seq"}
    heads = [f"{_NAMES.get(one, one)}:{kinds.get(one, 'token')}" for one in names]
    for part, examples in zip(_PARTS, split, strict=True):
        columns = [_texts(examples, n) for n in names]
        labels = [str(label) for label in examples.label.tolist()]
        lines = ["\t".join([*heads, "label:float"])]
        lines += ["\t".join(row) for row in zip(*columns, labels, strict=True)]
        (folder / f"ml.{part}.inter").write_text("\n".join(lines) + "\n")
    load_col: dict[str, list[str]] = {"inter": [h.partition(":")[0] for h in heads] + ["label"]}
    if not sequential:
        return {"load_col": load_col}
    genres: dict[str, str] = {}
    for examples in split:
        genres |= dict(zip(_texts(examples, "item"), _texts(examples, "genres"), strict=True))
    lines = ["item_id:token\tgenres:token_seq", *("\t".join(pair) for pair in genres.items())]
    (folder / "ml.item").write_text("\n".join(lines) + "\n")
    load_col["item"] = ["item_id", "genres"]
    return {"load_col": load_col, "alias_of_item_id": ["item_id_list"], "LIST_SUFFIX": "_list"}


def _texts(examples: Examples, name: str) -> list[str]:
    """Return a feature of each example as RecBole writes it."""
    value = examples.features[name]
    if not isinstance(value, Jagged):
        return [str(one) for one in value.tolist()]
    bags = value.values.split(value.lengths().tolist())
    # RecBole reads no empty bag: a token that nothing else has stands for it.
    return [" ".join(str(one) for one in bag.tolist()) or "none" for bag in bags]
