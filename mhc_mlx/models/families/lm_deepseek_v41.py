"""DeepSeek V4.1 of mlx-lm: lagged sites, each a module with ``fn``, ``base`` and ``scale``."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v41 as stock

from ...conventions import DEEPSEEK_V4
from .. import gradients, graph, run
from ..family import Family, Options, Outputs, Owner, Patched, Settings, Site


@functools.cache
def _settings(n: int, iters: int, hc_eps: float, norm_eps: float) -> Settings:
    return Settings(n, replace(DEEPSEEK_V4, iters=iters, eps=hc_eps, pre_eps=hc_eps), norm_eps)


class SinglePassConnection(stock.HyperConnection):
    """This is mlx-lm's HyperConnection on these kernels.

    It has the same parameters: ``fn [n*n + 2n, n*C]``, ``base [n*n + 2n]`` and ``scale [3]``.
    """

    _mhc: Patched

    def __call__(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return pre, post and comb as mlx-lm does, float32; a row of comb is an input stream."""
        options = self._mhc.sites[""]
        h_pre, h_post, h_res = run.coefficients(self, "", FAMILY.settings(self), options, streams)
        return h_pre, h_post, h_res.swapaxes(-1, -2)


def stock_site(call: Any, x: mx.array, y: mx.array, norm: Any) -> tuple[mx.array, Any, mx.array]:
    """Return what `run.single_pass` returns, by mlx-lm's functions."""
    h_pre, h_post, comb = call(x)
    out = stock._expand(y, x, h_post, comb)
    return out, None if norm is None else norm(stock._collapse(out, h_pre)), h_pre


def run_site(hc: Any, x: mx.array, y: mx.array, norm: Any) -> tuple[mx.array, Any, mx.array]:
    """Run a site by its module, which is patched or mlx-lm's."""
    run.note(hc, "", x, y)
    if isinstance(hc, SinglePassConnection):
        return run.single_pass(hc, "", FAMILY.settings(hc), hc._mhc.sites[""], x, y, norm)
    return stock_site(hc, x, y, norm)


_HANDED = "_mhc_mlx"  # the key of (layer_idx, streams, u) in the dict that layers share


class SinglePassLayer(stock.DecoderLayer):
    """This is mlx-lm's DecoderLayer, in which each site runs when its sublayer ends.

    The second site makes the u of the next layer of this pipeline stage and puts it in ``shared``.
    That layer takes it from there if it gets the same streams; otherwise it makes u from streams
    and pre_mix, as mlx-lm does.
    """

    _owner: Owner

    def _next(self) -> "SinglePassLayer | None":
        """Return the next layer of this pipeline stage, if it is one and patched."""
        layers, k = self._owner.layers, self.layer_idx + 1
        after = layers[k] if k < len(layers) else None  # other stages' layers are None
        return after if isinstance(after, SinglePassLayer) else None

    def __call__(
        self,
        streams: mx.array,
        pre_mix: mx.array,
        *,
        start_pos: int,
        window_idx: mx.array,
        cache: stock.LayerCache,
        shared: dict[str, Any],
    ) -> tuple[mx.array, mx.array]:
        if type(self).__call__ is not _LAYER_CALL:
            raise ValueError(
                "[patch] model.layers must not be under mlx-lm's grad_checkpoint but are: layers "
                "of deepseek_v41 share arrays in a way that it does not see, and results would be "
                "wrong."
            )
        layer_idx, read_streams, u = shared.pop(_HANDED, (None, None, None))
        if layer_idx != self.layer_idx or read_streams is not streams:
            u = self.input_layernorm(stock._collapse(streams, pre_mix))
        state = {"start_pos": start_pos, "window_idx": window_idx, "cache": cache}
        y = self.self_attn(u, **state, shared=shared)
        streams, u, _ = run_site(self.attn_hc, streams, y, self.post_attention_layernorm)
        after = self._next()
        norm = None if after is None else after.input_layernorm
        streams, u, pre_mix = run_site(self.ffn_hc, streams, self.mlp(u), norm)
        if after is not None:
            shared[_HANDED] = (after.layer_idx, streams, u)
        return streams, pre_mix


_LAYER_CALL = SinglePassLayer.__call__

