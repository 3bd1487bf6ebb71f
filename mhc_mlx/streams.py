"""Functions between a network's hidden state ``[..., C]`` and its streams ``[..., n, C]``."""

import math

import mlx.core as mx

from .ops.checks import check_dtype, check_sizes, check_type

__all__ = ["expand_streams", "merge_streams", "reduce_streams", "split_streams"]


def split_streams(h: mx.array, n: int) -> mx.array:
    """Reshape h ``[..., n*C]`` of any dtype to n streams ``[..., n, C]``.

    Raises:
        TypeError: h is no array, or n is no int.
        ValueError: n is not positive, or does not divide the last axis of h.
    """
    check_type("split_streams", h=h)
    check_sizes("split_streams", n=(n, math.inf))
    if h.ndim < 1 or h.shape[-1] % n:
        raise ValueError(f"[split_streams] h must have shape [..., {n}*C] but got {list(h.shape)}.")
    return mx.reshape(h, (*h.shape[:-1], n, h.shape[-1] // n))


def merge_streams(x: mx.array) -> mx.array:
    """Reshape streams x ``[..., n, C]`` of any dtype to ``[..., n*C]``.

    Raises:
        TypeError: x is no array.
        ValueError: x has fewer than two axes.
    """
    check_type("merge_streams", x=x)
    if x.ndim < 2:
        raise ValueError(f"[merge_streams] x must have shape [..., n, C] but got {list(x.shape)}.")
    return mx.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def expand_streams(h: mx.array, n: int) -> mx.array:
    """Copy a hidden state h ``[..., C]`` of any dtype to n equal streams ``[..., n, C]``.

    A model does this before its first hyper-connection.

    Raises:
        TypeError: h is no array, or n is no int.
        ValueError: n is not positive, or h has no axis.
    """
    check_type("expand_streams", h=h)
    check_sizes("expand_streams", n=(n, math.inf))
    if h.ndim < 1:
        raise ValueError(f"[expand_streams] h must have shape [..., C] but got {list(h.shape)}.")
    return mx.repeat(h[..., None, :], n, axis=-2)


def reduce_streams(x: mx.array, how: str = "mean") -> mx.array:
    """Reduce streams x ``[..., n, C]`` to a hidden state ``[..., C]`` in x's dtype.

    A model does this after its last hyper-connection: ``"mean"`` is sum_j x[j] / n, ``"sum"`` is
    sum_j x[j] and ``"first"`` is x[0]. Sums are float32 and rounded to x's dtype once.

    Raises:
        TypeError: x is no array of float32, float16 or bfloat16.
        ValueError: x has fewer than two axes, or ``how`` is none of the three.
    """
    check_dtype("reduce_streams", x=x)
    if x.ndim < 2:
        raise ValueError(f"[reduce_streams] x must have shape [..., n, C] but got {list(x.shape)}.")
    if how == "first":
        return x[..., 0, :]
    if how not in ("mean", "sum"):
        raise ValueError(f"[reduce_streams] how must be 'mean', 'sum' or 'first' but got {how!r}.")
    xf = x.astype(mx.float32)
    return (xf.mean(-2) if how == "mean" else xf.sum(-2)).astype(x.dtype)
