"""What the rooms share whose tokens make their own coefficients: few tokens, and `mhc_seam`."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from .. import launch
from ..conventions import SINKHORN, Convention
from . import tiling
from .autodiff import Options
from .sinkhorn import HalfSteps, half_steps


def use_fused_projection(n: int, convention: Convention) -> bool:
    """Whether the body that finishes the logits also makes h_res of them."""
    return n <= 8 and convention.start in SINKHORN


def use_partial_logits(x: mx.array, phi: mx.array, options: Options) -> bool:
    """Whether x ``[tokens, n, C]`` has few tokens: `launch_partial_logits`, then `launch_seam`."""
    tokens, n, C = x.shape
    shape = (n, C, x.dtype, phi.shape[0], tokens, options.threads_per_group)
    limit = launch.threadgroup_memory_limit()
    return tiling.use_partial_logits(*shape, launch.backend(), limit)


@dataclass(frozen=True)
class MhcPrePartialLogitsBody(launch.Body):
    name = "mhc_pre_partial_logits"
    T: mx.Dtype
    PHI_T: mx.Dtype
    N: int
    NUM_LOGITS: int
    BLOCK: int
    THREADS: int


class PartialLogits(NamedTuple):
    products: mx.array  # of phi and x, run by run of 32 k
    slices: int  # in which `mhc_pre` adds the runs, and so `mhc_seam`


def launch_partial_logits(x: mx.array, phi: mx.array, options: Options) -> PartialLogits:
    """The phi product of x ``[tokens, n, C]``, not yet added up."""
    (tokens, n, C), num_logits = x.shape, phi.shape[0]
    shape = (n, C, x.dtype, num_logits, tokens, options.threads_per_group)
    t = tiling.logits_tiling(*shape, launch.threadgroup_memory_limit())
    runs = math.ceil(n * C / 32)
    body = MhcPrePartialLogitsBody(
        T=x.dtype,
        PHI_T=phi.dtype,
        N=n,
        NUM_LOGITS=num_logits,
        BLOCK=t.block,
        THREADS=options.threads_per_group or 128,
    )
    products = launch.launch(
        body,
        {"x": x, "phi": phi},
        {"partial_logits": ((tokens, runs, num_logits + 4), mx.float32)},
        math.ceil(tokens / 8) * math.ceil(runs / (body.THREADS // 32)),
        options,
    )["partial_logits"]
    return PartialLogits(products, t.slices)


@dataclass(frozen=True)
class MhcSeamBody(launch.Body):
    name = "mhc_seam"
    T: mx.Dtype
    N: int
    VEC: int
    THREADS: int
    PASSES: int
    WRITE_BACK: bool
    WRITE_U: bool
    NORM: bool
    ROUND_U: bool
    FROM_PARTIAL_LOGITS: bool
    SAVE_LOGITS: bool
    PROJECT: bool
    WRITE_H_PRE: bool
    NUM_LOGITS: int
    SLICES: int
    half_steps: HalfSteps


class SeamInputs(NamedTuple):
    """Arrays of `mhc_seam` but x; None where a variant does not read it."""

    y: mx.array | None = None
    h_pre: mx.array | None = None
    h_post: mx.array | None = None
    h_res: mx.array | None = None
    weight: mx.array | None = None
    partial_logits: mx.array | None = None
    bias: mx.array | None = None
    alpha: mx.array | None = None
    params: mx.array | None = None


class SeamOutputs(NamedTuple):
    """The specs of what `mhc_seam` is asked for, and then the arrays."""

    out: Any = None
    u: Any = None
    new_h_pre: Any = None
    new_h_post: Any = None
    new_h_res: Any = None
    logits: Any = None
    l: Any = None  # noqa: E741


def launch_seam(
    x: mx.array,
    inputs: SeamInputs,
    outputs: SeamOutputs,
    *,
    slices: int = 1,
    round_u: bool = False,
    projection: Convention | None = None,
    options: Options,
) -> SeamOutputs:
    """The write-back and the read of x ``[tokens, n, C]``, as far as ``outputs`` asks for them.

    With partial logits it makes the coefficients: ``slices`` is how it adds those, ``projection``
    the convention by which it makes h_res.
    """
    tokens, n, C = x.shape
    threads = options.threads_per_group
    t = tiling.seam_tiling(n, C, x.dtype.size, threads, launch.backend())
    body = MhcSeamBody(
        T=x.dtype,
        N=n,
        VEC=t.vec,
        THREADS=t.threads,
        PASSES=t.passes,
        WRITE_BACK=outputs.out is not None,
        WRITE_U=outputs.u is not None,
        NORM=inputs.weight is not None,
        ROUND_U=round_u,
        FROM_PARTIAL_LOGITS=inputs.partial_logits is not None,
        NUM_LOGITS=2 * n if inputs.bias is None else inputs.bias.shape[0],
        SLICES=slices,
        SAVE_LOGITS=outputs.l is not None,
        PROJECT=projection is not None,
        WRITE_H_PRE=outputs.new_h_pre is not None,
        half_steps=half_steps(projection),
    )
    groups = tiling.many_groups(tokens)
    arrays = {"x": x, **inputs._asdict()}
    return SeamOutputs(**launch.launch(body, arrays, outputs._asdict(), groups, options))
