"""Hyper-connections with coefficients per token: the modules, and `widen` on whole models, as this
machine runs them and through the stand-in.
"""

import contextlib
import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import executor
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import mhc_mlx as m
from mhc_mlx import reference

N, C = 4, 16
DYNAMIC = [
    *(m.PAPER, m.ROW_FIRST, m.DEEPSEEK_V4),
    *(m.MHC_LITE, m.KRONECKER, m.IDENTITY, m.UNCONSTRAINED),
]
conventions = pytest.mark.parametrize("convention", DYNAMIC, ids=lambda c: c.name)


# Five deviations of what phi adds at the start: 0.02 alpha = 2e-4 to a logit, of which the steepest
# gate, h_post = 2 sigmoid, passes half.
NOISE = 5e-4


@pytest.fixture(params=["here", "stand-in"])
def launched(request):
    with contextlib.nullcontext() if request.param == "here" else executor(request.param) as found:
        yield found
        assert found is None or found, "nothing was launched"


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)


def shaken(module, scale=0.5):
    """The module with noise on every parameter: no start hides a mistake."""
    noise = partial(tree_map, lambda p: p + scale * mx.random.normal(p.shape, p.dtype))
    return module.update(noise(module.trainable_parameters()))


def exact(module):
    """The module with every phi at zero: its start without noise."""
    phis = [(k, p) for k, p in tree_flatten(module.parameters()) if k.endswith("phi")]
    return module.update(tree_unflatten([(k, mx.zeros_like(p)) for k, p in phis]))


def close(a, b, tolerance=1e-5):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert mx.abs(a - b).max().item() < tolerance * max(1, mx.abs(b).max().item())


@conventions
def test_layer_equals_the_reference(convention, launched):
    layer = shaken(m.MHCLayer(N, C, dynamic=True, convention=convention, eps=1e-3, norm_eps=1e-2))
    x = mx.random.normal((2, 3, N, C))
    parameters = (layer.phi, layer.bias, layer.alpha)
    u, h_post, h_res, _ = reference.mhc_pre(
        x, *parameters, layer.rms_weight, convention, 1e-2, eps=1e-3
    )
    close(layer(x), reference.stream_mix_add(x, u, h_post, h_res))
    close(layer(x, mx.tanh), reference.stream_mix_add(x, mx.tanh(u), h_post, h_res))
    for got, want in zip(
        layer.coefficients(x),
        reference.mhc_coefficients(x, *parameters, convention, 1e-2),
        strict=True,
    ):
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
    for k in range(n + 1):
        connection = m.HyperConnection(C, n, layer_idx=k, convention=convention, dynamic=dynamic)
        x = mx.random.normal((5, n, C))
        want = np.full(n, 0.1 / (n - 1))
        want[k % n] = 0.9
        h_pre, h_post, h_res = connection.coefficients(x)
        assert np.abs(np.array(h_pre) - want).max() < NOISE / 5  # slopes of at most 0.09
        assert np.abs(np.array(h_post) - 1).max() < NOISE
        free = dynamic and convention.name == "UNCONSTRAINED"  # h_res has all of the noise
        if h_res is not None:
            assert np.abs(np.array(h_res) - np.eye(n)).max() < (2 * NOISE if free else 4e-4)
            assert free or np.abs(np.array(h_res).sum(-1) - 1).max() < 1e-5
        if convention.name not in ("IDENTITY", "UNCONSTRAINED"):
            assert 1e-4 < (1 - h_res[..., 0, 0]).max().item()
        h = m.expand_streams(mx.random.normal((3, C)), n)
        u, add_residual = connection(h)
        close(u, h[:, 0], NOISE)
        if not free:
            close(add_residual(mx.tanh(u)), h + mx.tanh(h), NOISE)
        if dynamic:  # phi at zero, to see that the start is exact but for its noise
            assert 1e-6 < mx.abs(h_post - 1).max().item()
            h_pre, h_post, h_res = exact(connection).coefficients(x)
            u, add_residual = connection(h)
        assert np.abs(np.array(h_pre) - want).max() < 1e-6
        assert np.abs(np.array(h_post) - 1).max() < 1e-6
        if h_res is not None:
            assert np.abs(np.array(h_res) - np.eye(n)).max() < 4e-4
            assert np.abs(np.array(h_res).sum(-1) - 1).max() < 1e-5
        close(u, h[:, 0])
        close(add_residual(mx.tanh(u)), h + mx.tanh(h))


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


