"""Sites on these kernels: the lagged kind in one op, the other in two, compiled where it pays.

A gated residual is two ops, and between them the linear layers of its module.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import launch, ops
from .family import DOWN, INJECT, UP, GatedSettings, Options, Settings, fused_weight

FEW = 8  # up to this number of tokens mlx-vlm's results do not depend on the number

# Backends on which sites are compiled. What decides is a measurement: `python -m mhc_mlx.models
# --sites` times "patched" beside "patched, not compiled" there. On an H200 compiled sites are 2.1
# to 5.6 times faster, at every family and number of tokens (the table of docs/models.md). No Mac
# has measured it yet: Metal is here because compiling dispatches less, and goes if it measures
# slower at one token.
COMPILED = frozenset({"cuda", "metal"})

# While `activations` runs in this thread, it has x and y by a site's module and prefix.
_seen: ContextVar[dict | None] = ContextVar("seen", default=None)


def note(hc: Any, prefix: str, x: mx.array, y: mx.array) -> None:
    """Tell `activations` what a site gets."""
    if (seen := _seen.get()) is not None:
        seen[id(hc), prefix] = (x, y)


def _fusable_weight(norm: Any, dtype: mx.Dtype) -> mx.array | None:
    """Return the weight if norm is an nn.RMSNorm that the op can apply for this output dtype."""
    if type(norm) is not nn.RMSNorm or not norm.eps > 0:
        return None
    weight = norm["weight"]  # access by attribute would take a microsecond
    return weight if dtype == mx.float32 or weight.dtype == dtype else None


def _recurs(length: int) -> bool:
    """Tell whether a number of tokens is likely to recur: in decoding, or as a full prompt chunk.

    The last chunk of a prompt may have any length, and a trace of each would fill the memory.
    """
    return length <= 64 or length % 256 == 0


def _backend(x: mx.array, options: Options) -> str | None:
    """Return the backend for which a site is compiled: None where it is not."""
    compiles = options.use_metal and not options.differentiable and x.size > 0
    found = launch.backend() if compiles and _recurs(x.shape[-3]) else None
    return found if found in COMPILED else None


def _mixed(x, y, h_post, h_res, settings: Settings | GatedSettings, options: Options) -> mx.array:
    """Return the write-back, rounded once to the dtype that the package writes."""
    # Where the dtypes of x and y differ, the package rounds only the sum.
    dtype = x.dtype if y.dtype == x.dtype else mx.float32
    out = ops.stream_mix_add(x.astype(dtype), y.astype(dtype), h_post, h_res, **options.of_ops)
    return out.astype((y if settings.out_of_y else x).dtype)


# ---- lagged: the write-back of one sublayer and the read of the next in one op


@functools.cache
def _single_pass(
    backend: str | None, reads: bool, settings: Settings, eps: float, options: Options
):
    """Return the function of (x, y, fn, base, scale, weight) that computes a site.

    u is None unless ``reads``; with a weight it is normalised. All sites with the same constants
    share the function. With a backend it is compiled: MLX traces it once for each shape, stream and
    thread, and each trace keeps the source of its launches, about 50 KB (see `_recurs`).
    """
    c, norm_eps, given = settings.convention, settings.norm_eps, options.of_ops

    def run(x, y, fn, base, scale, weight):
        if reads and y.dtype == x.dtype:
            arrays = (x, y, fn, base, scale, weight)
            rounds = options.rounding == "stock"
            return ops.mhc_single_pass(*arrays, c, norm_eps, eps, round_aggregate=rounds, **given)
        h_pre, h_post, h_res = ops.mhc_coefficients(x, fn, base, scale, c, norm_eps, **given)
        out = _mixed(x, y, h_post, h_res, settings, options)
        return out, ops.stream_aggregate(out, h_pre, **given) if reads else None, h_pre

    return mx.compile(run) if backend else run


def single_pass(
    hc: Any, prefix: str, settings: Settings, options: Options, x: mx.array, y: mx.array, norm: Any
) -> tuple[mx.array, Any, mx.array]:
    """Return out ``[..., n, C]``, u ``[..., C]`` (None without a norm) and h_pre ``[..., n]``.

    out[i] = sum_j h_res[i, j] x[j] + h_post[i] y and u = norm(sum_i h_pre[i] out[i]).
    """
    weight = _fusable_weight(norm, x.dtype) if y.dtype == x.dtype else None
    fuses_norm = weight is not None
    eps = norm.eps if fuses_norm else 1.0
    run = _single_pass(_backend(x, options), norm is not None, settings, eps, options)
    arrays = (hc[prefix + "fn"], hc[prefix + "base"], hc[prefix + "scale"])
    out, u, h_pre = run(x, y, *arrays, weight)
    return out, u if fuses_norm or norm is None else norm(u), h_pre


def coefficients(hc: Any, prefix: str, settings: Settings, options: Options, x: mx.array) -> Any:
    """Return h_pre, h_post and h_res (row = output) of streams, float32."""
    arrays = (x, hc[prefix + "fn"], hc[prefix + "base"], hc[prefix + "scale"])
    c, norm_eps = settings.convention, settings.norm_eps
    return ops.mhc_coefficients(*arrays, c, norm_eps, **options.of_ops)


# ---- not lagged: what a sublayer reads, and its write-back


def _tokenwise(settings: Settings, options: Options, length: int) -> bool:
    """Tell whether tokens must run one by one, so that their bits do not depend on their number.

    The kernels' do not; the sums of MLX's products do.
    """
    few = settings.tokenwise and 1 < length <= FEW
    return few and not options.differentiable and not (options.use_metal and launch.backend())


def _one_by_one(f, *arrays: mx.array) -> Any:
    """Return the results of f for each token of arrays ``[B, L, ...]``, joined."""
    parts = [f(*(a[:, k : k + 1] for a in arrays)) for k in range(arrays[0].shape[1])]
    if isinstance(parts[0], mx.array):
        return mx.concatenate(parts, axis=1)
    columns = zip(*parts, strict=True)
    return tuple(None if c[0] is None else mx.concatenate(list(c), axis=1) for c in columns)


def _rounded(h: Any, dtype: mx.Dtype) -> Any:
    return None if h is None else h.astype(dtype).astype(mx.float32)


@functools.cache
def _read(backend: str | None, settings: Settings, eps: float | None, options: Options):
    """Return the function of (x, fn, base, scale, weight) to u, h_post and h_res.

    With an eps u is normalised: it is rounded before its norm, as in the package, unless it is to
    be rounded once.
    """
    c, norm_eps, given = settings.convention, settings.norm_eps, options.of_ops

    def run(x, fn, base, scale, weight):
        if options.rounding == "once":
            arrays = (x, fn, base, scale, weight)
            return ops.mhc_pre(*arrays, c, norm_eps, 1.0 if eps is None else eps, **given)[:3]
        u, h_post, h_res, _ = ops.mhc_pre(x, fn, base, scale, None, c, norm_eps, **given)
        if settings.rounded:
            h_post, h_res = _rounded(h_post, x.dtype), _rounded(h_res, x.dtype)
        return u if eps is None else mx.fast.rms_norm(u, weight, eps), h_post, h_res

    return mx.compile(run) if backend else run


def read(
    hc: Any, prefix: str, settings: Settings, options: Options, x: mx.array, norm: Any
) -> tuple[mx.array, mx.array, Any]:
    """Return u = norm(sum_j h_pre[j] x[j]) ``[..., C]``, and h_post and h_res for the write-back.

    Without a norm u is the sum alone.
    """
    arrays = (hc[prefix + "fn"], hc[prefix + "base"], hc[prefix + "scale"])
    plain = type(norm) is nn.RMSNorm
    weight, eps = (norm["weight"], norm.eps) if plain else (None, None)
    run = _read(_backend(x, options), settings, eps, options)
    if _tokenwise(settings, options, x.shape[1]):
        u, h_post, h_res = _one_by_one(lambda x: run(x, *arrays, weight), x)
    else:
        u, h_post, h_res = run(x, *arrays, weight)
    return u if plain or norm is None else norm(u), h_post, h_res


@functools.cache
def _write_back(backend: str | None, settings: Settings | GatedSettings, options: Options):
    def run(x, y, h_post, h_res):
        return _mixed(x, y, h_post, h_res, settings, options)

    return mx.compile(run) if backend else run


def write_back(
    settings: Settings | GatedSettings,
    options: Options,
    x: mx.array,
    y: mx.array,
    h_post: mx.array,
    h_res: Any,
) -> mx.array:
    """Return out[i] = sum_j h_res[i, j] x[j] + h_post[i] y; h_res may be None, the identity."""
    return _write_back(_backend(x, options), settings, options)(x, y, h_post, h_res)


# ---- the read-out


@functools.cache
def _head(backend: str | None, settings: Settings, options: Options):
    c, norm_eps, given = settings.convention, settings.norm_eps, options.of_ops

    def run(x, fn, base, scale):
        return ops.mhc_head(x, fn, base, scale, c, norm_eps, **given)

    return mx.compile(run) if backend else run


def head(hc: Any, prefix: str, settings: Settings, options: Options, x: mx.array) -> mx.array:
    """Return the learned read-out u = sum_j h_pre[j] x[j] ``[..., C]``."""
    arrays = (hc[prefix + "fn"], hc[prefix + "base"], hc[prefix + "scale"])
    run = _head(_backend(x, options), settings, options)
    if _tokenwise(settings, options, x.shape[1]):
        return _one_by_one(lambda x: run(x, *arrays), x)
    return run(x, *arrays)


# ---- gated residuals: a norm of each stream, two products of low rank, a gate for each channel


def call(linear: Any, x: mx.array) -> mx.array:
    """Return what a linear layer makes of x."""
    return linear(x)


class Products(NamedTuple):
    """How a package computes the products of linear layers, each a function of (layer, x)."""

    low_rank: Callable[[Any, mx.array], mx.array] = call
    inject: Callable[[Any, mx.array], mx.array] = call
    compiled: bool = True  # whether a layer may be a copy, of arrays that are traced


class _Linear(NamedTuple):
    """What a linear layer is beside its arrays: its class, their names, and its constants."""

    kind: Any
    names: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, linear: Any) -> "_Linear | None":
        """Return it for a plain layer, quantised or not; None for an adapted or another one."""
        kind = type(linear)
        if kind is nn.Linear:  # this is called for each layer of each site
            return _FLOAT if len(linear) == 1 else cls(kind, tuple(linear), ())
        if kind is nn.QuantizedLinear:
            group_size, bits, mode = linear.group_size, linear.bits, linear.mode
            return cls(
                kind, tuple(linear), (("group_size", group_size), ("bits", bits), ("mode", mode))
            )
        return None

    def make(self, arrays: list[mx.array]) -> Any:
        """Return a layer with these arrays. Its class's own start would draw random numbers."""
        linear = self.kind.__new__(self.kind)
        nn.Module.__init__(linear)
        linear.biases = None  # some quantised layers have none
        for name, value in (*self.constants, *zip(self.names, arrays, strict=True)):
            setattr(linear, name, value)
        return linear


