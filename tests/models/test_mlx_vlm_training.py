"""Patched models of mlx-vlm in mlx-vlm's own trainer, LoRA and full, against its own models mended
only where they choose or round."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: training with it is not tested")

from mlx_vlm.models.deepseek_v4 import language  # noqa: E402
from mlx_vlm.trainer import TrainingArgs, get_peft_model, load_adapters  # noqa: E402
from mlx_vlm.trainer.core import grad_checkpoint  # noqa: E402
from mlx_vlm.trainer.vlm.sft import trainer  # noqa: E402

from mhc_mlx import launch  # noqa: E402
from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models.family import GatedSite  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_vlm import MODELS, VOCABULARY, quantised, tokens, whole  # noqa: E402

launched = modules.launched
families = pytest.mark.parametrize("name", MODELS)
kinds = pytest.mark.parametrize("how", ["full", "LoRA"])
# Two texts of unequal length, which the trainer pads.
TEXTS = [{"input_ids": tokens(n, seed=n)[0], "pixel_values": None} for n in (20, 13)]
LENGTH = 33


@pytest.fixture
def kernels():
    """Of this machine, or else the stand-in: MLX takes long to compile the reference."""
    with modules.running("here" if launch.backend() else "stand-in") as found:
        yield found


def trainable(model):
    return adapter.patch(model, trainable=True, verify=False)


def mended(model):
    """mlx-vlm's own model, whose choices pass no gradient and whose roundings pass theirs."""
    trained = adapter.family_of("test", model).trained
    for module in model.modules():
        module.__class__ = trained.get(type(module), type(module))
    return model


def unfreeze_connections(model):
    for site in adapter.family_of("test", model).sites(model):
        if isinstance(site, GatedSite):  # its linear layers have LoRA
            site.hc.hc_norm.unfreeze()
            continue
        keys = [site.prefix + k for k in ("fn", "base", "scale")]
        site.hc.unfreeze(recurse=False, keys=keys)
    return model


def ready(name: str, how: str, **others):
    """Of the whole language model, or LoRA layers of mlx-vlm's choice and all connections; "QLoRA"
    are those of a model whose weights have 4 bits."""
    model = whole(name, **others)
    if how == "QLoRA":
        nn.quantize(model.language_model, 32, 4, class_predicate=quantised)
    if "LoRA" in how:
        mx.random.seed(3)
        get_peft_model(model, rank=4, alpha=8, dropout=0.0, verbose=False)
        return unfreeze_connections(model)
    model.freeze()
    model.language_model.unfreeze()
    return model


def shaken(model):
    """LoRA layers start with lora_b = 0, at which lora_a has no gradient."""
    for layer in model.modules():
        if "lora_b" in layer:
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(7))
    return model


def gradients(model) -> tuple[float, dict[str, mx.array]]:
    """By the trainer's batches and its loss."""
    batch = next(trainer.iterate_batches(TEXTS, 2, LENGTH))
    f = nn.value_and_grad(model, trainer.vision_language_loss_fn)
    (value, metrics), found = f(model.train(), batch)
    mx.eval(value, found)
    assert metrics["num_tokens"].item() == sum(len(t["input_ids"]) for t in TEXTS)
    return value.item(), dict(tree_flatten(found))


def silent(found: dict) -> set[str]:
    return {name for name, g in found.items() if mx.abs(g).max().item() < 1e-9}


def agree(got: dict, want: dict, tolerance: float = 3e-4) -> None:
    assert got.keys() == want.keys() and silent(got) == silent(want)
    for name, g in got.items():
        assert mx.isfinite(g).all().item(), name
        error, most = mx.abs(g - want[name]).max().item(), mx.abs(want[name]).max().item()
        assert name in silent(want) or error <= tolerance * most, f"{name}: {error}, {most}"


def trained_arrays(site) -> list[mx.array]:
    """The parameters of a site; of LoRA layers in it not the matrix, which is frozen."""
    if not isinstance(site, GatedSite):
        return list(site.arrays)
    return [a for k, a in tree_flatten(site.hc.parameters()) if not k.endswith("linear.weight")]


def connections(model, names) -> set[str]:
    sites = adapter.family_of("test", model).sites(model)
    ours = {id(a) for site in sites for a in trained_arrays(site)}
    return {k for k, a in tree_flatten(model.parameters()) if id(a) in ours and k in names}


