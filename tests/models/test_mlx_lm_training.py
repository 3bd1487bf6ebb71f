"""Gradients of patched DeepSeek V4.1 models, by mlx-lm's tuner too."""

import functools
import itertools
import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: training with it is not tested")

from mlx_lm.models import deepseek_v41 as stock  # noqa: E402
from mlx_lm.tuner import trainer  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402

from mhc_mlx import launch  # noqa: E402
from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models.exact import random_inputs  # noqa: E402
from mhc_mlx.models.families import lm_deepseek_v41 as family  # noqa: E402
from mhc_mlx.models.gradients import straight_through  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import find_sites, run_ours, tiny, tokens  # noqa: E402

launched = modules.launched

INDICES = r"\[gather_axis\] Cannot calculate VJP with respect to indices"
if mx.metal.is_available():
    INDICES += "|Not implemented for"  # or mlx-lm's own Sinkhorn kernel, whichever comes first
BATCH = (tokens(17, 2), mx.array([[0, 16], [0, 16]]))


def loss(model):
    return trainer.default_loss(model, *BATCH)[0]


def gradients(model):
    value, found = nn.value_and_grad(model, loss)(model)
    mx.eval(value, found)
    return value, dict(tree_flatten(found))


def trainable(model):
    return adapter.patch(model, trainable=True, verify=False)


def by_plain_ops(model):
    """The model with mlx-lm's own composition of every hyper-connection, but for the choices and
    roundings that have no gradient anywhere."""
    for layer in trainable(model).layers:
        layer.__class__ = stock.DecoderLayer
        for hc in (layer.attn_hc, layer.ffn_hc):
            hc.__class__ = family.DifferentiableHyperConnection
    return model


