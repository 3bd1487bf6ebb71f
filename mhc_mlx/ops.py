"""The fused ops: launch geometry, forward, gradient, and one dispatch line each.

Every op takes the positional arguments of its namesake in `reference` and four keywords:

    use_metal: Run the kernels where the default device has them (Metal or CUDA); otherwise, and on a CPU, the reference.
    threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks from the shape.
    verbose: Print the generated kernel source (without a GPU: the Metal source).
    differentiable: False calls the kernel bare, which `mx.export_function` can record; it then has no gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from . import kernel, reference
from .conventions import ROW_FIRST, STARTS, Convention
from .reference import rms_norm, stream_aggregate, stream_distribute, stream_mix

__all__ = [
    "mhc_layer",
    "mhc_static",
    "rms_norm",
    "sinkhorn_knopp",
    "stream_aggregate",
    "stream_aggregate_norm",
    "stream_distribute",
    "stream_mix",
    "stream_mix_add",
]

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MAX_STREAMS = 64
# Measured on an H100 (benchmarks/); a thread of an Apple GPU has 128 registers, hence the smaller limit there.
REGISTER_BYTES = {("metal", 1): 256, ("cuda", 1): 256, ("metal", 2): 256, ("cuda", 2): 512}
FORWARD_GROUPS = (
    2112  # enough to fill any GPU; fewer groups than tokens share the fetch of coefficients
)
MANY_GROUPS = 1 << 16
BACKWARD_THREADS = (
    132 * 512
)  # what an H100 holds at 128 registers; each threadgroup leaves a row of partial sums
ONE_LAUNCH_TOKENS = 1024  # up to here every threadgroup of `mhc_layer` projects H_res itself


# Checks ---------------------------------------------------------------------------------------------------------------


def _fail(op: str, argument: str, must: str, got) -> str:
    return f"[{op}] {argument} must {must} but got {got}."


def _check_dtype(op: str, **arrays: mx.array) -> None:
    for name, a in arrays.items():
        if not isinstance(a, mx.array):
            raise TypeError(_fail(op, name, "be an mx.array", type(a).__name__))
        if a.dtype not in FLOATS:
            raise TypeError(_fail(op, name, "be float32, float16 or bfloat16", a.dtype))


def _check_shape(op: str, name: str, a: mx.array, *shapes: tuple) -> None:
    """Shapes are tuples of sizes, or of (letter, size)."""
    sizes = [tuple(s[1] if isinstance(s, tuple) else s for s in shape) for shape in shapes]
    if tuple(a.shape) not in sizes:
        texts = [
            ", ".join(f"{s[0]}={s[1]}" if isinstance(s, tuple) else str(s) for s in shape)
            for shape in shapes
        ]
        raise ValueError(
            _fail(op, name, f"have shape {' or '.join(f'[{t}]' for t in texts)}", list(a.shape))
        )


def _check_streams(op: str, x: mx.array) -> tuple[tuple[int, ...], int, int]:
    """Leading axes, n and C of x."""
    _check_dtype(op, x=x)
    if x.ndim < 2:
        raise ValueError(_fail(op, "x", "have shape [..., n, C]", list(x.shape)))
    *lead, n, C = x.shape
    if not 1 <= n <= MAX_STREAMS:
        raise ValueError(
            _fail(op, "x", f"have 1 to {MAX_STREAMS} streams", f"n={n} in {list(x.shape)}")
        )
    if C < 1:
        raise ValueError(_fail(op, "x", "have at least one channel", list(x.shape)))
    return tuple(lead), n, C


def _check_eps(op: str, eps: float) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(_fail(op, "eps", "be a number", type(eps).__name__))
    if not 0 < eps < math.inf:
        raise ValueError(_fail(op, "eps", "be finite and above 0", eps))
    return float(eps)


def _check_convention(op: str, convention: Convention) -> None:
    if not isinstance(convention, Convention):
        raise TypeError(_fail(op, "convention", "be a Convention", type(convention).__name__))


def _check_threads(op: str, threads: int | None) -> None:
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(_fail(op, "threads_per_group", "be None or an int", type(threads).__name__))
    if threads % 32 or not 32 <= threads <= 1024:
        raise ValueError(
            _fail(op, "threads_per_group", "be a multiple of 32 from 32 to 1024", threads)
        )


# Launching ------------------------------------------------------------------------------------------------------------


class _Fused(NamedTuple):
    """An op's kernels: `forward` bare, `op` differentiable."""

    forward: Callable
    op: Callable


