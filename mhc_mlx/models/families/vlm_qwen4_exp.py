"""Qwen's gated residuals (qwen4_exp) of mlx-vlm, and its MTP drafter.

These are no mHC: a site normalises each stream by itself, and a gate for each channel, made by two
products of low rank, says what the sublayer reads (`reference.gated_residual`). Its write-back is
one `stream_norm` with the norm of the next site, which makes the u of the next layer, too; before
a layer with per-layer embeddings (PLE), which add to the streams, it stands alone.

s, the products, the silu and the gates' logits are rounded to the dtype of x, as in mlx-vlm. h_post
stays in float32, and what is read and what is written are rounded once, where mlx-vlm rounds each
gate, product and sum.

In decoding, in batches and in speculative verification mlx-vlm runs another forward pass, which
reads the modules inside a site itself. Here it is `InvariantForward`.
"""

import functools
import importlib
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import gradients, run
from ..family import INJECT, NEXT, Family, GatedSettings, GatedSite, Options, Outputs, Owner, Site

stock: Any = importlib.import_module("mlx_vlm.models.qwen4_exp.language")
config: Any = importlib.import_module("mlx_vlm.models.qwen4_exp.config")
NORMAL = run.Products(inject=stock._row_invariant_quantized_projection)

# What a layer has read for the next site: that site, the streams that it must get, u and h_post.
# The next site that runs in this thread takes it or drops it.
_handed: ContextVar[tuple[Any, Any, Any, Any] | None] = ContextVar("handed", default=None)


@functools.cache
def _settings(n: int, norm_eps: float) -> GatedSettings:
    return GatedSettings(n, norm_eps)


def _streams(hc: Any, hidden: mx.array) -> mx.array:
    return mx.unflatten(hidden, -1, (hc.hc_count, hc.hidden_size))


class PatchedResidual(stock.Qwen4ExpGatedResidual):
    """This is mlx-vlm's gated residual on these kernels, with the same parameters."""

    def site(self, products: run.Products, *state: mx.array) -> tuple[mx.array, mx.array, Any]:
        """Return out, u and h_post of x ``[B, L, n, C]``, with y and h_post after a write-back."""
        settings, options = FAMILY.settings(self), self._mhc.sites[""]
        return run.gated_residual(self, settings, options, *state, products=products)

    def read(self, hidden: mx.array, products: run.Products) -> tuple[mx.array, Any]:
        """Return u and h_post, which the layer before may have made."""
        if INJECT not in self:
            x = _streams(self, hidden)
            run.note(self, "", x, x[..., 0, :])
        if (handed := _handed.get()) is not None:
            _handed.set(None)
            site, streams, u, h_post = handed
            if site is self and streams is hidden:
                return u, h_post
        return self.site(products, _streams(self, hidden))[1:]

    def __call__(self, hyper_input: mx.array) -> Any:
        u, h_post = self.read(hyper_input, NORMAL)
        return (u, hyper_input, h_post) if INJECT in self else u


class Calls(NamedTuple):
    """How a forward pass runs what a layer consists of; of sites, mlx-vlm's own alone."""

    ple: Any
    attention: Any
    mlp: Any
    products: run.Products
    read: Any  # of a site and the streams: u, the streams and h_post
    write_back: Any


def _read(calls: Calls, hc: Any, hidden: mx.array) -> tuple[mx.array, Any]:
    if isinstance(hc, PatchedResidual):
        return hc.read(hidden, calls.products)
    u, _, h_post = calls.read(hc, hidden)
    return u, h_post


def _seam(
    calls: Calls, written: Any, hidden: mx.array, y: mx.array, h_post: Any, after: Any
) -> tuple[mx.array, Any, Any]:
    """Return the streams after a write-back, and the u and h_post of the site after it, if any."""
    if isinstance(written, PatchedResidual):
        x = _streams(written, hidden)
        run.note(written, "", x, y)
        if isinstance(after, PatchedResidual):
            out, u, h_post = after.site(calls.products, x, y, h_post)
            return out.flatten(-2), u, h_post
        settings, options = FAMILY.settings(written), written._mhc.sites[""]
        hidden = run.write_back(settings, options, x, y, h_post, None).flatten(-2)
    else:
        hidden = calls.write_back(y, hidden, h_post)
    u, h_post = (None, None) if after is None else _read(calls, after, hidden)
    return hidden, u, h_post


def _run_layer(layer: Any, hidden: mx.array, calls: Calls) -> mx.array:
    first, second = layer.attn_hyper_connection, layer.mlp_hyper_connection
    if "ple" in layer:
        hidden = hidden + calls.ple(hidden)
    u, h_post = _read(calls, first, hidden)
    hidden, u, h_post = _seam(calls, first, hidden, calls.attention(u), h_post, second)
    after = layer.after()
    hidden, u, h_post = _seam(calls, second, hidden, calls.mlp(u), h_post, after)
    if after is not None:
        _handed.set((after, hidden, u, h_post))
    return hidden


