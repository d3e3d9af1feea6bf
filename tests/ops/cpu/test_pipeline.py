"""Numba's pipeline for kernels: what functions that they call are, and what the code computes."""

import gc

import numpy as np
import pytest
from numba.core.errors import TypingError

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import inlined, load_i64, store_i64


@inlined
def _double(x):
    return x + x


@inlined
def _sum_of_doubles(values, n):
    total = np.int64(0)
    for i in range(n):
        total += _double(load_i64(values + 8 * i))
    return total, n


@inlined
def _asks_for_text(x):
    return x.upper()


@runtime.kernel_template
def _total_kernel(skips):
    def total(low, high, values, out):
        for i in range(low, high):
            if skips:
                continue
            found, n = _sum_of_doubles(values, i + 1)
            store_i64(out + 8 * i, found * n)

    return total


@runtime.kernel
def _wrong_kernel(low, high, out):
    store_i64(out, _asks_for_text(low + high))


@pytest.fixture(autouse=True)
def _keep_nothing(monkeypatch):
    """Kernels compile anew in each test."""
    monkeypatch.setattr(runtime.KernelCache, "load", lambda cache: None)
    monkeypatch.setattr(runtime.KernelCache, "save", lambda cache, result: None)


def test_functions_that_call_functions_are_linked_into_a_kernel():
    values, out = np.arange(5), np.zeros(5, np.int64)
    kernel = runtime.Kernel(_total_kernel(0).function, (0,))
    kernel.launch(5, 2, values=values, out=out)
    assert out.tolist() == [0, 4, 18, 48, 100]


def test_branches_on_constants_are_left_out():
    """So that what another constant asks for need not have the right types."""
    out = np.zeros(3, np.int64)
    runtime.Kernel(_total_kernel(1).function, (1,)).launch(3, 2, values=None, out=out)
    assert out.tolist() == [0, 0, 0]


def test_such_functions_have_no_machine_code_of_their_own():
    runtime.Kernel(_total_kernel(0).function, (0,)).launch(0, 1, values=None, out=None)
    (compiled,) = _double.overloads.values()
    assert compiled.library.codegen._engine.is_symbol_defined(compiled.fndesc.llvm_func_name) == 0


@pytest.mark.filterwarnings("ignore::numba.NumbaWarning")
def test_types_that_do_not_fit_are_told():
    with pytest.raises(TypingError, match="upper"):
        _wrong_kernel.launch(1, 1, out=np.zeros(1, np.int64))


@pytest.mark.filterwarnings("ignore::numba.NumbaWarning")
def test_the_collector_runs_again_after_a_compilation():
    assert gc.isenabled()
    with pytest.raises(TypingError):
        _wrong_kernel.launch(1, 1, out=np.zeros(1, np.int64))
    assert gc.isenabled()
