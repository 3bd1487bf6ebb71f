"""Coefficients that each token makes for itself, and what its sublayer reads with them."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from .. import launch, reference
from ..conventions import PAPER, Convention
from . import tiling
from .arrays import body_params, flat, unflat
from .autodiff import FusedOp, Options
from .checks import check_array, check_dynamic, check_eps
from .coefficients import (
    SeamInputs,
    SeamOutputs,
    launch_partial_logits,
    launch_seam,
    use_fused_projection,
    use_partial_logits,
)
from .sinkhorn import HalfSteps, half_steps, launch_projection, launch_projection_backward
from .sums import sum_partials

__all__ = ["mhc_coefficients", "mhc_head", "mhc_pre"]

# ---- forward


@dataclass(frozen=True)
class MhcPreBody(launch.Body):
    name = "mhc_pre"
    T: mx.Dtype
    PHI_T: mx.Dtype
    N: int
    NUM_LOGITS: int
    VEC: int
    THREADS: int
    SLICES: int
    TILES: int
    BLOCK: int
    U_SIMDGROUPS: int
    U_PACKS: int
    SPLITS: int
    RING_BYTES: int
    WRITE_U: bool
    NORM: bool
    SAVE_LOGITS: bool
    PROJECT: bool
    half_steps: HalfSteps


class Coefficients(NamedTuple):
    """The specs of what a launch is asked to make of the streams, and then the arrays."""

    u: Any
    h_pre: Any
    h_post: Any
    h_res: Any
    logits: Any  # of h_res, where another launch projects them
    l: Any  # noqa: E741


@dataclass(frozen=True)
class MhcPreBackwardCoefficientsBody(launch.Body):
    name = "mhc_pre_backward_coefficients"
    T: mx.Dtype
    N: int
    NUM_LOGITS: int
    HAS_DU: bool
    PROJECT: bool
    half_steps: HalfSteps
    VEC: int
    THREADS: int
    BATCH: int
    STORED_STEPS: int


@dataclass(frozen=True)
class MhcPreBackwardCoefficientsNormBody(launch.Body):
    name = "mhc_pre_backward_coefficients_norm"
    T: mx.Dtype
    N: int
    NUM_LOGITS: int
    PROJECT: bool
    half_steps: HalfSteps
    VEC: int
    THREADS: int
    PASSES: int
    CACHED: bool
    BATCH: int
    STORED_STEPS: int


@dataclass(frozen=True)
class MhcPreBackwardProjectionBody(launch.Body):
    name = "mhc_pre_backward_projection"
    T: mx.Dtype
    PHI_T: mx.Dtype
    N: int
    NUM_LOGITS: int
    THREADS: int
    SPAN: int
    STAGE: int
    RING_BYTES: int
    HAS_DU: bool
    HAS_DX_OUT: bool


@dataclass(frozen=True)
class MhcPreBackwardGenericBody(launch.Body):
    name = "mhc_pre_backward_generic"
    T: mx.Dtype
    N: int
    NUM_LOGITS: int
    HAS_DU: bool
    NORM: bool
    VEC: int
    THREADS: int
    TILE: int
    SPLITS: int
    HAS_DX_OUT: bool


@dataclass(frozen=True)
class MhcPreBackwardPhiBody(launch.Body):
    name = "mhc_pre_backward_phi"
    T: mx.Dtype
    N: int
    NUM_LOGITS: int
    VEC: int
    THREADS: int
    LOGITS_PER_THREAD: int


class TokenArrays(NamedTuple):
    """What the gradient of a token's coefficients reads but x; None where a variant does not."""

    bias: mx.array
    alpha: mx.array
    weight: mx.array | None
    l: mx.array  # noqa: E741
    params: mx.array
    dz_res: mx.array | None
    du: mx.array | None
    dh_pre: mx.array | None
    dh_post: mx.array | None


class PreGradients(NamedTuple):
    x: mx.array
    phi: mx.array
    bias: mx.array
    alpha: mx.array
    weight: mx.array | None


