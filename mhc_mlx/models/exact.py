"""A site in float64 NumPy, and the errors of the patched site and of the package's against it."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np  # each of these packages needs it

from ..conventions import Convention
from .family import DOWN, INJECT, NEXT, UP, GatedSite, Options, Outputs, Site


def random_inputs(
    site: Site, dtype: mx.Dtype, tokens: int, seed: int = 0
) -> tuple[mx.array, mx.array]:
    """Return random streams x ``[1, tokens, n, C]`` and y ``[1, tokens, C]``.

    y is normal with deviation 1, and a stream of a token with deviation exp(z), z normal.
    """
    n, C = site.size
    kx, ks, ky = mx.random.split(mx.random.key(seed), 3)
    scale = mx.exp(mx.random.normal((1, tokens, n, 1), key=ks))
    x = mx.random.normal((1, tokens, n, C), key=kx) * scale
    return x.astype(dtype), mx.random.normal((1, tokens, C), key=ky).astype(dtype)


def in_float32(a: Any) -> Any:
    """Return floats as float32, and all else as it is."""
    return a.astype(mx.float32) if a is not None and mx.issubdtype(a.dtype, mx.floating) else a


def _float64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))  # near 0 the form with tanh has only absolute precision


def _mixing(z: np.ndarray, c: Convention) -> np.ndarray:
    """Return h_res, row = output, of logits ``[..., n, n]``."""
    axes = {"rows": (-1, -2), "columns": (-2, -1)}[c.first]
    if c.clamp is not None:
        z = np.clip(z, *c.clamp)
    done = 1
    if c.start == "softmax":
        p = np.exp(z - z.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True) + c.eps
    elif c.start == "exp":
        for axis in axes:
            most = z.max(axis, keepdims=True)
            z = z - most - np.log(np.exp(z - most).sum(axis, keepdims=True))
        p, done = np.exp(z), 2
    elif c.start == "exp_plain":
        p, done = np.exp(z - z.max(axes[0], keepdims=True)), 0
    else:
        must = "be softmax, exp or exp_plain"
        raise ValueError(f"[exact] convention.start must {must} but got {c.start}.")
    for k in range(done, 2 * c.iters):
        p = p / (p.sum(axes[k % 2], keepdims=True) + c.eps)
    return np.swapaxes(p, -1, -2) if c.transposed else p


def _normed(u: np.ndarray, norm: Any) -> np.ndarray:
    return u / np.sqrt((u * u).mean(-1, keepdims=True) + norm.eps) * _float64(norm.weight)


def exact(site: Site, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a site computes, by name in float64.

    u is there if it has no norm or the norm is an nn.RMSNorm; of the lagged kind if it has one.
    """
    if isinstance(site, GatedSite):
        return _gated(site, x, y)
    settings, (n, _) = site.settings, site.size
    c = settings.convention
    fn, base, scale = map(_float64, site.arrays)
    v = x.reshape(*x.shape[:-2], -1)
    v = v / np.sqrt((v * v).mean(-1, keepdims=True) + settings.norm_eps)
    if site.kind == "head":
        h_pre = _sigmoid((v @ fn.T) * scale + base) + c.pre_eps
        return {"u": (h_pre[..., None] * x).sum(-2)}
    parts = np.split(np.arange(len(fn)), [n, 2 * n])
    z = (v @ fn.T) * np.repeat(scale, [len(p) for p in parts][: len(scale)]) + base
    gate = _sigmoid(z[..., : 2 * n])
    h_pre, h_post = gate[..., :n] + c.pre_eps, c.post_scale * gate[..., n:] + c.post_eps
    out = h_post[..., None] * y[..., None, :]
    found = {"h_pre": h_pre} if site.kind == "lagged" else {"h_post": h_post}
    if c.res_size(n):
        h_res = _mixing(z[..., 2 * n :].reshape(*z.shape[:-1], n, n), c)
        out = out + h_res @ x
        found |= {} if site.kind == "lagged" else {"h_res": h_res}
    else:
        out = out + x
    u = (h_pre[..., None] * (out if site.kind == "lagged" else x)).sum(-2)
    if type(site.norm) is nn.RMSNorm:
        found["u"] = _normed(u, site.norm)
    elif site.norm is None and site.kind != "lagged":
        found["u"] = u
    return found | {"out": out}


