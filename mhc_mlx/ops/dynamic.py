"""Ops whose coefficients each token makes for itself: launches, gradients, public names."""

import functools
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
from .static import projection, sinkhorn_backward, sinkhorn_forward, sum_rows

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
    whole, made = flat(x, 3), {"u": ((*x.shape[:-2], x.shape[-1]), x.dtype)}
    (u,) = _aggregate_launch(
        "stream_aggregate",
        {"x": whole, "h_pre": h_pre},
        lambda groups: made,
        len(whole),
        geometry.MANY_GROUPS,
        threads_per_group,
        verbose,
    )
    return u


def _aggregate_backward(x, h_pre, du, threads_per_group, verbose):
    whole, per_token = flat(x, 3), h_pre.ndim > 1
    dx, sums = _aggregate_launch(
        "stream_aggregate_backward",
        {"x": whole, "h_pre": h_pre, "du": du},
        lambda groups: {
            "dx": (x.shape, x.dtype),
            "dh_pre": (h_pre.shape, mx.float32) if per_token else None,
            "partial": None if per_token else ((groups, x.shape[-2]), mx.float32),
        },
        len(whole),
        geometry.MANY_GROUPS if per_token else None,
        threads_per_group,
        verbose,
    )
    return [dx, (sums if per_token else sum_rows(sums, verbose)).astype(h_pre.dtype)]


# ---- h_res from its logits


def _exact_launch(name, inputs, outputs, n, rows, convention, threads_per_group, verbose, D=None):
    threads = threads_per_group or 128
    template = {"N": n, "NUM_LOGITS": convention.res_size(n), "THREADS": threads}
    template |= {"PERMUTATIONS": convention.start == "permutations"}
    template |= {"TRANSPOSED": convention.transposed} | ({"DLOGITS_T": D} if D else {})
    groups = min(math.ceil(rows / threads), geometry.MANY_GROUPS)
    return kernel.launch(name, inputs, outputs, groups, threads, template, verbose)[0]


def _project(logits, n, convention, *options):
    """h_res [tokens, n, n] of logits [tokens, R]; None where there are none."""
    tokens = logits.shape[0] if logits is not None else 0
    if convention.start in SINKHORN:
        return sinkhorn_forward(logits.reshape(tokens, n, n), convention, *options)
    if convention.start == "unconstrained":
        h_res = mx.eye(n) + logits.reshape(tokens, n, n)
        return h_res.swapaxes(1, 2) if convention.transposed else h_res
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
        dlogits = dh_res.swapaxes(1, 2) if convention.transposed else dh_res
        return dlogits.reshape(tokens, size)
    inputs, made = {"logits": logits, "dh_res": dh_res}, {"dlogits": ((tokens, size), mx.float32)}
    return _exact_launch(
        "mixing_matrix_backward", inputs, made, n, tokens, convention, *options, mx.float32
    )


# ---- coefficients, and what is read with them


def token_params(convention, *rest) -> mx.array:
    c = convention
    return constants(c.pre_eps, c.post_scale, c.post_eps, *rest, c.eps)


def projected(n: int, convention: Convention, head: bool = False) -> bool:
    """Whether `mhc_pre` itself makes h_res of its logits."""
    return not head and n <= 8 and convention.start in SINKHORN


