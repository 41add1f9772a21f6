"""Warps of a program hand a recurrence on to each other without a barrier: in PTX, for Gluon has no words for it.

Each warp owns a tile of time, warp w + 1 the tile after warp w's. A carry travels as one word of shared memory for each
lane and channel with a round number behind it, one 64-bit value: the reader polls until the number is the one it waits
for. Warps drift apart as far as their carries let them, so one warp's exponentials fill another's waiting. A slot is
overwritten a round later, by a warp that itself waited, around the whole ring, for what the slot's reader did next.

The programs of a cluster may share a ring. Then each one's last warp writes into the next one's shared memory; all
reading stays at home, so that a program may end once its own last carries have come.

Addresses are 32-bit shared ones, but for those in another program; `global_smem` is the symbol under which Triton keeps
a kernel's shared memory, and the ring's allocation, alone in its kernel, starts there. Only a GPU runs these functions:
see STAGED in the kernels.
"""

from __future__ import annotations

import triton.language as tl

from statespan.kernels.gluon_frontend import barrier, constexpr_function, gl, jit


@constexpr_function
def hand_on_code(
    tokens: int, channels: int, programs: int, offset: int, next_offset: int, last: bool, ahead: bool
) -> str:
    """PTX of `hand_on`: results h, channel by channel, then the slots read early; decays, drives, slots; `places`.

    A slot is 64 bits, the carry and its number. `ahead`: the next state's is read here, before this one's recurrence,
    for a read takes as long as that; but where it is rarely there by then, it is read twice. `last`: of a tile. What
    comes after that would be put before the store, for it is long, and the next warp would wait for it: a branch that
    is never taken (no round has number 0) keeps it behind.
    """
    h, early, decay, drive, slot = (
        lambda c, t=0, first=first: f"${(first * channels + c) * tokens + t}" for first in range(5)
    )
    source, target, expected, sent, elsewhere, far = (f"${(5 * channels + i) * tokens}" for i in range(6))
    each = range(channels)
    vector = "" if channels == 1 else f".v{channels}"
    slots = ", ".join(f"slot{c}" for c in each)
    late = [
        f"setp.ne.b32 late, seen0, {expected};",
        *(f"setp.ne.or.b32 late, seen{c}, {expected}, late;" for c in each[1:]),
        "vote.sync.any.pred late, late, 0xffffffff;",  # one answer for the warp: no divergence to mend
    ]
    taken_apart = [f"mov.b64 {{carry{c}, seen{c}}}, slot{c};" for c in each]
    looked_at = [*(f"mov.b64 slot{c}, {slot(c)};" for c in each), *taken_apart, *late, "@!late bra.uni there;"]
    lines = [
        "{ .reg .pred late, near;",
        *(f".reg .f32 carry{c}; .reg .b32 seen{c}; .reg .b64 slot{c};" for c in each),
        *(looked_at if ahead else []),
        f"again: ld.volatile.shared{vector}.b64 {{{slots}}}, [{source} + {offset}];",
        *taken_apart,
        *late,
        "@late bra.uni again;",
        "there:",
    ]
    if ahead and not last:
        lines.append(
            f"ld.volatile.shared{vector}.b64 {{{', '.join(early(c) for c in each)}}}, [{source} + {next_offset}];"
        )
    for t in range(tokens):
        lines += [
            f"fma.rn.f32 {h(c, t)}, {decay(c, t)}, {h(c, t - 1) if t else f'carry{c}'}, {drive(c, t)};" for c in each
        ]
    lines += [f"mov.b64 slot{c}, {{{h(c, tokens - 1)}, {sent}}};" for c in each]
    if programs == 1:
        lines.append(f"st.volatile.shared{vector}.b64 [{target} + {offset}], {{{slots}}};")
    else:
        lines += [
            f"setp.eq.b32 near, {elsewhere}, 0;",
            f"@near st.volatile.shared{vector}.b64 [{target} + {offset}], {{{slots}}};",
            f"@!near st.relaxed.cluster{vector}.b64 [{far} + {offset}], {{{slots}}};",
        ]
    if last:
        lines += ["setp.eq.b32 late, seen0, 0;", "vote.sync.any.pred late, late, 0xffffffff;", "@late bra.uni again;"]
    if last or not ahead:
        lines += [f"mov.b64 {early(c)}, 0;" for c in each]
    return " ".join([*lines, "}"])


