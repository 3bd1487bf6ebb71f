"""Functions of `reference` that have no kernels, with their arguments checked."""

import functools

import mlx.core as mx

from .. import reference
from .dispatch import check_array, check_dtype, check_eps, check_streams, fail


def _rows(op: str, name: str, a: mx.array) -> tuple[tuple[int, ...], int]:
    """Leading axes and C."""
    check_dtype(op, **{name: a})
    if a.ndim < 1:
        raise ValueError(fail(op, name, "have shape [..., C]", list(a.shape)))
    return tuple(a.shape[:-1]), a.shape[-1]


@functools.wraps(reference.rms_norm)
def rms_norm(u: mx.array, weight: mx.array, eps: float = 1e-5) -> mx.array:
    _, C = _rows("rms_norm", "u", u)
    check_array("rms_norm", "weight", weight, "C", (C,))
    check_eps("rms_norm", eps)
    return reference.rms_norm(u, weight, eps)


@functools.wraps(reference.stream_distribute)
def stream_distribute(y: mx.array, h_post: mx.array) -> mx.array:
    op = "stream_distribute"
    lead, _ = _rows(op, "y", y)
    _, n = _rows(op, "h_post", h_post)
    check_array(op, "h_post", h_post, "n", (n,), lead)
    return reference.stream_distribute(y, h_post)


@functools.wraps(reference.stream_mix)
def stream_mix(x: mx.array, h_res: mx.array) -> mx.array:
    lead, n, _ = check_streams("stream_mix", x)
    check_array("stream_mix", "h_res", h_res, "nn", (n, n), lead)
    return reference.stream_mix(x, h_res)