def sweep(x, phi, threads_per_group, verbose) -> tuple[mx.array, int]:
    """The products of the projection by runs of k, and in how many slices `mhc_pre` adds them."""
    (tokens, n, C), outs = x.shape, phi.shape[0]
    room = kernel.room(kernel.backend())
    g = geometry.of_projection(n, C, x.dtype, outs, tokens, threads_per_group, room)
    runs, threads = math.ceil(n * C / 32), threads_per_group or 128
    template = {"T": x.dtype, "PHI_T": phi.dtype, "N": n, "NUM_LOGITS": outs, "BLOCK": g.block}
    (products,) = kernel.launch(
        "mhc_pre_partial_logits",
        {"x": x, "phi": phi},
        {"partial_logits": ((tokens, runs, outs + 4), mx.float32)},
        math.ceil(tokens / 8) * math.ceil(runs / (threads // 32)),
        threads,
        template | {"THREADS": threads},
        verbose,
    )
    return products, g.slices


SEAM_INPUTS = (
    "y",
    "h_pre",
    "h_post",
    "h_res",
    "weight",
    "partial_logits",
    "bias",
    "alpha",
    "params",
)
SEAM_OUTPUTS = ("out", "u", "new_h_pre", "new_h_post", "new_h_res", "logits", "l")
SEAM_FLAGS = (
    "WRITE_BACK",
    "WRITE_U",
    "NORM",
    "ROUND_U",
    "FROM_PARTIAL_LOGITS",
    "HEAD",
    "SAVE_LOGITS",
    "PROJECT",
    "WRITE_H_PRE",
)


def seam_launch(x, inputs, outputs, flags, threads_per_group, verbose) -> list[mx.array]:
    """`mhc_seam` of x [tokens, n, C]; what is not given of inputs, outputs and flags is absent."""
    tokens, n, C = x.shape
    g = geometry.of_seam(n, C, x.dtype.size, threads_per_group, kernel.backend())
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads, "PASSES": g.passes}
    template |= dict.fromkeys(SEAM_FLAGS, False) | {"NUM_LOGITS": 2 * n, "SLICES": 1}
    return kernel.launch(
        "mhc_seam",
        {"x": x} | {k: inputs.get(k) for k in SEAM_INPUTS},
        {k: outputs.get(k) for k in SEAM_OUTPUTS},
        min(tokens, geometry.MANY_GROUPS),
        g.threads,
        template | projection(None) | flags,
        verbose,
    )


def pre_forward(
    x,
    phi,
    bias,
    alpha,
    weight,
    convention,
    norm_eps,
    eps,
    threads_per_group,
    verbose,
    head=False,
    read=True,
    save=False,
):
    """u, h_pre, h_post, h_res, as far as they are asked for, otherwise None, and what is saved."""
    lead, (n, C), outs = x.shape[:-2], x.shape[-2:], phi.shape[0]
    x = flat(x, 3)
    tokens, size = x.shape[0], 0 if head else convention.res_size(n)
    projects = projected(n, convention, head)
    shapes = {
        "u": (*lead, C) if read else None,
        "h_pre": None if read else (*lead, n),
        "h_post": None if head else (*lead, n),
        "h_res": (*lead, n, n) if projects else None,
        "logits": None if projects or not size else (tokens, size),
        "l": (tokens, outs + 1) if save else None,
    }
    outputs = {
        k: None if shape is None else (shape, x.dtype if k == "u" else mx.float32)
        for k, shape in shapes.items()
    }
    flags = {"HEAD": head, "WRITE_U": read, "NORM": weight is not None, "WRITE_H_PRE": not read}
    flags |= {
        "SAVE_LOGITS": save,
        "PROJECT": projects,
        **projection(convention if projects else None),
    }
    params = token_params(convention, norm_eps, eps)
    options = (threads_per_group, verbose)
    backend = kernel.backend()
    room, shape = kernel.room(backend), (n, C, x.dtype, outs, tokens, threads_per_group)
    if geometry.swept(*shape, backend, room):
        runs, slices = sweep(x, phi, *options)
        inputs = {
            "partial_logits": runs,
            "bias": bias,
            "alpha": alpha,
            "weight": weight,
            "params": params,
        }
        made = {f"new_{k}" if k[:2] == "h_" else k: v for k, v in outputs.items()}
        flags |= {"FROM_PARTIAL_LOGITS": True, "NUM_LOGITS": outs, "SLICES": slices}
        results = seam_launch(x, inputs, made, flags, *options)
    else:
        g = geometry.of_projection(*shape, room)
        template = {"T": x.dtype, "PHI_T": phi.dtype, "N": n, "NUM_LOGITS": outs, "VEC": g.vec}
        template |= {"THREADS": g.threads, "SLICES": g.slices, "TILES": g.tiles, "BLOCK": g.block}
        ring = geometry.of_ring(g, n, C, x.dtype, phi.dtype, outs, room)
        team, held = geometry.of_read(g, n, C, backend) if flags["NORM"] else (1, 0)
        template |= {"U_SIMDGROUPS": team, "U_PACKS": held}
        results = kernel.launch(
            "mhc_pre",
            {"x": x, "phi": phi, "bias": bias, "alpha": alpha, "weight": weight, "params": params},
            outputs,
            g.splits * min(math.ceil(tokens / g.tokens), geometry.MANY_GROUPS),
            g.threads,
            template | {"SPLITS": g.splits, "RING_BYTES": ring} | flags,
            verbose,
        )
    made = dict(zip((k for k, v in outputs.items() if v is not None), results, strict=True))
    h_res = made.get("h_res")
    if not projects and not head:
        h_res = _project(made.get("logits"), n, convention, *options)
        h_res = None if h_res is None else unflat(h_res, (*lead, n, n))
    results = [made.get("u"), made.get("h_pre"), made.get("h_post"), h_res]
    return results, ([made["l"]] if save else [])


def _phi_gradient(x, dp, threads_per_group, verbose) -> mx.array:
    """dphi in rows to be added."""
    (tokens, n, C), outs = x.shape, dp.shape[1]
    threads, vec, each, chunks = geometry.of_outer(n * C, C, outs, tokens, threads_per_group)
    spans, blocks = math.ceil(n * C / (threads * vec)), math.ceil(outs / each)
    (partial,) = kernel.launch(
        "mhc_pre_backward_phi",
        {"x": x, "dp": dp},
        {"partial": ((chunks, outs * n * C), mx.float32)},
        chunks * spans * blocks,
        threads,
        {
            "T": x.dtype,
            "N": n,
            "NUM_LOGITS": outs,
            "VEC": vec,
            "THREADS": threads,
            "LOGITS_PER_THREAD": each,
        },
        verbose,
    )
    return partial


@functools.cache
def _parts(n: int, outs: int, count: int) -> mx.array:
    """A row for each part, pre, post and res: which outputs are its own."""
    return mx.array([[min(o // n, 2) == k for o in range(outs)] for k in range(count)])


TOKEN_INPUTS = ("bias", "alpha", "weight", "l", "params", "dz_res", "du", "dh_pre", "dh_post")


def _token_backward(x, arrays, template, columns, threads_per_group, verbose):
    """side, with a norm dread, dp, and in rows to be added the sums over tokens."""
    (tokens, n, C), outs = x.shape, template["NUM_LOGITS"]
    backend, normed = kernel.backend(), template["NORM"]
    g = geometry.of_tokens(n, C, tokens, normed, threads_per_group, backend)
    template = template | {"VEC": g.vec, "THREADS": g.threads, "PASSES": g.passes}
    template |= {"CACHED": g.cached, "BATCH": g.batch}
    template |= {"STORED_STEPS": geometry.of_half_steps(template["ITERS"], g.threads, backend)}
    return kernel.launch(
        "mhc_pre_backward_coefficients",
        {"x": x} | {k: arrays.get(k) for k in (*TOKEN_INPUTS, "dh_res")},
        {
            "token_factors": ((tokens, n + 1), mx.float32),
            "dread": ((tokens, C), x.dtype) if normed else None,
            "dp": ((tokens, outs), mx.float32),
            "partial": ((g.teams, columns), mx.float32),
        },
        g.groups,
        g.threads,
        template,
        verbose,
    )


def _spread(x, shape, arrays, template, columns, threads_per_group, verbose):
    """dx, dp, and in rows to be added the sums over tokens."""
    (tokens, n, C), outs = x.shape, template["NUM_LOGITS"]
    threads, tile, vec, splits = geometry.of_spread(n, C, outs, tokens, threads_per_group)
    groups = min(math.ceil(tokens / tile), max(1, geometry.BACKWARD_THREADS // threads // splits))
    template = template | {"VEC": vec, "THREADS": threads, "TILE": tile, "SPLITS": splits}
    return kernel.launch(
        "mhc_pre_backward_generic",
        {"x": x} | {k: arrays.get(k) for k in ("phi", *TOKEN_INPUTS, "dx_out")},
        {
            "dx": (shape, x.dtype),
            "dp": ((tokens, outs), mx.float32),
            "partial": ((groups, columns), mx.float32),
        },
        groups * splits,
        threads,
        template | {"HAS_DX_OUT": arrays["dx_out"] is not None},
        verbose,
    )


def _products(x, shape, phi, dp, side, du, dx_out, threads_per_group, verbose):
    """dx, and dphi in rows to be added."""
    (tokens, n, C), outs = x.shape, dp.shape[1]
    threads, span, chunks, groups = geometry.of_products(n, C, outs, tokens, threads_per_group)
    size = x.dtype.size * (1 + (du is not None) + (dx_out is not None))
    ring = geometry.of_product_ring(span, threads, size, kernel.room(kernel.backend()))
    template = {"T": x.dtype, "PHI_T": phi.dtype, "N": n, "NUM_LOGITS": outs, "THREADS": threads}
    template |= {"SPAN": span, "STAGE": geometry.PRODUCT_STAGE, "RING_BYTES": ring}
    return kernel.launch(
        "mhc_pre_backward_projection",
        {"x": x, "phi": phi, "dp": dp, "token_factors": side, "du": du, "dx_out": dx_out},
        {"dx": (shape, x.dtype), "partial": ((chunks, outs * n * C), mx.float32)},
        chunks * groups,
        threads,
        template | {"HAS_DU": du is not None, "HAS_DX_OUT": dx_out is not None},
        verbose,
    )


def pre_backward(
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
    saved,
    head=False,
):
    """Gradients of x, phi, bias, alpha, weight from the cotangents of u, h_pre, h_post, h_res and
    of the x that was passed through: None where there is none."""
    shape, (n, C), outs = x.shape, x.shape[-2:], phi.shape[0]
    x, (unit,) = flat(x, 3), saved
    gated = n if head else 2 * n
    du, dh_pre, dh_post, dh_res, dx_out = cotangents
    arrays = {"bias": bias, "alpha": alpha, "weight": weight, "l": unit}
    arrays |= {"params": token_params(convention, norm_eps, eps)}
    arrays |= {"du": du, "dh_pre": dh_pre, "dh_post": dh_post}
    projects, options = projected(n, convention, head), (threads_per_group, verbose)
    multiplied = geometry.multiplied(outs, x.dtype)
    if multiplied and projects:
        arrays["dh_res"] = dh_res
    elif outs > gated:
        logits = alpha[2].astype(mx.float32) * unit[:, gated:outs] + bias[gated:].astype(mx.float32)
        arrays["dz_res"] = _project_backward(logits, flat(dh_res, 3), n, convention, *options)
    columns = 2 * outs + (C if weight is not None else 0)
    template = {"T": x.dtype, "N": n, "NUM_LOGITS": outs, "HEAD": head}
    template |= {"HAS_DU": du is not None, "NORM": weight is not None}
    if multiplied:
        template |= {"PROJECT": projects, **projection(convention if projects else None)}
        side, *read, dp, partial = _token_backward(x, arrays, template, columns, *options)
        dx, products = _products(x, shape, phi, dp, side, (read or [du])[0], dx_out, *options)
    else:
        arrays |= {"phi": phi, "dx_out": dx_out}
        dx, dp, partial = _spread(x, shape, arrays, template, columns, *options)
        products = _phi_gradient(x, dp, *options)
    sums = sum_rows(partial, verbose)
    own = _parts(n, outs, alpha.shape[0])
    dalpha = mx.where(own, sums[outs : 2 * outs], 0.0).sum(1)
    dphi = sum_rows(products, verbose, shape=phi.shape)
    gradients = [dx, dphi, sums[:outs], dalpha]
    gradients += [None if weight is None else sums[2 * outs :]]
    primals = (x, phi, bias, alpha, weight)
    return [
        None if a is None else g.astype(a.dtype) for g, a in zip(gradients, primals, strict=True)
    ]


def _coefficients_forward(x, phi, bias, alpha, convention, norm_eps, *options, **save):
    arrays = (x, phi, bias, alpha, None)
    made, saved = pre_forward(*arrays, convention, norm_eps, 1.0, *options, read=False, **save)
    return (*(a for a in made[1:] if a is not None), *saved)


def _coefficients_backward(
    x, phi, bias, alpha, cotangents, convention, norm_eps, *options, **saved
):
    dh_pre, dh_post, *dh_res = cotangents
    given = (None, dh_pre, dh_post, dh_res[0] if dh_res else None, None)
    arrays = (x, phi, bias, alpha, None)
    return pre_backward(*arrays, given, convention, norm_eps, 1.0, *options, **saved)[:4]


def _mhc_pre_forward(x, *rest, **save):
    (u, _, h_post, h_res), saved = pre_forward(x, *rest, **save)
    return (*(a for a in (u, h_post, h_res, x) if a is not None), *saved)


def _mhc_pre_backward(x, phi, bias, alpha, weight, cotangents, *rest, **saved):
    du, dh_post, *dh_res, dx = cotangents
    given = (du, None, dh_post, dh_res[0] if dh_res else None, dx)
    return pre_backward(x, phi, bias, alpha, weight, given, *rest, **saved)


def _head_forward(x, phi, bias, alpha, convention, norm_eps, *options, **save):
    arrays = (x, phi, bias, alpha, None)
    made, saved = pre_forward(*arrays, convention, norm_eps, 1.0, *options, head=True, **save)
    return (made[0], *saved) if saved else made[0]


def _head_backward(x, phi, bias, alpha, du, convention, norm_eps, *options, **saved):
    given, arrays = (du, None, None, None, None), (x, phi, bias, alpha, None)
    return pre_backward(*arrays, given, convention, norm_eps, 1.0, *options, head=True, **saved)[:4]


def _missing(at):
    """Which result is None: h_res, where there are no logits."""
    return lambda n, convention, *_: None if convention.res_size(n) else at


KERNELS |= {
    "stream_aggregate": Kernels((None, 1), _aggregate_forward, _aggregate_backward),
    "mhc_coefficients": Kernels(
        (None, 2, 1, 1),
        _coefficients_forward,
        _coefficients_backward,
        missing=_missing(2),
        results=3,
        saves=True,
    ),
    "mhc_pre": Kernels(
        (None, 2, 1, 1, 1),
        _mhc_pre_forward,
        _mhc_pre_backward,
        missing=_missing(2),
        results=4,
        saves=True,
    ),
    "mhc_head": Kernels((None, 2, 1, 1), _head_forward, _head_backward, saves=True),
}


def check_dynamic(op, x, phi, bias, alpha, convention, norm_eps, parts=3) -> None:
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
    check_dynamic("mhc_coefficients", x, phi, bias, alpha, convention, norm_eps)
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
    check_dynamic("mhc_pre", x, phi, bias, alpha, convention, norm_eps)
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
    check_dynamic("mhc_head", x, phi, bias, alpha, convention, norm_eps, parts=1)
    return (x, phi, bias, alpha), (convention, norm_eps)
