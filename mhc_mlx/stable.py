"""Sums, sigmoid and softmax for the reference, whose values and gradients keep their digits."""

import mlx.core as mx

__all__ = [
    "below_largest",
    "largest_by_sum",
    "largest_mask",
    "line_sum",
    "log_softmax",
    "long_sum",
    "sigmoid",
    "softmax",
]


def long_sum(v: mx.array, width: int = 128) -> mx.array:
    """Return the sum over the last axis, by sums of ``width`` elements, then by sums of these sums.

    MLX on a CPU adds a row in a single chain, whose rounding errors grow with its length.
    """
    while v.shape[-1] > width:
        padding = -v.shape[-1] % width
        if padding:
            v = mx.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, padding)])
        v = v.reshape(*v.shape[:-1], v.shape[-1] // width, width).sum(-1)
    return v.sum(-1)


def line_sum(p: mx.array, axis: int) -> mx.array:
    """``p.sum(axis, keepdims=True)`` of matrices, by sums of eight elements.

    In one long chain each small element would be rounded to the last digit of a large one.
    """
    if p.shape[-1] <= 8:
        return p.sum(axis=axis, keepdims=True)
    total = long_sum(p if axis == -1 else p.swapaxes(-1, -2), 8)
    return total[..., None] if axis == -1 else total[..., None, :]


def sigmoid(z: mx.array) -> mx.array:
    """``1 / (1 + exp(-z))``, whose derivative is ``sigmoid(z) * sigmoid(-z)``.

    The form ``sigmoid(z) * (1 - sigmoid(z))`` loses its digits where the sigmoid is near 1.
    """
    t = mx.exp(mx.where(z < 0, z, -z))
    return mx.where(z < 0, t, 1.0) / (1 + t)


def largest_mask(a: mx.array, axis: int) -> mx.array:
    """Return a mask of the largest element along axis; of equal ones the first."""
    index = mx.argmax(mx.stop_gradient(a), axis=axis, keepdims=True)
    indices = mx.arange(a.shape[axis])
    return index == (indices if axis == -1 else indices[:, None])


def largest_by_sum(p: mx.array, axis: int, total: mx.array | float = 1.0) -> mx.array:
    """Return p, whose sum along axis is total, with the largest as total minus all others' sum.

    The value stays the same, but the gradient of each other element becomes a difference from the
    gradient of the largest. Otherwise ``p * (dp - sum(p * dp))`` loses its digits where the largest
    is near 1.
    """
    mask = largest_mask(p, axis)
    remainder = total - line_sum(mx.where(mask, 0.0, p), axis)
    return mx.where(mask, mx.stop_gradient(p - remainder) + remainder, p)


def below_largest(a: mx.array, axis: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return the mask of the largest a along axis, d = a - max(a), and the sum of the other exp(d).

    A softmax and its gradient need these three.
    """
    largest = largest_mask(a, axis)
    top = mx.where(largest, a, 0.0).sum(axis=axis, keepdims=True)
    a = a + mx.stop_gradient(mx.maximum(a, top - 3.4e38) - a)  # so that a - top is finite
    d = mx.where(largest, 0.0, a - top)
    return largest, d, line_sum(mx.where(largest, 0.0, mx.exp(d)), axis)


def softmax(a: mx.array) -> mx.array:
    """Return the softmax along the last axis."""
    largest, d, sum_of_others = below_largest(a, -1)
    return mx.where(largest, 1.0, mx.exp(d)) / (1 + sum_of_others)


def log_softmax(a: mx.array, axis: int) -> mx.array:
    """``a - logsumexp(a)`` along axis."""
    _, d, sum_of_others = below_largest(a, axis)
    return d - mx.log1p(sum_of_others)