class Tiny(nn.Module):
    """Streams in, blocks of MHCBlock, a learned read-out, logits."""

    def __init__(self, convention=m.PAPER, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(32, 2 * C)
        self.blocks = [
            m.MHCBlock(nn.Linear(2 * C, 2 * C), 2 * C, N, convention=convention, layer_idx=k)
            for k in range(depth)
        ]
        self.head = m.HyperHead(2 * C, N)

    def __call__(self, tokens):
        x = m.expand_streams(self.embedding(tokens), N)
        for block in self.blocks:
            x = block(x)
        return self.embedding.as_linear(self.head(x))


TOKENS = mx.array(np.random.default_rng(0).integers(0, 32, (4, 9)))


def loss_fn(model, tokens=TOKENS):
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


def parts(gradients, n, convention):
    """Gradients by name, those of phi, bias and alpha in their parts pre, post and res."""
    for name, g in tree_flatten(gradients):
        if name.endswith(("phi", "bias", "alpha")) and "connection" in name:
            size = 1 if name.endswith("alpha") else n
            res = {"res": g[2 * size :]} if convention.res_size(n) else {}
            for part, rows in {"pre": g[:size], "post": g[size : 2 * size], **res}.items():
                yield f"{name}.{part}", rows
        else:
            yield name, g


def rows_sum_to_one(convention):
    """Exactly: the last of ROW_FIRST's truncated half-steps is over columns."""
    return convention not in (m.IDENTITY, m.UNCONSTRAINED, m.ROW_FIRST)


def silent(gradients, convention):
    """Names of the gradients that are rounding noise. The streams of the first block are equal, so
    rows of h_res that sum to one hide it: what it has is the noise that others are judged by.
    """
    sizes = {name: mx.abs(g).max().item() for name, g in parts(gradients, N, convention)}
    found = set()
    for name, size in sizes.items():
        noise = 1e-9
        if name.endswith("res") and rows_sum_to_one(convention):
            noise = max(noise, 3 * sizes[f"blocks.0.{name.split('.', 2)[2]}"])
        if size < noise:
            found.add(name)
    return found


@conventions
def test_every_gradient_is_alive_after_ten_steps(convention, launched):
    """And at step 0 all but those of h_res, which equal streams hide, alpha's too. The read-out
    prefers a stream: a mean would hide the last h_res, whose columns sum to one."""
    model, optimizer = Tiny(convention), optim.AdamW(1e-2, eps=1e-6)
    model.head.bias = mx.array([2.0] + [-2.0] * (N - 1))
    step = nn.value_and_grad(model, loss_fn)
    losses = []
    for k in range(11):
        loss, gradients = step(model)
        losses.append(loss.item())
        if k == 0:
            zero = silent(gradients, convention)
            print(f"{convention.name}: zero at step 0, by symmetry: {sorted(zero)}")
            assert all(name.endswith("res") for name in zero), zero
            if convention.start == "unconstrained":  # its rows of phi start with zeros
                assert zero == {f"blocks.{b}.connection.alpha.res" for b in range(3)}
            else:
                assert not zero or rows_sum_to_one(convention), zero
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    assert losses[-1] < losses[0] - 0.1
    first = {f"blocks.0.connection.{p}.res" for p in ("phi", "bias", "alpha")}
    assert silent(gradients, convention) == (first if rows_sum_to_one(convention) else set())


def test_compiled_step_equals_eager(launched):
    eager, compiled = Tiny(depth=2), Tiny(depth=2)
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
    blocks = model.blocks

    def loss(parameters):
        model.update(parameters)
        x = m.expand_streams(model.embedding(TOKENS[:, :-1]), N)
        for block in blocks:
            x = nn.utils.checkpoint(block)(x)
        logits = model.embedding.as_linear(model.head(x))
        return nn.losses.cross_entropy(logits, TOKENS[:, 1:], reduction="mean")

    again = mx.grad(loss)(model.trainable_parameters())
    for (name, a), (_, b) in zip(tree_flatten(plain), tree_flatten(again), strict=True):
        assert mx.abs(a - b).max().item() < 1e-5, name


def test_quantize_wraps_the_layers_only():
    model = shaken(Tiny(), 0.05)
    want = model(TOKENS)
    before = dict(tree_flatten(model.blocks[0].connection.parameters()))
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.blocks[0].layer, nn.QuantizedLinear)
    for name, p in tree_flatten(model.blocks[0].connection.parameters()):
        assert (p == before[name]).all() and p.dtype == mx.float32
    assert 0 < mx.abs(model(TOKENS) - want).max() < 0.1


