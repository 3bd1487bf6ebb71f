"""DeepSeek V4.1 of mlx-vlm: lagged sites, two in each block, whose parameters the block holds.

Between a layer and one with engram the streams change after the first has written them. There the
second layer reads them itself; everywhere else a site makes what the next sublayer reads.
"""

import functools
import importlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...conventions import DEEPSEEK_V4
from .. import gradients, graph, run
from ..family import Family, Options, Outputs, Owner, Settings, Site

stock: Any = importlib.import_module("mlx_vlm.models.deepseek_v41.language")
engram: Any = importlib.import_module("mlx_vlm.models.deepseek_v41.engram")
ATTN, FFN = "hc_attn_", "hc_ffn_"


@functools.cache
def _settings(n: int, iters: int, hc_eps: float, norm_eps: float) -> Settings:
    c = replace(DEEPSEEK_V4, iters=iters, eps=hc_eps, pre_eps=hc_eps)
    return Settings(n, c, norm_eps, out_of_y=True)


def _collapse(x: mx.array, h_pre: mx.array) -> mx.array:
    return stock.DeepseekV41Block.hc_pre(x, h_pre)


def stock_site(block: Any, prefix: str, x: mx.array, y: mx.array, norm: Any) -> tuple:
    """Return what `run.single_pass` returns, by mlx-vlm's functions."""
    fn, base, scale = (block[prefix + k] for k in ("fn", "base", "scale"))
    h_pre, h_post, comb = stock.DeepseekV41Block.hc_mixes(block, x, fn, scale, base)
    out = stock.hc_expand(y, x, h_post, comb)
    return out, None if norm is None else norm(_collapse(out, h_pre)), h_pre


_HANDED = "_mhc_handed"  # the attribute of a cache with (layer_idx, streams, u)


class SinglePassBlock(stock.DeepseekV41Block):
    """This is mlx-vlm's block, in which each site runs when its sublayer ends.

    The second site makes the u of the next block and leaves it in the cache, which belongs to one
    generation. That block takes it from there if it gets the same streams; otherwise it makes u
    from streams and pre_mix, as mlx-vlm does.
    """

    _owner: Owner

    def _next(self) -> Any:
        """Return the next block if it is patched and reads the streams as this one leaves them."""
        layers, k = self._owner.layers, self.layer_idx + 1
        after = layers[k] if k < len(layers) else None
        return after if isinstance(after, SinglePassBlock) and after.engram is None else None

    def _site(self, prefix: str, x: mx.array, y: mx.array, norm: Any) -> tuple:
        run.note(self, prefix, x, y)
        options = self._mhc.sites.get(prefix)
        if options is None:
            return stock_site(self, prefix, x, y, norm)
        return run.single_pass(self, prefix, FAMILY.settings(self), options, x, y, norm)

    def __call__(
        self, h: mx.array, pre_mix: mx.array, image_mask: mx.array | None, cache: Any
    ) -> tuple[mx.array, mx.array]:
        if type(self).__call__ is not _BLOCK_CALL:
            raise ValueError(
                "[patch] layers must not be under mlx-vlm's grad_checkpoint but are: blocks of "
                "deepseek_v41 share arrays by their cache, which it does not see."
            )
        layer_idx, streams, u = vars(cache).pop(_HANDED, (None, None, None))
        if layer_idx != self.layer_idx or streams is not h:
            u = self.attn_norm(_collapse(h, pre_mix))
        h, u, _ = self._site(ATTN, h, self.attn(u, cache), self.ffn_norm)
        after = self._next()
        norm = None if after is None else after.attn_norm
        h, u, pre_mix = self._site(FFN, h, self.ffn(u, image_mask), norm)
        if after is not None:
            setattr(cache, _HANDED, (after.layer_idx, h, u))
        return h, pre_mix


def _rotated(x: mx.array, cos: mx.array, sin: mx.array, rope_dim: int) -> mx.array:
    """Return what mlx-vlm's `_apply_index_rotary` does, without views as complex numbers."""
    rest, pairs = x[..., :-rope_dim], x[..., -rope_dim:].astype(mx.float32)
    pairs = pairs.reshape(*pairs.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).flatten(-2)
    return mx.concatenate([rest, turned.astype(x.dtype)], axis=-1)


