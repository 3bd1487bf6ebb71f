"""`GatedResidual` and `GatedHead`, Qwen's gated residual, beside the reference."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

import mhc_mlx as m
from mhc_mlx import reference
from models.modules import C, N, close, shaken

R = 5
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def uncompiled():
    """Compile nothing: on a CPU a second for each fused kernel would be most of a test."""
    mx.random.seed(0)
    mx.disable_compile()
    yield
    mx.enable_compile()


def gated(n=N, kind=m.GatedResidual, **options):
    """A module whose gates leave 1/2."""
    return shaken(kind(C, n, R, **{"eps": 1e-3} | options))


def plain(module, x, inject=True):
    """u and h_post by the reference, of the module's own parameters."""
    arrays = [module.weight, module.down.weight, module.up.weight]
    arrays += [module.inject.weight] if inject else []
    return reference.gated_residual(x, *arrays, eps=module.eps)


@DTYPES
@pytest.mark.parametrize("n", [1, 4, 5])
def test_equals_the_reference(n, dtype):
    module = gated(n)
    module.set_dtype(dtype)
    x, y = (mx.random.normal((2, 3, *k)).astype(dtype) for k in ((n, C), (C,)))
    u, add_residual = module(x)
    want, h_post = plain(module, x)
    step = 4 * mx.finfo(dtype).eps
    close(u, want, max(step, 1e-5))
    close(add_residual(y), reference.stream_mix_add(x, y, h_post), max(step, 1e-5))
    gates, got = module.coefficients(x)
    assert gates.shape == x.shape and gates.dtype == got.dtype == mx.float32
    close(got, h_post)
    assert gates.min().item() < 0.4 and gates.max().item() > 0.6
    head = gated(n, m.GatedHead)
    assert "inject" not in head
    head.set_dtype(dtype)
    close(head(x), plain(head, x, inject=False)[0], max(step, 1e-5))


def test_parameters_in_float32_beside_streams_in_16_bits():
    """As in training: what the module returns has the streams' dtype."""
    module, x = gated(), mx.random.normal((2, N, C)).astype(mx.bfloat16)
    u, add_residual = module(x)
    assert u.dtype == add_residual(u).dtype == mx.bfloat16
    close(u, plain(module, x)[0], 0.02)


def test_reads_in_a_row_are_calls_in_a_row():
    """The write-back and the next read are one pass over the streams."""
    sites, head = [gated() for _ in range(3)], gated(kind=m.GatedHead)
    x = start = mx.random.normal((2, 3, N, C))
    for site in sites:
        u, add_residual = site(x)
        x = add_residual(mx.tanh(u))
    want, x, y, h_post = x, start, None, None
    for site in sites:
        u, h_post, x = site.read(x, y, h_post)
        y = mx.tanh(u)
    close(m.stream_mix_add(x, y, h_post), want)
    close(head(x, y, h_post), head(want))


def test_every_gradient_is_that_of_the_reference():
    module, x, y = gated(), mx.random.normal((2, 3, N, C)), mx.random.normal((2, 3, C))
    du, dout = mx.random.normal(y.shape), mx.random.normal(x.shape)

    def ours(module, x, y):
        u, add_residual = module(x)
        return (u * du).sum() + (add_residual(y) * dout).sum()

    def theirs(module, x, y):
        u, h_post = plain(module, x)
        return (u * du).sum() + (reference.stream_mix_add(x, y, h_post) * dout).sum()

    got, want = (
        dict(tree_flatten(mx.grad(lambda p, x, y, f=f: f(module.update(p), x, y), (0, 1, 2))(
            module.parameters(), x, y
        )))
        for f in (ours, theirs)
    )  # fmt: skip
    names = {f"0.{k}" for k in ("weight", "down.weight", "up.weight", "inject.weight")}
    assert got.keys() == {*names, "1", "2"}
    for name in got:
        assert mx.abs(want[name]).max().item() > 1e-3, name
        close(got[name], want[name])


@pytest.mark.parametrize("n", [1, 4])
def test_start(n):
    """u is half the mean of the normalised streams, h_post is about 1, nothing is without a
    gradient, and streams that start as copies differ."""
    module, h = m.GatedResidual(C, n), mx.random.normal((64, C))
    x = 3 * mx.random.normal((64, n, C))
    assert module.rank == max(1, n * C // 32) and module.down.weight.shape == (module.rank, n * C)
    assert mx.array_equal(module.weight, mx.zeros((n, C)))
    s = x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    close(module(x)[0], s.mean(-2) / 2, 0.01)
    h_post = module.coefficients(x)[1]
    assert abs(h_post.mean().item() - 1) < 0.1 and 0.15 < h_post.var().item() ** 0.5 < 0.35
    optimizer = optim.Adam(1e-2)

    def out(module):
        u, add_residual = module(m.expand_streams(h, n))
        return add_residual(mx.tanh(u))

    step = nn.value_and_grad(
        module, lambda module: ((out(module)[..., 0, :] - h[::-1]) ** 2).mean()
    )
    for k in range(4):
        _, gradients = step(module)
        silent = [name for name, g in tree_flatten(gradients) if not mx.abs(g).max() > 1e-9]
        assert not silent, (k, silent)
        optimizer.update(module, gradients)
    apart = mx.abs(out(module) - out(module)[..., :1, :]).max().item()
    assert (apart > 1e-2) == (n > 1)


def test_products_may_be_quantised_or_adapted():
    """MLX makes them then, inject's too; a bias or another class of inject is not lost."""
    module, x = m.GatedResidual(32, 4, 32), mx.random.normal((2, 3, 4, 32))
    shaken(module, 0.1)
    nn.quantize(module, group_size=32, bits=8)
    assert all(isinstance(module[k], nn.QuantizedLinear) for k in ("down", "up", "inject"))
    u, add_residual = module(x)
    whole = m.GatedResidual(32, 4, 32)
    whole.weight = module.weight
    for k in ("down", "up", "inject"):
        q = module[k]
        whole[k].weight = mx.dequantize(q.weight, q.scales, q.biases, group_size=32, bits=8)
    want, want_residual = whole(x)
    close(u, want, 1e-4)
    close(add_residual(u), want_residual(u), 1e-4)
    before = whole.coefficients(x)[1]
    whole.inject.bias = mx.ones(4)
    logits = mx.log(before / (2 - before)) + 1 / 4  # of 2 sigmoid
    close(whole.coefficients(x)[1], 2 * mx.sigmoid(logits), 1e-4)


def test_lora_on_every_product():
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its LoRA is not tested")
    from mlx_lm.tuner.lora import LoRALinear

    module, x = gated(), mx.random.normal((2, 3, N, C))
    module.freeze()
    want, h_post = module.coefficients(x)
    for k in ("down", "up", "inject"):
        module[k] = LoRALinear.from_base(module[k], r=2, scale=3.0)
    got = module.coefficients(x)  # lora_b starts at 0
    close(got[0], want), close(got[1], h_post)
    shaken(module)
    merged = gated()
    merged.weight = module.weight
    for k in ("down", "up", "inject"):
        merged[k].weight = module[k].fuse().weight
    for a, b in zip(module.coefficients(x), merged.coefficients(x), strict=True):
        close(a, b)
    names = {k for k, _ in tree_flatten(module.trainable_parameters())}
    assert names == {f"{k}.lora_{ab}" for k in ("down", "up", "inject") for ab in "ab"}


def test_vmap_and_compile():
    module, x = gated(), mx.random.normal((3, 2, N, C))
    mx.enable_compile()
    want = module(x)[0]
    close(mx.compile(lambda x: module(x)[0])(x), want)
    close(m.vmap(lambda x: module(x)[0])(x), want)


# ---- errors


X, Y, P = mx.ones((2, N, C)), mx.ones((2, C)), mx.ones((2, N))


def changed(**products):
    module = gated()
    module.update_modules(products)
    return module


def with_eps(eps):
    module = gated()
    module.eps = eps
    return module


BAD = [
    (lambda: gated()(X[:, :3]), ValueError, r"x must have shape \[\.\.\., n=4, C=16\]"),
    (lambda: gated()([X]), TypeError, "x must be an mx.array but got list"),
    (lambda: gated()(X.astype(mx.int32)), TypeError, "x must be float32, float16 or bfloat16"),
    (lambda: gated().coefficients(X[..., 1:]), ValueError, "x must have shape"),
    (lambda: gated().read(X, Y), ValueError, r"\[stream_norm\] h_post must be given together wit"),
    (lambda: gated().read(X, Y, P[:, 1:]), ValueError, r"\[stream_norm\] h_post must have shape"),
    (lambda: gated()(X)[1](Y[:, 1:]), ValueError, r"\[stream_mix_add\] y must"),
    (lambda: gated(kind=m.GatedHead)(X, None, P), ValueError, r"y must be given together"),
    (lambda: gated(kind=m.GatedHead)(X[0, 0]), ValueError, r"\[GatedHead\] x must have shape"),
    (lambda: with_eps(0.0)(X), ValueError, "eps must be finite and above 0"),
    (
        *(lambda: changed(up=nn.Linear(R, N))(X), ValueError),
        r"\[GatedResidual\] up must return shape \[2, 64\] but got \[2, 4\]",
    ),
    (
        *(lambda: changed(inject=nn.Linear(N * C, N + 1))(X), ValueError),
        r"inject must return shape \[2, 4\] but got \[2, 5\]",
    ),
    (
        *(lambda: changed(inject=nn.Linear(N * C, N + 1, bias=False))(X), ValueError),
        r"\[stream_norm\] inject must have shape \[n=4, n\*C=64\]",
    ),
    (
        *(lambda: changed(down=nn.Identity())(X), ValueError),
        r"\[addmm\]|\[matmul\]|down must",
    ),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
