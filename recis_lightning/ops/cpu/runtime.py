"""Run a CPU kernel on torch's own threads.

A kernel is a ``numba.cfunc`` over the address of an int64 argument vector. Slot 0 is a ticket
counter, slot 1 the number of chunks: every thread takes tickets until none is left, so work is
split by size and not by table, and the result cannot depend on how many threads came. The kernel's
own arguments, addresses and numbers, follow. The threads
are those of torch's OpenMP runtime (``GOMP_parallel``): no second pool competes with torch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core import compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from recis_lightning import system_calls
from recis_lightning.ops.cpu import kernel_cache
from recis_lightning.ops.cpu.kernel_cache import KernelCache
from recis_lightning.ops.cpu.pipeline import KernelCompiler

_I64 = ir.IntType(64)

_forked = False


def _mark_forked() -> None:
    # OpenMP's threads do not survive fork(), and waiting for them would hang the child.
    global _forked
    _forked = True
    _thread_pool.cache_clear()


system_calls.call_at_fork(after_in_child=_mark_forked)


# State of a launch, int64: these words, then the kernel's own arguments.
_NEXT_CHUNK, _NUM_CHUNKS, _NEXT_THREAD, _NUM_ITEMS, _ITEMS_PER_CHUNK, _FAILED, _ARGUMENTS = range(7)


def kernel(function: Callable[..., None]) -> Kernel:
    """Declare a kernel; it is compiled at its first launch, and later processes load it from disk.

    Parameters of these names are given by the chunk loop; all others are int64, given at the
    launch. A body may return early, which ends its chunk.

    - ``low``, ``high``: the chunk's items.
    - ``num_items``: the items of all chunks.
    - ``chunk``, ``num_chunks``: the chunk's index, and how many there are.
    - ``next_chunk``: the chunk that the same thread will run next, or ``num_chunks`` or more.
    - ``thread``: the thread's index in the launch, for its share of a scratch buffer.

    Example:
        Clear an index in chunks of 4096 entries, with torch's threads::

            @kernel
            def _clear_kernel(low, high, entries):
                for i in range(low, high):
                    store_i64(entries + 16 * i, EMPTY)

            _clear_kernel.launch(len(index), 4096, entries=index)
    """
    return Kernel(function)


def kernel_template(make: Callable[..., Callable[..., None]]) -> Callable[..., Kernel]:
    """Declare kernels that differ in compile-time constants, as ``make(*constants)`` builds them.

    The constants (int) tell one machine code on disk from another.
    """

    @functools.cache
    def specialize(*constants: int) -> Kernel:
        return Kernel(make(*constants), constants)

    return specialize


class Kernel:
    """One compiled chunk kernel; ``launch`` runs it over all chunks."""

    def __init__(self, function: Callable[..., None], constants: tuple[int, ...] = ()) -> None:
        self.function = function
        self.constants = constants
        names = inspect.signature(function).parameters
        self._names = dict.fromkeys(n for n in names if n not in _CHUNK_VALUES).keys()
        self._lock = threading.Lock()
        self._address = 0

    @property
    def address(self) -> int:
        """Return the machine code's address, compiling it if need be."""
        if not self._address:
            with self._lock:
                if not self._address:
                    self._use(_load(self) or _compile(self))
        return self._address

    def load(self) -> bool:
        """Load the machine code if it is kept on disk; return whether there is any now."""
        with self._lock:
            if not self._address and (kept := _load(self)):
                self._use(kept)
        return self._address != 0

    def _use(self, compiled: _Compiled) -> None:
        self._compiled = compiled
        self._call = _SIGNATURE(compiled.address)
        self._address = compiled.address

    def launch(self, num_items: int, items_per_chunk: int, **arguments: Any) -> None:
        """Run the kernel over ``num_items`` in chunks.

        Args:
            num_items: Where the last chunk ends.
            items_per_chunk: Size of the others.
            arguments: The kernel's own, by name: an int, or a tensor, array or ctypes value whose
                address is meant; None is 0.

        Raises:
            RuntimeError: The kernel's body raised, as a division by zero does.
        """
        num_chunks = -(-num_items // items_per_chunk)
        if arguments.keys() != self._names:
            expected, names = ", ".join(self._names), ", ".join(arguments)
            raise TypeError(f"{self.function.__qualname__} takes {expected}; got {names}")
        words = [
            value if type(value) is int else _WORD_OF.get(type(value), _word_of_other)(value)
            for value in map(arguments.__getitem__, self._names)
        ]
        state = array("q", [0, num_chunks, 0, num_items, items_per_chunk, 0, *words])
        pointer, _ = state.buffer_info()
        address = self._address or self.address
        num_threads = min(num_chunks, torch.get_num_threads())
        if num_threads == 1:
            self._call(pointer)
        elif num_threads > 1:
            _run_on_threads(self._call, address, pointer, num_threads)
        if state[_FAILED]:
            raise RuntimeError(f"{self.function.__qualname__} raised an exception in a chunk")


def _run_on_threads(
    call: Callable[[int], None], address: int, pointer: int, num_threads: int
) -> None:
    openmp = None if _forked else _gomp_parallel()
    if openmp is not None:
        openmp(address, pointer, num_threads, 0)
        return
    running: list[Future[None]] = []
    try:
        for _ in range(num_threads - 1):
            running.append(_thread_pool().submit(call, pointer))
        call(pointer)
    finally:  # whatever interrupts, nobody may use the memory of a launch after it
        wait(running)


def _word_of_other(value: Any) -> int:
    """Return the word of a value whose type is none of those in ``_WORD_OF``."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return int(value)


_CHUNK_VALUES = ("low", "high", "num_items", "chunk", "num_chunks", "next_chunk", "thread")


def compile_to_disk(kernel: Kernel) -> None:
    """Compile a kernel for others to load; for a process that does nothing else."""
    _compile(kernel)


def _load(kernel: Kernel) -> _Compiled | None:
    """Load a kernel from a disk cache that sees all kernel files."""
    with global_compiler_lock:
        result = _cache_of(kernel).load()
        return None if result is None else _Compiled.of(result, is_cached=True)


def _compile(kernel: Kernel) -> _Compiled:
    with global_compiler_lock:
        with kernel_cache.notice.compiling(), _without_collector():
            result = _compile_anew(kernel.function)
        _cache_of(kernel).save(result)
        return _Compiled.of(result, is_cached=False)


def _cache_of(kernel: Kernel) -> KernelCache:
    return KernelCache(kernel.function, kernel.constants, _signature_of(kernel.function))


def _signature_of(function: Callable[..., None]) -> Any:
    return types.void(*[types.int64] * len(inspect.signature(function).parameters))


@contextlib.contextmanager
def _without_collector():
    """Leave reference cycles alone: the compiler makes millions of objects, and few cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _compile_anew(function):
    signature = _signature_of(function)
    flags = compiler.Flags()
    cpu_target.options.parse_as_flags(flags, {})
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    result = compiler.compile_extra(
        cpu_target.typing_context,
        cpu_target.target_context,
        function,
        signature.args,
        signature.return_type,
        flags,
        locals={},
        pipeline_class=KernelCompiler,
    )
    _add_chunk_loop(result, list(inspect.signature(function).parameters))
    return result


class _Compiled(NamedTuple):
    library: Any  # keeps the machine code
    address: int
    is_cached: bool  # loaded from disk

    @classmethod
    def of(cls, result: Any, is_cached: bool) -> _Compiled:
        name = _LOOP_NAME + result.fndesc.llvm_func_name
        return cls(result.library, result.library.get_pointer_to_function(name), is_cached)


_LOOP_NAME = "chunk_loop."


def _add_chunk_loop(result, names):
    """Add the function that each thread runs: it calls the kernel until no chunk is left.

    It is written in LLVM's terms, since Numba would take half as long again for a second function
    around each kernel.
    """
    context, fndesc = result.target_context, result.fndesc
    module = context.create_module("chunk_loop")
    callee_type = context.call_conv.get_function_type(fndesc.restype, fndesc.argtypes)
    callee = ir.Function(module, callee_type, fndesc.llvm_func_name)
    loop_type = ir.FunctionType(ir.VoidType(), [_I64])
    loop = ir.Function(module, loop_type, _LOOP_NAME + fndesc.llvm_func_name)
    entry, head, body, done = (loop.append_basic_block(n) for n in ("", "head", "body", "done"))
    builder = ir.IRBuilder(entry)
    (state,) = loop.args

    def pointer_to(index):
        return builder.inttoptr(builder.add(state, _I64(8 * index)), _I64.as_pointer())

    def load(index):
        return builder.load(pointer_to(index), align=8)

    def take(index):
        return builder.atomic_rmw("add", pointer_to(index), _I64(1), "seq_cst")

    own = (name for name in names if name not in _CHUNK_VALUES)
    values = {name: load(_ARGUMENTS + i) for i, name in enumerate(own)}
    num_items, items_per_chunk = load(_NUM_ITEMS), load(_ITEMS_PER_CHUNK)
    num_chunks, thread = load(_NUM_CHUNKS), take(_NEXT_THREAD)
    takes_ahead = "next_chunk" in names
    first_chunk = take(_NEXT_CHUNK) if takes_ahead else None
    builder.branch(head)

    builder.position_at_end(head)
    if takes_ahead:
        chunk = builder.phi(_I64)
        chunk.add_incoming(first_chunk, entry)
    else:
        chunk = take(_NEXT_CHUNK)
    builder.cbranch(builder.icmp_signed("<", chunk, num_chunks), body, done)

    builder.position_at_end(body)
    low = builder.mul(chunk, items_per_chunk)
    high = builder.add(low, items_per_chunk)
    is_last = builder.icmp_signed(">", high, num_items)
    values |= {
        "low": low,
        "high": builder.select(is_last, num_items, high),
        "num_items": num_items,
        "chunk": chunk,
        "num_chunks": num_chunks,
        "thread": thread,
    }
    if takes_ahead:
        values["next_chunk"] = take(_NEXT_CHUNK)
    status, _ = context.call_conv.call_function(
        builder, callee, fndesc.restype, fndesc.argtypes, [values[name] for name in names]
    )
    with builder.if_then(status.is_error, likely=False):
        builder.store(_I64(1), pointer_to(_FAILED), align=8)
    if takes_ahead:
        chunk.add_incoming(values["next_chunk"], builder.block)
    builder.branch(head)

    builder.position_at_end(done)
    builder.ret_void()
    result.library.add_ir_module(module)


_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@functools.cache
def _gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Find the OpenMP entry point that torch has loaded, if it has a GNU-compatible one."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    found: Callable[[int, int, int, int], None] = entry
    return found


@functools.cache
def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="recis_lightning")


