"""Coefficients that each token makes for itself, and what its sublayer reads with them."""

from dataclasses import dataclass

import mlx.core as mx

from .. import reference
from ..conventions import PAPER, Convention
from .autodiff import FusedOp, Options
from .checks import check_array, check_dynamic, check_eps
from .coefficient_gradient import Cotangents, coefficient_gradients
from .coefficients import Parameters, TokenCoefficients

__all__ = ["mhc_coefficients", "mhc_head", "mhc_pre"]

# ---- mhc_coefficients


@dataclass(frozen=True)
class MhcCoefficients(FusedOp):
    convention: Convention
    norm_eps: float

    name = "mhc_coefficients"
    shared_ndim = (None, 2, 1, 1)
    num_results = 3
    saves = True

    @property
    def coefficients(self) -> TokenCoefficients:
        return TokenCoefficients(self.options, self.convention, self.norm_eps, writes_u=False)

    def absent_result(self, n: int) -> int | None:
        return None if self.convention.res_size(n) else 2

    def fallback(self, x, phi, bias, alpha):
        return reference.mhc_coefficients(x, phi, bias, alpha, self.convention, self.norm_eps)

    def forward(self, x, phi, bias, alpha, save=False):
        h = self.coefficients.make(x, Parameters(phi, bias, alpha), save)
        return (h["h_pre"], h["h_post"], h.get("h_res")), (h.get("l"),)

    def backward(self, arrays, cotangents, saved):
        (x, *parameters), (dh_pre, dh_post, dh_res), (l,) = arrays, cotangents, saved  # noqa: E741
        d = Cotangents(h_pre=dh_pre, h_post=dh_post, h_res=dh_res)
        dx, dp = coefficient_gradients(self.coefficients, x, Parameters(*parameters), l, d)
        return dx, dp.phi, dp.bias, dp.alpha


def mhc_coefficients(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """The coefficients that each token makes for itself (arXiv 2512.24880, eq. 7-9).

    ``l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x))``, in three parts pre [n], post [n], res
    [R]; h_pre, h_post = gates(alpha[0] l_pre + b_pre, alpha[1] l_post + b_post);
    h_res = project(alpha[2] l_res + b_res).

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        phi: ``[2n + R, n*C]``, R = ``convention.res_size(n)``, of any of these dtypes; a norm
            weight of ``[n*C]`` folds into it: ``phi * weight``.
        bias: ``[2n + R]``, of any of these dtypes.
        alpha: ``[3]``, or ``[2]`` where R is 0, of any of these dtypes; a third has no effect
            there.
        convention: How coefficients are made; not ADDITIVE, whose gates take no logits.
        norm_eps: Added to the mean square of the n*C elements, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        h_pre ``[..., n]``, h_post ``[..., n]``, h_res ``[..., n, n]``, float32; h_res is None, the
        identity, where R is 0.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    check_dynamic("mhc_coefficients", x, phi, bias, alpha, convention, norm_eps)
    fused = MhcCoefficients(Options(threads_per_group, verbose), convention, norm_eps)
    return fused(x, phi, bias, alpha, use_metal=use_metal, differentiable=differentiable)


# ---- mhc_pre


@dataclass(frozen=True)
class MhcPre(FusedOp):
    convention: Convention
    norm_eps: float
    eps: float

    name = "mhc_pre"
    shared_ndim = (None, 2, 1, 1, 1)
    num_results = 4
    saves = True

    @property
    def coefficients(self) -> TokenCoefficients:
        return TokenCoefficients(self.options, self.convention, self.norm_eps, self.eps)

    def absent_result(self, n: int) -> int | None:
        return None if self.convention.res_size(n) else 2

    def fallback(self, x, phi, bias, alpha, weight):
        parameters, c = (phi, bias, alpha, weight), self.convention
        return reference.mhc_pre(x, *parameters, c, self.norm_eps, self.eps)

    def forward(self, x, phi, bias, alpha, weight, save=False):
        h = self.coefficients.make(x, Parameters(phi, bias, alpha, weight), save)
        return (h["u"], h["h_post"], h.get("h_res"), x), (h.get("l"),)

    def backward(self, arrays, cotangents, saved):
        (x, phi, bias, alpha, weight), (du, dh_post, dh_res, dx_out) = arrays, cotangents
        parameters, (l,) = Parameters(phi, bias, alpha, weight), saved  # noqa: E741
        d = Cotangents(u=du, h_post=dh_post, h_res=dh_res, x=dx_out)
        dx, dp = coefficient_gradients(self.coefficients, x, parameters, l, d)
        return dx, *dp


def mhc_pre(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    weight: mx.array | None = None,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    """What a sublayer reads, and all that its write-back needs (arXiv 2512.24880, eq. 3, 7-9).

    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps);
    u = stream_aggregate(x, h_pre), or with a weight stream_aggregate and rms_norm, rounded once.

    Args:
        x, phi, bias, alpha, convention, norm_eps: As in `mhc_coefficients`.
        weight: ``[C]`` float32, float16 or bfloat16, or None for no RMSNorm.
        eps: Of that RMSNorm, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        u ``[..., C]`` in x's dtype, h_post, h_res as in `mhc_coefficients`, and x itself: a
        write-back that uses this x has its gradient summed inside the kernel.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    check_dynamic("mhc_pre", x, phi, bias, alpha, convention, norm_eps)
    if weight is not None:
        check_array("mhc_pre", "weight", weight, "C", (x.shape[-1],))
    check_eps("mhc_pre", eps)
    fused = MhcPre(Options(threads_per_group, verbose), convention, norm_eps, eps)
    arrays = (x, phi, bias, alpha, weight)
    return fused(*arrays, use_metal=use_metal, differentiable=differentiable)


