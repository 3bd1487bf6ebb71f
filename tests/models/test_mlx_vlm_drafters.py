"""Speculative decoding of patched models of mlx-vlm by mlx-vlm's own generator and drafters.

A random drafter is never right, so that nothing would be accepted. In these tests it runs, what it
proposes is kept for comparison, and some of it is replaced by what the model will say."""

import functools
import importlib

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its drafters are not tested")

from mlx_vlm.generate.ar import generate_step  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_vlm import randomised, tokens, whole  # noqa: E402

launched = modules.launched
STEPS, BLOCK, PROMPT = 16, 4, tokens(9)[0]


def patched(model):
    return adapter.patch(model, verify=False)


def drafter(folder: str, model: str, config: str, **given):
    """A random drafter of mlx-vlm."""
    folder = f"mlx_vlm.speculative.drafters.{folder}"
    configs = importlib.import_module(f"{folder}.config")
    module = importlib.import_module(f"{folder}.{folder.rsplit('.', 1)[1]}")
    return randomised(getattr(module, model)(getattr(configs, config)(**given)))


def v4_mtp(text):
    return drafter(
        *("deepseek_v4_mtp", "DeepseekV4MTPDraftModel", "DeepseekV4MTPConfig"),
        **{"text_config": text, "block_size": BLOCK, "runtime_block_size": BLOCK},
    )


def v4_dspark(text):
    return drafter(
        *("deepseek_v4_dspark", "Model", "DeepseekV4DsparkConfig"),
        **{"text_config": text, "n_mtp_layers": 2, "target_layer_ids": [0, 2]},
        **{"markov_rank": 16, "block_size": BLOCK, "runtime_block_size": BLOCK},
    )


def glm_mtp(text):
    return drafter(
        *("glm5_next_mtp", "Glm5NextMTPDraftModel", "Glm5NextMTPConfig"),
        **{"text_config": text, "block_size": BLOCK, "runtime_block_size": BLOCK},
    )


def hy_mtp(text):
    return drafter(
        *("hy_v4_mtp", "HyV4MTPDraftModel", "HyV4MTPConfig"),
        **{"text_config": text, "block_size": BLOCK, "runtime_block_size": BLOCK},
    )


def qwen_mtp(config):
    return drafter(
        *("qwen4_exp_mtp", "Qwen4ExpMTPDraftModel", "Qwen4ExpMTPConfig"),
        **{"text_config": config.text_config, "block_size": BLOCK},
    )


# Model, drafter, mlx-vlm's name for its kind, sizes of the model. Where Hy4 chooses keys (more than
# index_topk tokens), mlx-vlm's own tokens after a rejected draft are not those without a drafter.
DRAFTERS = {
    "V4 MTP": ("deepseek_v4", v4_mtp, "mtp", {}),
    "V4 DSpark": ("deepseek_v4", v4_dspark, "dflash", {}),
    "GLM MTP": ("glm5_next", glm_mtp, "mtp", {}),
    "Hy4 MTP": ("hy_v4", hy_mtp, "mtp", {"index_topk": 64}),
    "Hy4 MTP, chosen keys": ("hy_v4", hy_mtp, "mtp", {}),
    "Qwen MTP": ("qwen4_exp", qwen_mtp, "mtp", {}),
}
drafters = pytest.mark.parametrize("kind", DRAFTERS)


def generated(model, **drafting) -> list[int]:
    options = {"max_tokens": STEPS, "temperature": 0.0, **drafting}
    return [int(token) for token, _ in generate_step(PROMPT[None], model, None, None, **options)]


def drafted(kind: str, model, draft, follow: list[int]) -> tuple[list[int], list, list[int]]:
    """Tokens, the drafter's own proposals, and how many of each block were accepted: of the block
    of round k the first k % 4, because they become the next tokens of follow."""
    own, right = [], draft.draft_block

    def draft_block(*args, **kwargs):
        proposed = right(*args, **kwargs)
        own.append(proposed.tolist())
        k, after = len(draft.accept_lens), 1 + sum(draft.accept_lens) + len(draft.accept_lens)
        count = min(k % BLOCK, proposed.shape[1])
        told = follow[after : after + count]
        wrong = [(t + 1) % 90 for t in follow[after + count : after + proposed.shape[1]]]
        tokens = told + wrong + [0] * (proposed.shape[1] - len(told) - len(wrong))
        return mx.array([tokens], proposed.dtype)

    draft.draft_block = draft_block
    options = {"draft_model": draft, "draft_kind": DRAFTERS[kind][2], "draft_block_size": BLOCK}
    found = generated(model, **options)
    return found, own, list(draft.accept_lens)


@functools.cache
def by_mlx_vlm(kind: str) -> tuple[list[int], tuple]:
    """Tokens without a drafter, and what `drafted` returns, of mlx-vlm's own model."""
    name, make, _, sizes = DRAFTERS[kind]
    stock = whole(name, **sizes)
    want = generated(stock)
    return want, drafted(kind, stock, make(stock.language_model.config), want)


@drafters
def test_speculative_decoding(kind, launched):
    """The tokens are those without a drafter and those of mlx-vlm's own, and the drafter proposes
    what it proposed."""
    name, make, _, sizes = DRAFTERS[kind]
    want, own = by_mlx_vlm(kind)
    model = patched(whole(name, **sizes))
    draft = make(model.language_model.config)
    if name in ("deepseek_v4", "qwen4_exp"):
        sites = adapter.family_of("test", patched(draft)).sites(draft)
        assert len(sites) == (5 if kind == "V4 DSpark" else 3)
        assert all(site.options is not None for site in sites)
    else:
        with pytest.raises(ValueError, match="model must be one of these"):
            patched(draft)
    ours = drafted(kind, model, draft, want)
    assert ours == own
    assert generated(model) == want
    if kind != "Hy4 MTP, chosen keys":
        assert ours[0] == want and {0, 1, 2, 3} <= set(ours[2])


def test_glm_mtp_reads_what_it_read(launched):
    """The merged states of a prompt and of verified tokens, within rounding, and what the drafter
    makes of them. Hy4's are in test_mlx_vlm_hy_v4.py."""
    model, found = whole("glm5_next").language_model, []
    mtp, embedded = glm_mtp(model.config), model.model.embed_tokens(tokens(9, seed=1))
    for _ in range(2):
        cache = model.make_cache()
        options = {"return_hidden": True, "cache": cache}
        merged = [model(t, **options).hidden_states[-1] for t in (tokens(9), tokens(3, seed=1))]
        mtp.reset(model)
        found.append([*merged, mtp._forward_hidden(embedded, merged[0], None, mtp.make_cache())[0]])
        patched(model)
    for want, got in zip(*found, strict=True):
        assert got.shape == want.shape and got.ndim == 3 and got.dtype == want.dtype
        assert mx.abs(got - want).max() <= 2e-5 * mx.abs(want).max()
