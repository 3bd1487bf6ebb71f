"""Checks of arguments, which raise ValueError or TypeError at the call."""

import math

import mlx.core as mx

from ..conventions import SINKHORN, Convention

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MAX_STREAMS = 64
# Bodies find an element within a token, and within the 24 rows of phi by which `mhc_pre` multiplies
# at once, by offsets of 32 bits in bytes, of float32 at most. The gradient of phi is made as one
# axis, whose size MLX holds in 32 bits with a sign.
MAX_TOKEN = 2**32 // 4
MAX_PHI_ROW = 2**32 // (4 * 24)
MAX_PHI = 2**31 - 1
MAX_INJECT = MAX_PHI // 2  # whose gradient is made beside that of weight, which is no longer
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # float32 holds numbers between without loss of digits


def fail(op: str, argument: str, must: str, got: object) -> str:
    return f"[{op}] {argument} must {must} but got {got}."


def check_type(op: str, **arrays: mx.array) -> None:
    for name, a in arrays.items():
        if not isinstance(a, mx.array):
            raise TypeError(fail(op, name, "be an mx.array", type(a).__name__))


def check_floats(op: str, name: str, a: mx.array) -> None:
    """What `check_dtype` does, of one array."""
    if not isinstance(a, mx.array):
        raise TypeError(fail(op, name, "be an mx.array", type(a).__name__))
    if a.dtype not in FLOATS:
        raise TypeError(fail(op, name, "be float32, float16 or bfloat16", a.dtype))


def check_dtype(op: str, **arrays: mx.array) -> None:
    check_type(op, **arrays)
    for name, a in arrays.items():
        check_floats(op, name, a)


def check_array(
    op: str, name: str, a: mx.array, axes: str | tuple, sizes: tuple[int, ...], *lead: tuple
) -> None:
    """Check dtype and shape: ``sizes``, also behind leading axes if such are given."""
    check_floats(op, name, a)
    if a.shape != sizes and a.shape not in [(*axis, *sizes) for axis in lead]:
        last = [f"{k}={size}" if k else str(size) for k, size in zip(axes, sizes, strict=True)]
        shapes = [[*map(str, axis), *last] for axis in ((), *lead)]
        must = " or ".join(f"[{', '.join(s)}]" for s in shapes)
        raise ValueError(fail(op, name, f"have shape {must}", list(a.shape)))


def check_most(op: str, name: str, what: str, value: int, most: int) -> None:
    """A size of an array, which bodies cannot address beyond ``most``."""
    if value > most:
        raise ValueError(fail(op, name, f"have {what} of at most {most}", value))


def check_rows(op: str, name: str, a: mx.array) -> tuple[tuple[int, ...], int]:
    """Leading axes and C of an array ``[..., C]``."""
    check_floats(op, name, a)
    if a.ndim < 1:
        raise ValueError(fail(op, name, "have shape [..., C]", list(a.shape)))
    return tuple(a.shape[:-1]), a.shape[-1]


def check_streams(op: str, x: mx.array, name: str = "x") -> tuple[tuple[int, ...], int, int]:
    """Leading axes, n and C of streams."""
    check_floats(op, name, x)
    if x.ndim < 2:
        raise ValueError(fail(op, name, "have shape [..., n, C]", list(x.shape)))
    *lead, n, C = x.shape
    if not 1 <= n <= MAX_STREAMS or C < 1:
        must = f"have shape [..., n, C] with n from 1 to {MAX_STREAMS} and C at least 1"
        raise ValueError(fail(op, name, must, list(x.shape)))
    check_most(op, name, "n * C", n * C, MAX_TOKEN)
    return tuple(lead), n, C


def check_branch(op: str, x: mx.array, y: mx.array) -> None:
    """A sublayer's output, for streams that have been checked."""
    *lead, _, C = x.shape
    check_array(op, "y", y, ("",) * len(lead) + ("C",), (*lead, C))
    if y.dtype != x.dtype:
        raise TypeError(fail(op, "y", f"have x's dtype {x.dtype}", y.dtype))


