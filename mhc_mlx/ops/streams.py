"""How streams are read, mixed and written back with ready coefficients."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from .. import launch, reference
from . import tiling
from .arrays import body_params, flat, unflat
from .autodiff import FusedOp, Options
from .checks import check_array, check_branch, check_eps, check_rows, check_streams
from .sinkhorn import HalfSteps, half_steps
from .sums import sum_partials

__all__ = ["rms_norm", "stream_aggregate", "stream_distribute", "stream_mix", "stream_mix_add"]


@dataclass(frozen=True)
class TokenBody(launch.Body):
    """A body in which a threadgroup takes a token."""

    T: mx.Dtype
    N: int
    VEC: int
    THREADS: int


def token_arguments(dtype: mx.Dtype, n: int, t: tiling.TokenTiling) -> dict[str, Any]:
    """The template arguments that each `TokenBody` has."""
    return {"T": dtype, "N": n, "VEC": t.vec, "THREADS": t.threads}


# ---- stream_aggregate


@dataclass(frozen=True)
class StreamAggregateBody(TokenBody):
    name = "stream_aggregate"
    PER_TOKEN: bool


@dataclass(frozen=True)
class StreamAggregateBackwardBody(StreamAggregateBody):
    name = "stream_aggregate_backward"


@dataclass(frozen=True)
class StreamAggregate(FusedOp):
    name = "stream_aggregate"
    shared_ndim = (None, 1)

    def fallback(self, x, h_pre):
        return reference.stream_aggregate(x, h_pre)

    def forward(self, x, h_pre):
        flat_x, threads = flat(x, 3), self.options.threads_per_group
        (tokens, n, C), device = flat_x.shape, launch.device()
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, device)
        body = StreamAggregateBody(**token_arguments(x.dtype, n, t), PER_TOKEN=h_pre.ndim > 1)
        inputs, outputs = {"x": flat_x, "h_pre": h_pre}, {"u": ((*x.shape[:-2], C), x.dtype)}
        groups = tiling.many_groups(tokens, device)
        return launch.launch(body, inputs, outputs, groups, self.options)["u"]

    def backward(self, arrays, cotangents, saved):
        (x, h_pre), (du,) = arrays, cotangents
        flat_x, threads, per_token = flat(x, 3), self.options.threads_per_group, h_pre.ndim > 1
        (tokens, n, C), device = flat_x.shape, launch.device()
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, device)
        body = StreamAggregateBackwardBody(**token_arguments(x.dtype, n, t), PER_TOKEN=per_token)
        groups = tiling.backward_groups(tokens, t.threads, device)
        groups = tiling.many_groups(tokens, device) if per_token else groups
        inputs = {"x": flat_x, "h_pre": h_pre, "du": du}
        outputs = {
            "dx": (x.shape, x.dtype),
            "dh_pre": (h_pre.shape, mx.float32) if per_token else None,
            "partial": None if per_token else ((groups, n), mx.float32),
        }
        d = launch.launch(body, inputs, outputs, groups, self.options)
        return d["dx"], d["dh_pre"] if per_token else sum_partials(d["partial"], self.options)


def stream_aggregate(
    x: mx.array,
    h_pre: mx.array,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """What a sublayer reads: ``u = sum_j h_pre[j] x[j]`` (arXiv 2512.24880, eq. 3).

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        h_pre: ``[n]``, or per token ``[..., n]`` with x's leading axes, of any of these dtypes.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        u ``[..., C]`` in x's dtype, summed in float32 and rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    lead, n, _ = check_streams("stream_aggregate", x)
    check_array("stream_aggregate", "h_pre", h_pre, "n", (n,), lead)
    fused = StreamAggregate(Options(threads_per_group, verbose))
    return fused(x, h_pre, use_metal=use_metal, differentiable=differentiable)


# ---- stream_mix_add


@dataclass(frozen=True)
class StreamMixAddBody(TokenBody):
    name = "stream_mix_add"
    POST_PER_TOKEN: bool
    RES_PER_TOKEN: bool


