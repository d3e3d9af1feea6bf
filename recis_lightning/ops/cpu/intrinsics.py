"""Intrinsics that Numba lacks: raw loads and stores, prefetch, atomics, float vectors.

Kernels work on addresses (int64), so that one launch can walk many tables through a pointer
table. Vectors are first-class values of ``width`` float32 lanes: LLVM maps them to whatever the
machine has (one AVX-512 register, two AVX2 ones, scalars), whatever its loop vectoriser thinks.
``width`` and ``bfloat16`` arguments are compile-time constants. Every vector operation is
element-wise IEEE float32, so a result does not depend on the width.

Signatures keep the literal types of those constants: Numba finds an intrinsic's code by the
signature's argument types, and would give one kernel the code made for another one's width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from recis_lightning.ops.cpu.pipeline import HelperCompiler

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()

# Decorator of functions that kernels call: LLVM inlines them, and no wrappers are compiled to call
# them from Python. Division is C's: Numba's own checks for a zero and so is not vectorised.
_OPTIONS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inlined: Any = njit(
    forceinline=True, error_model="numpy", pipeline_class=HelperCompiler, **_OPTIONS
)
# The same for functions with a loop over a row's bytes: Numba itself puts them into the kernel.
# LLVM would unroll their loops before it inlines them and once more afterwards: 4% of an
# evaluation lookup at dim 16.
expanded: Any = njit(inline="always", **_OPTIONS)


def _memory_ops(numba_type, llvm_type, align):
    """Return ``(load, store)`` intrinsics of a scalar type over an int64 address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], llvm_type.as_pointer())
            return builder.load(pointer, align=align)

        return numba_type(types.int64), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], llvm_type.as_pointer())
            builder.store(args[1], pointer, align=align)
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), codegen

    return load, store


load_i64, store_i64 = _memory_ops(types.int64, _I64, 8)
load_i32, store_i32 = _memory_ops(types.int32, _I32, 4)
load_u8, store_u8 = _memory_ops(types.uint8, _I8, 1)
load_f32, store_f32 = _memory_ops(types.float32, _F32, 4)
load_f64, store_f64 = _memory_ops(types.float64, ir.DoubleType(), 8)
# Words at any address, as within a string.
load_bytes_u64, _ = _memory_ops(types.uint64, _I64, 1)
load_bytes_u32, _ = _memory_ops(types.uint32, _I32, 1)


@intrinsic
def prefetch(typingctx, address):
    """Prefetch the cache line at ``address``; any address is safe."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        # The typed spelling: LLVM upgrades it by itself where pointers are opaque.
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _atomic(operation):
    @intrinsic
    def atomic(typingctx, address, value):
        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], _I64.as_pointer())
            return builder.atomic_rmw(operation, pointer, args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return atomic


@intrinsic
def high_product(typingctx, a, b):
    """Return the upper 64 bits of the product of two unsigned 64-bit integers."""

    def codegen(context, builder, sig, args):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), _I64)

    return types.uint64(types.uint64, types.uint64), codegen


atomic_add = _atomic("add")
atomic_min = _atomic("min")


@intrinsic
def compare_and_swap(typingctx, address, expected, desired):
    """Store ``desired`` if the memory holds ``expected``; return the value before."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        pair = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def compare_and_swap_u8(typingctx, address, expected, desired):
    """Compare and swap one byte."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        pair = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.uint8(types.int64, types.uint8, types.uint8), codegen


@intrinsic
def equal_words(typingctx, address, value):
    """Compare the eight int64 at ``address`` with ``value``; bit i of the result is word i's."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(_I64, 8)
        line = builder.load(builder.inttoptr(args[0], words.as_pointer()), align=8)
        first = builder.insert_element(ir.Constant(words, ir.Undefined), args[1], _I32(0))
        all_lanes = ir.Constant(ir.VectorType(_I32, 8), None)
        wanted = builder.shuffle_vector(first, first, all_lanes)
        same = builder.icmp_signed("==", line, wanted)
        return builder.zext(builder.bitcast(same, _I8), _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def stream_line(typingctx, target, source):
    """Copy 64 bytes past the caches; both addresses start a cache line.

    Other threads see them after the next atomic operation of this one.
    """

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(_I64, 8).as_pointer()
        target, source = (builder.inttoptr(address, kind) for address in args)
        store = builder.store(builder.load(source, align=64), target, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """Return the position of the lowest bit that is set; 64 if none is."""

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.int64), codegen


class FloatVector(types.Type):
    """``width`` float32 lanes."""

    def __init__(self, width):
        self.width = width
        super().__init__(name=f"float32x{width}")


@register_model(FloatVector)
class _FloatVectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(_F32, fe_type.width))