def _product(linear: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the product of a linear layer, which may be quantised or adapted.

    It is in float64 for MLX's layers, with LoRA or without. Others compute it in float32, here on
    the CPU, because a GPU may round more in products.
    """
    if type(linear) is nn.Linear and "bias" not in linear:
        matrix = _float64(linear["weight"]).T
    elif type(linear) is nn.QuantizedLinear and "bias" not in linear:
        scales, biases = (in_float32(linear.get(k)) for k in ("scales", "biases"))
        given = linear.group_size, linear.bits, linear.mode
        matrix = _float64(mx.dequantize(linear["weight"], scales, biases, *given)).T
    elif {*linear} == {"linear", "dropout", "lora_a", "lora_b"}:
        base, a, b = (
            _product(linear["linear"]),
            *map(_float64, (linear["lora_a"], linear["lora_b"])),
        )
        return lambda v: base(v) + linear.scale * (v @ a @ b)
    else:

        def product(v: np.ndarray) -> np.ndarray:
            with mx.stream(mx.cpu):
                return _float64(linear(mx.array(v.astype(np.float32))))

        return product
    return lambda v: v @ matrix


def _gated(site: Site, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a gated residual reads, the write-back, and what it reads of the result."""
    hc, (n, C) = site.hc, site.size
    weight = 1 + _float64(hc.hc_norm["weight"]).reshape(n, C)
    down, up = _product(hc[DOWN]), _product(hc[UP])
    inject = _product(hc[INJECT]) if INJECT in hc else None

    def read(x: np.ndarray) -> dict[str, np.ndarray]:
        s = x / np.sqrt((x * x).mean(-1, keepdims=True) + site.settings.norm_eps) * weight
        v = s.reshape(*s.shape[:-2], n * C)
        z = down(v) / n
        gate = _sigmoid(up(z * _sigmoid(z))).reshape(s.shape)
        found = {"u": (gate * s).mean(-2)}
        return found if inject is None else found | {"h_post": 2 * _sigmoid(inject(v) / n)}

    found = read(x)
    if inject is None:
        return found
    out = x + found["h_post"][..., None] * y[..., None, :]
    return found | {"out": out} | {f"{NEXT}{k}": a for k, a in read(out).items()}


def token_errors(got: mx.array, want: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Return the largest error of each token of arrays ``[1, L, ...]``.

    Errors are in units in the last place of the largest value of a row in dtype.
    """
    power = np.exp2(np.floor(np.log2(np.abs(want).max(-1, keepdims=True) + 1e-300)))
    ulps = np.abs(_float64(got) - want) / (power * mx.finfo(dtype).eps)
    return np.where(np.isnan(ulps), np.inf, ulps).reshape(want.shape[1], -1).max(-1)


class Errors(dict[str, float]):
    """Errors of a site's outputs by name."""

    @property
    def worst(self) -> str:
        """Return the name of the output with the largest error."""
        return max(self, key=self.__getitem__)

    @property
    def most(self) -> float:
        """Return the largest error."""
        return self[self.worst]


def site_token_errors(
    site: Site, options: Options | None, x: mx.array, y: mx.array, repeats: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the errors of each token by a site's outputs, as `site_errors` does their largest."""
    want = exact(site, _float64(x), _float64(y))
    want = {k: np.concatenate([a] * repeats, 1) for k, a in want.items()}
    tiled = mx.tile(x, (1, repeats, 1, 1)), mx.tile(y, (1, repeats, 1))

    def errors(outputs: Outputs) -> dict[str, np.ndarray]:
        return {k: token_errors(outputs[k], a, x.dtype) for k, a in want.items()}

    theirs = errors(site.outputs(None, *tiled))
    return theirs if options is None else errors(site.outputs(options, *tiled)), theirs


def site_errors(
    site: Site, options: Options | None, x: mx.array, y: mx.array, repeats: int = 1
) -> tuple[Errors, Errors]:
    """Return the largest errors of a site's outputs with these options, and by the package's code.

    They are in units in the last place of x's dtype. One call runs ``repeats`` copies of x and y.
    What a gated residual reads of its own write-back is left out: it depends on how that rounds.
    """
    both = site_token_errors(site, options, x, y, repeats)
    ours, theirs = (
        Errors((k, float(a.max())) for k, a in found.items() if not k.startswith(NEXT))
        for found in both
    )
    return ours, theirs


def spread(site: Site, deviation: float) -> Site:
    """Return the site with scales at which its random logits have this deviation, in float32.

    A part whose fn is zero keeps its scale.
    """
    if isinstance(site, GatedSite):
        return _spread_gated(site, deviation)
    fn, base, scale = site.arrays
    n, _ = site.size
    rows = mx.sqrt(mx.square(fn.astype(mx.float32)).sum(-1))  # deviation of a row's phi product
    parts = [rows] if site.kind == "head" else mx.split(rows, [n, 2 * n])
    scales = []
    for part, old in zip(parts, scale.astype(mx.float32), strict=False):
        most = mx.sqrt(mx.mean(mx.square(part)))
        scales.append(mx.where(most > 0, mx.sign(old + (old == 0)) * deviation / most, old))
    weight = site.norm["weight"] if type(site.norm) is nn.RMSNorm else None
    fn, base = fn.astype(mx.float32), base.astype(mx.float32)
    weight = None if weight is None else weight.astype(mx.float32)
    return site.with_arrays(fn, base, mx.stack(scales), weight)


def _to_deviation(linear: Any, inputs: mx.array, deviation: float) -> mx.array:
    """Scale a linear layer so that its outputs have this deviation, and return them.

    One that is adapted, or whose scales are no floats, stays as it is.
    """
    outputs = linear(inputs)
    names = {nn.Linear: ["weight"], nn.QuantizedLinear: ["scales", "biases"]}.get(type(linear), [])
    found = mx.std(outputs)
    factor = mx.where(found > 0, deviation / mx.maximum(found, 1e-30), 1.0)
    if not names or any(linear.get(k) is None or linear[k].dtype != mx.float32 for k in names):
        return outputs
    for name in names:
        linear[name] = linear[name] * factor
    return outputs * factor


def _spread_gated(site: GatedSite, deviation: float) -> Site:
    """As `spread`: logits of gates and of h_post deviate so, and those of the silu by 2."""
    large, (n, C) = site.with_arrays(*map(in_float32, site.arrays)), site.size
    hc, random = large.hc, mx.random.normal((64, n * C), key=mx.random.key(0))
    v = random * (1 + hc.hc_norm["weight"])
    z = _to_deviation(hc[DOWN], v, 2.0 * n) / n
    _to_deviation(hc[UP], z * mx.sigmoid(z), deviation)
    if INJECT in hc:
        _to_deviation(hc[INJECT], v, deviation * n)
    return large
