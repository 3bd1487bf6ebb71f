"""Modules: parameters, initial values, calls to ops."""

import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .conventions import ROW_FIRST, Convention
from .reference import gates


def split_streams(h: mx.array, n: int) -> mx.array:
    """``[..., n*C] -> [..., n, C]``."""
    if n < 1 or h.ndim < 1 or h.shape[-1] % n:
        raise ValueError(f"[split_streams] h must have shape [..., {n}*C] but got {list(h.shape)}.")
    return h.reshape(*h.shape[:-1], n, h.shape[-1] // n)


def merge_streams(x: mx.array) -> mx.array:
    """``[..., n, C] -> [..., n*C]``."""
    if x.ndim < 2:
        raise ValueError(f"[merge_streams] x must have shape [..., n, C] but got {list(x.shape)}.")
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def expand_streams(h: mx.array, n: int) -> mx.array:
    """Copy ``[..., C]`` into n equal streams ``[..., n, C]``: how a model enters."""
    if n < 1 or h.ndim < 1:
        got = f"{list(h.shape)} and {n}"
        raise ValueError(f"[expand_streams] h must be [..., C] and n positive but got {got}.")
    return mx.repeat(h[..., None, :], n, axis=-2)


def reduce_streams(x: mx.array, how: str = "mean") -> mx.array:
    """``[..., n, C] -> [..., C]`` by ``"mean"``, ``"sum"`` or ``"first"``: how a model leaves
    hyper-connections. Sums run in float32 and are rounded to x's dtype once.
    """
    if x.ndim < 2:
        raise ValueError(f"[reduce_streams] x must have shape [..., n, C] but got {list(x.shape)}.")
    if how == "first":
        return x[..., 0, :]
    if how not in ("mean", "sum"):
        raise ValueError(f"[reduce_streams] how must be 'mean', 'sum' or 'first' but got {how!r}.")
    xf = x.astype(mx.float32)
    return (xf.mean(-2) if how == "mean" else xf.sum(-2)).astype(x.dtype)


class MHCLayer(nn.Module):
    """The self-contained static layer of mHC.cu, mhc-mlx and SuperFused.

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] F(RMSNorm(sum_j h_pre[j] x[j]))``, coefficients
    made from float32 parameters ``H_pre [n]``, ``H_post [n]``, ``H_res [n, n]`` as ``convention``
    says; ``rms_weight [C]``.

    At the start h_pre is 0.9 on stream ``layer_idx % n`` and 0.1 / (n - 1) elsewhere, h_post is 1
    and h_res nearly the identity (off-diagonal logits -(8 + ln(n - 1))): a residual network, every
    gate where its gradient is alive. ADDITIVE starts with H_res = 0, H_pre = 1 / n, H_post = 1.
    Streams that are equal copies hide h_res and h_pre from the loss, so at step 0 their gradients
    may be zero by symmetry.

    Args:
        n: Streams, 1 to 64.
        C: Channels per stream.
        sinkhorn_iters: Sinkhorn-Knopp iterations; None keeps the convention's.
        eps: Of the RMSNorm, above 0.
        convention: How coefficients are made.
        dynamic: Per-token coefficients; not available yet.
        layer_idx: Which stream the layer reads at the start.
        use_metal: Run the fused kernels where the default device has them (Metal or CUDA).
        threads_per_group: Threads in a threadgroup; None picks from the shape.
    """

    def __init__(
        self,
        n: int,
        C: int,
        *,
        sinkhorn_iters: int | None = None,
        eps: float = 1e-5,
        convention: Convention = ROW_FIRST,
        dynamic: bool = False,
        layer_idx: int = 0,
        use_metal: bool = True,
        threads_per_group: int | None = None,
    ):
        super().__init__()
        if dynamic:
            raise ValueError("[MHCLayer] dynamic must be False but got True: not built yet.")
        for name, value, most in (("n", n, ops.MAX_STREAMS), ("C", C, math.inf)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"[MHCLayer] {name} must be an int but got {type(value).__name__}.")
            if not 1 <= value <= most:
                raise ValueError(f"[MHCLayer] {name} must be from 1 to {most} but got {value}.")
        ops._check_convention("MHCLayer", convention)
        ops._check_threads("MHCLayer", threads_per_group)
        ops._check_eps("MHCLayer", eps)
        self.eps = eps
        self._convention = (
            convention if sinkhorn_iters is None else replace(convention, iters=sinkhorn_iters)
        )
        self.use_metal = use_metal
        self.threads_per_group = threads_per_group
        if convention.sigmoid:
            pre = [0.9 if j == layer_idx % n else 0.1 / (n - 1) for j in range(n)]
            self.H_pre = mx.array([math.log(p / (1 - p)) for p in pre])
            self.H_post = mx.zeros(n)
            self.H_res = (mx.eye(n) - 1) * (8 + math.log(max(n - 1, 1)))
        else:
            self.H_pre = mx.full(n, 1 / n)
            self.H_post = mx.ones(n)
            self.H_res = mx.zeros((n, n))
        self.rms_weight = mx.ones(C)

    @property
    def convention(self) -> Convention:
        return self._convention

    def mixing_matrix(self) -> mx.array:
        """h_res ``[n, n]`` float32, row = output."""
        return ops.sinkhorn_knopp(self.H_res, self._convention, use_metal=self.use_metal)

    def __call__(
        self, x: mx.array, sublayer: Callable[[mx.array], mx.array] | None = None
    ) -> mx.array:
        """``[..., n, C] -> [..., n, C]`` in x's dtype; sublayer is F, the identity by default."""
        options = {"use_metal": self.use_metal, "threads_per_group": self.threads_per_group}
        parameters = (self.H_pre, self.H_post, self.H_res, self.rms_weight)
        if sublayer is None:
            return ops.mhc_layer(x, *parameters, self._convention, self.eps, **options)
        h_pre, h_post = gates(self.H_pre, self.H_post, self._convention)
        y = sublayer(ops.stream_aggregate_norm(x, h_pre, self.rms_weight, self.eps, **options))
        return ops.stream_mix_add(x, y, h_post, self.mixing_matrix(), **options)

    def _extra_repr(self) -> str:
        n, C = self.H_pre.shape[0], self.rms_weight.shape[0]
        c = self._convention
        return f"n={n}, C={C}, convention={c.name}, iters={c.iters}, eps={self.eps}"
