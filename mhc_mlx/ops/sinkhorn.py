"""The projection: from logits to mixing matrices, by half-steps or exactly."""

import functools
import math
from dataclasses import dataclass

import mlx.core as mx

from .. import launch, reference
from ..conventions import PAPER, ROW_FIRST, SINKHORN, START_CODES, Convention
from . import tiling
from .arrays import body_params, flat, unflat
from .autodiff import FusedOp, Options
from .checks import MAX_STREAMS, check_convention, check_dtype, check_half_steps, check_rows, fail

__all__ = ["project", "sinkhorn_knopp"]


@dataclass(frozen=True)
class HalfSteps(launch.Arguments):
    """Template arguments of a projection by half-steps; a lane holds a line of the first one."""

    ITERS: int
    START: int
    COLUMNS: bool
    OUT_COLUMNS: bool
    CLAMP: bool


@functools.cache
def half_steps(convention: Convention | None) -> HalfSteps:
    """Those of a convention; None where a variant does not project."""
    c = convention or ROW_FIRST
    columns = c.first == "columns"
    return HalfSteps(
        ITERS=c.iters,
        START=START_CODES["exp" if c.in_logs else c.start],
        COLUMNS=columns,
        OUT_COLUMNS=columns != c.transposed,
        CLAMP=c.clamp is not None,
    )


# ---- by half-steps


@dataclass(frozen=True)
class SinkhornKnoppBody(launch.Body):
    name = "sinkhorn_knopp"
    N: int
    half_steps: HalfSteps
    THREADS: int


@dataclass(frozen=True)
class SinkhornKnoppBackwardBody(SinkhornKnoppBody):
    name = "sinkhorn_knopp_backward"
    STORED_STEPS: int
    DLOGITS_T: mx.Dtype


def launch_sinkhorn(logits: mx.array, convention: Convention, options: Options) -> mx.array:
    """h_res of logits ``[..., n, n]``."""
    n, matrices = logits.shape[-1], flat(logits, 3)
    t = tiling.sinkhorn_tiling(n, matrices.shape[0], options.threads_per_group, launch.device())
    body = SinkhornKnoppBody(N=n, half_steps=half_steps(convention), THREADS=t.threads)
    inputs = {"logits": matrices, "params": body_params(convention)}
    outputs = {"h_res": (matrices.shape, mx.float32)}
    h_res = launch.launch(body, inputs, outputs, t.groups, options)["h_res"]
    return unflat(h_res, logits.shape)


def launch_sinkhorn_backward(
    logits: mx.array, dh_res: mx.array, convention: Convention, options: Options
) -> mx.array:
    """dlogits, in the dtype of logits ``[..., n, n]``."""
    n, matrices = logits.shape[-1], flat(logits, 3)
    device = launch.device()
    t = tiling.sinkhorn_tiling(n, matrices.shape[0], options.threads_per_group, device)
    body = SinkhornKnoppBackwardBody(
        N=n,
        half_steps=half_steps(convention),
        THREADS=t.threads,
        STORED_STEPS=tiling.stored_steps(n, convention.iters, t.threads, device),
        DLOGITS_T=logits.dtype,
    )
    params = body_params(convention)
    inputs = {"logits": matrices, "dh_res": flat(dh_res, 3), "params": params}
    outputs = {"dlogits": (matrices.shape, logits.dtype)}
    dlogits = launch.launch(body, inputs, outputs, t.groups, options)["dlogits"]
    return unflat(dlogits, logits.shape)


@dataclass(frozen=True)
class SinkhornKnopp(FusedOp):
    convention: Convention

    name = "sinkhorn_knopp"
    shared_ndim = (None,)

    def fallback(self, logits):
        return reference.sinkhorn_knopp(logits, self.convention)

    def forward(self, logits):
        return launch_sinkhorn(logits, self.convention, self.options)

    def backward(self, arrays, cotangents, saved):
        (logits,), (dh_res,) = arrays, cotangents
        return (launch_sinkhorn_backward(logits, dh_res, self.convention, self.options),)


