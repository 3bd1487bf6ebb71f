"""Functions of `reference` that have no kernels, with their arguments checked."""

import functools

import mlx.core as mx

from .. import reference
from ..conventions import PAPER, Convention
from .dispatch import (
    MAX_STREAMS,
    check_array,
    check_convention,
    check_dtype,
    check_eps,
    check_streams,
    fail,
)


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


@functools.wraps(reference.project)
def project(logits: mx.array, n: int, convention: Convention = PAPER) -> mx.array | None:
    op = "project"
    check_convention(op, convention)
    convention.check_streams(op, n)
    if n > MAX_STREAMS:
        raise ValueError(fail(op, "n", f"be at most {MAX_STREAMS}", n))
    _, size = _rows(op, "logits", logits)
    R = convention.res_size(n)
    if size != R:
        raise ValueError(fail(op, "logits", f"have shape [..., R={R}]", list(logits.shape)))
    return reference.project(logits, n, convention)


@functools.wraps(reference.gates)
def gates(H_pre: mx.array, H_post: mx.array, convention: Convention) -> tuple[mx.array, mx.array]:
    check_convention("gates", convention)
    check_dtype("gates", H_pre=H_pre, H_post=H_post)
    return reference.gates(H_pre, H_post, convention)
