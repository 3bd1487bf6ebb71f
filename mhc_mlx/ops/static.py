"""The self-contained layer, whose coefficients are parameters that all tokens share."""

import math
from dataclasses import dataclass

import mlx.core as mx

from .. import launch, reference
from ..conventions import ROW_FIRST, Convention
from . import tiling
from .arrays import body_params, flat
from .autodiff import FusedOp, Options
from .checks import check_convention, check_dtype, check_half_steps, check_static
from .sinkhorn import HalfSteps, half_steps, launch_sinkhorn, launch_sinkhorn_backward
from .streams import Layer, TokenBody, launch_fused_backward, token_arguments

__all__ = ["gates", "mhc_layer", "mhc_static", "stream_aggregate_norm"]


@dataclass(frozen=True)
class MhcFusedBody(TokenBody):
    name = "mhc_fused"
    PASSES: int
    CACHED: bool
    MIX: bool
    SINKHORN: bool
    GATES: bool
    half_steps: HalfSteps


def launch_fused(x, layer, *, options, eps, convention=None, sinkhorn=False):
    """out of the streams; without H_res what a sublayer reads, normalised.

    With a convention H_pre and H_post may be logits of gates; ``sinkhorn`` says that H_res holds
    logits.
    """
    flat_x, mix, threads = flat(x, 3), layer.H_res is not None, options.threads_per_group
    tokens, n, C = flat_x.shape
    device = launch.device()
    t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, device)
    body = MhcFusedBody(
        **token_arguments(x.dtype, n, t),
        PASSES=t.passes,
        CACHED=t.cached,
        MIX=mix,
        SINKHORN=sinkhorn,
        GATES=convention is not None and convention.sigmoid,
        half_steps=half_steps(convention),
    )
    params = body_params(convention, eps=eps)
    inputs = {"x": flat_x, **layer._asdict(), "params": params}
    outputs = {"out": (x.shape if mix else (*x.shape[:-2], C), x.dtype)}
    groups = tiling.even_groups(tokens, device.forward_groups)
    return launch.launch(body, inputs, outputs, groups, options)["out"]


# ---- stream_aggregate_norm


@dataclass(frozen=True)
class StreamAggregateNorm(FusedOp):
    eps: float

    name = "stream_aggregate_norm"
    shared_ndim = (None, 1, 1)

    def fallback(self, x, h_pre, weight):
        return reference.stream_aggregate_norm(x, h_pre, weight, self.eps)

    def forward(self, x, h_pre, weight):
        layer = Layer(H_pre=h_pre, weight=weight)
        return launch_fused(x, layer, options=self.options, eps=self.eps)

    def backward(self, arrays, cotangents, saved):
        (x, h_pre, weight), (du,), options = arrays, cotangents, self.options
        layer = Layer(H_pre=h_pre, weight=weight)
        d = launch_fused_backward(x, None, layer, du, options=options, eps=self.eps)
        return d["x"], d["H_pre"], d["weight"]


def stream_aggregate_norm(
    x: mx.array,
    h_pre: mx.array,
    weight: mx.array,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """The normalised input of a sublayer: ``rms_norm(stream_aggregate(x, h_pre), weight, eps)``
    (arXiv 2512.24880, eq. 3).

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        h_pre: ``[n]``, of any of these dtypes.
        weight: ``[C]``, of any of these dtypes.
        eps: Added to the mean square, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        ``[..., C]`` in x's dtype, computed in float32 and rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    check_static("stream_aggregate_norm", x, eps, h_pre=h_pre, weight=weight)
    fused = StreamAggregateNorm(Options(threads_per_group, verbose), eps)
    return fused(x, h_pre, weight, use_metal=use_metal, differentiable=differentiable)


# ---- mhc_static


@dataclass(frozen=True)
class MhcStatic(FusedOp):
    eps: float

    name = "mhc_static"
    shared_ndim = (None, 1, 1, 2, 1)
    h_res_index = 3

    def fallback(self, x, h_pre, h_post, h_res, weight):
        return reference.mhc_static(x, h_pre, h_post, h_res, weight, self.eps)

    def forward(self, x, *layer):
        return launch_fused(x, Layer(*layer), options=self.options, eps=self.eps)

    def backward(self, arrays, cotangents, saved):
        (x, *layer), (dout,), options = arrays, cotangents, self.options
        d = launch_fused_backward(x, None, Layer(*layer), dout, options=options, eps=self.eps)
        return d["x"], d["H_pre"], d["H_post"], d["H_res"], d["weight"]


def mhc_static(
    x: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None,
    weight: mx.array,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """The self-contained layer with ready coefficients (arXiv 2512.24880, eq. 3).

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] rms_norm(sum_j h_pre[j] x[j], weight, eps)``

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        h_pre, h_post: ``[n]``, of any of these dtypes.
        h_res: ``[n, n]``, of any of these dtypes, row = output; None is the identity.
        weight: ``[C]``, of any of these dtypes.
        eps: Added to the mean square, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        out ``[..., n, C]`` in x's dtype, computed in float32 and rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    mixing = {} if h_res is None else {"h_res": h_res}
    check_static("mhc_static", x, eps, h_pre=h_pre, h_post=h_post, **mixing, weight=weight)
    fused, arrays = MhcStatic(Options(threads_per_group, verbose), eps), (x, h_pre, h_post, h_res)
    return fused(*arrays, weight, use_metal=use_metal, differentiable=differentiable)


