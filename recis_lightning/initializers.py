"""Initializers of new rows. Names and arguments follow ``torch.nn.init``.

A value is a pure function of (seed, table name, id, column), which ``ops.row_init`` computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.ops import layout as fields


@dataclass(frozen=True)
class Initializer(ABC):
    """Distribution of the weights of a new row."""

    @abstractmethod
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        """Return a kind and its arguments, as ``ops.row_init.write_distribution`` takes them."""


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")


def _check_xavier(gain: float, fan_in: int) -> None:
    _check_finite(gain=gain, fan_in=fan_in)
    _check_not_negative("gain", gain)
    _check_not_negative("fan_in", fan_in)


@explain_arguments()
@dataclass(frozen=True)
class Constant(Initializer):
    """Every weight is ``val``."""

    val: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(val=self.val)

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        return fields.INIT_CONSTANT, (self.val,)


@explain_arguments()
@dataclass(frozen=True)
class Uniform(Initializer):
    """Uniform in (a, b), as ``torch.nn.init.uniform_``."""

    a: float = 0.0
    b: float = 1.0

    def __post_init__(self) -> None:
        _check_finite(a=self.a, b=self.b)
        if self.b < self.a:
            raise ValueError(f"b: expected a number >= a={self.a!r}, got {self.b!r}")

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        return fields.INIT_UNIFORM, (self.a, self.b)


@explain_arguments()
@dataclass(frozen=True)
class Normal(Initializer):
    """Normal with ``mean`` and ``std``, as ``torch.nn.init.normal_``."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_finite(mean=self.mean, std=self.std)
        _check_not_negative("std", self.std)

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        return fields.INIT_NORMAL, (self.mean, self.std)


@explain_arguments()
@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal with ``mean`` and ``std``, cut to [a, b], as ``torch.nn.init.trunc_normal_``."""

    mean: float = 0.0
    std: float = 1.0
    a: float = -2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        _check_finite(mean=self.mean, std=self.std, a=self.a, b=self.b)
        if self.std <= 0:
            raise ValueError(f"std: expected a number > 0, got {self.std!r}")
        if self.b <= self.a:
            raise ValueError(f"b: expected a number > a={self.a!r}, got {self.b!r}")
        if (self.b - self.mean) / self.std <= -5 or (self.a - self.mean) / self.std >= 5:
            raise ValueError(
                f"a, b: expected an interval within 5 std of mean={self.mean!r}, got "
                f"[{self.a!r}, {self.b!r}] with std={self.std!r}"
            )

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        bounds = ((self.a - self.mean) / self.std, (self.b - self.mean) / self.std)
        return fields.INIT_TRUNCATED_NORMAL, (self.mean, self.std, *bounds)


@explain_arguments()
@dataclass(frozen=True)
class XavierUniform(Initializer):
    """Uniform within ``gain * sqrt(6 / (fan_in + embedding_dim))`` of 0.

    A lookup is a one-hot product, so ``fan_in`` is 1 unless the bags are longer.

    Source: Glorot and Bengio, 2010; ``torch.nn.init.xavier_uniform_``.
    """

    gain: float = 1.0
    fan_in: int = 1

    def __post_init__(self) -> None:
        _check_xavier(self.gain, self.fan_in)

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        bound = self.gain * math.sqrt(6 / (self.fan_in + embedding_dim))
        return fields.INIT_UNIFORM, (-bound, bound)


@explain_arguments()
@dataclass(frozen=True)
class XavierNormal(Initializer):
    """Normal with std ``gain * sqrt(2 / (fan_in + embedding_dim))``.

    ``fan_in`` is 1 unless the bags are longer, as for ``XavierUniform``.

    Source: Glorot and Bengio, 2010; ``torch.nn.init.xavier_normal_``.
    """

    gain: float = 1.0
    fan_in: int = 1

    def __post_init__(self) -> None:
        _check_xavier(self.gain, self.fan_in)

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        return fields.INIT_NORMAL, (0.0, self.gain * math.sqrt(2 / (self.fan_in + embedding_dim)))


@dataclass(frozen=True)
class KaimingUniform(Initializer):
    """Uniform within ``gain * sqrt(3 / fan)`` of 0.

    ``gain`` is that of ``nonlinearity`` (and ``a``), as ``torch.nn.init.calculate_gain`` has it.
    ``fan`` is ``fan_in`` in ``mode`` "fan_in", and the embedding's dim in "fan_out". A lookup is a
    one-hot product, so ``fan_in`` is 1 unless the bags are longer.

    Source: He et al., 2015; ``torch.nn.init.kaiming_uniform_``.
    """

    a: float = 0.0
    mode: str = "fan_in"
    nonlinearity: str = "leaky_relu"
    fan_in: int = 1

    def __post_init__(self) -> None:
        _check_kaiming(self.a, self.mode, self.nonlinearity, self.fan_in)

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        fan = self.fan_in if self.mode == "fan_in" else embedding_dim
        bound = math.sqrt(3) * _gain(self.nonlinearity, self.a) / math.sqrt(fan)
        return fields.INIT_UNIFORM, (-bound, bound)


@dataclass(frozen=True)
class KaimingNormal(Initializer):
    """Normal with std ``gain / sqrt(fan)``; arguments are those of ``KaimingUniform``.

    Source: He et al., 2015; ``torch.nn.init.kaiming_normal_``.
    """

    a: float = 0.0
    mode: str = "fan_in"
    nonlinearity: str = "leaky_relu"
    fan_in: int = 1

    def __post_init__(self) -> None:
        _check_kaiming(self.a, self.mode, self.nonlinearity, self.fan_in)

    @override
    def distribution(self, embedding_dim: int) -> tuple[int, tuple[float, ...]]:
        fan = self.fan_in if self.mode == "fan_in" else embedding_dim
        return fields.INIT_NORMAL, (0.0, _gain(self.nonlinearity, self.a) / math.sqrt(fan))


def _gain(nonlinearity: str, a: float) -> float:
    return float(torch.nn.init.calculate_gain(nonlinearity, a))  # type: ignore[arg-type]


def _check_kaiming(a: float, mode: str, nonlinearity: str, fan_in: int) -> None:
    _check_finite(a=a, fan_in=fan_in)
    if fan_in <= 0:
        raise ValueError(f"fan_in: expected a number > 0, got {fan_in!r}")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode: expected 'fan_in' or 'fan_out', got {mode!r}")
    try:
        _gain(nonlinearity, a)
    except ValueError:
        raise ValueError(
            "nonlinearity: expected a name that torch.nn.init.calculate_gain knows, "
            f"got {nonlinearity!r}"
        ) from None


DEFAULT_INITIALIZER = Normal(std=0.01)  # of tables that are given none

__all__ = [
    "DEFAULT_INITIALIZER",
    "Constant",
    "Initializer",
    "KaimingNormal",
    "KaimingUniform",
    "Normal",
    "TruncatedNormal",
    "Uniform",
    "XavierNormal",
    "XavierUniform",
]
