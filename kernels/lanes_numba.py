"""What the CPU scans share: loops over LANES channels, one SIMD lane each."""

from __future__ import annotations

from statespan.kernels.fast_math import constant, given, inlined, prefetch, reordered, silu, softplus

LANES = 64
AHEAD = 8
"""Tokens ahead that rows are asked for: a block's piece of a row is too short for the processor to see the pattern."""


@inlined
def fill_lanes(lanes, source, at, count, missing):
    """lanes = source[at : at + count], and `missing` in lanes of no channel or where there is no source."""
    for j in range(LANES):
        lanes[j] = missing
    if given(source):
        for j in range(count):
            lanes[j] = source[at + j]


@inlined
def prefetch_lanes(pointer, at):
    """Ask for the LANES numbers from `at` on."""
    for j in range(0, LANES, 16):
        prefetch(pointer, at + j)


@inlined
def raw_steps(steps, dt, at, count, bias, with_softplus):
    """steps = softplus(dt + bias), or without softplus."""
    if with_softplus != 0:
        for j in range(count):
            steps[j] = softplus(dt[at + j] + bias[j])
    else:
        for j in range(count):
            steps[j] = dt[at + j] + bias[j]


@inlined
def drive_lanes(driven, out, steps, skip, x, at, count):
    """driven = Δ x and out = D x."""
    for j in range(count):
        driven[j] = steps[j] * x[at + j]
        out[j] = skip[j] * x[at + j]


@inlined
def gate_lanes(y, at, lanes, z, z_at, count):
    """y = lanes * silu(z), or without a gate."""
    if given(z):
        for j in range(count):
            y[at + j] = lanes[j] * silu(z[z_at + j])
    else:
        for j in range(count):
            y[at + j] = lanes[j]


@inlined
def clear_rows(y, at, rows, row, count):
    """Zeros in `count` lanes of `rows` rows that lie `row` apart."""
    for t in range(rows):
        for j in range(count):
            y[at + t * row + j] = constant(y, 0.0)


@reordered
def dot(a, a_at, b, b_at, count):
    """Σ a b"""
    total = constant(a, 0.0)
    for n in range(count):
        total += a[a_at + n] * b[b_at + n]
    return total
