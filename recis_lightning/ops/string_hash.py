"""Hashes of strings: the contract.

Strings lie on the host, as files and Arrow keep them: there are kernels for the CPU only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend

# Hash -> its number in kernels, and the largest seed it takes.
HASHES = {
    "xxh64": (0, 2**63 - 1),
    "farmhash64": (1, 2**63 - 1),
    "murmur3": (2, 2**32 - 1),
    "murmur64a": (3, 2**63 - 1),
}
XXH64, FARMHASH64, MURMUR3, MURMUR64A = range(4)
_CPU = torch.device("cpu")
# The most that plain Python hashes (about 5 us a string) rather than load the compiler's runtime.
_FEW_STRINGS, _FEW_BYTES = 256, 1 << 14


def hash_strings(
    data: npt.NDArray[np.uint8], offsets: npt.NDArray[Any], name: str, seed: int
) -> Tensor:
    """Hash strings that lie one after the other.

    A process that has hashed but a few at a time so far, as one that serves may, loads no kernels.

    Args:
        data: Their bytes.
        offsets: int32 or int64 [n + 1], ascending, contiguous; string i is
            ``data[offsets[i]:offsets[i + 1]]``.
        name: One of ``HASHES``: XXH64; FarmHash's ``Fingerprint64``, or with a seed other than 0
            its ``Hash64WithSeed`` on the fingerprint; the lower half of MurmurHash3's x64 128-bit
            hash; MurmurHash64A.
        seed: From 0 to the largest that ``HASHES`` names.

    Returns:
        int64 [n]: the bits of the unsigned hashes.
    """
    out = torch.empty(len(offsets) - 1, dtype=torch.int64, device="cpu")
    with backend.region("recis::hash_strings"):
        is_small = len(out) <= _FEW_STRINGS and len(data) <= _FEW_BYTES
        module = backend.module("string_hash", _CPU, small="reference" if is_small else None)
        module.hash_strings(data, offsets, HASHES[name][0], seed, out)
    return out


__all__ = ["FARMHASH64", "HASHES", "MURMUR3", "MURMUR64A", "XXH64", "hash_strings"]
