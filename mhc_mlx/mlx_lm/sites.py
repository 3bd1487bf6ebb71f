"""The sites of mlx-lm's DeepSeek V4.1, run by these kernels or by mlx-lm's own functions.

The import checks the version of mlx-lm. `find_sites` lists the sites of a model, and `activations`
returns their inputs in a forward pass.
"""

import functools
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

from .. import launch, ops
from ..conventions import DEEPSEEK_V4, Convention
from ..ops.checks import check_bools

OLDEST, BEFORE = (0, 32, 2), (0, 33)
MODELS = "deepseek_v41 of mlx-lm >=0.32.2,<0.33"


def _check_version(found: str) -> None:
    if not OLDEST <= tuple(map(int, re.findall(r"\d+", found)[:3])) < BEFORE:
        raise ImportError(f"[mhc_mlx.mlx_lm] the model must be {MODELS} but mlx-lm is {found}.")


_check_version(mlx_lm.__version__)

from mlx_lm.models import deepseek_v41 as stock  # noqa: E402, older versions lack it


@functools.cache
def convention(iters: int, eps: float) -> Convention:
    """Return DEEPSEEK_V4 with a model's iterations and eps."""
    return replace(DEEPSEEK_V4, iters=iters, eps=eps, pre_eps=eps)


def _fusable_weight(norm: Any, dtype: mx.Dtype) -> mx.array | None:
    """Return the weight if norm is an nn.RMSNorm that the op can apply for this output dtype."""
    if type(norm) is not nn.RMSNorm or not norm.eps > 0:
        return None
    weight = norm["weight"]  # access by attribute would take a microsecond
    return weight if dtype == mx.float32 or weight.dtype == dtype else None


SiteOutputs = tuple[mx.array, mx.array | Any, mx.array]  # out, u (which may be None), h_pre


@functools.cache
def _site(
    backend: str | None,
    reads: bool,
    iters: int,
    hc_eps: float,
    norm_eps: float,
    eps: float,
    use_metal: bool,
    differentiable: bool,
) -> Callable[..., SiteOutputs]:
    """Return the function of (x, y, fn, base, scale, weight) that computes a site.

    u is None unless ``reads``; with a weight it is normalised. All sites with the same constants
    share the function. With a backend it is compiled: MLX traces it once for each shape, stream and
    thread, and each trace keeps the source of its launches, about 50 KB (see `_recurs`).
    """
    options = {"use_metal": use_metal, "differentiable": differentiable}
    settings = convention(iters, hc_eps), norm_eps

    def run(x, y, fn, base, scale, weight) -> SiteOutputs:
        if reads and y.dtype == x.dtype:
            arrays = (x, y, fn, base, scale, weight)
            return ops.mhc_single_pass(*arrays, *settings, eps, round_aggregate=True, **options)
        h_pre, h_post, h_res = ops.mhc_coefficients(x, fn, base, scale, *settings, **options)
        # Where the dtypes of x and y differ, mlx-lm rounds only the sum.
        dtype = x.dtype if y.dtype == x.dtype else mx.float32
        out = ops.stream_mix_add(x.astype(dtype), y.astype(dtype), h_post, h_res, **options)
        out = out.astype(x.dtype)
        return out, ops.stream_aggregate(out, h_pre, **options) if reads else None, h_pre

    return mx.compile(run) if backend else run


def _recurs(length: int) -> bool:
    """Tell whether a number of tokens is likely to recur: in decoding, or as a full prompt chunk.

    The last chunk of a prompt may have any length, and a trace of each would fill the memory.
    """
    return length <= 64 or length % 256 == 0


