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
def hand_on_code(tokens: int, programs: int, offset: int, next_offset: int, last: bool) -> str:
    """PTX of `hand_on`: operands are results h, then the next state's slot; decays, drives, slot, `places`.

    A slot is 64 bits, the carry and its number. The next state's is read here, before this one's recurrence, for it has
    mostly been there for long, and a read takes as long as the recurrence. `last`: of a tile. What comes after that
    would be put before the store, for it is long, and the next warp would wait for it: a branch that is never taken
    (no round has number 0) keeps it behind.
    """
    h, decay, drive = (lambda t, first=first: f"${first * tokens + t}" for first in (0, 2, 3))
    early, slot, source, target, expected, sent, elsewhere, far = (f"${i * tokens}" for i in (1, *range(4, 11)))
    late = [
        "mov.b64 {carry, seen}, slot;",
        f"setp.ne.b32 late, seen, {expected};",
        "vote.sync.any.pred late, late, 0xffffffff;",  # one answer for the warp: no divergence to mend
    ]
    lines = [
        "{ .reg .pred late, near; .reg .f32 carry; .reg .b32 seen; .reg .b64 slot;",
        f"mov.b64 slot, {slot};",
        *late,
        "@!late bra.uni there;",
        f"again: ld.volatile.shared.b64 slot, [{source} + {offset}];",
        *late,
        "@late bra.uni again;",
        "there:",
        *([] if last else [f"ld.volatile.shared.b64 {early}, [{source} + {next_offset}];"]),
        *(f"fma.rn.f32 {h(t)}, {decay(t)}, {h(t - 1) if t else 'carry'}, {drive(t)};" for t in range(tokens)),
        f"mov.b64 slot, {{{h(tokens - 1)}, {sent}}};",
    ]
    if programs == 1:
        lines.append(f"st.volatile.shared.b64 [{target} + {offset}], slot;")
    else:
        lines += [
            f"setp.eq.b32 near, {elsewhere}, 0;",
            f"@near st.volatile.shared.b64 [{target} + {offset}], slot;",
            f"@!near st.relaxed.cluster.b64 [{far} + {offset}], slot;",
        ]
    if last:
        lines += [
            "setp.eq.b32 late, seen, 0;", "vote.sync.any.pred late, late, 0xffffffff;", "@late bra.uni again;",
            f"mov.b64 {early}, 0;",
        ]  # fmt: skip
    return " ".join([*lines, "}"])


@constexpr_function
def hand_on_operands(tokens: int, programs: int) -> str:
    """The constraints of its operands"""
    kinds = ["=&f", "=&l", "f", "f", "l", "r", "r", "r", "r", *(["r", "l"] if programs > 1 else [])]
    return ",".join(kind for kind in kinds for _ in range(tokens))


@constexpr_function
def early_code(tokens: int) -> str:
    """PTX of `early`"""
    return f"ld.volatile.shared.b64 $0, [${tokens}];"


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
def early(source):
    """A thread's slot at `source` as it is now, in place 0 of axis 1"""
    T: tl.constexpr = source.shape[1]
    return gl.inline_asm_elementwise(early_code(T), "=l," * T + "r," * (T - 1) + "r", [source], gl.int64, False, T)


@jit
def hand_on(
    decay, drive, slot, places, OFFSET: tl.constexpr, NEXT: tl.constexpr, PROGRAMS: tl.constexpr, LAST: tl.constexpr
):
    """h_t = decay_t h_{t-1} + drive_t over a thread's tokens, axis 1, from the carry in its slot; its last h is left.

    slot: what stood there a while ago. Returns h, and the next state's slot. places: addresses of the warp's first slot
    and the next warp's, the round's number awaited, the number sent; in a cluster also whether the next warp is in
    another program, and the generic address there. OFFSET, NEXT: bytes from the first slots to those meant, and to the
    next state's.
    """
    T: tl.constexpr = decay.shape[1]
    CODE: tl.constexpr = hand_on_code(T, PROGRAMS, OFFSET, NEXT, LAST)
    types: tl.constexpr = (gl.float32, gl.int64)
    operands = (decay, drive, slot) + places  # noqa: RUF005 Triton compiles no unpacking within a tuple
    return gl.inline_asm_elementwise(CODE, hand_on_operands(T, PROGRAMS), operands, types, False, T)


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
def row_code(store: bool, rows: int, offset: int, pitch: int) -> str:
    """PTX of `read_rows`, `put_rows`"""
    places = [f"[${rows} + {offset + pitch * i}]" for i in range(rows)]
    if store:
        return " ".join(f"st.shared.u16 {at}, ${2 * rows + i}; mov.u32 ${i}, 0;" for i, at in enumerate(places))
    return " ".join(f"ld.shared.u16 ${i}, {at};" for i, at in enumerate(places))


@jit
def read_rows(address, OFFSET: tl.constexpr, PITCH: tl.constexpr):
    """For each element along axis 1 the 16 bits in its row: rows lie PITCH bytes apart, `address` is all rows' first"""
    R: tl.constexpr = address.shape[1]
    CODE: tl.constexpr = row_code(False, R, OFFSET, PITCH)
    return gl.inline_asm_elementwise(CODE, read_operands(R), [address], gl.int32, False, R)


@jit
def put_rows(address, numbers, OFFSET: tl.constexpr, PITCH: tl.constexpr):
    """The reverse"""
    R: tl.constexpr = address.shape[1]
    CODE: tl.constexpr = row_code(True, R, OFFSET, PITCH)
    NAMES: tl.constexpr = "=&r," * R + "r," * (2 * R - 1) + "r"
    gl.inline_asm_elementwise(CODE, NAMES, [address, numbers], gl.int32, False, R)


@jit
def copy_out(target, source, exists):
    """16 bytes for each element, which lanes of this warp have put there, from shared to global memory"""
    CODE: tl.constexpr = (
        "{ .reg .pred some; .reg .b32 a, b, c, d; bar.warp.sync 0xffffffff; setp.ne.b32 some, $3, 0; "
        "@some ld.shared.v4.b32 {a, b, c, d}, [$2]; @some st.global.v4.b32 [$1], {a, b, c, d}; mov.u32 $0, 0; }"
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
