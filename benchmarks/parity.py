"""Parity with the reference: of the very functions that are timed, in bounded memory."""

import math
from collections.abc import Callable

import mlx.core as mx

from benchmarks.ops import OPS, function, make_inputs, mandatory_bytes, random_like, several
from benchmarks.timing import directed, memory
from mhc_mlx import launch, ops, reference

BOUNDS = {mx.float32: 3e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
CHUNK_BYTES = 1 << 30  # of the reference's temporaries at once


class Largest:
    """The largest difference relative to the largest value, of a result that comes in parts;
    infinite where a value is not finite."""

    def __init__(self):
        self.difference, self.value, self.finite = 0.0, 1e-30, True

    def add(self, want: mx.array, got: mx.array) -> None:
        if want.size == 0:
            return
        want, got = want.astype(mx.float32), got.astype(mx.float32)
        self.finite &= bool((mx.isfinite(want).all() & mx.isfinite(got).all()).item())
        self.difference = max(self.difference, mx.abs(want - got).max().item())
        self.value = max(self.value, mx.abs(want).max().item())

    def relative(self) -> float:
        return self.difference / self.value if self.finite else math.inf


def reference_bytes(op: str, n: int, C: int) -> int:
    """Of a token, what the reference holds at most with its gradients: up to 40 float32 arrays like
    a token's (measured), and, where it projects, a product with each row of phi."""
    rows = 2 * n + n * n if OPS[op].saves else 0
    return 4 * n * C * (rows + (110 if op == "sinkhorn_knopp" else 40))


def chunk(op: str, n: int, C: int) -> int:
    """Tokens that the reference runs at once."""
    return max(1, min(CHUNK_BYTES, memory() // 8) // reference_bytes(op, n, C))


def needed_bytes(
    op: str, shape: tuple[int, int, int], dtype: mx.Dtype, gradients: bool = True
) -> int:
    """Memory of a check: x drawn in float32, and two results each, of all tokens; up
    to 20 arrays like phi, whose gradient comes row by row (measured); and the reference's chunk, of
    all tokens where it is what is checked."""
    B, n, C = shape
    phi = 4 * n * C * (2 * n + n * n) if OPS[op].saves else 0
    both = mandatory_bytes(op, "forward+backward" if gradients else "forward", shape, dtype)
    held = min(B, chunk(op, n, C)) if launch.backend() else B
    return 4 * B * n * C + 2 * both + 20 * phi + held * reference_bytes(op, n, C)


def per_token(op: str, n: int, C: int, dtype: mx.Dtype) -> list[bool]:
    """Which inputs have a row for each token: those whose shape follows their number."""
    few, many = ([a.shape for a in make_inputs(op, (B, n, C), dtype)] for B in (1, 2))
    return [a != b for a, b in zip(few, many, strict=True)]


def worst_error(
    op: str,
    shape: tuple[int, int, int],
    dtype: mx.Dtype,
    gradients: bool = True,
    timed: Callable | None = None,
    **options,
) -> float:
    """Largest difference from the reference, relative to the largest value, over all results.

    All tokens go through the function that is timed, compiled; through the reference they go in
    chunks, and its gradients of arrays without tokens are added up.

    Args:
        timed: The function, by default the op with these options.
    """
    B, n, C = shape
    f = timed or function(ops, op, **options)
    plain, rows = function(reference, op), per_token(op, n, C, dtype)
    arrays = make_inputs(op, shape, dtype)
    cotangents = random_like(several(plain(*arrays))) if gradients else []
    mx.eval(arrays, cotangents)
    direction = "forward+backward" if gradients else "forward"
    got = several(directed(f, direction, len(arrays))(*arrays, *cotangents))
    mx.eval(got)
    wanted = plain(*arrays)  # for its shapes: it is not evaluated
    wanted = several(wanted) + (arrays if gradients else [])
    if [(a.shape, a.dtype) for a in wanted] != [(a.shape, a.dtype) for a in got]:
        return math.inf
    largest, outputs = [Largest() for _ in got], len(got) - (len(arrays) if gradients else 0)
    split, sums = [True] * outputs + rows, [mx.array(0.0)] * len(got)
    run = directed(plain, direction, len(arrays), compiled=False)
    size = chunk(op, n, C)
    for start in range(0, B, size):
        part = slice(start, start + size)
        few = [a[part] if row else a for a, row in zip(arrays, rows, strict=True)]
        want = several(run(*few, *(c[part] for c in cotangents)))
        mx.eval(want)
        for k, a in enumerate(want):
            if split[k]:
                largest[k].add(a, got[k][part])
            else:
                sums[k] = sums[k] + a.astype(mx.float32)
        mx.eval(sums)
    for k in range(len(got)):
        if not split[k]:
            largest[k].add(sums[k], got[k])
    return max(one.relative() for one in largest)