_FLOAT = _Linear(nn.Linear, ("weight",), ())


@functools.cache
def _pointwise(n: int) -> tuple[Callable, Callable]:
    """Return silu(z / n), rounded once, and 2 sigmoid(z / n) in float32, each one dispatch."""

    def activation(z: mx.array) -> mx.array:
        return nn.silu(z.astype(mx.float32) / n).astype(z.dtype)

    def gate(z: mx.array) -> mx.array:
        return 2 * mx.sigmoid(z.astype(mx.float32) / n)

    return mx.compile(activation), mx.compile(gate)


def _gated_residual(
    state: tuple[Any, Any, Any],
    weight: mx.array,
    linears: list[Any],
    settings: GatedSettings,
    options: Options,
    products: Products,
) -> tuple[mx.array, mx.array, Any]:
    x, y, h_post = state
    down, up, inject = [*linears, None][:3]
    n, given = settings.n, options.of_ops
    activation, gate = _pointwise(n)
    fused = fused_weight(inject)
    arrays = (x, weight.reshape(n, -1), y, h_post, fused)
    out, s, next_post = ops.stream_norm(*arrays, settings.norm_eps, **given)
    v = s.flatten(-2)
    if inject is not None and fused is None:
        next_post = gate(products.inject(inject, v))
    gate_logits = products.low_rank(up, activation(products.low_rank(down, v)))
    u = ops.gate_mix(gate_logits.reshape(s.shape).astype(s.dtype), s, **given)
    return out, u, next_post