def _fuse(
    reference: Callable, forward: Callable, backward: Callable, shared_ndim: tuple[int | None, ...]
) -> _Fused:
    """Tie kernels to the reference they compute.

    Args:
        reference: Of the arrays alone.
        forward: The same function by kernels.
        backward: Of the arrays and the cotangent; returns a gradient per array, in its dtype.
        shared_ndim: Per array, the number of axes with which it is shared by all tokens; None if it never is.
    """

    def reference_gradient(*inputs):
        return tuple(mx.vjp(reference, list(inputs[:-1]), [inputs[-1]])[1])

    def fold(inputs, axes, gradient):
        """Whether the mapped axis can become one more axis of tokens."""
        for a, axis, ndim in zip(
            inputs, axes, (*shared_ndim, None) if gradient else shared_ndim, strict=True
        ):
            per_token = ndim is None or a.ndim - (axis is not None) > ndim
            if per_token != (axis is not None) or (gradient and not per_token):
                return None
        return [
            mx.moveaxis(a, axis, 0) if axis is not None else a
            for a, axis in zip(inputs, axes, strict=True)
        ]

    def several(arrays):
        return arrays if isinstance(arrays, (tuple, list)) else (arrays,)

    @mx.custom_function
    def op(*primals):
        return forward(*primals)

    @mx.custom_function
    def gradient(*inputs):
        return tuple(backward(*inputs))

    @op.vjp
    def _(primals, cotangent, _):
        return gradient(*several(primals), cotangent)

    @gradient.vjp
    def _(inputs, cotangents, _):
        return tuple(mx.vjp(reference_gradient, list(inputs), list(several(cotangents)))[1])

    @op.vmap
    def _(inputs, axes):
        inputs, axes = several(inputs), several(axes)
        folded = fold(inputs, axes, gradient=False)
        return (op(*folded) if folded else mx.vmap(reference, in_axes=axes)(*inputs)), 0

    @gradient.vmap
    def _(inputs, axes):
        folded = fold(inputs, axes, gradient=True)
        results = (
            gradient(*folded) if folded else mx.vmap(reference_gradient, in_axes=axes)(*inputs)
        )
        return tuple(results), (0,) * len(results)

    return _Fused(forward, op)


def _run(
    fused: _Fused, plain: Callable, arrays, use_metal: bool, verbose: bool, differentiable: bool
) -> mx.array:
    if use_metal and kernel.backend():
        return (fused.op if differentiable else fused.forward)(*arrays)
    if use_metal and verbose:
        print(kernel.metal_source(fused.forward, *(mx.zeros(a.shape, a.dtype) for a in arrays)))
    return plain(*arrays)


@functools.cache
def _constants(*values: float) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def _identity(n: int) -> mx.array:
    return mx.eye(n)


def _flat(a: mx.array, ndim: int) -> mx.array:
    """All leading axes as one, so that ``ndim`` are left."""
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

    vec: Neighbours per load: up to 16 bytes, dividing C, few enough for the accumulators of n streams.
    threads: One per vec, a multiple of 32, at most 256 (128 where n * n sums fill the registers).
    passes: How often they go over a stream.
    fits: Whether ``copies`` tokens (1: x; 2: x and dout) stay in registers. n > 8 would unroll n * n loops.
    """
    vec = math.gcd(C, 16 // size)
    while n * vec > (64 if copies == 1 or n > 8 else 32):
        vec //= 2
    packs, most = C // vec, 128 if copies == 2 and 4 < n <= 8 else 256
    threads = threads_per_group or 32 * math.ceil(packs / math.ceil(packs / most) / 32)
    passes = math.ceil(packs / threads)
    held = passes * copies * n * max(4, vec * size)
    return _Geometry(vec, threads, passes, n <= 8 and held <= REGISTER_BYTES[backend, copies])


def _backward_groups(tokens: int, threads: int) -> int:
    return min(tokens, max(1, BACKWARD_THREADS // threads))


def _projection(convention: Convention) -> dict[str, int | bool]:
    """The template arguments of sinkhorn_knopp. A lane holds a line of the first half-step's axis."""
    columns = convention.first == "columns"
    return {
        "ITERS": convention.iters,
        "START": STARTS.index(convention.start),
        "COLUMNS": columns,
        "OUT_COLUMNS": columns != convention.transposed,
    }