DifferentiableIndexer = gradients.choosing(stock.Indexer, __name__)
_ROUNDING = ("fake_quant_fp8_ue8m0", "fake_quant_fp4_e4m3")
_GLOBALS = gradients.namespace(
    stock,
    rounding=_ROUNDING,
    replaced={
        "_apply_index_rotary": gradients.with_gradient_of(stock._apply_index_rotary, _rotated)
    },
    functions=("_apply_rope_at_positions",),
)
_ENGRAM = gradients.namespace(engram, rounding=_ROUNDING[:1])
_ROUNDED = (stock.DeepseekV41Attention, stock.DeepseekV41MLP, stock.DeepseekV41SwiGLU)
(
    DifferentiableDeepseekV41Attention,
    DifferentiableDeepseekV41MLP,
    DifferentiableDeepseekV41SwiGLU,
) = (gradients.differentiable(cls, _GLOBALS, __name__) for cls in _ROUNDED)
DifferentiableDeepseekV41MoE = gradients.differentiable(stock.DeepseekV41MoE, _GLOBALS, __name__)
DifferentiableEngram = gradients.differentiable(engram.Engram, _ENGRAM, __name__)


_BLOCK_CALL = SinglePassBlock.__call__


class DeepseekV41(Family):
    package = "mlx-vlm"
    layers = {stock.DeepseekV41Block: SinglePassBlock}
    trained = {
        stock.Indexer: DifferentiableIndexer,
        stock.DeepseekV41Attention: DifferentiableDeepseekV41Attention,
        stock.DeepseekV41MLP: DifferentiableDeepseekV41MLP,
        stock.DeepseekV41SwiGLU: DifferentiableDeepseekV41SwiGLU,
        stock.DeepseekV41MoE: DifferentiableDeepseekV41MoE,
        engram.Engram: DifferentiableEngram,
    }

    def sites(self, model: nn.Module) -> list[Site]:
        text, sites = self.text(model), []
        prefix = "language_model." if text is not model else ""
        for k, block in enumerate(text.layers):
            name, after = f"{prefix}layers.{k}", text.layers[k + 1 : k + 2]
            norm = after[0].attn_norm if after and after[0].engram is None else None
            of = {"prefix": ATTN, "kind": "lagged"}
            sites.append(Site(self, f"{name}.hc_attn", block, block.ffn_norm, **of))
            sites.append(Site(self, f"{name}.hc_ffn", block, norm, **of | {"prefix": FFN}))
        return sites

    def settings(self, hc: Any) -> Settings:
        return _settings(hc.hc_mult, hc.hc_sinkhorn_iters, hc.hc_eps, hc.norm_eps)

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        hc, prefix, norm = site.hc, site.prefix, site.norm
        if options is None:
            found = stock_site(hc, prefix, x, y, norm)
        else:
            found = run.single_pass(hc, prefix, self.settings(hc), options, x, y, norm)
        return dict(zip(("out", "u", "h_pre"), found, strict=True))

    def new_site(self, d: int) -> Site:
        sizes = {"hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 1}
        sizes |= {"n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
        block = stock.DeepseekV41Block(stock.ModelConfig(**sizes), 0)
        return Site(self, "new", block, block.ffn_norm, ATTN, "lagged")

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        later = list(range(1, layers))  # layers that see compressed tokens, too
        sizes: dict[str, Any] = {"vocab_size": 1024, "num_attention_heads": 8, "head_dim": 128}
        sizes |= {"q_lora_rank": 256, "qk_rope_head_dim": 32, "o_groups": 4, "o_lora_rank": 128}
        sizes |= {"moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2}
        sizes |= {"compress_ratios": [0, *[4] * (layers - 1)], "kv_source_layer_ids": later}
        sizes |= {"index_source_layer_ids": later, "index_n_heads": 4, "index_head_dim": 64}
        sizes |= {"candidate_source_layer_id": 1, "engram_layer_ids": []}
        config = stock.ModelConfig(hidden_size=d, num_hidden_layers=layers, **sizes)
        return stock.LanguageModel(config)

    def metal_kernels(self) -> list[tuple[Any, str, Any]]:
        def hc_mix_coeffs(x, fn, scale, base, n, iters, hc_eps, norm_eps):
            flat = x.flatten(-2).astype(mx.float32)
            mixes = mx.fast.rms_norm(flat, None, norm_eps) @ fn.T
            shapes = [(*x.shape[:2], *k) for k in ((n,), (n,), (n, n))]
            outputs = [(shape, mx.float32) for shape in shapes]
            return graph.kernel_like([mixes, scale, base], outputs)

        return [(stock, "hc_mix_coeffs", hc_mix_coeffs)]

    def prepare(self, model: nn.Module) -> None:
        text = self.text(model)
        for block in text.layers:
            block._owner = Owner(text)

    def forget(self, module: Any) -> None:
        if isinstance(module, SinglePassBlock):
            del module._owner


FAMILY = DeepseekV41()