@constexpr_function
def hand_on_operands(tokens: int, channels: int, programs: int) -> str:
    """The constraints of its operands"""
    results = ["=&f"] * (channels * tokens) + ["=&l"] * (channels * tokens)
    found = results + ["f"] * (2 * channels * tokens) + ["l"] * (channels * tokens)
    return ",".join(found + ["r"] * (4 * tokens) + (["r"] * tokens + ["l"] * tokens if programs > 1 else []))


@constexpr_function
def early_code(tokens: int, channels: int) -> str:
    """PTX of `early`"""
    vector, results = "" if channels == 1 else f".v{channels}", ", ".join(f"${c * tokens}" for c in range(channels))
    return f"ld.volatile.shared{vector}.b64 {{{results}}}, [${channels * tokens}];"


@constexpr_function
def read_code(tokens: int, offset: int) -> str:
    """PTX of `read`"""
    return " ".join(
        f"ld.shared.v4.b32 {{{', '.join(f'${at + i}' for i in range(4))}}}, [${tokens} + {offset + 4 * at}];"
        for at in range(0, tokens, 4)
    )


@constexpr_function
def read_operands(tokens: int) -> str:
    return ",".join(["=&r"] * tokens + ["r"] * tokens)


@jit
def shared_base(like):
    """Address of the program's shared memory, in every element of an integer tensor"""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [like], gl.int32, True, 1)


@jit
def in_program(address, rank):
    """Generic address of the same place of shared memory in another program of the cluster"""
    CODE: tl.constexpr = "{ .reg .b64 here; cvt.u64.u32 here, $1; cvta.shared.u64 here, here; mapa.u64 $0, here, $2; }"
    return gl.inline_asm_elementwise(CODE, "=l,r,r", [address, rank], gl.int64, True, 1)


@jit
def together(one, PROGRAMS: tl.constexpr):
    """All warps of the ring have come here, and see what the others wrote; `one` has one element a thread"""
    if PROGRAMS == 1:
        barrier()
    else:
        CODE: tl.constexpr = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.u32 $0, 0;"
        gl.inline_asm_elementwise(CODE, "=r,r", [one], gl.int32, False, 1)


@jit
def early(source, EACH: tl.constexpr):
    """A tuple: a thread's slots at `source` as they are now, one for each of its channels, in places 0 of axis 1"""
    T: tl.constexpr = source.shape[1]
    CODE: tl.constexpr = early_code(T, EACH)
    if EACH == 1:
        found = (gl.inline_asm_elementwise(CODE, "=l," * T + "r," * (T - 1) + "r", [source], gl.int64, False, T),)
    else:
        types: tl.constexpr = (gl.int64, gl.int64)
        found = gl.inline_asm_elementwise(CODE, "=l," * (2 * T) + "r," * (T - 1) + "r", [source], types, False, T)
    return found


