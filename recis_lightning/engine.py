"""``EmbeddingEngine``: all categorical features of a model, one pass a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import override

from recis_lightning.admission import Admission
from recis_lightning.arguments import (
    check_dtype,
    check_embedding_dim,
    check_padding_idx,
    refuse_script,
)
from recis_lightning.eviction import Eviction
from recis_lightning.initializers import DEFAULT_INITIALIZER, Initializer
from recis_lightning.jagged import Bags, Jagged, read_features, read_keyed_jagged
from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature
from recis_lightning.lookup.group import LookupGroup, look_up_groups
from recis_lightning.ops.embedding_bag import MODES
from recis_lightning.table.hash_table import HashTable

_FEATURE_FIELDS = ("table", "mode", "padding_idx", "tile_len")  # the rest belongs to the table


@dataclass
class EmbeddingOption:
    """Settings of a feature: of its lookup, and of its table.

    Args:
        embedding_dim: Size of a row.
        table: Name of the table that has its rows; the feature's name by default. Options that
            name the same table share its rows, and must agree on everything the table owns.
        mode: "none" (a row an id), "sum", "mean" or "tile" (the first ``tile_len`` rows of a bag
            side by side, zero padded).
        initializer: Distribution of new rows.
        admission: Policy that says which unknown ids get a row; None admits all.
        eviction: Policy that says which rows the table evicts; None evicts none.
        padding_idx: An id of this feature that reads as zeros and gets no row.
        dtype: torch.float32 or torch.bfloat16, also by name.
        device: Where the table lives.
        trainable: Whether rows get gradients.
        tile_len: Rows of a bag, for mode "tile" only.
        seed: With the table's name and the id, what a new row's values depend on; None takes
            torch's initial seed, as ``seed_everything`` sets it.

    Raises:
        TypeError, ValueError: A field is not what it should be.
    """

    embedding_dim: int
    table: str | None = None
    mode: Literal["none", "sum", "mean", "tile"] = "none"
    initializer: Initializer = DEFAULT_INITIALIZER
    admission: Admission | None = None
    eviction: Eviction | None = None
    padding_idx: int | None = None
    dtype: torch.dtype | str = torch.float32
    device: torch.device | str | None = None
    trainable: bool = True
    tile_len: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        check_embedding_dim(self.embedding_dim)
        check_dtype(self.dtype)
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {tuple(MODES)}, got {self.mode!r}")
        if (self.mode == "tile") != (self.tile_len is not None):
            raise ValueError(
                f"tile_len: mode 'tile' needs one and no other takes one, got "
                f"tile_len={self.tile_len!r} with mode={self.mode!r}"
            )
        if self.tile_len is not None and (
            isinstance(self.tile_len, bool)
            or not isinstance(self.tile_len, int)
            or self.tile_len < 1
        ):
            raise ValueError(f"tile_len: expected an int >= 1, got {self.tile_len!r}")
        check_padding_idx(self.padding_idx)


_FIXED = (
    "an engine's options are fixed when it is made; make another engine, or change a table of "
    "engine.tables (its admission, eviction or initializer)"
)


class FeatureOptions(dict[str, EmbeddingOption]):
    """Options of an engine by feature, to be read: to set one is an error."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"options: {_FIXED}")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = _refuse
    pop = popitem = clear = _refuse

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureOptions, (dict(self),)