@dataclass(frozen=True)
class MhcFusedBackwardWideBody(launch.Body):
    name = "mhc_fused_backward_wide"
    T: mx.Dtype
    N: int
    THREADS: int
    MIX: bool
    NORM: bool
    GATES: bool
    POST_PER_TOKEN: bool
    RES_PER_TOKEN: bool


@dataclass(frozen=True)
class MhcFusedBackwardBody(MhcFusedBackwardWideBody):
    name = "mhc_fused_backward"
    VEC: int
    PASSES: int
    CACHED: bool
    SINKHORN: bool
    half_steps: HalfSteps


class Layer(NamedTuple):
    """The arrays of a layer's bodies but x; None where a variant has none."""

    H_pre: mx.array | None = None
    H_post: mx.array | None = None
    H_res: mx.array | None = None
    weight: mx.array | None = None


SHARED_NDIM = {"H_pre": 1, "H_post": 1, "H_res": 2, "weight": 1}  # axes of one that tokens share


def launch_fused_backward(x, y, layer, dout, *, options, eps=1.0, convention=None):
    """The gradients by the names of the arrays: of `stream_mix_add`, which takes y, or of a layer.

    Without H_res it is that of aggregate and norm alone. With a convention H_pre and H_post may be
    logits of gates, and for n <= 8 H_res holds logits; its gradient is the projected matrix's.
    """
    body = _fused_backward_body(x, layer, convention, options, norm=y is None)
    present = {k: a for k, a in layer._asdict().items() if a is not None}
    shared = {k: a for k, a in present.items() if a.ndim == SHARED_NDIM[k]}
    per_token = {k: a for k, a in present.items() if k not in shared}
    flat_x, columns = flat(x, 3), sum(a.size for a in shared.values())
    tokens, device = flat_x.shape[0], launch.device()
    groups = tiling.many_groups(tokens, device)
    if shared:
        groups = tiling.backward_groups(tokens, body.THREADS, device)
    params = body_params(convention, eps=eps) if y is None else None
    inputs = {"x": flat_x, "y": y, "dout": dout, **layer._asdict(), "params": params}
    outputs = {
        "dx": (x.shape, x.dtype),
        "dy": None if y is None else (y.shape, x.dtype),
        "partial": ((groups, columns), mx.float32) if shared else None,
        "dh_post": None,
        "dh_res": None,
    }
    outputs |= {f"d{k.lower()}": (a.shape, mx.float32) for k, a in per_token.items()}
    d = launch.launch(body, inputs, outputs, groups, options)
    gradients = {"x": d["dx"]} | {k: d[f"d{k.lower()}"] for k in per_token}
    if y is not None:
        gradients["y"] = d["dy"]
    if shared:
        gates, params = (layer, params) if body.GATES else (Layer(), None)
        H_pre, H_post = gates.H_pre, gates.H_post
        sums = sum_partials(d["partial"], options, H_pre=H_pre, H_post=H_post, params=params)
        ends = itertools.accumulate(a.size for a in shared.values())
        for (k, a), end in zip(shared.items(), ends, strict=True):
            gradients[k] = unflat(sums[end - a.size : end], a.shape)
    return gradients


def _fused_backward_body(x, layer, convention, options, *, norm):
    (n, C), threads = x.shape[-2:], options.threads_per_group
    _, H_post, H_res, _ = layer
    arguments: dict[str, Any] = {
        "T": x.dtype,
        "N": n,
        "MIX": H_res is not None,
        "NORM": norm,
        "GATES": convention is not None and convention.sigmoid,
        "POST_PER_TOKEN": H_post is not None and H_post.ndim > 1,
        "RES_PER_TOKEN": H_res is not None and H_res.ndim > 2,
    }
    if n > 8:
        return MhcFusedBackwardWideBody(**arguments, THREADS=threads or 256)
    t = tiling.token_tiling(n, C, x.dtype.size, 2, threads, launch.device())
    return MhcFusedBackwardBody(
        **arguments,
        VEC=t.vec,
        THREADS=t.threads,
        PASSES=t.passes,
        CACHED=t.cached,
        SINKHORN=convention is not None,
        half_steps=half_steps(convention),
    )