# Sinkhorn-Knopp -------------------------------------------------------------------------------------------------------


def _sinkhorn_threads(n: int, threads_per_group: int | None) -> tuple[int, int]:
    """Threads in a threadgroup and matrices that they hold: a lane per line, a power of two of lanes."""
    lanes = 1 << (n - 1).bit_length()
    threads = max(threads_per_group or 128, lanes)
    return threads, threads // lanes


def _sinkhorn_forward(logits, convention, threads_per_group=None, verbose=False):
    if logits.size == 0:
        return mx.zeros(logits.shape)
    n, flat = logits.shape[-1], _flat(logits, 3)
    threads, matrices = _sinkhorn_threads(n, threads_per_group)
    (h_res,) = kernel.launch(
        "sinkhorn_knopp",
        {"logits": flat, "eps": _constants(convention.eps)},
        {"h_res": (flat.shape, mx.float32)},
        min(math.ceil(flat.shape[0] / matrices), MANY_GROUPS),
        threads,
        {"N": n, **_projection(convention), "THREADS": threads},
        verbose,
    )
    return _unflat(h_res, logits.shape)


def _sinkhorn_backward(logits, dh_res, convention, threads_per_group=None, verbose=False):
    if logits.size == 0:
        return mx.zeros(logits.shape, logits.dtype)
    n, flat = logits.shape[-1], _flat(logits, 3)
    threads, matrices = _sinkhorn_threads(n, threads_per_group)
    steps = max(1, 2 * convention.iters - (2, 1, 0)[STARTS.index(convention.start)])
    kept = min(
        steps, (30 << 10) // (4 * threads) - (2 if n > 32 else 0)
    )  # of 32 KiB threadgroup memory
    (dlogits,) = kernel.launch(
        "sinkhorn_knopp_backward",
        {"logits": flat, "dh_res": _flat(dh_res, 3), "eps": _constants(convention.eps)},
        {"dlogits": (flat.shape, logits.dtype)},
        min(math.ceil(flat.shape[0] / matrices), MANY_GROUPS),
        threads,
        {"N": n, **_projection(convention), "THREADS": threads, "KEPT": kept, "D": logits.dtype},
        verbose,
    )
    return _unflat(dlogits, logits.shape)


@functools.cache
def _sinkhorn(convention: Convention, threads_per_group: int | None, verbose: bool) -> _Fused:
    options = (convention, threads_per_group, verbose)
    return _fuse(
        lambda logits: reference.sinkhorn_knopp(logits, convention),
        lambda logits: _sinkhorn_forward(logits, *options),
        lambda logits, dh_res: (_sinkhorn_backward(logits, dh_res, *options),),
        (None,),
    )


