"""Tiny random models of mlx-vlm's families, with every kind of layer and every float parameter
drawn at random. A family is one function here, and its name in MODELS."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")

VOCABULARY = 96
SIZES = {"hidden_size": 64, "vocab_size": VOCABULARY, "moe_intermediate_size": 32}
SIZES |= {"num_attention_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
V4 = {"head_dim": 40, "q_lora_rank": 32, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 32}
V4 |= {"sliding_window": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 24}


def language(name: str):
    return importlib.import_module(f"mlx_vlm.models.{name}.language")


def deepseek_v4(**others):
    """Layers that see their window alone, that compress 4 and 128 tokens to one; the first layer
    picks experts by token."""
    sizes = SIZES | V4 | {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]}
    sizes |= {"num_hash_layers": 1, "index_block": 2, "index_keep": 4}
    module = language("deepseek_v4")
    return module.LanguageModel(module.ModelConfig(**sizes | others))


def glm5_next(**others):
    """Linear and sparse attention, dense and sparse feed-forward."""
    sizes = SIZES | {"num_hidden_layers": 4, "intermediate_size": 48, "first_k_dense_replace": 1}
    kinds = ["linear_attention", "deepseek_sparse_attention"]
    sizes |= {"layer_types": 2 * kinds, "num_key_value_heads": 4, "kv_lora_rank": 32}
    sizes |= {"q_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 16}
    sizes |= {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, "index_kpool": 4}
    sizes |= {"linear_head_dim": 16, "linear_num_heads": 4}
    module = language("glm5_next")
    return module.LanguageModel(module.TextConfig(**sizes | others))


def deepseek_v41(**others):
    """As tiny_deepseek, with engram in layers 1 and 3, whose hashes the model makes of tokens."""
    sizes = SIZES | V4 | {"num_hidden_layers": 4, "compress_ratios": [0, 4, 4, 4]}
    sizes |= {"head_dim": 32, "index_head_dim": 32, "rms_norm_eps": 1e-6}
    sizes |= {"kv_source_layer_ids": [1, 2], "index_source_layer_ids": [1, 2]}
    sizes |= {"candidate_source_layer_id": 1, "candidate_topk_blocks": 3}
    sizes |= {"candidate_block_size": 2, "image_token_id": VOCABULARY - 1}
    sizes |= {"engram_layer_ids": [1, 3], "engram_num_embeddings": [600, 900]}
    sizes |= {"engram_max_ngram_size": 3, "engram_vocab_size": 90, "engram_n_heads": 2}
    sizes |= {"engram_head_dim": 32, "engram_compressed_vocab_size": 90}
    module = language("deepseek_v41")
    model = module.LanguageModel(module.ModelConfig(**sizes | others))
    if model.layout is not None:
        engram = importlib.import_module("mlx_vlm.models.deepseek_v41.engram")
        token_map = [k % 90 for k in range(VOCABULARY)]
        model.engram_hash = engram.NgramHashState(model.config, model.layout, token_map=token_map)
    return model


def hy_v4(**others):
    """Dense and sparse feed-forward; layer 2 uses the keys that layer 1 has chosen."""
    sizes = SIZES | {"num_hidden_layers": 4, "intermediate_size": 48, "first_k_dense_replace": 1}
    sizes |= {"kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16}
    sizes |= {"qk_rope_head_dim": 8, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
    sizes |= {"indexer_types": ["full", "full", "shared", "full"], "hc_magnitude": 1.5}
    module = language("hy_v4")
    return module.LanguageModel(module.ModelConfig(**sizes | others))


def xing4_0(**others):
    """Dense and sparse feed-forward; in every matrix some logits are clipped."""
    sizes = SIZES | {"num_hidden_layers": 4, "intermediate_size": 48, "first_k_dense_replace": 1}
    sizes |= {"kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16}
    sizes |= {"qk_rope_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4}
    sizes |= {"mhc_h_res_clamp_min": -0.5, "mhc_h_res_clamp_max": 0.25}
    module = importlib.import_module("mlx_vlm.models.xing4_0.config")
    return language("xing4_0").LanguageModel(module.ModelConfig(**sizes | others))


def qwen4_exp(**others):
    """Linear and sparse attention, experts; layers 1 and 3 add embeddings of hashed n-grams."""
    sizes = {"model_type": "qwen4_exp_text", "hidden_size": 64, "vocab_size": VOCABULARY}
    sizes |= {"num_hidden_layers": 3, "full_attention_interval": 2, "hc_lowrank": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32}
    sizes |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "num_experts": 4}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "rms_norm_eps": 1e-6}
    sizes |= {"shared_expert_intermediate_size": 32, "max_position_embeddings": 4096}
    sizes |= {"ple_layer_ids": [1, 3], "ple_embed_dim": 64, "heads_per_ngram": 2, "seed": 7}
    sizes |= {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8}
    sizes |= {"split_ngram_parts": 3, "eos_token_id": 5, "indexer_n_heads": 2}
    sizes |= {"indexer_head_dim": 32, "indexer_budget": 8, "indexer_compress_ratio": 2}
    config = importlib.import_module("mlx_vlm.models.qwen4_exp.config")
    rope = {"type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    rope |= {"partial_rotary_factor": 0.25}
    text = config.TextConfig(**sizes | {"rope_parameters": rope} | others)
    vision = config.VisionConfig(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)
    whole = config.ModelConfig(text, vision, "qwen4_exp")
    return language("qwen4_exp").LanguageModel(text, whole)


MODELS = {
    "deepseek_v41": deepseek_v41,
    "deepseek_v4": deepseek_v4,
    "glm5_next": glm5_next,
    "hy_v4": hy_v4,
    "xing4_0": xing4_0,
    "qwen4_exp": qwen4_exp,
}


def drawn(name: str, a: mx.array, random: np.random.Generator, branch: float) -> mx.array:
    if "hc_norm" in name:  # centred at 0
        made = random.uniform(-0.5, 0.5, a.shape)
    elif "norm" in name or name.endswith(("scale", "q_weight", "k_weight")):
        made = random.uniform(0.5, 1.5, a.shape)
    elif "embed" in name and name.endswith("weight"):
        made = random.standard_normal(a.shape)
    else:  # products keep the size of their input; vectors are biases
        made = random.standard_normal(a.shape) * (a.shape[-1] ** -0.5 if a.ndim > 1 else 1)
    if "mix_weight_down" in name or "block_inject" in name:  # Qwen's, which are divided by n
        made = 4 * made
    if any(k in name for k in ("wo_b", "o_proj", "down_proj")):
        made = branch * made
    return mx.array(made.astype(np.float32))


def randomised(model: nn.Module, seed: int = 0, branch: float = 1.0) -> nn.Module:
    """The model with random floats; tables of experts get random rows; hashes stay."""
    random, made = np.random.default_rng(seed), []
    for name, a in tree_flatten(model.parameters()):
        if mx.issubdtype(a.dtype, mx.floating):
            made.append((name, drawn(name, a, random, branch)))
        elif "ple_embedding" not in name:
            made.append((name, mx.array(random.integers(0, 4, a.shape), a.dtype)))
    model.update(tree_unflatten(made))
    mx.eval(model.parameters())
    return model.eval()


def quantised(path: str, module: nn.Module) -> bool:
    fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
    return fits and "head" not in path


def tiny(name: str, kind: str = "float32", seed: int = 0, **others) -> nn.Module:
    """A model in float32; or "4-bit" with bfloat16 activations, whose sublayers add little."""
    model = randomised(MODELS[name](**others), seed, 0.05 if kind == "4-bit" else 1.0)
    if kind == "4-bit":
        keep = getattr(model, "cast_predicate", lambda k: "hc_" not in k)
        cast = [
            (k, a.astype(mx.bfloat16) if a.dtype == mx.float32 and keep(k) else a)
            for k, a in tree_flatten(model.parameters())
        ]
        model.update(tree_unflatten(cast))
        nn.quantize(model, 32, 4, class_predicate=quantised)
        mx.eval(model.parameters())
    return model


def whole(name: str, kind: str = "float32", seed: int = 0, **others) -> nn.Module:
    """mlx-vlm's model around the language model, with vision where it has some."""
    if name == "deepseek_v41":
        sizes = {"vision_num_layers": 1, "vision_hidden_size": 64, "vision_num_heads": 2}
        others = sizes | {"vision_intermediate_size": 32} | others
    text = tiny(name, kind, seed, **others)
    config = text.config
    if name == "glm5_next":
        module = importlib.import_module("mlx_vlm.models.glm5_next.config")
        sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
        vision = module.VisionConfig(**sizes, out_hidden_size=64)
        config = module.ModelConfig(text_config=config, vision_config=vision)
    mx.random.seed(seed)
    model = importlib.import_module(f"mlx_vlm.models.{name}").Model(config)
    model.language_model = text
    mx.eval(model.parameters())
    return model.eval()


def tokens(count: int, batch: int = 1, seed: int = 0) -> mx.array:
    drawn = np.random.default_rng(seed).integers(0, VOCABULARY - 1, (batch, count))
    return mx.array(drawn.astype(np.int32))


def run(model, tokens, cache=None) -> mx.array:
    return model(tokens, cache=model.make_cache() if cache is None else cache).logits
