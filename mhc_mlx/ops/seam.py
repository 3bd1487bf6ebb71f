"""Between two sublayers of "single pass" models (DeepSeek V4.1): the write-back of one and the read
of the next, whose coefficients were made before its streams."""

from dataclasses import dataclass

import mlx.core as mx

from .. import launch, reference
from ..conventions import DEEPSEEK_V4, Convention
from . import tiling
from .arrays import body_params, flat, identity, unflat
from .autodiff import FusedOp, Options
from .checks import check_array, check_dynamic, check_seam
from .coefficient_gradient import Cotangents, coefficient_gradients
from .coefficients import (
    Parameters,
    SeamInputs,
    TokenCoefficients,
    launch_partial_logits,
    launch_seam,
    use_fused_projection,
    use_partial_logits,
)
from .streams import StreamMixAdd, TokenBody, token_arguments
from .sums import sum_partials

__all__ = ["mhc_seam", "mhc_single_pass"]

# ---- mhc_seam


@dataclass(frozen=True)
class MhcSeamBackwardBody(TokenBody):
    name = "mhc_seam_backward"
    PASSES: int
    CACHED: bool
    NORM: bool
    ROUND_U: bool


def per_token(tokens: int, h_pre: mx.array, h_post: mx.array, h_res: mx.array) -> list[mx.array]:
    """The coefficients for each token, where all tokens share them."""
    pairs = ((h_pre, 2), (h_post, 2), (h_res, 3))
    return [a if a.ndim >= k else mx.broadcast_to(a, (tokens, *a.shape)) for a, k in pairs]


@dataclass(frozen=True)
class MhcSeam(FusedOp):
    eps: float
    round_aggregate: bool
    has_h_res: bool  # otherwise it is the identity, and its gradient is not made

    name = "mhc_seam"
    shared_ndim = (None, None, 1, 1, 2, 1)
    num_results = 2
    h_res_index = 4

    @property
    def params(self) -> mx.array:
        return body_params(None, eps=self.eps)

    def fallback(self, x, y, h_pre, h_post, h_res, weight):
        h, eps = (h_pre, h_post, h_res), self.eps
        return reference.mhc_seam(x, y, *h, weight, eps, self.round_aggregate)

    def forward(self, x, y, h_pre, h_post, h_res, weight):
        flat_x = flat(x, 3)
        coefficients = per_token(flat_x.shape[0], h_pre, h_post, h_res)
        inputs = SeamInputs(y, *coefficients, weight=weight, params=self.params)
        outputs = {"out": (x.shape, x.dtype), "u": (y.shape, x.dtype)}
        round_u = self.round_aggregate
        results = launch_seam(flat_x, inputs, outputs, round_u=round_u, options=self.options)
        return results["out"], results["u"]

    def backward(self, arrays, cotangents, saved):
        x, y, *coefficients, weight = arrays
        if x.shape[-2] > 8:
            return self._many_streams_backward(arrays, cotangents)
        flat_x, (dout, du) = flat(x, 3), cotangents
        tokens, n, C = flat_x.shape
        h_pre, h_post, h_res = per_token(tokens, *coefficients)
        place, threads = launch.kernel_backend(), self.options.threads_per_group
        t = tiling.seam_backward_tiling(n, C, x.dtype.size, threads, place)
        body = MhcSeamBackwardBody(
            **token_arguments(x.dtype, n, t),
            PASSES=t.passes,
            CACHED=t.cached,
            NORM=weight is not None,
            ROUND_U=self.round_aggregate,
        )
        groups, weighted = tiling.backward_groups(tokens, t.threads), weight is not None
        h = {"h_pre": h_pre, "h_post": h_post, "h_res": h_res}
        inputs = {"x": flat_x, "y": y, "dout": dout, "du": du, **h, "weight": weight}
        outputs = {
            "dx": (x.shape, x.dtype),
            "dy": (y.shape, x.dtype),
            "dh_pre": (h_pre.shape, mx.float32),
            "dh_post": (h_post.shape, mx.float32),
            "dh_res": (h_res.shape, mx.float32),
            "partial": ((groups, C), mx.float32) if weighted else None,
        }
        inputs["params"] = self.params
        results = launch.launch(body, inputs, outputs, groups, self.options)
        gradients = [results["dh_pre"], results["dh_post"], results["dh_res"]]
        for k, a in enumerate(coefficients[: 3 if self.has_h_res else 2]):
            if a.ndim < gradients[k].ndim:  # shared by all tokens
                rows = gradients[k].reshape(tokens, -1)
                gradients[k] = unflat(sum_partials(rows, self.options), a.shape)
        dweight = sum_partials(results["partial"], self.options) if weighted else None
        dh_pre, dh_post, dh_res = gradients
        return results["dx"], results["dy"], dh_pre, dh_post, dh_res, dweight

    def _many_streams_backward(self, arrays, cotangents):
        """For n > 8: the read by the reference, the write-back by its kernels, both in float32."""
        x, y, h_pre, h_post, h_res, weight = arrays
        dout, du = (a.astype(mx.float32) for a in cotangents)
        write_back = StreamMixAdd(self.options)
        out = write_back.forward(x, y, h_post, h_res).astype(mx.float32)
        inside = x.dtype if self.round_aggregate else mx.float32

        def read(out, h_pre, weight=None):
            return reference._read(out, h_pre, weight, self.eps, inside)

        primals = [a.astype(mx.float32) for a in (out, h_pre, weight) if a is not None]
        dread, dh_pre, *dweight = mx.vjp(read, primals, [du])[1]
        floats = (x.astype(mx.float32), y.astype(mx.float32), h_post, h_res)
        dx, dy, dh_post, dh_res = write_back.backward(floats, (dout + dread,), ())
        return dx.astype(x.dtype), dy, dh_pre, dh_post, dh_res, dweight[0] if dweight else None


