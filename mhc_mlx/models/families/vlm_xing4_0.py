"""Xing 4 of mlx-vlm: eps in every sum of Sinkhorn-Knopp, of logits that are clipped.

In 16 bits mlx-vlm rounds x / rms(x), the parameters ``hc_fn`` and their product, then the
coefficients, and each term of what is read and written. Here the logits, h_pre and all sums stay in
float32, so that streams are read once and rounded once; h_post and h_res are rounded as there.
"""

import functools
import importlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...conventions import XING
from .. import run
from ..family import Family, Options, Outputs, Settings, Site, check_whole, module_of

stock: Any = importlib.import_module("mlx_vlm.models.xing4_0.language")
config: Any = importlib.import_module("mlx_vlm.models.xing4_0.config")
PREFIX = "hc_"


@functools.cache
def _settings(
    n: int, iters: int, hc_eps: float, low: float, high: float, norm_eps: float
) -> Settings:
    c = replace(XING, iters=iters, eps=hc_eps, clamp=(low, high))
    return Settings(n, c, norm_eps, rounded=True)


def _write_back(x: mx.array, y: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """Return what mlx-vlm's layer writes."""
    return post[..., None] * y[:, :, None] + comb @ x


class PatchedConnection(stock.HyperConnection):
    """This is mlx-vlm's HyperConnection on these kernels, with the same parameters."""

    def sublayer(self, x: mx.array, norm: Any, branch: Any) -> mx.array:
        """Return the streams after a sublayer, in the wider of the dtypes of x and y."""
        settings, options = FAMILY.settings(self), self._mhc.sites[PREFIX]
        u, h_post, h_res = run.read(self, PREFIX, settings, options, x, norm)
        y = branch(u)
        run.note(self, PREFIX, x, y)
        x = x if y.dtype == x.dtype else x.astype(mx.result_type(x, y))
        return run.write_back(settings, options, x, y, h_post, h_res)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return post, comb and what is read."""
        options = self._mhc.sites[PREFIX]
        u, h_post, h_res = run.read(self, PREFIX, FAMILY.settings(self), options, x, None)
        return h_post.astype(x.dtype), h_res.astype(x.dtype), u


def _sublayer(hc: Any, x: mx.array, norm: Any, branch: Any) -> mx.array:
    """Return the streams after a sublayer, by mlx-vlm's functions if hc is its own."""
    if isinstance(hc, PatchedConnection):
        return hc.sublayer(x, norm, branch)
    post, comb, u = hc(x)
    return _write_back(x, branch(norm(u)), post, comb)


class PatchedLayer(stock.DecoderLayer):
    """This is mlx-vlm's layer, which leaves the write-back to its connections."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        def attention(u: mx.array) -> mx.array:
            return self.self_attn(u, mask, cache)

        x = _sublayer(self.attn_hc, x, self.input_layernorm, attention)
        return _sublayer(self.ffn_hc, x, self.post_attention_layernorm, self.mlp)


class Xing(Family):
    """Its choice of experts passes no gradient in mlx-vlm either, so that nothing is `trained`."""

    package = "mlx-vlm"
    layers = {stock.DecoderLayer: PatchedLayer}
    connections = {stock.HyperConnection: PatchedConnection}

    def check_model(self, op: str, model: nn.Module) -> None:
        check_whole(op, module_of(model, stock.Xing4_0Model)[1])

    def sites(self, model: nn.Module) -> list[Site]:
        (prefix, body), found = module_of(model, stock.Xing4_0Model), []
        for k, layer in enumerate(body.layers):
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            for part, norm in zip(("attn_hc", "ffn_hc"), norms, strict=True):
                name = f"{prefix}layers.{k}.{part}.hc"
                found.append(Site(self, name, layer[part], norm, PREFIX))
        return found

    def settings(self, hc: Any) -> Settings:
        c = hc.config
        clamp = (c.mhc_h_res_clamp_min, c.mhc_h_res_clamp_max)
        return _settings(c.hc_mult, c.hc_sinkhorn_iters, c.hc_eps, *clamp, c.rms_norm_eps)

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        hc, norm = site.hc, site.norm
        if options is None:
            h_post, h_res, u = stock.HyperConnection.__call__(hc, x)
            u = u if norm is None else norm(u)
            out = _write_back(x, u if y is None else y, h_post, h_res)
        else:
            settings = self.settings(hc)
            u, h_post, h_res = run.read(hc, PREFIX, settings, options, x, norm)
            out = run.write_back(settings, options, x, u if y is None else y, h_post, h_res)
        return {"u": u, "h_post": h_post, "h_res": h_res, "out": out}

    def new_site(self, d: int) -> Site:
        sizes = config.ModelConfig(hidden_size=d, num_hidden_layers=1)
        norm = nn.RMSNorm(d, eps=sizes.rms_norm_eps)
        return Site(self, "new.hc", stock.HyperConnection(sizes), norm, PREFIX)

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        sizes: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": layers}
        sizes |= {"vocab_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
        sizes |= {"moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2}
        sizes |= {"q_lora_rank": 256, "kv_lora_rank": 128, "v_head_dim": 64}
        sizes |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "intermediate_size": 512}
        sizes |= {"first_k_dense_replace": 1}
        return stock.LanguageModel(config.ModelConfig(**sizes))


FAMILY = Xing()