# argpartition picks indices of experts and of compressed keys; the kernel has no vjp.
_GLOBALS = gradients.namespace(
    stock,
    constant=("argpartition",),
    rounding=("_fake_quant_fp8", "_fake_quant_fp4"),
    replaced={"_sinkhorn_kernel": None},
    functions=("_sinkhorn",),
)
DifferentiableRouter = gradients.differentiable(stock.Router, _GLOBALS, __name__)
DifferentiableIndexer = gradients.differentiable(stock.Indexer, _GLOBALS, __name__)
DifferentiableAttention = gradients.differentiable(stock.Attention, _GLOBALS, __name__)
DifferentiableHyperConnection = gradients.differentiable(stock.HyperConnection, _GLOBALS, __name__)


class DeepseekV41(Family):
    package = "mlx-lm"
    layers = {stock.DecoderLayer: SinglePassLayer}
    connections = {stock.HyperConnection: SinglePassConnection}
    trained = {
        stock.Router: DifferentiableRouter,
        stock.Indexer: DifferentiableIndexer,
        stock.Attention: DifferentiableAttention,
        stock.HyperConnection: DifferentiableHyperConnection,
    }

    def check_model(self, op: str, model: nn.Module) -> None:
        for layer in self.stage(model):
            for module, kind in (
                *((layer, stock.DecoderLayer), (layer.self_attn, stock.Attention)),
                *((layer.attn_hc, stock.HyperConnection), (layer.ffn_hc, stock.HyperConnection)),
            ):
                if type(module) is not kind:
                    cls = f"{type(module).__module__}.{type(module).__qualname__}"
                    must = "be as in deepseek_v41 of mlx-lm"
                    got = f"{cls} for a {kind.__name__}"
                    raise TypeError(f"[{op}] model.layers must {must} but got {got}.")

    def stage(self, model: Any) -> list[Any]:
        """Return the layers of this pipeline stage: mlx-lm has None in place of others."""
        return [layer for layer in model.model.layers if layer is not None]

    def sites(self, model: nn.Module) -> list[Site]:
        sites, layers = [], self.stage(model)
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            name, norm = f"model.layers.{layer.layer_idx}", layer.post_attention_layernorm
            sites.append(Site(self, f"{name}.attn_hc", layer.attn_hc, norm, kind="lagged"))
            norm = after and after.input_layernorm
            sites.append(Site(self, f"{name}.ffn_hc", layer.ffn_hc, norm, kind="lagged"))
        return sites

    def settings(self, hc: Any) -> Settings:
        return _settings(hc.hc, hc.iters, hc.hc_eps, hc.norm_eps)

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        hc = site.hc
        if options is None:
            call = functools.partial(stock.HyperConnection.__call__, hc)
            found = stock_site(call, x, y, site.norm)
        else:
            found = run.single_pass(hc, "", self.settings(hc), options, x, y, site.norm)
        return dict(zip(("out", "u", "h_pre"), found, strict=True))

    def new_site(self, d: int) -> Site:
        args = stock.ModelArgs(hidden_size=d)
        norm = nn.RMSNorm(d, eps=args.rms_norm_eps)
        return Site(self, "new", stock.HyperConnection(args), norm, kind="lagged")

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        later = tuple(range(1, layers))
        sizes: dict[str, Any] = {
            "vocab_size": 1024,
            "num_attention_heads": 8,
            "head_dim": 128,
            "q_lora_rank": 256,
        }
        sizes |= {"qk_rope_head_dim": 32, "o_groups": 4, "o_lora_rank": 128}
        sizes |= {"moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2}
        sizes |= {"compress_ratios": (0, *[4] * (layers - 1)), "kv_source_layer_ids": later}
        sizes |= {"index_source_layer_ids": later, "index_n_heads": 4, "index_head_dim": 64}
        args = stock.ModelArgs(hidden_size=d, num_hidden_layers=layers, **sizes)
        return stock.Model(args)

    def metal_kernels(self) -> list[tuple[Any, str, Any]]:
        return [(stock, "_sinkhorn", lambda comb, iters, eps: graph.one_primitive(comb))]

    def prepare(self, model: Any) -> None:
        for layer in self.stage(model):
            layer._owner = Owner(model.model)

    def forget(self, module: Any) -> None:
        if isinstance(module, SinglePassLayer):
            del module._owner

    def logits(self, model: Any, tokens: mx.array, cache: Any) -> mx.array:
        return model(tokens, cache)

    def generate(self, model: Any, prompt: mx.array, count: int) -> Iterator[int]:
        for token, _ in generate_step(prompt, model, max_tokens=count):
            yield int(token)

    def vocabulary(self, model: Any) -> int:
        return model.args.vocab_size


FAMILY = DeepseekV41()
