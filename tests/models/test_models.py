"""Whole models of hyper-connections: training, MLX's transformations, formats and dtypes."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mhc_mlx as m
from mhc_mlx import reference
from models import modules
from models.modules import TOKENS, C, N, Tiny, close, conventions, hidden, loss_fn, shaken, silent

launched = modules.launched


@conventions
def test_every_gradient_is_alive_after_ten_steps(convention, launched):
    """And at step 0 all but those of h_res, which equal streams hide, alpha's too. The read-out
    prefers a stream: a mean would hide the last h_res, whose columns sum to one."""
    model, optimizer = Tiny(convention), optim.AdamW(1e-2, eps=1e-6)
    model.head.bias = mx.array([2.0] + [-2.0] * (N - 1))
    step, first = nn.value_and_grad(model, loss_fn), "blocks.0.connection"
    losses = []
    for k in range(11):
        loss, gradients = step(model)
        losses.append(loss.item())
        if k == 0:
            zero = silent(gradients, convention, first)
            print(f"{convention.name}: zero at step 0, by symmetry: {sorted(zero)}")
            assert all(name.endswith("res") for name in zero), zero
            if convention.start == "unconstrained":  # its rows of phi start with zeros
                assert zero == {f"blocks.{b}.connection.alpha.res" for b in range(3)}
            else:
                assert not zero or hidden(first, convention, False), zero
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    assert losses[-1] < losses[0] - 0.1
    zero = silent(gradients, convention, first)
    assert zero <= hidden(first, convention, False), zero


@conventions
def test_compiled_step_equals_eager(convention, launched):
    eager, compiled = Tiny(convention, depth=2), Tiny(convention, depth=2)
    compiled.update(eager.parameters())
    losses = {}
    for model in (eager, compiled):
        optimizer = optim.Adam(1e-2, eps=1e-6)
        state = [model.state, optimizer.state]

        def step(tokens, model=model, optimizer=optimizer):
            loss, gradients = nn.value_and_grad(model, loss_fn)(model, tokens)
            optimizer.update(model, gradients)
            return loss

        run = mx.compile(step, inputs=state, outputs=state) if model is compiled else step
        losses[id(model)] = []
        for _ in range(5):
            losses[id(model)].append(run(TOKENS))
            mx.eval(losses[id(model)], state)
    a, b = (np.array([v.item() for v in ls]) for ls in losses.values())
    assert np.abs(a - b).max() < 1e-4 and a[0] - a[-1] > 1e-2


def test_checkpoint_gives_the_same_gradients(launched):
    model = shaken(Tiny(), 0.1)
    plain = nn.value_and_grad(model, loss_fn)(model)[1]
    again = nn.value_and_grad(model, loss_fn)(model, wrap=nn.utils.checkpoint)[1]
    for (name, a), (_, b) in zip(tree_flatten(plain), tree_flatten(again), strict=True):
        assert mx.abs(a - b).max().item() < 1e-5, name


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_vmap_gives_each_examples_results_and_gradients(dynamic, launched):
    """Of examples of two tokens: all parameters are shared, their gradients are per example."""
    block = shaken(m.MHCBlock(mx.tanh, C, N, norm=nn.RMSNorm(C), dynamic=dynamic))
    block.head = shaken(m.HyperHead(C, N))
    x, weights = mx.random.normal((3, 2, N, C)), mx.random.normal((2, C))
    close(m.vmap(block)(x), mx.stack([block(e) for e in x]))

    names, arrays = zip(*tree_flatten(block.trainable_parameters()), strict=True)

    def loss(x, *arrays):
        block.load_weights(list(zip(names, arrays, strict=True)))
        return (block.head(block(x)) * weights).sum()

    gradients = mx.grad(loss, argnums=tuple(range(1 + len(arrays))))
    got = m.vmap(gradients, in_axes=(0, *[None] * len(arrays)))(x, *arrays)
    each = zip(*(gradients(e, *arrays) for e in x), strict=True)
    for name, a, b in zip(("x", *names), got, each, strict=True):
        assert mx.abs(a).max() > 1e-4, name
        close(a, mx.stack(b), 2e-5)


@pytest.mark.parametrize("option", ["use_metal", "differentiable"])
def test_export(launched, tmp_path, option):
    """MLX exports no function that has a gradient of its own: by the reference, by bare kernels."""
    model, path = shaken(Tiny(), 0.1), str(tmp_path / "model.mlxfn")
    want = model(TOKENS)
    for module in model.modules():
        if hasattr(module, option):
            setattr(module, option, False)
    mx.export_function(path, model, TOKENS)
    close(mx.import_function(path)(TOKENS)[0], want)


def test_quantize_wraps_the_layers_only(launched):
    model = shaken(Tiny(), 0.05)
    want = model(TOKENS)
    before = dict(tree_flatten(model.blocks[0].connection.parameters()))
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.blocks[0].layer, nn.QuantizedLinear)
    for name, p in tree_flatten(model.blocks[0].connection.parameters()):
        assert (p == before[name]).all() and p.dtype == mx.float32
    assert 0 < mx.abs(model(TOKENS) - want).max() < 0.1


def test_freeze_leaves_the_gradients_of_the_rest(launched):
    model = shaken(Tiny(), 0.1)
    step = nn.value_and_grad(model, loss_fn)
    whole = dict(tree_flatten(step(model)[1]))
    connections = [block.connection for block in model.blocks]
    for rest, count in (connections, 9), ([model.embedding, model.head], 4):
        model.freeze()
        assert not tree_flatten(model.trainable_parameters())
        for module in rest:
            module.unfreeze()
        gradients = tree_flatten(step(model)[1])
        assert len(gradients) == count
        for name, g in gradients:
            assert (".connection." in name) == (rest is connections) and ".layer." not in name
            close(g, whole[name], 1e-6)


def test_safetensors_round_trip(launched, tmp_path):
    model, other = shaken(Tiny(m.MHC_LITE)), Tiny(m.MHC_LITE)
    model.save_weights(str(tmp_path / "weights.safetensors"))
    other.load_weights(str(tmp_path / "weights.safetensors"))
    assert (model(TOKENS) == other(TOKENS)).all()
    names = {name for name, _ in tree_flatten(other.blocks[0].connection.parameters())}
    assert names == {"phi", "bias", "alpha"}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("cast", ["all", "layers"])
def test_a_half_precision_model_makes_float32_coefficients(dtype, cast, launched):
    """Of parameters cast with the model, or left in float32."""
    model = shaken(Tiny(), 0.1)
    want, connection = model(TOKENS), model.blocks[0].connection
    for module in [model] if cast == "all" else [model.embedding, *(b.layer for b in model.blocks)]:
        module.set_dtype(dtype)
    assert connection.phi.dtype == (dtype if cast == "all" else mx.float32)
    x = mx.random.normal((3, N, 2 * C)).astype(dtype)
    parameters = (p.astype(mx.float32) for p in (connection.phi, connection.bias, connection.alpha))
    for a, b in zip(
        connection.coefficients(x),
        reference.mhc_coefficients(x.astype(mx.float32), *parameters),
        strict=True,
    ):
        close(a, b, 1e-6)
    got = model(TOKENS)
    assert got.dtype == dtype
    error = mx.abs(got.astype(mx.float32) - want).max() / mx.abs(want).max()
    assert error.item() < 2 * mx.finfo(dtype).eps
    gradients = nn.value_and_grad(model, loss_fn)(model)[1]
    for (name, g), (_, p) in zip(
        tree_flatten(gradients), tree_flatten(model.trainable_parameters()), strict=True
    ):
        assert g.dtype == p.dtype and mx.isfinite(g).all() and mx.abs(g).max() > 0, name