def check_number(
    op: str, name: str, number: float, least: float = -LARGEST, must: str = "be finite in float32"
) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(fail(op, name, "be a number", type(number).__name__))
    if not least <= number <= LARGEST:
        raise ValueError(fail(op, name, must, number))


def check_eps(op: str, eps: float, name: str = "eps") -> None:
    check_number(op, name, eps, SMALLEST, "be finite and above 0 in float32")


def check_sizes(op: str, **sizes: tuple[int, float]) -> None:
    """Each size, an int, from 1 to the number beside it."""
    for name, (value, most) in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(fail(op, name, "be an int", type(value).__name__))
        if not 1 <= value <= most:
            must = f"be from 1 to {most}" if most < math.inf else "be at least 1"
            raise ValueError(fail(op, name, must, value))


def check_convention(op: str, convention: Convention) -> None:
    if not isinstance(convention, Convention):
        raise TypeError(fail(op, "convention", "be a Convention", type(convention).__name__))


def check_half_steps(op: str, convention: Convention) -> None:
    check_convention(op, convention)
    if convention.start not in SINKHORN:
        must = f"have half-steps (start {', '.join(SINKHORN[:-1])} or {SINKHORN[-1]})"
        raise ValueError(fail(op, "convention", must, convention.name))


def check_bools(op: str, **values: bool) -> None:
    for name, value in values.items():
        if type(value) is not bool:
            raise TypeError(fail(op, name, "be a bool", type(value).__name__))


def check_threads(op: str, threads: int | None) -> None:
    name = "threads_per_group"
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(fail(op, name, "be None or an int", type(threads).__name__))
    if threads % 32 or not 32 <= threads <= 1024:
        raise ValueError(fail(op, name, "be a multiple of 32 from 32 to 1024", threads))


def check_static(op: str, x: mx.array, eps: float, **arrays: mx.array) -> None:
    """x, eps, and by their names coefficients shared by all tokens and the weight."""
    _, n, C = check_streams(op, x)
    check_eps(op, eps)
    shapes = {"pre": ("n", (n,)), "post": ("n", (n,)), "res": ("nn", (n, n)), "weight": ("C", (C,))}
    for name, a in arrays.items():
        check_array(op, name, a, *shapes[name.split("_")[-1]])


def check_dynamic(op, x, phi, bias, alpha, convention, norm_eps, parts=3):
    """What makes coefficients of x: in three parts, or h_pre alone."""
    _, n, C = check_streams(op, x)
    check_convention(op, convention)
    if not convention.sigmoid:
        raise ValueError(fail(op, "convention", "have gates of logits", convention.name))
    check_most(op, "x", "n * C", n * C, MAX_PHI_ROW)
    num_logits = n
    if parts == 3:
        convention.check_streams(op, n)
        num_logits = 2 * n + convention.res_size(n)
    axes = "n" if parts == 1 else "(2n+R)"
    check_array(op, "phi", phi, (axes, "(n*C)"), (num_logits, n * C))
    check_most(op, "phi", "a size", phi.size, MAX_PHI)
    check_array(op, "bias", bias, (axes,), (num_logits,))
    if parts == 3 and num_logits == 2 * n and getattr(alpha, "shape", None) != (3,):
        parts = 2  # no logit of h_res, and so no alpha of one; a third entry has no effect
    check_array(op, "alpha", alpha, ("parts",), (parts,))
    check_eps(op, norm_eps, "norm_eps")


def check_seam(
    op: str, x: mx.array, y: mx.array, weight: mx.array | None, eps: float, round_aggregate: bool
) -> tuple[tuple[int, ...], int, int]:
    """Leading axes, n and C of the streams that a seam takes."""
    lead, n, C = check_streams(op, x)
    check_branch(op, x, y)
    if weight is not None:
        check_array(op, "weight", weight, "C", (C,))
    check_eps(op, eps)
    check_bools(op, round_aggregate=round_aggregate)
    return lead, n, C
