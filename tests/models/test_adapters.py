"""`save_adapters` and `load_adapters`: patched and widened models, LoRA and full, and what does not
fit."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapters are not tested")

import mlx_lm.tuner.utils as tuner  # noqa: E402
from mlx_lm.models.llama import Model, ModelArgs  # noqa: E402

import mhc_mlx as m  # noqa: E402
from mhc_mlx.adapters import load_adapters, save_adapters  # noqa: E402
from mhc_mlx.models import patch, unpatch  # noqa: E402
from models.modules import loss_fn  # noqa: E402
from models.tiny_deepseek import tiny, tokens  # noqa: E402

LORA = {"rank": 4, "scale": 10.0, "dropout": 0.05}
PROMPT = tokens(9, 2) % 50


def llama(seed=0):
    mx.random.seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Model(ModelArgs("llama", rms_norm_eps=1e-5, **sizes))


def widened(seed=0, base=0, **options):
    """A frozen llama between trainable connections; base is the seed of its own parameters."""
    model = llama(base)
    model.freeze()
    mx.random.seed(100 + seed)
    return m.widen(model, 4, **options)


def patched(**options):
    model = tiny(layers=2, kind="4-bit float32", **options)
    model.freeze()
    return patch(model, trainable=True, verify=False)


def stock(**options):
    model = tiny(layers=2, kind="4-bit float32", **options)
    model.freeze()
    return model


def add_lora(model, **settings):
    tuner.linear_to_lora_layers(model, 2, LORA | settings)
    return model


def unfreeze_sites(model):
    for layer in model.layers:
        layer.attn_hc.unfreeze()
        layer.ffn_hc.unfreeze()
    return model


def shake(model):
    """The model with noise on every trainable parameter, as after training."""
    noise = tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.trainable_parameters())
    model.update(noise)
    mx.eval(model.parameters())
    return model.eval()


def flat(model):
    return dict(tree_flatten(model.parameters()))


def same(got, want):
    """Every parameter, its name and dtype, and the output, bit for bit.

    If one of two is patched, both are compared as mlx-lm's own, whose rounding is another.
    """
    a, b = flat(got), flat(want)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]).item(), name
    if type(got.layers[0]) is not type(want.layers[0]):
        unpatch(got), unpatch(want)
    assert mx.array_equal(got.eval()(PROMPT), want.eval()(PROMPT)).item()


def full(model):
    model.unfreeze()
    return model


# A trained model, and the model to load into: of the same base, before training.
TRAINED = {
    "widened, connections": (widened, lambda: widened(1)),
    "widened, static": (lambda: widened(dynamic=False), lambda: widened(1, dynamic=False)),
    "widened, LoRA": (lambda: add_lora(widened()), lambda: widened(1)),
    "widened, LoRA before": (
        lambda: m.widen(add_lora(llama()), 4, example=(None, None)),
        lambda: widened(1),
    ),
    "widened, full": (lambda: full(widened()), lambda: full(widened(1, base=5))),
    "patched, LoRA": (lambda: add_lora(patched()), patched),
    "patched, LoRA and sites": (lambda: unfreeze_sites(add_lora(patched())), patched),
    "patched, sites": (lambda: unfreeze_sites(patched()), patched),
    "patched, into stock": (lambda: unfreeze_sites(add_lora(patched())), stock),
    "stock, into patched": (lambda: unfreeze_sites(add_lora(stock())), patched),
    "DoRA": (
        lambda: dora(widened()),
        lambda: widened(1),
    ),
    "again": (lambda: add_lora(widened()), lambda: add_lora(widened(1))),
}


def dora(model):
    tuner.linear_to_lora_layers(model, 2, LORA | {"keys": ["self_attn.q_proj"]}, use_dora=True)
    return model


@pytest.mark.parametrize("trained, fresh", TRAINED.values(), ids=TRAINED.keys())
def test_round_trip(trained, fresh, tmp_path):
    """Bit for bit, in a model whose own start was another; and the file has no more than needed."""
    want = shake(trained())
    save_adapters(want, tmp_path / "new" / "folder")
    assert {f.name for f in (tmp_path / "new/folder").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }
    got = fresh()
    before = got.eval()(PROMPT)
    assert load_adapters(got, str(tmp_path / "new/folder")) is got
    same(got, want)
    assert not mx.array_equal(got(PROMPT), before).item()
    saved = set(mx.load(str(tmp_path / "new/folder/adapters.safetensors")))
    assert saved == set(dict(tree_flatten(want.trainable_parameters())))


def test_after_steps_of_training(tmp_path):
    """An adapter replaces one of an earlier step; dtypes of the trained parameters are kept."""
    model, optimizer = add_lora(widened()), optim.SGD(1e-2)
    for layer in model.layers:
        for connection in layer.connections:
            connection.update(tree_map(lambda a: a.astype(mx.bfloat16), connection.parameters()))
    for _ in range(2):
        gradients = nn.value_and_grad(model, lambda model: loss_fn(model, PROMPT))(model)[1]
        optimizer.update(model, gradients)
        save_adapters(model, tmp_path)
    got = load_adapters(widened(1), tmp_path)
    same(got, model)
    assert got.layers[0].connections[0].phi.dtype == mx.bfloat16


def test_frozen_connections_of_widen_are_saved(tmp_path):
    """No base has them: widen starts them at random."""
    model = widened()
    model.freeze()
    shake(add_lora(model))
    save_adapters(model, tmp_path)
    same(load_adapters(widened(1), tmp_path), model)


def test_what_is_trainable_stays(tmp_path):
    save_adapters(shake(unfreeze_sites(add_lora(patched()))), tmp_path)
    model = load_adapters(patched(), tmp_path)
    leaves = {name.rsplit(".", 1)[1] for name, _ in tree_flatten(model.trainable_parameters())}
    assert leaves == {"lora_a", "lora_b"}


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_mlx_lm_reads_it(kind, tmp_path):
    """Its own loader, where there are LoRA parameters alone, or none."""
    made = {"lora": add_lora, "dora": dora, "full": full}[kind]
    frozen = llama()
    frozen.freeze()
    want = shake(made(frozen))
    save_adapters(want, tmp_path)
    got = tuner.load_adapters(llama(), str(tmp_path))
    same(got, want)
    if kind == "lora":
        config = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
        assert {k: v for k, v in config.items() if k != "keys"} == LORA
        layer = got.layers[2].self_attn.q_proj
        assert layer.dropout._p_1 == want.layers[2].self_attn.q_proj.dropout._p_1 < 1


def test_mlx_lm_reads_lora_of_a_patched_model(tmp_path):
    want = shake(add_lora(patched()))
    save_adapters(want, tmp_path)
    same(tuner.load_adapters(stock(), str(tmp_path)), unpatch(want))
    save_adapters(unfreeze_sites(want), tmp_path)
    with pytest.raises(ValueError, match="not an adapter parameter in the model"):
        tuner.load_adapters(stock(), str(tmp_path))


# ---- what does not fit


def refused(model, folder, message):
    """`load_adapters` raises, and the model is as it was."""
    before, kinds = flat(model), [(k, type(x)) for k, x in model.named_modules()]
    with pytest.raises(ValueError, match=rf"\[load_adapters\] {message}"):
        load_adapters(model, folder)
    after = flat(model)
    assert after.keys() == before.keys() and all(after[k] is a for k, a in before.items())
    assert [(k, type(x)) for k, x in model.named_modules()] == kinds


def cast(model, name, change):
    model.update(tree_unflatten([(name, change(flat(model)[name]))]))
    return model


def one_bit(a):
    words = mx.contiguous(a).view(mx.uint32).flatten()
    return mx.concatenate([words[:-3], words[-3:-2] ^ 1, words[-2:]]).view(a.dtype).reshape(a.shape)


UP, EMBED = "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"


def quantised(model):
    nn.quantize(model, 32, 8)
    return model


BASES = {
    "other weights": (lambda: widened(base=7), "model must have the parameter model"),
    "one bit": (
        lambda: cast(widened(), UP, one_bit),
        f"model must have the parameter {UP}",
    ),
    "two rows": (
        lambda: cast(widened(), EMBED, lambda a: a[mx.array([1, 0, *range(2, 50)])]),
        f"model must have the parameter {EMBED}",
    ),
    "dtype": (
        lambda: cast(widened(), UP, lambda a: a.astype(mx.float16)),
        rf"model must have the parameter {UP} = float32 \[64, 32\] \w+, .* got float16 \[64, 32\]",
    ),
    "quantised": (lambda: quantised(widened()), "model must have the parameter .* but got uint32"),
    "other LoRA": (
        lambda: add_lora(widened(), rank=5),
        "model must have no LoRA layers, or",
    ),
}


@pytest.mark.parametrize("other, message", BASES.values(), ids=BASES.keys())
def test_another_base(other, message, tmp_path):
    save_adapters(shake(add_lora(widened())), tmp_path)
    refused(other(), tmp_path, message)


FEWER = m.Convention("PAPER", first="columns", iters=3)
CONNECTIONS = {
    "not widened": (llama, "must have the module model.layers.0.* widened.* but got none"),
    "streams": (
        lambda: m.widen(llama(), 2),
        "have model.layers.0.enters = 4, .* but got 2",
    ),
    "convention": (
        lambda: widened(convention=m.ROW_FIRST),
        "convention.first = 'columns'",
    ),
    "iterations": (
        lambda: widened(convention=FEWER),
        r"convention.iters = 20, .* got 3\.",
    ),
    "eps": (lambda: widened(norm_eps=1e-5), r"connections.*norm_eps = 1e-06, .* but got 1e-05\."),
    "read-out": (lambda: widened(reduce="sum"), r"model.layers.2.leaves = 'mean', .* got 'sum'"),
    "static": (lambda: widened(dynamic=False), "connections.*dynamic = True"),
}


@pytest.mark.parametrize("other, message", CONNECTIONS.values(), ids=CONNECTIONS.keys())
def test_other_connections(other, message, tmp_path):
    save_adapters(shake(widened()), tmp_path)
    refused(other(), tmp_path, f".*{message}")


def test_a_widened_model_and_an_adapter_of_a_plain_one(tmp_path):
    save_adapters(shake(add_lora(llama())), tmp_path)
    refused(widened(), tmp_path, "model must have no connection model.layers.0")


@pytest.mark.parametrize("name", ["iters", "hc_eps", "norm_eps"])
def test_sites_with_other_constants(name, tmp_path):
    save_adapters(shake(unfreeze_sites(patched())), tmp_path)
    other = patched()
    setattr(other.layers[1].ffn_hc, name, 2 * getattr(other.layers[1].ffn_hc, name))
    refused(other, tmp_path, rf"model must have model.layers.1.ffn_hc.{name} = ")
    other.layers[1].ffn_hc.use_metal = False  # no constant of the maths
    setattr(other.layers[1].ffn_hc, name, getattr(other.layers[0].ffn_hc, name))
    load_adapters(other, tmp_path)


def test_trained_parameters_of_another_shape(tmp_path):
    """Nothing else differs: a norm of more channels."""
    model = llama()
    model.freeze()
    model.model.norm.unfreeze()
    save_adapters(shake(model), tmp_path)
    other = cast(llama(), "model.norm.weight", lambda a: mx.ones(33))
    refused(other, tmp_path, r"model must have model.norm.weight of shape \[32\], .* got \[33\]")


def change(folder, f):
    """Write the folder's tensors again, changed by f, with the SHA-256 of the new file."""
    import hashlib

    file, config = folder / "adapters.safetensors", folder / "adapter_config.json"
    arrays = f(dict(mx.load(str(file))))
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)
    record = json.loads(config.read_text())
    record["mhc_mlx"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    config.write_text(json.dumps(record))


PHI = "model.layers.0.connections.0.phi"
TENSORS = {
    "extra": (lambda a: a | {"x.y": mx.zeros(3)}, r"have x.y of shape none in .* got \[3\]"),
    "missing": (lambda a: {k: v for k, v in a.items() if k != PHI}, f"have {PHI} of .* got none"),
    "shape": (lambda a: a | {PHI: a[PHI][1:]}, rf"have {PHI} of shape \[24, 128\] .*\[23, 128\]"),
}


@pytest.mark.parametrize("f, message", TENSORS.values(), ids=TENSORS.keys())
def test_other_tensors(f, message, tmp_path):
    save_adapters(shake(add_lora(widened())), tmp_path)
    change(tmp_path, f)
    refused(widened(), tmp_path, f"folder must {message}")


def test_lora_of_another_shape_leaves_no_layers(tmp_path):
    """Files that agree with each other and with the base, and not with the rank that they name."""
    save_adapters(shake(add_lora(widened())), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["rank"] = 3
    file.write_text(json.dumps(config))
    refused(widened(), tmp_path, r"model must have room for .*lora_[ab] of shape .* but got \[")


def test_files(tmp_path):
    """Missing, damaged, of another call or of another program."""
    save_adapters(shake(widened()), tmp_path)
    file, config = tmp_path / "adapters.safetensors", tmp_path / "adapter_config.json"
    arrays, text = file.read_bytes(), config.read_text()
    refused(widened(), tmp_path / "none", "folder must have adapter_config.json but got .*none")
    for name, kept in ((file, arrays), (config, text.encode())):
        name.unlink()
        refused(widened(), tmp_path, f"folder must have {name.name} but got")
        name.write_bytes(kept)
    file.write_bytes(arrays[:-1] + bytes([arrays[-1] ^ 1]))
    refused(widened(), tmp_path, "folder must have the adapters.safetensors that")
    file.write_bytes(arrays[:30])
    refused(widened(), tmp_path, "folder must have arrays in adapters.safetensors")
    file.write_bytes(arrays)
    for wrong, message in (
        ("{", "folder must have JSON in adapter_config.json"),
        ("[]", "folder must be written by save_adapters"),
        (json.dumps({"fine_tune_type": "lora"}), "folder must be .* reads what mlx-lm wrote"),
        (text.replace('"format": 1', '"format": 2'), r"folder must be .* \(format 1\)"),
    ):
        config.write_text(wrong)
        refused(widened(), tmp_path, message)
    config.write_text(text)
    load_adapters(widened(), tmp_path)


def test_arguments(tmp_path):
    frozen = llama()
    frozen.freeze()
    for f in (save_adapters, load_adapters):
        with pytest.raises(TypeError, match=rf"\[{f.__name__}\] model must be an mlx.nn.Module"):
            f(None, tmp_path)
        with pytest.raises(TypeError, match=rf"\[{f.__name__}\] folder must be a path but got int"):
            f(frozen, 3)
    with pytest.raises(ValueError, match=r"\[save_adapters\] model must have trainable parameters"):
        save_adapters(frozen, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_lora_layers_of_two_kinds(tmp_path):
    model = llama()
    tuner.linear_to_lora_layers(model, 1, LORA | {"keys": ["self_attn.q_proj"]})
    tuner.linear_to_lora_layers(model, 1, LORA | {"rank": 2, "keys": ["self_attn.k_proj"]})
    with pytest.raises(ValueError, match="of one kind, rank, scale and dropout, .* at model"):
        save_adapters(model, tmp_path)
    foreign = type("Foreign", (type(model.layers[2].self_attn.k_proj),), {"__module__": "peft.x"})
    model.layers[2].self_attn.k_proj.__class__ = foreign
    with pytest.raises(ValueError, match="layers of mlx_lm or mlx_vlm but got .*peft.x.Foreign"):
        save_adapters(model, tmp_path)


# ---- mlx-vlm


@pytest.fixture
def xing():
    reason = "mlx-vlm is not installed: adapters of its models are not tested"
    pytest.importorskip("mlx_vlm", reason=reason)
    from mlx_vlm.models.xing4_0.config import ModelConfig
    from mlx_vlm.models.xing4_0.language import LanguageModel

    def make(**options):
        mx.random.seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
        model = LanguageModel(ModelConfig(**sizes, qk_nope_head_dim=8, **options))
        model.freeze()
        return model

    return make


def xing_lora(model):
    from mlx_vlm.trainer.peft.adapter_utils import linear_to_lora_layers

    linear_to_lora_layers(model, 2, LORA)
    return model


def xing_same(got, want):
    a, b = flat(got), flat(want)
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)
    assert mx.array_equal(got.eval()(PROMPT).logits, want.eval()(PROMPT).logits).item()


def test_mlx_vlm(xing, tmp_path):
    """LoRA layers and connections of mlx-vlm, whose constants are in a config."""
    from mlx_vlm.trainer.peft.utils import load_adapters as stock_load_adapters

    model = shake(xing_lora(xing()))
    save_adapters(model, tmp_path / "lora")
    xing_same(load_adapters(xing(), tmp_path / "lora"), model)
    xing_same(stock_load_adapters(xing(), tmp_path / "lora"), model)
    save_adapters(shake(unfreeze_sites(model)), tmp_path)
    got = load_adapters(xing(), tmp_path)
    xing_same(got, model)
    assert type(got.layers[0].self_attn.o_proj).__module__.startswith("mlx_vlm.")
    message = r"model must have model.layers.0.attn_hc.config.hc_eps = 1e-06, .* but got 1e-05"
    refused(xing(hc_eps=1e-5), tmp_path, message)
