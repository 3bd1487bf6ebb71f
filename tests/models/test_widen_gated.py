"""`widen` with Qwen's gated residual in place of the norms of blocks."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

import mhc_mlx as m
from mhc_mlx.adapters import load_adapters, save_adapters
from models.modules import C, N, close, loss_fn, shaken

PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def uncompiled():
    """Compile nothing: on a CPU a second for each fused kernel would be most of a test."""
    mx.random.seed(0)
    mx.disable_compile()
    yield
    mx.enable_compile()


class Block(nn.Module):
    """Its branches have norms at their inputs, and others, all of C channels."""

    def __init__(self):
        super().__init__()
        self.last, self.inner = nn.RMSNorm(C), nn.RMSNorm(C)
        self.mix, self.mlp = nn.Linear(C, C), nn.Linear(C, C)
        self.parts = [nn.RMSNorm(C, 1e-3), nn.RMSNorm(C, 1e-2)]

    def residual_branches(self, scale=1.0):
        """The first also has a norm at its end; the second's is in a list."""
        first, second = self.parts
        return [
            lambda h: scale * self.last(self.mix(first(h))),
            lambda h: self.mlp(mx.tanh(second(h)) + self.inner(mx.tanh(second(h)))),
        ]

    def __call__(self, h, scale=1.0):
        for branch in self.residual_branches(scale):
            h = h + branch(h)
        return h


class Plain(nn.Module):
    def __init__(self, kind=Block):
        super().__init__()
        self.layers = [kind() for _ in range(2)]

    def __call__(self, h, *args):
        for layer in self.layers:
            h = layer(h, *args)
        return h


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 0.3])  # with none, norms of norms are alike
def test_a_block_keeps_its_function(n, noise):
    model, h = shaken(Plain(), noise), 2 * mx.random.normal((2, 3, C))
    want, other, norms = model(h), model(h, 0.5), [b.parts for b in model.layers]
    weights = [norm.weight for norm in norms[0]]
    assert m.widen(model, n, dim=C, connection="gated", rank=3) is model
    close(model(h), want), close(model(h, 0.5), other)
    for block in model.layers:
        assert all(isinstance(part, nn.Identity) for part in block.parts)
        assert isinstance(block.last, nn.RMSNorm) and isinstance(block.inner, nn.RMSNorm)
        assert [c.eps for c in block.connections] == [1e-3, 1e-2]
        assert [c.rank for c in block.connections] == [3, 3]
    for c, weight in zip(model.layers[0].connections, weights, strict=True):
        close((1 + c.weight) / 2, mx.broadcast_to(weight, (n, C)), 1e-6)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(each(h), want)
    shaken(model, 0.1)
    assert mx.abs(model(h) - want).max() > 1e-2


class Alike(Block):
    """A norm of a norm is a norm where weights are 1 and eps is small."""

    def __init__(self):
        super().__init__()
        self.parts = [nn.RMSNorm(C, 1e-9), nn.RMSNorm(C, 1e-9)]


def test_each_branch_loses_its_own_norm():
    model, h = Plain(Alike), mx.random.normal((2, C))
    want = model(h)
    close(m.widen(model, N, dim=C, connection="gated")(h), want)
    assert all(isinstance(part, nn.Identity) for b in model.layers for part in b.parts)


def llama(**options):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: widen on its llama not tested")
    from mlx_lm.models.llama import Model, ModelArgs

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Model(ModelArgs("llama", rms_norm_eps=1e-5, **sizes, **heads, **options))


def train(model, steps):
    """The names of the parameters without a gradient, by step, and the losses."""
    step, optimizer = nn.value_and_grad(model, loss_fn), optim.Adam(1e-2, eps=1e-6)
    silent, losses = [], []
    for _ in range(steps):
        loss, gradients = step(model)
        losses.append(loss.item())
        flat = tree_flatten(gradients)
        silent.append({name for name, g in flat if not mx.abs(g).max() > 1e-9})
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    return silent, losses


def test_llama_keeps_its_logits_and_trains(tmp_path):
    """With up at 0 down has no gradient at once, and every parameter has after a step."""
    model = shaken(llama(), 0.1)
    model.freeze()
    want = model(PROMPT)
    m.widen(model, N, connection="gated")
    close(model(PROMPT), want)
    assert isinstance(model.layers[1].input_layernorm, nn.Identity)
    start = copy.deepcopy(model)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    found = ("weight", "down.weight", "up.weight", "inject.weight")
    assert names == {
        f"model.layers.{k}.connections.{b}.{p}" for k in (0, 1) for b in (0, 1) for p in found
    }
    (start_silent, *later), losses = train(model, 8)
    assert start_silent == {name for name in names if name.endswith("down.weight")}
    assert not any(later) and losses[-1] < losses[0] - 1e-3
    connection, x = model.layers[1].connections[0], m.expand_streams(mx.ones((1, 32)), N)
    gates, h_post = connection.coefficients(x)
    assert mx.abs(h_post - h_post[..., :1]).max() > 1e-6, "streams are alike"
    save_adapters(model, tmp_path)
    loaded = load_adapters(start, tmp_path)
    assert mx.array_equal(loaded(PROMPT), model(PROMPT)).item()
    with pytest.raises(ValueError, match="connections.0.eps = 1e-05"):
        start.layers[0].connections[0].eps = 1e-4
        load_adapters(start, tmp_path)