def sinkhorn_knopp(
    logits: mx.array,
    convention: Convention = ROW_FIRST,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """Project logits to a nearly doubly stochastic matrix by truncated Sinkhorn-Knopp iteration.

    ``P = start(logits)``, then alternately ``P = P / (P.sum(rows) + eps)`` and
    ``P = P / (P.sum(columns) + eps)``, 2 * iters half-steps in all (arXiv 2512.24880, eq. 9); with
    the start exp the first two are without eps. With a clamp the logits are clipped to it first.
    The gradient is that of the truncated map, and 0 for a logit that is clipped or at an end of the
    clamp.

    Args:
        logits: ``[..., n, n]`` float32, float16 or bfloat16, any finite values. ADDITIVE divides by
            sums of ``I + logits`` as given: its lines must not sum to 0.
        convention: Start, clamp, order, iterations and eps; one with half-steps.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
        verbose: Print the source of the kernels, without a GPU the Metal source.
        differentiable: False calls the kernels bare, as `mx.export_function` needs: no gradient.

    Returns:
        h_res ``[..., n, n]`` float32, row = output: ``out[i] = sum_j h_res[i, j] x[j]``.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "sinkhorn_knopp"
    check_dtype(op, logits=logits)
    n = logits.shape[-1] if logits.ndim else 0
    if logits.shape[-2:] != (n, n) or not 1 <= n <= MAX_STREAMS:
        must = f"have shape [..., n, n] with n from 1 to {MAX_STREAMS}"
        raise ValueError(fail(op, "logits", must, list(logits.shape)))
    check_half_steps(op, convention)
    fused = SinkhornKnopp(Options(threads_per_group, verbose), convention)
    return fused(logits, use_metal=use_metal, differentiable=differentiable)


# ---- without half-steps; then the choice by the convention's start


@dataclass(frozen=True)
class MixingMatrixBody(launch.Body):
    name = "mixing_matrix"
    N: int
    NUM_LOGITS: int
    THREADS: int
    PERMUTATIONS: bool
    TRANSPOSED: bool


@dataclass(frozen=True)
class MixingMatrixBackwardBody(MixingMatrixBody):
    name = "mixing_matrix_backward"
    DLOGITS_T: mx.Dtype


def _mixing_arguments(n, num_logits, convention, options):
    return {
        "N": n,
        "NUM_LOGITS": num_logits,
        "THREADS": options.threads_per_group or 128,
        "PERMUTATIONS": convention.start == "permutations",
        "TRANSPOSED": convention.transposed,
    }


def launch_projection(
    logits: mx.array, n: int, convention: Convention, options: Options
) -> mx.array:
    """h_res ``[tokens, n, n]`` of logits ``[tokens, R]``, R at least 1, by any projection."""
    tokens, num_logits = logits.shape
    if convention.start in SINKHORN:
        return launch_sinkhorn(logits.reshape(tokens, n, n), convention, options)
    if convention.start == "unconstrained":
        h_res = mx.eye(n) + logits.reshape(tokens, n, n)
        return h_res.swapaxes(1, 2) if convention.transposed else h_res
    body = MixingMatrixBody(**_mixing_arguments(n, num_logits, convention, options))
    groups = tiling.many_groups(math.ceil(tokens * n / body.THREADS), launch.device())
    outputs = {"h_res": ((tokens, n, n), mx.float32)}
    return launch.launch(body, {"logits": logits}, outputs, groups, options)["h_res"]


def launch_projection_backward(
    logits: mx.array, dh_res: mx.array, n: int, convention: Convention, options: Options
) -> mx.array:
    """dlogits ``[tokens, R]`` of logits ``[tokens, R]`` and dh_res ``[tokens, n, n]``."""
    tokens, num_logits = logits.shape
    if convention.start in SINKHORN:
        logits = logits.reshape(tokens, n, n)
        dlogits = launch_sinkhorn_backward(logits, dh_res, convention, options)
        return dlogits.reshape(tokens, num_logits)
    if convention.start == "unconstrained":
        dlogits = dh_res.swapaxes(1, 2) if convention.transposed else dh_res
        return dlogits.reshape(tokens, num_logits)
    arguments = _mixing_arguments(n, num_logits, convention, options)
    body = MixingMatrixBackwardBody(**arguments, DLOGITS_T=mx.float32)
    groups = tiling.many_groups(math.ceil(tokens / body.THREADS), launch.device())
    inputs, outputs = {"logits": logits, "dh_res": dh_res}, {"dlogits": (logits.shape, mx.float32)}
    return launch.launch(body, inputs, outputs, groups, options)["dlogits"]


def project(logits: mx.array, n: int, convention: Convention = PAPER) -> mx.array | None:
    """The mixing matrix of R logits by any projection of `Convention`; without kernels.

    Args:
        logits: ``[..., R]`` float32, float16 or bfloat16, R = ``convention.res_size(n)``.
        n: Streams, 1 to 64.
        convention: The projection.

    Returns:
        h_res ``[..., n, n]`` float32, row = output, or None, the identity, where R is 0.

    Raises:
        ValueError: Where a shape or a number does not fit.
        TypeError: Where a dtype or a type does not.
    """
    op = "project"
    check_convention(op, convention)
    convention.check_streams(op, n)
    if n > MAX_STREAMS:
        raise ValueError(fail(op, "n", f"be at most {MAX_STREAMS}", n))
    _, size = check_rows(op, "logits", logits)
    R = convention.res_size(n)
    if size != R:
        raise ValueError(fail(op, "logits", f"have shape [..., R={R}]", list(logits.shape)))
    return reference.project(logits, n, convention)
