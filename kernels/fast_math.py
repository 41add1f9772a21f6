"""Elementary functions that a CPU kernel's inner loop can hold, so that the compiler turns it into SIMD.

    2^a = 2^k (1 + f P(f)),  k = round(a),  f = a - k in [-1/2, 1/2]
    log(1 + u) = 2 artanh(s) = 2 s (1 + s² Q(s²)),  s = u / (2 + u)

P and Q are minimax polynomials of ours, off by 9e-8 and 5e-9: about float32's own rounding, where the next degree of P
would cost the scan a tenth of its speed. 2^0 is exactly 1, so a step of 0 leaves a state as it is, bit for bit.

What is here is plain Python and tells what is meant; `numba_build` compiles it, and has its own words for the few
things Python cannot say. In float64 it takes libm's functions, which are exact and slow: float64 is for tests.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

Real = Any
"""In a kernel's signature: a pointer to float32 or float64, whichever it is compiled for. None arrives as null."""
Ints = Any
"""In a kernel's signature: a pointer to int64."""
Int = int
"""In a kernel's signature: int64."""
Float = float
"""In a kernel's signature: float64."""

F = TypeVar("F", bound=Callable[..., Any])
INLINED: list[tuple[Callable[..., Any], bool]] = []
"""Helpers a kernel may call, and whether their sums may be reordered."""

LOG2E = np.float32(math.log2(math.e))
LN2 = np.float32(0.693359375)  # ten bits: its product with an exponent is exact
LN2_REST = np.float32(math.log(2) - 0.693359375)
# adding and subtracting it rounds to an integer, and leaves that integer in the low bits
ROUNDER = np.float32(1.5 * 2**23)
EXPONENT = np.int32(23)
LOWEST, HIGHEST = np.float32(-126.0), np.float32(127.0)  # powers of two that are normal float32
EXP_LOWEST, EXP_HIGHEST = np.float32(-87.3), np.float32(88.0)
P1, P2, P3, P4, P5 = (np.float32(p) for p in (0.693146978, 0.240222421, 0.0555073373, 0.00967151276, 0.0013264731))
Q0, Q1, Q2, Q3 = (np.float32(q) for q in (0.333332065, 0.200108566, 0.139994425, 0.140129125))
ONE, TWO = np.float32(1.0), np.float32(2.0)


def inlined(function: F) -> F:
    """Let kernels call this function; it is compiled into each of them."""
    INLINED.append((function, False))
    return function


def reordered(function: F) -> F:
    """As `inlined`, and a sum over a loop may be taken in any order: needed to sum in SIMD."""
    INLINED.append((function, True))
    return function


def given(pointer: Real) -> bool:
    """Whether an optional tensor is there."""
    return pointer is not None


def shift(pointer: Real, by: Int) -> Real:
    """The pointer `by` numbers further on."""
    return pointer[by:]


def prefetch(pointer: Real, at: Int) -> None:
    """Ask for the cache line that holds pointer[at]; harmless beyond the end."""


def constant(like: Any, value: float) -> Any:
    """A number in the dtype of `like`, or of what it points to: a bare literal would turn a float32 loop to float64."""
    return type(like)(value)


def bits(x: Any) -> Any:
    """A float32's 32 bits as an integer."""
    return x.view(np.int32)


def from_bits(x: Any) -> Any:
    """The float32 with these bits."""
    return x.view(np.float32)


def larger(a: Any, b: Any) -> Any:
    """The larger number; b where a is NaN."""
    return a if a > b else b


def smaller(a: Any, b: Any) -> Any:
    """The smaller number; b where a is NaN."""
    return a if a < b else b


def exp2(x: Any) -> Any:
    """2^x, within 2^-126 and 2^127 in float32."""
    return 2.0**x


def decay(x: Any) -> Any:
    """2^x for x at most 127, which the caller sees to: one operation less where every one counts."""
    return 2.0**x


def exp(x: Any) -> Any:
    """e^x, within e^-87 and e^88 in float32."""
    return math.exp(x)


def log1p(u: Any) -> Any:
    """log(1 + u) for u in [0, 1]."""
    return math.log1p(u)


@inlined
def power(f, rounded):
    """2^k (1 + f P(f)); k sits in the low bits of `rounded` and is added to the exponent."""
    p = (((P5 * f + P4) * f + P3) * f + P2) * f + P1
    return from_bits(bits(p * f + ONE) + (bits(rounded) << EXPONENT))


@inlined
def exp2_single(x):
    """2^x in float32."""
    return decay_single(smaller(HIGHEST, x))  # in this order NaN passes


@inlined
def decay_single(x):
    """2^x in float32, x at most 127."""
    x = larger(LOWEST, x)
    rounded = x + ROUNDER
    return power(x - (rounded - ROUNDER), rounded)


@inlined
def exp_single(x):
    """e^x in float32; k log(2) is taken off in two parts, the first exact, so that no rounding grows with x."""
    x = smaller(EXP_HIGHEST, larger(EXP_LOWEST, x))
    rounded = x * LOG2E + ROUNDER
    k = rounded - ROUNDER
    return power(((x - k * LN2) - k * LN2_REST) * LOG2E, rounded)


@inlined
def log1p_single(u):
    """log(1 + u) in float32, u in [0, 1]."""
    s = u / (TWO + u)
    w = s * s
    return TWO * (s + s * (w * (((Q3 * w + Q2) * w + Q1) * w + Q0)))


@inlined
def softplus(x):
    """log(1 + e^x), which is x from 20 on as in torch."""
    tail = log1p(exp(-larger(x, -x)))
    return x if x > constant(x, 20.0) else larger(constant(x, 0.0), x) + tail


@inlined
def silu(x):
    """x / (1 + e^-x)"""
    return x / (exp(-x) + constant(x, 1.0))