@families
@kinds
def test_gradients_of_the_trainers_loss(name, how, launched):
    """One step, on a padded batch. The rows that only choose learn nothing, in both."""
    check_gradients(name, how)


@pytest.mark.parametrize("name", ["deepseek_v41", "hy_v4"])
def test_gradients_of_a_quantised_model(name, kernels):
    """The same of LoRA layers on weights of 4 bits."""
    check_gradients(name, "QLoRA")


def check_gradients(name: str, how: str) -> None:
    want_value, want = gradients(mended(shaken(ready(name, how))))
    model = trainable(shaken(ready(name, how)))
    value, got = gradients(model)
    assert abs(value - want_value) < 1e-5 * want_value
    agree(got, want)
    learn = connections(model, got)
    sites = adapter.family_of("test", model).sites(model)
    assert len(learn) == sum(len(trained_arrays(site)) for site in sites)
    assert not learn & silent(got)
    lora = {k.rsplit(".", 1)[1] for k in got} & {"lora_a", "lora_b"}
    assert lora == ({"lora_a", "lora_b"} if "LoRA" in how else set())
    scales = [k for k, _ in tree_flatten(model.parameters()) if k.endswith("linear.scales")]
    assert bool(scales) == (how == "QLoRA")


def losses_of(model, monkeypatch, folder, optimizer, iters: int = 4, **options) -> list[float]:
    """mlx-vlm's training loop, with its evaluation and its files."""
    losses = []

    def report(info, kind):
        losses.append(info["train_loss"]) if kind == "Training" else None
        return kind

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "format_metric_report", report)
        options = {"batch_size": 2, "max_seq_length": LENGTH, "val_batches": 1} | options
        args = TrainingArgs(iters=iters, steps_per_report=1, steps_per_eval=iters, **options)
        args.adapter_file = str(folder / "adapters.safetensors")
        np.random.seed(0)
        trainer.train(model, optimizer, TEXTS, TEXTS, args)
    return losses


@families
@kinds
def test_trainer(name, how, kernels, monkeypatch, tmp_path):
    """The loss falls as that of mlx-vlm's own ops, and what the trainer saves loads into a model
    that is not patched. Adam turns rounding of gradients near zero into steps, which move some
    choices of experts from the second step on, so that two losses are compared."""
    options = {"optimizer": optim.AdamW(2e-3, weight_decay=0.1)}
    own = mended(ready(name, how))
    want = losses_of(own, monkeypatch, tmp_path / "own", iters=2, **options)
    model = trainable(ready(name, how))
    options = {"optimizer": optim.AdamW(2e-3, weight_decay=0.1)}
    got = losses_of(model, monkeypatch, tmp_path / "ours", **options)
    assert len(got) == 4 and got[-1] < got[0] - (0.1 if how == "LoRA" else 1)
    assert np.abs(np.subtract(got[:2], want[:2])).max() < 2e-3 * want[0]
    before = dict(tree_flatten(whole(name).parameters()))
    after = dict(tree_flatten(model.parameters()))
    for key in before.keys() & after.keys():
        if not mx.issubdtype(before[key].dtype, mx.floating):  # tables of experts by token
            assert after[key].dtype == before[key].dtype
            assert mx.array_equal(after[key], before[key]).item(), key
    for key in connections(model, after) & before.keys():
        assert not mx.array_equal(after[key], before[key]).item(), key
    if how == "LoRA":
        again = load_adapters(whole(name), tmp_path / "ours")
    else:
        again = whole(name)
        again.load_weights(str(tmp_path / "ours/adapters.safetensors"), strict=False)
    logits = [m.eval()(TEXTS[0]["input_ids"][None]).logits for m in (model, again)]
    assert mx.abs(logits[0] - logits[1]).max() <= 2e-5 * mx.abs(logits[1]).max()


