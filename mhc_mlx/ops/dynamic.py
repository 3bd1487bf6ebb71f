"""Ops whose coefficients each token makes for itself: launches, gradients, public names."""

import math

import mlx.core as mx

from .. import kernel
from ..conventions import PAPER, SINKHORN, Convention
from . import geometry
from .dispatch import (
    KERNELS,
    Kernels,
    check_array,
    check_convention,
    check_eps,
    check_streams,
    constants,
    fail,
    flat,
    fused_op,
    unflat,
)
from .static import sinkhorn_backward, sinkhorn_forward


def _sum(partial: mx.array, verbose: bool) -> mx.array:
    """The sum of the rows, in a fixed order."""
    if partial.shape[0] == 1:
        return partial[0]
    (total,) = kernel.launch(
        "sum_partials",
        {"partial": partial, "H_pre": None, "H_post": None, "params": None},
        {"out": ((partial.shape[1],), mx.float32)},
        math.ceil(partial.shape[1] / 8),
        256,
        {"T": mx.float32, "N": 0, "GATES": False},
        verbose,
    )
    return total


# ---- stream_aggregate


def _aggregate_launch(name, inputs, outputs, tokens, groups, threads_per_group, verbose):
    x, h_pre = inputs["x"], inputs["h_pre"]
    _, n, C = x.shape
    g = geometry.of_token(n, C, x.dtype.size, 1, threads_per_group, kernel.backend())
    per_token = h_pre.ndim > 1
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads, "PER_TOKEN": per_token}
    groups = min(tokens, groups or max(1, geometry.BACKWARD_THREADS // g.threads))
    made = outputs(groups)
    return kernel.launch(name, inputs, made, groups, g.threads, template, verbose)


def _aggregate_forward(x, h_pre, threads_per_group, verbose):
    tokens, n, C = (whole := flat(x, 3)).shape
    inputs = {"x": whole, "h_pre": flat(h_pre, 2) if h_pre.ndim > 1 else h_pre}
    made = {"u": ((tokens, C), x.dtype)}
    (u,) = _aggregate_launch(
        "stream_aggregate",
        inputs,
        lambda groups: made,
        tokens,
        geometry.MANY_GROUPS,
        threads_per_group,
        verbose,
    )
    return unflat(u, (*x.shape[:-2], C))


def _aggregate_backward(x, h_pre, du, threads_per_group, verbose):
    tokens, n, C = (whole := flat(x, 3)).shape
    per_token = h_pre.ndim > 1
    inputs = {"x": whole, "h_pre": flat(h_pre, 2) if per_token else h_pre, "du": flat(du, 2)}
    dx, sums = _aggregate_launch(
        "stream_aggregate_backward",
        inputs,
        lambda groups: {
            "dx": (whole.shape, x.dtype),
            "dh_pre": ((tokens, n), mx.float32) if per_token else None,
            "partial": None if per_token else ((groups, n), mx.float32),
        },
        tokens,
        geometry.MANY_GROUPS if per_token else None,
        threads_per_group,
        verbose,
    )
    dh_pre = sums if per_token else _sum(sums, verbose)
    return [unflat(dx, x.shape), unflat(dh_pre, h_pre.shape).astype(h_pre.dtype)]


# ---- h_res from its logits


def _exact_launch(name, inputs, outputs, n, rows, convention, threads_per_group, verbose, D=None):
    threads = threads_per_group or 128
    template = {"N": n, "R": convention.res_size(n), "THREADS": threads}
    template |= {"PERMUTATIONS": convention.start == "permutations"} | ({"D": D} if D else {})
    groups = min(math.ceil(rows / threads), geometry.MANY_GROUPS)
    return kernel.launch(name, inputs, outputs, groups, threads, template, verbose)[0]


def _project(logits, n, convention, *options):
    """h_res [tokens, n, n] of logits [tokens, R]; None where there are none."""
    tokens = logits.shape[0] if logits is not None else 0
    if convention.start in SINKHORN:
        return sinkhorn_forward(logits.reshape(tokens, n, n), convention, *options)
    if convention.start == "unconstrained":
        return mx.eye(n) + logits.reshape(tokens, n, n)
    if logits is None:
        return None
    made = {"h_res": ((tokens, n, n), mx.float32)}
    return _exact_launch(
        "mixing_matrix", {"logits": logits}, made, n, tokens * n, convention, *options
    )


def _project_backward(logits, dh_res, n, convention, *options):
    """dlogits [tokens, R] of logits [tokens, R] and dh_res [tokens, n, n]."""
    if logits is None:
        return None
    tokens, size = logits.shape
    if convention.start in SINKHORN:
        logits = logits.reshape(tokens, n, n)
        return sinkhorn_backward(logits, dh_res, convention, *options)[0].reshape(tokens, size)
    if convention.start == "unconstrained":
        return dh_res.reshape(tokens, size)
    inputs, made = {"logits": logits, "dh_res": dh_res}, {"dlogits": ((tokens, size), mx.float32)}
    return _exact_launch(
        "mixing_matrix_backward", inputs, made, n, tokens, convention, *options, mx.float32
    )


# ---- coefficients, and what is read with them


def _pre_launch(arrays, outputs, template, convention, norm_eps, eps, threads_per_group, verbose):
    """`mhc_pre.metal`; the outputs by name."""
    x, phi = arrays["x"], arrays["phi"]
    tokens, n, C = x.shape
    threads, tile, each = geometry.of_projection(n, phi.shape[0], tokens, threads_per_group)
    template |= {"T": x.dtype, "N": n, "OUTS": phi.shape[0], "VEC": math.gcd(C, 4)}
    template |= {"THREADS": threads, "TILE": tile, "EACH": each}
    c = convention
    params = constants(c.pre_eps, c.post_scale, c.post_eps, norm_eps, eps)
    results = kernel.launch(
        "mhc_pre",
        arrays | {"params": params},
        outputs,
        min(math.ceil(tokens / tile), geometry.MANY_GROUPS),
        threads,
        template,
        verbose,
    )
    return dict(zip((k for k, v in outputs.items() if v is not None), results, strict=True))


def _pre_forward(
    x, phi, bias, alpha, weight, convention, norm_eps, eps, threads, verbose, head=False, read=True
):
    """u, h_pre, h_post, h_res, as far as they are asked for: None otherwise."""
    lead, (n, C) = x.shape[:-2], x.shape[-2:]
    x = flat(x, 3)
    tokens, size = x.shape[0], 0 if head else convention.res_size(n)
    floats = {"h_pre": (not read, n), "h_post": (not head, n), "logits": (size > 0, size)}
    outputs = {k: ((tokens, w), mx.float32) if here else None for k, (here, w) in floats.items()}
    outputs |= {"u": ((tokens, C), x.dtype) if read else None}
    outputs |= dict.fromkeys(("l", "dz", "rows"))
    arrays = {"x": x, "phi": phi, "bias": bias, "alpha": alpha, "weight": weight}
    arrays |= dict.fromkeys(("du", "dh_pre", "dh_post"))
    flags = {"HEAD": head, "READ": read, "NORM": weight is not None}
    flags |= {"BACKWARD": False, "WRITE_PRE": not read}
    made = _pre_launch(arrays, outputs, flags, convention, norm_eps, eps, threads, verbose)
    h_res = None if head else _project(made.get("logits"), n, convention, threads, verbose)
    results = [made.get("u"), made.get("h_pre"), made.get("h_post"), h_res]
    return [None if a is None else unflat(a, (*lead, *a.shape[1:])) for a in results]


def _pre_backward(
    x,
    phi,
    bias,
    alpha,
    weight,
    cotangents,
    convention,
    norm_eps,
    eps,
    threads_per_group,
    verbose,
    head=False,
):
    """Gradients of x, phi, bias, alpha, weight from the cotangents of u, h_pre, h_post, h_res and
    of the x that was passed through: None where there is none."""
    shape, (n, C), outs = x.shape, x.shape[-2:], phi.shape[0]
    x = flat(x, 3)
    tokens, size = x.shape[0], 0 if head else convention.res_size(n)
    ndims = (2, 2, 2, 3, 3)
    du, dh_pre, dh_post, dh_res, dx_out = (
        None if a is None else flat(a, ndim) for a, ndim in zip(cotangents, ndims, strict=True)
    )
    read, gated = du is not None, n if head else 2 * n
    floats = {"h_pre": n, "logits": size, "l": outs, "dz": gated, "rows": 3}
    outputs = {k: ((tokens, w), mx.float32) if w else None for k, w in floats.items()}
    outputs |= dict.fromkeys(("h_post", "u"))
    arrays = {"x": x, "phi": phi, "bias": bias, "alpha": alpha, "weight": weight}
    given = arrays | {"du": du, "dh_pre": dh_pre, "dh_post": dh_post}
    flags = {"HEAD": head, "READ": read, "NORM": weight is not None}
    made = _pre_launch(
        given,
        outputs,
        flags | {"BACKWARD": True, "WRITE_PRE": True},
        convention,
        norm_eps,
        eps,
        threads_per_group,
        verbose,
    )
    options = (threads_per_group, verbose)
    dz_res = _project_backward(made.pop("logits", None), dh_res, n, convention, *options)

    threads, tile, vec = geometry.of_spread(n, C, outs, tokens, threads_per_group)
    groups = min(math.ceil(tokens / tile), max(1, geometry.BACKWARD_THREADS // threads))
    columns = 2 * outs + (C if weight is not None else 0)
    template = {"T": x.dtype, "N": n, "OUTS": outs, "VEC": vec, "THREADS": threads, "TILE": tile}
    dx, dp, partial = kernel.launch(
        "mhc_pre_backward",
        {k: v for k, v in arrays.items() if k != "bias"}
        | made
        | {"dz_res": dz_res, "du": du, "dx_out": dx_out},
        {
            "dx": (x.shape, x.dtype),
            "dp": ((tokens, outs), mx.float32),
            "partial": ((groups, columns), mx.float32),
        },
        groups,
        threads,
        template | flags | {"PASS": dx_out is not None},
        verbose,
    )
    sums = _sum(partial, verbose)
    parts = [sums[outs : outs + n], sums[outs + n : outs + 2 * n], sums[outs + 2 * n : 2 * outs]]
    dalpha = mx.stack([part.sum() for part in parts[: alpha.shape[0]]])

    threads, vec, each, chunks = geometry.of_outer(n * C, C, outs, tokens, threads_per_group)
    spans, blocks = math.ceil(n * C / (threads * vec)), math.ceil(outs / each)
    (partial,) = kernel.launch(
        "mhc_phi_gradient",
        {"x": x, "dp": dp},
        {"partial": ((chunks, outs * n * C), mx.float32)},
        chunks * spans * blocks,
        threads,
        {"T": x.dtype, "N": n, "OUTS": outs, "VEC": vec, "THREADS": threads, "EACH": each},
        verbose,
    )
    gradients = [unflat(dx, shape), _sum(partial, verbose).reshape(phi.shape), sums[:outs], dalpha]
    gradients += [None if weight is None else sums[2 * outs :]]
    primals = (x, phi, bias, alpha, weight)
    return [
        None if a is None else g.astype(a.dtype) for g, a in zip(gradients, primals, strict=True)
    ]


def _coefficients_forward(x, phi, bias, alpha, convention, norm_eps, threads, verbose):
    arrays = (x, phi, bias, alpha, None)
    _, *made = _pre_forward(*arrays, convention, norm_eps, 1.0, threads, verbose, read=False)
    return tuple(a for a in made if a is not None)


def _coefficients_backward(x, phi, bias, alpha, cotangents, convention, norm_eps, *options):
    dh_pre, dh_post, *dh_res = cotangents
    given = (None, dh_pre, dh_post, dh_res[0] if dh_res else None, None)
    return _pre_backward(x, phi, bias, alpha, None, given, convention, norm_eps, 1.0, *options)[:4]


def _mhc_pre_forward(x, *rest):
    u, _, h_post, h_res = _pre_forward(x, *rest)
    return tuple(a for a in (u, h_post, h_res, x) if a is not None)


def _mhc_pre_backward(x, phi, bias, alpha, weight, cotangents, *rest):
    du, dh_post, *dh_res, dx = cotangents
    given = (du, None, dh_post, dh_res[0] if dh_res else None, dx)
    return _pre_backward(x, phi, bias, alpha, weight, given, *rest)


def _head_forward(x, phi, bias, alpha, convention, norm_eps, *options):
    arrays = (x, phi, bias, alpha, None)
    return _pre_forward(*arrays, convention, norm_eps, 1.0, *options, head=True)[0]


def _head_backward(x, phi, bias, alpha, du, convention, norm_eps, *options):
    given = (du, None, None, None, None)
    return _pre_backward(
        x, phi, bias, alpha, None, given, convention, norm_eps, 1.0, *options, head=True
    )[:4]


def _missing(at):
    """Which result is None: h_res, where there are no logits."""
    return lambda n, convention, *_: None if convention.res_size(n) else at


KERNELS |= {
    "stream_aggregate": Kernels((None, 1), _aggregate_forward, _aggregate_backward),
    "mhc_coefficients": Kernels(
        (None, 2, 1, 1), _coefficients_forward, _coefficients_backward, missing=_missing(2)
    ),
    "mhc_pre": Kernels(
        (None, 2, 1, 1, 1), _mhc_pre_forward, _mhc_pre_backward, missing=_missing(2)
    ),
    "mhc_head": Kernels((None, 2, 1, 1), _head_forward, _head_backward),
}


def _check_dynamic(op, x, phi, bias, alpha, convention, norm_eps, parts=3) -> None:
    _, n, C = check_streams(op, x)
    check_convention(op, convention)
    if not convention.sigmoid:
        raise ValueError(fail(op, "convention", "have gates of logits", convention.name))
    outs = n
    if parts == 3:
        convention.check_streams(op, n)
        outs = 2 * n + convention.res_size(n)
    axes = "n" if parts == 1 else "(2n+R)"
    check_array(op, "phi", phi, (axes, "(n*C)"), (outs, n * C))
    check_array(op, "bias", bias, (axes,), (outs,))
    check_array(op, "alpha", alpha, ("parts",), (parts,))
    check_eps(op, norm_eps, "norm_eps")


@fused_op
def stream_aggregate(x: mx.array, h_pre: mx.array) -> mx.array:
    lead, n, _ = check_streams("stream_aggregate", x)
    check_array("stream_aggregate", "h_pre", h_pre, "n", (n,), lead)
    return (x, h_pre), ()


@fused_op
def mhc_coefficients(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array | None]:
    _check_dynamic("mhc_coefficients", x, phi, bias, alpha, convention, norm_eps)
    return (x, phi, bias, alpha), (convention, norm_eps)


@fused_op
def mhc_pre(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    weight: mx.array | None = None,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
    eps: float = 1e-5,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    _check_dynamic("mhc_pre", x, phi, bias, alpha, convention, norm_eps)
    if weight is not None:
        check_array("mhc_pre", "weight", weight, "C", (x.shape[-1],))
    check_eps("mhc_pre", eps)
    return (x, phi, bias, alpha, weight), (convention, norm_eps, eps)


@fused_op
def mhc_head(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
) -> mx.array:
    _check_dynamic("mhc_head", x, phi, bias, alpha, convention, norm_eps, parts=1)
    return (x, phi, bias, alpha), (convention, norm_eps)
