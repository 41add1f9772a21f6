"""Warps of a program hand a recurrence on to each other without a barrier: in PTX, for Gluon has no words for it.

Each warp owns a tile of time, warp w + 1 the tile after warp w's. A carry travels as one word of shared memory for each
lane and channel with a round number behind it, written in one store: the reader polls until the number is the one it
waits for. Warps drift apart as far as their carries let them, so one warp's exponentials fill another's waiting. A slot
is overwritten a round later, by a warp that itself waited, around the whole ring, for what the slot's reader did next.

All addresses are 32-bit shared ones; `global_smem` is the symbol under which Triton keeps a kernel's shared memory, and
the ring's allocation, alone in its kernel, starts there. Only a GPU runs these functions: see STAGED in the kernels.
"""

from __future__ import annotations

import triton.language as tl

from statespan.kernels.gluon_frontend import gl, jit


def hand_on_code(tokens: int, channels: int) -> tuple[str, str]:
    """PTX and constraints of `hand_on`: results h, then decays, then drives, each channel by channel; then integers."""
    width = 2 if channels == 1 else 4  # words of a slot: the carries, the round's number, unused
    h, decay, drive = (lambda c, t, first=first: f"${(first * channels + c) * tokens + t}" for first in range(3))
    source, target, expected, sent = (f"${(3 * channels + i) * tokens}" for i in range(4))
    carries = [f"carry{c}" for c in range(channels)]
    unused = ["unused"] * (width - channels - 1)
    lines = [
        f"{{ .reg .pred late; .reg .b32 seen, unused; .reg .f32 {', '.join(carries)};",
        "again:",
        f"ld.volatile.shared.v{width}.b32 {{{', '.join([*carries, 'seen', *unused])}}}, [{source}];",
        f"setp.ne.b32 late, seen, {expected};",
        "vote.sync.any.pred late, late, 0xffffffff;",  # one answer for the warp: no divergence to mend
        "@late bra again;",
    ]
    for t in range(tokens):
        for c in range(channels):
            before = h(c, t - 1) if t else carries[c]
            lines.append(f"fma.rn.f32 {h(c, t)}, {decay(c, t)}, {before}, {drive(c, t)};")
    words = [*(h(c, tokens - 1) for c in range(channels)), sent, *([sent] * len(unused))]
    lines.append(f"st.volatile.shared.v{width}.b32 [{target}], {{{', '.join(words)}}}; }}")
    return " ".join(lines), ",".join(
        ["=&f"] * (channels * tokens) + ["f"] * (2 * channels * tokens) + ["r"] * (4 * tokens)
    )


def read_code(tokens: int) -> tuple[str, str]:
    """PTX and constraints of `read`."""
    loads = (
        f"ld.shared.v4.f32 {{{', '.join(f'${at + i}' for i in range(4))}}}, [${tokens} + {4 * at}];"
        for at in range(0, tokens, 4)
    )
    return " ".join(loads), ",".join(["=&f"] * tokens + ["r"] * tokens)


@jit
def shared_base(like):
    """Address of the program's shared memory, in every element of an integer tensor"""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [like], gl.int32, True, 1)


@jit
def hand_on(decays, drives, source, target, expected, sent, T: tl.constexpr, CODE: tl.constexpr, NAMES: tl.constexpr):
    """h_t = decay_t h_{t-1} + drive_t over a thread's T tokens, from the carry in `source`; the last h to `target`.

    decays, drives: tuples of one or two tensors, a thread's channels. Returns a tuple alike.
    """
    if len(decays) == 1:
        operands = [decays[0], drives[0], source, target, expected, sent]
        found = (gl.inline_asm_elementwise(CODE, NAMES, operands, gl.float32, False, T),)
    else:
        operands = [decays[0], decays[1], drives[0], drives[1], source, target, expected, sent]
        found = gl.inline_asm_elementwise(CODE, NAMES, operands, (gl.float32, gl.float32), False, T)
    return found


@jit
def put(address, word):
    """Store a 32-bit word"""
    gl.inline_asm_elementwise(
        "st.volatile.shared.b32 [$1], $2; mov.u32 $0, $1;", "=r,r,r", [address, word], gl.int32, False, 1
    )


@jit
def await_word(word_at, number_at, number):
    """The float at `word_at` once the round's number at `number_at` is `number`"""
    CODE: tl.constexpr = (
        "{ .reg .pred late; .reg .b32 seen; again: ld.volatile.shared.b32 seen, [$2]; setp.ne.b32 late, seen, $3; "
        "@late bra again; ld.volatile.shared.b32 $0, [$1]; }"
    )
    return gl.inline_asm_elementwise(CODE, "=&f,r,r,r", [word_at, number_at, number], gl.float32, False, 1)


@jit
def read(address, T: tl.constexpr, CODE: tl.constexpr, NAMES: tl.constexpr):
    """T consecutive floats for each thread, whose address stands in each of its T elements"""
    return gl.inline_asm_elementwise(CODE, NAMES, [address], gl.float32, False, T)


@jit
def copy_quads(target, source, one):
    """Begin to copy 16 bytes for each element from global to shared memory; `one` has one element a thread"""
    gl.inline_asm_elementwise(
        "cp.async.ca.shared.global [$1], [$2], 16; mov.u32 $0, 0;", "=r,r,l", [target, source.to(gl.int64)],
        gl.int32, False, 1,
    )  # fmt: skip
    gl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [one], gl.int32, False, 1)


@jit
def await_quads(one):
    """Until what this warp's lanes have begun to copy is there for all of them"""
    CODE: tl.constexpr = "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(CODE, "=r,r", [one], gl.int32, False, 1)


@jit
def from_lane(v, lane):
    CODE: tl.constexpr = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return gl.inline_asm_elementwise(CODE, "=f,f,r", [v, lane], gl.float32, True, 1)


@jit
def across(v, DISTANCE: tl.constexpr):
    """What the lane whose number differs in this bit holds"""
    CODE: tl.constexpr = "shfl.sync.bfly.b32 $0, $1, " + DISTANCE + ", 31, 0xffffffff;"
    return gl.inline_asm_elementwise(CODE, "=f,f", [v], gl.float32, True, 1)
