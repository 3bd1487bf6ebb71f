"""Small arrays that kernels read, and tokens in a row."""

import functools

import mlx.core as mx

from ..conventions import ROW_FIRST, Convention


@functools.cache
def constants(*values: float) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def identity(n: int) -> mx.array:
    """I ``[n, n]``: made of numbers, it belongs to no stream and serves any thread."""
    return mx.array([[float(i == j) for j in range(n)] for i in range(n)])


def fused_params(*, eps: float, convention: Convention | None) -> mx.array:
    """``params`` of `mhc_fused`, its gradients and `sum_partials`."""
    c = convention or ROW_FIRST
    return constants(eps, c.pre_eps, c.post_scale, c.post_eps, c.eps)


def pre_params(*, convention: Convention, norm_eps: float = 1.0, eps: float = 1.0) -> mx.array:
    """``params`` of `mhc_pre`, `mhc_seam` and their gradients; 1 where nothing is read."""
    c = convention
    return constants(c.pre_eps, c.post_scale, c.post_eps, norm_eps, eps, c.eps)


def flat(a: mx.array, ndim: int) -> mx.array:
    """The array with all leading axes as one, so that it has ``ndim``."""
    return a if a.ndim == ndim else a.reshape(-1, *a.shape[a.ndim - ndim + 1 :])


def unflat(a: mx.array, shape: tuple[int, ...]) -> mx.array:
    return a if a.shape == shape else a.reshape(shape)
