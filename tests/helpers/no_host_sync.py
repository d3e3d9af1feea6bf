"""Detection of host syncs, on a machine without a GPU and with one."""

import sys
import warnings
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Ops whose result's size or value the host must know.
_READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_METHODS = ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")
# Functions that read what is on the host already: counts that arrived, and flags that only
# interpreted kernels set at once.
_ALLOWED = {
    ("header.py", "unacknowledged"),
    ("offset_check.py", "malformed_feature"),
}


class Waited(AssertionError):
    """The host would have waited for the device."""


def _check(what):
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if (code.co_filename.rsplit("/", 1)[-1], code.co_name) in _ALLOWED:
            return
        frame = frame.f_back
    raise Waited(f"the host would wait for a GPU: {what}")


def _checked(name):
    """Return a method of tensors that checks first; a function mode would not see backward."""
    method = getattr(torch.Tensor, name)

    def checked(self, *args, **kwargs):
        _check(name)
        return method(self, *args, **kwargs)

    return checked


class _NoOps(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in _READS:
            _check(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                _check(f"{name} with a mask")
        return function(*args, **(kwargs or {}))


def no_waiting():
    """Return a context in which anything that would make the host wait for a GPU raises ``Waited``.

    It runs over the CPU's memory, where a copy from pageable memory looks like any other: only
    ``torch.cuda.set_sync_debug_mode``, in the tests that need a GPU, detects those.
    """
    stack = ExitStack()
    stack.enter_context(_NoOps())
    for name in _METHODS:
        stack.enter_context(patch.object(torch.Tensor, name, _checked(name)))
    return stack


@contextmanager
def no_waiting_for_cuda():
    """Have torch raise where the host would wait for a GPU; afterwards it may, whatever happens."""
    try:
        with warnings.catch_warnings():
            # Torch sets the mode first and then warns of it, once a process.
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


__all__ = ["Waited", "no_waiting", "no_waiting_for_cuda"]
