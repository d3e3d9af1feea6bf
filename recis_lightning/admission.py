"""Which unknown ids get a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from recis_lightning.arguments import check_int
from recis_lightning.ops import admission


@dataclass(frozen=True)
class Screening:
    """What a policy that decides id by id asks of its table; see ``ops.admission``.

    Attributes:
        kind: ``COUNT``, ``SKETCH`` or ``DRAW``.
        threshold: Sightings wanted, or probability * 2**53.
        forget_after: Training lookups after which a count is void (``COUNT``).
        per_batch: Whether a lookup counts once for an id.
        width: Counters of a hash function (``SKETCH``).
        num_hashes: Hash functions (``SKETCH``).
        fade_after: Sightings after which a sketch is halved; 0 never.
    """

    kind: int
    threshold: int
    forget_after: int = 0
    per_batch: bool = False
    width: int = 0
    num_hashes: int = 0
    fade_after: int = 0

    def fields(self) -> dict[int, int]:
        """Return what stands in the header of a table's memory."""
        return {
            admission.KIND: self.kind,
            admission.THRESHOLD: self.threshold,
            admission.FORGET_AFTER: self.forget_after,
            admission.PER_BATCH: self.per_batch,
            admission.WIDTH: self.width,
            admission.NUM_HASHES: self.num_hashes,
        }


class Admission(ABC):
    """Decides in a training lookup whether unknown ids are admitted; None as a policy admits all.

    An id that is not admitted reads as zeros, gets no row, no gradient and no stamp. Evaluation
    and padding are no sightings; ``HashTable.insert`` overrules the policy. An id that was evicted
    or deleted must qualify again.
    """

    @property
    @abstractmethod
    def admits(self) -> bool:
        """Whether unknown ids get a row at all."""

    @property
    def screening(self) -> Screening | None:
        """What decides id by id; None if nothing does."""
        return None


class ReadOnly(Admission):
    """Admit nothing: known ids are read and trained as usual, unknown ids read as zeros."""

    @property
    def admits(self) -> bool:
        """See ``Admission``."""
        return False

    def __repr__(self) -> str:
        return "ReadOnly()"


class _Screens(Admission):
    @property
    def admits(self) -> bool:
        """See ``Admission``."""
        return True


@dataclass(frozen=True)
class MinCount(_Screens):
    """Admit an id in the training lookup in which its count reaches ``k``.

    Counts are exact, summed over ranks, and part of a table's saved state. An id that the last
    ``forget_after`` training lookups of the table did not ask for starts from 0 again: so a table
    holds counts of no more ids than those lookups had, at 32 to 64 bytes each.

    Args:
        k: Sightings wanted, an int >= 1.
        per: "occurrence" counts every one of them, "batch" counts a lookup once, however often
            the id is in it.
        forget_after: Training lookups (as a rule one a batch) that a count outlives, an int >= 1.

    Raises:
        TypeError, ValueError: An argument is not what it should be.

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
    def screening(self) -> Screening:
        """See ``Admission``."""
        return Screening(
            admission.COUNT, self.k, forget_after=self.forget_after, per_batch=self.per == "batch"
        )


@dataclass(frozen=True)
class Probability(_Screens):
    """Admit an unknown id with probability ``p``, anew in each training lookup that has it.

    The draw is a hash of the table's seed and name, the id, and the number of the table's training
    lookup (which is saved with the table): the same for all occurrences in a lookup, wherever they
    stand in it, on any number of ranks, and when the run is repeated or resumed. No memory.

    Args:
        p: In [0, 1].

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
    def screening(self) -> Screening:
        """See ``Admission``."""
        return Screening(admission.DRAW, int(self.p * 2**53))


@dataclass(frozen=True)
class BloomCount(_Screens):
    """Admit an id when a count-min sketch says that it was sighted ``k`` times: bounded memory.

    Every occurrence adds one to ``num_hashes`` counters of a byte, one a hash function, and the
    smallest of an id's counters is its count: never too low, too high where ids collide in all of
    them. So that the sketch does not fill up, all counters are halved (rounding down) whenever
    ``(k - 1) * num_counters / (4 * num_hashes)`` occurrences have been added since the last time,
    before the next lookup. An evicted id keeps what is left of its count.

    Args:
        k: Sightings wanted, an int in [1, 255].
        num_counters: Bytes of memory; each of the ``num_hashes`` functions has its share.
        num_hashes: Hash functions, an int in [1, 16].

    Raises:
        TypeError, ValueError: An argument is not what it should be.

    Source: Cormode and Muthukrishnan, "An improved data stream summary", 2005; the halving is the
    reset of TinyLFU (Einziger, Friedman, Manes, 2017).
    """

    k: int
    num_counters: int
    num_hashes: int = 4

    def __post_init__(self) -> None:
        check_int("k", self.k, least=1)
        if self.k > admission.MAX_COUNTER:
            raise ValueError(f"k: expected an int <= {admission.MAX_COUNTER}, got {self.k}")
        check_int("num_hashes", self.num_hashes, least=1)
        if self.num_hashes > 16:
            raise ValueError(f"num_hashes: expected an int <= 16, got {self.num_hashes}")
        check_int("num_counters", self.num_counters, least=self.num_hashes)
        if self.num_counters >= 2**31:
            raise ValueError(f"num_counters: expected an int below 2**31, got {self.num_counters}")

    @property
    def screening(self) -> Screening:
        """See ``Admission``."""
        width = self.num_counters // self.num_hashes
        return Screening(
            admission.SKETCH,
            self.k,
            width=width,
            num_hashes=self.num_hashes,
            fade_after=max((self.k - 1) * width // 4, 1),
        )


__all__ = ["Admission", "BloomCount", "MinCount", "Probability", "ReadOnly", "Screening"]
