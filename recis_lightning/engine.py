"""``EmbeddingEngine``: all categorical features of a model, one pass a group."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import SequenceMatcher
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import override

from recis_lightning import compiler
from recis_lightning.admission import Admission
from recis_lightning.arguments import check_bool, refuse_script
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.embedding_option import EmbeddingOption
from recis_lightning.jagged import Bags, FeatureBags, Jagged, read_features, read_keyed_jagged
from recis_lightning.lookup import operator, recording
from recis_lightning.lookup.announcing import announce_refusal
from recis_lightning.lookup.combining import combine
from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature
from recis_lightning.lookup.group import LookupGroup
from recis_lightning.lookup.together import Asked, LookupSteps, run_steps
from recis_lightning.lookup.unique_rows import UniqueRows, deduplicate, offsets_of
from recis_lightning.nested_jagged import NestedJagged, check_outer
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.table_dict import TableDict
from recis_lightning.table.versions import layout_version

# The rest belongs to the table.
_FEATURE_FIELDS = (
    *("table", "mode", "padding_idx", "tile_len", "mean_by", "use_weights"),
    *("trainable", "admission", "combiner", "combiner_width", "pool_at_owner"),
)
_ALIKE = 0.8  # similarity from which a key is taken for a misspelt feature
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

    A batch may lack some of the features, and then their outputs are missing too: they count as
    looked up with no ids. Whatever else it has is passed through unchanged.

    Features whose tables share device, dtype and dim form a group, and a group is one index pass
    and one gather a step, however many features it has and however they pool.

    Combiners that are modules are the engine's, in ``combiners``: their parameters train with it.

    Args:
        options: Feature -> its settings.
        strict: Refuse batches that lack a feature or have something else.
        process_group: Ranks that the tables are sharded over; None means all.
        exchange_dtype: "bfloat16" sends rows and gradients between ranks in half of the bytes.
        ranks_per_node: Ranks that share a node: what they ask other nodes for travels once.

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

    def __init__(
        self,
        options: dict[str, EmbeddingOption],
        *,
        strict: bool = False,
        process_group: ProcessGroup | None = None,
        exchange_dtype: torch.dtype | str | None = None,
        ranks_per_node: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(options, Mapping):
            raise TypeError(
                f"options: expected a dict of EmbeddingOption by feature, got {options!r}"
            )
        if not options:
            raise ValueError("options: expected at least one feature, got none")
        self.options, self.strict = FeatureOptions(options), strict
        for feature, option in self.options.items():
            if not isinstance(feature, str) or not feature:
                raise TypeError(f"options: expected features' names as keys, got {feature!r}")
            if not isinstance(option, EmbeddingOption):
                raise TypeError(f"options[{feature!r}]: expected EmbeddingOption, got {option!r}")
        members = self._features_by_table()
        for name, sharing in members.items():
            for feature in sharing[1:]:
                self._check_same_table(name, sharing[0], feature)
        admissions = {name: self._admission_of(name, part) for name, part in members.items()}
        self.tables: nn.ModuleDict = TableDict()
        for name, sharing in members.items():
            trainable = any(self.options[feature].trainable for feature in sharing)
            option = self.options[sharing[0]]
            self.tables[name] = _make_table(
                *(name, option, admissions[name], trainable),
                *(process_group, exchange_dtype, ranks_per_node),
            )
        self._adopt_tables()
        self._groups, self._grouped = CurrentGroups(), list(self.tables._modules.values())
        self._adopt_outputs()
        combiners = {
            name: option.combiner
            for name, option in self.options.items()
            if isinstance(option.combiner, nn.Module)
        }
        if combiners:
            self.combiners: nn.ModuleDict = TableDict(combiners)
        self._known_keys: set[Any] = set()  # of batches, that are no features and were checked

    def _adopt_outputs(self) -> None:
        """Note the features whose outputs are made from their rows."""
        options = self.options.items()
        self._unique = {name for name, option in options if option.mode == "unique"}
        self._made = self._unique | {
            name for name, option in options if option.combiner is not None
        }

    def _features_by_table(self) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {}
        for feature, option in self.options.items():
            members.setdefault(option.table or feature, []).append(feature)
        return members

    def _admission_of(self, table: str, features: Sequence[str]) -> Admission | None:
        """Return a table's policy: that which the most of its features' ids have to pass."""
        given = [(feature, self.options[feature].admission) for feature in features]
        checked = [(feature, policy) for feature, policy in given if _admits(policy) == "policy"]
        for feature, policy in checked[1:]:
            first, other = checked[0]
            if policy.screening != other.screening:  # type: ignore[union-attr]
                raise ValueError(
                    f"options: features {first!r} and {feature!r} share table {table!r}, which can "
                    f"count for one policy only, but ask for two: {other!r} and {policy!r}"
                )
        inserting = [policy for _, policy in given if _admits(policy) == "all"]
        return (checked[0][1:] if checked else [*inserting, given[0][1]])[0]

    def _adopt_tables(self) -> None:
        """Name tables that have no name, and give all one lock, which a lookup takes once."""
        first: HashTable | None = None
        for name, table in self.tables.items():
            if isinstance(table, HashTable):  # a lookup raises for what is none
                first = table if first is None else first
                if table.lock is not first.lock:
                    table.share_lock(first.lock)
                    layout_version.advance()  # for whoever knows the one before
                table.set_default_name(name)

    def _check_same_table(self, table: str, first: str, second: str) -> None:
        one, two = self.options[first], self.options[second]
        for field in fields(EmbeddingOption):
            if field.name in _FEATURE_FIELDS:
                continue
            mine, other = getattr(one, field.name), getattr(two, field.name)
            if field.name == "dtype":
                mine, other = (str(dtype).removeprefix("torch.") for dtype in (mine, other))
            if mine != other:
                raise ValueError(
                    f"options: features {first!r} and {second!r} share table {table!r} but "
                    f"disagree on {field.name}: {mine!r} and {other!r}"
                )

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Look features up.

        Args:
            features: Feature -> int64 or int32 [B] or [B, L], a dense pair ``(ids, weights)``, a
                torch jagged NestedTensor [B, j], ``Jagged`` or ``NestedJagged``; or TorchRec's
                ``KeyedJaggedTensor``. A key that is no feature may hold anything.

        Returns:
            Feature -> [B, dim] for "sum" and "mean", [B, tile_len * dim] for "tile"; [B, S, ...] of
            ids [B, S, L], and of a ``NestedJagged``, whose bags are pooled, a ``Jagged`` of B
            sequences; for "none" [*ids.shape, dim], and a ragged feature in its own layout; for
            "unique" a ``UniqueRows``; [B, ...] of a combiner, or [B, S, ...]. Behind them, as it
            came, whatever is no feature.

        Raises:
            ValueError: The engine is strict, and a feature is missing or unknown (names it).
            TypeError: A feature is of no kind named above (names it).
        """
        if not self.training and torch.compiler.is_compiling():
            if self._is_recordable(features):
                return self._record(features)
            if recording.is_exporting():
                recording.refuse(features, self.options, self._makers())
        return self._look_up(features)

    @compiler.disable  # kernels read and change memory
    def _look_up(self, features: dict[str, Any]) -> dict[str, Any]:
        return run_steps(self.lookup_steps(features), self)

    def lookup_steps(self, features: dict[str, Any]) -> LookupSteps[dict[str, Any]]:
        """Look up what ``forward`` is given, for ``look_up_together``."""
        given = _by_name(features)
        is_whole = given.keys() == self.options.keys()
        if not is_whole:
            self._check_keys(given)
        outer: dict[str, Tensor] = {}
        if NestedJagged in set(map(type, given.values())):
            given, outer = self._without_outer(given)
        groups = self.current_groups()
        bags = [_read(given, group, is_whole) for group in groups]
        asked, inverses = bags, [dict[int, Tensor]()] * len(bags)
        if self._unique:
            asked, inverses = map(list, zip(*map(self._deduplicate, groups, bags), strict=True))
        outputs = yield Asked(groups, asked)
        if is_whole and len(groups) == 1 and not (bags[0].details or self._made):
            return dict(zip(groups[0].layout.names, outputs[0], strict=True))
        embeddings: dict[str, Any] = dict.fromkeys(self.options)
        for group, parts, rows, inverse in zip(groups, bags, outputs, inverses, strict=True):
            names = group.layout.names
            embeddings.update(zip(names, rows, strict=True))
            for name, bag in zip(names, parts.details, strict=False):  # none if all are plain
                if name not in self._made:
                    mode = self.options[name].mode
                    embeddings[name] = _shape(embeddings[name], bag, mode)
            for number, name in enumerate(names if self._made else ()):
                if name in self._made and name in given:
                    args = (name, rows[number], parts[number], inverse.get(number))
                    embeddings[name] = self._make_output(*args)
        for name, offsets in outer.items():
            embeddings[name] = _nested(embeddings[name], offsets)
        if is_whole:
            return embeddings
        found = {name: rows for name, rows in embeddings.items() if name in given}
        return found | {key: features[key] for key in given if key not in self.options}

    def _deduplicate(
        self, group: LookupGroup, bags: FeatureBags
    ) -> tuple[FeatureBags, dict[int, Tensor]]:
        names = group.layout.names
        unique = [number for number, name in enumerate(names) if name in self._unique]
        return deduplicate(bags, unique, names) if unique else (bags, {})

    def _make_output(self, name: str, rows: Tensor, bags: Bags, inverse: Tensor | None) -> Any:
        """Return the output of a feature with a combiner, or with mode "unique"."""
        if inverse is not None:
            shape = inverse.shape if bags.shape is None else bags.shape
            return UniqueRows(rows, inverse.view(shape), offsets_of(bags))
        option: Any = self.options[name]
        is_own = isinstance(option.combiner, nn.Module)
        combiner: Any = self.combiners[name] if is_own else option.combiner
        return combine(combiner, rows, bags, name, option.combiner_width)

    def _without_outer(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return features of two levels as their inner bags, and the offsets of the outer level."""
        outer = {
            name: check_outer(feature, name)
            for name, feature in given.items()
            if isinstance(feature, NestedJagged) and name in self.options
        }
        return {**given, **{name: given[name].inner() for name in outer}}, outer

    @property
    def widths(self) -> dict[str, int]:
        """Columns that each feature has in ``concat``, in order.

        Raises:
            ValueError: A feature has no width that is known (names it).
        """
        widths = {}
        for name, option in self.options.items():
            try:
                widths[name] = option.width
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return widths

    def concat(self, features: dict[str, Any]) -> Tensor:
        """Look all features up into one tensor, side by side in the order of the options.

        Values, gradients and updates are those of ``torch.cat`` over the outputs of ``forward``,
        to the bit. But each row is written where it belongs, and the gradient is read where it
        lies: nothing is copied, and nothing is made for each feature. (Tables of several dtypes or
        devices give a tensor each, which are then joined.)

        Args:
            features: As for ``forward``, and every feature is there, each with B samples: ids [B]
                or [B, L], or ragged. Mode "none" takes one id a sample, [B] or [B, 1]. Keys that
                are no features are left alone.

        Returns:
            [B, sum of widths], in the tables' dtype.

        Raises:
            ValueError: A feature is missing, has another number of samples, or does not give one
                row a sample (names it).
            TypeError: As ``forward``.

        Example:
            >>> engine = EmbeddingEngine({
            ...     "user": EmbeddingOption(4), "tags": EmbeddingOption(2, mode="sum"),
            ... })
            >>> tags = torch.tensor([[3, 5], [4, 4]])
            >>> out = engine.concat({"user": torch.tensor([1, 2]), "tags": tags})
            >>> out.shape, engine.widths
            (torch.Size([2, 6]), {'user': 4, 'tags': 2})
            >>> user, tags = out.split([*engine.widths.values()], 1)
        """
        if not self.training and torch.compiler.is_compiling():
            if self._is_recordable(features):
                return self._record_joined(features)
            if recording.is_exporting():
                recording.refuse(features, self.options, self._makers())
        return self._look_up_joined(features)

    @compiler.disable  # kernels read and change memory
    def _look_up_joined(self, features: dict[str, Any]) -> Tensor:
        try:
            given = self._check_joined(features)
            groups = self.current_groups()
            bags = [_read(given, group, is_whole=True) for group in groups]
            joined = self._groups.joined(self.options)
            num_samples = joined.num_samples(bags, self._made)
        except Exception as error:
            announce_refusal(error, [self])
            raise
        if self._made:
            return self._join(self._look_up({name: given[name] for name in self.options}))
        return joined.look_up(bags, num_samples, self.training)

    def _check_joined(self, features: dict[str, Any]) -> Mapping[str, Any]:
        """Return what ``concat`` is given, by feature; raise if it does not fit."""
        given = _by_name(features)
        if given.keys() != self.options.keys():
            missing = sorted(name for name in self.options if name not in given)
            unknown = [key for key in given if key not in self.options]
            if missing or self.strict:
                raise ValueError(
                    f"features: concat needs every feature of the engine; missing {missing}, "
                    f"unknown {sorted(unknown, key=str)}"
                )
        if self._made:
            _ = self.widths  # known for all, or an error before anything changes
        return given

    def _is_recordable(self, features: Any) -> bool:
        """Return whether a recorded program takes the batch, as far as it has features."""
        return (
            isinstance(features, dict)
            and not self._made
            and not (self.strict and features.keys() != self.options.keys())
            and any(name in features for name in self.options)
            and all(
                recording.is_recordable(features[name]) for name in self.options if name in features
            )
        )

    def _makers(self) -> dict[str, str]:
        """Return what makes the output of the features where something does."""
        return {
            name: "mode 'unique'" if name in self._unique else "a combiner"
            for name in self.options
            if name in self._made
        }

    def _record(self, features: dict[str, Any]) -> dict[str, Any]:
        """Look the features that a batch has up by the operator of recorded programs."""
        names = [name for name in self.options if name in features]
        recorded = [self._record_feature(name, features[name]) for name in names]
        outputs = operator.record([feature for feature, _ in recorded])
        found: dict[str, Any] = {}
        for name, (_, shape), rows in zip(names, recorded, outputs, strict=True):
            found[name] = recording.shaped(rows, features[name], shape, self.options[name].mode)
        return found | {key: features[key] for key in features if key not in self.options}

    def _record_feature(self, name: str, feature: Any) -> Any:
        option = self.options[name]
        mode = "mean_by_count" if option.mean_by == "count" else option.mode
        table: Any = self.tables[option.table or name]
        return recording.read(
            *(feature, name, table, mode, option.padding_idx),
            *(option.tile_len or 0, option.use_weights),
        )

    def _record_joined(self, features: dict[str, Any]) -> Tensor:
        """Join what ``_record`` returns."""
        missing = [name for name in self.options if name not in features]
        if missing:
            raise ValueError(f"features: concat needs every feature of the engine; {missing=}")
        return self._join(self._record(features))

    def _join(self, found: dict[str, Any]) -> Tensor:
        """Return outputs side by side."""
        parts: list[Tensor] = []
        for name in self.options:
            rows = found[name]
            if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.is_nested:
                is_single = isinstance(rows, Tensor) and rows.dim() == 3 and rows.shape[1] == 1
                if not is_single or self.options[name].mode != "none" or rows.is_nested:
                    raise ValueError(f"{name}: concat needs one row a sample")
                rows = rows.squeeze(1)
            parts.append(rows)
        return torch.cat(parts, 1)

    def _check_keys(self, given: Mapping[str, Any]) -> None:
        """Raise if the engine is strict; warn once of a key that looks like a missing feature."""
        missing = [name for name in self.options if name not in given]
        unknown = [key for key in given if key not in self.options]
        if self.strict:
            raise ValueError(f"features: missing {sorted(missing)}, unknown {sorted(unknown)}")
        if not missing:
            return
        for key in unknown:
            if key in self._known_keys:
                continue
            self._known_keys.add(key)
            for name in missing:
                if _looks_like(key, name):
                    warnings.warn(
                        f"features: {key!r} is no feature of this engine and is passed through; "
                        f"was {name!r} meant, which is missing?",
                        stacklevel=3,
                    )

    def current_groups(self) -> list[LookupGroup]:
        """Return the groups of the features, as their tables are now."""
        tables = list(self._modules["tables"]._modules.values())  # type: ignore[union-attr]
        if tables != self._grouped:  # somebody put another one in
            self._adopt_tables()
            self._groups, self._grouped = CurrentGroups(), tables
        return self._groups.of(self._features)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "options" and "_groups" in self.__dict__:
            raise AttributeError(f"options: {_FIXED}")
        if name == "strict":
            check_bool(name, value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks for this."""
        refuse_script("EmbeddingEngine")

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        added = {"strict": False, "_known_keys": set()}  # to what 0.1.0 pickled
        made = {"options": FeatureOptions(state["options"]), "_groups": CurrentGroups()}
        super().__setstate__({**added, **state, **made, "_grouped": []})  # type: ignore[no-untyped-call]
        self._adopt_outputs()
        self._adopt_tables()

    def _table(self, feature: str) -> HashTable:
        option = self.options[feature]
        name = option.table or feature
        table = self.tables[name] if name in self.tables else None  # noqa: SIM401 - not a dict
        if not isinstance(table, HashTable) or table.embedding_dim != option.embedding_dim:
            raise TypeError(
                f"tables[{name!r}]: feature {feature!r} needs a HashTable of "
                f"embedding_dim={option.embedding_dim}, got {table!r}"
            )
        return table

    def _features(self) -> Iterator[Feature]:
        features: dict[str, Feature] = {}
        for name, sharing in self._features_by_table().items():
            table = self._table(sharing[0])
            default = _admits(self._admission_of(name, sharing))
            any_trains = any(self.options[feature].trainable for feature in sharing)
            for feature in sharing:
                option = self.options[feature]
                admits = _admits(option.admission)
                mode = "none" if option.mode == "unique" else option.mode
                features[feature] = Feature(
                    feature,
                    table,
                    "mean_by_count" if option.mean_by == "count" else mode,
                    option.padding_idx,
                    option.tile_len or 0,
                    # Where all features agree the table decides, and may be changed later.
                    trainable=option.trainable or not any_trains,
                    admits="policy" if admits == default else admits,
                    use_weights=option.use_weights,
                    pool_at_owner=option.pool_at_owner,
                )
        return iter([features[name] for name in self.options])


def _admits(policy: Admission | None) -> Literal["policy", "all", "none"]:
    """Return which unknown ids a policy admits; "policy" if it checks each."""
    if policy is None:
        return "all"
    if not policy.admits:
        return "none"
    return "all" if policy.screening is None else "policy"


def _by_name(features: Any) -> Mapping[str, Any]:
    """Return features as a mapping, whatever they came as."""
    if type(features) is dict or isinstance(features, Mapping):
        return features
    if not all(hasattr(features, name) for name in ("keys", "values", "lengths")):
        raise TypeError(
            f"features: expected a dict or KeyedJaggedTensor, got {type(features).__name__}"
        )
    return read_keyed_jagged(features)


def _looks_like(key: Any, name: str) -> bool:
    """Return whether a key may be meant as a feature; numbered ones are others on purpose."""
    if not isinstance(key, str):
        return False
    one, two = (re.sub(r"[\W_]", "", text.casefold()) for text in (key, name))
    if one == two:
        return True
    if re.sub(r"\d", "", one) == re.sub(r"\d", "", two):
        return False
    return SequenceMatcher(a=one, b=two).ratio() >= _ALIKE


def _read(given: Mapping[str, Any], group: LookupGroup, is_whole: bool) -> FeatureBags:
    """Read the features of a group; those that are missing have no ids."""
    layout = group.layout
    names = layout.names if is_whole else [name for name in layout.names if name in given]
    bags = read_features(given, names)
    if len(names) < len(layout.names):
        device = bags.ids[0].device if names else layout.device
        no_ids = torch.empty(0, dtype=torch.int64, device=device)
        nothing = Bags(no_ids, 0, 1, None, None, (0,))
        found = dict(zip(names, bags, strict=True))
        bags = FeatureBags.of([found.get(name, nothing) for name in layout.names])
    if layout.unweighted and bags.details:
        details = list(bags.details)
        for feature in layout.unweighted:
            details[feature] = details[feature]._replace(weights=None)
        bags = FeatureBags(bags.ids, details)
    return bags


def _make_table(
    name: str,
    option: EmbeddingOption,
    admission: Admission | None,
    trainable: bool,
    process_group: ProcessGroup | None,
    exchange_dtype: torch.dtype | str | None,
    ranks_per_node: int | None,
) -> HashTable:
    return HashTable(
        option.embedding_dim,
        initializer=option.initializer,
        admission=admission,
        eviction=option.eviction,
        dtype=option.dtype,
        device=option.device,
        seed=option.seed,
        name=name,
        trainable=trainable,
        process_group=process_group,
        exchange_dtype=exchange_dtype,
        ranks_per_node=ranks_per_node,
        rows=option.rows,
    )


def _nested(rows: Any, outer_offsets: Tensor) -> Any:
    """Return the rows of inner bags, or one row for each, as those of samples."""
    if isinstance(rows, Jagged):
        return NestedJagged(rows.values, rows.offsets, outer_offsets)
    return Jagged(rows, outer_offsets)


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