def _lanes(llvm_type, width):
    return ir.VectorType(llvm_type, width)


def _all(llvm_type, width, value):
    return ir.Constant(_lanes(llvm_type, width), [value] * width)


@intrinsic(prefer_literal=True)
def load_vector(typingctx, width, address):
    """Load ``width`` float32."""
    constants, width = (width,), width.literal_value

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[1], _lanes(_F32, width).as_pointer())
        return builder.load(pointer, align=4)

    return FloatVector(width)(*constants, types.int64), codegen


def _vector_store(streams):
    @intrinsic
    def store_lanes(typingctx, address, value):
        lanes = value.width

        def codegen(context, builder, sig, args):
            pointer = builder.inttoptr(args[0], _lanes(_F32, lanes).as_pointer())
            store = builder.store(args[1], pointer, align=4 * lanes if streams else 4)
            if streams:
                store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store_lanes


store_vector = _vector_store(False)
stream_vector = _vector_store(True)  # past the caches, as ``stream_line``; to aligned addresses


@intrinsic(prefer_literal=True)
def load_weights(typingctx, width, bfloat16, address):
    """Load ``width`` weights of a row, float32 or bfloat16, as float32."""
    constants = (width, bfloat16)
    width, bfloat16 = width.literal_value, bfloat16.literal_value

    def codegen(context, builder, sig, args):
        if not bfloat16:
            pointer = builder.inttoptr(args[2], _lanes(_F32, width).as_pointer())
            return builder.load(pointer, align=4)
        pointer = builder.inttoptr(args[2], _lanes(_I16, width).as_pointer())
        wide = builder.zext(builder.load(pointer, align=2), _lanes(_I32, width))
        return builder.bitcast(builder.shl(wide, _all(_I32, width, 16)), _lanes(_F32, width))

    return FloatVector(width)(*constants, types.int64), codegen


@intrinsic(prefer_literal=True)
def store_weights(typingctx, bfloat16, address, value):
    """Store weights of a row as float32, or as bfloat16 rounded to nearest even."""
    constants, width, bfloat16 = (bfloat16,), value.width, bfloat16.literal_value

    def codegen(context, builder, sig, args):
        if not bfloat16:
            pointer = builder.inttoptr(args[1], _lanes(_F32, width).as_pointer())
            builder.store(args[2], pointer, align=4)
            return context.get_dummy_value()
        bits = builder.bitcast(args[2], _lanes(_I32, width))
        sixteen = _all(_I32, width, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), _all(_I32, width, 1))
        rounded = builder.add(bits, builder.add(odd, _all(_I32, width, 0x7FFF)))
        quiet = builder.or_(bits, _all(_I32, width, 0x400000))
        is_nan = builder.fcmp_unordered("uno", args[2], args[2])
        kept = builder.lshr(builder.select(is_nan, quiet, rounded), sixteen)
        pointer = builder.inttoptr(args[1], _lanes(_I16, width).as_pointer())
        builder.store(builder.trunc(kept, _lanes(_I16, width)), pointer, align=2)
        return context.get_dummy_value()

    return types.void(*constants, types.int64, value), codegen


