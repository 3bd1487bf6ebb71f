"""What only a GPU can show: more than 2**31 elements, more than 65535 tokens, peak memory."""

import contextlib

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

import mhc_mlx as m
from examples.train_lm import byte_lm
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


def needs_40_gb():
    info = mx.device_info()
    if info.get("memory_size", info.get("total_memory", 0)) < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")


def test_more_elements_than_an_int_counts():
    n, C, T = 4, 4096, (1 << 31) // (4 * 4096) + 5
    needs_40_gb()
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


def dynamic_arrays(n, C):
    mx.random.seed(2)
    outs = 2 * n + n * n
    phi = mx.random.normal((outs, n * C)) * (n * C) ** -0.5
    return phi, mx.random.normal((outs,)), mx.random.uniform(0.5, 1.5, (3,))


def sublayer(module):
    """Coefficients per token around the identity."""

    def f(x, *parameters):
        u, h_post, h_res, x = module.mhc_pre(x, *parameters)
        return module.stream_mix_add(x, u, h_post, h_res)

    return f


def test_more_elements_than_an_int_counts_per_token():
    n, C, T = 4, 4096, (1 << 31) // (4 * 4096) + 5
    needs_40_gb()
    x = mx.zeros((T, n, C), mx.bfloat16)
    x[-3:] = mx.random.normal((3, n, C)).astype(mx.bfloat16)
    assert x.size > 1 << 31
    parameters = dynamic_arrays(n, C)
    (out,), gradients = mx.vjp(sublayer(ops), [x, *parameters], [x])
    (want,), wanted = mx.vjp(sublayer(reference), [x[-3:], *parameters], [x[-3:]])
    same(out[-3:], want)
    same(gradients[0][-3:], wanted[0])
    same(gradients[1], wanted[1])  # phi's: the other tokens are zeros


@pytest.mark.parametrize("n", [4, 12])
def test_more_tokens_than_a_grid_axis_counts_per_token(n):
    x, cotangent = mx.random.normal((70001, n, 8)), mx.random.normal((70001, n, 8))
    given = [x, *dynamic_arrays(n, 8)]
    (got,), gradients = mx.vjp(sublayer(ops), given, [cotangent])
    (want,), wanted = mx.vjp(sublayer(reference), given, [cotangent])
    same(got, want, 1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        same(a, b, 1e-3)


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


def test_sinkhorn_saves_its_input_alone():
    logits, cotangent = mx.random.normal((1 << 18, 4, 4)), mx.random.normal((1 << 18, 4, 4))
    mx.eval(logits, cotangent, mx.vjp(ops.sinkhorn_knopp, [logits[:1]], [cotangent[:1]]))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.vjp(ops.sinkhorn_knopp, [logits], [cotangent]))
    extra = mx.get_peak_memory() - before  # h_res and dlogits are two
    print(f"beyond logits and dh_res: {extra / logits.nbytes:.3f} times the logits")
    assert extra <= 2.01 * logits.nbytes


def test_peak_memory_of_a_training_step():
    """At most 1.15 times what a 12-layer transformer must hold.

    That is, per sublayer, x, u, y and 4 (n**2 + 2n) bytes of coefficients a token; the gradients
    and the optimiser's two moments; and what the sublayers F hold themselves (attention: q, k, v,
    the rotated q and k, its probabilities and output; MLP: the wide layer before and after GELU).
    The last is measured: it is what the same transformer with plain residuals holds, less the
    stream and its norm of each sublayer.
    """
    dim, depth, n, batch = 256, 12, 4, mx.random.randint(0, 256, (32, 257))
    tokens = batch.shape[0] * (batch.shape[1] - 1)

    def peak(connection, streams):
        model = byte_lm.ByteLM(dim, depth, 4, streams, connection, True)
        optimizer = optim.AdamW(1e-3)

        def loss(model):
            logits, _ = model(batch[:, :-1])
            return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")

        step = nn.value_and_grad(model, loss)
        for _ in range(2):
            mx.synchronize()
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            value, gradients = step(model)
            optimizer.update(model, gradients)
            mx.eval(value, model.parameters(), optimizer.state)
            del value, gradients
        held = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        return mx.get_peak_memory() - before, held

    (plain, weights), (measured, more) = peak("plain", 1), peak("mhc", n)
    row = 4 * dim * tokens
    connection = (n + 2) * row + 4 * (n * n + 2 * n) * tokens
    needed = plain + 2 * depth * (connection - 2 * row) + 3 * (more - weights)
    print(
        f"peak {measured / 2**20:.0f} MiB, needed {needed / 2**20:.0f} MiB: "
        f"{measured / needed:.3f}; of these {plain / 2**20:.0f} MiB with plain residuals"
    )
    assert measured <= 1.15 * needed


def test_a_gradient_runs_where_its_forward_ran():
    """With the CPU as the default device: the forward alone asks for the GPU.

    On CUDA, MLX 0.32.4 takes an eager gradient across devices of no op, nor of its own ones ("There
    is no Stream(gpu, 1) in current thread"): there the compiled one alone is compared.
    """
    arrays = [mx.random.normal((3, 2, 4, 64)), *dynamic_arrays(4, 64)]
    weights = mx.random.normal(arrays[0].shape)
    mx.eval(arrays, weights)

    def loss(module, on=None):
        def f(*arrays):
            with mx.stream(on) if on else contextlib.nullcontext():
                out = sublayer(module)(*arrays)
            return (out * weights).sum()

        return f

    every, device = (0, 1, 2, 3), mx.default_device()
    want = mx.grad(loss(reference), argnums=every)(*arrays)
    curved = mx.jvp(mx.grad(loss(reference)), arrays, arrays)[1]
    mx.eval(want, curved)
    mx.set_default_device(mx.cpu)
    try:
        assert m.backend() is None
        f = loss(ops, device)
        pairs = [(mx.compile(mx.grad(f, argnums=every))(*arrays), want)]
        if mx.metal.is_available():
            pairs.append((mx.grad(f, argnums=every)(*arrays), want))
            pairs.append((mx.jvp(mx.grad(f), arrays, arrays)[1], curved))
        mx.eval(pairs)
    finally:
        mx.set_default_device(device)
    for got, wanted in pairs:
        for a, b in zip(got, wanted, strict=True):
            same(a, b, 1e-4)


def test_training_with_and_without_kernels():
    """The same losses for 100 steps of a small network of layers."""

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
