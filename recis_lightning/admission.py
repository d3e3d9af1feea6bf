"""Admission policies: they decide which unknown ids get a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.ops import layout as fields


@dataclass(frozen=True)
class AdmissionCheck:
    """Check of each unknown id that a policy asks of its table; ``ops.admission`` performs it.

    Attributes:
        kind: ``COUNT``, ``SKETCH`` or ``DRAW``.
        threshold: Occurrences needed, or probability * 2**53.
        forget_after: Training lookups after which a count is void (``COUNT``).
        per_batch: Whether a lookup counts once for an id.
        width: Counters of a hash function in a block (``SKETCH``).
        num_hashes: Hash functions (``SKETCH``).
        num_blocks: Blocks of the sketch (``SKETCH``).
        decay_after: Occurrences in a block after which it is halved; 0 never.
    """

    kind: int
    threshold: int
    forget_after: int = 0
    per_batch: bool = False
    width: int = 0
    num_hashes: int = 0
    num_blocks: int = 0
    decay_after: int = 0

    @property
    def fade_after(self) -> int:
        """Alias of ``decay_after``."""
        return self.decay_after

    def fields(self) -> dict[int, int]:
        """Return the fields of the admission counter's header: index -> value."""
        return {
            fields.ADMISSION_KIND: self.kind,
            fields.ADMISSION_THRESHOLD: self.threshold,
            fields.ADMISSION_FORGET_AFTER: self.forget_after,
            fields.ADMISSION_PER_BATCH: self.per_batch,
            fields.ADMISSION_WIDTH: self.width,
            fields.ADMISSION_NUM_HASHES: self.num_hashes,
            fields.ADMISSION_NUM_BLOCKS: self.num_blocks,
        }


Screening = AdmissionCheck  # an alias


class Admission(ABC):
    """Policy that decides in training lookups which unknown ids are admitted.

    A table without one admits all ids. An id that is not admitted reads as zeros, and gets no row,
    no gradient and no last-seen step. Evaluation and padding do not count as occurrences;
    ``HashTable.insert`` overrules the policy. An id that was evicted or deleted must qualify again.
    """

    @property
    @abstractmethod
    def admits(self) -> bool:
        """Whether any unknown id can get a row."""

    @property
    def check(self) -> AdmissionCheck | None:
        """Check of each unknown id; None where all are treated alike."""
        return None

    @property
    def screening(self) -> AdmissionCheck | None:
        """Alias of ``check``."""
        return self.check


class ReadOnly(Admission):
    """Admit no id: known ids are read and trained as usual, unknown ids read as zeros."""

    @property
    @override
    def admits(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "ReadOnly()"


@explain_arguments()
@dataclass(frozen=True)
class MinCount(Admission):
    """Admit an id in the training lookup in which its count reaches ``k``.

    Counts are exact, summed over ranks, and part of a table's saved state. The count of an id that
    is not in the last ``forget_after`` training lookups of the table starts from 0 again: so a
    table holds counts of no more ids than those lookups had, at 32 to 64 bytes each.

    Args:
        k: Occurrences needed, an int >= 1.
        per: "occurrence" counts every occurrence, "batch" counts each lookup once, however often
            the id is in it.
        forget_after: Training lookups (usually one in each batch) after which the count of an id
            that they did not have is dropped, an int >= 1.

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range.

    Example:
        >>> import torch
        >>> from recis_lightning import DynamicEmbedding
        >>> user = DynamicEmbedding(4, admission=MinCount(2))
        >>> _ = user(torch.tensor([7, 8, 8]))
        >>> user.table.ids().tolist()
        [8]
    """

    k: int
    per: str = "occurrence"
    forget_after: int = 10_000

    def __post_init__(self) -> None:
        check_int("k", self.k, least=1)
        if self.k >= 2**31:
            raise ValueError(f"k: expected an int below 2**31, got {self.k}")
        if self.per not in ("occurrence", "batch"):
            raise ValueError(f"per: expected 'occurrence' or 'batch', got {self.per!r}")
        check_int("forget_after", self.forget_after, least=1)

    @property
    @override
    def admits(self) -> bool:
        return True

    @property
    @override
    def check(self) -> AdmissionCheck:
        return AdmissionCheck(
            fields.COUNT, self.k, forget_after=self.forget_after, per_batch=self.per == "batch"
        )


@explain_arguments()
@dataclass(frozen=True)
class Probability(Admission):
    """Admit an unknown id with probability ``p``, drawn anew in each training lookup that has it.

    The draw is a hash of the table's seed and name, the id, and the number of the table's training
    lookup (which is saved with the table): the same for all occurrences in a lookup, in any order,
    on any number of ranks, and when the run is repeated or resumed. It needs no memory.

    Args:
        p: Probability, in [0, 1].

    Raises:
        TypeError, ValueError: ``p`` is no number, or out of range.
    """

    p: float

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)):
            raise TypeError(f"p: expected a number in [0, 1], got {self.p!r}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p: expected a number in [0, 1], got {self.p!r}")

    @property
    @override
    def admits(self) -> bool:
        return True

    @property
    @override
    def check(self) -> AdmissionCheck:
        return AdmissionCheck(fields.DRAW, int(self.p * 2**53))


