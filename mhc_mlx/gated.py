"""Qwen's gated residual as modules, which hold parameters, set their starts and call ops."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .layers import StreamModule, check_input, observer
from .ops.checks import FLOATS, check_sizes, check_type, fail

__all__ = ["GatedHead", "GatedResidual"]


@partial(mx.compile, shapeless=True)
def _activate(z: mx.array, n: int) -> mx.array:
    """``silu(z / n)``, in float32, rounded to z's dtype."""
    scaled = z.astype(mx.float32) / n
    return (scaled * mx.sigmoid(scaled)).astype(z.dtype)


@partial(mx.compile, shapeless=True)
def _inject_gate(z: mx.array, n: int) -> mx.array:
    """``2 sigmoid(z / n)``, float32."""
    return 2 * mx.sigmoid(z.astype(mx.float32) / n)


class _GatedRead(StreamModule):
    """`GatedResidual` and `GatedHead` read the streams alike."""

    dim: int
    num_streams: int
    rank: int
    eps: float
    weight: mx.array
    down: nn.Module
    up: nn.Module

    def __init__(self, dim, num_streams, rank, eps, use_metal, threads_per_group, differentiable):
        super().__init__()
        op, n = type(self).__name__, num_streams
        check_sizes(op, dim=(dim, math.inf), num_streams=(n, ops.MAX_STREAMS))
        rank = max(1, n * dim // 32) if rank is None else rank
        check_sizes(op, rank=(rank, math.inf))
        ops.check_eps(op, eps)
        self._set_options(use_metal, threads_per_group, differentiable)
        self.dim, self.num_streams, self.rank, self.eps = dim, n, rank, eps
        self.weight = mx.zeros((n, dim))
        self.down = nn.Linear(n * dim, rank, bias=False)
        self.up = nn.Linear(rank, n * dim, bias=False)
        self.up.weight = mx.random.normal((n * dim, rank)) * (0.02 / math.sqrt(rank))

    def _product(self, name: str, v: mx.array, outputs: int | None = None) -> mx.array:
        """Return what the submodule makes of v; ValueError unless it has that many outputs."""
        z = self[name](v)
        op = type(self).__name__
        check_type(op, **{f"{name}(s)": z})
        outputs = z.shape[-1] if outputs is None and z.ndim else outputs
        if z.shape != (*v.shape[:-1], outputs):
            must = f"return shape {[*v.shape[:-1], outputs or 'rank']}"
            raise ValueError(fail(op, name, must, list(z.shape)))
        return z

    def _normalise(self, x: mx.array, y: Any, h_post: Any, inject: mx.array | None) -> Any:
        """Return the arrays of `stream_norm`."""
        check_input(self, x, self.num_streams, self.dim)
        arrays = (x, self.weight, y, h_post, inject)
        return ops.stream_norm(*arrays, self.eps, **self._options)

    def _gate_logits(self, s: mx.array) -> mx.array:
        """Return the logits of the gates ``[..., n, C]`` in s's dtype."""
        n, C = self.num_streams, self.dim
        a = _activate(self._product("down", s.flatten(-2)), n)
        return self._product("up", a, n * C).reshape(s.shape).astype(s.dtype)

    def _extra_repr(self) -> str:
        return f"n={self.num_streams}, C={self.dim}, rank={self.rank}, eps={self.eps}"


class GatedResidual(_GatedRead):
    """This is the hyper-connection of Qwen3.8-Flash-Next, mlx-vlm's ``Qwen4ExpGatedResidual``.

        u, add_residual = connection(x)
        x = add_residual(sublayer(u))  # out[j] = x[j] + h_post[j] y

    Each stream is normalised by itself, and u, which takes the place of the sublayer's own norm, is
    read from these with a gate for each channel. With v = vec(s), the n*C elements of s in a row::

        s[j] = x[j] * rsqrt(mean(x[j]**2) + eps) * (1 + weight[j])      stream_norm
        a = silu(down(v) / n),  g = sigmoid(up(a)),  u = mean_j g[j] s[j]     gate_mix
        h_post = 2 sigmoid(inject(v) / n)

    Parameters: ``weight [n, C]``, centred at 0, and the modules ``down [rank, n*C]``,
    ``up [n*C, rank]`` and ``inject [n, n*C]``, each an `nn.Linear` without bias. They start in
    float32 and may be cast. The products are calls of these modules, so that they may be quantised
    or have LoRA; inject is part of `stream_norm` as long as it is an `nn.Linear` without bias, and
    MLX's product otherwise. s, u and the gates' logits are rounded to x's dtype, and h_post is
    float32. ``h_res`` is the identity.

    The starting values: weight is 0 and down is that of `nn.Linear`. up is normal with deviation
    0.02 / sqrt(rank), so that the gates are 1/2 within about 0.001, u is half the mean of the
    normalised streams, and down has a gradient at once. inject is normal with deviation
    n / (2 sqrt(n*C)), so that h_post is 1 with a deviation of 1/4 over tokens and streams: streams
    that start as copies must differ soon, because equal streams train alike. (The trainer's
    transformer of 8 sublayers, dim 32, after 200 steps of one seed: the similarity between streams
    is 0.87, validation 3.11 bits per byte; with a hundredth of that noise 1.000 and 3.17.)

    Args:
        dim: C, channels per stream.
        num_streams: n, 1 to 64.
        rank: Outputs of down; None takes n*C / 32, as Qwen3.8-Flash-Next has.
        eps: Added to the mean square of a stream, above 0.
        use_metal: Run the fused kernels where the default device has them (Metal or CUDA).
        threads_per_group: Threads in a threadgroup; None lets the shape decide.
        differentiable: False calls the kernels without their gradients, which
            `mx.export_function` needs. Like eps and the two options before, it is an attribute that
            may be set later.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range.
    """

    inject: nn.Module

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        rank: int | None = None,
        eps: float = 1e-6,
        *,
        use_metal: bool = True,
        threads_per_group: int | None = None,
        differentiable: bool = True,
    ):
        super().__init__(dim, num_streams, rank, eps, use_metal, threads_per_group, differentiable)
        n, width = num_streams, num_streams * dim
        self.inject = nn.Linear(width, n, bias=False)
        self.inject.weight = mx.random.normal((n, width)) * (n / 2 / math.sqrt(width))

    def _normalise_all(
        self, x: mx.array, y: mx.array | None = None, h_post: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return out, s and the next h_post."""
        inject: Any = self.inject
        is_plain = type(inject) is nn.Linear and "bias" not in inject
        if is_plain and inject.weight.dtype in FLOATS:
            return self._normalise(x, y, h_post, inject.weight)
        out, s, _ = self._normalise(x, y, h_post, None)
        n = self.num_streams
        return out, s, _inject_gate(self._product("inject", s.flatten(-2), n), n)

    def read(
        self, x: mx.array, y: mx.array | None = None, h_post: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Write back what the sublayer before returned, and read for the next, in one pass.

            y = h_post = None
            for connection, sublayer in zip(connections, sublayers):
                u, h_post, x = connection.read(x, y, h_post)
                y = sublayer(u)
            u = head(x, y, h_post)  # a GatedHead; or x = stream_mix_add(x, y, h_post)

        The write-back ``x[j] + h_post[j] y`` and the norm after it are one `stream_norm`, so that
        the streams are read once between two sublayers. `stability_report` sees no write-back that
        is done here.

        Args:
            x: ``[..., n, C]``.
            y: ``[..., C]`` in x's dtype, or None for no write-back.
            h_post: ``[..., n]``, that of the read before; given with y.

        Returns:
            u ``[..., C]`` in x's dtype, h_post ``[..., n]`` float32 of the next write-back, and the
            streams after the write-back, ``[..., n, C]``.

        Raises:
            TypeError, ValueError: A dtype or shape does not fit, or one of y and h_post is missing.
        """
        out, s, next_post = self._normalise_all(x, y, h_post)
        return ops.gate_mix(self._gate_logits(s), s, **self._options), next_post, out

    def coefficients(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return the gates ``[..., n, C]`` and h_post ``[..., n]``, float32, for streams x."""
        _, s, h_post = self._normalise_all(x)
        return mx.sigmoid(self._gate_logits(s).astype(mx.float32)), h_post

    def __call__(self, x: mx.array) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
        """Return u ``[..., C]`` of streams x ``[..., n, C]``, and the function ``add_residual``.

        ``add_residual(y)`` takes y ``[..., C]`` and returns the new streams ``[..., n, C]``. All
        arrays have x's dtype.
        """
        u, h_post, out = self.read(x)

        def add_residual(y: mx.array) -> mx.array:
            written = ops.stream_mix_add(out, y, h_post, **self._options)
            return observer.get()(self, out, written)

        return u, add_residual


class GatedHead(_GatedRead):
    """This is the read-out of Qwen3.8-Flash-Next: a `GatedResidual` that writes nothing back.

    ``u = mean_j sigmoid(up(silu(down(vec(s)) / n)))[j] s[j]``, s as there. It takes the place of
    the model's last norm. It has no inject.

    Args:
        dim, num_streams, rank, eps, use_metal, threads_per_group, differentiable: As in
            `GatedResidual`.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        rank: int | None = None,
        eps: float = 1e-6,
        *,
        use_metal: bool = True,
        threads_per_group: int | None = None,
        differentiable: bool = True,
    ):
        super().__init__(dim, num_streams, rank, eps, use_metal, threads_per_group, differentiable)

    def __call__(
        self, x: mx.array, y: mx.array | None = None, h_post: mx.array | None = None
    ) -> mx.array:
        """Return u ``[..., C]`` of streams x ``[..., n, C]``, in x's dtype.

        With y and h_post it is that of ``x[j] + h_post[j] y``, as in `GatedResidual.read`.
        """
        _, s, _ = self._normalise(x, y, h_post, None)
        return ops.gate_mix(self._gate_logits(s), s, **self._options)