# ---- mhc_head


@dataclass(frozen=True)
class MhcHead(FusedOp):
    convention: Convention
    norm_eps: float

    name = "mhc_head"
    shared_ndim = (None, 2, 1, 1)
    saves = True

    @property
    def coefficients(self) -> TokenCoefficients:
        return TokenCoefficients(self.options, self.convention, self.norm_eps, head=True)

    def fallback(self, x, phi, bias, alpha):
        return reference.mhc_head(x, phi, bias, alpha, self.convention, self.norm_eps)

    def forward(self, x, phi, bias, alpha, save=False):
        h = self.coefficients.make(x, Parameters(phi, bias, alpha), save)
        return h["u"], (h.get("l"),)

    def backward(self, arrays, cotangents, saved):
        (x, *parameters), (du,), (l,) = arrays, cotangents, saved  # noqa: E741
        d = Cotangents(u=du)
        dx, dp = coefficient_gradients(self.coefficients, x, Parameters(*parameters), l, d)
        return dx, dp.phi, dp.bias, dp.alpha


def mhc_head(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """The learned read-out of DeepSeek V4: h_pre alone, made per token (arXiv 2512.24880, eq. 7).

    ``u = sum_j h_pre[j] x[j]``, h_pre = sigmoid(alpha[0] l + bias) + pre_eps with l as in
    `mhc_coefficients`.

    Args:
        x: ``[..., n, C]`` float32, float16 or bfloat16.
        phi: ``[n, n*C]``, of any of these dtypes.
        bias: ``[n]``, of any of these dtypes.
        alpha: ``[1]``, of any of these dtypes.
        convention: Its pre_eps.
        norm_eps: Added to the mean square of the n*C elements, above 0.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        ``[..., C]`` in x's dtype, rounded once.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    check_dynamic("mhc_head", x, phi, bias, alpha, convention, norm_eps, parts=1)
    fused = MhcHead(Options(threads_per_group, verbose), convention, norm_eps)
    return fused(x, phi, bias, alpha, use_metal=use_metal, differentiable=differentiable)
