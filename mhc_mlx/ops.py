"""The fused ops: launch geometry, forward, gradient, and one dispatch for all.

Every op takes the positional arguments of its namesake in `reference` and four keywords:

    use_metal: Run the kernels where the default device has them (Metal or CUDA); otherwise, and on
        a CPU, the reference.
    threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
    verbose: Print the generated kernel source (without a GPU: the Metal source).
    differentiable: False calls the kernel bare, which `mx.export_function` can record; it then has
        no gradient.
"""

import functools
import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import mlx.core as mx

from . import kernel, reference
from .conventions import ROW_FIRST, STARTS, Convention

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MAX_STREAMS = 64
# Measured on an H100 (benchmarks/). Copies of a token: 1 is x, 2 is x and dout. A thread of an
# Apple GPU has 128 registers, hence the smaller limit there.
REGISTER_BYTES = {("metal", 1): 256, ("cuda", 1): 256, ("metal", 2): 256, ("cuda", 2): 512}
FORWARD_GROUPS = 4096  # fills any GPU; fewer threadgroups than tokens share coefficients
MANY_GROUPS = 1 << 16  # where a threadgroup fetches next to nothing before its first token
BACKWARD_THREADS = 132 * 512  # what an H100 holds at 128 registers; a group leaves a row of sums
ONE_LAUNCH_TOKENS = 1024  # up to here every threadgroup of `mhc_layer` projects H_res itself


def _fail(op: str, argument: str, must: str, got) -> str:
    return f"[{op}] {argument} must {must} but got {got}."


def _check_dtype(op: str, **arrays: mx.array) -> None:
    for name, a in arrays.items():
        if not isinstance(a, mx.array):
            raise TypeError(_fail(op, name, "be an mx.array", type(a).__name__))
        if a.dtype not in FLOATS:
            raise TypeError(_fail(op, name, "be float32, float16 or bfloat16", a.dtype))


def _check_array(op: str, name: str, a: mx.array, axes: str, sizes: tuple[int, ...], *lead) -> None:
    """Check dtype and shape: ``sizes``, also behind leading axes if such are given."""
    _check_dtype(op, **{name: a})
    if tuple(a.shape) not in (sizes, *((*axis, *sizes) for axis in lead)):
        own = [f"{letter}={size}" for letter, size in zip(axes, sizes, strict=True)]
        shapes = [[*map(str, axis), *own] for axis in ((), *lead)]
        must = " or ".join(f"[{', '.join(s)}]" for s in shapes)
        raise ValueError(_fail(op, name, f"have shape {must}", list(a.shape)))


def _check_streams(op: str, x: mx.array) -> tuple[tuple[int, ...], int, int]:
    """Leading axes, n and C of x."""
    _check_dtype(op, x=x)
    if x.ndim < 2:
        raise ValueError(_fail(op, "x", "have shape [..., n, C]", list(x.shape)))
    *lead, n, C = x.shape
    if not 1 <= n <= MAX_STREAMS or C < 1:
        must = f"have shape [..., n, C] with n from 1 to {MAX_STREAMS} and C at least 1"
        raise ValueError(_fail(op, "x", must, list(x.shape)))
    return tuple(lead), n, C


def _check_layer(op: str, x: mx.array, eps: float, **arrays: mx.array) -> None:
    """x, eps, coefficients shared by all tokens, and the weight."""
    _, n, C = _check_streams(op, x)
    _check_eps(op, eps)
    shapes = {"pre": ("n", (n,)), "post": ("n", (n,)), "res": ("nn", (n, n)), "weight": ("C", (C,))}
    for name, a in arrays.items():
        _check_array(op, name, a, *shapes[name.split("_")[-1]])


def _check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(_fail(op, "eps", "be a number", type(eps).__name__))
    if not 0 < eps < math.inf:
        raise ValueError(_fail(op, "eps", "be finite and above 0", eps))


def _check_convention(op: str, convention: Convention) -> None:
    if not isinstance(convention, Convention):
        raise TypeError(_fail(op, "convention", "be a Convention", type(convention).__name__))