def _write_back(y: mx.array, hidden: mx.array, h_post: mx.array) -> mx.array:
    injection = y[..., None, :] * h_post[..., None]
    return hidden + injection.reshape(*hidden.shape)


class PatchedLayer(stock.Qwen4ExpDecoderLayer):
    """This is mlx-vlm's layer, whose write-backs are joined with the reads after them."""

    _owner: Owner
    _index: int

    def after(self) -> Any:
        """Return the patched site that reads the streams as this layer leaves them, or None.

        Under grad_checkpoint, which changes the class, there is none: it sees no array that is
        handed on.
        """
        body, k = self._owner.module, self._index
        if body is None or type(self).__call__ is not _LAYER_CALL or body.layers[k] is not self:
            return None
        if k + 1 == len(body.layers):
            found = body.hyper_connection_mixer
        else:
            layer = body.layers[k + 1]
            found = None if "ple" in layer else layer.attn_hyper_connection
        return found if isinstance(found, PatchedResidual) else None

    def __call__(
        self, hidden_states: mx.array, input_ids: Any, mask: Any, cache: Any, position_ids: Any
    ) -> mx.array:
        def attention(u: mx.array) -> mx.array:
            if self.is_linear:
                return self.linear_attn(u, mask=mask, cache=cache)
            return self.self_attn(u, mask=mask, cache=cache, position_ids=position_ids)

        def ple(x: mx.array) -> mx.array:
            return self.ple(x, input_ids, cache, mask)

        calls = Calls(ple, attention, self.mlp, NORMAL, run.call, _write_back)
        return _run_layer(self, hidden_states, calls)


_LAYER_CALL = PatchedLayer.__call__


class InvariantForward(stock.Qwen4ExpBatchInvariantForward):
    """This is mlx-vlm's forward pass by products whose rows do not depend on their number."""

    def _products(self, x: mx.array) -> run.Products:
        # Of one row these are the layers' own.
        one_row = x.shape[:2] == (1, 1)
        return NORMAL if one_row else run.Products(self._linear, self._linear, compiled=False)

    def _hyper_connection(self, module: Any, hidden_states: mx.array) -> Any:
        if not isinstance(module, PatchedResidual):
            return super()._hyper_connection(module, hidden_states)
        u, h_post = module.read(hidden_states, self._products(hidden_states))
        return (u, hidden_states, h_post) if INJECT in module else u

    def _layer(
        self, layer: Any, hidden: mx.array, input_ids: Any, mask: Any, cache: Any, position_ids: Any
    ) -> mx.array:
        if not isinstance(layer, PatchedLayer):
            return super()._layer(layer, hidden, input_ids, mask, cache, position_ids)

        def attention(u: mx.array) -> mx.array:
            if layer.is_linear:
                return self._gated_delta(layer.linear_attn, u, mask, cache)
            return self._qsa_attention(layer.self_attn, u, cache, position_ids, mask)

        def ple(x: mx.array) -> mx.array:
            return self._ple(layer.ple, x, input_ids, cache, mask)

        def mlp(u: mx.array) -> mx.array:
            return self._feed_forward(layer.mlp, u)

        products = self._products(hidden)
        calls = Calls(ple, attention, mlp, products, super()._hyper_connection, self._inject)
        return _run_layer(layer, hidden, calls)


_NAMES = {**vars(stock), "_QWEN4_BATCH_INVARIANT_FORWARD": InvariantForward()}
PatchedLanguageModel = gradients.with_globals(
    stock.LanguageModel, _NAMES, __name__, "PatchedLanguageModel"
)


class DifferentiableQwen4ExpQSAIndexer(stock.Qwen4ExpQSAIndexer):
    """This is mlx-vlm's choice of keys, which passes no gradient."""

    def select_from_projected(self, *args: Any) -> Any:
        found = super().select_from_projected(*args)
        if found is not None:
            found.selected_blocks = mx.stop_gradient(found.selected_blocks)
        return found


def _by_mask(*args: Any, **given: Any) -> mx.array:
    """Attend by a mask: mlx-vlm's kernel, which reads chosen keys alone, has no gradient."""
    return stock.dispatch_qsa_attention(*args, **given | {"causal": False})


_MASKED = gradients.with_globals(
    *(stock.Qwen4ExpAttention, {**vars(stock), "dispatch_qsa_attention": _by_mask}),
    *(__name__, "_MASKED"),
)


class DifferentiableQwen4ExpAttention(stock.Qwen4ExpAttention):
    """This is mlx-vlm's attention; in training it runs no kernel without a gradient."""

    def __call__(self, *args: Any, **given: Any) -> mx.array:
        of: Any = _MASKED if self.training else stock.Qwen4ExpAttention
        return of.__call__(self, *args, **given)


class DifferentiableQwen4ExpNGramEmbedding(stock.Qwen4ExpNGramEmbedding):
    """This is mlx-vlm's embedding of n-grams, whose constants of hashes stay frozen.

    They are integers, which an optimizer would turn into floats.
    """

    @property
    def _no_grad(self) -> set[str]:
        frozen: set[str] = vars(self)["_no_grad"]
        frozen.update(("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets"))
        return frozen