class EmbeddingEngine(nn.Module):
    """Looks up many features at once.

    Features whose tables share device, dtype and dim form a group, and a group is one index pass
    and one gather a step, however many features it has and however they pool.

    Args:
        options: Feature -> its settings.

    Raises:
        TypeError: An option is no ``EmbeddingOption``.
        ValueError: No features, or two that share a table and disagree on it.

    Example:
        >>> engine = EmbeddingEngine({
        ...     "item": EmbeddingOption(4, table="item"),
        ...     "history": EmbeddingOption(4, table="item", mode="sum"),
        ... })
        >>> history = Jagged(torch.tensor([1, 2, 2]), torch.tensor([0, 1, 3]))
        >>> out = engine({"item": torch.tensor([1, 7]), "history": history})
        >>> {name: tuple(value.shape) for name, value in out.items()}
        {'item': (2, 4), 'history': (2, 4)}
        >>> len(engine.tables["item"])
        3
    """

    def __init__(self, options: dict[str, EmbeddingOption]) -> None:
        super().__init__()
        if not options:
            raise ValueError("options: expected at least one feature, got none")
        self.options = FeatureOptions(options)
        self.tables = nn.ModuleDict()
        owners: dict[str, str] = {}
        for feature, option in self.options.items():
            if not isinstance(option, EmbeddingOption):
                raise TypeError(f"options[{feature!r}]: expected EmbeddingOption, got {option!r}")
            name = option.table or feature
            if "." in name:
                raise ValueError(f"options[{feature!r}]: table {name!r} must not contain '.'")
            if name in owners:
                self._check_same_table(name, owners[name], feature)
                continue
            owners[name] = feature
            self.tables[name] = _make_table(name, option)
        self._groups, self._grouped = CurrentGroups(), list(self.tables.values())

    def _check_same_table(self, table: str, first: str, second: str) -> None:
        one, two = self.options[first], self.options[second]
        for field in fields(EmbeddingOption):
            if field.name in _FEATURE_FIELDS:
                continue
            mine, other = getattr(one, field.name), getattr(two, field.name)
            if field.name == "admission":
                mine, other = repr(mine), repr(other)
            if field.name == "dtype":
                mine, other = (str(dtype).removeprefix("torch.") for dtype in (mine, other))
            if mine != other:
                raise ValueError(
                    f"options: features {first!r} and {second!r} share table {table!r} but "
                    f"disagree on {field.name}: {mine!r} and {other!r}"
                )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a lookup changes its table
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Look all features up.

        Args:
            features: Feature -> int64 [B] or [B, L], a dense pair ``(ids, weights)``, a torch
                jagged NestedTensor [B, j], or ``Jagged``; or TorchRec's ``KeyedJaggedTensor``.

        Returns:
            Feature -> [B, dim] for "sum" and "mean", [B, tile_len * dim] for "tile"; [B, S, ...] of
            ids [B, S, L]; for "none" [*ids.shape, dim], and a ragged feature in its own layout.

        Raises:
            ValueError: A feature is missing or unknown (names it).
            TypeError: A feature is of no kind named above (names it).
        """
        if not isinstance(features, Mapping):
            if not all(hasattr(features, name) for name in ("keys", "values", "lengths")):
                raise TypeError(
                    f"features: expected a dict or KeyedJaggedTensor, got {type(features).__name__}"
                )
            features = read_keyed_jagged(features)
        if features.keys() != self.options.keys():
            missing = sorted(self.options.keys() - features.keys())
            unknown = sorted(features.keys() - self.options.keys())
            raise ValueError(f"features: missing {missing}, unknown {unknown}")
        groups = self.current_groups()
        bags = [read_features(features, group.layout.names) for group in groups]
        outputs = look_up_groups(groups, bags, self.training)
        embeddings: dict[str, Any] = dict.fromkeys(self.options)
        for group, parts, rows in zip(groups, bags, outputs, strict=True):
            names = group.layout.names
            embeddings.update(zip(names, rows, strict=True))
            for name, bag in zip(names, parts.details, strict=False):  # none if all are plain
                mode = self.options[name].mode
                embeddings[name] = _shape(embeddings[name], bag, mode)
        return embeddings

    def current_groups(self) -> list[LookupGroup]:
        """Return the groups of the features, as their tables are now."""
        tables = list(self.tables._modules.values())
        if tables != self._grouped:  # somebody put another one in
            self._groups, self._grouped = CurrentGroups(), tables
        return self._groups.of(lambda: map(self._feature, self.options))

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "options" and "_groups" in self.__dict__:
            raise AttributeError(f"options: {_FIXED}")
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks for this."""
        refuse_script("EmbeddingEngine")

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = {**state, "options": FeatureOptions(state["options"])}
        super().__setstate__(  # type: ignore[no-untyped-call]
            {**fields, "_groups": CurrentGroups(), "_grouped": []}
        )

    def _table(self, feature: str) -> HashTable:
        option = self.options[feature]
        table = self.tables._modules.get(option.table or feature)
        if not isinstance(table, HashTable) or table.embedding_dim != option.embedding_dim:
            raise TypeError(
                f"tables[{option.table or feature!r}]: feature {feature!r} needs a HashTable of "
                f"embedding_dim={option.embedding_dim}, got {table!r}"
            )
        return table

    def _feature(self, name: str) -> Feature:
        option = self.options[name]
        return Feature(
            name, self._table(name), option.mode, option.padding_idx, option.tile_len or 0
        )


def _make_table(name: str, option: EmbeddingOption) -> HashTable:
    return HashTable(
        option.embedding_dim,
        initializer=option.initializer,
        admission=option.admission,
        eviction=option.eviction,
        dtype=option.dtype,
        device=option.device,
        seed=option.seed,
        name=name,
        trainable=option.trainable,
    )


def _shape(out: Tensor, bags: Bags, mode: str) -> Any:
    shape = bags.shape
    if mode != "none":  # ids [B, S, L] are B * S bags
        return out if shape is None or len(shape) < 3 else out.view(*shape[:-1], out.shape[1])
    if bags.shape is not None:
        if len(bags.shape) == 1:
            return out
        return out.view(*bags.shape, out.shape[1])
    assert bags.offsets is not None
    if bags.nested:
        return torch.nested.nested_tensor_from_jagged(out, bags.offsets)
    return Jagged(out, bags.offsets)


__all__ = ["EmbeddingEngine", "EmbeddingOption"]
