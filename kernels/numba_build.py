"""Kernel in Python to object code by numba; imported only when the cache on disk does not have it.

The object holds one C function and depends on libm alone: no Python, no numba runtime, no allocation. So a process
that finds it in the cache needs llvmlite to load it and not numba, whose import takes longer than a prompt's prefill.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import overload, register_jitable

from statespan.kernels import fast_math

intrinsic: Any = numba.extending.intrinsic  # its own types deny the call that its decorator makes possible

# products and sums may fuse; nothing may be reordered, or the rounding trick of exp2 would fold to nothing
OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy", "forceinline": True}

LIBRARY = {"memset", "memcpy", "memmove", "exp", "exp2", "log1p", "sqrt", "sqrtf"}


@intrinsic
def _given(typing, pointer):
    def generate(context, builder, signature, args):
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), generate


@intrinsic
def _shift(typing, pointer, by):
    def generate(context, builder, signature, args):
        return builder.gep(args[0], [args[1]], source_etype=context.get_value_type(pointer.dtype))

    return pointer(pointer, types.int64), generate


@intrinsic
def _prefetch(typing, pointer, at):
    def generate(context, builder, signature, args):
        i32 = ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", (ir.PointerType(),), ir.FunctionType(ir.VoidType(), [ir.PointerType(), i32, i32, i32])
        )
        address = builder.gep(args[0], [args[1]], source_etype=context.get_value_type(pointer.dtype))
        builder.call(hint, [address, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.none(pointer, types.int64), generate


@intrinsic
def _bits(typing, x):
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic
def _from_bits(typing, x):
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


def _select(order: str) -> Any:
    @intrinsic
    def choose(typing, a, b):
        def generate(context, builder, signature, args):
            return builder.select(builder.fcmp_ordered(order, *args), *args)

        return (a(a, b), generate) if a == b else None

    return choose


_larger, _smaller = _select(">"), _select("<")
overload(fast_math.given)(lambda pointer: lambda pointer: _given(pointer))
overload(fast_math.shift)(lambda pointer, by: lambda pointer, by: _shift(pointer, by))
overload(fast_math.prefetch)(lambda pointer, at: lambda pointer, at: _prefetch(pointer, at))
overload(fast_math.bits)(lambda x: lambda x: _bits(x))
overload(fast_math.from_bits)(lambda x: lambda x: _from_bits(x))
overload(fast_math.larger)(lambda a, b: lambda a, b: _larger(a, b))
overload(fast_math.smaller)(lambda a, b: lambda a, b: _smaller(a, b))


@overload(fast_math.constant)
def _constant(like, value):
    real = getattr(like, "dtype", like)
    return lambda like, value: real(value)


@overload(fast_math.exp2)
def _exp2(x):
    return (lambda x: fast_math.exp2_single(x)) if x == types.float32 else (lambda x: math.exp2(x))


@overload(fast_math.decay)
def _decay(x):
    return (lambda x: fast_math.decay_single(x)) if x == types.float32 else (lambda x: math.exp2(x))


@overload(fast_math.exp)
def _exp(x):
    return (lambda x: fast_math.exp_single(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(fast_math.log1p)
def _log1p(u):
    return (lambda u: fast_math.log1p_single(u)) if u == types.float32 else (lambda u: math.log1p(u))


def build(kernel: Callable[..., None], kinds: list[str], real: str, machine: llvm.TargetMachine) -> bytes:
    """Object code with the C function `kernel.__name__`, its pointers to `real` ("float32" or "float64")."""
    while fast_math.INLINED:
        helper, reorder = fast_math.INLINED.pop()
        register_jitable(**OPTIONS | ({"fastmath": {"contract", "reassoc"}} if reorder else {}))(helper)
    numbers = {"Int": types.int64, "Float": types.float64}
    ctypes = {"Real": types.CPointer(getattr(types, real)), "Ints": types.CPointer(types.int64), **numbers}
    compiled = numba.cfunc(types.void(*(ctypes[kind] for kind in kinds)), **OPTIONS)(kernel)
    module = llvm.parse_assembly(compiled.inspect_llvm())
    module.get_function(compiled.native_name).name = kernel.__name__
    _check_independent(module)
    return bytes(machine.emit_object(module))


def _check_independent(module: llvm.ModuleRef) -> None:
    """Nothing but libc and libm may be left to find at load time: a helper that was not inlined would drag numba in."""
    unknown = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - LIBRARY
    if unknown:
        raise AssertionError(f"kernel object code depends on {sorted(unknown)}")