@pytest.mark.parametrize("kind", [m.GatedResidual, m.GatedHead])
def test_adapters_know_a_frozen_connection(kind, tmp_path):
    """Its eps is no parameter, and nothing of it is saved."""

    def model(eps):
        mx.random.seed(0)
        made = nn.Module()
        made.connection, made.mlp = kind(C, N, eps=eps), nn.Linear(C, C)
        made.connection.freeze()
        return made

    save_adapters(model(1e-6), tmp_path)
    load_adapters(model(1e-6), tmp_path)
    with pytest.raises(ValueError, match="must have connection.eps = 1e-06"):
        load_adapters(model(1e-5), tmp_path)


def test_llama_in_16_bits_generates_with_a_cache():
    from mlx_lm.models.cache import make_prompt_cache

    model = shaken(llama(), 0.1)
    model.set_dtype(mx.bfloat16)
    want = model(PROMPT)
    m.widen(model, N, connection="gated")
    assert model(PROMPT).dtype == mx.bfloat16
    close(model(PROMPT), want, 0.05)
    shaken(model.layers[0].connections[0], 0.1)
    model.set_dtype(mx.float32)
    whole, cache = model(PROMPT), make_prompt_cache(model)
    steps = [model(PROMPT[:, :5], cache=cache)]
    steps += [model(PROMPT[:, k : k + 1], cache=cache) for k in range(5, 8)]
    close(mx.concatenate(steps, axis=1), whole, 1e-4)


def test_a_quantised_llama_trains():
    model = llama()
    model.freeze()
    m.widen(model, N, connection="gated", rank=32)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda name, _: "_proj" in name)
    silent, losses = train(model, 4)
    assert not silent[-1] and losses[-1] < losses[0]
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda name, x: "down" == name[-4:])
    assert isinstance(model.layers[0].connections[0].down, nn.QuantizedLinear)
    assert mx.isfinite(loss_fn(model)).item()


# ---- blocks whose norm cannot be replaced


class Unnormed(Block):
    def residual_branches(self, scale=1.0):
        return [lambda h: self.mix(h), super().residual_branches(scale)[1]]


class Aside(Block):
    """It reads its input beside the norm."""

    def residual_branches(self, scale=1.0):
        return [lambda h: self.mix(self.last(h)) + 0.1 * h]


class Layered(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(C)

    def residual_branches(self, scale=1.0):
        return [lambda h: self.mix(self.norm(h))]


class Centred(nn.RMSNorm):
    """As those of gemma, with the weight centred at 0."""

    def __call__(self, x):
        return mx.fast.rms_norm(x, 1 + self.weight, self.eps)


class Other(Block):
    def __init__(self):
        super().__init__()
        self.last = Centred(C)

    def residual_branches(self, scale=1.0):
        return [lambda h: self.mix(self.last(h))]


class Twice(Block):
    """The second branch has the first's norm at its end."""

    def residual_branches(self, scale=1.0):
        return [lambda h: self.mix(self.last(h)), lambda h: self.last(self.mlp(self.inner(h)))]


AT = "an nn.RMSNorm of 16 channels at the input of each branch but got branch 0 of"
REFUSED = [
    (Unnormed, ValueError, f"{AT} Unnormed at layers.0., whose norm connection='gated' cannot"),
    (Aside, ValueError, f"{AT} Aside"),
    (Layered, ValueError, f"{AT} Layered"),
    (Other, ValueError, r"have norms x \* rsqrt.* but got Centred of Other at layers.0."),
    (Twice, ValueError, "norm at the input of a branch there alone but got branch 1 of Twice"),
]


@pytest.mark.parametrize("kind, error, message", REFUSED)
def test_blocks_that_are_refused(kind, error, message):
    """They are as they were, modes too."""
    model, h = shaken(Plain(kind), 0.3), mx.random.normal((2, C))
    model.layers[1].eval()
    want, before = model(h), [(k, id(x), x.training) for k, x in model.named_modules()]
    with pytest.raises(error, match=rf"\[widen\] layers must .*{message}"):
        m.widen(model, N, dim=C, connection="gated")
    assert [(k, id(x), x.training) for k, x in model.named_modules()] == before
    assert mx.array_equal(model(h), want).item()


BAD = [
    ({"connection": "mhc"}, ValueError, "connection must be 'hyper' or 'gated' but got 'mhc'"),
    ({"convention": m.IDENTITY}, ValueError, "convention must be left out with .* got IDENTITY"),
    ({"dynamic": False}, TypeError, "options must be of .* but got dynamic"),
    ({"eps": 1e-3}, TypeError, "options must be of .* but got eps"),
    ({"rank": 0}, ValueError, "rank must be at least 1 but got 0"),
    ({"use_metal": 1}, TypeError, "use_metal must be a bool"),
    ({"connection": "hyper", "rank": 3}, TypeError, "options must be of .* but got rank"),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_errors(options, error, message):
    model = Plain()
    with pytest.raises(error, match=message):
        m.widen(model, N, dim=C, **{"connection": "gated"} | options)
    assert not hasattr(model.layers[0], "connections")
