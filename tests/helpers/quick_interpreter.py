"""Triton's interpreter, with what it finds out anew for each operation kept.

Types of blocks, shapes and NumPy's name of a type are a good part of an interpreted kernel's time,
and are the same in each of its programs. What an operation computes is left as it is. Written for
the version of Triton that the tests are pinned to; another one interprets in its own way.
"""

import inspect
import math

import numpy as np
import triton
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_VERSION = "3.9."

_np_dtype = interpreter._get_np_dtype
_block_type_init = core.block_type.__init__
_dtype_equals = core.dtype.__eq__
_broadcast = TritonSemantic.broadcast_impl_value
_check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_UINT64 = np.dtype(np.uint64)
_np_dtypes, _blocks, _shapes, _builtins = {}, {}, {}, {}


def install():
    """Change the interpreter of this process for good; once."""
    if not triton.__version__.startswith(_VERSION) or interpreter._get_np_dtype is not _np_dtype:
        return
    interpreter._get_np_dtype = _kept_np_dtype
    interpreter._patch_builtin = _patch_builtin
    interpreter.TensorHandle.__init__ = _init_handle
    core.block_type.__init__ = _init_block_type
    core.block_type.with_element_ty = _with_element_type
    core.tensor.__init__ = _init_tensor
    core.dtype.__eq__ = _is_dtype
    core.dtype.is_int = _is_in(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core.dtype.is_floating = _is_in(core.dtype.FP_TYPES)
    TritonSemantic.broadcast_impl_value = _broadcast_unlike
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow_if_told


def _kept_np_dtype(dtype):
    if isinstance(dtype, core.pointer_type):
        return _UINT64
    found = _np_dtypes.get(dtype.name)
    if found is None:
        found = _np_dtypes[dtype.name] = _np_dtype(dtype)
    return found


def _init_handle(self, data, dtype, attr=None):
    self.data = data
    self.dtype = dtype
    self.attr = {} if attr is None else attr
    if data.itemsize > 1:
        self.__post_init__()


def _init_block_type(self, element_ty, shape):
    try:
        key = (element_ty.name, *shape)
        kept = _blocks.get(key)
    except TypeError:  # sizes that are constants of the language
        key = kept = None
    if kept is not None and kept["element_ty"] is element_ty:
        self.__dict__.update(kept)
        return
    _block_type_init(self, element_ty, shape)
    self.sizes = (*self.shape,)
    if key is not None:
        _blocks[key] = dict(self.__dict__)


def _with_element_type(self, scalar_ty):
    return core.block_type(scalar_ty, [*self.sizes])


def _init_tensor(self, handle, type):
    sizes = type.sizes if isinstance(type, core.block_type) else ()
    kept = _shapes.get(sizes)
    if kept is None:
        shape = core.tuple([core.constexpr(size) for size in sizes])
        kept = _shapes[sizes] = (core.constexpr(math.prod(sizes)), shape)
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = kept


def _is_dtype(self, other):
    return self is other or _dtype_equals(self, other)


def _is_in(names):
    names = frozenset(names)
    return lambda self: self.name in names


def _broadcast_unlike(self, lhs, rhs):
    left, right = lhs.type, rhs.type
    if getattr(left, "sizes", None) == getattr(right, "sizes", None):  # two scalars have none
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def _check_overflow_if_told(self, lhs, rhs, binary_op):
    if self.builder.options.debug:  # or the sum is made, compared, and dropped
        _check_overflow(self, lhs, rhs, binary_op)


def _patch_builtin(package, builder, scope):
    members = _builtins.get(package)
    if members is None:
        members = _builtins[package] = [
            (name, _interpreted(member))
            for name, member in inspect.getmembers(package)
            if core.is_builtin(member)
        ]
    for name, member in members:
        scope.set_attr(package, name, member)


def _interpreted(member):
    semantic = interpreter.interpreter_semantic

    def interpreted(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    return interpreted