@intrinsic(prefer_literal=True)
def splat(typingctx, width, value):
    """Fill ``width`` lanes with one float32."""
    constants, width = (width,), width.literal_value

    def codegen(context, builder, sig, args):
        start = ir.Constant(_lanes(_F32, width), ir.Undefined)
        first = builder.insert_element(start, args[1], _I32(0))
        return builder.shuffle_vector(first, start, ir.Constant(_lanes(_I32, width), None))

    return FloatVector(width)(*constants, types.float32), codegen


@intrinsic
def load_like(typingctx, like, address):
    """Load as many float32 as ``like`` has lanes."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[1], _lanes(_F32, like.width).as_pointer())
        return builder.load(pointer, align=4)

    return like(like, types.int64), codegen


@intrinsic
def splat_like(typingctx, like, value):
    """Fill as many lanes as ``like`` has with one float32."""

    def codegen(context, builder, sig, args):
        start = ir.Constant(_lanes(_F32, like.width), ir.Undefined)
        first = builder.insert_element(start, args[1], _I32(0))
        lanes = ir.Constant(_lanes(_I32, like.width), None)
        return builder.shuffle_vector(first, start, lanes)

    return like(like, types.float32), codegen


@intrinsic
def lane_sum(typingctx, value):
    """Add up the lanes, in order, in float64."""

    def codegen(context, builder, sig, args):
        total = ir.Constant(ir.DoubleType(), 0.0)
        for lane in range(value.width):
            element = builder.extract_element(args[0], _I32(lane))
            total = builder.fadd(total, builder.fpext(element, ir.DoubleType()))
        return total

    return types.float64(value), codegen


def _vector_op(emit):
    @intrinsic
    def operation(typingctx, left, right):
        def codegen(context, builder, sig, args):
            return emit(builder, args[0], args[1])

        return left(left, right), codegen

    return operation


add = _vector_op(lambda builder, x, y: builder.fadd(x, y))
sub = _vector_op(lambda builder, x, y: builder.fsub(x, y))
mul = _vector_op(lambda builder, x, y: builder.fmul(x, y))
div = _vector_op(lambda builder, x, y: builder.fdiv(x, y))
# NaN stays NaN, as torch.clamp has it: the comparison fails and x is kept.
at_most = _vector_op(lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), y, x))
at_least = _vector_op(lambda builder, x, y: builder.select(builder.fcmp_ordered("<", x, y), y, x))


def _lane_function(builder, name, width, args):
    lanes = _lanes(_F32, width)
    kind = ir.FunctionType(lanes, [lanes] * len(args))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{width}f32")
    return builder.call(function, args)


@intrinsic
def fma(typingctx, left, right, addend):
    """``left * right + addend``, rounded once."""

    def codegen(context, builder, sig, args):
        return _lane_function(builder, "fma", left.width, args)

    return left(left, right, addend), codegen


@intrinsic
def sqrt(typingctx, value):
    """Take the square root of every lane."""

    def codegen(context, builder, sig, args):
        return _lane_function(builder, "sqrt", value.width, args)

    return value(value), codegen


@intrinsic
def sign(typingctx, value):
    """Return -1, 0 or 1 for every lane; NaN stays."""

    def codegen(context, builder, sig, args):
        zero, one, minus = (_all(_F32, value.width, number) for number in (0.0, 1.0, -1.0))
        negative = builder.fcmp_ordered("<", args[0], zero)
        below = builder.select(negative, minus, args[0])
        return builder.select(builder.fcmp_ordered(">", args[0], zero), one, below)

    return value(value), codegen


MAX_WIDTH = 16  # lanes


def vector_width(embedding_dim):
    """Return the widest lane count (``MAX_WIDTH`` at most) that divides ``embedding_dim``."""
    return next(width for width in (MAX_WIDTH, 8, 4, 2, 1) if embedding_dim % width == 0)


@intrinsic
def float_of_bits(typingctx, bits):
    """Read int32 bits as float32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(typingctx, value):
    """Read float32 as int32 bits."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen
