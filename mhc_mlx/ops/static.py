"""Ops whose coefficients are shared or ready: launches, gradients, public names."""

import math

import mlx.core as mx

from .. import kernel
from ..conventions import ROW_FIRST, START_CODES, Convention
from . import geometry
from .dispatch import (
    KERNELS,
    MAX_STREAMS,
    Kernels,
    check_array,
    check_branch,
    check_dtype,
    check_eps,
    check_half_steps,
    check_streams,
    constants,
    fail,
    flat,
    fused_op,
    identity,
    unflat,
)


def check_layer(op: str, x: mx.array, eps: float, **arrays: mx.array) -> None:
    """x, eps, coefficients shared by all tokens, and the weight."""
    _, n, C = check_streams(op, x)
    check_eps(op, eps)
    shapes = {"pre": ("n", (n,)), "post": ("n", (n,)), "res": ("nn", (n, n)), "weight": ("C", (C,))}
    for name, a in arrays.items():
        check_array(op, name, a, *shapes[name.split("_")[-1]])


def projection(convention: Convention | None) -> dict[str, int | bool]:
    """Template arguments of a projection; a lane holds a line of the first half-step's axis."""
    c = convention or ROW_FIRST
    columns = c.first == "columns"
    orientation = {"COLUMNS": columns, "OUT_COLUMNS": columns != c.transposed}
    start = "exp" if c.in_logs else c.start
    return {"ITERS": c.iters, "START": START_CODES[start], **orientation}


def _params(eps: float, convention: Convention | None) -> mx.array:
    c = convention or ROW_FIRST
    return constants(eps, c.pre_eps, c.post_scale, c.post_eps, c.eps)