_BYTE = ctypes.c_char


def address_of(values: npt.NDArray[Any]) -> int:
    """Return where an array's data lies (three times as fast as ``array.ctypes.data``)."""
    try:
        return ctypes.addressof(_BYTE.from_buffer(values))
    except (TypeError, ValueError, BufferError):  # read-only, empty or strided
        address: int = values.__array_interface__["data"][0]
        return address


_WORD_OF: dict[type, Callable[[Any], int]] = {
    torch.Tensor: torch.Tensor.data_ptr,
    np.ndarray: address_of,
    ctypes.c_int64: ctypes.addressof,
    type(None): lambda _: 0,
}


def as_array(address: int, count: int) -> npt.NDArray[np.int64]:
    """View int64 at an address; whoever owns the memory keeps it alive."""
    buffer = (ctypes.c_int64 * int(count)).from_address(int(address))
    return np.ctypeslib.as_array(buffer)


def num_chunks(num_items: int, items_per_chunk: int) -> int:
    """Return how many chunks of ``items_per_chunk`` cover ``num_items``."""
    return -(-num_items // items_per_chunk)


class Workspace(threading.local):
    """Scratch arrays kept between steps, so that a steady step allocates (and faults) nothing."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}

    def take(self, name: str, size: int, dtype: type[np.generic]) -> npt.NDArray[np.generic]:
        """Return an uninitialised array of at least ``size`` items; the same one until it grows."""
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = np.empty(max(size + size // 4, 1024), dtype)
            self._arrays[name] = array
        return array


workspace = Workspace()