@functools.cache
def part_masks(n: int, num_logits: int, parts: int) -> mx.array:
    """A row for each part, pre, post and res: which logits belong to it."""
    return mx.array([[min(o // n, 2) == k for o in range(num_logits)] for k in range(parts)])


@dataclass(frozen=True)
class CoefficientOp(FusedOp):
    """What the ops of this room have in common; each has a head or not, and writes u or h_pre."""

    convention: Convention
    norm_eps: float
    eps: float = 1.0

    saves = True
    head: ClassVar[bool] = False
    writes_u: ClassVar[bool] = True

    @property
    def params(self) -> mx.array:
        return body_params(self.convention, norm_eps=self.norm_eps, eps=self.eps)

    def projects(self, n: int) -> bool:
        return not self.head and use_fused_projection(n, self.convention)

    def make(
        self,
        x: mx.array,
        phi: mx.array,
        bias: mx.array,
        alpha: mx.array,
        weight: mx.array | None = None,
        *,
        save: bool,
    ) -> Coefficients:
        """u or h_pre, and h_post and h_res if there is more than a head; l with ``save``."""
        (*lead, n, C), num_logits, floats = x.shape, phi.shape[0], mx.float32
        x = flat(x, 3)
        tokens, num_res_logits = x.shape[0], 0 if self.head else self.convention.res_size(n)
        projects = self.projects(n)
        wanted = Coefficients(
            u=((*lead, C), x.dtype) if self.writes_u else None,
            h_pre=None if self.writes_u else ((*lead, n), floats),
            h_post=None if self.head else ((*lead, n), floats),
            h_res=((*lead, n, n), floats) if projects else None,
            logits=((tokens, num_res_logits), floats) if num_res_logits and not projects else None,
            l=((tokens, num_logits + 1), floats) if save else None,
        )
        few = use_partial_logits(x, phi, self.options)
        made = (self._launch_few_tokens if few else self._launch_pre)(
            x, phi, bias, alpha, weight, wanted
        )
        if made.logits is None:
            return made
        h_res = launch_projection(made.logits, n, self.convention, self.options)
        return made._replace(h_res=unflat(h_res, (*lead, n, n)))

    def _launch_few_tokens(self, x, phi, bias, alpha, weight, wanted: Coefficients):
        partial = launch_partial_logits(x, phi, self.options)
        made = launch_seam(
            x,
            SeamInputs(
                weight=weight,
                partial_logits=partial.products,
                bias=bias,
                alpha=alpha,
                params=self.params,
            ),
            SeamOutputs(
                u=wanted.u,
                new_h_pre=wanted.h_pre,
                new_h_post=wanted.h_post,
                new_h_res=wanted.h_res,
                logits=wanted.logits,
                l=wanted.l,
            ),
            slices=partial.slices,
            projection=self.convention if wanted.h_res else None,
            options=self.options,
        )
        h = made.new_h_pre, made.new_h_post, made.new_h_res
        return Coefficients(made.u, *h, made.logits, made.l)

    def _launch_pre(self, x, phi, bias, alpha, weight, wanted: Coefficients):
        (tokens, n, C), num_logits = x.shape, phi.shape[0]
        backend, limit = launch.backend(), launch.threadgroup_memory_limit()
        threads, norm = self.options.threads_per_group, weight is not None
        t = tiling.logits_tiling(n, C, x.dtype, num_logits, tokens, threads, limit)
        u = tiling.u_tiling(t, n, C, backend) if norm else tiling.UTiling()
        projects = wanted.h_res is not None
        body = MhcPreBody(
            T=x.dtype,
            PHI_T=phi.dtype,
            N=n,
            NUM_LOGITS=num_logits,
            VEC=t.vec,
            THREADS=t.threads,
            SLICES=t.slices,
            TILES=t.tiles,
            BLOCK=t.block,
            SPLITS=t.splits,
            WRITE_U=self.writes_u,
            NORM=norm,
            U_SIMDGROUPS=u.simdgroups,
            U_PACKS=u.packs,
            SAVE_LOGITS=wanted.l is not None,
            RING_BYTES=tiling.ring_bytes(t, n, C, x.dtype, phi.dtype, num_logits, limit),
            PROJECT=projects,
            half_steps=half_steps(self.convention if projects else None),
        )
        made = launch.launch(
            body,
            {"x": x, "phi": phi, "bias": bias, "alpha": alpha, "weight": weight}
            | {"params": self.params},
            wanted._asdict(),
            t.splits * tiling.many_groups(math.ceil(tokens / t.tokens)),
            self.options,
        )
        return Coefficients(**made)

    def gradients(
        self,
        x: mx.array,
        phi: mx.array,
        bias: mx.array,
        alpha: mx.array,
        weight: mx.array | None,
        l: mx.array,  # noqa: E741
        *,
        du: mx.array | None = None,
        dh_pre: mx.array | None = None,
        dh_post: mx.array | None = None,
        dh_res: mx.array | None = None,
        dx_out: mx.array | None = None,
    ) -> PreGradients:
        """Gradients from the cotangents of what was made, and of the x that was passed through."""
        shape, n, num_logits = x.shape, x.shape[-2], phi.shape[0]
        x, num_gate_logits = flat(x, 3), n if self.head else 2 * n
        matrices = tiling.use_matrix_gradient(num_logits, x.dtype)
        projects, dz_res = matrices and self.projects(n), None
        if num_logits > num_gate_logits and not projects:
            slope, offset = alpha[2].astype(mx.float32), bias[num_gate_logits:].astype(mx.float32)
            logits, dh_res = slope * l[:, num_gate_logits:num_logits] + offset, flat(dh_res, 3)
            dz_res = launch_projection_backward(logits, dh_res, n, self.convention, self.options)
        arrays = TokenArrays(
            bias, alpha, weight, l, self.params, dz_res, du=du, dh_pre=dh_pre, dh_post=dh_post
        )
        if matrices:
            dh_res = dh_res if projects else None
            if weight is None:
                made = self._launch_backward_coefficients(x, arrays, dh_res)
            else:
                made = self._launch_backward_coefficients_norm(x, arrays, dh_res)
                du = made["dread"]
            products = (phi, made["dp"], made["token_factors"], du, dx_out)
            dx, dphi = self._launch_backward_projection(x, shape, *products)
        else:
            made = self._launch_backward_generic(x, shape, phi, arrays, dx_out)
            dx, dphi = made["dx"], self._launch_backward_phi(x, made["dp"])
        sums = sum_partials(made["partial"], self.options)
        parts = part_masks(n, num_logits, alpha.shape[0])
        return PreGradients(
            x=dx,
            phi=sum_partials(dphi, self.options, shape=phi.shape),
            bias=sums[:num_logits],
            alpha=mx.where(parts, sums[num_logits : 2 * num_logits], 0.0).sum(1),
            weight=None if weight is None else sums[2 * num_logits :],
        )

    def _launch_backward_coefficients(
        self, x: mx.array, arrays: TokenArrays, dh_res: mx.array | None
    ) -> dict[str, mx.array | None]:
        """token_factors, dp and sums; it projects where dh_res is given."""
        (tokens, n, C), num_logits, backend = x.shape, arrays.bias.shape[0], launch.backend()
        threads = self.options.threads_per_group
        t = tiling.coefficient_gradient_tiling(n, C, tokens, False, threads, backend)
        steps = half_steps(None if dh_res is None else self.convention)
        body = MhcPreBackwardCoefficientsBody(
            T=x.dtype,
            N=n,
            NUM_LOGITS=num_logits,
            HAS_DU=arrays.du is not None,
            PROJECT=dh_res is not None,
            half_steps=steps,
            VEC=t.vec,
            THREADS=t.threads,
            BATCH=t.batch,
            STORED_STEPS=tiling.stored_half_steps(steps.ITERS, t.threads, backend),
        )
        inputs = {"x": x, **arrays._asdict(), "dh_res": dh_res}
        del inputs["weight"]
        outputs = {
            "token_factors": ((tokens, n + 1), mx.float32),
            "dp": ((tokens, num_logits), mx.float32),
            "partial": ((t.rows, 2 * num_logits), mx.float32),
        }
        return launch.launch(body, inputs, outputs, t.groups, self.options)

    def _launch_backward_coefficients_norm(
        self, x: mx.array, arrays: TokenArrays, dh_res: mx.array | None
    ) -> dict[str, mx.array | None]:
        """token_factors, dread, dp and sums; it projects where dh_res is given."""
        (tokens, n, C), num_logits, backend = x.shape, arrays.bias.shape[0], launch.backend()
        threads = self.options.threads_per_group
        t = tiling.coefficient_gradient_tiling(n, C, tokens, True, threads, backend)
        steps = half_steps(None if dh_res is None else self.convention)
        body = MhcPreBackwardCoefficientsNormBody(
            T=x.dtype,
            N=n,
            NUM_LOGITS=num_logits,
            PROJECT=dh_res is not None,
            half_steps=steps,
            VEC=t.vec,
            THREADS=t.threads,
            PASSES=t.passes,
            CACHED=t.cached,
            BATCH=t.batch,
            STORED_STEPS=tiling.stored_half_steps(steps.ITERS, t.threads, backend),
        )
        inputs = {"x": x, **arrays._asdict(), "dh_res": dh_res}
        del inputs["dh_pre"]
        outputs = {
            "token_factors": ((tokens, n + 1), mx.float32),
            "dread": ((tokens, C), x.dtype),
            "dp": ((tokens, num_logits), mx.float32),
            "partial": ((t.rows, 2 * num_logits + C), mx.float32),
        }
        return launch.launch(body, inputs, outputs, t.groups, self.options)

    def _launch_backward_projection(
        self, x, shape, phi, dp, token_factors, du, dx_out
    ) -> tuple[mx.array, mx.array]:
        """dx in that shape, and dphi in rows to be added."""
        (tokens, n, C), num_logits = x.shape, dp.shape[1]
        threads, limit = self.options.threads_per_group, launch.threadgroup_memory_limit()
        t = tiling.projection_gradient_tiling(n, C, num_logits, tokens, threads)
        size = x.dtype.size * (1 + (du is not None) + (dx_out is not None))
        body = MhcPreBackwardProjectionBody(
            T=x.dtype,
            PHI_T=phi.dtype,
            N=n,
            NUM_LOGITS=num_logits,
            THREADS=t.threads,
            SPAN=t.span,
            STAGE=tiling.PROJECTION_GRADIENT_STAGE,
            RING_BYTES=tiling.projection_gradient_ring_bytes(t.span, t.threads, size, limit),
            HAS_DU=du is not None,
            HAS_DX_OUT=dx_out is not None,
        )
        inputs = {"x": x, "phi": phi, "dp": dp, "token_factors": token_factors}
        made = launch.launch(
            body,
            {**inputs, "du": du, "dx_out": dx_out},
            {"dx": (shape, x.dtype), "partial": ((t.chunks, num_logits * n * C), mx.float32)},
            t.chunks * t.groups_per_chunk,
            self.options,
        )
        return made["dx"], made["partial"]

    def _launch_backward_generic(
        self, x, shape, phi, arrays: TokenArrays, dx_out
    ) -> dict[str, mx.array | None]:
        """dx in that shape, dp, and sums over tokens."""
        (tokens, n, C), num_logits, norm = x.shape, phi.shape[0], arrays.weight is not None
        threads = self.options.threads_per_group
        t = tiling.generic_gradient_tiling(n, C, num_logits, tokens, threads)
        body = MhcPreBackwardGenericBody(
            T=x.dtype,
            N=n,
            NUM_LOGITS=num_logits,
            HAS_DU=arrays.du is not None,
            NORM=norm,
            VEC=t.vec,
            THREADS=t.threads,
            TILE=t.tile,
            SPLITS=t.splits,
            HAS_DX_OUT=dx_out is not None,
        )
        outputs = {
            "dx": (shape, x.dtype),
            "dp": ((tokens, num_logits), mx.float32),
            "partial": ((t.rows, 2 * num_logits + C * norm), mx.float32),
        }
        inputs = {"x": x, "phi": phi, **arrays._asdict(), "dx_out": dx_out}
        return launch.launch(body, inputs, outputs, t.rows * t.splits, self.options)

    def _launch_backward_phi(self, x: mx.array, dp: mx.array) -> mx.array:
        """dphi in rows to be added."""
        (tokens, n, C), num_logits = x.shape, dp.shape[1]
        threads = self.options.threads_per_group
        t = tiling.phi_gradient_tiling(n * C, C, num_logits, tokens, threads)
        body = MhcPreBackwardPhiBody(
            T=x.dtype,
            N=n,
            NUM_LOGITS=num_logits,
            VEC=t.vec,
            THREADS=t.threads,
            LOGITS_PER_THREAD=t.logits_per_thread,
        )
        outputs = {"partial": ((t.chunks, num_logits * n * C), mx.float32)}
        groups = t.chunks * t.groups_per_chunk
        return launch.launch(body, {"x": x, "dp": dp}, outputs, groups, self.options)["partial"]


# ---- mhc_coefficients


@dataclass(frozen=True)
class MhcCoefficients(CoefficientOp):
    name = "mhc_coefficients"
    shared_ndim = (None, 2, 1, 1)
    num_results = 3
    writes_u = False

    def absent_result(self, n):
        return None if self.convention.res_size(n) else 2

    def fallback(self, x, phi, bias, alpha):
        return reference.mhc_coefficients(x, phi, bias, alpha, self.convention, self.norm_eps)

    def forward(self, x, phi, bias, alpha, save=False):
        made = self.make(x, phi, bias, alpha, save=save)
        return (made.h_pre, made.h_post, made.h_res), (made.l,)

    def backward(self, arrays, cotangents, saved):
        (dh_pre, dh_post, dh_res), (l,) = cotangents, saved  # noqa: E741
        d = self.gradients(*arrays, None, l, dh_pre=dh_pre, dh_post=dh_post, dh_res=dh_res)
        return d.x, d.phi, d.bias, d.alpha


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
        alpha: ``[3]``, of any of these dtypes.
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
class MhcPre(CoefficientOp):
    name = "mhc_pre"
    shared_ndim = (None, 2, 1, 1, 1)
    num_results = 4

    def absent_result(self, n):
        return None if self.convention.res_size(n) else 2

    def fallback(self, *arrays):
        return reference.mhc_pre(*arrays, self.convention, self.norm_eps, self.eps)

    def forward(self, x, phi, bias, alpha, weight, save=False):
        made = self.make(x, phi, bias, alpha, weight, save=save)
        return (made.u, made.h_post, made.h_res, x), (made.l,)

    def backward(self, arrays, cotangents, saved):
        (du, dh_post, dh_res, dx), (l,) = cotangents, saved  # noqa: E741
        return self.gradients(*arrays, l, du=du, dh_post=dh_post, dh_res=dh_res, dx_out=dx)


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
class MhcHead(CoefficientOp):
    name = "mhc_head"
    shared_ndim = (None, 2, 1, 1)
    head = True

    def fallback(self, x, phi, bias, alpha):
        return reference.mhc_head(x, phi, bias, alpha, self.convention, self.norm_eps)

    def forward(self, x, phi, bias, alpha, save=False):
        made = self.make(x, phi, bias, alpha, save=save)
        return made.u, (made.l,)

    def backward(self, arrays, cotangents, saved):
        d = self.gradients(*arrays, None, *saved, du=cotangents[0])
        return d.x, d.phi, d.bias, d.alpha


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
