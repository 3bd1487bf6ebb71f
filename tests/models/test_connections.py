"""Hyper-connections with coefficients per token or static, and the blocks and read-out around them,
as this machine runs them and through the stand-in.
"""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mhc_mlx as m
from mhc_mlx import reference
from models import modules
from models.modules import NOISE, C, N, close, conventions, exact, shaken

launched = modules.launched


@conventions
def test_layer_equals_the_reference(convention, launched):
    layer = shaken(m.MHCLayer(N, C, dynamic=True, convention=convention, eps=1e-3, norm_eps=1e-2))
    x = mx.random.normal((2, 3, N, C))
    parameters = (layer.phi, layer.bias, layer.alpha)
    arrays = (x, *parameters, layer.rms_weight)
    u, h_post, h_res, _ = reference.mhc_pre(*arrays, convention, 1e-2, eps=1e-3)
    close(layer(x), reference.stream_mix_add(x, u, h_post, h_res))
    close(layer(x, mx.tanh), reference.stream_mix_add(x, mx.tanh(u), h_post, h_res))
    wanted = reference.mhc_coefficients(x, *parameters, convention, 1e-2)
    for got, want in zip(layer.coefficients(x), wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            close(got, want, 1e-6)


@conventions
@pytest.mark.parametrize("dynamic", [True, False])
def test_protocol(convention, dynamic, launched):
    """u and the streams by plain sums over streams, from the coefficients of the connection."""
    connection = shaken(m.HyperConnection(C, N, convention=convention, dynamic=dynamic))
    x, y = mx.random.normal((2, 3, N, C)), mx.random.normal((2, 3, C))
    h_pre, h_post, h_res = (None if h is None else np.array(h) for h in connection.coefficients(x))
    u, add_residual = connection(x)
    close(u, mx.array((h_pre[..., None] * np.array(x)).sum(-2)))
    mixed = np.array(x) if h_res is None else np.einsum("...ij,...jc->...ic", h_res, np.array(x))
    out = mixed + h_post[..., None] * np.array(y)[..., None, :]
    close(add_residual(y), mx.array(out))
    if dynamic:
        assert np.ptp(h_pre, axis=1).max() > 1e-3, "coefficients must differ between tokens"
    elif h_res is not None:
        close(connection.mixing_matrix(), mx.array(h_res))


@conventions
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("dynamic", [True, False])
def test_start(convention, n, dynamic, launched):
    """As HyperConnection says: exactly where phi is zero, and else but for its noise."""
    for k in range(n + 1):
        connection = m.HyperConnection(C, n, layer_idx=k, convention=convention, dynamic=dynamic)
        x, h = mx.random.normal((5, n, C)), m.expand_streams(mx.random.normal((3, C)), n)
        want = np.full(n, 0.1 / (n - 1))
        want[k % n] = 0.9
        for noise in (NOISE, 0) if dynamic else (0,):
            connection = connection if noise else exact(connection)
            h_pre, h_post, h_res = connection.coefficients(x)
            assert np.abs(np.array(h_pre) - want).max() < (noise / 5 or 1e-6)  # slopes of 0.09
            assert np.abs(np.array(h_post) - 1).max() < (noise or 1e-6)
            assert not noise or mx.abs(h_post - 1).max().item() > 1e-6
            if h_res is not None:
                assert np.abs(np.array(h_res) - np.eye(n)).max() < 4e-4
                assert np.abs(np.array(h_res).sum(-1) - 1).max() < 1e-5
            if convention not in (m.IDENTITY, m.HUNYUAN_V4, m.UNCONSTRAINED):
                assert 1e-4 < (1 - h_res[..., 0, 0]).max().item()
            u, add_residual = connection(h)
            close(u, h[:, 0], noise or 1e-5)
            close(add_residual(mx.tanh(u)), h + mx.tanh(h), noise or 1e-5)


def test_starts_of_any_n_and_gates(launched):
    """n = 64 has h_pre near 0; gates that cannot reach 1 start at 0.9 and are alive. phi is zero
    where the values are to be exact."""
    x = m.expand_streams(mx.random.normal((3, C)), 64)
    connection = m.HyperConnection(C, 64)
    close(connection(x)[0], x[:, 0], NOISE)
    close(exact(connection)(x)[0], x[:, 0])
    tight = m.Convention("TIGHT", pre_eps=0.01, post_scale=1.0)
    for n in (1, 3, 64):
        connection = exact(m.HyperConnection(C, n, convention=tight))
        h_pre, h_post, _ = connection.coefficients(x[:, :n])
        assert 0 < h_pre.min().item() and abs(h_post[0, 0].item() - 0.9) < 1e-6
        assert n != 3 or abs(h_pre[0].sum().item() - 1) < 1e-6, "h_pre must count pre_eps"


def test_head(launched):
    head, x = m.HyperHead(C, N, convention=m.DEEPSEEK_V4), mx.random.normal((2, 3, N, C))
    close(head(x), m.reduce_streams(x), NOISE)
    close(exact(head)(x), m.reduce_streams(x))
    shaken(head)
    close(head(x), reference.mhc_head(x, head.phi, head.bias, head.alpha, m.DEEPSEEK_V4))
    assert mx.abs(head(x) - m.reduce_streams(x)).max() > 1e-2
    with pytest.raises(ValueError, match="sigmoid gates but got ADDITIVE"):
        m.HyperHead(C, N, convention=m.ADDITIVE)


def test_the_write_back_takes_the_streams_that_mhc_pre_returns(monkeypatch):
    """So that their gradient is summed inside its kernel."""
    pre, seen = m.ops.mhc_pre, []

    def spy(*args, **options):
        seen.append(pre(*args, **options)[:3] + (2 * args[0],))
        return seen[0]

    monkeypatch.setattr(m.ops, "mhc_pre", spy)
    x = mx.random.normal((3, N, C))
    u, add_residual = m.HyperConnection(C, N)(x)
    close(add_residual(u), reference.stream_mix_add(2 * x, u, *seen[0][1:3]))


def test_block_wraps_any_layer(launched):
    x = mx.random.normal((2, 3, N, C))
    linear, norm = nn.Linear(C, C), nn.RMSNorm(C)
    block = shaken(m.MHCBlock(linear, C, N, norm=norm, layer_idx=1))
    u, add_residual = block.connection(x)
    close(block(x), add_residual(linear(norm(u))))

    def attention(u, mask, cache=None):
        return mask * u, cache

    block = m.MHCBlock(attention, C, N)
    out, cache = block(x, 0.5, cache="cache")
    u, add_residual = block.connection(x)
    close(out, add_residual(0.5 * u))
    assert cache == "cache" and set(dict(block.parameters())) >= {"connection"}


def test_lite_block(launched):
    x, linear = mx.random.normal((2, 3, N, C)), nn.Linear(C, C)
    block = shaken(m.MHCLiteBlock(linear, C, N))
    assert block.connection.convention is m.MHC_LITE and block.connection.bias.shape == (32,)
    u, add_residual = block.connection(x)
    close(block(x), add_residual(linear(u)))
    block.subtract_input = True
    close(block(x), add_residual(linear(u) - u))
    block.layer = lambda u: (linear(u), "state")
    close(block(x)[0], add_residual(linear(u) - u))


def test_a_token_does_not_see_the_others(launched):
    layer = shaken(m.MHCLayer(N, C, dynamic=True))
    x = mx.random.normal((1, 6, N, C))
    other = mx.concatenate([x[:, :3], mx.random.normal((1, 3, N, C))], axis=1)
    for a, b in zip(layer.coefficients(x), layer.coefficients(other), strict=True):
        assert (a[:, :3] == b[:, :3]).all() and (a[:, 3:] != b[:, 3:]).any()
    seen = mx.grad(lambda x: (layer(x)[0, 2] * mx.random.normal((N, C))).sum())(x)[0]
    assert mx.abs(seen[2]).max() > 0 and mx.abs(seen[mx.array([0, 1, 3, 4, 5])]).max() == 0


# ---- constants that nobody uses: each must be seen

GATES = {"pre_eps": 0.03, "post_scale": 1.7, "post_eps": 0.05}
ODD = {
    "exp": m.Convention("ODD", "exp", "columns", iters=3, eps=0.01, transposed=True, **GATES),
    "softmax": m.Convention("ODD", "softmax", "rows", iters=2, eps=0.02, **GATES),
    "unconstrained": m.Convention("ODD", "unconstrained", **GATES),
}


def odd_mixing(logits, start):
    """h_res of logits ``[..., n, n]`` by the definition of ODD."""
    rows, columns = -1, -2
    if start == "unconstrained":
        return np.eye(logits.shape[-1]) + logits
    p = np.exp(logits)
    if start == "exp":
        for axis, eps in zip(3 * (columns, rows), (0, 0, 0.01, 0.01, 0.01, 0.01), strict=True):
            p = p / (p.sum(axis, keepdims=True) + eps)
        return np.swapaxes(p, -1, -2)
    p = p / p.sum(rows, keepdims=True) + 0.02
    for axis in (columns, rows, columns):
        p = p / (p.sum(axis, keepdims=True) + 0.02)
    return p


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def double(a):
    return np.array(a.astype(mx.float32), np.float64)


def odd_coefficients(connection, x, start):
    """h_pre, h_post, h_res of float64 streams, with norm_eps = 0.04 if they are dynamic."""
    n = x.shape[-2]
    if connection.dynamic:
        v = x.reshape(*x.shape[:-2], -1)
        v = v / np.sqrt((v * v).mean(-1, keepdims=True) + 0.04)
        z = v @ double(connection.phi).T
        z = z * np.repeat(double(connection.alpha), (n, n, n * n)) + double(connection.bias)
        pre, post, res = z[..., :n], z[..., n : 2 * n], z[..., 2 * n :]
    else:
        pre, post, res = map(double, (connection.H_pre, connection.H_post, connection.H_res))
    h_res = odd_mixing(res.reshape(*pre.shape[:-1], n, n), start)
    return sigmoid(pre) + 0.03, 1.7 * sigmoid(post) + 0.05, h_res


def odd_sublayer(coefficients, x, f):
    h_pre, h_post, h_res = coefficients
    y = f((h_pre[..., None] * x).sum(-2))
    return h_res @ x + h_post[..., None] * y[..., None, :]


def odd_norm(u, weight):
    return u / np.sqrt((u * u).mean(-1, keepdims=True) + 0.02) * double(weight)


@pytest.mark.parametrize("start", ODD)
def test_every_constant_reaches_its_op(start, launched):
    """Modules with unusual constants equal NumPy's float64, which has them as numbers."""
    c, x = ODD[start], 0.5 * mx.random.normal((2, 3, N, C))
    exact_x = double(x)
    for dynamic in (True, False):
        options = {"convention": c, "dynamic": dynamic, "norm_eps": 0.04, "init_scale": 0.6}
        connection = shaken(m.HyperConnection(C, N, **options))
        layer = shaken(m.MHCLayer(N, C, eps=0.02, **options))
        block = shaken(m.MHCBlock(mx.tanh, C, N, norm=mx.sin, **options))
        for module in (connection, layer, block.connection):
            want = odd_coefficients(module, exact_x, start)
            for got, h in zip(module.coefficients(x), want, strict=True):
                close(got, mx.array(h.astype(np.float32)), 1e-5)
            if not dynamic:
                close(module.mixing_matrix(), mx.array(want[2].astype(np.float32)), 1e-5)
        u, add_residual = connection(x)
        odd = odd_coefficients(connection, exact_x, start)
        weight = layer.rms_weight
        for got, (module, f) in (
            (add_residual(mx.tanh(u)), (connection, np.tanh)),
            (layer(x), (layer, lambda u, w=weight: odd_norm(u, w))),
            (layer(x, mx.tanh), (layer, lambda u, w=weight: np.tanh(odd_norm(u, w)))),
            (block(x), (block.connection, lambda u: np.tanh(np.sin(u)))),
        ):
            want = odd_sublayer(odd_coefficients(module, exact_x, start), exact_x, f)
            close(got, mx.array(want.astype(np.float32)), 2e-5)
        close(u, mx.array((odd[0][..., None] * exact_x).sum(-2).astype(np.float32)), 1e-5)
    head = shaken(m.HyperHead(C, N, convention=c, norm_eps=0.04))
    v = exact_x.reshape(2, 3, -1)
    v = v / np.sqrt((v * v).mean(-1, keepdims=True) + 0.04)
    h_pre = sigmoid(v @ double(head.phi).T * double(head.alpha) + double(head.bias)) + 0.03
    close(head(x), mx.array((h_pre[..., None] * exact_x).sum(-2).astype(np.float32)), 1e-5)


def test_every_option_reaches_its_connection():
    """Through each module and `widen`: starts, iterations, and what is asked of the ops."""
    options = {"sinkhorn_iters": 7, "init_scale": 0.3, "norm_eps": 0.04, "use_metal": False}
    options |= {"threads_per_group": 64, "differentiable": False}
    c = ODD["exp"]

    class Block(nn.Module):
        def residual_branches(self):
            return [mx.tanh]

        def __call__(self, h):
            return h + mx.tanh(h)

    block = Block()
    m.widen(None, N, layers=[block, Block()], dim=C, convention=c, **options)
    without = {k: v for k, v in options.items() if k != "sinkhorn_iters"}  # it has no half-steps
    lite = m.MHCLiteBlock(mx.tanh, C, N, layer_idx=2, **without).connection
    for connection in (
        m.HyperConnection(C, N, layer_idx=2, convention=c, **options),
        m.MHCLayer(N, C, layer_idx=2, convention=c, dynamic=True, **options),
        m.MHCBlock(mx.tanh, C, N, layer_idx=2, convention=c, **options).connection,
        *(lite, block.connections[0]),
    ):
        of = m.MHC_LITE if connection is lite else dataclasses.replace(c, iters=7)
        assert connection.convention == of
        assert connection.alpha.tolist() == 3 * [np.float32(0.3)] and connection.norm_eps == 0.04
        asked = {"use_metal": False, "threads_per_group": 64, "differentiable": False}
        assert {k: getattr(connection, k) for k in asked} == asked
        first = 0 if connection is block.connections[0] else 2
        assert connection.bias[:N].argmax().item() == first
    head = m.HyperHead(C, N, init_scale=0.3, **{k: options[k] for k in [*asked, "norm_eps"]})
    assert head.alpha.tolist() == [np.float32(0.3)] and head.norm_eps == 0.04
    assert {k: getattr(head, k) for k in asked} == asked


def test_modules_hand_their_options_to_every_op(monkeypatch):
    """As they are when called."""
    asked = {"use_metal": False, "threads_per_group": 96, "differentiable": False}
    names = {"mhc_coefficients", "mhc_pre", "stream_aggregate", "stream_aggregate_norm"}
    names |= {"stream_mix_add", "mhc_layer", "mhc_static", "mhc_head", "sinkhorn_knopp"}
    calls = []
    for name in names:
        spy(monkeypatch, name, calls)
    x = mx.random.normal((2, N, C))
    for dynamic in (True, False):
        for convention in (m.PAPER, m.IDENTITY):
            options = {"dynamic": dynamic, "convention": convention}
            connection = m.HyperConnection(C, N, **options)
            layer = m.MHCLayer(N, C, **options)
            for module in (connection, layer, head := m.HyperHead(C, N)):
                for k, v in asked.items():
                    setattr(module, k, v)
            connection(x)[1](x[:, 0])
            layer(x), layer(x, mx.tanh), layer.coefficients(x), head(x)
    assert {name for name, _ in calls} == names
    for name, options in calls:
        threads = None if name == "sinkhorn_knopp" else 96
        assert options == asked | {"threads_per_group": threads}, name


def spy(monkeypatch, name, calls):
    """Records the options with which modules call an op."""
    op = getattr(m.ops, name)

    def counted(*args, **options):
        calls.append((name, options))
        return op(*args, **options)

    monkeypatch.setattr(m.ops, name, counted)


FLAT, SHAPE = mx.zeros((2, C)), r"x must have shape \[..., n=4, C=16\] but got"
BAD = [
    (lambda: m.HyperConnection(C, 65), ValueError, "num_streams must be from 1 to 64 but got 65"),
    (lambda: m.HyperConnection(0), ValueError, "dim must be at least 1 but got 0"),
    (lambda: m.HyperConnection(C, 4.0), TypeError, "num_streams must be an int but got float"),
    (lambda: m.HyperHead(C, 65), ValueError, "num_streams must be from 1 to 64 but got 65"),
    (lambda: m.MHCLayer(65, C, dynamic=True), ValueError, "n must be from 1 to 64 but got 65"),
    (lambda: m.MHCLiteBlock(abs, C, 6), ValueError, "at most 5 with MHC_LITE.* 6: KRONECKER"),
    (lambda: m.HyperConnection(C, 6, convention=m.KRONECKER), ValueError, "power of two"),
    (lambda: m.HyperConnection(C, convention=m.ADDITIVE), ValueError, "sigmoid gates.* ADDITIVE"),
    (lambda: m.HyperConnection(C, sinkhorn_iters=0), ValueError, "iters must be at least 1"),
    (lambda: m.HyperConnection(C, threads_per_group=33), ValueError, "multiple of 32"),
    (lambda: m.HyperConnection(C, N)(mx.zeros((2, N, 17))), ValueError, rf"{SHAPE} \[2, 4, 17\]"),
    (lambda: m.HyperConnection(C, N, dynamic=False)(FLAT), ValueError, rf"{SHAPE} \[2, 16\]"),
    (lambda: m.MHCBlock(None, C), TypeError, r"\[MHCBlock\] layer must be a module or function"),
    (lambda: m.MHCBlock(nn.Tanh, C), TypeError, "layer must be a module or function but got type"),
    (lambda: m.MHCLiteBlock(mx.tanh, C, norm=1e-6), TypeError, r"\[MHCLiteBlock\] norm must be"),
    (lambda: m.HyperConnection(C).mixing_matrix(), ValueError, r"coefficients\(x\) has h_res"),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
