"""Ragged features, and readers of the layouts that lookups accept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree

from recis_lightning.arguments import (
    check_ids,
    check_int,
    check_not_traced,
    check_strided,
    is_plain_cpu,
    refuse_symbols,
)


class Jagged(NamedTuple):
    """Ragged values: bag b holds ``values[offsets[b]:offsets[b + 1]]``.

    A plain tuple of tensors: it passes through DataLoader workers and Lightning's device moves.

    Attributes:
        values: [N, ...].
        offsets: int64 [B + 1], from 0 to N.
        weights: float32 [N], or None.

    Example:
        >>> Jagged(torch.tensor([4, 5, 6]), torch.tensor([0, 2, 2, 3])).num_bags
        3
    """

    values: Tensor
    offsets: Tensor
    weights: Tensor | None = None

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Jagged:
        """Make one of the number of values of each bag.

        Args:
            values: [N, ...].
            lengths: int64 or int32 [B], none negative; they add up to N.
            weights: float32 [N], or None.

        Raises:
            TypeError: ``lengths`` has another dtype, or ``values`` is no tensor of bags' values.
            ValueError: ``lengths`` or ``weights`` has another shape or, where the host can see them
                without waiting for a device, ``lengths`` has values that do not fit.

        Example:
            >>> Jagged.from_lengths(torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1])).offsets
            tensor([0, 2, 2, 3])
        """
        lengths = check_ids(lengths, "lengths")
        if lengths.dim() != 1:
            raise ValueError(f"lengths: expected shape [B], got {tuple(lengths.shape)}")
        if not isinstance(values, Tensor) or not values.dim():
            got = "shape []" if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values: expected a Tensor [N, ...], got {got}")
        if weights is not None and weights.shape[:1] != values.shape[:1]:
            raise ValueError(
                f"weights: expected shape [{len(values)}], one for each value, got "
                f"{list(weights.shape)}"
            )
        if lengths.device.type == "cpu":
            least = int(lengths.min()) if lengths.numel() else 0
            if least < 0 or int(lengths.sum()) != values.shape[0]:
                raise ValueError(
                    f"lengths: expected none negative and a sum of {values.shape[0]}, the number "
                    f"of values, got a least of {least} and a sum of {int(lengths.sum())}"
                )
        return cls(values, _offsets_of(lengths), weights)

    @property
    def num_bags(self) -> int:
        """Number of bags, B."""
        return self.offsets.numel() - 1

    def lengths(self) -> Tensor:
        """Return the number of values of each bag, int64 [B].

        Example:
            >>> Jagged(torch.tensor([4, 5, 6]), torch.tensor([0, 2, 2, 3])).lengths()
            tensor([2, 0, 1])
        """
        return self.offsets.diff()

    def select(self, samples: Tensor | slice) -> Jagged:
        """Return the bags of some samples, in their order.

        An index such as ``jagged[0]`` is that of the tuple, ``values``.

        Args:
            samples: A slice with a step of 1, or int64 [n] in [0, B), repeats allowed, or bool [B].

        Raises:
            TypeError: ``samples`` is neither.
            ValueError: The slice has another step, or the tensor another shape; or, where the host
                can see them without waiting for a device, a number is out of range, or ``offsets``
                do not fit ``values``.

        Example:
            >>> bags = Jagged(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 1, 3]))
            >>> bags.select(torch.tensor([2, 0]))[:2]
            (tensor([8, 9, 7]), tensor([0, 2, 3]))
            >>> bags.select(slice(1, 3))[:2]
            (tensor([8, 9]), tensor([0, 0, 2]))
        """
        self._check_offsets()
        if isinstance(samples, slice):
            start, stop, step = samples.indices(self.num_bags)
            if step != 1:
                raise ValueError(f"samples: expected a slice with a step of 1, got {samples}")
            offsets = self.offsets[start : max(start, stop) + 1]
            ends = slice(int(offsets[0]), int(offsets[-1]))
            return self._with(self.values[ends], offsets - offsets[0], ends)
        if not isinstance(samples, Tensor):
            raise TypeError(f"samples: expected a Tensor or a slice, got {type(samples).__name__}")
        if samples.dtype is torch.bool:
            if samples.shape != (self.num_bags,):
                raise ValueError(
                    f"samples: expected a mask of shape {(self.num_bags,)}, one value a bag, got "
                    f"{tuple(samples.shape)}"
                )
            samples = samples.nonzero().squeeze(1)
        samples = check_ids(samples, "samples")
        if samples.dim() != 1:
            raise ValueError(f"samples: expected shape [n], got {tuple(samples.shape)}")
        if is_plain_cpu(samples) and samples.numel():
            # Offsets have one more: a negative number would take another bag's length.
            least, most = int(samples.min()), int(samples.max())
            if least < 0 or most >= self.num_bags:
                raise ValueError(
                    f"samples: expected numbers in [0, {self.num_bags}), got "
                    f"{least if least < 0 else most}"
                )
        starts, lengths = self.offsets[samples], self.lengths()[samples]
        offsets = _offsets_of(lengths)
        index = torch.arange(int(offsets[-1]), device=offsets.device)
        index += (starts - offsets[:-1]).repeat_interleave(lengths, output_size=index.numel())
        return self._with(self.values[index], offsets, index)

    def _with(self, values: Tensor, offsets: Tensor, where: Tensor | slice) -> Jagged:
        return Jagged(values, offsets, None if self.weights is None else self.weights[where])

    def to_padded(self, max_len: int | None = None, value: float = 0) -> tuple[Tensor, Tensor]:
        """Return the values as a dense tensor, and which of its places hold one.

        Args:
            max_len: Length L of a row; a longer bag keeps its first L values. None takes the
                longest bag's, for which the host waits for the device.
            value: Fills the other places.

        Returns:
            Values [B, L, ...] and bool [B, L].

        Raises:
            TypeError, ValueError: ``max_len`` is not None or an int of at least 0, or ``offsets``
                do not fit ``values``, where the host can see them without waiting for a device.

        Example:
            >>> bags = Jagged(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 1, 3]))
            >>> values, mask = bags.to_padded(value=-1)
            >>> values.tolist(), mask.tolist()
            ([[7, -1], [-1, -1], [8, 9]], [[True, False], [False, False], [True, True]])
        """
        self._check_offsets()
        lengths = self.lengths()
        if max_len is None:
            max_len = int(lengths.max()) if lengths.numel() else 0
        check_int("max_len", max_len, least=0, alternative=" or None")
        place = torch.arange(max_len, device=lengths.device)
        mask = place < lengths.unsqueeze(1)
        if not self.values.shape[0]:
            shape = (*mask.shape, *self.values.shape[1:])
            return self.values.new_full(shape, value), mask
        index = (self.offsets[:-1].unsqueeze(1) + place).clamp(max=self.values.shape[0] - 1)
        found = self.values[index]
        return found.masked_fill(~mask.view(*mask.shape, *[1] * (found.dim() - 2)), value), mask

    def _check_offsets(self) -> None:
        """Raise if the offsets do not fit, as lookups do; a Jagged is made without a check."""
        offsets, num_values = self.offsets, self.values.shape[0]
        if not is_plain_cpu(offsets):
            return
        fits = (
            offsets.dim() == 1
            and offsets.numel() > 0
            and [int(offsets[0]), int(offsets[-1])] == [0, num_values]
            and not bool((offsets.diff() < 0).any())
        )
        if not fits:
            raise ValueError(
                f"offsets: expected shape [B + 1], from 0 to {num_values}, the number of values, "
                f"never descending, got {offsets[:8].tolist()}, of shape {tuple(offsets.shape)}; "
                "did you pass lengths? Use Jagged.from_lengths"
            )

    def to(self, device: torch.device | str | int, non_blocking: bool | None = None) -> Jagged:
        """Return it on another device.

        Args:
            device: The device.
            non_blocking: Whether the host need not wait; None means: on the way to a GPU, as
                Lightning moves tensors.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda" and self.values.device.type == "cpu"

        def moved(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=non_blocking)

        weights = None if self.weights is None else moved(self.weights)
        return Jagged(moved(self.values), moved(self.offsets), weights)

    def pin_memory(self) -> Jagged:
        """Return it in memory from which copies to a GPU need not wait; needs a GPU."""
        weights = None if self.weights is None else self.weights.pin_memory()
        return Jagged(self.values.pin_memory(), self.offsets.pin_memory(), weights)


