"""Small arrays that kernels read, and tokens in a row."""

import functools
from typing import NamedTuple

import mlx.core as mx

from ..conventions import ROW_FIRST, Convention


@functools.cache
def constants(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def identity(n: int) -> mx.array:
    """I ``[n, n]``: made of numbers, it belongs to no stream and serves any thread."""
    return mx.array([[float(i == j) for j in range(n)] for i in range(n)])


class Params(NamedTuple):
    """The numbers of ``params``, in the order of mhc::param in kernels/include/common.h.

    The last two are there only with a clamp: Metal has an array of fewer than eight numbers in its
    constant address space.
    """

    pre_eps: float
    post_scale: float
    post_eps: float
    projection_eps: float
    norm_eps: float
    eps: float
    clamp_low: float = 0.0
    clamp_high: float = 0.0


def body_params(
    convention: Convention | None, *, norm_eps: float = 1.0, eps: float = 1.0
) -> mx.array:
    """``params`` of any body; what it does not read may be any number."""
    c = convention or ROW_FIRST
    gates = {"pre_eps": c.pre_eps, "post_scale": c.post_scale, "post_eps": c.post_eps}
    params = Params(**gates, projection_eps=c.eps, norm_eps=norm_eps, eps=eps)
    return constants(params[:6] if c.clamp is None else (*params[:6], *c.clamp))


def flat(a: mx.array, ndim: int) -> mx.array:
    """The array with all leading axes as one, so that it has ``ndim``."""
    return a if a.ndim == ndim else a.reshape(-1, *a.shape[a.ndim - ndim + 1 :])


def unflat(a: mx.array, shape: tuple[int, ...]) -> mx.array:
    return a if a.shape == shape else a.reshape(shape)
