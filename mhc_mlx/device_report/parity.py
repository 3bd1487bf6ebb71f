"""The very functions that are timed are compared with the reference, in bounded memory."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import launch, ops, reference
from ..commands import memory
from . import suite
from .layers import layers
from .suite import DTYPES, OPS, as_list, function, make_inputs
from .timing import array_limit, directed

BOUNDS = {mx.float32: 3e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
CHUNK_BYTES = 1 << 30  # the reference's temporaries take no more at once


class Largest:
    """It finds the largest difference relative to the largest value of a result that comes in
    parts; infinity stands for a value that is not finite."""

    def __init__(self):
        self.difference, self.value, self.finite = 0.0, 1e-30, True

    def add(self, want: mx.array, got: mx.array) -> None:
        if want.size == 0:
            return
        want, got = want.astype(mx.float32), got.astype(mx.float32)
        self.finite &= bool((mx.isfinite(want).all() & mx.isfinite(got).all()).item())
        difference: Any = mx.abs(want - got).max().item()
        value: Any = mx.abs(want).max().item()
        self.difference, self.value = max(self.difference, difference), max(self.value, value)

    def relative(self) -> float:
        return self.difference / self.value if self.finite else math.inf


def reference_bytes(op: str, n: int, C: int) -> int:
    """Bound the bytes that the reference with its gradients needs for a token: up to 40 float32
    arrays of the token's size (measured) and, where it has phi, a product with each row of phi."""
    rows = 2 * n + n * n if OPS[op].saves else 0
    return 4 * n * C * (rows + (110 if op == "sinkhorn_knopp" else 40))


def chunk(op: str, n: int, C: int) -> int:
    """Return how many tokens the reference runs at once."""
    return max(1, min(CHUNK_BYTES, memory() // 8) // reference_bytes(op, n, C))


def needed_bytes(
    op: str, shape: tuple[int, int, int], dtype: mx.Dtype, gradients: bool = True
) -> int:
    """Bound the bytes that a check takes: for all tokens x drawn in float32, and two results each;
    up to 20 arrays of phi's size, whose gradient comes row by row (measured); and the reference's
    chunk, or all tokens where the reference is what is checked."""
    B, n, C = shape
    phi = 4 * n * C * (2 * n + n * n) if OPS[op].saves else 0
    both = suite.mandatory_bytes(op, "forward+backward" if gradients else "forward", shape, dtype)
    tokens = min(B, chunk(op, n, C)) if launch.backend() else B
    return 4 * B * n * C + 2 * both + 20 * phi + tokens * reference_bytes(op, n, C)


def per_token(op: str, n: int, C: int, dtype: mx.Dtype) -> list[bool]:
    """Tell which inputs have a row for each token: those whose shape follows their number."""
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
    """Return the largest difference from the reference, relative to the largest value, of all
    results.

    All tokens go through the function that is timed, compiled; through the reference they go in
    chunks, and its gradients of arrays without tokens are added up.

    Args:
        timed: The function, by default the op with these options.
    """
    (B, n, C), direction = shape, "forward+backward" if gradients else "forward"
    f = timed or function(ops, op, **options)
    plain, rows = function(reference, op), per_token(op, n, C, dtype)
    arrays = make_inputs(op, shape, dtype)
    cotangents = suite.add_cotangents(op, direction, arrays)[len(arrays) :]
    mx.eval(arrays, cotangents)
    got = as_list(directed(f, direction, len(arrays))(*arrays, *cotangents))
    mx.eval(got)
    wanted = as_list(plain(*arrays)) + (
        arrays if gradients else []
    )  # gives shapes; is not evaluated
    if [(a.shape, a.dtype) for a in wanted] != [(a.shape, a.dtype) for a in got]:
        return math.inf
    largest, outputs = [Largest() for _ in got], len(got) - (len(arrays) if gradients else 0)
    split, sums = [True] * outputs + rows, [mx.array(0.0)] * len(got)
    run = directed(plain, direction, len(arrays), compiled=False)
    size = chunk(op, n, C)
    for start in range(0, B, size):
        part = slice(start, start + size)
        few = [a[part] if row else a for a, row in zip(arrays, rows, strict=True)]
        want = as_list(run(*few, *(c[part] for c in cotangents)))
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
    return max(result.relative() for result in largest)


def layer_error(kind: str, shape, name: str) -> float:
    """Return the largest relative difference of a layer's call with kernels from one without."""
    call, module = layers(*shape[1:])[kind]
    x, largest = mx.random.normal(shape).astype(DTYPES[name]), Largest()
    got = mx.compile(call)(x)
    mx.eval(got)
    module.use_metal = False
    largest.add(call(x), got)
    return largest.relative()


def parity_row(op: str, shape, name: str, gradients: bool, threads: int | None, error: float):
    """Return the row of a case's parity; print what fails."""
    row = suite.case_row(op, "forward+backward" if gradients else "forward", shape, name)
    bound = BOUNDS[DTYPES[name]]
    row |= {"threads_per_group": threads, "error": error, "ok": error < bound}
    if not row["ok"]:
        print(f"parity FAILS: {op} {name} {tuple(shape)}: {error:.2e}, {bound:.1e}")
    return row


def verify(section: str, op: str, shape, name: str, directions, threads: int | None) -> list[dict]:
    """Compare what a section times of a case with the reference, on this machine's device: the same
    function with the same options, of arrays with the same shapes and dtype."""
    if mx.get_cache_memory() > array_limit():
        mx.clear_cache()
    if section == "overhead":
        cases = [(kind, layer_error(kind, shape, name)) for kind in layers(*shape[1:])]
        return [parity_row(kind, shape, name, False, None, error) for kind, error in cases]
    gradients = any(direction != "forward" for direction in directions)
    used: dict[str, Any]
    used = {"differentiable": False} if section == "decode" else {"threads_per_group": threads}
    error = worst_error(op, shape, DTYPES[name], gradients, **used)
    return [parity_row(op, shape, name, gradients, threads, error)]