_NUM_BLOCKS = (12, 24, 120, 840, 5040, 10_080, 40_320, 161_280)  # many numbers divide them
_BLOCK_WIDTH = 32  # counters of a hash function; fewer, and blocks would fill up at random


@explain_arguments()
@dataclass(frozen=True)
class BloomCount(Admission):
    """Admit an id when a count-min sketch estimates ``k`` occurrences: bounded memory.

    Every occurrence adds one to ``num_hashes`` counters of one byte, one for each hash function,
    and the smallest of an id's counters is its count: never too low, and too high where ids collide
    in all of them. An evicted id keeps the rest of its count.

    A hash of the id picks one of ``num_blocks`` blocks of the sketch, in which all counters of the
    id lie. So that a block does not fill up, its counters are halved (rounding down) before a
    lookup if ``(k - 1) * block / (4 * num_hashes)`` occurrences have been added to it since they
    were last halved, where ``block`` is its number of counters.

    The number of ranks by which ids are sharded changes no count if it divides ``num_blocks``:
    every block then belongs to one rank. On another number of ranks, fewer ids collide in a block
    and it is halved later.

    Args:
        k: Occurrences needed, an int in [1, 255].
        num_counters: Bytes of memory, divided among blocks and hash functions. Each block takes 8
            bytes more.
        num_hashes: Hash functions, an int in [1, 16].

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range.

    Source: Cormode and Muthukrishnan, "An improved data stream summary", 2005; the halving is the
    reset of TinyLFU (Einziger, Friedman, Manes, 2017); blocks as in Putze, Sanders and Singler,
    "Cache-, hash- and space-efficient Bloom filters", 2009.
    """

    k: int
    num_counters: int
    num_hashes: int = 4

    def __post_init__(self) -> None:
        check_int("k", self.k, least=1)
        if self.k > fields.MAX_COUNTER:
            raise ValueError(f"k: expected an int <= {fields.MAX_COUNTER}, got {self.k}")
        check_int("num_hashes", self.num_hashes, least=1)
        if self.num_hashes > 16:
            raise ValueError(f"num_hashes: expected an int <= 16, got {self.num_hashes}")
        check_int("num_counters", self.num_counters, least=self.num_hashes)
        if self.num_counters >= 2**31:
            raise ValueError(f"num_counters: expected an int below 2**31, got {self.num_counters}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks: the largest that leaves each hash function 32 counters in a block.

        One of 12, 24, 120, 840, 5040, 10,080, 40,320 and 161,280, or 1 if a hash function has fewer
        than 384 counters.
        """
        width = self.num_counters // self.num_hashes
        fitting = [number for number in _NUM_BLOCKS if width // number >= _BLOCK_WIDTH]
        return max(fitting, default=1)

    @property
    @override
    def admits(self) -> bool:
        return True

    @property
    @override
    def check(self) -> AdmissionCheck:
        width = self.num_counters // self.num_hashes // self.num_blocks
        return AdmissionCheck(
            fields.SKETCH,
            self.k,
            width=width,
            num_hashes=self.num_hashes,
            num_blocks=self.num_blocks,
            decay_after=max((self.k - 1) * width // 4, 1),
        )


__all__ = [
    "Admission",
    "AdmissionCheck",
    "BloomCount",
    "MinCount",
    "Probability",
    "ReadOnly",
    "Screening",
]
