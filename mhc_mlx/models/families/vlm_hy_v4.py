"""Hy4 (Hunyuan V4) of mlx-vlm: iHC, in which streams pass a sublayer unchanged.

A site has 2n coefficients, ``hc_fn`` ``[2n, n*C]`` and ``hc_scale`` ``[2]``, and a layer writes
back itself. Its MTP has no streams: it reads the states that the read-out has merged.
"""

import functools
import importlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...conventions import HUNYUAN_V4
from .. import gradients, run
from ..family import Family, Options, Outputs, Settings, Site, check_whole, module_of

stock: Any = importlib.import_module("mlx_vlm.models.hy_v4.hyper_connection")
language: Any = importlib.import_module("mlx_vlm.models.hy_v4.language")
PREFIX, HEAD = "hc_", "hc_head_"


@functools.cache
def _settings(n: int, hc_eps: float, magnitude: float, norm_eps: float) -> Settings:
    """Settings of mlx-vlm's own: it has no post_eps, which transformers' Hy4 has."""
    return Settings(n, replace(HUNYUAN_V4, pre_eps=hc_eps, post_scale=magnitude), norm_eps)


class PatchedConnection(stock.IdentityHyperConnectionPre):
    """This is what mlx-vlm's connection reads, on these kernels, with the same parameters."""

    def sublayer(self, x: mx.array, norm: Any, branch: Any) -> tuple[mx.array, Any]:
        """Return the streams after a sublayer, and the second result of its branch."""
        settings, options = FAMILY.settings(self), self._mhc.sites[PREFIX]
        u, h_post, h_res = run.read(self, PREFIX, settings, options, x, norm)
        y, other = branch(u)
        run.note(self, PREFIX, x, y)
        return run.write_back(settings, options, x, y, h_post, h_res), other

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return what is read, and post."""
        options = self._mhc.sites[PREFIX]
        return run.read(self, PREFIX, FAMILY.settings(self), options, x, None)[:2]


class PatchedHead(stock.IdentityHyperHead):
    """This is mlx-vlm's read-out on these kernels, with the same parameters."""

    def __call__(self, x: mx.array) -> mx.array:
        run.note(self, HEAD, x, x[..., 0, :])
        return run.head(self, HEAD, FAMILY.settings(self), self._mhc.sites[HEAD], x)


def _sublayer(hc: Any, x: mx.array, norm: Any, branch: Any) -> tuple[mx.array, Any]:
    """Return what `PatchedConnection.sublayer` returns, by mlx-vlm's functions if hc is its own."""
    if isinstance(hc, PatchedConnection):
        return hc.sublayer(x, norm, branch)
    u, post = hc(x)
    y, other = branch(norm(u))
    return stock.hc_expand(y, x, post), other


class PatchedLayer(language.HyV4DecoderLayer):
    """This is mlx-vlm's layer, which leaves the write-back to its connections."""

    def __call__(
        self, h: mx.array, mask: Any = None, cache: Any = None, prev_topk_indices: Any = None
    ) -> tuple[mx.array, Any]:
        def attention(u: mx.array) -> tuple[mx.array, Any]:
            return self.self_attn(u, mask, cache, prev_topk_indices)

        def mlp(u: mx.array) -> tuple[mx.array, None]:
            return self.mlp(u), None

        h, topk_indices = _sublayer(self.hc_attn_layer.hc_pre, h, self.input_layernorm, attention)
        h, _ = _sublayer(self.hc_mlp_layer.hc_pre, h, self.post_attention_layernorm, mlp)
        return h, topk_indices


DifferentiableHyV4Indexer = gradients.choosing(language.HyV4Indexer, __name__)
DifferentiableHyV4Attention = gradients.given_constant(
    language.HyV4Attention, "prev_topk_indices", __name__
)


class HyV4(Family):
    package = "mlx-vlm"
    layers = {language.HyV4DecoderLayer: PatchedLayer}
    connections = {
        stock.IdentityHyperConnectionPre: PatchedConnection,
        stock.IdentityHyperHead: PatchedHead,
    }
    trained = {
        language.HyV4Indexer: DifferentiableHyV4Indexer,
        language.HyV4Attention: DifferentiableHyV4Attention,
    }

    def check_model(self, op: str, model: nn.Module) -> None:
        check_whole(op, module_of(model, language.HyV4Model)[1])

    def sites(self, model: nn.Module) -> list[Site]:
        (prefix, body), found = module_of(model, language.HyV4Model), []
        for k, layer in enumerate(body.layers):
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            for part, norm in zip(("hc_attn_layer", "hc_mlp_layer"), norms, strict=True):
                name = f"{prefix}layers.{k}.{part}.hc_pre.hc"
                found.append(Site(self, name, layer[part].hc_pre, norm, PREFIX))
        head = Site(self, f"{prefix}hc_head.hc_head", body.hc_head, None, HEAD, "head")
        return [*found, head]

    def settings(self, hc: Any) -> Settings:
        magnitude = getattr(hc, "hc_magnitude", HUNYUAN_V4.post_scale)  # a read-out has none
        return _settings(hc.hc_mult, hc.hc_eps, magnitude, hc.norm_eps)

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        hc, norm, settings = site.hc, site.norm, self.settings(site.hc)
        if site.kind == "head":
            if options is None:
                return {"u": stock.IdentityHyperHead.__call__(hc, x)}
            return {"u": run.head(hc, HEAD, settings, options, x)}
        if options is None:
            u, h_post = stock.IdentityHyperConnectionPre.__call__(hc, x)
            u = u if norm is None else norm(u)
            out = stock.hc_expand(u if y is None else y, x, h_post)
        else:
            u, h_post, h_res = run.read(hc, PREFIX, settings, options, x, norm)
            out = run.write_back(settings, options, x, u if y is None else y, h_post, h_res)
        return {"u": u, "h_post": h_post, "out": out}

    def new_site(self, d: int) -> Site:
        config = language.ModelConfig(hidden_size=d, num_hidden_layers=1)
        norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        return Site(self, "new.hc", stock.IdentityHyperConnectionPre(config), norm, PREFIX)

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        sizes: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": layers}
        sizes |= {"vocab_size": 1024, "num_attention_heads": 8, "q_lora_rank": 256}
        sizes |= {"moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2}
        sizes |= {"kv_lora_rank": 128, "v_head_dim": 64, "qk_nope_head_dim": 64}
        sizes |= {"qk_rope_head_dim": 32, "index_n_heads": 4, "index_head_dim": 64}
        sizes |= {"intermediate_size": 512, "first_k_dense_replace": 1}
        sizes |= {"indexer_types": ["full"] * layers}
        return language.LanguageModel(language.ModelConfig(**sizes))


FAMILY = HyV4()
