"""Qwen's gated residual: a norm of each stream, and a read with a gate for each channel."""

import math
from dataclasses import dataclass

import mlx.core as mx

from .. import launch, reference
from . import tiling
from .arrays import body_params, flat
from .autodiff import FusedOp, Options
from .checks import (
    MAX_INJECT,
    check_array,
    check_branch,
    check_eps,
    check_most,
    check_streams,
    fail,
)
from .streams import TokenBody, token_arguments
from .sums import sum_partials

__all__ = ["gate_mix", "stream_norm"]

# ---- stream_norm


@dataclass(frozen=True)
class StreamNormBackwardBody(TokenBody):
    name = "stream_norm_backward"
    PASSES: int
    CACHED: bool
    BLOCK: int
    WRITE_BACK: bool
    POST_PER_TOKEN: bool
    INJECT: bool


@dataclass(frozen=True)
class StreamNormBody(StreamNormBackwardBody):
    name = "stream_norm"
    TILE: int


@dataclass(frozen=True)
class StreamNormBackwardWeightsBody(TokenBody):
    name = "stream_norm_backward_weights"
    ROWS: int
    INJECT: bool


@dataclass(frozen=True)
class StreamNorm(FusedOp):
    eps: float
    has_inject: bool  # otherwise next_post is None

    name = "stream_norm"
    shared_ndim = (None, 2, None, 1, 2)
    num_results = 3
    saves = True

    def absent_result(self, n: int) -> int | None:
        return None if self.has_inject else 2

    def fallback(self, x, weight, y, h_post, inject):
        return reference.stream_norm(x, weight, y, h_post, inject, self.eps)

    def arguments(self, x, t, h_post):
        """The template arguments of both bodies."""
        n = x.shape[-2]
        return {
            **token_arguments(x.dtype, n, t),
            "PASSES": t.passes,
            "CACHED": t.cached,
            "BLOCK": tiling.streams_at_once(n),
            "WRITE_BACK": h_post is not None,
            "POST_PER_TOKEN": h_post is not None and h_post.ndim > 1,
            "INJECT": self.has_inject,
        }

    def forward(self, x, weight, y, h_post, inject, save=False):
        """out, s, next_post; what is saved is out, and what the norm and the gates were made of."""
        flat_x, threads, device = flat(x, 3), self.options.threads_per_group, launch.device()
        tokens, n, C = flat_x.shape
        t = tiling.seam_tiling(tiling.streams_at_once(n), C, x.dtype.size, threads, device)
        params = body_params(None, eps=self.eps)
        inputs = {"x": flat_x, "y": y, "h_post": h_post, "weight": weight, "inject": inject}
        outputs = {
            "out": None if y is None else (x.shape, x.dtype),
            "s": (x.shape, x.dtype),
            "next_post": (x.shape[:-1], mx.float32) if self.has_inject else None,
            "roots": ((tokens, n), mx.float32),
            "post_logits": ((tokens, n), mx.float32) if self.has_inject else None,
        }
        tile = tiling.norm_tile(t, n, x.dtype.size, tokens, self.has_inject, device)
        body = StreamNormBody(**self.arguments(x, t, h_post), TILE=tile)
        groups = tiling.many_groups(math.ceil(tokens / tile), device)
        d = launch.launch(body, inputs | {"params": params}, outputs, groups, self.options)
        out = d.get("out", x)
        return (out, d["s"], d.get("next_post")), (out, d["roots"], d.get("post_logits"))

    def backward(self, arrays, cotangents, saved):
        (x, weight, y, h_post, inject), (dout, ds, dnext_post) = arrays, cotangents
        (out, roots, *post_logits), options = saved, self.options
        flat_out, device = flat(out, 3), launch.device()
        tokens, n, C = flat_out.shape
        t = tiling.norm_backward_tiling(n, C, x.dtype.size, options.threads_per_group, device)
        body = StreamNormBackwardBody(**self.arguments(x, t, h_post))
        groups, shared = tiling.many_groups(tokens, device), body.WRITE_BACK != body.POST_PER_TOKEN
        if shared:
            groups = tiling.backward_groups(tokens, t.threads, device)
        norm = {"x": flat_out, "roots": roots, "ds": ds, "weight": weight, "inject": inject}
        inputs = norm | {"dout": dout, "y": y, "h_post": h_post, "dnext_post": dnext_post}
        inputs["post_logits"] = post_logits[0] if post_logits else None
        outputs = {
            "dx": (x.shape, x.dtype),
            "dy": None if y is None else (y.shape, x.dtype),
            "dh_post": (h_post.shape, mx.float32) if body.POST_PER_TOKEN else None,
            "partial": ((groups, n), mx.float32) if shared else None,
            "dlogits": ((tokens, n), mx.float32) if self.has_inject else None,
        }
        d = launch.launch(body, inputs, outputs, groups, options)
        dh_post = sum_partials(d["partial"], options) if shared else d.get("dh_post")
        dweight, dinject = self.weight_gradients(norm | {"dlogits": d.get("dlogits")})
        return d["dx"], dweight, d.get("dy"), dh_post, dinject

    def weight_gradients(self, norm):
        """The gradients of weight and inject, which is None where there is no inject."""
        x, threads, device = norm["x"], self.options.threads_per_group, launch.device()
        tokens, n, C = x.shape
        rows = tiling.largest_divisor(n, 8) if self.has_inject else 0
        t = tiling.norm_weights_tiling(n, C, rows, tokens, threads, device)
        body = StreamNormBackwardWeightsBody(
            x.dtype, n, t.vec, t.threads, ROWS=rows, INJECT=self.has_inject
        )
        inputs = norm | {"weight": norm["weight"] if self.has_inject else None}
        blocks = n // rows if rows else 1
        outputs = {"partial": ((t.chunks, blocks * (1 + rows) * n * C), mx.float32)}
        groups = t.chunks * t.groups_per_chunk
        partial = launch.launch(body, inputs, outputs, groups, self.options)["partial"]
        sums = sum_partials(partial, self.options, shape=(blocks, 1 + rows, n, C))
        dweight = sums[:, 0].sum(0) if blocks > 1 else sums[0, 0]
        return dweight, sums[:, 1:].reshape(norm["inject"].shape) if rows else None


