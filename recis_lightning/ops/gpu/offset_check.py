"""Malformed offsets of bags: found by kernels, reported without waiting for the device."""

import threading

import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.async_copy import is_captured
from recis_lightning.ops.gpu.layout import PLAN_NUM_BAGS, PLAN_NUM_IDS, PLAN_OFFSETS
from recis_lightning.ops.gpu.runtime import any_of, device_function, field, int64_at


@device_function
def are_malformed(line, bag, inside):
    """Tell whether the offsets of some bags, or the feature's first or last, are malformed."""
    offsets, num_bags = field(line, PLAN_OFFSETS), field(line, PLAN_NUM_BAGS)
    begin = tl.load(int64_at(offsets + 8 * bag), inside, 0)
    wrong = begin > tl.load(int64_at(offsets + 8 * bag + 8), inside, 0)
    wrong = wrong & inside
    wrong = wrong | (field(offsets, 0) != 0)
    wrong = wrong | (field(offsets, num_bags) != field(line, PLAN_NUM_IDS))
    return any_of(wrong)


class _LateErrors(threading.local):
    """Checks of a thread's earlier lookups whose result has not reached the host yet."""

    def __init__(self):
        self._in_flight = []

    def watch(self, malformed, plan):
        values = torch.empty(1, dtype=torch.int64, pin_memory=True, device="cpu")
        values.copy_(malformed, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(malformed.device))
        self._in_flight.append((values, event, plan))

    def check(self):
        while self._in_flight and self._in_flight[0][1].query():
            values, _, plan = self._in_flight.pop(0)
            feature = int(values[0])
            if feature >= 0:
                self._in_flight.clear()
                raise ValueError(
                    f"offsets: in a lookup before this one, feature number {feature}'s did not "
                    "start at 0, ascend and end at its number of ids, "
                    f"{int(plan[feature, fields.PLAN_NUM_IDS])}; on a GPU this is found out later"
                )


_late_errors = _LateErrors()


def any_offsets(plan):
    """Tell whether any line of a plan has offsets."""
    return min(plan[:, fields.PLAN_BAG_LENGTH].tolist(), default=0) < 0


def new_flag(has_offsets, device):
    """Return where a kernel notes a feature with malformed offsets, and its address; or None, 0."""
    if not has_offsets:
        return None, 0
    flag = torch.full((1,), -1, dtype=torch.int64, device=device)
    return flag, flag.data_ptr()


def malformed_feature(plan, flag):
    """Return the index of a feature whose offsets a kernel found malformed, -1 if none is known.

    Beside a GPU a later call reports it, unless a CUDA graph is captured.

    Raises:
        ValueError: An earlier lookup had malformed offsets.
    """
    if flag is None:
        return -1
    if flag.device.type == "cpu":
        return int(flag)
    if is_captured(flag.device):  # no host sees a replay
        return -1
    _late_errors.check()
    _late_errors.watch(flag, plan.copy())
    return -1


__all__ = ["any_offsets", "are_malformed", "malformed_feature", "new_flag"]