def _lacks_attribute(self: Jagged, name: str) -> NoReturn:
    """Say of a method of tensors how a ``Jagged`` becomes one."""
    hint = ""
    if not name.startswith("_") and hasattr(Tensor, name):
        hint = (
            "; it has values and offsets of bags: to_padded() gives a tensor, and a lookup with "
            "mode='sum' or 'mean', in place of 'none', one row for each bag"
        )
    raise AttributeError(f"'Jagged' object has no attribute {name!r}{hint}", name=name, obj=self)


Jagged.__getattr__ = _lacks_attribute  # type: ignore[attr-defined] # checkers are to see none

# By this name programs of torch.export that take one are saved.
_pytree._register_namedtuple(Jagged, serialized_type_name="recis_lightning.Jagged")


def _offsets_of(lengths: Tensor) -> Tensor:
    offsets = lengths.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


class Bags(NamedTuple):
    """Bags of a feature, as a lookup takes them: flat ids and how they fall into bags.

    Attributes:
        ids: int64 [n], contiguous.
        num_bags: B.
        bag_length: Ids in every bag, or -1 where ``offsets`` says it.
        offsets: int64 [B + 1] or None.
        weights: float32 [n] or None.
        shape: Shape of the ids as given, for a dense feature; None for a ragged one.
        nested: Whether it came as a torch NestedTensor.
        owns_offsets: Whether nobody else has ``offsets``, so that they need not be copied.
    """

    ids: Tensor
    num_bags: int
    bag_length: int
    offsets: Tensor | None
    weights: Tensor | None
    shape: tuple[int, ...] | None
    nested: bool = False
    owns_offsets: bool = False

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the bag of each id, and the id's position in it, int64 [n] each.

        Example:
            >>> bags = read_bags(Jagged(torch.tensor([7, 8, 9]), torch.tensor([0, 2, 2, 3])), "f")
            >>> [part.tolist() for part in bags.positions()]
            [[0, 0, 2], [0, 1, 0]]
        """
        index = torch.arange(self.ids.numel(), device=self.ids.device)
        if self.offsets is None:
            bag = index // max(self.bag_length, 1)
            return bag, index - bag * self.bag_length
        # Not repeat_interleave: a GPU's would wait to know how long the result is.
        bag = torch.searchsorted(self.offsets[1:], index, right=True)
        bag = bag.clamp(max=max(self.num_bags - 1, 0))
        return bag, index - self.offsets[bag]


class FeatureBags(Sequence[Bags]):
    """Bags of several features.

    Most features of a model are plain: one id a bag, 1-D, contiguous, without weights. A model may
    have hundreds, so where all are plain, no ``Bags`` is made for each of them.

    Args:
        ids: int64 [n_i] for each feature, contiguous.
        details: As the attribute.

    Attributes:
        sizes: Their n_i.
        details: Bags of all features; empty if all features are plain.
        occurrences: Position of a feature -> int64 [n_i], how many occurrences each of its ids
            stands for; features that are not in it have each id once.

    Example:
        >>> bags = FeatureBags([torch.tensor([4, 5]), torch.tensor([6])])
        >>> bags.sizes, bags[1].num_bags, bags.details
        ([2, 1], 1, ())
    """

    def __init__(self, ids: list[Tensor], details: Sequence[Bags] = ()) -> None:
        self.ids, self.details = ids, details
        self.sizes = list(map(Tensor.numel, ids))
        self.occurrences: dict[int, Tensor] = {}

    @classmethod
    def of(cls, details: Sequence[Bags]) -> FeatureBags:
        """Join the bags of features."""
        return cls([bags.ids for bags in details], details)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FeatureBags(self.ids[index], self.details[index])
        if self.details:
            return self.details[index]
        size = self.sizes[index]
        return Bags(self.ids[index], size, 1, None, None, (size,))


_dtype = attrgetter("dtype")


def read_features(features: Mapping[str, Any], names: Sequence[str]) -> FeatureBags:
    """Read several features, of the kinds that ``read_bags`` takes.

    Args:
        features: Feature -> what ``read_bags`` takes.
        names: The features to read, in this order.
    """
    given: list[Any] = list(map(features.__getitem__, names))
    if (
        set(map(type, given)) == {Tensor}
        and set(map(Tensor.dim, given)) == {1}  # a nested one has two at least
        and set(map(_dtype, given)) == {torch.int64}
        and all(map(Tensor.is_contiguous, given))
        and not any(map(Tensor.is_neg, given))
    ):
        return FeatureBags(given)
    return FeatureBags.of(list(map(read_bags, given, names)))


def read_bags(feature: Any, name: str) -> Bags:
    """Read one feature.

    Args:
        feature: int64 or int32 [*] (the last dimension of two or more is the bag), a dense pair
            ``(ids, weights)``, a torch jagged NestedTensor [B, j], or a ``Jagged``.
        name: The feature's name, for errors.

    Raises:
        TypeError, ValueError: It is none of these.
    """
    if isinstance(feature, Tensor):
        if feature.is_nested:
            return _read_nested(feature, name)
        if (
            type(feature) is Tensor
            and feature.dim() == 1
            and feature.dtype is torch.int64
            and feature.is_contiguous()
            and not feature.is_neg()
        ):
            size = feature.numel()
            return Bags(feature, size, 1, None, None, (size,))
        return _read_dense(feature, None, name)
    if isinstance(feature, Jagged):
        return read_jagged(feature, name)
    if isinstance(feature, (tuple, list)):
        if len(feature) == 2:
            return _read_dense(feature[0], feature[1], name)
        if len(feature) == 3:  # a Jagged that a collate function rebuilt as a plain tuple
            return read_jagged(Jagged(*feature), name)
    refuse_symbols(name, feature)
    raise TypeError(
        f"{name}: expected a Tensor of int64 or int32, (ids, weights), a jagged NestedTensor or "
        f"Jagged, got {type(feature).__name__}"
    )


def _read_weights(weights: Any, shape: tuple[int, ...], name: str) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}: expected weights as a floating-point Tensor, got {got}")
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"{name}: expected weights of the ids' shape {shape}, got {tuple(weights.shape)}"
        )
    check_not_traced(f"{name}.weights", [weights])
    check_strided(weights, f"{name}.weights")
    return weights.reshape(-1).float().resolve_neg().contiguous()


def _read_dense(ids: Any, weights: Any, name: str) -> Bags:
    ids = check_ids(ids, name)
    shape = tuple(ids.shape)
    if len(shape) == 1:
        flat, num_bags, length = ids.contiguous().resolve_neg(), shape[0], 1
    else:
        flat = ids.reshape(-1).contiguous().resolve_neg()
        num_bags, length = _product(shape[:-1]), shape[-1] if shape else 1
    return Bags(flat, num_bags, length, None, _read_weights(weights, shape, name), shape)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def read_jagged(feature: Jagged, name: str, owns_offsets: bool = False) -> Bags:
    """Read one ragged feature.

    Args:
        feature: The feature.
        name: Its name, for errors.
        owns_offsets: Whether nobody else has its offsets.

    Raises:
        TypeError, ValueError: Shapes or dtypes do not fit.
    """
    values, offsets, weights = feature
    values, given = check_ids(values, f"{name}.values"), offsets
    offsets = check_ids(offsets, f"{name}.offsets")
    if values.dim() != 1:
        raise ValueError(f"{name}.values: expected shape [N], got {tuple(values.shape)}")
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"{name}.offsets: expected shape [B + 1], got {tuple(offsets.shape)}")
    if offsets.numel() == 1 and values.numel():
        raise ValueError(f"{name}.offsets: no bags, but {values.numel()} values")
    weights = _read_weights(weights, tuple(values.shape), name)
    # Kernels are given addresses, and know nothing of signs that torch has yet to apply.
    flat, owns_offsets = values.contiguous().resolve_neg(), owns_offsets or offsets is not given
    num_bags, offsets = offsets.numel() - 1, offsets.contiguous().resolve_neg()
    return Bags(flat, num_bags, -1, offsets, weights, None, False, owns_offsets)


def _read_nested(feature: Tensor, name: str) -> Bags:
    if feature.layout is not torch.jagged:
        raise TypeError(f"{name}: expected a NestedTensor of layout torch.jagged")
    if feature.dim() != 2:
        raise ValueError(f"{name}: expected a NestedTensor [B, j], got {feature.dim()} dimensions")
    if feature.lengths() is not None:  # type: ignore[attr-defined]
        feature = feature.contiguous()  # holes between the bags
    jagged = Jagged(feature.values(), feature.offsets())  # type: ignore[attr-defined]
    return read_jagged(jagged, name)._replace(nested=True)


def read_keyed_jagged(features: Any) -> dict[str, Jagged]:
    """Read TorchRec's ``KeyedJaggedTensor`` by its methods, without importing TorchRec."""
    read = {}
    for key in features.keys():  # noqa: SIM118 - it is no mapping
        if key in read:
            raise ValueError(f"features: the KeyedJaggedTensor has two of the key {key!r}")
        part = features[key]
        offsets = _offsets_of(part.lengths().to(torch.int64))
        read[key] = Jagged(part.values().to(torch.int64), offsets, part.weights_or_none())
    return read


__all__ = [
    "Bags",
    "FeatureBags",
    "Jagged",
    "read_bags",
    "read_features",
    "read_jagged",
    "read_keyed_jagged",
]