def agree(got: dict, want: dict, tolerance: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name in got:
        error, most = mx.abs(got[name] - want[name]).max().item(), mx.abs(want[name]).max().item()
        assert error <= tolerance * most, f"{name}: error {error}, largest value {most}"


def silent(found: dict) -> set[str]:
    return {name for name, g in found.items() if mx.abs(g).max().item() == 0}


def test_errors_of_the_stock_model():
    """As MLX words them: of the router's indices, and behind these of the roundings."""
    model = tiny()
    with pytest.raises(ValueError, match=INDICES):
        gradients(model)
    for module in model.modules():
        if type(module) in (stock.Router, stock.Indexer, stock.HyperConnection):
            module.__class__ = family.FAMILY.trained[type(module)]
    with pytest.raises(ValueError, match=r"\[Primitive::vjp\] Not implemented for FromFP8"):
        gradients(model)


def test_only_this_model(launched):
    """Nothing of mlx-lm or MLX is changed: another model still has no gradient."""
    before = {name: vars(stock)[name] for name in ("mx", "_fake_quant_fp8", "_sinkhorn")}
    argpartition, methods = mx.argpartition, dict(vars(stock.Router))
    gradients(trainable(tiny()))
    assert all(vars(stock)[name] is value for name, value in before.items())
    sinkhorn = family.DifferentiableHyperConnection.__call__.__globals__["_sinkhorn"]
    assert sinkhorn.__globals__["_sinkhorn_kernel"] is None  # on Metal, where it has no gradient
    assert mx.argpartition is argpartition and dict(vars(stock.Router)) == methods
    with pytest.raises(ValueError, match=INDICES):
        gradients(tiny())
    with pytest.raises(ValueError, match=INDICES):
        gradients(adapter.unpatch(trainable(tiny())))


@pytest.mark.parametrize("quantise", [stock._fake_quant_fp8, stock._fake_quant_fp4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_rounding_passes_its_gradient(quantise, dtype):
    x = (4 * mx.random.normal((3, 64))).astype(dtype)
    f = functools.partial(straight_through(quantise), block_size=32)
    dout = mx.random.normal(x.shape).astype(dtype)
    (out,), (dx,) = mx.vjp(f, [x], [dout])
    assert mx.array_equal(out, quantise(x, block_size=32)).item()
    assert mx.array_equal(dx, dout).item() and not mx.array_equal(out, x).item()


@pytest.mark.parametrize("round_to", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_site(round_to, launched):
    """fn, base, scale, both activations and the norm's weight, with random cotangents. In bfloat16
    the plain ops are those of float32, less their rounding."""
    model = trainable(tiny())
    site = find_sites(model)[1]
    x, y = random_inputs(site, mx.float32, 6)

    def of(run, dtype):
        def f(x, y, fn, base, scale, weight):
            site.hc.update({"fn": fn, "base": base, "scale": scale})
            site.norm.update({"weight": weight})
            return run(x, y)

        hc = site.hc.parameters()
        arrays = [x.astype(dtype), y.astype(dtype), hc["fn"], hc["base"], hc["scale"]]
        arrays += [site.norm.weight.astype(dtype)]
        outs = [a.astype(dtype) for a in made[:2]] + [made[2]]
        found = mx.vjp(f, arrays, outs)[1]
        site.hc.update(hc)
        site.norm.update({"weight": arrays[-1].astype(mx.float32)})
        return dict(zip(("x", "y", "fn", "base", "scale", "weight"), found, strict=True))

    made = [mx.random.normal(a.shape) for a in run_ours(site, x, y)]
    plain = functools.partial(family.DifferentiableHyperConnection.__call__, site.hc)
    want = of(lambda x, y: family.stock_site(plain, x, y, site.norm), mx.float32)
    got = of(lambda x, y: run_ours(site, x, y), round_to)
    assert all(got[k].dtype == (round_to if k in ("x", "y", "weight") else mx.float32) for k in got)
    agree(got, want, 1e-4 if round_to == mx.float32 else 3e-2)


@pytest.mark.parametrize("layers", [1, 4])
def test_every_gradient(layers, launched):
    """Of the whole model. Nothing reaches what only chooses: the indexers, the experts' bias."""
    want_value, want = gradients(by_plain_ops(tiny(layers=layers)))
    value, got = gradients(trainable(tiny(layers=layers)))
    assert abs(value - want_value) < 1e-5 * want_value
    agree(got, want)
    assert silent(got) == silent(want)
    assert all(".indexer." in k or k.endswith("e_score_correction_bias") for k in silent(got))
    assert sum("_hc." in name for name in got) == 6 * layers


def adapted(how: str):
    """A frozen 4-bit model with adapters and trainable connections, patched before or after."""
    model = tiny(kind="4-bit float32")
    model.freeze()
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    if how == "patched first":
        trainable(model)
    mx.random.seed(3)
    linear_to_lora_layers(model, 2, config)
    for layer in model.layers:
        layer.attn_hc.unfreeze()
        layer.ffn_hc.unfreeze()
    if how == "patched last":
        trainable(model)
    return by_plain_ops(model) if how == "plain ops" else model


@pytest.mark.parametrize("how", ["patched first", "patched last"])
def test_lora_step(how, launched):
    _, want = gradients(adapted("plain ops"))
    model = adapted(how)
    _, got = gradients(model)
    assert {name.rsplit(".", 1)[1] for name in got} == {"lora_a", "lora_b", "fn", "base", "scale"}
    agree(got, want)
    before = loss(model)
    optim.SGD(1e-2).update(model, nn.value_and_grad(model, loss)(model)[1])
    assert loss(model) < before


@pytest.fixture
def kernels():
    """Of this machine, or else the stand-in: MLX takes half a minute to compile the reference."""
    with modules.running("here" if launch.backend() else "stand-in") as found:
        yield found


def test_tuner(tmp_path, kernels):
    """mlx-lm's own training loop, compiled, evaluation and files included; the adapters then give
    the same in a stock model."""
    model = tiny(layers=2, kind="4-bit float32")
    model.freeze()
    mx.random.seed(3)
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, config)
    trainable(model)

    losses = []

    class Losses(trainer.TrainingCallback):
        def on_train_loss_report(self, info):
            losses.append(info["train_loss"])

    def batches(dataset, batch_size, max_seq_length, loop=False, comm_group=None):
        return itertools.repeat(BATCH, 100 if loop else 1)

    file = tmp_path / "adapters.safetensors"
    options = {"batch_size": 2, "iters": 12, "steps_per_report": 3, "steps_per_eval": 6}
    args = trainer.TrainingArgs(**options, val_batches=1, adapter_file=str(file))
    options = {"iterate_batches": batches, "training_callback": Losses()}
    trainer.train(model, optim.Adam(3e-3), [0, 0], [0, 0], args, **options)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = load_adapters(tiny(layers=2, kind="4-bit float32"), str(tmp_path)).eval()
    want = model.eval()(BATCH[0])
    error = mx.abs(again(BATCH[0]) - want).max().item()
    assert error <= 1e-5 * mx.abs(want).max().item()


def test_checkpointed_layers_are_refused(monkeypatch):
    """mlx-lm's own loses the compressed keys that one layer makes for another: its loss would be
    another."""
    for cls in (family.SinglePassLayer, stock.DecoderLayer):
        monkeypatch.setattr(cls, "__call__", cls.__call__)  # which grad_checkpoint replaces
    model = trainable(tiny())
    trainer.grad_checkpoint(model.layers[0])
    with pytest.raises(ValueError, match="must not be under mlx-lm's grad_checkpoint"):
        gradients(model)
    model = adapter.unpatch(model)
    right = loss(model)
    trainer.grad_checkpoint(model.layers[0])
    assert abs(loss(model) - right) > 1e-3