def sinkhorn_knopp(
    logits: mx.array,
    convention: Convention = ROW_FIRST,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    op = "sinkhorn_knopp"
    _check_dtype(op, logits=logits)
    if (
        logits.ndim < 2
        or logits.shape[-1] != logits.shape[-2]
        or not 1 <= logits.shape[-1] <= MAX_STREAMS
    ):
        raise ValueError(
            _fail(
                op,
                "logits",
                f"have shape [..., n, n], n from 1 to {MAX_STREAMS}",
                list(logits.shape),
            )
        )
    _check_convention(op, convention)
    _check_threads(op, threads_per_group)
    fused = _sinkhorn(convention, threads_per_group, verbose)
    plain = functools.partial(reference.sinkhorn_knopp, convention=convention)
    return _run(fused, plain, (logits,), use_metal, verbose, differentiable)


# The static layer -----------------------------------------------------------------------------------------------------


class _Static(NamedTuple):
    """What distinguishes mhc_layer (gates and projection), mhc_static and stream_aggregate_norm (mix=False)."""

    eps: float
    convention: Convention | None = None
    mix: bool = True
    threads_per_group: int | None = None
    verbose: bool = False

    @property
    def params(self) -> mx.array:
        c = self.convention or ROW_FIRST
        return _constants(self.eps, c.pre_eps, c.post_scale, c.post_eps, c.eps)

    @property
    def gates(self) -> bool:
        return self.convention is not None and self.convention.sigmoid

    def template(self, x: mx.array, g: _Geometry, sinkhorn: bool) -> dict:
        return {
            "T": x.dtype,
            "N": x.shape[1],
            "VEC": g.vec,
            "THREADS": g.threads,
            "PASSES": g.passes,
            "MIX": self.mix,
            "GATES": self.gates,
            "SINKHORN": sinkhorn,
            **_projection(self.convention if sinkhorn else ROW_FIRST),
        }


def _static_forward(x, H_pre, H_post, H_res, weight, s: _Static):
    shape = x.shape if s.mix else (*x.shape[:-2], x.shape[-1])
    if x.size == 0:
        return mx.zeros(shape, x.dtype)
    x = _flat(x, 3)
    tokens, n, C = x.shape
    g = _geometry(n, C, x.dtype.size, 1, s.threads_per_group, kernel.backend())
    sinkhorn = s.convention is not None and n <= 8 and tokens <= ONE_LAUNCH_TOKENS
    if s.convention is not None and not sinkhorn:
        H_res = _sinkhorn_forward(H_res, s.convention, s.threads_per_group, s.verbose)
    (out,) = kernel.launch(
        "mhc_fused",
        {
            "x": x,
            "H_pre": H_pre,
            "H_post": H_post,
            "H_res": H_res,
            "weight": weight,
            "params": s.params,
        },
        {"out": (x.shape if s.mix else (tokens, C), x.dtype)},
        min(tokens, FORWARD_GROUPS),
        g.threads,
        s.template(x, g, sinkhorn) | {"CACHED": g.fits},
        s.verbose,
    )
    return _unflat(out, shape)


def _static_backward(x, H_pre, H_post, H_res, weight, dout, s: _Static):
    """Gradients of x, H_pre, H_post, H_res, weight."""
    if x.size == 0:
        return [None if a is None else mx.zeros_like(a) for a in (x, H_pre, H_post, H_res, weight)]
    shape, logits, (n, C) = x.shape, H_res, x.shape[-2:]
    x, dout = _flat(x, 3), _flat(dout, 3 if s.mix else 2)
    g = _geometry(n, C, x.dtype.size, 2, s.threads_per_group, kernel.backend())
    sinkhorn = s.convention is not None and n <= 8
    if s.convention is not None and not sinkhorn:
        H_res = _sinkhorn_forward(H_res, s.convention, s.threads_per_group, s.verbose)
    groups = _backward_groups(x.shape[0], g.threads)
    sums = (n if s.mix else 0, n * n if s.mix else 0, C)
    dx, partial = _launch_backward(
        g,
        {
            "x": x,
            "y": None,
            "H_pre": H_pre,
            "H_post": H_post,
            "H_res": H_res,
            "weight": weight,
            "dout": dout,
        }
        | {"params": s.params},
        {"dx": (x.shape, x.dtype), "dy": None, "partial": ((groups, n + sum(sums)), mx.float32)},
        groups,
        s.template(x, g, sinkhorn)
        | {"NORM": True, "POST_PER_TOKEN": False, "RES_PER_TOKEN": False},
        s.verbose,
    )
    total = _sum_partials(partial, n, s.gates and (H_pre, H_post, s.params), s.verbose)
    dH_pre, dH_post, dH_res, dweight = mx.split(total, [n, n + sums[0], n + sums[0] + sums[1]])
    dx, dH_pre, dweight = (
        _unflat(dx, shape),
        dH_pre.astype(H_pre.dtype),
        dweight.astype(weight.dtype),
    )
    if not s.mix:
        return dx, dH_pre, None, None, dweight
    dH_res = dH_res.reshape(n, n)
    if s.convention is not None:
        dH_res = _sinkhorn_backward(logits, dH_res, s.convention, s.threads_per_group, s.verbose)
    return dx, dH_pre, dH_post.astype(H_post.dtype), dH_res.astype(logits.dtype), dweight


def _launch_backward(g: _Geometry, inputs, outputs, groups, template, verbose) -> list[mx.array]:
    outputs = {"dx": None, "dy": None, "partial": None, "dh_post": None, "dh_res": None} | outputs
    if template["N"] <= 8:
        template = template | {"CACHED": g.fits}
        return kernel.launch("mhc_backward", inputs, outputs, groups, g.threads, template, verbose)
    keep = ("T", "N", "THREADS", "MIX", "NORM", "GATES", "POST_PER_TOKEN", "RES_PER_TOKEN")
    template = {k: template[k] for k in keep} | {"THREADS": max(g.threads, 256)}
    return kernel.launch(
        "mhc_backward_tiled", inputs, outputs, groups, template["THREADS"], template, verbose
    )


def _sum_partials(partial: mx.array, n: int, gates, verbose: bool) -> mx.array:
    """The sums over threadgroups; ``gates`` (H_pre, H_post, params) turns dh_pre and dh_post into their logits'."""
    H_pre, H_post, params = gates or (None, None, None)
    (total,) = kernel.launch(
        "sum_partials",
        {"partial": partial, "H_pre": H_pre, "H_post": H_post, "params": params},
        {"out": ((partial.shape[1],), mx.float32)},
        math.ceil(partial.shape[1] / 8),
        256,
        {"T": mx.float32, "N": n, "GATES": bool(gates)},
        verbose,
    )
    return total


@functools.cache
def _static(s: _Static, identity: bool) -> _Fused:
    if s.convention is not None:
        return _fuse(
            lambda *arrays: reference.mhc_layer(*arrays, s.convention, s.eps),
            lambda *arrays: _static_forward(*arrays, s),
            lambda *arrays: _static_backward(*arrays, s),
            (None, 1, 1, 2, 1),
        )
    if not s.mix:
        return _fuse(
            lambda *arrays: reference.stream_aggregate_norm(*arrays, s.eps),
            lambda x, h_pre, w: _static_forward(x, h_pre, None, None, w, s),
            lambda x, h_pre, w, d: [
                g for g in _static_backward(x, h_pre, None, None, w, d, s) if g is not None
            ],
            (None, 1, 1),
        )
    if identity:
        return _fuse(
            lambda x, h_pre, h_post, w: reference.mhc_static(x, h_pre, h_post, None, w, s.eps),
            lambda x, h_pre, h_post, w: _static_forward(
                x, h_pre, h_post, _identity(x.shape[-2]), w, s
            ),
            lambda x, h_pre, h_post, w, d: [
                g
                for i, g in enumerate(
                    _static_backward(x, h_pre, h_post, _identity(x.shape[-2]), w, d, s)
                )
                if i != 3
            ],
            (None, 1, 1, 1),
        )
    return _fuse(
        lambda *arrays: reference.mhc_static(*arrays, s.eps),
        lambda *arrays: _static_forward(*arrays, s),
        lambda *arrays: _static_backward(*arrays, s),
        (None, 1, 1, 2, 1),
    )


def stream_aggregate_norm(
    x: mx.array,
    h_pre: mx.array,
    weight: mx.array,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    op = "stream_aggregate_norm"
    _, n, C = _check_streams(op, x)
    _check_dtype(op, h_pre=h_pre, weight=weight)
    _check_shape(op, "h_pre", h_pre, (("n", n),))
    _check_shape(op, "weight", weight, (("C", C),))
    _check_threads(op, threads_per_group)
    s = _Static(_check_eps(op, eps), None, False, threads_per_group, verbose)
    plain = functools.partial(reference.stream_aggregate_norm, eps=eps)
    return _run(_static(s, False), plain, (x, h_pre, weight), use_metal, verbose, differentiable)


def _check_static(op, x, H_pre, H_post, H_res, weight, names):
    _, n, C = _check_streams(op, x)
    shapes = ((("n", n),), (("n", n),), (("n", n), ("n", n)), (("C", C),))
    for name, a, shape in zip(names, (H_pre, H_post, H_res, weight), shapes, strict=True):
        if a is not None:
            _check_dtype(op, **{name: a})
            _check_shape(op, name, a, shape)


def mhc_static(
    x: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None,
    weight: mx.array,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    op = "mhc_static"
    _check_static(op, x, h_pre, h_post, h_res, weight, ("h_pre", "h_post", "h_res", "weight"))
    _check_threads(op, threads_per_group)
    s = _Static(_check_eps(op, eps), None, True, threads_per_group, verbose)
    fused = _static(s, h_res is None)
    if h_res is None:
        arrays, plain = (
            (x, h_pre, h_post, weight),
            lambda x, p, q, w: reference.mhc_static(x, p, q, None, w, eps),
        )
    else:
        arrays, plain = (
            (x, h_pre, h_post, h_res, weight),
            functools.partial(reference.mhc_static, eps=eps),
        )
    return _run(fused, plain, arrays, use_metal, verbose, differentiable)


def mhc_layer(
    x: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    H_res: mx.array,
    weight: mx.array,
    convention: Convention = ROW_FIRST,
    eps: float = 1e-5,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    op = "mhc_layer"
    _check_static(op, x, H_pre, H_post, H_res, weight, ("H_pre", "H_post", "H_res", "weight"))
    if H_res is None:
        raise TypeError(_fail(op, "H_res", "be an mx.array", "None"))
    _check_convention(op, convention)
    _check_threads(op, threads_per_group)
    s = _Static(_check_eps(op, eps), convention, True, threads_per_group, verbose)
    plain = functools.partial(reference.mhc_layer, convention=convention, eps=eps)
    arrays = (x, H_pre, H_post, H_res, weight)
    return _run(_static(s, False), plain, arrays, use_metal, verbose, differentiable)


# Write back -----------------------------------------------------------------------------------------------------------


def _mix_add_forward(x, y, h_post, h_res, threads_per_group, verbose):
    if x.size == 0:
        return mx.zeros(x.shape, x.dtype)
    shape, x, y = x.shape, _flat(x, 3), _flat(y, 2)
    g = _geometry(*x.shape[1:], x.dtype.size, 1, threads_per_group, kernel.backend())
    post_per_token, res_per_token = h_post.ndim > 1, h_res.ndim > 2
    (out,) = kernel.launch(
        "stream_mix_add",
        {
            "x": x,
            "y": y,
            "h_post": _flat(h_post, 2) if post_per_token else h_post,
            "h_res": _flat(h_res, 3) if res_per_token else h_res,
        },
        {"out": (x.shape, x.dtype)},
        min(x.shape[0], MANY_GROUPS),
        g.threads,
        {
            "T": x.dtype,
            "N": x.shape[1],
            "VEC": g.vec,
            "THREADS": g.threads,
            "POST_PER_TOKEN": post_per_token,
            "RES_PER_TOKEN": res_per_token,
        },
        verbose,
    )
    return _unflat(out, shape)


def _mix_add_backward(x, y, h_post, h_res, dout, threads_per_group, verbose):
    """Gradients of x, y, h_post, h_res."""
    if x.size == 0:
        return [mx.zeros_like(a) for a in (x, y, h_post, h_res)]
    shapes = [a.shape for a in (x, y, h_post, h_res)]
    dtypes = [a.dtype for a in (x, y, h_post, h_res)]
    x, y, dout = _flat(x, 3), _flat(y, 2), _flat(dout, 3)
    tokens, n, C = x.shape
    post_per_token, res_per_token = h_post.ndim > 1, h_res.ndim > 2
    g = _geometry(n, C, x.dtype.size, 2, threads_per_group, kernel.backend())
    shared = not (post_per_token and res_per_token)
    groups = _backward_groups(tokens, g.threads) if shared else min(tokens, MANY_GROUPS)
    columns = (0 if post_per_token else n) + (0 if res_per_token else n * n)
    dx, dy, *rest = _launch_backward(
        g,
        {
            "x": x,
            "y": y,
            "H_pre": None,
            "H_post": _flat(h_post, 2) if post_per_token else h_post,
            "H_res": _flat(h_res, 3) if res_per_token else h_res,
            "weight": None,
            "dout": dout,
            "params": None,
        },
        {
            "dx": (x.shape, x.dtype),
            "dy": (y.shape, x.dtype),
            "partial": ((groups, columns), mx.float32) if shared else None,
            "dh_post": ((tokens, n), mx.float32) if post_per_token else None,
            "dh_res": ((tokens, n, n), mx.float32) if res_per_token else None,
        },
        groups,
        {
            "T": x.dtype,
            "N": n,
            "VEC": g.vec,
            "THREADS": g.threads,
            "PASSES": g.passes,
            "MIX": True,
            "NORM": False,
            "GATES": False,
            "SINKHORN": False,
            **_projection(ROW_FIRST),
            "POST_PER_TOKEN": post_per_token,
            "RES_PER_TOKEN": res_per_token,
        },
        verbose,
    )
    total = _sum_partials(rest.pop(0), n, None, verbose) if shared else None
    dh_post = rest.pop(0) if post_per_token else total[:n]
    dh_res = rest.pop(0) if res_per_token else total[-n * n :]
    grads = (dx, dy, dh_post, dh_res)
    return [_unflat(a, s).astype(t) for a, s, t in zip(grads, shapes, dtypes, strict=True)]


@functools.cache
def _mix_add(identity: bool, *options) -> _Fused:
    if identity:
        return _fuse(
            lambda x, y, h_post: reference.stream_mix_add(x, y, h_post, None),
            lambda x, y, h_post: _mix_add_forward(x, y, h_post, _identity(x.shape[-2]), *options),
            lambda x, y, h_post, d: _mix_add_backward(
                x, y, h_post, _identity(x.shape[-2]), d, *options
            )[:3],
            (None, None, 1),
        )
    return _fuse(
        reference.stream_mix_add,
        lambda *arrays: _mix_add_forward(*arrays, *options),
        lambda *arrays: _mix_add_backward(*arrays, *options),
        (None, None, 1, 2),
    )


def stream_mix_add(
    x: mx.array,
    y: mx.array,
    h_post: mx.array,
    h_res: mx.array | None = None,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    op = "stream_mix_add"
    lead, n, C = _check_streams(op, x)
    _check_dtype(op, y=y, h_post=h_post)
    if y.dtype != x.dtype:
        raise TypeError(_fail(op, "y", f"have x's dtype {x.dtype}", y.dtype))
    _check_shape(op, "y", y, (*lead, ("C", C)))
    _check_shape(op, "h_post", h_post, (("n", n),), (*lead, ("n", n)))
    if h_res is not None:
        _check_dtype(op, h_res=h_res)
        _check_shape(op, "h_res", h_res, (("n", n), ("n", n)), (*lead, ("n", n), ("n", n)))
    _check_threads(op, threads_per_group)
    arrays = (x, y, h_post) if h_res is None else (x, y, h_post, h_res)
    fused = _mix_add(h_res is None, threads_per_group, verbose)
    return _run(fused, reference.stream_mix_add, arrays, use_metal, verbose, differentiable)


for _op in (sinkhorn_knopp, stream_aggregate_norm, mhc_static, mhc_layer, stream_mix_add):
    _op.__doc__ = getattr(reference, _op.__name__).__doc__
