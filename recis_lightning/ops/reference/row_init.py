"""Initial rows in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.reference.index import mix, segment_of, segments_of, shift_right, signed
from recis_lightning.ops.reference.storage import Rows, float_field, state_of, weights_of

_COLUMN = signed(0x9E3779B97F4A7C15)


def _initial_weights(header: Tensor, ids: Tensor, embedding_dim: int) -> Tensor:
    """Return the initial weights of ids, float64 [n, embedding_dim]."""
    bits = (
        mix(mix(ids) ^ header[fields.INIT_KEY])[:, None]
        + torch.arange(embedding_dim, device="cpu") * _COLUMN
    )
    uniform = (2 * shift_right(mix(bits), 41) + 1).double() * 2.0**-24
    kind = int(header[fields.INIT_KIND])
    first, second, low, high = (float_field(header, fields.INIT_ARGS + i) for i in range(4))
    if kind == fields.INIT_CONSTANT:
        return torch.full_like(uniform, first)
    if kind == fields.INIT_UNIFORM:
        return first + (second - first) * uniform
    # x is uniform over the values of erf that the distribution reaches.
    start, end = -1.0, 1.0
    if kind == fields.INIT_TRUNCATED_NORMAL:
        start, end = math.erf(low * math.sqrt(0.5)), math.erf(high * math.sqrt(0.5))
    else:
        low, high = -math.inf, math.inf
    x = start + (end - start) * uniform
    return first + second * (math.sqrt(2) * torch.erfinv(x)).clamp(low, high)


def init_rows_(
    rows: Tensor, new: Tensor, segments: Segments, embedding_dim: int, bfloat16: bool
) -> None:
    owner = segment_of(new, segments)
    for i, (start, ids, header, *_) in enumerate(segments_of(segments, rows.numel())):
        positions = new[owner == i]
        new_rows = rows[positions]
        store = Rows.of(header, new_rows)
        words = torch.zeros(new_rows.numel(), store.words, device="cpu")
        initial = _initial_weights(header, ids[positions - start], embedding_dim)
        weights_of(words, embedding_dim, bfloat16).copy_(initial.float())
        state_of(words, embedding_dim, bfloat16).fill_(float_field(header, fields.STATE_FILL))
        store.write(new_rows, words)
