"""``nn.Embedding`` and ``nn.EmbeddingBag`` without ``num_embeddings``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from recis_lightning import compiler
from recis_lightning.admission import Admission
from recis_lightning.arguments import (
    HINTS,
    check_bool,
    check_ids,
    check_padding_idx,
    explain_arguments,
    refuse_script,
    refuse_symbols,
)
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.eviction import Eviction
from recis_lightning.initializers import DEFAULT_INITIALIZER, Initializer
from recis_lightning.jagged import Bags, FeatureBags, Jagged, read_bags, read_jagged
from recis_lightning.lookup import operator, recording
from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature
from recis_lightning.lookup.group import LookupGroup
from recis_lightning.lookup.together import Asked, LookupSteps, run_steps
from recis_lightning.lookup.unique_rows import UniqueRows, deduplicate, offsets_of
from recis_lightning.nested_jagged import NestedJagged, check_outer
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import name_before_use

_BAG_MODES = ("sum", "mean")
_UNSUPPORTED = ("max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_HINTS = {**HINTS, "shared_name": "write name=", "combiner": "bags pool: use DynamicEmbeddingBag"}
_BAG_HINTS = {name: hint for name, hint in _HINTS.items() if name not in _UNSUPPORTED}
_SETTINGS = ("table", "mode", "padding_idx")  # may be changed: the next lookup goes by them


@explain_arguments(_HINTS)
class DynamicEmbedding(nn.Module):
    """An embedding of any int64 id: rows appear on first use.

    Mirrors ``torch.nn.Embedding`` without ``num_embeddings``. In training mode an unknown id gets
    a row; in evaluation mode nothing changes, unknown ids read as zeros and no gradient flows.

    Args:
        embedding_dim: Size of each vector.
        initializer: Distribution of new rows; ``Normal(std=0.01)`` by default.
        admission: Policy that says which unknown ids get a row; None admits all.
        eviction: Policy that says which rows the table evicts; None evicts none.
        padding_idx: An id that reads as zeros, gets no row and no gradient.
        dtype: torch.float32 or torch.bfloat16.
        device: Where the table lives.
        seed: With ``name`` and the id, what a new row's values depend on; None takes torch's
            initial seed, as ``seed_everything`` sets it.
        name: For logs and checkpoints.
        trainable: Whether rows get gradients; ``requires_grad_`` and freezing change it.
        process_group: Ranks that the table is sharded over; None means all.
        exchange_dtype: "bfloat16" sends rows and gradients between ranks in half of the bytes.
        ranks_per_node: Ranks that share a node: what they ask other nodes for travels once.
        rows: "file:/folder" lets the table grow beyond memory, as ``HashTable`` says.
        mode: "none", a row for each id, or "unique": ``forward`` returns ``UniqueRows``, a row for
            each distinct id and where it stands, so that long sequences repeat no rows.

    Example:
        >>> user = DynamicEmbedding(16, name="user")
        >>> user(torch.tensor([[3, -5], [2**62, 3]])).shape
        torch.Size([2, 2, 16])
        >>> len(user.table)
        3
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        initializer: Initializer = DEFAULT_INITIALIZER,
        admission: Admission | None = None,
        eviction: Eviction | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = 0,
        name: str | None = None,
        trainable: bool = True,
        process_group: ProcessGroup | None = None,
        exchange_dtype: torch.dtype | str | None = None,
        ranks_per_node: int | None = None,
        rows: str | None = None,
        mode: Literal["none", "unique"] = "none",
    ) -> None:
        super().__init__()
        self._groups = CurrentGroups()
        self.table = _make_table(
            *(embedding_dim, initializer, admission, eviction, dtype, device, seed, name),
            *(trainable, process_group, exchange_dtype, ranks_per_node, rows),
        )
        self.mode = mode
        self.padding_idx = padding_idx

    @property
    def embedding_dim(self) -> int:
        """Weights in a row."""
        return self.table.embedding_dim

    def current_groups(self) -> list[LookupGroup]:
        """Return the group of the one feature, as its table is now."""
        return self._groups.of(lambda: [Feature("ids", self.table, "none", self.padding_idx)])

    def forward(self, ids: Tensor) -> Tensor | UniqueRows:
        """Look ids up.

        Args:
            ids: int64 or int32 [*].

        Returns:
            [*, embedding_dim] in the table's dtype; for mode "unique" a ``UniqueRows``.

        Raises:
            TypeError: ``ids`` is neither.
        """
        if not self.training and torch.compiler.is_compiling():
            if self.mode == "none":
                return _record(self, ids)
            if recording.is_exporting():
                recording.refuse_output("ids", f"mode {self.mode!r}")
        return self._look_up(ids)

    @compiler.disable  # kernels read and change memory
    def _look_up(self, ids: Tensor) -> Tensor | UniqueRows:
        return run_steps(self.lookup_steps(ids), self)

    def lookup_steps(self, ids: Tensor) -> LookupSteps[Tensor | UniqueRows]:
        """Look up what ``forward`` is given, for ``look_up_together``."""
        flat = check_ids(ids).reshape(-1).contiguous()
        if self.training:
            name_before_use(self.table)
        if self.mode == "unique":
            return (yield from self._unique_steps(ids))
        ((rows,),) = yield Asked(self.current_groups(), [FeatureBags([flat])])
        return rows.view(*ids.shape, self.embedding_dim)

    def _unique_steps(self, ids: Tensor) -> LookupSteps[UniqueRows]:
        bags = read_bags(ids, "ids")
        asked, inverses = deduplicate(FeatureBags.of([bags]), [0], ["ids"])
        ((rows,),) = yield Asked(self.current_groups(), [asked])
        return UniqueRows(rows, inverses[0].view(ids.shape), offsets_of(bags))

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_groups": CurrentGroups()})  # type: ignore[no-untyped-call]

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode" and value not in ("none", "unique"):
            raise ValueError(
                f"mode: expected 'none' or 'unique', got {value!r}; DynamicEmbeddingBag pools"
            )
        _check_setting(name, value)
        super().__setattr__(name, value)
        if name in _SETTINGS:
            self._groups = CurrentGroups()

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks for this."""
        refuse_script("DynamicEmbedding")

    @override
    def extra_repr(self) -> str:
        return _describe(self.embedding_dim, self.padding_idx)


@explain_arguments({**_BAG_HINTS, "combiner": "write mode="})
class DynamicEmbeddingBag(nn.Module):
    """Sums or means of bags of any int64 ids.

    Mirrors ``torch.nn.EmbeddingBag``: 2-D ids are bags of one length, 1-D ids need ``offsets``;
    an empty bag gives zeros. Arguments are those of ``DynamicEmbedding`` and ``mode``.

    Args:
        embedding_dim: Size of each vector.
        mode: "sum" or "mean".
        initializer: As for ``DynamicEmbedding``, like all that follow.
        admission: Policy that says which unknown ids get a row.
        eviction: Policy that says which rows the table evicts.
        padding_idx: An id that adds nothing; "mean" does not count it.
        dtype: torch.float32 or torch.bfloat16.
        device: Where the table lives.
        seed: With ``name`` and the id, what a new row's values depend on; None takes torch's
            initial seed, as ``seed_everything`` sets it.
        name: For logs and checkpoints.
        trainable: Whether rows get gradients; ``requires_grad_`` and freezing change it.
        process_group: Ranks that the table is sharded over; None means all.
        exchange_dtype: "bfloat16" sends rows and gradients between ranks in half of the bytes.
        ranks_per_node: Ranks that share a node: what they ask other nodes for travels once.
        rows: "file:/folder" lets the table grow beyond memory, as ``HashTable`` says.
        include_last_offset: ``offsets`` ends with the number of ids.
        pool_at_owner: On several ranks, have each add up the rows that it owns of a bag: for long
            bags, fewer bytes than a row for each id. Takes no weights.

    Example:
        >>> tags = DynamicEmbeddingBag(8, mode="sum", name="tags")
        >>> tags(torch.tensor([4, 9, 4]), torch.tensor([0, 2])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        mode: str = "mean",
        initializer: Initializer = DEFAULT_INITIALIZER,
        admission: Admission | None = None,
        eviction: Eviction | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = 0,
        name: str | None = None,
        trainable: bool = True,
        process_group: ProcessGroup | None = None,
        exchange_dtype: torch.dtype | str | None = None,
        ranks_per_node: int | None = None,
        rows: str | None = None,
        include_last_offset: bool = False,
        pool_at_owner: bool = False,
        **unsupported: Any,
    ) -> None:
        _check_bag_mode(mode)
        for argument, value in unsupported.items():
            if argument in _UNSUPPORTED:
                raise ValueError(
                    f"{argument}: does not exist here, got {value!r}; rows are always updated "
                    "sparsely, and are not renormalised in a lookup"
                )
            raise TypeError(f"DynamicEmbeddingBag got an unexpected argument {argument!r}")
        super().__init__()
        self._groups = CurrentGroups()
        self.table = _make_table(
            *(embedding_dim, initializer, admission, eviction, dtype, device, seed, name),
            *(trainable, process_group, exchange_dtype, ranks_per_node, rows),
        )
        self.mode = mode
        self.padding_idx = padding_idx
        self.include_last_offset = include_last_offset
        self.pool_at_owner = check_bool("pool_at_owner", pool_at_owner)

    @property
    def embedding_dim(self) -> int:
        """Weights in a row."""
        return self.table.embedding_dim

    def current_groups(self) -> list[LookupGroup]:
        """Return the group of the one feature, as its table is now."""
        return self._groups.of(lambda: [self._feature()])

    def _feature(self) -> Feature:
        pools = self.__dict__.get("pool_at_owner", False)  # older pickles have none
        return Feature("ids", self.table, self.mode, self.padding_idx, pool_at_owner=pools)

    def forward(
        self,
        ids: Tensor | Jagged | NestedJagged,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor | Jagged:
        """Look bags up and pool them.

        Args:
            ids: int64 or int32 [B, L] (bags of length L) or [N] with ``offsets``; also a jagged
                NestedTensor [B, j], a ``Jagged`` or a ``NestedJagged``.
            offsets: int64 [B], where each bag starts in 1-D ids (with ``include_last_offset``
                [B + 1], ending with N).
            per_sample_weights: [N] or [B, L], only with mode "sum", as in torch.

        Returns:
            [B, embedding_dim] in the table's dtype; of a ``NestedJagged``, whose inner bags are
            pooled, a ``Jagged`` of B sequences of vectors.

        Raises:
            TypeError, ValueError: Shapes or dtypes do not fit.
        """
        if not self.training and torch.compiler.is_compiling():
            feature = _recordable_bags(self, ids, offsets, per_sample_weights)
            if recording.is_recordable(feature):
                return _record(self, feature)
        return self._look_up(ids, offsets, per_sample_weights)

    @compiler.disable  # kernels read and change memory
    def _look_up(
        self,
        ids: Tensor | Jagged | NestedJagged,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
    ) -> Tensor | Jagged:
        return run_steps(self.lookup_steps(ids, offsets, per_sample_weights), self)

    def lookup_steps(
        self,
        ids: Tensor | Jagged | NestedJagged,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> LookupSteps[Tensor | Jagged]:
        """Look up what ``forward`` is given, for ``look_up_together``."""
        if isinstance(ids, NestedJagged):
            outer = check_outer(ids, "ids")
            pooled = yield from self.lookup_steps(ids.inner(), offsets, per_sample_weights)
            assert isinstance(pooled, Tensor)
            return Jagged(pooled, outer)
        refuse_symbols("ids", ids)
        bags = self._read(ids, offsets, per_sample_weights)
        if self.training:
            name_before_use(self.table)
        ((rows,),) = yield Asked(self.current_groups(), [FeatureBags.of([bags])])
        return rows

    def _read(
        self, ids: Tensor | Jagged, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> Bags:
        """Return the bags that ``forward`` is given."""
        if per_sample_weights is not None and self.mode != "sum":
            raise ValueError(
                f"per_sample_weights: only mode 'sum' takes them, this is mode {self.mode!r}"
            )
        if isinstance(ids, Jagged) or (isinstance(ids, Tensor) and ids.is_nested):
            if offsets is not None or per_sample_weights is not None:
                raise ValueError("offsets, per_sample_weights: expected None for ragged ids")
            return read_bags(ids, "ids")
        ids = check_ids(ids)
        if ids.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets: expected None for 2-D ids, whose rows are the bags")
            feature = ids if per_sample_weights is None else (ids, per_sample_weights)
            return read_bags(feature, "ids")
        if ids.dim() != 1:
            raise ValueError(f"ids: expected shape [N] or [B, L], got {tuple(ids.shape)}")
        if offsets is None:
            raise ValueError("offsets: 1-D ids need them, got None")
        offsets = check_ids(offsets, "offsets")
        is_padded = not self.include_last_offset
        if is_padded:
            # Not torch.cat: a tensor of one number from the host would wait for a GPU.
            offsets = torch.nn.functional.pad(offsets, (0, 1), value=ids.numel())
        jagged = Jagged(ids, offsets, per_sample_weights)
        return read_jagged(jagged, "ids", owns_offsets=is_padded)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_groups": CurrentGroups()})  # type: ignore[no-untyped-call]

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode":
            _check_bag_mode(value)
        elif name == "include_last_offset":
            check_bool(name, value)
        _check_setting(name, value)
        super().__setattr__(name, value)
        if name in _SETTINGS:
            self._groups = CurrentGroups()

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks for this."""
        refuse_script("DynamicEmbeddingBag")

    @override
    def extra_repr(self) -> str:
        return f"{_describe(self.embedding_dim, self.padding_idx)}, mode={self.mode!r}"


def _check_bag_mode(mode: str) -> None:
    if mode not in _BAG_MODES:
        hint = "; 'max' does not exist here" if mode == "max" else ""
        raise ValueError(f"mode: expected one of {_BAG_MODES}, got {mode!r}{hint}")


def _check_setting(name: str, value: Any) -> None:
    """Raise unless an attribute that lookups go by may have a value."""
    if name == "padding_idx":
        check_padding_idx(value)
    elif name == "table" and not isinstance(value, HashTable):
        raise TypeError(f"table: expected a HashTable, got {type(value).__name__}")


def _make_table(
    embedding_dim: int,
    initializer: Initializer,
    admission: Admission | None,
    eviction: Eviction | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
    seed: int | None,
    name: str | None,
    trainable: bool,
    process_group: ProcessGroup | None,
    exchange_dtype: torch.dtype | str | None,
    ranks_per_node: int | None,
    rows: str | None,
) -> HashTable:
    return HashTable(
        embedding_dim,
        initializer=initializer,
        admission=admission,
        eviction=eviction,
        dtype=dtype,
        device=device,
        seed=seed,
        name=name,
        trainable=trainable,
        process_group=process_group,
        exchange_dtype=exchange_dtype,
        ranks_per_node=ranks_per_node,
        rows=rows,
    )


def _record(module: DynamicEmbedding | DynamicEmbeddingBag, feature: Any) -> Tensor:
    """Look one feature up by the operator of recorded programs."""
    recorded, shape = recording.read(feature, "ids", module.table, module.mode, module.padding_idx)
    (rows,) = operator.record([recorded])
    shaped: Tensor = recording.shaped(rows, feature, shape, module.mode)
    return shaped


def _recordable_bags(
    module: DynamicEmbeddingBag,
    ids: Tensor | Jagged | NestedJagged,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
) -> Any:
    """Return a bag's arguments as a feature; None if it is not for a recorded program."""
    if per_sample_weights is not None and module.mode != "sum":
        return None  # refused outside
    if isinstance(ids, Jagged):
        return ids if offsets is None and per_sample_weights is None else None
    if not isinstance(ids, Tensor) or ids.is_nested:
        return None
    if ids.dim() == 2 and offsets is None:
        return ids if per_sample_weights is None else (ids, per_sample_weights)
    if ids.dim() != 1 or offsets is None:
        return None
    if not module.include_last_offset:
        # Not pad: its value would be a constant of the program.
        offsets = torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])
    return Jagged(ids, offsets, per_sample_weights)


def _describe(embedding_dim: int, padding_idx: int | None) -> str:
    padding = "" if padding_idx is None else f", padding_idx={padding_idx}"
    return f"{embedding_dim}{padding}"


__all__ = ["DynamicEmbedding", "DynamicEmbeddingBag"]