def test_freeze_trains_what_is_left():
    model = Tiny()
    for block in model.blocks:
        block.layer.freeze()
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert "blocks.0.connection.phi" in names and "blocks.0.layer.weight" not in names
    for block in model.blocks:
        block.connection.freeze()
    gradients = nn.value_and_grad(model, loss_fn)(model)[1]
    found = {name for name, g in tree_flatten(gradients)}
    assert found == {"embedding.weight", "head.phi", "head.bias", "head.alpha"}


def test_safetensors_round_trip(tmp_path):
    model, other = shaken(Tiny(m.MHC_LITE)), Tiny(m.MHC_LITE)
    model.save_weights(str(tmp_path / "weights.safetensors"))
    other.load_weights(str(tmp_path / "weights.safetensors"))
    assert (model(TOKENS) == other(TOKENS)).all()
    names = {name for name, _ in tree_flatten(other.blocks[0].connection.parameters())}
    assert names == {"phi", "bias", "alpha"}


def test_a_bfloat16_model_makes_float32_coefficients(launched):
    model = shaken(Tiny(), 0.1)
    exact = model.blocks[0].connection
    model.set_dtype(mx.bfloat16)
    assert exact.phi.dtype == mx.bfloat16 and model(TOKENS).dtype == mx.bfloat16
    x = mx.random.normal((3, N, 2 * C)).astype(mx.bfloat16)
    got = exact.coefficients(x)
    parameters = (p.astype(mx.float32) for p in (exact.phi, exact.bias, exact.alpha))
    want = reference.mhc_coefficients(x.astype(mx.float32), *parameters)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-6)


def test_a_token_does_not_see_the_others(launched):
    layer = shaken(m.MHCLayer(N, C, dynamic=True))
    x = mx.random.normal((1, 6, N, C))
    other = mx.concatenate([x[:, :3], mx.random.normal((1, 3, N, C))], axis=1)
    for a, b in zip(layer.coefficients(x), layer.coefficients(other), strict=True):
        assert (a[:, :3] == b[:, :3]).all() and (a[:, 3:] != b[:, 3:]).any()
    seen = mx.grad(lambda x: (layer(x)[0, 2] * mx.random.normal((N, C))).sum())(x)[0]
    assert mx.abs(seen[2]).max() > 0 and mx.abs(seen[mx.array([0, 1, 3, 4, 5])]).max() == 0