def stock_read(hc: Any, x: mx.array) -> tuple[mx.array, Any]:
    """Return u and h_post of x ``[B, L, n, C]`` by mlx-vlm's code; h_post is None at a read-out."""
    found = stock.Qwen4ExpGatedResidual.__call__(hc, x.flatten(-2))
    return (found[0], found[2]) if INJECT in hc else (found, None)


class Qwen4Exp(Family):
    package = "mlx-vlm"
    roundings = ("stock",)
    layers = {
        stock.Qwen4ExpDecoderLayer: PatchedLayer,
        stock.LanguageModel: PatchedLanguageModel,
    }
    connections = {stock.Qwen4ExpGatedResidual: PatchedResidual}
    trained = {
        stock.Qwen4ExpQSAIndexer: DifferentiableQwen4ExpQSAIndexer,
        stock.Qwen4ExpAttention: DifferentiableQwen4ExpAttention,
        stock.Qwen4ExpNGramEmbedding: DifferentiableQwen4ExpNGramEmbedding,
    }

    def _body(self, model: nn.Module) -> tuple[str, Any]:
        """Return the module that has layers and read-out, and what begins the names in it."""
        for name, module in model.named_modules():
            if "layers" in module and "hyper_connection_mixer" in module:
                return f"{name}." if name else "", module
        raise ValueError("[patch] model must have layers and hyper_connection_mixer but lacks one.")

    def sites(self, model: nn.Module) -> list[Site]:
        prefix, body = self._body(model)
        found: list[Site] = []
        for k, layer in enumerate(body.layers):
            for part in ("attn_hyper_connection", "mlp_hyper_connection"):
                name = f"{prefix}layers.{k}.{part}"
                found.append(GatedSite(self, name, layer[part], None, kind="gated"))
        name = f"{prefix}hyper_connection_mixer"
        return [*found, GatedSite(self, name, body.hyper_connection_mixer, None, kind="head")]

    def settings(self, hc: Any) -> GatedSettings:
        return _settings(hc.hc_count, hc["hc_norm"].eps)

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        def read(x: mx.array) -> dict[str, Any]:
            if options is None:
                found = stock_read(site.hc, x)
            else:
                found = run.gated_residual(site.hc, site.settings, options, x, products=NORMAL)[1:]
            return dict(zip(("u", "h_post"), found, strict=True))

        found = read(x)
        if site.kind == "head":
            return {"u": found["u"]}
        y = found["u"] if y is None else y
        out, u, h_post = self.joined(site, options, x, y, found["h_post"])
        return found | {"out": out, f"{NEXT}u": u, f"{NEXT}h_post": h_post}

    def joined(
        self, site: Site, options: Options | None, x: mx.array, y: mx.array, h_post: mx.array
    ) -> tuple[Any, ...]:
        if options is None:
            out = _write_back(y, x.flatten(-2), h_post).reshape(x.shape)
            return out, *stock_read(site.hc, out)
        return run.gated_residual(site.hc, site.settings, options, x, y, h_post, NORMAL)

    def prepare(self, model: nn.Module) -> None:
        _, body = self._body(model)
        for k, layer in enumerate(body.layers):
            layer._owner, layer._index = Owner(body), k

    def forget(self, module: Any) -> None:
        if isinstance(module, PatchedLayer):
            del module._owner, module._index

    def new_site(self, d: int) -> Site:
        sizes = {"hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 1}
        hc = stock.Qwen4ExpGatedResidual(config.TextConfig(**_SIZES | sizes))
        return GatedSite(self, "new", hc, None, kind="gated")

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        text = config.TextConfig(**_SIZES | {"hidden_size": d, "num_hidden_layers": layers})
        vision = config.VisionConfig(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)
        return stock.LanguageModel(text, config.ModelConfig(text, vision, "qwen4_exp"))

    def dtype(self, model: Any) -> mx.Dtype:
        _, body = self._body(model)
        if "embed_tokens" in body:
            return body.embed_tokens(mx.zeros((1, 1), mx.int32)).dtype
        return body.hyper_connection_mixer.hc_norm.weight.dtype

    def vocabulary(self, model: Any) -> int:
        return self.text(model).args.vocab_size


# Sizes of `new_model`; a site takes n and the rank, which are those of the released model.
_SIZES: dict[str, Any] = {"model_type": "qwen4_exp_text", "vocab_size": 1024, "rms_norm_eps": 1e-6}
_SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
_SIZES |= {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64}
_SIZES |= {"linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "num_experts": 8}
_SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
_SIZES |= {"shared_expert_intermediate_size": 256, "max_position_embeddings": 4096}
_SIZES |= {"full_attention_interval": 2, "ple_layer_ids": [1], "eos_token_id": 0}
_SIZES |= {"ngram_vocab_size_base": 1000, "split_ngram_parts": 4, "indexer_head_dim": 64}
_SIZES |= {"ple_embed_dim": 512, "hc_count": 4, "hc_lowrank": 320}
FAMILY = Qwen4Exp()
