"""Declaration and launch of Triton kernels, interpreted without a GPU, and functions they share.

A kernel takes addresses and numbers, int64 all, and constants of compilation; it reads tables,
segments and plans through their addresses, exactly as the CPU's kernels do. So one launch serves a
whole group of tables, and a kernel can be interpreted over the CPU's memory.

``TRITON_INTERPRET=1`` in the environment, or a machine without a GPU, means interpreted, for the
whole process: Triton decides it when a kernel is declared.
"""

import atexit
import functools
import inspect
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.private_folder import open_private

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1" if "TRITON_INTERPRET" in os.environ else False


_INTERPRETED = tl.constexpr(INTERPRETED)

_log = logging.getLogger(__name__)

KERNELS = []
"""All kernels: ``(kernel, variants)``; a variant is the constants of one compilation."""


class Kernel:
    """A Triton kernel and the constants it is compiled with, ahead of time, in the tests.

    Args:
        function: All arguments are annotated, ``tl.int64`` or ``tl.constexpr``.
        variants: Constants of each compilation, for the test that compiles every kernel.
        num_warps: Warps of 32 lanes (64 on AMD) that run one program.
    """

    def __init__(self, function, variants, num_warps):
        self.variants = variants
        self.options = {"num_warps": num_warps, "enable_fp_fusion": True}
        parameters = inspect.signature(function).parameters.values()
        numbers = [p.name for p in parameters if p.annotation is not tl.constexpr]
        self.numbers = numbers
        self.constants = [p.name for p in parameters if p.annotation is tl.constexpr]
        assert [p.name for p in parameters] == numbers + self.constants
        # One compilation serves every address and size.
        self.jit = triton.jit(function, do_not_specialize=numbers)
        self.name = function.__name__
        self._compiled = {}  # (device's index, *constants) -> compiled kernel, ordered constants
        KERNELS.append(self)

    def launch(self, device, num_programs, *numbers, **constants):
        """Run ``num_programs`` programs on ``device``'s current stream; none is fine.

        Triton looks at every argument of every launch, to find the compilation for it: 14 to 47 us
        on a cloud Xeon (``benchmarks.fake_cuda``). Ours are all int64, so the constants alone name
        the compilation; with it in hand a launch takes 5 to 7 us.
        """
        if num_programs <= 0:
            return
        if INTERPRETED:
            self.jit[(num_programs,)](*numbers, **constants)
            return
        driver = triton.runtime.driver.active
        current = driver.get_current_device()
        if device.index is not None and device.index != current:
            with torch.cuda.device(device):
                self.launch(device, num_programs, *numbers, **constants)
            return
        key = (current, *constants.items())
        found = self._compiled.get(key)
        if found is None:
            _check_cache_folder()
            compiled = self.jit[(num_programs,)](*numbers, **constants, **self.options)
            if compiled is not None:  # None if a hook of Triton's took the launch over
                ordered = tuple(constants[name] for name in self.constants)
                self._compiled[key] = compiled, ordered
            return
        compiled, ordered = found
        stream = driver.get_current_stream(current)
        if _is_watched():
            compiled[(num_programs, 1, 1)](*numbers, *ordered, stream=stream)
            return
        compiled.run(
            num_programs,
            1,
            1,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *numbers,
            *ordered,
        )


def kernel(*variants, num_warps=4):
    """Declare a kernel; arguments are those of ``Kernel``."""
    return lambda function: Kernel(function, variants, num_warps)


def device_function(function):
    """Declare a function that kernels call."""
    compiled = triton.jit(function)
    # Interpreted, a call through Triton's own wrapper patches its whole language again: as slow
    # as ten operations.
    return compiled.rewrite() if INTERPRETED else compiled


@functools.cache
def _check_cache_folder():
    """Have Triton keep kernels in a folder that others cannot write to; once a process."""
    reason = open_private(Path(triton.knobs.cache.dir))
    if reason is not None:
        own = tempfile.mkdtemp(prefix="recis_lightning-triton-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        triton.knobs.cache.dir = own
        _log.warning(
            "%s: kernels are compiled anew for this process; set TRITON_CACHE_DIR to a folder of "
            "your own",
            reason,
        )


def _is_watched():
    """Tell whether a hook, such as that of Triton's profiler, observes launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def lanes(compiled, interpreted):
    """Choose how many items a program handles: interpreted, only its steps cost time."""
    return interpreted if INTERPRETED else compiled


@functools.cache
def num_programs_at_once(device, on_each=16):
    """Return how many programs keep the device busy, where each of them loops over its share.

    Args:
        device: The GPU.
        on_each: How many of them stay on a multiprocessor: more would come in a second turn.
    """
    if INTERPRETED:
        return 2
    return on_each * torch.cuda.get_device_properties(device).multi_processor_count


def stage(array, device):
    """Copy a NumPy array to the device in the order of its stream, without waiting for it."""
    return to_device_async(array, device)


def power_of_two(number):
    """Return the smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


_MAX = tl.standard._elementwise_max
_ADD = tl.standard._sum_combine


@device_function
def largest(values):
    """Return the largest of a vector."""
    return tl.reduce(values, 0, _MAX)


@device_function
def any_of(flags):
    """Tell whether any flag of a vector is set."""
    return tl.reduce(flags.to(tl.int32), 0, _MAX) != 0


@device_function
def sum_over(values, axis: tl.constexpr):
    """Add along an axis, in a fixed order."""
    return tl.reduce(values, axis, _ADD)


@device_function
def sums_up_to(values):
    """Return each value of a vector and those before it added up."""
    return tl.associative_scan(values, 0, _ADD)


@device_function
def int64_at(address):
    """Turn addresses into pointers to int64."""
    return address.to(tl.pointer_type(tl.int64))


@device_function
def byte_at(address):
    """Turn addresses into pointers to uint8."""
    return address.to(tl.pointer_type(tl.uint8))


@device_function
def float_at(address):
    """Turn addresses into pointers to float32."""
    return address.to(tl.pointer_type(tl.float32))


@device_function
def cells_at(rows, column, ALIGNED: tl.constexpr):
    """Turn pointers to rows into those to some of their columns.

    ALIGNED: rows lie at multiples of 16 bytes, so a lane may load four words at once.
    """
    at = rows[:, None] + column[None, :]
    if ALIGNED:
        at = tl.multiple_of(at, (16, 16))
    return at


@device_function
def to_bfloat16(value):
    """Round float32 to bfloat16, to nearest even."""
    if _INTERPRETED:  # Triton's interpreter cuts bits off instead
        bits = value.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, rounded, bits) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(tl.bfloat16)


@device_function
def field(address, number):
    """Load an int64 field of a header, segment or line."""
    return tl.load((address + 8 * number).to(tl.pointer_type(tl.int64)))


@device_function
def line_of(lines, num_lines, line_bytes, first_field, chunk):
    """Return the address of the last line whose ``first_field`` is at or before ``chunk``."""
    low = num_lines * 0
    high = num_lines
    while high - low > 1:
        middle = (low + high) // 2
        before = field(lines + middle * line_bytes, first_field) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return lines + low * line_bytes


@device_function
def row_address(blocks, shift, row_bytes, row, known):
    """Return the addresses of rows; undefined where not ``known``."""
    block = tl.load((blocks + 8 * (row >> shift)).to(tl.pointer_type(tl.int64)), known, 0)
    one = row * 0 + 1
    return block + (row & ((one << shift) - 1)) * row_bytes
