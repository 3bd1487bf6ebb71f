"""How streams are read, mixed and written back with ready coefficients."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from .. import launch, reference
from ..conventions import Convention
from . import tiling
from .arrays import body_params, flat, unflat
from .autodiff import FusedOp, Options
from .checks import check_array, check_branch, check_eps, check_rows, check_streams
from .sinkhorn import HalfSteps, half_steps
from .sums import sum_partials

__all__ = ["rms_norm", "stream_aggregate", "stream_distribute", "stream_mix", "stream_mix_add"]

# ---- stream_aggregate


@dataclass(frozen=True)
class StreamAggregateBody(launch.Body):
    name = "stream_aggregate"
    T: mx.Dtype
    N: int
    VEC: int
    THREADS: int
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
        tokens, n, C = flat(x, 3).shape
        threads = self.options.threads_per_group
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, launch.backend())
        return launch.launch(
            StreamAggregateBody(
                T=x.dtype, N=n, VEC=t.vec, THREADS=t.threads, PER_TOKEN=h_pre.ndim > 1
            ),
            {"x": flat(x, 3), "h_pre": h_pre},
            {"u": ((*x.shape[:-2], C), x.dtype)},
            tiling.many_groups(tokens),
            self.options,
        )["u"]

    def backward(self, arrays, cotangents, saved):
        (x, h_pre), (du,) = arrays, cotangents
        tokens, n, C = flat(x, 3).shape
        threads, per_token = self.options.threads_per_group, h_pre.ndim > 1
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, launch.backend())
        groups = tiling.backward_groups(tokens, t.threads)
        groups = tiling.many_groups(tokens) if per_token else groups
        made = launch.launch(
            StreamAggregateBackwardBody(
                T=x.dtype, N=n, VEC=t.vec, THREADS=t.threads, PER_TOKEN=per_token
            ),
            {"x": flat(x, 3), "h_pre": h_pre, "du": du},
            {
                "dx": (x.shape, x.dtype),
                "dh_pre": (h_pre.shape, mx.float32) if per_token else None,
                "partial": None if per_token else ((groups, n), mx.float32),
            },
            groups,
            self.options,
        )
        dh_pre = made["dh_pre"] if per_token else sum_partials(made["partial"], self.options)
        return made["dx"], dh_pre


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
class StreamMixAddBody(launch.Body):
    name = "stream_mix_add"
    T: mx.Dtype
    N: int
    VEC: int
    THREADS: int
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


class FusedGradients(NamedTuple):
    """Gradients of what `mhc_fused` or `stream_mix_add` takes, None of what it does not."""

    x: mx.array
    y: mx.array | None
    H_pre: mx.array | None
    H_post: mx.array | None
    h_res: mx.array | None  # of the projected matrix
    weight: mx.array | None


def launch_fused_backward(
    x: mx.array,
    dout: mx.array,
    *,
    y: mx.array | None = None,
    H_pre: mx.array | None = None,
    H_post: mx.array | None = None,
    H_res: mx.array | None = None,
    weight: mx.array | None = None,
    eps: float = 1.0,
    convention: Convention | None = None,
    options: Options,
) -> FusedGradients:
    """The gradient of `stream_mix_add`, which takes y, or of a layer, which takes a weight.

    Without H_res it is that of aggregate and norm alone. With a convention H_pre and H_post may be
    logits of gates, and for n <= 8 H_res holds logits.
    """
    shape, x = x.shape, flat(x, 3)
    tokens, n, C = x.shape
    norm, mix = y is None, H_res is not None
    arguments = {
        "T": x.dtype,
        "N": n,
        "MIX": mix,
        "NORM": norm,
        "GATES": convention is not None and convention.sigmoid,
        "POST_PER_TOKEN": mix and H_post.ndim > 1,
        "RES_PER_TOKEN": mix and H_res.ndim > 2,
    }
    if n <= 8:
        t = tiling.token_tiling(n, C, x.dtype.size, 2, options.threads_per_group, launch.backend())
        body = MhcFusedBackwardBody(
            **arguments,
            VEC=t.vec,
            THREADS=t.threads,
            PASSES=t.passes,
            CACHED=t.cached,
            SINKHORN=convention is not None,
            half_steps=half_steps(convention),
        )
    else:
        body = MhcFusedBackwardWideBody(**arguments, THREADS=options.threads_per_group or 256)
    columns = {
        "dH_pre": n if norm else 0,
        "dh_post": n if mix and not body.POST_PER_TOKEN else 0,
        "dh_res": n * n if mix and not body.RES_PER_TOKEN else 0,
        "dweight": C if norm else 0,
    }
    size = sum(columns.values())
    groups = tiling.backward_groups(tokens, body.THREADS) if size else tiling.many_groups(tokens)
    params = body_params(convention, eps=eps) if norm else None
    layer = {"H_pre": H_pre, "H_post": H_post, "H_res": H_res, "weight": weight, "params": params}
    made = launch.launch(
        body,
        {"x": x, "y": y, "dout": dout, **layer},
        {
            "dx": (shape, x.dtype),
            "dy": None if norm else (y.shape, x.dtype),
            "partial": ((groups, size), mx.float32) if size else None,
            "dh_post": (H_post.shape, mx.float32) if body.POST_PER_TOKEN else None,
            "dh_res": (H_res.shape, mx.float32) if body.RES_PER_TOKEN else None,
        },
        groups,
        options,
    )
    if size:
        gates = {"H_pre": H_pre, "H_post": H_post, "params": params} if body.GATES else {}
        sums, start = sum_partials(made["partial"], options, **gates), 0
        for name, width in columns.items():
            if width:
                made[name] = sums[start : start + width]
                start += width
    return FusedGradients(
        x=made["dx"],
        y=made["dy"],
        H_pre=made.get("dH_pre"),
        H_post=made["dh_post"],
        h_res=unflat(made["dh_res"], H_res.shape) if mix else None,
        weight=made.get("dweight"),
    )


@dataclass(frozen=True)
class StreamMixAdd(FusedOp):
    name = "stream_mix_add"
    shared_ndim = (None, None, 1, 2)
    h_res_index = 3

    def fallback(self, x, y, h_post, h_res):
        return reference.stream_mix_add(x, y, h_post, h_res)

    def forward(self, x, y, h_post, h_res):
        tokens, n, C = flat(x, 3).shape
        threads = self.options.threads_per_group
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, launch.backend())
        body = StreamMixAddBody(
            T=x.dtype,
            N=n,
            VEC=t.vec,
            THREADS=t.threads,
            POST_PER_TOKEN=h_post.ndim > 1,
            RES_PER_TOKEN=h_res.ndim > 2,
        )
        return launch.launch(
            body,
            {"x": flat(x, 3), "y": y, "h_post": h_post, "h_res": h_res},
            {"out": (x.shape, x.dtype)},
            tiling.many_groups(tokens),
            self.options,
        )["out"]

    def backward(self, arrays, cotangents, saved):
        (x, y, h_post, h_res), (dout,) = arrays, cotangents
        d = launch_fused_backward(x, dout, y=y, H_post=h_post, H_res=h_res, options=self.options)
        return d.x, d.y, d.H_post, d.h_res


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
