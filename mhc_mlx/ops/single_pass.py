"""Ops of "single pass" models (DeepSeek V4.1), where a sublayer reads with coefficients that were
made before its streams: launches, gradients, public names."""

import mlx.core as mx

from .. import kernel, reference
from ..conventions import DEEPSEEK_V4, Convention
from . import geometry
from .dispatch import (
    KERNELS,
    Kernels,
    check_array,
    check_bools,
    check_branch,
    check_eps,
    check_streams,
    flat,
    fused_op,
    identity,
    unflat,
)
from .dynamic import (
    check_dynamic,
    pre_backward,
    pre_forward,
    projected,
    seam_launch,
    sweep,
    token_params,
)
from .static import mix_add_backward, mix_add_forward, projection, sum_rows


def _per_token(tokens: int, *coefficients: tuple[mx.array, int]) -> list[mx.array]:
    """Coefficients of so many axes, or shared by all tokens, for each token."""
    return [
        a if a.ndim >= ndim else mx.broadcast_to(a, (tokens, *a.shape)) for a, ndim in coefficients
    ]


def _seam_forward(x, y, h_pre, h_post, h_res, weight, eps, rounded, threads_per_group, verbose):
    whole, n = flat(x, 3), x.shape[-2]
    h_res = identity(n) if h_res is None else h_res
    h_pre, h_post, h_res = _per_token(len(whole), (h_pre, 2), (h_post, 2), (h_res, 3))
    inputs = {"y": y, "h_pre": h_pre, "h_post": h_post, "h_res": h_res, "weight": weight}
    out, u = seam_launch(
        whole,
        inputs | {"params": token_params(DEEPSEEK_V4, 1.0, eps)},
        {"out": (x.shape, x.dtype), "u": (y.shape, x.dtype)},  # a reshape is one more primitive
        {"WRITE_BACK": True, "WRITE_U": True, "NORM": weight is not None, "ROUND_U": rounded},
        threads_per_group,
        verbose,
    )
    return out, u


