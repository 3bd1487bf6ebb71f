"""A site in float64 NumPy, and the errors of the patched site and of mlx-lm's against it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np  # mlx-lm needs it

from .sites import Site, SiteOutputs, run_site, stock, stock_coefficients, stock_site


def streams_dtype(text: stock.TextModel) -> mx.Dtype:
    """Return the dtype of the model's streams, which is that of its embeddings."""
    return text.embed_tokens(mx.zeros((1, 1), mx.int32)).dtype


def random_inputs(
    site: Site, dtype: mx.Dtype, tokens: int, seed: int = 0
) -> tuple[mx.array, mx.array]:
    """Return random streams x ``[1, tokens, n, C]`` and y ``[1, tokens, C]``.

    y is normal with deviation 1, and a stream of a token with deviation exp(z), z normal.
    """
    n, C = site.hc.hc, site.hc.fn.shape[1] // site.hc.hc
    kx, ks, ky = mx.random.split(mx.random.key(seed), 3)
    scale = mx.exp(mx.random.normal((1, tokens, n, 1), key=ks))
    x = mx.random.normal((1, tokens, n, C), key=kx) * scale
    return x.astype(dtype), mx.random.normal((1, tokens, C), key=ky).astype(dtype)


def _float64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def _exact(site: Site, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return out, h_pre and, if the norm is an nn.RMSNorm, u, by name in float64."""
    hc, n = site.hc, site.hc.hc
    fn, base, scale = map(_float64, (hc.fn, hc.base, hc.scale))
    v = x.reshape(*x.shape[:-2], -1)
    v = v / np.sqrt((v * v).mean(-1, keepdims=True) + hc.norm_eps)
    z = (v @ fn.T) * np.repeat(scale, (n, n, n * n)) + base
    gate = 0.5 * (1 + np.tanh(z[..., : 2 * n] / 2))  # the sigmoid
    z = z[..., 2 * n :].reshape(*z.shape[:-1], n, n)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True) + hc.hc_eps
    for k in range(2 * hc.iters - 1):
        p = p / (p.sum(-1 if k % 2 else -2, keepdims=True) + hc.hc_eps)
    h_pre, h_post = gate[..., :n] + hc.hc_eps, 2 * gate[..., n:]
    out = np.swapaxes(p, -1, -2) @ x + h_post[..., None] * y[..., None, :]
    u = (h_pre[..., None] * out).sum(-2)
    outputs = {"out": out, "h_pre": h_pre}
    if type(site.norm) is nn.RMSNorm:
        r = np.sqrt((u * u).mean(-1, keepdims=True) + site.norm.eps)
        outputs["u"] = u / r * _float64(site.norm.weight)
    return outputs


def _error(got: mx.array, want: np.ndarray, dtype: mx.Dtype) -> float:
    """Return the largest error, in units in the last place of its row's largest value in dtype."""
    power = np.exp2(np.floor(np.log2(np.abs(want).max(-1, keepdims=True) + 1e-300)))
    ulps = np.abs(_float64(got) - want) / (power * mx.finfo(dtype).eps)
    return float("inf") if np.isnan(ulps).any() else float(ulps.max())


def site_errors(site: Site, x: mx.array, y: mx.array, repeats: int = 1) -> tuple[float, float]:
    """Return the largest errors of a site's outputs, as it runs now and by mlx-lm's functions.

    They are in units in the last place of x's dtype. One call runs ``repeats`` copies of x and y.
    """
    want = _exact(site, _float64(x), _float64(y))
    x, y = mx.tile(x, (1, repeats, 1, 1)), mx.tile(y, (1, repeats, 1))

    def largest(outputs: SiteOutputs) -> float:
        got: dict[str, Any] = dict(zip(("out", "u", "h_pre"), outputs, strict=True))
        exact = {k: np.concatenate([a] * repeats, 1) for k, a in want.items()}
        return max(_error(got[k], a, x.dtype) for k, a in exact.items())

    ours = run_site(site.hc, x, y, site.norm)
    theirs = stock_site(stock_coefficients(site.hc), x, y, site.norm)
    return largest(ours), largest(theirs)