@jit
def hand_on(
    decays, drives, slots, places, OFFSET: tl.constexpr, NEXT: tl.constexpr, PROGRAMS: tl.constexpr, LAST: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """h_t = decay_t h_{t-1} + drive_t over a thread's tokens, axis 1, from the carry in its slot; its last h is left.

    decays, drives, slots: tuples of one or two tensors, a thread's channels; slots: what stood there a while ago, if
    AHEAD. Returns h, a tuple alike, and the next state's slots. places: addresses of the warp's first slot and the
    next warp's, the round's number awaited, the number sent; in a cluster also whether the next warp is in another
    program, and the generic address there. OFFSET, NEXT: bytes from the first slots to those meant, and to the next
    state's.
    """
    T: tl.constexpr = decays[0].shape[1]
    CODE: tl.constexpr = hand_on_code(T, len(decays), PROGRAMS, OFFSET, NEXT, LAST, AHEAD)
    NAMES: tl.constexpr = hand_on_operands(T, len(decays), PROGRAMS)
    if len(decays) == 1:
        types: tl.constexpr = (gl.float32, gl.int64)
        h, slot = gl.inline_asm_elementwise(CODE, NAMES, decays + drives + slots + places, types, False, T)
        found = ((h,), (slot,))
    else:
        pairs: tl.constexpr = (gl.float32, gl.float32, gl.int64, gl.int64)
        first, second, slot, other = gl.inline_asm_elementwise(
            CODE, NAMES, decays + drives + slots + places, pairs, False, T
        )
        found = ((first, second), (slot, other))  # type: ignore[assignment]
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
def read(address, OFFSET: tl.constexpr):
    """T consecutive words for each thread, whose address stands in each of its elements along axis 1"""
    T: tl.constexpr = address.shape[1]
    return gl.inline_asm_elementwise(read_code(T, OFFSET), read_operands(T), [address], gl.int32, False, T)


@jit
def copy_quads(target, source, one):
    """Begin to copy 16 bytes for each element from global to shared memory; `one` has one element a thread"""
    gl.inline_asm_elementwise(
        "cp.async.ca.shared.global [$1], [$2], 16; mov.u32 $0, 0;", "=r,r,l", [target, source.to(gl.int64)],
        gl.int32, False, 1,
    )  # fmt: skip
    gl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [one], gl.int32, False, 1)


@jit
def copy_rows(target, source, exists):
    """As `copy_quads`, which is to follow, for what is read once: past L1; zeros where `exists` is 0"""
    CODE: tl.constexpr = (
        "{ .reg .pred none; setp.eq.b32 none, $3, 0; cp.async.cg.shared.global [$1], [$2], 16, none; mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(CODE, "=r,r,l,r", [target, source, exists], gl.int32, False, 1)


@constexpr_function
def row_code(store: bool, rows: int, offset: int, pitch: int, bits: int) -> str:
    """PTX of `read_rows`, `put_rows`"""
    places = [f"[${rows} + {offset + pitch * i}]" for i in range(rows)]
    if store:
        return " ".join(f"st.shared.u{bits} {at}, ${2 * rows + i}; mov.u32 ${i}, 0;" for i, at in enumerate(places))
    return " ".join(f"ld.shared.u{bits} ${i}, {at};" for i, at in enumerate(places))


@jit
def read_rows(address, OFFSET: tl.constexpr, PITCH: tl.constexpr, BITS: tl.constexpr):
    """For each element along axis 1 the number in its row: rows lie PITCH bytes apart, `address` is all rows' first"""
    R: tl.constexpr = address.shape[1]
    CODE: tl.constexpr = row_code(False, R, OFFSET, PITCH, BITS)
    return gl.inline_asm_elementwise(CODE, read_operands(R), [address], gl.int32, False, R)


@jit
def put_rows(address, numbers, OFFSET: tl.constexpr, PITCH: tl.constexpr, BITS: tl.constexpr):
    """The reverse"""
    R: tl.constexpr = address.shape[1]
    CODE: tl.constexpr = row_code(True, R, OFFSET, PITCH, BITS)
    NAMES: tl.constexpr = "=&r," * R + "r," * (2 * R - 1) + "r"
    gl.inline_asm_elementwise(CODE, NAMES, [address, numbers], gl.int32, False, R)


@jit
def copy_out(target, source, exists):
    """16 bytes for each element, which lanes of this warp have put there, from shared to global memory"""
    CODE: tl.constexpr = (
        "{ .reg .pred some; .reg .b32 a, b, c, d; bar.warp.sync 0xffffffff; ld.shared.v4.b32 {a, b, c, d}, [$2]; "
        "setp.ne.b32 some, $3, 0; @some st.global.v4.b32 [$1], {a, b, c, d}; mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(CODE, "=r,l,r,r", [target, source, exists], gl.int32, False, 1)


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
