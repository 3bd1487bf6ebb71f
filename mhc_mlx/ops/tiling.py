"""How launches are cut: pure functions of shapes and a `Device`, which has the measured numbers.

Measurements are of one H100, in bfloat16; (65536, 4, 1024) means tokens, streams and channels.
"""

import functools
import math
from typing import NamedTuple

import mlx.core as mx

from ..devices import Device

# Runs on their way into threadgroup memory: `mhc_pre` takes 354 us at (65536, 4, 1024) with two,
# 384 us with three and 408 us with loads into registers.
RING_STAGES = 2


class TokenTiling(NamedTuple):
    vec: int  # neighbours per load
    threads: int
    passes: int  # how often the threads go over a stream
    cached: bool  # whether a token's values stay in registers


@functools.cache
def token_tiling(
    n: int, C: int, size: int, copies: int, threads_per_group: int | None, device: Device
) -> TokenTiling:
    """How a threadgroup takes a token of n x C elements of ``size`` bytes.

    vec: Up to 16 bytes, dividing C, few enough for the sums of n streams.
    threads: One per vec, a multiple of 32, at most 256, forward ``device.forward_threads``; 128
        where sums fill the registers; backward ``device.uncached_backward_threads`` where the token
        is not cached.
    cached: Where ``copies`` of a token fit in registers; n > 8 would unroll n * n loops.
    """
    vec = math.gcd(C, 16 // size if copies == 1 else min(16 // size, device.backward_vec))
    while n * vec > 64:
        vec //= 2
    one = copies == 1
    register_bytes = device.forward_register_bytes if one else device.backward_register_bytes
    crowded = copies == 2 and 4 < n <= 8
    widths, most = (vec, min(vec, 4)) if crowded else (vec,), 128 if crowded and size == 4 else 256
    if one:
        most = device.forward_threads

    def of_width(vec: int, most: int) -> TokenTiling:
        threads = threads_per_group or even_threads(C // vec, most)
        passes = math.ceil(C // vec / threads)
        packed = one or device.backward_packed
        pack_bytes = max(4, vec * size) if packed else 4 * vec
        cached = n <= 8 and passes * copies * n * pack_bytes <= register_bytes
        return TokenTiling(vec, threads, passes, cached)

    tilings = [of_width(vec, most) for vec in widths]
    if copies == 2 and not any(t.cached for t in tilings):
        return of_width(widths[-1], min(most, device.uncached_backward_threads))
    return next((t for t in tilings if t.cached), tilings[-1])


def even_threads(packs: int, most: int) -> int:
    """The fewest threads, a multiple of 32, that take so many packs in as few passes as ``most``
    threads would."""
    return 32 * math.ceil(packs / math.ceil(packs / most) / 32)


# H100, bfloat16: at (2048, 4, 5120) 85 us, with 256 threads 99 us; at C = 7168 114 and 122 us. On a
# Mac they keep a token of C = 5120 in 128 registers.
SEAM_THREADS = 320


@functools.cache
def seam_tiling(
    n: int, C: int, size: int, threads_per_group: int | None, device: Device
) -> TokenTiling:
    """How a threadgroup takes a token in `mhc_seam`: by 320 threads at most."""
    tiling = token_tiling(n, C, size, 1, threads_per_group, device)
    if threads_per_group:
        return tiling
    packs = C // tiling.vec
    threads = even_threads(packs, SEAM_THREADS)
    return tiling._replace(threads=threads, passes=math.ceil(packs / threads))


@functools.cache
def seam_backward_tiling(
    n: int, C: int, size: int, threads_per_group: int | None, device: Device
) -> TokenTiling:
    """How a threadgroup takes a token in `mhc_seam_backward`, whose n (n + 2) sums leave registers
    for few channels at once: for 128 in all, what a GPU wants, where n <= 4."""
    vec = math.gcd(C, device.seam_backward_bytes // size)
    while n * vec > 16:
        vec //= 2
    packs = C // vec
    most = 256 if packs <= 256 else device.uncached_backward_threads
    threads = threads_per_group or even_threads(packs, most)
    passes = math.ceil(packs / threads)
    return TokenTiling(vec, threads, passes, passes == 1)


def largest_divisor(n: int, most: int) -> int:
    return max(k for k in range(1, most + 1) if n % k == 0)


def streams_at_once(n: int) -> int:
    """How many streams of a token `stream_norm` takes at once, as registers allow: n, or from n = 8
    on its largest divisor up to 4. clang-19: at (2048, 8, 4096) 8 would spill 62 registers."""
    return n if n < 8 else largest_divisor(n, 4)


def norm_tile(t: TokenTiling, n: int, size: int, tokens: int, inject: bool, device: Device) -> int:
    """How many tokens a threadgroup of `stream_norm` takes at once: they share loads of inject,
    n times as long as a token: two where they lie in 128 bytes of a thread's registers and fill a
    GPU. clang-19: at n = 4, C = 2560 a thread then has 127; in float32 some would spill."""
    few = tokens < device.norm_tile_tokens or not (inject and t.cached)
    return 1 if few or 2 * t.passes * streams_at_once(n) * t.vec * size > 128 else 2


# Channels of all streams, of which a thread of `stream_norm_backward` keeps floats in registers: at
# n = 4 a token of C = 2560 then takes 320 threads.
NORM_FLOATS = 32


@functools.cache
def norm_backward_tiling(
    n: int, C: int, size: int, threads_per_group: int | None, device: Device
) -> TokenTiling:
    """How a threadgroup takes a token in `stream_norm_backward`."""
    vec = math.gcd(C, 16 // size)
    while streams_at_once(n) * vec > NORM_FLOATS:
        vec //= 2
    packs = C // vec

    def of_threads(most: int) -> TokenTiling:
        threads = threads_per_group or even_threads(packs, most)
        passes = math.ceil(packs / threads)
        return TokenTiling(vec, threads, passes, n < 8 and passes * n * vec <= NORM_FLOATS)

    tiling = of_threads(SEAM_THREADS)
    return tiling if tiling.cached else of_threads(device.uncached_backward_threads)


def even_groups(count: int, most: int) -> int:
    """At most ``most`` threadgroups, each with as many turns."""
    return math.ceil(count / max(1, math.ceil(count / most)))


def many_groups(count: int, device: Device) -> int:
    """A threadgroup for each of so many tokens or tiles, as far as a grid reaches."""
    return min(count, device.many_groups)


def backward_groups(tokens: int, threads: int, device: Device) -> int:
    """Threadgroups of a body that leaves a row of sums for each of them."""
    return min(tokens, max(1, device.backward_threads // threads))


# Most of `gate_mix` and its gradient, which sum over no channels. Five threadgroups share a token
# of C = 2560 in bfloat16, each thread with a pack; a single one would leave most of a GPU idle.
GATE_THREADS = 64


class GateTiling(NamedTuple):
    vec: int
    threads: int
    groups: int  # a multiple of those that share a token


def gate_tiling(
    tokens: int, C: int, size: int, threads_per_group: int | None, device: Device
) -> GateTiling:
    """How `gate_mix` takes tokens: a thread takes a pack of up to 16 bytes of each stream."""
    vec = math.gcd(C, 16 // size)
    threads = threads_per_group or even_threads(C // vec, GATE_THREADS)
    parts = math.ceil(C // vec / threads)
    return GateTiling(vec, threads, parts * min(tokens, max(1, device.many_groups // parts)))


def threads_per_column(rows: int, columns: int, device: Device) -> int:
    """Threads that share a column in `sum_partials`: many only where there are few columns, and no
    more in all than MLX holds in 32 bits with a sign."""
    if rows <= device.one_thread_rows or columns > 1 << 27:
        return 1
    return 64 if rows >= 64 and columns < 1 << 14 else 8


class MatrixTiling(NamedTuple):
    threads: int
    groups: int


def sinkhorn_tiling(
    n: int, matrices: int, threads_per_group: int | None, device: Device
) -> MatrixTiling:
    """How `sinkhorn_knopp` and its gradient take matrices: each by a power of two of lanes, one for
    each line, and as many matrices as a threadgroup holds."""
    lanes = 1 << (n - 1).bit_length()
    threads = max(threads_per_group or 128, lanes) // lanes * lanes
    return MatrixTiling(threads, many_groups(math.ceil(matrices / (threads // lanes)), device))


def stored_steps(n: int, iters: int, threads: int, device: Device) -> int:
    """Half-steps whose divisors `sinkhorn_knopp_backward` stores in all but 2 KiB of threadgroup
    memory; for n > 32 two others lie there as well."""
    memory = device.threadgroup_memory - (2 << 10)
    return min(2 * iters, memory // (4 * threads) - (2 if n > 32 else 0))


def _power(most: int) -> int:
    """The largest power of two up to that: bodies are compiled for how many threadgroups share
    work, so that few numbers must occur."""
    return 1 << (most.bit_length() - 1)


class LogitsTiling(NamedTuple):
    vec: int
    threads: int
    slices: int  # of k, each a simdgroup's
    tiles: int  # of 8 tokens, of a simdgroup
    block: int  # tiles of 8 logits at once
    splits: int  # threadgroups that share the logits of a token

    @property
    def tokens(self) -> int:
        """Tokens of a threadgroup."""
        return 8 * self.tiles * (self.threads // 32 // self.slices)


@functools.cache
def logits_tiling(
    n: int,
    C: int,
    dtype: mx.Dtype,
    num_logits: int,
    tokens: int,
    threads: int | None,
    device: Device,
) -> LogitsTiling:
    """How `mhc_pre` multiplies. Slices, and so the order of sums, are the same for all tokens."""
    vec = math.gcd(C, 16 // dtype.size)
    logit_tiles = math.ceil(num_logits / 8)
    most_tiles = 2 if n * C % 32 else 3  # single elements take more registers
    block = math.ceil(logit_tiles / math.ceil(logit_tiles / most_tiles))

    def cut(threads: int, most_slices: int) -> LogitsTiling:
        most = 2 if threads <= 512 else 1  # or registers spill
        few_tokens = device.few_tokens if n <= 8 else 8  # phi is long for n > 8
        tiles = most if tokens > few_tokens else 1
        memory = device.threadgroup_memory - (2 << 10)
        simds, floats = threads // 32, n + 1 + (n * n if n <= 8 else 0)  # that stay of a token

        def fits(slices: int) -> bool:
            sums = 8 * most * simds  # of a token and slice, for 8 * block logits and one more
            return 4 * (sums * (8 * block + 1) + sums // slices * floats) <= memory

        counts = range(min(most_slices, simds), simds + 1)
        slices = next(s for s in counts if simds % s == 0 and fits(s))
        return LogitsTiling(vec, threads, slices, tiles, block, 1)

    tiling = cut(threads or 256, 8)
    if threads is None and n * C >= device.long_row:
        long = cut(512, 16)
        if ring_bytes(long._replace(tiles=2), n, C, dtype, mx.float32, num_logits, device):
            tiling = long
    splits = 1
    if n > 8:
        blocks, groups = math.ceil(logit_tiles / block), math.ceil(tokens / (8 * tiling.tiles))
        h_pre_blocks = math.ceil(n / (8 * block))  # the first threadgroup makes all of h_pre
        share = max(h_pre_blocks, math.ceil(blocks * groups / device.filling_groups))
        splits = _power(math.ceil(blocks / share))
    return tiling._replace(splits=splits)


def ring_bytes(
    tiling: LogitsTiling,
    n: int,
    C: int,
    dtype: mx.Dtype,
    phi_dtype: mx.Dtype,
    num_logits: int,
    device: Device,
) -> int:
    """Bytes in which runs of `mhc_pre` wait, 8 elements of each row that a lane has of a tile:
    where all logits, more than 8, are made in one pass over x, and this fits beside its sums."""
    row = tiling.tiles * dtype.size + tiling.block * phi_dtype.size
    size = RING_STAGES * 8 * tiling.threads * row
    sums = 4 * tiling.tokens * (tiling.slices * (8 * tiling.block + 1) + n + n * n)
    gains = n <= 4 and n * C % 32 == 0 and 8 < num_logits <= 8 * tiling.block
    return size if gains and size + sums <= device.ring_memory else 0


class UTiling(NamedTuple):
    simdgroups: int = 1  # that share a token's u
    packs: int = 0  # of u that a lane keeps until its norm is known


def u_tiling(tiling: LogitsTiling, n: int, C: int, device: Device) -> UTiling:
    """How `mhc_pre` makes u with a norm; it keeps none where the squares of u, which lie where sums
    did, do not fit."""
    packs, chunk = math.ceil(C / (32 * tiling.vec)), 4 if n <= 2 else 2 if n <= 4 else 1
    simds, most, sharing = tiling.threads // 32, device.u_floats_per_lane // tiling.vec, 1
    while sharing * most < packs:
        sharing *= 2
    lane_packs = chunk * math.ceil(packs / sharing / chunk)
    sums = tiling.slices * tiling.tokens * (8 * tiling.block + 1)
    fits = sharing == 1 or simds % sharing == 0 and 32 * simds * lane_packs <= sums
    return UTiling(sharing, lane_packs) if fits else UTiling()


@functools.cache
def use_partial_logits(
    n: int,
    C: int,
    dtype: mx.Dtype,
    num_logits: int,
    tokens: int,
    threads: int | None,
    device: Device,
) -> bool:
    """Whether `mhc_pre_partial_logits` multiplies by phi, and `mhc_seam` does what else `mhc_pre`
    would: for few tokens, as far as what `mhc_seam` adds up, a square of each load of u and each
    slice's sums, fits threadgroup memory."""
    if n > 8 or tokens > device.partial_logits_tokens:
        return False
    seam = seam_tiling(n, C, dtype.size, threads, device)
    slices = logits_tiling(n, C, dtype, num_logits, tokens, threads, device).slices
    floats = seam.passes * seam.threads + slices * (num_logits + 4)
    return 4 * floats <= device.threadgroup_memory - (4 << 10)


class GenericGradientTiling(NamedTuple):
    threads: int
    tile: int  # tokens
    vec: int
    splits: int  # threadgroups that share a tile, each a range of channels
    rows: int  # of sums: one for all threadgroups that share their tiles


def generic_gradient_tiling(
    n: int, C: int, num_logits: int, tokens: int, threads: int | None, device: Device
) -> GenericGradientTiling:
    """How `mhc_pre_backward_generic` takes tokens."""
    vec, splits = math.gcd(C, 8), 1
    # 8 leave room for one threadgroup, not two.
    tile = 4 if tokens > device.few_backward_tokens else 2
    memory = device.threadgroup_memory - (2 << 10)
    while tile > 1 and 4 * tile * (num_logits + n + 3) > memory:
        tile //= 2
    if n > 8:  # phi is longer than a tile of tokens
        filling = math.ceil(device.filling_groups / math.ceil(tokens / tile))
        splits = _power(min(filling, math.ceil(C / (32 * vec))))
    threads = threads or min(128, 32 * math.ceil(C / splits / vec / 32))
    rows = min(math.ceil(tokens / tile), max(1, device.backward_threads // threads // splits))
    return GenericGradientTiling(threads, tile, vec, splits, rows)


class CoefficientGradientTiling(NamedTuple):
    threads: int
    vec: int
    passes: int  # with a norm
    cached: bool
    batch: int  # tokens that a simdgroup takes at once
    groups: int
    rows: int  # of sums: one for each simdgroup, or with a norm for each threadgroup


@functools.cache
def coefficient_gradient_tiling(
    n: int, C: int, size: int, tokens: int, norm: bool, threads: int | None, device: Device
) -> CoefficientGradientTiling:
    """How `mhc_pre_backward_coefficients` takes tokens of elements of ``size`` bytes, each by a
    simdgroup, and with a norm `mhc_pre_backward_coefficients_norm`, each by a threadgroup, which
    keeps it in registers as far as they reach."""
    vec = math.gcd(C, 16 // size)
    while n > 8 and n * vec > 32:
        vec //= 2
    packs, passes, cached = C // vec, 0, False
    if norm:  # more in registers would spill
        most = min(8, device.coefficient_gradient_x_bytes // (size * vec * n)) if n <= 4 else 0
        wanted = 32 * math.ceil(packs / max(1, most) / 32)
        threads = threads or min(device.coefficient_gradient_threads, wanted)
        passes = math.ceil(packs / threads)
        cached = passes <= most
    threads = threads or 128
    batch = min(8, 32 >> (n - 1).bit_length())  # a lane per line of each matrix
    if tokens < batch * device.coefficient_gradient_simdgroups:
        batch = max(1, batch // 4)
    simds = threads // 32
    most_groups = max(1, device.coefficient_gradient_simdgroups // simds)
    groups = min(math.ceil(tokens / (batch * simds)), most_groups)
    rows = groups * (1 if norm else simds)
    return CoefficientGradientTiling(threads, vec, passes, cached, batch, groups, rows)


def stored_half_steps(iters: int, threads: int, device: Device) -> int:
    """Half-steps whose divisors `mhc_pre_backward_coefficients` (or `_norm`) stores: 20 KiB at
    most."""
    return min(2 * iters, device.stored_half_steps, (20 << 10) // (4 * threads))


# `mhc_pre_backward_projection` takes 639 us at (65536, 4, 1024), also with 8 simdgroups.
PROJECTION_GRADIENT_STAGE = 64  # tokens between barriers: their dp and factors take up to 24 KiB
PROJECTION_GRADIENT_SIMDS = 4  # in a threadgroup: others work while these wait for each other
PROJECTION_GRADIENT_RING = 2  # tiles of a simdgroup on their way; three take 743 us


def use_matrix_gradient(num_logits: int, dtype: mx.Dtype, norm: bool, device: Device) -> bool:
    """Whether `mhc_pre_backward_projection` makes dx and dphi: of the dtypes that the device
    multiplies, as far as its registers reach."""
    return num_logits <= 32 and (dtype == mx.bfloat16 or device.float_products and not norm)


class ProjectionGradientTiling(NamedTuple):
    threads: int
    span: int  # channels of a stream that a simdgroup takes
    chunks: int  # of tokens
    groups_per_chunk: int


@functools.cache
def projection_gradient_tiling(
    n: int, C: int, num_logits: int, tokens: int, threads: int | None, device: Device
) -> ProjectionGradientTiling:
    """How `mhc_pre_backward_projection` shares its work; chunks leave as little of a GPU idle as
    they can."""
    span = 32 if num_logits <= 24 else 16  # as far as registers hold phi and dphi
    units, most = n * math.ceil(C / span), device.projection_gradient_simdgroups
    simds = threads // 32 if threads else min(PROJECTION_GRADIENT_SIMDS, units)
    turns = max(range(1, 5), key=lambda turns: turns * most // units / turns)
    chunks = max(1, min(turns * most // units, tokens // 64))
    return ProjectionGradientTiling(32 * simds, span, chunks, math.ceil(units / simds))


def projection_gradient_ring_bytes(span: int, threads: int, size: int, device: Device) -> int:
    """Bytes in which tiles of `mhc_pre_backward_projection` wait, of 16 tokens and a span's
    channels, ``size`` bytes of each in all arrays: of 32 channels, where they fit beside 24 KiB."""
    ring = PROJECTION_GRADIENT_RING * (threads // 32) * 16 * span * size
    return ring if span == 32 and ring + (24 << 10) <= device.ring_memory else 0


class PhiGradientTiling(NamedTuple):
    threads: int
    vec: int
    logits_per_thread: int
    chunks: int  # of tokens
    groups_per_chunk: int


@functools.cache
def phi_gradient_tiling(
    K: int, C: int, num_logits: int, tokens: int, threads: int | None, device: Device
) -> PhiGradientTiling:
    """How `mhc_pre_backward_phi` shares its work: at most 48 sums a thread, and enough threadgroups
    to fill a GPU."""
    vec, threads = math.gcd(C, 2), threads or 128
    logits = math.ceil(num_logits / math.ceil(num_logits / 24))
    parts = math.ceil(K / (threads * vec)) * math.ceil(num_logits / logits)
    chunks = max(1, min(math.ceil(device.phi_gradient_groups / parts), math.ceil(tokens / 64)))
    return PhiGradientTiling(threads, vec, logits, chunks, parts)


@functools.cache
def norm_weights_tiling(
    n: int, C: int, rows: int, tokens: int, threads: int | None, device: Device
) -> PhiGradientTiling:
    """How `stream_norm_backward_weights` shares its work: each thread has ``rows`` rows of inject,
    or none, and there are enough threadgroups to fill a GPU."""
    vec, threads = math.gcd(C, 4 if rows <= 4 else 2), threads or 128
    parts = math.ceil(n * C / (threads * vec)) * (n // rows if rows else 1)
    chunks = max(1, min(math.ceil(device.phi_gradient_groups / parts), math.ceil(tokens / 64)))
    return PhiGradientTiling(threads, vec, rows, chunks, parts)