def _check_threads(op: str, threads: int | None) -> None:
    name = "threads_per_group"
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(_fail(op, name, "be None or an int", type(threads).__name__))
    if threads % 32 or not 32 <= threads <= 1024:
        raise ValueError(_fail(op, name, "be a multiple of 32 from 32 to 1024", threads))


_mapping: ContextVar[bool] = ContextVar("mapping", default=False)  # whether `vmap` traces


class _Fused(NamedTuple):
    forward: Callable  # the kernels bare
    op: Callable  # differentiable


def _fuse(plain: Callable, forward: Callable, backward: Callable, shared_ndim: tuple) -> _Fused:
    """Tie kernels to the function of arrays that they compute.

    Args:
        plain: By the reference.
        forward: By kernels.
        backward: Of the arrays and the cotangent; a gradient per array, in its dtype.
        shared_ndim: Per array, with how many axes it is shared by all tokens; None if it never is.
    """

    def plain_gradient(*inputs):
        return tuple(mx.vjp(plain, list(inputs[:-1]), [inputs[-1]])[1])

    def several(arrays):
        return arrays if isinstance(arrays, (tuple, list)) else (arrays,)

    def fold(inputs, axes, of_gradient):
        """The inputs with the mapped axis as one more axis of tokens; None where it is not one,
        because an array per token is not mapped, a shared one is, or a gradient sums over tokens.
        """
        for a, axis, ndim in zip(inputs, axes, (*shared_ndim, None)[: len(inputs)], strict=True):
            per_token = ndim is None or a.ndim - (axis is not None) > ndim
            if per_token != (axis is not None) or (of_gradient and not per_token):
                return None
        return [a if i is None else mx.moveaxis(a, i, 0) for a, i in zip(inputs, axes, strict=True)]

    @mx.custom_function
    def op(*primals):
        return (plain if _mapping.get() else forward)(*primals)

    @mx.custom_function
    def gradient(*inputs):
        return plain_gradient(*inputs) if _mapping.get() else tuple(backward(*inputs))

    @op.vjp
    def _(primals, cotangent, _):
        return gradient(*several(primals), cotangent)

    @gradient.vjp
    def _(inputs, cotangents, _):
        return tuple(mx.vjp(plain_gradient, list(inputs), list(several(cotangents)))[1])

    @op.vmap
    def _(inputs, axes):
        inputs, axes = several(inputs), several(axes)
        folded = fold(inputs, axes, of_gradient=False)
        return (op(*folded) if folded else mx.vmap(plain, in_axes=tuple(axes))(*inputs)), 0

    @gradient.vmap
    def _(inputs, axes):
        folded = fold(inputs, axes, of_gradient=True)
        mapped = mx.vmap(plain_gradient, in_axes=tuple(axes))
        results = gradient(*folded) if folded else mapped(*inputs)
        return tuple(results), (0,) * len(results)

    return _Fused(forward, op)


def vmap(f: Callable, in_axes=0, out_axes=0) -> Callable:
    """`mx.vmap` for functions that call these ops on a GPU.

    MLX 0.32 maps what a custom_function computes even where it has a rule of its own, and cannot
    map a custom kernel. So this traces f with the reference, which the ops' rules then replace by
    kernels over one more axis of tokens where that is the same, and leave where it is not.
    """

    def traced(*args):
        token = _mapping.set(True)
        try:
            return f(*args)
        finally:
            _mapping.reset(token)

    return mx.vmap(traced, in_axes, out_axes)


@functools.cache
def _fused(name: str, present: tuple[bool, ...], statics: tuple, options: tuple) -> _Fused:
    """The kernels of `reference.<name>`; an h_res that is not present is the identity."""
    shared_ndim, forward, backward = _KERNELS[name]

    def whole(arrays, absent=None):
        rest = iter(arrays)
        return [next(rest) if here else absent for here in present]

    def some(values):
        return [v for v, here in zip(values, present, strict=True) if here]

    return _fuse(
        lambda *a: getattr(reference, name)(*whole(a), *statics),
        lambda *a: forward(*whole(a, _identity(a[0].shape[-2])), *statics, *options),
        lambda *a: some(
            backward(*whole(a[:-1], _identity(a[0].shape[-2])), a[-1], *statics, *options)
        ),
        tuple(some(shared_ndim)),
    )


