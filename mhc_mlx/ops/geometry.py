"""How launches are cut: pure functions of shapes, and the literals that measurements gave."""

import functools
import math
from typing import NamedTuple

# Measured on an H100 (benchmarks/). Copies of a token: 1 is x, 2 is x and dout. A thread of an
# Apple GPU has 128 registers, hence the smaller limit there.
REGISTER_BYTES = {("metal", 1): 256, ("cuda", 1): 256, ("metal", 2): 256, ("cuda", 2): 512}
FORWARD_GROUPS = 4096  # fills any GPU; fewer threadgroups than tokens share coefficients
MANY_GROUPS = 1 << 16  # where a threadgroup fetches next to nothing before its first token
BACKWARD_THREADS = 132 * 512  # what an H100 holds at 128 registers; a group leaves a row of sums
FEW_TOKENS = 2048  # up to here small tiles, for more threadgroups
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


def even(count: int, most: int) -> int:
    """At most ``most`` threadgroups, each with as many turns."""
    return math.ceil(count / max(1, math.ceil(count / most)))


def _tile(tokens: int, floats: int) -> int:
    """Tokens of a tile, of ``floats`` each in 30 KiB of threadgroup memory."""
    tile = 8 if tokens > FEW_TOKENS else 2
    while tile > 1 and 4 * tile * floats > 30 << 10:
        tile //= 2
    return tile


def of_projection(n: int, outs: int, tokens: int, threads: int | None) -> tuple[int, int, int]:
    """Threads, tokens of a tile and outputs of a simdgroup in `mhc_pre`: at most 32 sums a
    thread."""
    tile, threads = _tile(tokens, outs + n + 257), threads or min(256, 32 * max(4, outs))
    shares = math.ceil(outs / (threads // 32))
    return threads, tile, math.ceil(shares / math.ceil(shares / min(8, 32 // tile)))


def of_spread(n: int, C: int, outs: int, tokens: int, threads: int | None) -> tuple[int, int, int]:
    """Threads, tokens of a tile and neighbours per load in `mhc_pre_backward`."""
    vec = math.gcd(C, 2)
    tile = _tile(tokens, outs + n + 1)
    return threads or min(256, 32 * math.ceil(C / vec / 32)), tile, vec


def of_outer(
    K: int, C: int, outs: int, tokens: int, threads: int | None
) -> tuple[int, int, int, int]:
    """Threads, neighbours per load, outputs of a thread, and chunks of tokens in
    `mhc_phi_gradient`: at most 48 sums a thread, and enough threadgroups to fill a GPU."""
    vec, threads = math.gcd(C, 2), threads or 128
    each = math.ceil(outs / math.ceil(outs / 24))
    parts = math.ceil(K / (threads * vec)) * math.ceil(outs / each)
    return threads, vec, each, max(1, min(math.ceil(528 / parts), math.ceil(tokens / 64)))