# ---- mhc_layer


@dataclass(frozen=True)
class MhcLayer(FusedOp):
    convention: Convention
    eps: float

    name = "mhc_layer"
    shared_ndim = (None, 1, 1, 2, 1)

    def fallback(self, x, H_pre, H_post, H_res, weight):
        return reference.mhc_layer(x, H_pre, H_post, H_res, weight, self.convention, self.eps)

    def forward(self, x, H_pre, H_post, H_res, weight):
        options, c = self.options, self.convention
        *lead, n, _ = x.shape
        sinkhorn = n <= 8 and math.prod(lead) <= launch.device().one_launch_tokens
        if not sinkhorn:
            H_res = launch_sinkhorn(H_res, c, options)
        layer = Layer(H_pre, H_post, H_res, weight)
        keywords = {"options": options, "eps": self.eps, "convention": c}
        return launch_fused(x, layer, **keywords, sinkhorn=sinkhorn)

    def backward(self, arrays, cotangents, saved):
        (x, H_pre, H_post, logits, weight), (dout,) = arrays, cotangents
        options, c = self.options, self.convention
        H_res = launch_sinkhorn(logits, c, options) if x.shape[-2] > 8 else logits
        layer = Layer(H_pre, H_post, H_res, weight)
        d = launch_fused_backward(x, None, layer, dout, options=options, eps=self.eps, convention=c)
        dlogits = launch_sinkhorn_backward(logits, d["H_res"], c, options)
        return d["x"], d["H_pre"], d["H_post"], dlogits, d["weight"]


def mhc_layer(
    x: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    H_res: mx.array,
    weight: mx.array,
    convention: Convention = ROW_FIRST,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """The self-contained layer from its parameters (arXiv 2512.24880, eq. 3, 8, 9, static part).

    ``mhc_static`` with h_pre, h_post = gates(H_pre, H_post) and h_res = sinkhorn_knopp(H_res).

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        H_pre, H_post: ``[n]``, of any of these dtypes.
        H_res: ``[n, n]``, of any of these dtypes.
        weight: ``[C]``, of any of these dtypes.
        convention: How coefficients are made; one with half-steps.
        eps: Of the RMSNorm, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        out ``[..., n, C]`` in x's dtype, computed in float32 and rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    check_static("mhc_layer", x, eps, H_pre=H_pre, H_post=H_post, H_res=H_res, weight=weight)
    check_half_steps("mhc_layer", convention)
    fused = MhcLayer(Options(threads_per_group, verbose), convention, eps)
    arrays = (x, H_pre, H_post, H_res, weight)
    return fused(*arrays, use_metal=use_metal, differentiable=differentiable)


def gates(H_pre: mx.array, H_post: mx.array, convention: Convention) -> tuple[mx.array, mx.array]:
    """h_pre = sigmoid(H_pre) + pre_eps, h_post = post_scale * sigmoid(H_post) + post_eps
    (arXiv 2512.24880, eq. 8); without kernels.

    Args:
        H_pre, H_post: Each of any shape, float32, float16 or bfloat16.
        convention: Its gates; without sigmoid both are used as they are.

    Returns:
        h_pre and h_post in their shapes, float32.

    Raises:
        TypeError: Where a dtype or a type does not fit.
    """
    check_convention("gates", convention)
    check_dtype("gates", H_pre=H_pre, H_post=H_post)
    return reference.gates(H_pre, H_post, convention)