@functools.cache
def _constants(*values: float) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def _identity(n: int) -> mx.array:
    return mx.eye(n)


def _flat(a: mx.array, ndim: int) -> mx.array:  # all leading axes as one
    return a if a.ndim == ndim else a.reshape(-1, *a.shape[a.ndim - ndim + 1 :])


def _unflat(a: mx.array, shape: tuple[int, ...]) -> mx.array:
    return a if a.shape == shape else a.reshape(shape)


class _Geometry(NamedTuple):
    vec: int
    threads: int
    passes: int
    fits: bool


@functools.cache
def _geometry(
    n: int, C: int, size: int, copies: int, threads_per_group: int | None, backend: str
) -> _Geometry:
    """How a threadgroup takes a token of n x C elements of ``size`` bytes.

    vec: Neighbours per load: up to 16 bytes, dividing C, few enough for the sums of n streams.
    threads: One per vec, a multiple of 32, at most 256 (128 where sums fill the registers).
    passes: How often they go over a stream.
    fits: Whether ``copies`` of a token stay in registers; n > 8 would unroll n * n loops.
    """
    vec = math.gcd(C, 16 // size)
    while n * vec > 64:
        vec //= 2
    crowded = copies == 2 and 4 < n <= 8
    widths, most = (vec, min(vec, 4)) if crowded else (vec,), 128 if crowded and size == 4 else 256
    for vec in widths:
        packs = C // vec
        threads = threads_per_group or 32 * math.ceil(packs / math.ceil(packs / most) / 32)
        passes = math.ceil(packs / threads)
        held = passes * copies * n * (max(4, vec * size) if copies == 1 else 4 * vec)
        fits = n <= 8 and held <= REGISTER_BYTES[backend, copies]
        if fits:
            break
    return _Geometry(vec, threads, passes, fits)


def _projection(convention: Convention | None) -> dict[str, int | bool]:
    """Template arguments of a projection; a lane holds a line of the first half-step's axis."""
    c = convention or ROW_FIRST
    columns = c.first == "columns"
    orientation = {"COLUMNS": columns, "OUT_COLUMNS": columns != c.transposed}
    return {"ITERS": c.iters, "START": STARTS.index(c.start), **orientation}


def _params(eps: float, convention: Convention | None) -> mx.array:
    c = convention or ROW_FIRST
    return _constants(eps, c.pre_eps, c.post_scale, c.post_eps, c.eps)


def _sinkhorn_launch(name, inputs, dtype, convention, threads_per_group, verbose, backward):
    """A lane per line of a matrix, a power of two of lanes; as many matrices as a group holds."""
    logits = inputs["logits"]
    n = logits.shape[-1]
    flat = {k: _flat(a, 3) for k, a in inputs.items()}
    count, lanes = flat["logits"].shape[0], 1 << (n - 1).bit_length()
    threads = max(threads_per_group or 128, lanes) // lanes * lanes  # whole matrices
    template = {"N": n, **_projection(convention), "THREADS": threads}
    if backward:  # the divisors kept on chip, of 32 KiB threadgroup memory
        kept = (30 << 10) // (4 * threads) - (2 if n > 32 else 0)
        template |= {"KEPT": min(2 * convention.iters, kept), "D": dtype}
    (result,) = kernel.launch(
        name,
        flat | {"eps": _constants(convention.eps)},
        {"dlogits" if backward else "h_res": (flat["logits"].shape, dtype)},
        min(math.ceil(count / (threads // lanes)), MANY_GROUPS),
        threads,
        template,
        verbose,
    )
    return _unflat(result, logits.shape)


def _sinkhorn_forward(logits, *options):
    return _sinkhorn_launch("sinkhorn_knopp", {"logits": logits}, mx.float32, *options, False)


def _sinkhorn_backward(logits, dh_res, *options):
    inputs = {"logits": logits, "dh_res": dh_res}
    return [_sinkhorn_launch("sinkhorn_knopp_backward", inputs, logits.dtype, *options, True)]


def _layer_forward(
    x, H_pre, H_post, H_res, weight, eps, threads_per_group, verbose, convention=None, mix=True
):
    """mhc_static; with a convention mhc_layer; without mix stream_aggregate_norm."""
    shape = x.shape if mix else (*x.shape[:-2], x.shape[-1])
    x = _flat(x, 3)
    tokens, n, C = x.shape
    g = _geometry(n, C, x.dtype.size, 1, threads_per_group, kernel.backend())
    sinkhorn = convention is not None and n <= 8 and tokens <= ONE_LAUNCH_TOKENS
    if convention is not None and not sinkhorn:
        H_res = _sinkhorn_forward(H_res, convention, threads_per_group, verbose)
    arrays = {"x": x, "H_pre": H_pre, "H_post": H_post, "H_res": H_res, "weight": weight}
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads, "PASSES": g.passes}
    template |= {"CACHED": g.fits, "MIX": mix, "SINKHORN": sinkhorn}
    template |= {"GATES": convention is not None and convention.sigmoid, **_projection(convention)}
    (out,) = kernel.launch(
        "mhc_fused",
        arrays | {"params": _params(eps, convention)},
        {"out": (x.shape if mix else (tokens, C), x.dtype)},
        math.ceil(tokens / max(1, math.ceil(tokens / FORWARD_GROUPS))),  # as many turns for all
        g.threads,
        template,
        verbose,
    )
    return _unflat(out, shape)


def _layer_backward(
    x, H_pre, H_post, H_res, weight, dout, eps, threads, verbose, convention=None, mix=True
):
    """Gradients of x, H_pre, H_post, H_res, weight."""
    n, logits = x.shape[-2], H_res
    if convention is not None and n > 8:
        H_res = _sinkhorn_forward(logits, convention, threads, verbose)
    dx, _, *rest = _backward(
        x, None, H_pre, H_post, H_res, weight, dout, eps, threads, verbose, convention, mix
    )
    if convention is not None:
        rest[2] = _sinkhorn_backward(logits, rest[2], convention, threads, verbose)[0]
    primals = (H_pre, H_post, logits, weight)
    rest = [g if a is None else g.astype(a.dtype) for g, a in zip(rest, primals, strict=True)]
    return [dx, *rest]


def _mix_add_forward(x, y, h_post, h_res, threads_per_group, verbose):
    shape, x = x.shape, _flat(x, 3)
    tokens, n, C = x.shape
    g = _geometry(n, C, x.dtype.size, 1, threads_per_group, kernel.backend())
    post_per_token, res_per_token = h_post.ndim > 1, h_res.ndim > 2
    h_post = _flat(h_post, 2) if post_per_token else h_post
    h_res = _flat(h_res, 3) if res_per_token else h_res
    template = {"T": x.dtype, "N": n, "VEC": g.vec, "THREADS": g.threads}
    (out,) = kernel.launch(
        "stream_mix_add",
        {"x": x, "y": _flat(y, 2), "h_post": h_post, "h_res": h_res},
        {"out": (x.shape, x.dtype)},
        min(tokens, MANY_GROUPS),
        g.threads,
        template | {"POST_PER_TOKEN": post_per_token, "RES_PER_TOKEN": res_per_token},
        verbose,
    )
    return _unflat(out, shape)


def _mix_add_backward(x, y, h_post, h_res, dout, threads_per_group, verbose):
    """Gradients of x, y, h_post, h_res."""
    dx, dy, _, dh_post, dh_res, _ = _backward(
        x, y, None, h_post, h_res, None, dout, 1.0, threads_per_group, verbose, None, True
    )
    dh_post = _unflat(dh_post, h_post.shape).astype(h_post.dtype)
    return [dx, dy, dh_post, dh_res.astype(h_res.dtype)]


def _backward(
    x, y, H_pre, H_post, H_res, weight, dout, eps, threads_per_group, verbose, convention, mix
):
    """dx and dy in x's dtype, and dH_pre, dH_post, dh_res, dweight in float32, None where absent.

    y is given for stream_mix_add, weight for the layers; a convention means gates, and for n <= 8
    also that H_res is still to be projected: dh_res is the gradient of the projected matrix.
    """
    shape, x = x.shape, _flat(x, 3)
    tokens, n, C = x.shape
    norm, gates = y is None, convention is not None and convention.sigmoid
    post_per_token, res_per_token = mix and H_post.ndim > 1, mix and H_res.ndim > 2
    res_shape = H_res.shape if mix else None
    H_post = _flat(H_post, 2) if post_per_token else H_post
    H_res = _flat(H_res, 3) if res_per_token else H_res
    sinkhorn = convention is not None and n <= 8
    g = _geometry(n, C, x.dtype.size, 2, threads_per_group, kernel.backend())
    name, threads = ("mhc_backward", g.threads) if n <= 8 else ("mhc_backward_tiled", 256)
    threads = threads_per_group or threads
    sums = [n * norm, n * (mix and not post_per_token), n * n * (mix and not res_per_token)]
    sums.append(C * norm)
    groups = min(tokens, max(1, BACKWARD_THREADS // threads) if any(sums) else MANY_GROUPS)
    params = _params(eps, convention) if norm else None
    template = {"T": x.dtype, "N": n, "THREADS": threads, "MIX": mix, "NORM": norm, "GATES": gates}
    template |= {"POST_PER_TOKEN": post_per_token, "RES_PER_TOKEN": res_per_token}
    if n <= 8:
        template |= {"VEC": g.vec, "PASSES": g.passes, "CACHED": g.fits, "SINKHORN": sinkhorn}
        template |= _projection(convention)
    inputs = {"x": x, "y": None if norm else _flat(y, 2), "dout": _flat(dout, 3 if mix else 2)}
    inputs |= {"H_pre": H_pre, "H_post": H_post, "H_res": H_res, "weight": weight, "params": params}
    outputs = {
        "dx": (x.shape, x.dtype),
        "dy": None if norm else ((tokens, C), x.dtype),
        "partial": ((groups, sum(sums)), mx.float32) if any(sums) else None,
        "dh_post": ((tokens, n), mx.float32) if post_per_token else None,
        "dh_res": ((tokens, n, n), mx.float32) if res_per_token else None,
    }
    results = kernel.launch(name, inputs, outputs, groups, threads, template, verbose)
    made = dict(zip((k for k, v in outputs.items() if v is not None), results, strict=True))
    if any(sums):
        (total,) = kernel.launch(
            "sum_partials",
            {"partial": made["partial"]}
            | {k: inputs[k] if gates else None for k in ("H_pre", "H_post", "params")},
            {"out": ((sum(sums),), mx.float32)},
            math.ceil(sum(sums) / 8),
            256,
            {"T": mx.float32, "N": n if gates else 0, "GATES": gates},
            verbose,
        )
        ends = [sum(sums[: i + 1]) for i in range(4)]
        parts = zip(("H_pre", "dh_post", "dh_res", "weight"), sums, ends, strict=True)
        made |= {k: total[end - size : end] for k, size, end in parts if size}
    dh_res = _unflat(made["dh_res"], res_shape) if mix else None
    dy = None if norm else _unflat(made["dy"], y.shape)
    rest = made.get("H_pre"), made.get("dh_post"), dh_res, made.get("weight")
    return [_unflat(made["dx"], shape), dy, *rest]


def _reading(forward_or_backward):
    """`_layer_forward` or `_layer_backward` with only what stream_aggregate_norm has."""

    def read(x, h_pre, weight, *rest):
        result = forward_or_backward(x, h_pre, None, None, weight, *rest, mix=False)
        return [result[i] for i in (0, 1, 4)] if isinstance(result, list) else result

    return read


_KERNELS = {
    "sinkhorn_knopp": ((None,), _sinkhorn_forward, _sinkhorn_backward),
    "stream_aggregate_norm": ((None, 1, 1), _reading(_layer_forward), _reading(_layer_backward)),
    "stream_mix_add": ((None, None, 1, 2), _mix_add_forward, _mix_add_backward),
    "mhc_static": ((None, 1, 1, 2, 1), _layer_forward, _layer_backward),
    "mhc_layer": (
        (None, 1, 1, 2, 1),
        lambda *a: _layer_forward(*a[:5], *a[6:], convention=a[5]),
        lambda *a: _layer_backward(*a[:6], *a[7:], convention=a[6]),
    ),
}


def _op(check: Callable) -> Callable:
    """The public op of ``check``, which validates its arguments and returns (arrays, statics)."""
    name = check.__name__

    @functools.wraps(check)
    def op(
        *args,
        use_metal: bool = True,
        threads_per_group: int | None = None,
        verbose: bool = False,
        differentiable: bool = True,
        **kwargs,
    ) -> mx.array:
        arrays, statics = check(*args, **kwargs)
        _check_threads(name, threads_per_group)
        here = use_metal and kernel.backend() is not None and arrays[0].size > 0
        if here or (use_metal and verbose):
            present = tuple(a is not None for a in arrays)
            fused = _fused(name, present, statics, (threads_per_group, verbose))
            given = [a for a in arrays if a is not None]
            if here:
                return (fused.op if differentiable else fused.forward)(*given)
            zeros = (mx.zeros(a.shape, a.dtype) for a in given)
            print(kernel.metal_source(fused.forward, *zeros))
        return getattr(reference, name)(*arrays, *statics)

    own, shared = inspect.signature(check), inspect.signature(op, follow_wrapped=False)
    keywords = [p for p in shared.parameters.values() if p.kind is p.KEYWORD_ONLY]
    op.__signature__ = own.replace(parameters=[*own.parameters.values(), *keywords])
    op.__doc__ = getattr(reference, name).__doc__
    return op


@_op
def sinkhorn_knopp(logits: mx.array, convention: Convention = ROW_FIRST) -> mx.array:
    op = "sinkhorn_knopp"
    _check_dtype(op, logits=logits)
    n = logits.shape[-1] if logits.ndim else 0
    if logits.shape[-2:] != (n, n) or not 1 <= n <= MAX_STREAMS:
        must = f"have shape [..., n, n] with n from 1 to {MAX_STREAMS}"
        raise ValueError(_fail(op, "logits", must, list(logits.shape)))
    _check_convention(op, convention)
    return (logits,), (convention,)


@_op
def stream_aggregate_norm(
    x: mx.array, h_pre: mx.array, weight: mx.array, eps: float = 1e-5
) -> mx.array:
    _check_layer("stream_aggregate_norm", x, eps, h_pre=h_pre, weight=weight)
    return (x, h_pre, weight), (eps,)


@_op
def stream_mix_add(
    x: mx.array, y: mx.array, h_post: mx.array, h_res: mx.array | None = None
) -> mx.array:
    op = "stream_mix_add"
    lead, n, C = _check_streams(op, x)
    _check_array(op, "y", y, (*map(str, range(len(lead))), "C"), (*lead, C))
    if y.dtype != x.dtype:
        raise TypeError(_fail(op, "y", f"have x's dtype {x.dtype}", y.dtype))
    _check_array(op, "h_post", h_post, "n", (n,), lead)
    if h_res is not None:
        _check_array(op, "h_res", h_res, "nn", (n, n), lead)
    return (x, y, h_post, h_res), ()


@_op
def mhc_static(
    x: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None,
    weight: mx.array,
    eps: float = 1e-5,
) -> mx.array:
    mixing = {} if h_res is None else {"h_res": h_res}
    _check_layer("mhc_static", x, eps, h_pre=h_pre, h_post=h_post, **mixing, weight=weight)
    return (x, h_pre, h_post, h_res, weight), (eps,)


@_op
def mhc_layer(
    x: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    H_res: mx.array,
    weight: mx.array,
    convention: Convention = ROW_FIRST,
    eps: float = 1e-5,
) -> mx.array:
    _check_layer("mhc_layer", x, eps, H_pre=H_pre, H_post=H_post, H_res=H_res, weight=weight)
    _check_convention("mhc_layer", convention)
    return (x, H_pre, H_post, H_res, weight), (convention, eps)


# Plain MLX, with nothing to fuse alone: `ops` has every name of `reference`.
rms_norm, stream_aggregate = reference.rms_norm, reference.stream_aggregate
stream_distribute, stream_mix = reference.stream_distribute, reference.stream_mix
