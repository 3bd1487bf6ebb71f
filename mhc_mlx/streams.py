"""Between a network's hidden state and its streams."""

import math

import mlx.core as mx

from .ops.checks import check_dtype, check_sizes, check_type

__all__ = ["expand_streams", "merge_streams", "reduce_streams", "split_streams"]


def split_streams(h: mx.array, n: int) -> mx.array:
    """``[..., n*C] -> [..., n, C]``."""
    check_type("split_streams", h=h)
    check_sizes("split_streams", n=(n, math.inf))
    if h.ndim < 1 or h.shape[-1] % n:
        raise ValueError(f"[split_streams] h must have shape [..., {n}*C] but got {list(h.shape)}.")
    return mx.reshape(h, (*h.shape[:-1], n, h.shape[-1] // n))


def merge_streams(x: mx.array) -> mx.array:
    """``[..., n, C] -> [..., n*C]``."""
    check_type("merge_streams", x=x)
    if x.ndim < 2:
        raise ValueError(f"[merge_streams] x must have shape [..., n, C] but got {list(x.shape)}.")
    return mx.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def expand_streams(h: mx.array, n: int) -> mx.array:
    """Copy ``[..., C]`` into n equal streams ``[..., n, C]``: how a model enters."""
    check_type("expand_streams", h=h)
    check_sizes("expand_streams", n=(n, math.inf))
    if h.ndim < 1:
        raise ValueError(f"[expand_streams] h must have shape [..., C] but got {list(h.shape)}.")
    return mx.repeat(h[..., None, :], n, axis=-2)


def reduce_streams(x: mx.array, how: str = "mean") -> mx.array:
    """``[..., n, C] -> [..., C]`` by ``"mean"``, ``"sum"`` or ``"first"``: how a model leaves
    hyper-connections. Sums run in float32 and are rounded to x's dtype once.
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