def _seam_backward(
    x, y, h_pre, h_post, h_res, weight, cotangents, eps, rounded, threads_per_group, verbose
):
    """Gradients of x, y, h_pre, h_post, h_res, weight; None of those that are."""
    n, C = x.shape[-2:]
    if n > 8:
        options = (threads_per_group, verbose)
        return _many_streams_backward(
            x, y, h_pre, h_post, h_res, weight, cotangents, eps, rounded, *options
        )
    whole, (dout, du) = flat(x, 3), cotangents
    tokens = whole.shape[0]
    coefficients = (h_pre, h_post, h_res)
    mixing = identity(n) if h_res is None else h_res
    h_pre, h_post, mixing = _per_token(tokens, (h_pre, 2), (h_post, 2), (mixing, 3))
    g = geometry.of_seam_backward(n, C, x.dtype.size, threads_per_group)
    groups = min(tokens, max(1, geometry.BACKWARD_THREADS // g.threads))
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads, "PASSES": g.passes}
    dx, dy, *made = kernel.launch(
        "mhc_seam_backward",
        {"x": whole, "y": y, "dout": dout, "du": du}
        | {"h_pre": h_pre, "h_post": h_post, "h_res": mixing, "weight": weight}
        | {"params": token_params(DEEPSEEK_V4, 1.0, eps)},
        {
            "dx": (x.shape, x.dtype),
            "dy": (y.shape, x.dtype),
            "dh_pre": (h_pre.shape, mx.float32),
            "dh_post": (h_post.shape, mx.float32),
            "dh_res": (mixing.shape, mx.float32),
            "partial": None if weight is None else ((groups, C), mx.float32),
        },
        groups,
        g.threads,
        template | {"CACHED": g.fits, "NORM": weight is not None, "ROUND_U": rounded},
        verbose,
    )
    gradients = [dx, dy]
    for a, d in zip(coefficients, made, strict=False):
        if a is not None and a.ndim < d.ndim:  # shared by all tokens
            d = unflat(sum_rows(d.reshape(tokens, -1), verbose), a.shape)
        gradients.append(None if a is None else d.astype(a.dtype))
    dweight = None if weight is None else sum_rows(made[3], verbose).astype(weight.dtype)
    return [*gradients, dweight]


def _many_streams_backward(x, y, h_pre, h_post, h_res, weight, cotangents, eps, rounded, *options):
    """For n > 8: the read by the reference, the write-back by its kernels, both in float32."""
    dtype, (dout, du) = x.dtype, [a.astype(mx.float32) for a in cotangents]
    mixing = identity(x.shape[-2]) if h_res is None else h_res
    out = mix_add_forward(x, y, h_post, mixing, *options).astype(mx.float32)

    def read(out, h_pre, weight=None):
        return reference._read(out, h_pre, weight, eps, dtype if rounded else mx.float32)

    given = [a.astype(mx.float32) for a in (out, h_pre, weight) if a is not None]
    dread, dh_pre, *dweight = mx.vjp(read, given, [du])[1]
    xf, yf = x.astype(mx.float32), y.astype(mx.float32)
    dx, dy, dh_post, dh_res = mix_add_backward(xf, yf, h_post, mixing, dout + dread, *options)
    gradients = [dx, dy, dh_pre, dh_post, dh_res, *(dweight or [None])]
    arrays = (x, y, h_pre, h_post, h_res, weight)
    return [
        None if a is None else g.astype(a.dtype) for g, a in zip(gradients, arrays, strict=True)
    ]


def _single_forward(
    x,
    y,
    phi,
    bias,
    alpha,
    weight,
    convention,
    norm_eps,
    eps,
    rounded,
    threads_per_group,
    verbose,
    save=False,
):
    """out, u, h_pre, and h_pre, h_post, h_res, l of all tokens in a row for the gradient."""
    (*lead, n, C), outs, options = x.shape, phi.shape[0], (threads_per_group, verbose)
    whole, kept = flat(x, 3), []
    backend, shape = kernel.backend(), (n, C, x.dtype, outs, len(whole), threads_per_group)
    few = geometry.swept(*shape, backend, kernel.room(backend))
    if save or not few or not projected(n, convention):
        arrays = (whole, phi, bias, alpha, None)
        (_, *made), unit = pre_forward(
            *arrays, convention, norm_eps, 1.0, *options, read=False, save=save
        )
        out, u = _seam_forward(x, y, *made, weight, eps, rounded, *options)
        h_pre, kept = made[0], [*(a for a in made if a is not None), *unit] if save else []
        return out, u, unflat(h_pre, (*lead, n)), *kept
    runs, slices = sweep(whole, phi, *options)
    inputs = {"y": y, "weight": weight, "partial_logits": runs, "bias": bias, "alpha": alpha}
    flags = {"WRITE_BACK": True, "WRITE_U": True, "NORM": weight is not None, "ROUND_U": rounded}
    flags |= {
        "FROM_PARTIAL_LOGITS": True,
        "NUM_LOGITS": outs,
        "SLICES": slices,
        "PROJECT": True,
        "WRITE_H_PRE": True,
    }
    results = seam_launch(
        whole,
        inputs | {"params": token_params(convention, norm_eps, eps)},
        {
            "out": (x.shape, x.dtype),
            "u": (y.shape, x.dtype),
            "new_h_pre": ((*lead, n), mx.float32),
        },
        flags | projection(convention),
        *options,
    )
    return tuple(results)


def _single_backward(
    x, y, phi, bias, alpha, weight, cotangents, convention, norm_eps, eps, rounded, *options, saved
):
    *made, unit = saved
    h_pre, h_post, h_res = made if len(made) == 3 else (*made, None)
    whole, branch = flat(x, 3), flat(y, 2)  # all tokens in a row, as what was saved
    dout, du, dh_pre = (flat(a, keep) for a, keep in zip(cotangents, (3, 2, 2), strict=True))
    dx, dy, dpre, dpost, dres, dweight = _seam_backward(
        whole, branch, h_pre, h_post, h_res, weight, (dout, du), eps, rounded, *options
    )
    given = (None, dpre + dh_pre, dpost, dres, dx)
    arrays = (whole, phi, bias, alpha, None)
    dx, *rest = pre_backward(*arrays, given, convention, norm_eps, 1.0, *options, saved=[unit])
    return [unflat(dx, x.shape), unflat(dy, y.shape), *rest[:3], dweight]


KERNELS |= {
    "mhc_seam": Kernels((None, None, 1, 1, 2, 1), _seam_forward, _seam_backward, results=2),
    "mhc_single_pass": Kernels(
        (None, None, 2, 1, 1, 1), _single_forward, _single_backward, results=3, saves=True
    ),
}


def _check_seam(op, x, y, weight, eps, round_aggregate) -> tuple[tuple[int, ...], int, int]:
    lead, n, C = check_streams(op, x)
    check_branch(op, x, y)
    if weight is not None:
        check_array(op, "weight", weight, "C", (C,))
    check_eps(op, eps)
    check_bools(op, round_aggregate=round_aggregate)
    return lead, n, C


@fused_op
def mhc_seam(
    x: mx.array,
    y: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None = None,
    weight: mx.array | None = None,
    eps: float = 1e-5,
    round_aggregate: bool = False,
) -> tuple[mx.array, mx.array]:
    op = "mhc_seam"
    lead, n, _ = _check_seam(op, x, y, weight, eps, round_aggregate)
    check_array(op, "h_pre", h_pre, "n", (n,), lead)
    check_array(op, "h_post", h_post, "n", (n,), lead)
    if h_res is not None:
        check_array(op, "h_res", h_res, "nn", (n, n), lead)
    return (x, y, h_pre, h_post, h_res, weight), (eps, round_aggregate)


@fused_op
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
) -> tuple[mx.array, mx.array, mx.array]:
    op = "mhc_single_pass"
    check_dynamic(op, x, phi, bias, alpha, convention, norm_eps)
    _check_seam(op, x, y, weight, eps, round_aggregate)
    arrays = (x, y, phi, bias, alpha, weight)
    return arrays, (convention, norm_eps, eps, round_aggregate)