@dataclass(frozen=True)
class StreamMixAdd(FusedOp):
    name = "stream_mix_add"
    shared_ndim = (None, None, 1, 2)
    h_res_index = 3

    def fallback(self, x, y, h_post, h_res):
        return reference.stream_mix_add(x, y, h_post, h_res)

    def forward(self, x, y, h_post, h_res):
        flat_x, threads = flat(x, 3), self.options.threads_per_group
        (tokens, n, C), device = flat_x.shape, launch.device()
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, device)
        per_token = {"POST_PER_TOKEN": h_post.ndim > 1, "RES_PER_TOKEN": h_res.ndim > 2}
        body = StreamMixAddBody(**token_arguments(x.dtype, n, t), **per_token)
        inputs = {"x": flat_x, "y": y, "h_post": h_post, "h_res": h_res}
        outputs, groups = {"out": (x.shape, x.dtype)}, tiling.many_groups(tokens, device)
        return launch.launch(body, inputs, outputs, groups, self.options)["out"]

    def backward(self, arrays, cotangents, saved):
        (x, y, h_post, h_res), (dout,) = arrays, cotangents
        layer = Layer(H_post=h_post, H_res=h_res)
        d = launch_fused_backward(x, y, layer, dout, options=self.options)
        return d["x"], d["y"], d["H_post"], d["H_res"]


def stream_mix_add(
    x: mx.array,
    y: mx.array,
    h_post: mx.array,
    h_res: mx.array | None = None,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """Write back: ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] y`` (arXiv 2512.24880, eq. 3).

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        y: ``[..., C]`` in x's dtype.
        h_post: ``[n]``, or ``[..., n]`` with x's leading axes, of any of these dtypes.
        h_res: ``[n, n]``, or ``[..., n, n]``, row = output; None is the identity.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        out ``[..., n, C]`` in x's dtype, summed in float32 and rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "stream_mix_add"
    lead, n, _ = check_streams(op, x)
    check_branch(op, x, y)
    check_array(op, "h_post", h_post, "n", (n,), lead)
    if h_res is not None:
        check_array(op, "h_res", h_res, "nn", (n, n), lead)
    fused = StreamMixAdd(Options(threads_per_group, verbose))
    return fused(x, y, h_post, h_res, use_metal=use_metal, differentiable=differentiable)


# ---- without kernels


def stream_mix(x: mx.array, h_res: mx.array) -> mx.array:
    """How streams pass a sublayer: ``out[i] = sum_j h_res[i, j] x[j]``; without kernels.

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        h_res: ``[n, n]``, or per token ``[..., n, n]``, of any of these dtypes, row = output.

    Returns:
        out in x's dtype and shape.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    lead, n, _ = check_streams("stream_mix", x)
    check_array("stream_mix", "h_res", h_res, "nn", (n, n), lead)
    return reference.stream_mix(x, h_res)


def stream_distribute(y: mx.array, h_post: mx.array) -> mx.array:
    """What a sublayer writes: ``out[i] = h_post[i] y``; without kernels.

    Args:
        y: ``[..., C]`` float32, float16 or bfloat16.
        h_post: ``[n]``, or per token ``[..., n]``, of any of these dtypes.

    Returns:
        out ``[..., n, C]`` in y's dtype.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "stream_distribute"
    lead, _ = check_rows(op, "y", y)
    _, n = check_rows(op, "h_post", h_post)
    check_array(op, "h_post", h_post, "n", (n,), lead)
    return reference.stream_distribute(y, h_post)


def rms_norm(u: mx.array, weight: mx.array, eps: float = 1e-5) -> mx.array:
    """``u * rsqrt(mean(u**2) + eps) * weight`` over the last axis; without kernels.

    Args:
        u: ``[..., C]`` float32, float16 or bfloat16.
        weight: ``[C]``, of any of these dtypes.
        eps: A number above 0.

    Returns:
        ``[..., C]`` in u's dtype.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    _, C = check_rows("rms_norm", "u", u)
    check_array("rms_norm", "weight", weight, "C", (C,))
    check_eps("rms_norm", eps)
    return reference.rms_norm(u, weight, eps)