def mhc_seam(
    x: mx.array,
    y: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None = None,
    weight: mx.array | None = None,
    eps: float = 1e-5,
    round_aggregate: bool = False,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array]:
    """The write-back of a sublayer and what the next one reads, with coefficients that were all
    made before (arXiv 2512.24880, eq. 3; DeepSeek V4.1).

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] y``, rounded to x's dtype;
    ``u = sum_i h_pre[i] out[i]``, or with a weight ``rms_norm(u, weight, eps)``, rounded once.

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        y: ``[..., C]`` in x's dtype.
        h_pre, h_post: ``[n]``, or ``[..., n]`` with x's leading axes, of any of these dtypes.
        h_res: ``[n, n]``, or ``[..., n, n]``, row = output; None is the identity.
        weight: ``[C]``, of any of these dtypes, or None for no RMSNorm.
        eps: Of that RMSNorm, above 0.
        round_aggregate: Round as a model does that aggregates and normalises in its own dtype: u to
            x's dtype before its norm, and ``u * rsqrt(mean(u**2) + eps)`` before the weight. The
            gradient passes such a rounding unchanged.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        out ``[..., n, C]`` and u ``[..., C]`` in x's dtype.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "mhc_seam"
    lead, n, _ = check_seam(op, x, y, weight, eps, round_aggregate)
    check_array(op, "h_pre", h_pre, "n", (n,), lead)
    check_array(op, "h_post", h_post, "n", (n,), lead)
    if h_res is not None:
        check_array(op, "h_res", h_res, "nn", (n, n), lead)
    options = Options(threads_per_group, verbose)
    fused = MhcSeam(options, eps, round_aggregate, has_h_res=h_res is not None)
    arrays = (x, y, h_pre, h_post, h_res, weight)
    return fused(*arrays, use_metal=use_metal, differentiable=differentiable)


# ---- mhc_single_pass


@dataclass(frozen=True)
class MhcSinglePass(FusedOp):
    """`TokenCoefficients`, then `MhcSeam`; for few tokens without a gradient in two launches."""

    convention: Convention
    norm_eps: float
    eps: float
    round_aggregate: bool

    name = "mhc_single_pass"
    shared_ndim = (None, None, 2, 1, 1, 1)
    num_results = 3
    saves = True

    @property
    def coefficients(self) -> TokenCoefficients:
        return TokenCoefficients(self.options, self.convention, self.norm_eps, writes_u=False)

    def seam(self, n: int) -> MhcSeam:
        has_h_res = self.convention.res_size(n) > 0
        return MhcSeam(self.options, self.eps, self.round_aggregate, has_h_res)

    def fallback(self, x, y, phi, bias, alpha, weight):
        arrays, c = (x, y, phi, bias, alpha, weight), self.convention
        epsilons = (self.norm_eps, self.eps)
        return reference.mhc_single_pass(*arrays, c, *epsilons, self.round_aggregate)

    def forward(self, x, y, phi, bias, alpha, weight, save=False):
        """out, u, h_pre; what is saved is h_pre, h_post, h_res and l of all tokens in a row."""
        n, flat_x = x.shape[-2], flat(x, 3)
        few = use_partial_logits(flat_x, phi, self.options)
        if few and not save and use_fused_projection(n, self.convention):
            return self._forward_few_tokens(x, y, Parameters(phi, bias, alpha, weight)), ()
        h = self.coefficients.make(flat_x, Parameters(phi, bias, alpha), save)
        h_pre, h_post, h_res = h["h_pre"], h["h_post"], h.get("h_res")
        h_res_or_identity = identity(n) if h_res is None else h_res
        out, u = self.seam(n).forward(x, y, h_pre, h_post, h_res_or_identity, weight)
        return (out, u, unflat(h_pre, x.shape[:-1])), (h_pre, h_post, h_res, h.get("l"))

    def _forward_few_tokens(self, x, y, parameters):
        """Two launches: the phi product by many threadgroups, then all that is left."""
        flat_x, c = flat(x, 3), self.convention
        params = body_params(c, norm_eps=self.norm_eps, eps=self.eps)
        phi, bias, alpha, weight = parameters
        partial_logits, slices = launch_partial_logits(flat_x, phi, self.options)
        coefficients = {"partial_logits": partial_logits, "bias": bias, "alpha": alpha}
        outputs = {"out": (x.shape, x.dtype), "u": (y.shape, x.dtype)}
        results = launch_seam(
            flat_x,
            SeamInputs(y=y, weight=weight, **coefficients, params=params),
            outputs | {"new_h_pre": (x.shape[:-1], mx.float32)},
            slices=slices,
            round_u=self.round_aggregate,
            projection=c,
            options=self.options,
        )
        return results["out"], results["u"], results["new_h_pre"]

    def backward(self, arrays, cotangents, saved):
        x, y, phi, bias, alpha, weight = arrays
        h_pre, h_post, *h_res, l = saved  # noqa: E741
        flat_x, flat_y, n = flat(x, 3), flat(y, 2), x.shape[-2]  # all tokens in a row, as saved
        dout, du, dh_pre = (flat(a, k) for a, k in zip(cotangents, (3, 2, 2), strict=True))
        seam = (flat_x, flat_y, h_pre, h_post, h_res[0] if h_res else identity(n), weight)
        dx, dy, dh_pre_of_u, dh_post, dh_res, dweight = self.seam(n).backward(seam, (dout, du), ())
        d = Cotangents(h_pre=dh_pre_of_u + dh_pre, h_post=dh_post, h_res=dh_res, x=dx)
        parameters = Parameters(phi, bias, alpha)
        dx, dp = coefficient_gradients(self.coefficients, flat_x, parameters, l, d)
        return unflat(dx, x.shape), unflat(dy, y.shape), dp.phi, dp.bias, dp.alpha, dweight


def mhc_single_pass(
    x: mx.array,
    y: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    weight: mx.array | None = None,
    convention: Convention = DEEPSEEK_V4,
    norm_eps: float = 1e-6,
    eps: float = 1e-5,
    round_aggregate: bool = False,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """All that stands between two sublayers of DeepSeek V4.1: the coefficients that x makes, the
    write-back with them, and what the next sublayer reads with them (arXiv 2512.24880, eq. 3, 7-9).

    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps);
    out, u = mhc_seam(x, y, h_pre, h_post, h_res, weight, eps, round_aggregate).

    Args:
        x, y, weight, eps, round_aggregate: As in `mhc_seam`.
        phi, bias, alpha, convention, norm_eps: As in `mhc_coefficients`.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        out and u as in `mhc_seam`, and h_pre ``[..., n]`` float32.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "mhc_single_pass"
    check_dynamic(op, x, phi, bias, alpha, convention, norm_eps)
    check_seam(op, x, y, weight, eps, round_aggregate)
    options = Options(threads_per_group, verbose)
    fused = MhcSinglePass(options, convention, norm_eps, eps, round_aggregate)
    arrays = (x, y, phi, bias, alpha, weight)
    return fused(*arrays, use_metal=use_metal, differentiable=differentiable)
