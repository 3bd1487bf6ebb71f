"""Tiny random deepseek_v41 models, every kind of layer among them; and what compares them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.deepseek_v41 import Model, ModelArgs

from mhc_mlx import models as adapter
from mhc_mlx.models import run
from mhc_mlx.models.families import lm_deepseek_v41 as family

VOCABULARY = 96


def arguments(hidden: int = 64, layers: int = 4, **others) -> ModelArgs:
    """Layer 0 sees its window only. Layers 1 and 2 compress four tokens to one: 1 makes keys,
    indices and the candidate blocks, 2 has its own indices among these. Layer 3 compresses
    nothing itself and reads what they share."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8}
    sizes |= {"o_groups": 2, "o_lora_rank": 32, "moe_intermediate_size": 32}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    sizes |= {"compress_ratios": (0, 4, 4, 4)[:layers], "kv_source_layer_ids": (1, 2)}
    sizes |= {"index_source_layer_ids": (1, 2), "candidate_source_layer_id": 1}
    sizes |= {"candidate_topk_blocks": 3, "candidate_block_size": 2, "index_topk": 4}
    sizes |= {"index_n_heads": 2, "index_head_dim": 32, "rms_norm_eps": 1e-6}
    return ModelArgs(**sizes | others)


def weight(name: str, a: mx.array, random: np.random.Generator, branch: float) -> mx.array:
    if name.endswith(("norm.weight", "_hc.scale")):
        made = random.uniform(0.5, 1.5, a.shape)
    elif name.endswith("embed_tokens.weight"):
        made = random.standard_normal(a.shape)
    else:  # products keep the size of their input; vectors are biases
        made = random.standard_normal(a.shape) * (a.shape[-1] ** -0.5 if a.ndim > 1 else 1)
    if "o_b_proj" in name or "down_proj" in name:
        made = branch * made
    return mx.array(made.astype(np.float32))


def quantised(path: str, module: nn.Module) -> bool:
    """All but the logits' matrix, whose sums MLX rounds to bfloat16 term by term on a CPU."""
    return hasattr(module, "to_quantized") and path != "lm_head"


# Where a model chooses (experts, compressed keys), one bit of a bfloat16 decides a tie, and what
# follows differs by anything: mlx-lm's own logits move by up to 50 units in the last place if phi
# changes by 1e-7. So models in bfloat16 take everything that they could choose among, and their
# sublayers add little, as those of trained models do.
CALM = {"num_experts_per_tok": 4, "index_topk": 1000, "candidate_topk_blocks": 1000}

# Sizes that mlx-lm does not round to 8 and 4 bits: that decides ties in float32 as well.
UNROUNDED = {"head_dim": 40, "index_head_dim": 24}


def tiny(hidden: int = 64, layers: int = 4, kind: str = "float32", seed: int = 0, **others):
    """A model in float32, that chooses; in "bfloat16", or "4-bit" with bfloat16 activations, calm;
    in "4-bit float32"."""
    calm = kind in ("bfloat16", "4-bit")
    model = Model(arguments(hidden, layers, **(CALM if calm else {}) | others))
    random = np.random.default_rng(seed)
    made = [
        (name, weight(name, a, random, 0.05 if calm else 1))
        for name, a in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(made))
    if calm:
        keep = model.cast_predicate  # as mlx-lm's converter casts
        cast = [(k, a.astype(mx.bfloat16) if keep(k) else a) for k, a in made]
        model.update(tree_unflatten(cast))
    if "4-bit" in kind:
        nn.quantize(model, 32, 4, class_predicate=quantised)
    mx.eval(model.parameters())
    runs_here(model, kind)
    return model.eval()


def runs_here(model: nn.Module, kind: str) -> None:
    """Skips where mlx-lm's own model cannot run: not every GPU backend has every product."""
    if mx.default_device().type == mx.DeviceType.gpu:
        try:
            mx.eval(model(tokens(2)))
        except RuntimeError as error:
            pytest.skip(f"mlx-lm's own model, {kind}, does not run here: {error}")


def tokens(count: int, batch: int = 1, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, count)))


def find_sites(model):
    return family.FAMILY.sites(model)


def streams_dtype(model):
    return family.FAMILY.dtype(model)


def run_ours(site, x, y, *norm):
    """out, u and h_pre of a patched site as its layer runs it, or with another norm."""
    given = norm[0] if norm else site.norm
    return run.single_pass(site.hc, "", site.settings, site.options, x, y, given)


def run_theirs(site, x, y, *norm):
    """The same by mlx-lm's functions."""
    call = family.stock.HyperConnection.__call__.__get__(site.hc)
    return family.stock_site(call, x, y, norm[0] if norm else site.norm)


def patched(model, **options):
    return adapter.patch(model, **{"verify": False} | options)


def within(got: mx.array, want: mx.array, dtype: mx.Dtype) -> None:
    """1e-5 of the largest value of a row in float32, 2 units in its last place otherwise."""
    got, want = (np.array(a.astype(mx.float32)) for a in (got, want))
    most = np.abs(want).max(-1, keepdims=True)
    unit = np.exp2(np.floor(np.log2(most))) * 2 * mx.finfo(dtype).eps
    allowed = 1e-5 * most if dtype == mx.float32 else unit
    wrong = np.abs(got - want) / allowed
    assert wrong.max() <= 1, f"{wrong.max()} times the allowed error, {(wrong > 1).sum()} elements"


def exactly(a, b) -> None:
    assert a.dtype == b.dtype and mx.array_equal(a, b).item(), f"{a} is not {b}"
