"""Qwen's gated residual: a norm of each stream, and a read with a gate for each channel."""

from dataclasses import dataclass

import mlx.core as mx

from .. import launch, reference
from . import tiling
from .arrays import flat
from .autodiff import FusedOp, Options
from .checks import (
    check_array,
    check_bools,
    check_branch,
    check_eps,
    check_streams,
    check_threads,
    fail,
)

__all__ = ["gate_mix", "stream_norm"]


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
    check_eps(op, eps)
    check_threads(op, threads_per_group)
    check_bools(op, use_metal=use_metal, verbose=verbose, differentiable=differentiable)
    return reference.stream_norm(x, weight, y, h_post, inject, eps)


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