BAD = [
    (lambda: m.HyperConnection(C, 65), ValueError, "num_streams must be from 1 to 64 but got 65"),
    (lambda: m.HyperConnection(0), ValueError, "dim must be from 1 to inf but got 0"),
    (lambda: m.HyperConnection(C, 4.0), TypeError, "num_streams must be an int but got float"),
    (lambda: m.HyperHead(C, 65), ValueError, "num_streams must be from 1 to 64 but got 65"),
    (lambda: m.MHCLayer(65, C, dynamic=True), ValueError, "n must be from 1 to 64 but got 65"),
    (lambda: m.MHCLiteBlock(abs, C, 6), ValueError, "at most 5 with MHC_LITE.* 6: KRONECKER"),
    (lambda: m.HyperConnection(C, 6, convention=m.KRONECKER), ValueError, "power of two"),
    (lambda: m.HyperConnection(C, convention=m.ADDITIVE), ValueError, "sigmoid gates.* ADDITIVE"),
    (lambda: m.HyperConnection(C, sinkhorn_iters=0), ValueError, "iters must be at least 1"),
    (lambda: m.HyperConnection(C, threads_per_group=33), ValueError, "multiple of 32"),
    (
        lambda: m.HyperConnection(C, N)(mx.zeros((2, N, C + 1))),
        ValueError,
        r"x must have shape \[..., n=4, C=16\] but got \[2, 4, 17\]",
    ),
    (
        lambda: m.HyperConnection(C, N, dynamic=False)(mx.zeros((2, C))),
        ValueError,
        r"x must have shape \[..., n=4, C=16\] but got \[2, 16\]",
    ),
    (lambda: m.HyperConnection(C).mixing_matrix(), ValueError, r"coefficients\(x\) has h_res"),
    (lambda: m.widen(nn.Module(), layers=[]), ValueError, "layers must have at least one block"),
    (lambda: m.widen(Plain(), reduce="max"), ValueError, "reduce must be 'mean', 'sum' or"),
    (lambda: m.widen(Plain()), ValueError, "dim must be the channels"),
    (lambda: m.widen(m.widen(Plain(), dim=C), dim=C), ValueError, "not yet widened but got Wid"),
    (lambda: m.widen(None, layers=2 * [Block()], dim=C), ValueError, "distinct.* but got Block"),
    (
        lambda: m.widen(None, layers=[nn.Linear(C, C)]),
        TypeError,
        r"residual_branches or the children \['input_layernorm', .* but got Linear",
    ),
    (
        lambda: m.widen(None, layers=[Scaled()], dim=C),
        ValueError,
        "must compute x .* but got Scaled, which does not",
    ),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


class Block(nn.Module):
    """A parallel-free block that names its branches; ``scale`` is an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.mlp = nn.RMSNorm(C), nn.Linear(C, C), nn.Linear(C, C)
        self.scale = 0.5

    def residual_branches(self, scale=None):
        scale = self.scale if scale is None else scale
        return [
            lambda h: scale * self.mix(self.norm(h)),
            lambda h: mx.tanh(self.mlp(h)),
            lambda h: 0.1 * h,
        ]

    def __call__(self, h, scale=None):
        for branch in self.residual_branches(scale):
            h = h + branch(h)
        return h


class Scaled(Block):
    def __call__(self, h):
        return h + 0.5 * self.mix(h)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Block() for _ in range(3)]

    def __call__(self, h, *args):
        for layer in self.layers:
            h = layer(h, *args)
        return h


@conventions
@pytest.mark.parametrize("reduce", ["mean", "first"])
def test_widen_keeps_the_function(convention, reduce, launched):
    model, h = Plain(), mx.random.normal((2, 3, C))
    want, names = model(h), {name for name, _ in tree_flatten(model.parameters())}
    other = model(h, 2.0)
    assert m.widen(model, N, dim=C, convention=convention, reduce=reduce) is model
    if convention is not m.UNCONSTRAINED:  # whose noise no gate makes smaller: up to 2e-3 here
        close(model(h), want, NOISE)
        close(model(h, 2.0), other, NOISE)
    exact(model)  # phi at zero
    close(model(h), want)
    close(model(h, 2.0), other)
    assert model.layers[0].scale == 0.5 and isinstance(model.layers[0], Block)
    new = {name for name, _ in tree_flatten(model.parameters())} - names
    assert len(new) == 27 and all(".connections." in name for name in new)
    reads = [c.bias[:N].argmax().item() for layer in model.layers for c in layer.connections]
    assert reads == [k % N for k in range(9)]
    trained = shaken(model, 0.1)(h)
    assert mx.abs(trained - want).max() > 1e-2
    model.layers[-1].leaves = None
    close(m.reduce_streams(model(h), reduce), trained)


def test_widen_some_layers(launched):
    model, h = Plain(), mx.random.normal((2, 3, C))
    want, layers = model(h), model.layers
    m.widen(model, N, dim=C, layers=layers[1:], dynamic=False)
    close(model(h), want)
    assert type(layers[0]) is Block and type(layers[1]) is type(layers[2])
    assert layers[1](layers[0](h)).shape == (2, 3, N, C)


def test_a_widened_frozen_model_trains_its_connections(launched):
    model, h = Plain(), mx.random.normal((2, 3, C))
    target = mx.random.normal(h.shape)
    model.freeze()
    m.widen(model, N, dim=C)
    step, optimizer = (
        nn.value_and_grad(model, lambda model: ((model(h) - target) ** 2).mean()),
        None,
    )
    optimizer = optim.Adam(1e-2, eps=1e-6)
    losses = []
    for _ in range(10):
        loss, gradients = step(model)
        optimizer.update(model, gradients)
        losses.append(loss.item())
    assert {name.split(".")[2] for name, _ in tree_flatten(gradients)} == {"connections"}
    assert losses[-1] < losses[0] - 1e-2


@pytest.fixture
def llama():
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: widen on its llama not tested")
    from mlx_lm.models.llama import Model, ModelArgs

    def make(**options):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
        sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        return Model(ModelArgs("llama", rms_norm_eps=1e-5, **sizes, **options))

    return make


PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@conventions
def test_llama_logits_are_preserved(llama, convention, launched):
    model = llama()
    want = model(PROMPT)
    close(m.widen(model, N, convention=convention)(PROMPT), want, 1e-3)
    with_window = llama(
        layer_types=["sliding_attention"] + 2 * ["full_attention"], sliding_window=3
    )
    want = with_window(PROMPT)
    close(m.widen(with_window, 2, dynamic=False)(PROMPT), want, 1e-3)


def test_llama_generates_with_a_cache(llama, launched):
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model = shaken(m.widen(llama(), N), 0.2)
    whole, cache = model(PROMPT), make_prompt_cache(model)
    steps = [model(PROMPT[:, :5], cache=cache)]
    steps += [model(PROMPT[:, k : k + 1], cache=cache) for k in range(5, 8)]
    close(mx.concatenate(steps, axis=1), whole, 1e-4)

    tokens = [token for token, _ in generate_step(PROMPT[0], model, max_tokens=6)]
    want = PROMPT
    for _ in range(6):
        want = mx.concatenate([want, model(want)[:, -1:].argmax(-1)], axis=1)
    assert tokens == want[0, 8:].tolist()


@pytest.mark.parametrize("how", ["full", "connections", "lora", "quantized lora"])
def test_llama_trains(llama, how, launched):
    from mlx_lm.tuner.trainer import grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = llama()
    if how != "full":
        model.freeze()
    m.widen(model, N)
    if how == "quantized lora":
        nn.quantize(model, group_size=32, bits=8)
    if "lora" in how:
        config = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        linear_to_lora_layers(model, 3, config)
    if how == "full":
        grad_checkpoint(model.layers[0])
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert ("model.layers.1.self_attn.q_proj.lora_a" in names) == ("lora" in how)
    assert ("model.layers.1.mlp.up_proj.weight" in names) == (how == "full")
    assert "model.layers.1.connections.1.phi" in names
    step, optimizer = nn.value_and_grad(model, loss_fn), optim.Adam(1e-2, eps=1e-6)
    losses = []
    for _ in range(10):
        loss, gradients = step(model, TOKENS)
        assert {name for name, _ in tree_flatten(gradients)} == names
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3 and math.isfinite(losses[-1])