@functools.cache
def _compiled_gated_residual(
    backend: str,
    settings: GatedSettings,
    options: Options,
    products: Products,
    kinds: tuple[_Linear, ...],
):
    """Return the function of (state, weight, arrays of each linear layer), compiled."""

    def run(state, weight, arrays):
        made = [kind.make(a) for kind, a in zip(kinds, arrays, strict=True)]
        return _gated_residual(state, weight, made, settings, options, products)

    return mx.compile(run)


def gated_residual(
    hc: Any,
    settings: GatedSettings,
    options: Options,
    x: mx.array,
    y: mx.array | None = None,
    h_post: mx.array | None = None,
    products: Products = Products(),  # noqa: B008
) -> tuple[mx.array, mx.array, Any]:
    """Return out ``[B, L, n, C]``, u ``[B, L, C]`` and h_post ``[B, L, n]`` of a gated residual.

    ``out[j] = x[j] + h_post[j] y``, or x without y. u and the next h_post, which is None without
    INJECT, are what `reference.gated_residual` makes of out. A float INJECT is part of the norm's
    kernel; all other products are those of the module's linear layers.
    """
    if y is not None and y.dtype != x.dtype:  # the package's streams take the wider dtype
        dtype = mx.result_type(x, y)
        x, y = x.astype(dtype), y.astype(dtype)
    weight, linears = hc["hc_norm"]["weight"], [hc[DOWN], hc[UP]]
    inject = hc.get(INJECT)
    if inject is not None:
        linears.append(inject)
    backend = _backend(x, options) if products.compiled else None
    kinds = tuple([_Linear.of(linear) for linear in linears]) if backend else (None,)
    if None in kinds:
        return _gated_residual((x, y, h_post), weight, linears, settings, options, products)
    run = _compiled_gated_residual(backend, settings, options, products, kinds)
    return run((x, y, h_post), weight, [list(linear.values()) for linear in linears])


def clear() -> None:
    """Drop all compiled sites."""
    for cached in (_single_pass, _read, _write_back, _head, _compiled_gated_residual):
        cached.cache_clear()
