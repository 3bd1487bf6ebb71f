"""The gradient of the coefficients that each token makes for itself.

With few logits, in bfloat16 and on a Mac without a norm in any dtype,
`mhc_pre_backward_coefficients` (or `_norm`) makes what a token needs, and
`mhc_pre_backward_projection` dx and dphi by matrix products; otherwise `mhc_pre_backward_generic`
makes dx, and `mhc_pre_backward_phi` dphi.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from .. import launch
from ..launch import Spec
from . import tiling
from .arrays import flat
from .coefficients import LogitsBody, Parameters, PhiBody, TokenCoefficients, logits_arguments
from .sinkhorn import HalfSteps, half_steps, launch_projection_backward
from .sums import sum_partials


@dataclass(frozen=True)
class MhcPreBackwardCoefficientsBody(LogitsBody):
    name = "mhc_pre_backward_coefficients"
    HAS_DU: bool
    PROJECT: bool
    half_steps: HalfSteps
    VEC: int
    THREADS: int
    BATCH: int
    STORED_STEPS: int


@dataclass(frozen=True)
class MhcPreBackwardCoefficientsNormBody(LogitsBody):
    name = "mhc_pre_backward_coefficients_norm"
    PROJECT: bool
    half_steps: HalfSteps
    VEC: int
    THREADS: int
    PASSES: int
    CACHED: bool
    BATCH: int
    STORED_STEPS: int
    DREAD_T: mx.Dtype


@dataclass(frozen=True)
class MhcPreBackwardProjectionBody(PhiBody):
    name = "mhc_pre_backward_projection"
    THREADS: int
    SPAN: int
    STAGE: int
    RING_BYTES: int
    HAS_DU: bool
    HAS_DX_OUT: bool
    DU_T: mx.Dtype


@dataclass(frozen=True)
class MhcPreBackwardGenericBody(LogitsBody):
    name = "mhc_pre_backward_generic"
    HAS_DU: bool
    NORM: bool
    VEC: int
    THREADS: int
    TILE: int
    SPLITS: int
    HAS_DX_OUT: bool


@dataclass(frozen=True)
class MhcPreBackwardPhiBody(LogitsBody):
    name = "mhc_pre_backward_phi"
    VEC: int
    THREADS: int
    LOGITS_PER_THREAD: int


class Cotangents(NamedTuple):
    """Of the results; x is what is added to dx, namely the cotangent of the x that was passed
    through, or in `mhc_single_pass` the dx that came through the seam. None where there is none."""

    u: mx.array | None = None
    h_pre: mx.array | None = None
    h_post: mx.array | None = None
    h_res: mx.array | None = None
    x: mx.array | None = None


@functools.cache
def part_masks(n: int, num_logits: int, parts: int) -> mx.array:
    """A row for each part, pre, post and res: which logits belong to it."""
    return mx.array([[min(o // n, 2) == k for o in range(num_logits)] for k in range(parts)])


def coefficient_gradients(
    method: TokenCoefficients, x: mx.array, parameters: Parameters, saved: mx.array, d: Cotangents
) -> tuple[mx.array, Parameters]:
    """The gradients of x and of the parameters; ``saved`` holds each token's l, then its scale."""
    phi, norm = parameters.phi, parameters.weight is not None
    n, num_logits = x.shape[-2], phi.shape[0]
    dx_spec = (x.shape, x.dtype)
    x = flat(x, 3)
    if tiling.use_matrix_gradient(num_logits, x.dtype, norm, launch.device()):
        token = _launch_backward_coefficients(method, x, parameters, saved, d)
        if norm:
            d = d._replace(u=token["dread"])
        dx, dphi = _launch_backward_projection(method, x, phi, token, d, dx_spec)
    else:
        token = _launch_backward_generic(method, x, parameters, saved, d, dx_spec)
        dx, dphi = token["dx"], _launch_backward_phi(method, x, token["dp"])
    sums = sum_partials(token["partial"], method.options)
    parts = part_masks(n, num_logits, parameters.alpha.shape[0])
    return dx, Parameters(
        phi=sum_partials(dphi, method.options, shape=phi.shape),
        bias=sums[:num_logits],
        alpha=mx.where(parts, sums[num_logits : 2 * num_logits], 0.0).sum(1),
        weight=sums[2 * num_logits :] if norm else None,
    )


def _token_inputs(
    method: TokenCoefficients,
    n: int,
    parameters: Parameters,
    saved: mx.array,
    d: Cotangents,
    projects: bool,
) -> dict[str, mx.array | None]:
    """What all bodies of a token's gradient read. Unless the body projects, another launch makes
    the gradient of the logits of h_res."""
    phi, bias, alpha, _ = parameters
    num_gate_logits, num_logits = n if method.head else 2 * n, phi.shape[0]
    dz_res = None
    if d.h_res is not None and num_logits > num_gate_logits and not projects:
        slope, offset = alpha[2].astype(mx.float32), bias[num_gate_logits:].astype(mx.float32)
        logits, dh_res = slope * saved[:, num_gate_logits:num_logits] + offset, flat(d.h_res, 3)
        dz_res = launch_projection_backward(logits, dh_res, n, method.convention, method.options)
    coefficients = {"bias": bias, "alpha": alpha, "l": saved, "params": method.params}
    return {**coefficients, "dz_res": dz_res, "du": d.u, "dh_post": d.h_post}


