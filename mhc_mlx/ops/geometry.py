"""How launches are cut: pure functions of shapes, and the literals that measurements gave."""

import functools
import math
from typing import NamedTuple

import mlx.core as mx

# Measured on an H100 (benchmarks/). Copies of a token: 1 is x, 2 is x and dout. A thread of an
# Apple GPU has 128 registers, hence the smaller limit there.
REGISTER_BYTES = {("metal", 1): 256, ("cuda", 1): 256, ("metal", 2): 256, ("cuda", 2): 512}
FORWARD_GROUPS = 4096  # fills any GPU; fewer threadgroups than tokens share coefficients
MANY_GROUPS = 1 << 16  # where a threadgroup fetches next to nothing before its first token
BACKWARD_THREADS = 132 * 512  # what an H100 holds at 128 registers; a group leaves a row of sums
FEW_TOKENS = 1024  # up to here small tiles: at 2048 they take 60 us, large ones 43 (C = 4096)
LONG = 1 << 14  # n * C from which 16 slices take 35 instead of these 43 us
SWEEP_TOKENS = 16  # up to here many threadgroups share a token's projection: half the time
RING_STAGES = 2  # 354 us at (65536, 4, 1024), registers instead 408
FILLING_GROUPS = 264  # two for each multiprocessor of an H100
ONE_LAUNCH_TOKENS = 1024  # up to here every threadgroup of `mhc_layer` projects H_res itself


class Geometry(NamedTuple):
    vec: int
    threads: int
    passes: int
    fits: bool