class SinglePassConnection(stock.HyperConnection):
    """This is mlx-lm's HyperConnection on these kernels.

    It has the same parameters: ``fn [n*n + 2n, n*C]``, ``base [n*n + 2n]`` and ``scale [3]``.

    Attributes:
        use_metal: Whether kernels run where the default device has them.
        differentiable: Whether the site has a gradient.
    """

    use_metal: bool
    differentiable: bool

    def _check_options(self) -> None:
        options = {"use_metal": self.use_metal, "differentiable": self.differentiable}
        check_bools("SinglePassConnection", **options)

    def __call__(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return pre, post and comb as mlx-lm does, float32; a row of comb is an input stream."""
        self._check_options()
        coefficients: Any = ops.mhc_coefficients(
            *(streams, self.fn, self.base, self.scale),
            *(convention(self.iters, self.hc_eps), self.norm_eps),
            use_metal=self.use_metal,
            differentiable=self.differentiable,
        )
        h_pre, h_post, h_res = coefficients
        return h_pre, h_post, h_res.swapaxes(-1, -2)

    def site(self, x: mx.array, y: mx.array, norm: Any) -> SiteOutputs:
        """Return out ``[..., n, C]``, u ``[..., C]`` (None without a norm) and h_pre ``[..., n]``.

        out[i] = sum_j h_res[i, j] x[j] + h_post[i] y and u = norm(sum_i h_pre[i] out[i]).
        """
        self._check_options()
        weight = _fusable_weight(norm, x.dtype) if y.dtype == x.dtype else None
        fuses_norm = weight is not None
        compiles = self.use_metal and not self.differentiable and x.size > 0
        run = _site(
            *(
                launch.backend() if compiles and _recurs(x.shape[-3]) else None,
                norm is not None,
            ),
            *(self.iters, self.hc_eps, self.norm_eps, norm.eps if fuses_norm else 1.0),
            *(self.use_metal, self.differentiable),
        )
        out, u, h_pre = run(x, y, self["fn"], self["base"], self["scale"], weight)
        return out, u if fuses_norm or norm is None else norm(u), h_pre


def stock_coefficients(hc: Any) -> Callable[..., Any]:
    """Return mlx-lm's function of streams to coefficients, with the parameters of hc."""
    return functools.partial(stock.HyperConnection.__call__, hc)


def stock_site(hc: Callable[..., Any], x: mx.array, y: mx.array, norm: Any) -> SiteOutputs:
    """Return what `SinglePassConnection.site` returns, by mlx-lm's functions."""
    h_pre, h_post, comb = hc(x)
    out = stock._expand(y, x, h_post, comb)
    return out, None if norm is None else norm(stock._collapse(out, h_pre)), h_pre


# While `activations` runs in this thread, it has x and y by the id of a site's module.
_seen: ContextVar[dict | None] = ContextVar("seen", default=None)


def run_site(hc: nn.Module, x: mx.array, y: mx.array, norm: Any) -> SiteOutputs:
    """Run a site by its module, which is patched or mlx-lm's, and tell `activations` of it."""
    if (seen := _seen.get()) is not None:
        seen[id(hc)] = (x, y)
    if isinstance(hc, SinglePassConnection):
        return hc.site(x, y, norm)
    return stock_site(hc, x, y, norm)


class Site(NamedTuple):
    """A site is a hyper-connection with its name and the norm of the sublayer that reads next."""

    name: str
    hc: Any  # mlx-lm's HyperConnection or a SinglePassConnection
    norm: Any  # a module, or None at the end of a pipeline stage


def text_model(op: str, model: nn.Module) -> stock.TextModel:
    """Return the text model of a deepseek_v41; TypeError for other models."""
    if not isinstance(model, stock.Model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"[{op}] model must be a {MODELS} but got {kind}.")
    return model.model


def stage_layers(text: stock.TextModel) -> list[stock.DecoderLayer]:
    """Return the layers of this pipeline stage: mlx-lm has None in place of others."""
    return [layer for layer in text.layers if layer is not None]


def find_sites(text: stock.TextModel) -> list[Site]:
    """Return the sites of this pipeline stage, in the order in which they run."""
    sites, layers = [], stage_layers(text)
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        name = f"model.layers.{layer.layer_idx}"
        sites.append(Site(f"{name}.attn_hc", layer.attn_hc, layer.post_attention_layernorm))
        sites.append(Site(f"{name}.ffn_hc", layer.ffn_hc, after and after.input_layernorm))
    return sites


def activations(model: nn.Module, sites: list[Site], tokens: mx.array, keep: int = 8) -> list:
    """Return x and y of each site in a forward pass over tokens ``[batch, length]``.

    They are those of the last ``keep`` tokens of the first sequence.
    """
    seen = {}
    token = _seen.set(seen)
    try:
        logits = model(tokens)
    finally:
        _seen.reset(token)
    found = [tuple(a[:1, -keep:] for a in seen[id(site.hc)]) for site in sites]
    mx.eval(logits, found)
    return found