def stream_norm(
    x: mx.array,
    weight: mx.array,
    y: mx.array | None = None,
    h_post: mx.array | None = None,
    inject: mx.array | None = None,
    eps: float = 1e-6,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Normalise each stream by itself, after a write-back if there is one (Qwen's gated residual).

    ``out[j] = x[j] + h_post[j] y``, rounded to x's dtype, or x itself without y;
    ``s[j] = out[j] * rsqrt(mean(out[j]**2) + eps) * (1 + weight[j])``, rounded to x's dtype;
    ``next_post = 2 sigmoid(inject @ vec(s) / n)``, the h_post of the next write-back.

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        weight: ``[n, C]``, centred at 0, of any of these dtypes.
        y: ``[..., C]`` in x's dtype, or None for no write-back.
        h_post: ``[..., n]`` with x's leading axes, or ``[n]``, of any of these dtypes; given with
            y, None without.
        inject: ``[n, n*C]``, of any of these dtypes, or None for no next_post.
        eps: Added to the mean square, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        out and s ``[..., n, C]`` in x's dtype, and next_post ``[..., n]`` float32 or None.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "stream_norm"
    lead, n, C = check_streams(op, x)
    check_array(op, "weight", weight, "nC", (n, C))
    if (y is None) != (h_post is None):
        given, absent = ("h_post", "y") if y is None else ("y", "h_post")
        raise ValueError(fail(op, absent, f"be given together with {given}", None))
    if y is not None and h_post is not None:
        check_branch(op, x, y)
        check_array(op, "h_post", h_post, "n", (n,), lead)
    if inject is not None:
        check_array(op, "inject", inject, ("n", "n*C"), (n, n * C))
        check_most(op, "inject", "a size", inject.size, MAX_INJECT)
    check_eps(op, eps)
    fused = StreamNorm(Options(threads_per_group, verbose), eps, inject is not None)
    arrays = (x, weight, y, h_post, inject)
    return fused(*arrays, use_metal=use_metal, differentiable=differentiable)


# ---- gate_mix


@dataclass(frozen=True)
class GateMixBody(launch.Body):
    name = "gate_mix"
    T: mx.Dtype
    N: int
    VEC: int
    THREADS: int


@dataclass(frozen=True)
class GateMixBackwardBody(GateMixBody):
    name = "gate_mix_backward"


@dataclass(frozen=True)
class GateMix(FusedOp):
    name = "gate_mix"
    shared_ndim = (None, None)

    def fallback(self, gate_logits, s):
        return reference.gate_mix(gate_logits, s)

    def launched(self, record, inputs, outputs):
        tokens, n, C = inputs["s"].shape
        dtype, threads = inputs["s"].dtype, self.options.threads_per_group
        t = tiling.gate_tiling(tokens, C, dtype.size, threads, launch.device())
        body = record(T=dtype, N=n, VEC=t.vec, THREADS=t.threads)
        return launch.launch(body, inputs, outputs, t.groups, self.options)

    def forward(self, gate_logits, s):
        inputs = {"gate_logits": flat(gate_logits, 3), "s": flat(s, 3)}
        u = (*s.shape[:-2], s.shape[-1])
        return self.launched(GateMixBody, inputs, {"u": (u, s.dtype)})["u"]

    def backward(self, arrays, cotangents, saved):
        (gate_logits, s), (du,) = arrays, cotangents
        inputs = {"gate_logits": flat(gate_logits, 3), "s": flat(s, 3), "du": du}
        outputs = {"dgate_logits": (s.shape, s.dtype), "ds": (s.shape, s.dtype)}
        d = self.launched(GateMixBackwardBody, inputs, outputs)
        return d["dgate_logits"], d["ds"]


def gate_mix(
    gate_logits: mx.array,
    s: mx.array,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """Read streams with a gate for each channel: ``u = mean_j sigmoid(gate_logits[j]) s[j]``.

    Args:
        gate_logits: ``[..., n, C]`` float32, float16 or bfloat16.
        s: ``[..., n, C]``, in shape and dtype like gate_logits.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        u ``[..., C]`` in s's dtype, summed in float32 and rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "gate_mix"
    lead, n, C = check_streams(op, s, "s")
    check_array(op, "gate_logits", gate_logits, ("",) * len(lead) + ("n", "C"), (*lead, n, C))
    if gate_logits.dtype != s.dtype:
        raise TypeError(
            fail(op, "gate_logits", f"have the dtype {s.dtype} of s", gate_logits.dtype)
        )
    fused = GateMix(Options(threads_per_group, verbose))
    return fused(gate_logits, s, use_metal=use_metal, differentiable=differentiable)