def _sinkhorn_launch(name, inputs, dtype, convention, threads_per_group, verbose, backward):
    """A lane per line of a matrix, a power of two of lanes; as many matrices as a group holds."""
    logits = inputs["logits"]
    n = logits.shape[-1]
    whole = {k: flat(a, 3) for k, a in inputs.items()}
    count, lanes = whole["logits"].shape[0], 1 << (n - 1).bit_length()
    threads = max(threads_per_group or 128, lanes) // lanes * lanes  # whole matrices
    template = {"N": n, **projection(convention), "THREADS": threads}
    if backward:  # the divisors kept on chip, of 32 KiB threadgroup memory
        kept = (30 << 10) // (4 * threads) - (2 if n > 32 else 0)
        template |= {"STORED_STEPS": min(2 * convention.iters, kept), "DLOGITS_T": dtype}
    (result,) = kernel.launch(
        name,
        whole | {"eps": constants(convention.eps)},
        {"dlogits" if backward else "h_res": (whole["logits"].shape, dtype)},
        min(math.ceil(count / (threads // lanes)), geometry.MANY_GROUPS),
        threads,
        template,
        verbose,
    )
    return unflat(result, logits.shape)


def sinkhorn_forward(logits, *options):
    return _sinkhorn_launch("sinkhorn_knopp", {"logits": logits}, mx.float32, *options, False)


def sinkhorn_backward(logits, dh_res, *options):
    inputs = {"logits": logits, "dh_res": dh_res}
    return [_sinkhorn_launch("sinkhorn_knopp_backward", inputs, logits.dtype, *options, True)]


def sum_rows(
    partial: mx.array, verbose: bool, n: int = 0, shape: tuple[int, ...] = (), **gates
) -> mx.array:
    """The sum of the rows, in a fixed order, as an array of that shape; of gates' gradients those
    of their n logits."""
    shape = shape or partial.shape[1:]
    if partial.shape[0] == 1 and not gates:
        return partial.reshape(shape)
    lines = geometry.of_sum(*partial.shape)
    (total,) = kernel.launch(
        "sum_partials",
        {"partial": partial} | {k: gates.get(k) for k in ("H_pre", "H_post", "params")},
        {"out": (shape, mx.float32)},
        math.ceil(partial.shape[1] * lines / 256),
        256,
        {
            "T": mx.float32,
            "N": n if gates else 0,
            "GATES": bool(gates),
            "THREADS_PER_COLUMN": lines,
        },
        verbose,
    )
    return total


def _layer_forward(
    x, H_pre, H_post, H_res, weight, eps, threads_per_group, verbose, convention=None, mix=True
):
    """mhc_static; with a convention mhc_layer; without mix stream_aggregate_norm."""
    shape = x.shape if mix else (*x.shape[:-2], x.shape[-1])
    x = flat(x, 3)
    tokens, n, C = x.shape
    g = geometry.of_token(n, C, x.dtype.size, 1, threads_per_group, kernel.backend())
    sinkhorn = convention is not None and n <= 8 and tokens <= geometry.ONE_LAUNCH_TOKENS
    if convention is not None and not sinkhorn:
        H_res = sinkhorn_forward(H_res, convention, threads_per_group, verbose)
    arrays = {"x": x, "H_pre": H_pre, "H_post": H_post, "H_res": H_res, "weight": weight}
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads, "PASSES": g.passes}
    template |= {"CACHED": g.fits, "MIX": mix, "SINKHORN": sinkhorn}
    template |= {"GATES": convention is not None and convention.sigmoid, **projection(convention)}
    (out,) = kernel.launch(
        "mhc_fused",
        arrays | {"params": _params(eps, convention)},
        {"out": (shape, x.dtype)},
        geometry.even(tokens, geometry.FORWARD_GROUPS),
        g.threads,
        template,
        verbose,
    )
    return out


def _layer_backward(
    x, H_pre, H_post, H_res, weight, dout, eps, threads, verbose, convention=None, mix=True
):
    """Gradients of x, H_pre, H_post, H_res, weight."""
    n, logits = x.shape[-2], H_res
    if convention is not None and n > 8:
        H_res = sinkhorn_forward(logits, convention, threads, verbose)
    dx, _, *rest = _backward(
        x, None, H_pre, H_post, H_res, weight, dout, eps, threads, verbose, convention, mix
    )
    if convention is not None:
        rest[2] = sinkhorn_backward(logits, rest[2], convention, threads, verbose)[0]
    primals = (H_pre, H_post, logits, weight)
    rest = [g if a is None else g.astype(a.dtype) for g, a in zip(rest, primals, strict=True)]
    return [dx, *rest]


def mix_add_forward(x, y, h_post, h_res, threads_per_group, verbose):
    shape, x = x.shape, flat(x, 3)
    tokens, n, C = x.shape
    g = geometry.of_token(n, C, x.dtype.size, 1, threads_per_group, kernel.backend())
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads}
    template |= {"POST_PER_TOKEN": h_post.ndim > 1, "RES_PER_TOKEN": h_res.ndim > 2}
    (out,) = kernel.launch(
        "stream_mix_add",
        {"x": x, "y": y, "h_post": h_post, "h_res": h_res},
        {"out": (shape, x.dtype)},
        min(tokens, geometry.MANY_GROUPS),
        g.threads,
        template,
        verbose,
    )
    return out


def mix_add_backward(x, y, h_post, h_res, dout, threads_per_group, verbose):
    """Gradients of x, y, h_post, h_res."""
    dx, dy, _, dh_post, dh_res, _ = _backward(
        x, y, None, h_post, h_res, None, dout, 1.0, threads_per_group, verbose, None, True
    )
    return [dx, dy, dh_post.astype(h_post.dtype), dh_res.astype(h_res.dtype)]


def _backward(
    x, y, H_pre, H_post, H_res, weight, dout, eps, threads_per_group, verbose, convention, mix
):
    """dx and dy in x's dtype, and dH_pre, dH_post, dh_res, dweight in float32, None where absent.

    y is given for stream_mix_add, weight for the layers; a convention means gates, and for n <= 8
    also that H_res is still to be projected: dh_res is the gradient of the projected matrix.
    """
    shape, x = x.shape, flat(x, 3)
    tokens, n, C = x.shape
    norm, gates = y is None, convention is not None and convention.sigmoid
    post_per_token, res_per_token = mix and H_post.ndim > 1, mix and H_res.ndim > 2
    sinkhorn = convention is not None and n <= 8
    g = geometry.of_token(n, C, x.dtype.size, 2, threads_per_group, kernel.backend())
    name, threads = (
        ("mhc_fused_backward", g.threads) if n <= 8 else ("mhc_fused_backward_wide", 256)
    )
    threads = threads_per_group or threads
    sums = [n * norm, n * (mix and not post_per_token), n * n * (mix and not res_per_token)]
    sums.append(C * norm)
    groups = min(
        tokens, max(1, geometry.BACKWARD_THREADS // threads) if any(sums) else geometry.MANY_GROUPS
    )
    params = _params(eps, convention) if norm else None
    template = {"T": x.dtype, "N": n, "THREADS": threads, "MIX": mix, "NORM": norm, "GATES": gates}
    template |= {"POST_PER_TOKEN": post_per_token, "RES_PER_TOKEN": res_per_token}
    if n <= 8:
        template |= {"VEC": g.vec, "PASSES": g.passes, "CACHED": g.fits, "SINKHORN": sinkhorn}
        template |= projection(convention)
    inputs = {"x": x, "y": y, "dout": dout}
    inputs |= {"H_pre": H_pre, "H_post": H_post, "H_res": H_res, "weight": weight, "params": params}
    outputs = {
        "dx": (shape, x.dtype),
        "dy": None if norm else (y.shape, x.dtype),
        "partial": ((groups, sum(sums)), mx.float32) if any(sums) else None,
        "dh_post": (H_post.shape, mx.float32) if post_per_token else None,
        "dh_res": (H_res.shape, mx.float32) if res_per_token else None,
    }
    results = kernel.launch(name, inputs, outputs, groups, threads, template, verbose)
    made = dict(zip((k for k, v in outputs.items() if v is not None), results, strict=True))
    if any(sums):
        given = {k: inputs[k] for k in ("H_pre", "H_post", "params")} if gates else {}
        total = sum_rows(made["partial"], verbose, n, **given)
        ends = [sum(sums[: i + 1]) for i in range(4)]
        parts = zip(("H_pre", "dh_post", "dh_res", "weight"), sums, ends, strict=True)
        made |= {k: total[end - size : end] for k, size, end in parts if size}
    dh_res = unflat(made["dh_res"], H_res.shape) if mix else None
    rest = made.get("H_pre"), made.get("dh_post"), dh_res, made.get("weight")
    return [made["dx"], made.get("dy"), *rest]


def _reading(forward_or_backward):
    """`_layer_forward` or `_layer_backward` with only what stream_aggregate_norm has."""

    def read(x, h_pre, weight, *rest):
        result = forward_or_backward(x, h_pre, None, None, weight, *rest, mix=False)
        return [result[i] for i in (0, 1, 4)] if isinstance(result, list) else result

    return read


KERNELS |= {
    "sinkhorn_knopp": Kernels((None,), sinkhorn_forward, sinkhorn_backward),
    "stream_aggregate_norm": Kernels(
        (None, 1, 1), _reading(_layer_forward), _reading(_layer_backward)
    ),
    "stream_mix_add": Kernels(
        (None, None, 1, 2), mix_add_forward, mix_add_backward, absent=identity
    ),
    "mhc_static": Kernels((None, 1, 1, 2, 1), _layer_forward, _layer_backward, absent=identity),
    "mhc_layer": Kernels(
        (None, 1, 1, 2, 1),
        lambda *a: _layer_forward(*a[:5], *a[6:], convention=a[5]),
        lambda *a: _layer_backward(*a[:6], *a[7:], convention=a[6]),
    ),
}


@fused_op
def sinkhorn_knopp(logits: mx.array, convention: Convention = ROW_FIRST) -> mx.array:
    op = "sinkhorn_knopp"
    check_dtype(op, logits=logits)
    n = logits.shape[-1] if logits.ndim else 0
    if logits.shape[-2:] != (n, n) or not 1 <= n <= MAX_STREAMS:
        must = f"have shape [..., n, n] with n from 1 to {MAX_STREAMS}"
        raise ValueError(fail(op, "logits", must, list(logits.shape)))
    check_half_steps(op, convention)
    return (logits,), (convention,)


@fused_op
def stream_aggregate_norm(
    x: mx.array, h_pre: mx.array, weight: mx.array, eps: float = 1e-5
) -> mx.array:
    check_layer("stream_aggregate_norm", x, eps, h_pre=h_pre, weight=weight)
    return (x, h_pre, weight), (eps,)


@fused_op
def stream_mix_add(
    x: mx.array, y: mx.array, h_post: mx.array, h_res: mx.array | None = None
) -> mx.array:
    op = "stream_mix_add"
    lead, n, _ = check_streams(op, x)
    check_branch(op, x, y)
    check_array(op, "h_post", h_post, "n", (n,), lead)
    if h_res is not None:
        check_array(op, "h_res", h_res, "nn", (n, n), lead)
    return (x, y, h_post, h_res), ()


@fused_op
def mhc_static(
    x: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None,
    weight: mx.array,
    eps: float = 1e-5,
) -> mx.array:
    mixing = {} if h_res is None else {"h_res": h_res}
    check_layer("mhc_static", x, eps, h_pre=h_pre, h_post=h_post, **mixing, weight=weight)
    return (x, h_pre, h_post, h_res, weight), (eps,)


@fused_op
def mhc_layer(
    x: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    H_res: mx.array,
    weight: mx.array,
    convention: Convention = ROW_FIRST,
    eps: float = 1e-5,
) -> mx.array:
    check_layer("mhc_layer", x, eps, H_pre=H_pre, H_post=H_post, H_res=H_res, weight=weight)
    check_half_steps("mhc_layer", convention)
    return (x, H_pre, H_post, H_res, weight), (convention, eps)
