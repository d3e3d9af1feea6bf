"""Reduction of gradients by row and update of rows in place: the contract for all optimizers.

One call takes the gradients of all lookups since the last step, of all tables of one optimizer with
the same row layout. Rows are numbered through, a table's rows from its PLAN_FLAT_BASE on. Positions
are sorted by row with a stable radix sort; then each row's gradients are added up in the order of
the batch and applied at once. Nothing is added atomically, so the result does not depend on
threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend, traffic
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan


@dataclass(frozen=True)
class RowLayout:
    """Layout of a row of the call's tables.

    Attributes:
        embedding_dim: Weights in a row.
        dtype: Dtype of the weights, float32 or bfloat16; float32 state follows them.
        row_bytes: Bytes from one row to the next.
        block_shift: log2(rows in a block).
        device: Device of rows and gradients.
    """

    embedding_dim: int
    dtype: torch.dtype
    row_bytes: int
    block_shift: int
    device: torch.device


@dataclass(eq=False, slots=True)
class Gradients:
    """Gradients of one update call, sorted by row; made by ``sort_gradients``.

    Attributes:
        plan: int64 [num_features, PLAN_SIZE]; PLAN_DATA points to gradients.
        blocks: int64 [num_blocks, 2]: address of each block, and of its table's hyperparameters.
        layout: Layout of the rows.
        work: State of the backend between sorting and updating. Unless ``outlive_next_sort`` says
            otherwise, it is scratch memory, valid on the thread that sorted until its next sort.
        applied: int64 [1], not 0 from when ``update_rows_`` changes rows, which nothing interrupts.
    """

    plan: Plan
    blocks: npt.NDArray[np.int64]
    layout: RowLayout
    work: object
    applied: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def is_counted(self) -> bool:
        """Whether behind each gradient stands how many ids it is of (PLAN_COUNTED)."""
        counted = self.plan[self.plan[:, fields.PLAN_NUM_IDS] > 0, fields.PLAN_COUNTED]
        assert counted.all() or not counted.any()
        return bool(counted.any())


_announced_rules: set[int] = set()


def announce_rule(rule: int) -> None:
    """Say that an optimizer will update rows by ``rule``: its kernels may be compiled early."""
    _announced_rules.add(rule)


def announced_rules() -> frozenset[int]:
    """Return the rules that optimizers of this process have announced."""
    return frozenset(_announced_rules)


def outlive_next_sort(device: torch.device) -> bool:
    """Return whether sorted gradients on ``device`` stay valid after others were sorted."""
    return backend.is_async(device)


def sort_gradients(
    plan: Plan,
    blocks: npt.NDArray[np.int64],
    layout: RowLayout,
    blocks_on_device: Tensor | None = None,
    hyper: npt.NDArray[np.float32] | None = None,
    kept: dict[str, Any] | None = None,
) -> Gradients:
    """Sort the positions of ``plan`` by row, stably.

    Args:
        plan: int64 [num_features, PLAN_SIZE]; PLAN_FIRST_ID numbers the positions of all features
            through, PLAN_DATA and PLAN_DATA_STRIDE describe float32 gradients.
        blocks: int64 [num_blocks, 2].
        layout: Layout of the rows.
        blocks_on_device: ``blocks`` as a tensor on the device, if the caller has one there.
        hyper: float32 [num_tables, HYPER_SIZE] to be sent to the device with the plan; then
            ``blocks`` holds offsets in it, and not addresses. None beside the CPU.
        kept: What a backend keeps for later plans that differ from this one in addresses alone.

    Returns:
        The sorted gradients; hyperparameters are not read before the update.

    Source: least significant digit radix sort, Knuth, TAOCP vol. 3, 5.2.5.
    """
    with backend.region("recis::sort_gradients", lambda: traffic.of_sort(_num_ids(plan))):
        module = backend.module("row_update", layout.device)
        work = module.sort_gradients(plan, blocks, layout, blocks_on_device, hyper, kept)
        return Gradients(plan, blocks, layout, work)


def squared_norm(gradients: Gradients) -> Tensor:
    """Add up the squares of all rows' reduced gradients, in a fixed order.

    Returns:
        float64 [] on the gradients' device: the host does not wait for it.
    """
    with backend.region("recis::gradient_norm", lambda: _num_bytes(gradients, reads_only=True)):
        module = backend.module("row_update", gradients.layout.device)
        norm = module.squared_norm(gradients)
        device = norm.device if isinstance(norm, Tensor) else "cpu"
        return torch.as_tensor(norm, dtype=torch.float64, device=device)


def reduced_gradients(plan: Plan, blocks: npt.NDArray[np.int64], layout: RowLayout) -> Tensor:
    """Add up gradients by row, in plain torch, for what no kernel computes.

    Args:
        plan: As for ``sort_gradients``.
        blocks: int64 [num_blocks, 2].
        layout: Layout of the rows.

    Returns:
        float64 [num_rows, embedding_dim], rows in ascending order.

    Raises:
        ValueError: The gradients are not in the CPU's memory.
    """
    if layout.device.type != "cpu":
        raise ValueError(f"device: expected gradients on the CPU, got {str(layout.device)!r}")
    module = backend.module("row_update", layout.device, "reference")
    gradients: Tensor = module.sort_gradients(plan, blocks, layout, None, None, None).gradients
    return gradients


def scale_(gradients: Gradients, scale: Tensor) -> None:
    """Set the factor of sorted gradients whose hyperparameters were sent with them.

    Args:
        gradients: Sorted with ``hyper``.
        scale: float64 [].
    """
    backend.module("row_update", gradients.layout.device).scale_(gradients, scale)


def update_rows_(gradients: Gradients, rule: int) -> None:
    """Apply one optimizer step to every row that has a gradient.

    With g the row's reduced gradient, times HYPER_SCALE and clamped to HYPER_CLIP, in float32, and
    hyperparameters named as in ``ops.layout`` without HYPER_:

    - ``SGD``: w = w * DECAY - LR * g
    - ``MOMENTUM``: m = MOMENTUM * m + g; w -= LR * (OF_BUFFER * m + OF_GRADIENT * g)
    - ``ADAGRAD``: s += g * g; w -= LR * g / (sqrt(s) + EPS)
    - ``ROWWISE_ADAGRAD``: s += mean(g * g), one s a row; w as above
    - ``RMSPROP``: v += ONE_MINUS_BETA2 * (g * g - v); w -= LR * g / (sqrt(v) + EPS)
    - ``ADAM``: m += ONE_MINUS_BETA1 * (g - m); v += ONE_MINUS_BETA2 * (g * g - v);
      w = w * DECAY - LR * m / (sqrt(v) * INV_SQRT_BIAS2 + EPS)
    - ``ROWWISE_ADAM``: v += ONE_MINUS_BETA2 * (mean(g * g) - v), one v a row; m and w as above
    - ``LION``: u = sign(m + ONE_MINUS_BETA1 * (g - m)); w = w * DECAY - LR * u;
      m += ONE_MINUS_BETA2 * (g - m)
    - ``FTRL``: r = sqrt(s); s += g * g; z += g - (sqrt(s) - r) / LR * w;
      w = LR * (clamp(z, -L1, L1) - z) / (BETA + sqrt(s) + LR * L2)

    - ``ADAM_AR``: if u > 0, w *= product of max(0, 1 - ALPHA * j) over 1 <= j < UPDATE - u;
      u = UPDATE, one u a row; then as ADAM

    State lies behind the weights in the order in which it is named here, but s before z,
    ROWWISE_ADAM's m before v, and ADAM_AR's u last.

    A row's mark becomes 0 where HYPER_MARKS says that its table has marks.

    Args:
        gradients: The sorted gradients.
        rule: One of these, or one plus ``COUPLED_DECAY``: then g += WEIGHT_DECAY * w comes first.
            Or plus ``COW_CLIP``: then, between scale and clamp,
            g *= min(1, num_ids * max(COW_RATIO * norm(w), COW_LEAST) / norm(g)), where num_ids
            counts the positions that g is the sum of.

    Source: Sutskever et al., 2013; Duchi et al., 2011; Hinton, 2012; Kingma and Ba, 2015;
    Loshchilov and Hutter, 2019; Chen et al., 2023; McMahan et al., 2013; row-wise as in FBGEMM;
    Zheng et al., 2023 (CowClip); Li and Lyu, 2026 (ADAM_AR).
    """
    with backend.region("recis::row_update", lambda: _num_bytes(gradients)):
        backend.module("row_update", gradients.layout.device).update_rows_(gradients, rule)


def count_rows(gradients: Gradients) -> int:
    """Return the number of distinct rows that have a gradient; the host waits for the device."""
    module = backend.module("row_update", gradients.layout.device)
    return int(module.count_rows(gradients))


def _num_ids(plan: Plan) -> int:
    return int(plan[:, fields.PLAN_NUM_IDS].sum())


def _num_bytes(gradients: Gradients, reads_only: bool = False) -> int:
    layout = gradients.layout
    num_rows, row_bytes = (0, 0) if reads_only else (count_rows(gradients), layout.row_bytes)
    return traffic.of_update(_num_ids(gradients.plan), num_rows, layout.embedding_dim, row_bytes)