@functools.cache
def of_token(
    n: int, C: int, size: int, copies: int, threads_per_group: int | None, backend: str
) -> Geometry:
    """How a threadgroup takes a token of n x C elements of ``size`` bytes.

    vec: Neighbours per load: up to 16 bytes, dividing C, few enough for the sums of n streams.
    threads: One per vec, a multiple of 32, at most 256 (128 where sums fill the registers).
    passes: How often they go over a stream.
    fits: Whether ``copies`` of a token stay in registers; n > 8 would unroll n * n loops.
    """
    vec = math.gcd(C, 16 // size)
    while n * vec > 64:
        vec //= 2
    crowded = copies == 2 and 4 < n <= 8
    widths, most = (vec, min(vec, 4)) if crowded else (vec,), 128 if crowded and size == 4 else 256
    for vec in widths:
        packs = C // vec
        threads = threads_per_group or 32 * math.ceil(packs / math.ceil(packs / most) / 32)
        passes = math.ceil(packs / threads)
        held = passes * copies * n * (max(4, vec * size) if copies == 1 else 4 * vec)
        fits = n <= 8 and held <= REGISTER_BYTES[backend, copies]
        if fits:
            break
    return Geometry(vec, threads, passes, fits)


def of_seam(n: int, C: int, size: int, threads_per_group: int | None, backend: str) -> Geometry:
    """How a threadgroup takes a token in `mhc_seam`: on CUDA in the fewest passes of up to 320
    threads, 85 instead of 99 us at (2048, 4, 5120) and 114 instead of 122 at C = 7168."""
    g = of_token(n, C, size, 1, threads_per_group, backend)
    if threads_per_group or backend != "cuda":
        return g
    packs = C // g.vec
    threads = 32 * math.ceil(packs / math.ceil(packs / 320) / 32)
    return g._replace(threads=threads, passes=math.ceil(packs / threads))


def of_seam_backward(n: int, C: int, size: int, threads_per_group: int | None) -> Geometry:
    """How a threadgroup takes a token in `mhc_seam_backward`, whose n (n + 2) sums leave registers
    for few channels at once: for 128 in all, what a GPU wants, where n <= 4."""
    vec = math.gcd(C, 16 // size)
    while n * vec > 16:
        vec //= 2
    packs = C // vec
    threads = threads_per_group or 32 * math.ceil(packs / math.ceil(packs / 256) / 32)
    passes = math.ceil(packs / threads)
    return Geometry(vec, threads, passes, passes == 1)


def even(count: int, most: int) -> int:
    """At most ``most`` threadgroups, each with as many turns."""
    return math.ceil(count / max(1, math.ceil(count / most)))


def of_sum(rows: int, columns: int) -> int:
    """Threads that share a column in `sum_partials`: many only where there are few columns."""
    return 64 if rows >= 64 and columns < 1 << 14 else 8


def _power(most: int) -> int:
    """The largest power of two up to that: bodies are compiled for how many threadgroups share
    work, so that few numbers must occur."""
    return 1 << (most.bit_length() - 1)


class Projection(NamedTuple):
    vec: int
    threads: int
    slices: int  # of k, each a simdgroup's
    tiles: int  # of 8 tokens, of a simdgroup
    block: int  # tiles of 8 outputs at once
    splits: int  # threadgroups that share the outputs of a token

    @property
    def tokens(self) -> int:  # of a threadgroup
        return 8 * self.tiles * (self.threads // 32 // self.slices)


@functools.cache
def of_projection(
    n: int, C: int, dtype: mx.Dtype, outs: int, tokens: int, threads: int | None, room: int
) -> Projection:
    """How `mhc_pre` multiplies. Slices, and so the order of sums, are the same for all tokens.

    room: Bytes of threadgroup memory that a threadgroup with a ring can have: `kernel.room`.
    """
    vec = math.gcd(C, 16 // dtype.size)
    wide = math.ceil(outs / 8)
    most_wide = 2 if n * C % 32 else 3  # single elements take more registers
    block = math.ceil(wide / math.ceil(wide / most_wide))

    def cut(threads: int, most_slices: int) -> Projection:
        most = 2 if threads <= 512 else 1  # or registers spill
        tiles = most if tokens > (FEW_TOKENS if n <= 8 else 8) else 1  # phi is long for n > 8
        simds, each = threads // 32, n + 1 + (n * n if n <= 8 else 0)  # floats kept of a token

        def fits(slices: int) -> bool:
            sums = 8 * most * simds  # of a token and slice, for 8 * block outputs and one more
            return 4 * (sums * (8 * block + 1) + sums // slices * each) <= 30 << 10

        counts = range(min(most_slices, simds), simds + 1)
        slices = next(s for s in counts if simds % s == 0 and fits(s))
        return Projection(vec, threads, slices, tiles, block, 1)

    g = cut(threads or 256, 8)
    if threads is None and n * C >= LONG:
        long = cut(512, 16)
        if of_ring(long._replace(tiles=2), n, C, dtype, mx.float32, outs, room):
            g = long
    splits = 1
    if n > 8:
        blocks, groups = math.ceil(wide / block), math.ceil(tokens / (8 * g.tiles))
        own = math.ceil(n / (8 * block))  # the first threadgroup makes all of h_pre
        each = max(own, math.ceil(blocks * groups / FILLING_GROUPS))
        splits = _power(math.ceil(blocks / each))
    return g._replace(splits=splits)


def of_ring(
    g: Projection, n: int, C: int, dtype: mx.Dtype, phi: mx.Dtype, outs: int, room: int
) -> int:
    """Bytes in which runs of `mhc_pre` wait, 8 elements of each row that a lane has of a tile:
    where all outputs, more than 8, are made in one pass over x, and this fits beside its sums."""
    row = g.tiles * dtype.size + g.block * phi.size
    size = RING_STAGES * 8 * g.threads * row
    sums = 4 * g.tokens * (g.slices * (8 * g.block + 1) + n + n * n)
    gains = n <= 4 and n * C % 32 == 0 and 8 < outs <= 8 * g.block
    return size if gains and size + sums <= room else 0


KEPT_FLOATS = {"metal": 32, "cuda": 64}  # of u, that a lane of `mhc_pre` keeps for its norm


def of_read(g: Projection, n: int, C: int, backend: str) -> tuple[int, int]:
    """Simdgroups that share a token's u in `mhc_pre` with a norm, and packs of it that a lane
    keeps; none where their squares, which lie where sums did, do not fit."""
    packs, chunks = math.ceil(C / (32 * g.vec)), 4 if n <= 2 else 2 if n <= 4 else 1
    simds, most, team = g.threads // 32, KEPT_FLOATS[backend] // g.vec, 1
    while team * most < packs:
        team *= 2
    held = chunks * math.ceil(packs / team / chunks)
    room = g.slices * g.tokens * (8 * g.block + 1)
    fits = team == 1 or simds % team == 0 and 32 * simds * held <= room
    return (team, held) if fits else (1, 0)


def swept(
    n: int,
    C: int,
    dtype: mx.Dtype,
    outs: int,
    tokens: int,
    threads: int | None,
    backend: str,
    room: int,
) -> bool:
    """Whether `mhc_pre_partial_logits` multiplies by phi and `mhc_seam` does the rest of `mhc_pre`:
    for few tokens, as far as a square of each load of u and the sums of each slice fit."""
    if n > 8 or tokens > SWEEP_TOKENS:
        return False
    g = of_seam(n, C, dtype.size, threads, backend)
    slices = of_projection(n, C, dtype, outs, tokens, threads, room).slices
    return 4 * (g.passes * g.threads + slices * (outs + 4)) <= 28 << 10


def of_spread(
    n: int, C: int, outs: int, tokens: int, threads: int | None
) -> tuple[int, int, int, int]:
    """Threads, tokens of a tile, neighbours per load and threadgroups that share a tile, in
    `mhc_pre_backward_generic`; they share the channels."""
    vec, splits = math.gcd(C, 8), 1
    tile = 4 if tokens > FEW_TOKENS else 2  # 8 leave room for one threadgroup, not two
    while tile > 1 and 4 * tile * (outs + n + 3) > 30 << 10:
        tile //= 2
    if n > 8:  # phi is longer than a tile of tokens
        filling = math.ceil(FILLING_GROUPS / math.ceil(tokens / tile))
        splits = _power(min(filling, math.ceil(C / (32 * vec))))
    return threads or min(128, 32 * math.ceil(C / splits / vec / 32)), tile, vec, splits


# Simdgroups of `mhc_pre_backward_coefficients`: an H100 holds so many at 128 registers.
TOKEN_SIMDGROUPS = 132 * 16
TOKEN_BYTES = {"metal": 64, "cuda": 128}  # of x that a thread of it keeps: 408 us, half 460
KEPT_HALF_STEPS = {"metal": 8, "cuda": 40}  # 128 bytes each of a simdgroup's threadgroup memory


class Tokens(NamedTuple):
    threads: int
    vec: int
    passes: int  # with a norm
    cached: bool
    batch: int  # tokens that a simdgroup takes at once
    groups: int
    teams: int


def of_tokens(
    n: int, C: int, tokens: int, normed: bool, threads: int | None, backend: str
) -> Tokens:
    """How `mhc_pre_backward_coefficients` takes tokens of 2-byte elements: a simdgroup takes each,
    or where it is ``normed`` a threadgroup, which keeps it in registers as far as they reach."""
    vec = math.gcd(C, 8)
    while n > 8 and n * vec > 32:
        vec //= 2
    packs, passes, cached = C // vec, 0, False
    if normed:
        most = min(8, TOKEN_BYTES[backend] // (2 * vec * n)) if n <= 4 else 0  # or it spills
        limit = 256 if backend == "metal" else 512
        threads = threads or min(limit, 32 * math.ceil(packs / max(1, most) / 32))
        passes = math.ceil(packs / threads)
        cached = passes <= most
    threads = threads or 128
    batch = min(8, 32 >> (n - 1).bit_length())  # a lane per line of each matrix
    if tokens < batch * TOKEN_SIMDGROUPS:
        batch = max(1, batch // 4)
    simds = threads // 32
    groups = min(math.ceil(tokens / (batch * simds)), max(1, TOKEN_SIMDGROUPS // simds))
    return Tokens(threads, vec, passes, cached, batch, groups, groups * (1 if normed else simds))


def of_half_steps(iters: int, threads: int, backend: str) -> int:
    """Half-steps whose divisors `mhc_pre_backward_coefficients` keeps: 20 KiB at most."""
    return min(2 * iters, KEPT_HALF_STEPS[backend], (20 << 10) // (4 * threads))


# `mhc_pre_backward_projection`: an H100 takes 639 us at (65536, 4, 1024), also with 8 simdgroups.
PRODUCT_STAGE = 64  # tokens between barriers: dp and token_factors of them take 24 KiB at most
PRODUCT_SIMDS = 4  # in a threadgroup: others work while these wait for each other
PRODUCT_RING = 2  # tiles that a simdgroup has on their way
PRODUCT_SIMDGROUPS = 132 * 16  # what an H100 holds of them at 128 registers


def multiplied(outs: int, dtype: mx.Dtype) -> bool:
    """Whether `mhc_pre_backward_projection` makes dx and dphi: as far as its registers reach."""
    return dtype == mx.bfloat16 and outs <= 32


def of_products(
    n: int, C: int, outs: int, tokens: int, threads: int | None
) -> tuple[int, int, int, int]:
    """Threads, channels of a simdgroup, chunks of tokens, and threadgroups that share one, in
    `mhc_pre_backward_projection`. Chunks leave as little of a GPU idle as they can."""
    span = 32 if outs <= 24 else 16  # as far as registers hold phi and dphi
    units = n * math.ceil(C / span)
    simds = threads // 32 if threads else min(PRODUCT_SIMDS, units)
    turns = max(range(1, 5), key=lambda turns: turns * PRODUCT_SIMDGROUPS // units / turns)
    chunks = min(turns * PRODUCT_SIMDGROUPS // units, tokens // 64)
    return 32 * simds, span, max(1, chunks), math.ceil(units / simds)


def of_product_ring(span: int, threads: int, size: int, room: int) -> int:
    """Bytes in which tiles of `mhc_pre_backward_projection` wait, of 16 tokens and a span's
    channels, ``size`` bytes of each in all arrays: of 32 channels, where they fit beside 24 KiB."""
    ring = PRODUCT_RING * (threads // 32) * 16 * span * size
    return ring if span == 32 and ring + (24 << 10) <= room else 0


def of_outer(
    K: int, C: int, outs: int, tokens: int, threads: int | None
) -> tuple[int, int, int, int]:
    """Threads, neighbours per load, outputs of a thread, and chunks of tokens in
    `mhc_pre_backward_phi`: at most 48 sums a thread, and enough threadgroups to fill a GPU."""
    vec, threads = math.gcd(C, 2), threads or 128
    each = math.ceil(outs / math.ceil(outs / 24))
    parts = math.ceil(K / (threads * vec)) * math.ceil(outs / each)
    return threads, vec, each, max(1, min(math.ceil(528 / parts), math.ceil(tokens / 64)))
