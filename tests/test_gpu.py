"""What only a GPU can show: more than 2**31 elements, more than 65535 tokens, peak memory."""

import mlx.core as mx
import pytest

from mhc_mlx import ops, reference


@pytest.fixture(autouse=True)
def gpu(need):
    need("gpu")


def layer_arrays(n, C):
    mx.random.seed(1)
    return (
        mx.random.normal((n,)),
        mx.random.normal((n,)),
        mx.random.normal((n, n)),
        mx.random.normal((C,)),
    )


def same(got, want, bound=2e-2):
    want = want.astype(mx.float32)
    assert mx.abs(got.astype(mx.float32) - want).max().item() <= bound * mx.abs(want).max().item()


def test_more_elements_than_an_int_counts():
    n, C, T = 4, 4096, (1 << 31) // (4 * 4096) + 5
    if mx.device_info().get("memory_size", 1 << 60) < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    x = mx.broadcast_to(mx.random.normal((1, n, C)).astype(mx.bfloat16), (T, n, C)) + mx.zeros(
        (), mx.bfloat16
    )
    x[-3:] = mx.random.normal((3, n, C)).astype(mx.bfloat16)
    assert x.size > 1 << 31
    arrays = layer_arrays(n, C)
    out, gradients = mx.vjp(lambda x: ops.mhc_static(x, *arrays), [x], [x])
    want, (dx,) = mx.vjp(lambda x: reference.mhc_static(x, *arrays), [x[-3:]], [x[-3:]])
    same(out[0][-3:], want[0])
    same(gradients[0][-3:], dx)
    y = x[:, 0]
    same(
        ops.stream_mix_add(x, y, *arrays[1:3])[-3:],
        reference.stream_mix_add(x[-3:], y[-3:], *arrays[1:3]),
    )


@pytest.mark.parametrize("n", [4, 12])
def test_more_tokens_than_a_grid_axis_counts(n):
    x, cotangent = mx.random.normal((70001, n, 8)), mx.random.normal((70001, n, 8))
    arrays = layer_arrays(n, 8)
    for f, g in ((ops.mhc_layer, reference.mhc_layer),):
        got = mx.vjp(lambda *a, f=f: f(*a), [x, *arrays], [cotangent])
        want = mx.vjp(lambda *a, g=g: g(*a), [x, *arrays], [cotangent])
        same(got[0][0], want[0][0], 1e-5)
        for a, b in zip(got[1], want[1], strict=True):
            same(a, b, 1e-3)
    logits = mx.random.normal((70001, n, n))
    same(ops.sinkhorn_knopp(logits), reference.sinkhorn_knopp(logits), 1e-5)


def test_peak_memory_of_forward_and_backward():
    """Beyond x, out, dout and dx: at most 2 % of x."""
    x = mx.random.normal((16384, 4, 1024)).astype(mx.bfloat16)
    cotangent = mx.random.normal(x.shape).astype(mx.bfloat16)
    arrays = layer_arrays(4, 1024)
    mx.eval(x, cotangent, arrays)
    mx.eval(mx.vjp(lambda *a: ops.mhc_static(*a), [x[:1], *arrays], [cotangent[:1]]))  # compiles
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory() - x.nbytes - cotangent.nbytes
    mx.reset_peak_memory()
    result = mx.vjp(lambda *a: ops.mhc_static(*a), [x, *arrays], [cotangent])
    mx.eval(result)
    mx.synchronize()
    extra = mx.get_peak_memory() - before - 4 * x.nbytes
    print(f"beyond four streams-sized arrays: {extra / x.nbytes:.2%} of x")
    assert extra <= 0.02 * x.nbytes


def test_training_with_and_without_kernels():
    """The same losses for 100 steps of a small network of layers."""
    import mlx.nn as nn
    import mlx.optimizers as optim

    import mhc_mlx as m

    def losses(use_metal):
        mx.random.seed(0)
        model = nn.Module()
        model.layers = [m.MHCLayer(4, 64, layer_idx=k, use_metal=use_metal) for k in range(4)]
        model.linears = [nn.Linear(64, 64) for _ in range(4)]
        h, target = mx.random.normal((256, 64)), mx.random.normal((256, 64))

        def loss(model):
            x = m.expand_streams(h, 4)
            for layer, linear in zip(model.layers, model.linears, strict=True):
                x = layer(x, lambda u, linear=linear: mx.tanh(linear(u)))
            return ((m.reduce_streams(x) - target) ** 2).mean()

        step, optimizer, values = nn.value_and_grad(model, loss), optim.Adam(1e-3), []
        for _ in range(100):
            value, gradients = step(model)
            optimizer.update(model, gradients)
            mx.eval(value, model.parameters(), optimizer.state)
            values.append(value.item())
        return values

    with_kernels, without = losses(True), losses(False)
    assert max(abs(a - b) for a, b in zip(with_kernels, without, strict=True)) < 1e-3
