"""DeepSeek V4 and GLM-5.3 of mlx-vlm, and their drafters: one module a site, not lagged.

mlx-vlm's module runs a whole sublayer (`apply_branch`), so its class is all that changes. Its own
results for up to 8 tokens do not depend on their number, by kernels of its own; here all go through
these kernels, whose results do not either.
"""

import functools
import importlib
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...conventions import DEEPSEEK_V4
from .. import gradients, graph, run
from ..family import Family, Options, Outputs, Settings, Site

V4 = "mlx_vlm.models.deepseek_v4"
stock: Any = importlib.import_module(f"{V4}.hyper_connection")
language: Any = importlib.import_module(f"{V4}.language")
glm: Any = importlib.import_module("mlx_vlm.models.glm5_next.language")
dspark: Any = importlib.import_module(
    "mlx_vlm.speculative.drafters.deepseek_v4_dspark.deepseek_v4_dspark"
)


@functools.cache
def _settings(n: int, iters: int, hc_eps: float, norm_eps: float) -> Settings:
    c = replace(DEEPSEEK_V4, iters=iters, eps=hc_eps, pre_eps=hc_eps)
    return Settings(n, c, norm_eps, out_of_y=True, tokenwise=True)


class PatchedConnection(stock.HyperConnection):
    """This is mlx-vlm's HyperConnection on these kernels, with the same parameters."""

    def apply_branch(self, x: mx.array, norm: Any, branch: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, run the sublayer, write its output (or the first of its outputs) back."""
        settings, options = FAMILY.settings(self), self._mhc.sites[""]
        u, h_post, h_res = run.read(self, "", settings, options, x, norm)
        output = branch(u, *args, **kwargs)
        y, *others = output if isinstance(output, tuple) else (output,)
        run.note(self, "", x, y)
        out = run.write_back(settings, options, x, y, h_post, h_res)
        return (out, *others) if isinstance(output, tuple) else out

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return what is read, post and comb; a row of comb is an input stream."""
        settings, options = FAMILY.settings(self), self._mhc.sites[""]
        u, h_post, h_res = run.read(self, "", settings, options, x, None)
        return u, h_post, h_res.swapaxes(-1, -2)


class PatchedHead(stock.HyperHead):
    """This is mlx-vlm's HyperHead on these kernels, with the same parameters."""

    def __call__(self, x: mx.array) -> mx.array:
        options = self._mhc.sites[""]
        run.note(self, "", x, x[..., 0, :])
        return run.head(self, "", FAMILY.settings(self), options, x)


class PatchedStage(dspark.DSparkStage):
    """This is a stage of the DSpark drafter, which calls its connections itself."""

    def __call__(self, h: mx.array, main_x: mx.array, cache: Any) -> mx.array:
        def sublayer(hc: Any, x: mx.array, norm: Any, branch: Any) -> mx.array:
            if isinstance(hc, PatchedConnection):
                return hc.apply_branch(x, norm, branch)
            u, post, comb = hc(x)
            return stock.hc_expand(branch(norm(u)), x, post, comb)

        h = sublayer(self.attn_hc, h, self.attn_norm, lambda u: self.attn(u, main_x, cache))
        return sublayer(self.ffn_hc, h, self.ffn_norm, lambda u: self.ffn(u, None))


DifferentiableIndexer = gradients.choosing(language.Indexer, __name__)
DifferentiableGlm5NextIndexer = gradients.choosing(glm.Glm5NextIndexer, __name__)
DifferentiableGlm5NextAttention = gradients.given_constant(
    glm.Glm5NextAttention, "prev_topk_indices", __name__
)


class DifferentiableMoEGate(language.MoEGate):
    """This is mlx-vlm's gate, whose choice of experts passes no gradient.

    Where experts are chosen by token or for images too, mlx-vlm's compiled function asks for the
    gradient of the choice. There the weights are made again, by the same operations. The table of
    experts by token has integers, which an optimizer would turn into floats: it stays frozen.
    """

    @property
    def _no_grad(self) -> set[str]:
        frozen: set[str] = vars(self)["_no_grad"]
        if self.hash:
            frozen.add("tid2eid")
        return frozen

    def __call__(self, x: mx.array, input_ids: mx.array | None = None) -> Any:
        experts, weights = language.MoEGate.__call__(self, x, input_ids)
        if not self.hash and not self.vision:
            return experts, weights
        experts = mx.stop_gradient(experts)
        logits = (x @ self.weight.T).astype(mx.float32)
        scores = language._score_func(logits, self.scoring_func)
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if self.scoring_func != "softmax" and self.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return experts, weights * self.routed_scaling_factor


def _place(site: Site) -> list[tuple[bool, int, str]]:
    """Return what sorts sites in the order in which they run: layers by number, the head last."""
    parts = [(k.isdigit(), int(k) if k.isdigit() else 0, k) for k in site.name.split(".")]
    return [(site.kind == "head", 0, ""), *parts]


class DeepseekV4(Family):
    package = "mlx-vlm"
    layers = {dspark.DSparkStage: PatchedStage}
    connections = {stock.HyperConnection: PatchedConnection, stock.HyperHead: PatchedHead}
    trained = {
        language.Indexer: DifferentiableIndexer,
        language.MoEGate: DifferentiableMoEGate,
        glm.Glm5NextIndexer: DifferentiableGlm5NextIndexer,
        glm.Glm5NextAttention: DifferentiableGlm5NextAttention,
    }

    def sites(self, model: nn.Module) -> list[Site]:
        """V4 calls its norms attn_norm and ffn_norm, GLM by their place in a layer."""
        found, kinds = [], (stock.HyperConnection, stock.HyperHead)
        norms = {"attn_hc": ("attn_norm", "input_layernorm")}
        norms["ffn_hc"] = ("ffn_norm", "post_attention_layernorm")
        for prefix, owner in model.named_modules():
            for key, hc in owner.children().items():
                if isinstance(hc, kinds):
                    name = f"{prefix}.{key}" if prefix else key
                    norm = next((owner[k] for k in norms.get(key, ()) if k in owner), None)
                    kind = "head" if isinstance(hc, stock.HyperHead) else "pair"
                    found.append(Site(self, name, hc, norm, kind=kind))
        return sorted(found, key=_place)

    def settings(self, hc: Any) -> Settings:
        iters = getattr(hc, "sinkhorn_iters", 1)  # a read-out has none
        return _settings(hc.hc_mult, iters, hc.hc_eps, hc.norm_eps)

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        hc, norm = site.hc, site.norm
        if site.kind == "head":
            if options is None:
                return {"u": stock.HyperHead.__call__(hc, x)}
            return {"u": run.head(hc, "", self.settings(hc), options, x)}
        if options is None:
            u, h_post, comb = stock.HyperConnection.__call__(hc, x)
            u = u if norm is None else norm(u)
            out = stock.hc_expand(u if y is None else y, x, h_post, comb)
            h_res = comb.swapaxes(-1, -2)
        else:
            u, h_post, h_res = run.read(hc, "", self.settings(hc), options, x, norm)
            y = u if y is None else y
            out = run.write_back(self.settings(hc), options, x, y, h_post, h_res)
        return {"u": u, "h_post": h_post, "h_res": h_res, "out": out}

    def new_site(self, d: int) -> Site:
        config = language.ModelConfig(hidden_size=d, num_hidden_layers=1)
        norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        return Site(self, "new", stock.HyperConnection(config), norm)

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        sizes: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": layers}
        sizes |= {"vocab_size": 1024, "num_attention_heads": 8, "q_lora_rank": 256}
        sizes |= {"moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2}
        sizes |= {"index_n_heads": 4, "index_head_dim": 64}
        if kind == "glm5_next":
            kinds = ["linear_attention", "deepseek_sparse_attention"]
            sizes |= {"layer_types": [kinds[k % 2] for k in range(layers)]}
            sizes |= {"num_key_value_heads": 8, "kv_lora_rank": 128, "v_head_dim": 64}
            sizes |= {"qk_nope_head_dim": 64, "qk_head_dim": 64, "intermediate_size": 512}
            sizes |= {"linear_head_dim": 64, "linear_num_heads": 8, "first_k_dense_replace": 1}
            return glm.LanguageModel(glm.TextConfig(**sizes))
        sizes |= {"head_dim": 128, "qk_rope_head_dim": 32, "o_groups": 4, "o_lora_rank": 128}
        sizes |= {"num_hash_layers": 0, "compress_ratios": [0, *[4] * (layers - 1)]}
        return language.LanguageModel(language.ModelConfig(**sizes))

    def metal_kernels(self) -> list[tuple[Any, str, Any]]:
        """Of 2 to 8 tokens, with C up to 4096, mlx-vlm's kernel norms too: one dispatch less."""

        def collapse(x, y, mixes, scale, base, n, iters, eps):
            *batch, _, C = x.shape
            outputs = [((*batch, C), x.dtype), ((*batch, n), mx.float32)]
            outputs.append(((*batch, n, n), mx.float32))
            return graph.kernel_like([x, mixes, scale, base], outputs)

        usual = stock.hc_expand

        def expand(y, x, post, comb, **options):
            if 1 < y.shape[1] <= run.FEW:
                return graph.kernel_like([x, y, post, comb], [(x.shape, x.dtype)])[0]
            return usual(y, x, post, comb, **options)

        return [(stock, "_hc_ops", collapse), (stock, "hc_expand", expand)]


FAMILY = DeepseekV4()
