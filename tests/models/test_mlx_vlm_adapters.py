"""`save_adapters` and `load_adapters` on patched models of mlx-vlm, LoRA and full.

What adapters share with other models is in test_adapters.py."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its adapters are not tested")

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models import load_adapters, save_adapters  # noqa: E402
from models.test_mlx_vlm_training import (  # noqa: E402
    connections,
    families,
    kinds,
    ready,
    shaken,
    trainable,
)
from models.tiny_vlm import tokens, whole  # noqa: E402

PROMPT = tokens(9)


def patched(model):
    return adapter.patch(model, verify=False)


def flat(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def trained(name: str, how: str):
    """A patched model whose trainable parameters are not those of its base."""
    model = trainable(shaken(ready(name, how)))
    keys = iter(mx.random.split(mx.random.key(5), 1000))
    moved = [
        (k, a + 0.1 * mx.random.normal(a.shape, key=next(keys)))
        for k, a in tree_flatten(model.trainable_parameters())
    ]
    assert connections(model, dict(moved)) and all(a.dtype == mx.float32 for _, a in moved)
    model.update(tree_unflatten(moved))
    return model.eval()


@families
@kinds
def test_round_trip(name, how, tmp_path):
    """Every parameter bit for bit, into a patched model and into mlx-vlm's own, which is patched
    afterwards or not; and the answers."""
    model = trained(name, how)
    save_adapters(model, tmp_path)
    saved = set(mx.load(str(tmp_path / "adapters.safetensors")))
    assert saved == {k for k, _ in tree_flatten(model.trainable_parameters())}
    want, logits = flat(model), model(PROMPT).logits
    for fresh in (patched(whole(name)), whole(name)):
        got = load_adapters(fresh, tmp_path).eval()
        assert flat(got).keys() == want.keys()
        for key, a in flat(got).items():
            assert a.dtype == want[key].dtype and mx.array_equal(a, want[key]).item(), key
    found = patched(got)(PROMPT).logits
    assert mx.abs(found - logits).max() <= 2e-5 * mx.abs(logits).max()
    stock = [adapter.unpatch(m)(PROMPT).logits for m in (model, got)]
    assert mx.array_equal(*stock).item()
    assert mx.abs(stock[0] - whole(name)(PROMPT).logits).max() > 1e-2  # the adapter does something


def refused(model, folder, message):
    before = flat(model)
    with pytest.raises(ValueError, match=rf"\[load_adapters\] model must {message}"):
        load_adapters(model, folder)
    after = flat(model)
    assert after.keys() == before.keys() and all(after[k] is a for k, a in before.items())


def one_bit(name: str, key: str):
    """The model with another last bit in one frozen parameter."""
    model = whole(name)
    a = flat(model)[key]
    words = mx.contiguous(a).view(mx.uint32).flatten()
    other = mx.concatenate([words[:-1], words[-1:] ^ 1]).view(a.dtype).reshape(a.shape)
    return model.update(tree_unflatten([(key, other)]))


@families
def test_another_base(name, tmp_path):
    """Other weights, one bit of a frozen parameter, other constants, another family."""
    save_adapters(trained(name, "LoRA"), tmp_path)
    refused(patched(whole(name, seed=1)), tmp_path, "have the parameter ")
    key = next(k for k in flat(whole(name)) if k.endswith("embed_tokens.weight"))
    refused(patched(one_bit(name, key)), tmp_path, f"have the parameter {key}")
    eps = "rms_norm_eps" if name == "qwen4_exp" else "hc_eps"
    refused(patched(whole(name, **{eps: 2e-6})), tmp_path, r"have .*eps = 1e-06, .* got 2e-06")
    other = "xing4_0" if name != "xing4_0" else "hy_v4"
    refused(patched(whole(other)), tmp_path, "have (the module |.* of shape )")


def test_another_table_of_experts(tmp_path):
    """Full training leaves the integers of DeepSeek V4 alone, so they belong to the base."""
    save_adapters(trained("deepseek_v4", "full"), tmp_path)
    model = whole("deepseek_v4")
    gate = model.language_model.model.layers[0].ffn.gate
    gate.tid2eid = 3 - gate.tid2eid
    name = "language_model.model.layers.0.ffn.gate.tid2eid"
    refused(model, tmp_path, f"have the parameter {name} = int32 ")