@families
def test_checkpointed_layers(name, kernels, monkeypatch):
    """mlx-vlm's grad_checkpoint leaves gradients as they are. Blocks of deepseek_v41 share arrays
    by a cache that it does not see, so these are refused. In GLM and Hy4 a layer uses the keys
    that an earlier one has chosen."""
    kinds = 3 * ["deepseek_sparse_attention"] + ["linear_attention"]
    shared = {"layer_types": kinds, "indexer_types": ["full", "full", "shared", "full"]}
    model = trainable(ready(name, "full", **shared if name == "glm5_next" else {}))
    cls = type(model.language_model.layers[0])
    _, want = gradients(model) if name != "deepseek_v41" else (0, {})
    monkeypatch.setattr(cls, "__call__", cls.__call__)  # grad_checkpoint changes the class
    grad_checkpoint(model.language_model.layers[0])
    if name == "deepseek_v41":
        with pytest.raises(ValueError, match="must not be under mlx-vlm's grad_checkpoint"):
            gradients(model)
    else:
        agree(gradients(model)[1], want)


# ---- gates of DeepSeek V4

GATES = {
    "by score": {},
    "by token": {"num_hash_layers": 1},
    "of images": {"vision_n_layers": 1},
    "by token, of images": {"num_hash_layers": 1, "vision_n_layers": 1},
}


def gate(kind: str, scoring: str = "sqrtsoftplus"):
    sizes = {"hidden_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 3}
    sizes |= {"vocab_size": VOCABULARY, "scoring_func": scoring, "routed_scaling_factor": 1.5}
    made = language.MoEGate(language.ModelConfig(**sizes | GATES[kind]), 0)
    random = np.random.default_rng(0)
    for key, a in made.parameters().items():
        if key == "tid2eid":
            rows = [random.permutation(8)[:3] for _ in range(VOCABULARY)]
            made[key] = mx.array(np.array(rows, np.int32))
        else:
            made[key] = mx.array(random.standard_normal(a.shape).astype(np.float32))
    return made


def plain_weights(g, x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    """Weights of experts that are chosen already."""
    logits = x @ weight.T
    if g.scoring_func == "softmax":
        return 1.5 * mx.take_along_axis(mx.softmax(logits, axis=-1), experts, axis=-1)
    soft = mx.sqrt(mx.logaddexp(logits, mx.zeros_like(logits)))
    scores = mx.sigmoid(logits) if g.scoring_func == "sigmoid" else soft
    chosen = mx.take_along_axis(scores, experts, axis=-1)
    return 1.5 * chosen / chosen.sum(-1, keepdims=True)


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind, scoring):
    """Experts and weights are mlx-vlm's bit for bit; the gradient is that of a formula whose
    experts are constants. Tokens of images, behind the vocabulary, choose by another bias."""
    from mhc_mlx.models.families import vlm_deepseek_v4 as family

    stock, ours = gate(kind, scoring).train(), gate(kind, scoring).train()
    ours.__class__ = family.DifferentiableMoEGate
    x = mx.random.normal((2, 9, 64), key=mx.random.key(0))
    dout = mx.random.normal((2, 9, 3), key=mx.random.key(1))
    ids = tokens(9, 2)
    if "images" in kind:
        ids = mx.where(mx.arange(9) % 3 == 1, VOCABULARY + 2, ids)
    experts, weights = stock(x, ids)
    got_experts, got = ours(x, ids)
    assert mx.array_equal(got_experts, experts).item()
    assert mx.array_equal(got, weights).item()
    if "images" in kind:
        text = mx.where(ids >= VOCABULARY, 0, ids)
        assert not mx.array_equal(stock(x, text)[0], experts).item()

    def of(f):
        return mx.vjp(f, [x, stock.weight], [dout])[1]

    def through(x, weight):
        ours.weight = weight
        return ours(x, ids)[1]

    for a, b in zip(of(through), of(lambda x, w: plain_weights(stock, x, w, experts)), strict=True):
        assert mx.abs(a - b).max() < 1e-5 * mx.abs(b).max()
    if "images" in kind:
        with pytest.raises(ValueError, match="VJP with respect to indices"):
            of(lambda x, w: stock.update({"weight": w})(x, ids)[1])


def test_the_table_of_a_gate_is_never_trained():
    """Whatever is frozen or unfrozen after `patch`, as mlx-vlm's trainer does."""
    model = trainable(whole("deepseek_v4"))
    table = "language_model.model.layers.0.ffn.gate.tid2eid"
    for change in (model.unfreeze, model.freeze, model.unfreeze):
        change()
        names = {k for k, _ in tree_flatten(model.trainable_parameters())}
        assert table not in names
    assert len(names) == len(tree_flatten(model.parameters())) - 1