def _launch_backward_coefficients(
    method: TokenCoefficients, x: mx.array, parameters: Parameters, saved: mx.array, d: Cotangents
) -> dict[str, mx.array]:
    """token_factors, dp, and sums over tokens in rows to be added; where u has a norm also dread,
    the gradient of the u before it."""
    (tokens, n, C), num_logits = x.shape, parameters.phi.shape[0]
    projects, norm = method.projects(n), parameters.weight is not None
    device, threads = launch.device(), method.options.threads_per_group
    t = tiling.coefficient_gradient_tiling(n, C, x.dtype.size, tokens, norm, threads, device)
    steps = half_steps(method.convention if projects else None)
    arguments = logits_arguments(x.dtype, n, num_logits, t)
    stored_steps = tiling.stored_half_steps(steps.ITERS, t.threads, device)
    arguments |= {"PROJECT": projects, "half_steps": steps}
    arguments |= {"BATCH": t.batch, "STORED_STEPS": stored_steps}
    inputs = {"x": x, **_token_inputs(method, n, parameters, saved, d, projects)}
    outputs: dict[str, Spec] = {"token_factors": ((tokens, n + 1), mx.float32)}
    if norm:
        # float16 ends where du' may go on
        dread_dtype = mx.float32 if x.dtype == mx.float16 else x.dtype
        body = MhcPreBackwardCoefficientsNormBody(
            **arguments, DREAD_T=dread_dtype, PASSES=t.passes, CACHED=t.cached
        )
        inputs["weight"] = parameters.weight
        outputs["dread"] = ((tokens, C), dread_dtype)
    else:
        body = MhcPreBackwardCoefficientsBody(**arguments, HAS_DU=d.u is not None)
        inputs["dh_pre"] = d.h_pre
    inputs["dh_res"] = d.h_res if projects else None
    outputs["dp"] = ((tokens, num_logits), mx.float32)
    outputs["partial"] = ((t.rows, 2 * num_logits + C * norm), mx.float32)
    return launch.launch(body, inputs, outputs, t.groups, method.options)


def _launch_backward_projection(
    method: TokenCoefficients,
    x: mx.array,
    phi: mx.array,
    token: dict[str, mx.array],
    d: Cotangents,
    dx_spec: Spec,
) -> tuple[mx.array, mx.array]:
    """dx, and dphi in rows to be added, from what `_launch_backward_coefficients` gives."""
    (tokens, n, C), num_logits = x.shape, phi.shape[0]
    device, threads = launch.device(), method.options.threads_per_group
    t = tiling.projection_gradient_tiling(n, C, num_logits, tokens, threads, device)
    size = x.dtype.size * (1 + (d.u is not None) + (d.x is not None))
    body = MhcPreBackwardProjectionBody(
        T=x.dtype,
        PHI_T=phi.dtype,
        N=n,
        NUM_LOGITS=num_logits,
        THREADS=t.threads,
        SPAN=t.span,
        STAGE=tiling.PROJECTION_GRADIENT_STAGE,
        RING_BYTES=tiling.projection_gradient_ring_bytes(t.span, t.threads, size, device),
        HAS_DU=d.u is not None,
        HAS_DX_OUT=d.x is not None,
        DU_T=x.dtype if d.u is None else d.u.dtype,
    )
    factors = {"dp": token["dp"], "token_factors": token["token_factors"]}
    inputs = {"x": x, "phi": phi, **factors, "du": d.u, "dx_out": d.x}
    dphi = ((t.chunks, num_logits * n * C), mx.float32)
    outputs, groups = {"dx": dx_spec, "partial": dphi}, t.chunks * t.groups_per_chunk
    results = launch.launch(body, inputs, outputs, groups, method.options)
    return results["dx"], results["partial"]


def _launch_backward_generic(
    method: TokenCoefficients,
    x: mx.array,
    parameters: Parameters,
    saved: mx.array,
    d: Cotangents,
    dx_spec: Spec,
) -> dict[str, mx.array]:
    """dx, dp, and sums over tokens in rows to be added."""
    phi, norm = parameters.phi, parameters.weight is not None
    (tokens, n, C), num_logits = x.shape, phi.shape[0]
    token_inputs = _token_inputs(method, n, parameters, saved, d, projects=False)
    threads = method.options.threads_per_group
    t = tiling.generic_gradient_tiling(n, C, num_logits, tokens, threads, launch.device())
    body = MhcPreBackwardGenericBody(
        **logits_arguments(x.dtype, n, num_logits, t),
        HAS_DU=d.u is not None,
        NORM=norm,
        TILE=t.tile,
        SPLITS=t.splits,
        HAS_DX_OUT=d.x is not None,
    )
    token_inputs |= {"weight": parameters.weight, "dh_pre": d.h_pre}
    inputs = {"x": x, "phi": phi, **token_inputs, "dx_out": d.x}
    outputs = {
        "dx": dx_spec,
        "dp": ((tokens, num_logits), mx.float32),
        "partial": ((t.rows, 2 * num_logits + C * norm), mx.float32),
    }
    return launch.launch(body, inputs, outputs, t.rows * t.splits, method.options)


def _launch_backward_phi(method: TokenCoefficients, x: mx.array, dp: mx.array) -> mx.array:
    """dphi in rows to be added."""
    (tokens, n, C), num_logits = x.shape, dp.shape[1]
    threads = method.options.threads_per_group
    t = tiling.phi_gradient_tiling(n * C, C, num_logits, tokens, threads, launch.device())
    arguments = logits_arguments(x.dtype, n, num_logits, t)
    body = MhcPreBackwardPhiBody(**arguments, LOGITS_PER_THREAD=t.logits_per_thread)
    inputs, groups = {"x": x, "dp": dp}, t.chunks * t.groups_per_chunk
    outputs = {"partial": ((t.chunks, num_logits * n * C), mx.float32)}
    return launch.launch(body, inputs, outputs, groups, method.options)["partial"]
