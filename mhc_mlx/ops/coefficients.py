"""Coefficients that each token makes for itself.

Of few tokens many threadgroups share a phi product, `mhc_pre_partial_logits`, and `mhc_seam` does
the rest; of more, `mhc_pre` does all.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from .. import launch
from ..conventions import SINKHORN, Convention
from ..devices import Device
from ..launch import Spec
from . import tiling
from .arrays import body_params, flat, unflat
from .autodiff import Options
from .sinkhorn import HalfSteps, half_steps, launch_projection
from .streams import TokenBody, token_arguments


def use_fused_projection(n: int, convention: Convention) -> bool:
    """Whether the body that finishes the logits also makes h_res of them."""
    return n <= 8 and convention.start in SINKHORN


def has_few_tokens(x: mx.array, phi: mx.array, options: Options) -> bool:
    """Whether x ``[tokens, n, C]`` has so few tokens that `launch_partial_logits` and `launch_seam`
    make its coefficients, instead of `mhc_pre`."""
    tokens, n, C = x.shape
    shape = (n, C, x.dtype, phi.shape[0], tokens, options.threads_per_group)
    return tiling.use_partial_logits(*shape, launch.device())


@dataclass(frozen=True)
class PhiBody(launch.Body):
    """A body with template arguments of an array phi."""

    T: mx.Dtype
    PHI_T: mx.Dtype
    N: int
    NUM_LOGITS: int


@dataclass(frozen=True)
class LogitsBody(launch.Body):
    """A body with template arguments of logits, whose phi is float32 if it reads any."""

    T: mx.Dtype
    N: int
    NUM_LOGITS: int


def logits_arguments(dtype: mx.Dtype, n: int, num_logits: int, t: Any) -> dict[str, Any]:
    """The template arguments that bodies of logits have."""
    return {"T": dtype, "N": n, "NUM_LOGITS": num_logits, "VEC": t.vec, "THREADS": t.threads}


@dataclass(frozen=True)
class MhcPrePartialLogitsBody(PhiBody):
    name = "mhc_pre_partial_logits"
    BLOCK: int
    THREADS: int


def launch_partial_logits(x: mx.array, phi: mx.array, options: Options) -> tuple[mx.array, int]:
    """The phi products of single runs of x ``[tokens, n, C]``, and the number of slices: run r is
    added in slice r % slices, by `mhc_seam` as `mhc_pre` does."""
    (tokens, n, C), num_logits = x.shape, phi.shape[0]
    shape = (n, C, x.dtype, num_logits, tokens, options.threads_per_group)
    t = tiling.logits_tiling(*shape, launch.device())
    runs = math.ceil(n * C / 32)
    body = MhcPrePartialLogitsBody(
        T=x.dtype,
        PHI_T=phi.dtype,
        N=n,
        NUM_LOGITS=num_logits,
        BLOCK=t.block,
        THREADS=options.threads_per_group or 128,
    )
    inputs = {"x": x, "phi": phi}
    outputs = {"partial_logits": ((tokens, runs, num_logits + 4), mx.float32)}
    groups = math.ceil(tokens / 8) * math.ceil(runs / (body.THREADS // 32))
    results = launch.launch(body, inputs, outputs, groups, options)
    return results["partial_logits"], t.slices


@dataclass(frozen=True)
class MhcSeamBody(TokenBody):
    name = "mhc_seam"
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


NEW_NAMES = {"h_pre": "new_h_pre", "h_post": "new_h_post", "h_res": "new_h_res"}  # if made here
SEAM_OUTPUTS = ("out", "u", "new_h_pre", "new_h_post", "new_h_res", "logits", "l")


def launch_seam(
    x: mx.array,
    inputs: SeamInputs,
    outputs: Mapping[str, Spec | None],
    *,
    slices: int = 1,
    round_u: bool = False,
    projection: Convention | None = None,
    options: Options,
) -> dict[str, mx.array]:
    """The write-back and the read of x ``[tokens, n, C]``: what ``outputs`` asks for, by names of
    `SEAM_OUTPUTS`. So the outputs set the template arguments: `mhc_seam` reads x for out or u.

    With partial logits it makes the coefficients: ``slices`` is how it adds those, ``projection``
    the convention by which it makes h_res.
    """
    tokens, n, C = x.shape
    outputs = {k: outputs.get(k) for k in SEAM_OUTPUTS}
    device, threads = launch.device(), options.threads_per_group
    body = _mhc_seam_body(
        x.dtype,
        n,
        tiling.seam_tiling(n, C, x.dtype.size, threads, device),
        tuple([k for k, a in zip(inputs._fields, inputs, strict=True) if a is not None]),
        tuple([k for k, spec in outputs.items() if spec is not None]),
        2 * n if inputs.bias is None else inputs.bias.shape[0],
        slices,
        round_u=round_u,
        projection=projection,
    )
    arrays = {"x": x, **inputs._asdict()}
    return launch.launch(body, arrays, outputs, tiling.many_groups(tokens, device), options)


@functools.cache
def _mhc_seam_body(
    dtype: mx.Dtype,
    n: int,
    t: tiling.TokenTiling,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    num_logits: int,
    slices: int,
    *,
    round_u: bool,
    projection: Convention | None,
) -> MhcSeamBody:
    """The template arguments for the arrays that are present. They are cached: with `mhc_pre`'s
    cached too, a call of `mhc_single_pass` costs the CPU 55 us instead of 69 us."""
    return MhcSeamBody(
        **token_arguments(dtype, n, t),
        PASSES=t.passes,
        WRITE_BACK="out" in outputs,
        WRITE_U="u" in outputs,
        NORM="weight" in inputs,
        ROUND_U=round_u,
        FROM_PARTIAL_LOGITS="partial_logits" in inputs,
        NUM_LOGITS=num_logits,
        SLICES=slices,
        SAVE_LOGITS="l" in outputs,
        PROJECT=projection is not None,
        WRITE_H_PRE="new_h_pre" in outputs,
        half_steps=half_steps(projection),
    )


@dataclass(frozen=True)
class MhcPreBody(PhiBody):
    name = "mhc_pre"
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


@functools.cache
def _mhc_pre_body(
    n: int,
    C: int,
    dtype: mx.Dtype,
    num_logits: int,
    phi_dtype: mx.Dtype,
    t: tiling.LogitsTiling,
    device: Device,
    outputs: tuple[str, ...],
    *,
    norm: bool,
    projection: Convention | None,
) -> MhcPreBody:
    """The template arguments; cached as those of `mhc_seam`."""
    u = tiling.u_tiling(t, n, C, device) if norm else tiling.UTiling()
    return MhcPreBody(
        **logits_arguments(dtype, n, num_logits, t),
        PHI_T=phi_dtype,
        SLICES=t.slices,
        TILES=t.tiles,
        BLOCK=t.block,
        SPLITS=t.splits,
        WRITE_U="u" in outputs,
        NORM=norm,
        U_SIMDGROUPS=u.simdgroups,
        U_PACKS=u.packs,
        SAVE_LOGITS="l" in outputs,
        RING_BYTES=tiling.ring_bytes(t, n, C, dtype, phi_dtype, num_logits, device),
        PROJECT=projection is not None,
        half_steps=half_steps(projection),
    )


class Parameters(NamedTuple):
    """What makes coefficients of the streams; their gradients have the same names."""

    phi: mx.array
    bias: mx.array
    alpha: mx.array
    weight: mx.array | None = None  # of the RMSNorm of u


@dataclass(frozen=True)
class TokenCoefficients:
    """How the coefficients of each token are made of its streams.

    eps: Of the RMSNorm of u, where there is a weight.
    head: Only h_pre is made, of n logits.
    writes_u: The result is u, not h_pre.
    """

    options: Options
    convention: Convention
    norm_eps: float
    eps: float = 1.0
    head: bool = False
    writes_u: bool = True

    @property
    def params(self) -> mx.array:
        return body_params(self.convention, norm_eps=self.norm_eps, eps=self.eps)

    def projects(self, n: int) -> bool:
        return not self.head and use_fused_projection(n, self.convention)

    def make(self, x: mx.array, parameters: Parameters, save: bool) -> dict[str, mx.array]:
        """By name u or h_pre, and unless there is only a head h_post and h_res, which is left out
        where it is the identity; with ``save`` also l."""
        (*lead, n, C), num_logits, floats = x.shape, parameters.phi.shape[0], mx.float32
        x = flat(x, 3)
        tokens, num_res_logits = x.shape[0], 0 if self.head else self.convention.res_size(n)
        projects = self.projects(n)
        logits = ((tokens, num_res_logits), floats)  # of h_res, if another launch projects them
        outputs = {
            "u": ((*lead, C), x.dtype) if self.writes_u else None,
            "h_pre": None if self.writes_u else ((*lead, n), floats),
            "h_post": None if self.head else ((*lead, n), floats),
            "h_res": ((*lead, n, n), floats) if projects else None,
            "logits": logits if num_res_logits and not projects else None,
            "l": ((tokens, num_logits + 1), floats) if save else None,
        }
        if has_few_tokens(x, parameters.phi, self.options):
            phi, bias, alpha, weight = parameters
            partial_logits, slices = launch_partial_logits(x, phi, self.options)
            results = launch_seam(
                x,
                SeamInputs(
                    partial_logits=partial_logits,
                    bias=bias,
                    alpha=alpha,
                    weight=weight,
                    params=self.params,
                ),
                {NEW_NAMES.get(k, k): spec for k, spec in outputs.items()},
                slices=slices,
                projection=self.convention if projects else None,
                options=self.options,
            )
            names = {NEW_NAMES.get(k, k): k for k in outputs}
            results = {names[k]: a for k, a in results.items()}
        else:
            results = self._launch_pre(x, parameters, outputs)
        if "logits" in results:
            h_res = launch_projection(results["logits"], n, self.convention, self.options)
            results["h_res"] = unflat(h_res, (*lead, n, n))
        return results

    def _launch_pre(
        self, x: mx.array, parameters: Parameters, outputs: dict[str, Spec | None]
    ) -> dict[str, mx.array]:
        (tokens, n, C), phi, threads = x.shape, parameters.phi, self.options.threads_per_group
        device = launch.device()
        t = tiling.logits_tiling(n, C, x.dtype, phi.shape[0], tokens, threads, device)
        body = _mhc_pre_body(
            *(n, C, x.dtype, phi.shape[0], phi.dtype, t, device),
            tuple([k for k, spec in outputs.items() if spec is not None]),
            norm=parameters.weight is not None,
            projection=self.convention if outputs["h_res"] else None,
        )
        inputs = {"x": x, **parameters._asdict(), "params": self.params}
        groups = t.splits * tiling.many_groups(math.ceil(tokens / t.tokens), device)
        return launch.launch(body, inputs, outputs, groups, self.options)
