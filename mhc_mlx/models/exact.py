"""A site in float64 NumPy, and the errors of the patched site and of the package's against it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np  # each of these packages needs it

from ..conventions import Convention
from .family import Options, Outputs, Site


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
    """
    both = site_token_errors(site, options, x, y, repeats)
    ours, theirs = (Errors((k, float(a.max())) for k, a in found.items()) for found in both)
    return ours, theirs


def spread(site: Site, deviation: float) -> Site:
    """Return the site with scales at which its random logits have this deviation, in float32.

    A part whose fn is zero keeps its scale.
    """
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
