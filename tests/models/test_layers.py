"""MHCLayer with static coefficients and the streams around it, as this machine runs them and
through the stand-in.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mhc_mlx as m
from mhc_mlx import reference
from models import modules

launched = modules.launched


@pytest.mark.parametrize(
    "convention", [m.PAPER, m.ROW_FIRST, m.ADDITIVE, m.DEEPSEEK_V4], ids=lambda c: c.name
)
@pytest.mark.parametrize("n", [1, 4])
def test_start_values(convention, n, launched):
    layer = m.MHCLayer(n, 8, convention=convention, layer_idx=n + 1)
    h_pre, h_post = reference.gates(layer.H_pre, layer.H_post, convention)
    h_res = np.array(layer.mixing_matrix())
    if convention.sigmoid:
        want = np.full(n, 0.1 / max(n - 1, 1))
        want[1 % n] = 0.9
        assert np.abs(np.array(h_pre) - want).max() < 1e-5
        assert np.abs(h_res - np.eye(n)).max() < 4e-4
    else:
        assert np.allclose(np.array(h_pre), 1 / n) and np.abs(h_res - np.eye(n)).max() < 1e-6
    assert np.allclose(np.array(h_post), 1)


def test_equals_its_equations(launched):
    layer = m.MHCLayer(4, 16, sinkhorn_iters=7, eps=1e-3)
    layer.H_res = mx.random.normal((4, 4))
    layer.H_post = mx.random.normal((4,))
    x = mx.random.normal((2, 3, 4, 16))
    h_pre, h_post = mx.sigmoid(layer.H_pre), 2 * mx.sigmoid(layer.H_post)
    u = (h_pre[:, None] * x).sum(-2)
    y = u * mx.rsqrt((u * u).mean(-1, keepdims=True) + 1e-3)
    assert layer.convention.iters == 7
    want = layer.mixing_matrix() @ x + h_post[:, None] * y[..., None, :]
    assert mx.abs(layer(x) - want).max() < 2e-3  # the product may be TF32
    doubled = layer(x, lambda u: 2 * u)
    want = layer.mixing_matrix() @ x + 2 * h_post[:, None] * y[..., None, :]
    assert mx.abs(doubled - want).max() < 2e-3


def test_identity_sublayer_is_the_fused_layer(launched):
    layer, x = m.MHCLayer(4, 16), mx.random.normal((5, 4, 16))
    assert mx.abs(layer(x) - layer(x, lambda u: u)).max() < 1e-6


def test_every_gradient_is_alive_after_ten_steps(launched):
    """Equal streams hide h_res and h_pre: everywhere at step 0, in the first layer always. The mean
    at the end reads all streams alike, which hides the last h_res: its columns sum to one."""
    layers = [m.MHCLayer(4, 16, layer_idx=k) for k in range(3)]
    linears = [nn.Linear(16, 16) for _ in layers]
    model = nn.Module()
    model.layers, model.linears = layers, linears
    h, target = mx.random.normal((32, 16)), mx.random.normal((32, 16))

    def loss(model):
        x = m.expand_streams(h, 4)
        for layer, linear in zip(model.layers, model.linears, strict=True):
            x = layer(x, linear)
        return ((m.reduce_streams(x) - target) ** 2).mean()

    step, optimizer = nn.value_and_grad(model, loss), optim.SGD(0.5)
    for k in range(11):
        _, gradients = step(model)
        zero = [name for name, g in tree_flatten(gradients) if mx.abs(g).max().item() < 1e-10]
        print(f"zero at step {k}, because streams are equal or read alike:", zero)
        assert all(name.endswith(("H_pre", "H_res")) for name in zero), zero
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    assert set(zero) <= {"layers.0.H_pre", "layers.0.H_res", "layers.2.H_res"}, zero


def test_safetensors_round_trip_and_set_dtype(tmp_path, launched):
    layer = m.MHCLayer(4, 16)
    layer.H_res = mx.random.normal((4, 4))
    layer.save_weights(str(tmp_path / "layer.safetensors"))
    other = m.MHCLayer(4, 16)
    other.load_weights(str(tmp_path / "layer.safetensors"))
    x = mx.random.normal((2, 4, 16))
    assert (layer(x) == other(x)).all()
    assert {k for k, _ in tree_flatten(layer.parameters())} == {
        "H_pre",
        "H_post",
        "H_res",
        "rms_weight",
    }
    layer.set_dtype(mx.bfloat16)
    out = layer(x.astype(mx.bfloat16))
    assert out.dtype == mx.bfloat16 and mx.abs(out.astype(mx.float32) - other(x)).max() < 0.1


def test_streams_in_and_out():
    h = mx.random.normal((2, 3, 8))
    x = m.expand_streams(h, 4)
    assert x.shape == (2, 3, 4, 8) and (m.reduce_streams(x, "first") == h).all()
    assert mx.abs(m.reduce_streams(x) - h).max() < 1e-6
    assert mx.abs(m.reduce_streams(x, "sum") - 4 * h).max() < 1e-5
    assert (m.split_streams(m.merge_streams(x), 4) == x).all()
    assert m.split_streams(mx.arange(8), 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_repr_names_what_matters():
    assert "n=4, C=8, convention=PAPER, iters=3" in repr(
        m.MHCLayer(4, 8, convention=m.PAPER, sinkhorn_iters=3)
    )
