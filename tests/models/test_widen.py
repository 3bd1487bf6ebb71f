"""`widen`: connections put into whole models, mlx-lm's llama among them."""

import copy
import json
import pickle
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from programs import processes

import mhc_mlx as m
from models import modules
from models.modules import NOISE, C, N, close, conventions, exact, hidden, loss_fn, shaken, silent

launched = modules.launched


class Block(nn.Module):
    """A parallel-free block that names its branches; ``scale`` is an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.mlp = nn.RMSNorm(C), nn.Linear(C, C), nn.Linear(C, C)
        self.scale = 0.5

    def residual_branches(self, scale=None):
        scale = self.scale if scale is None else scale
        mixed, mlp = (lambda h: scale * self.mix(self.norm(h))), (lambda h: mx.tanh(self.mlp(h)))
        return [mixed, mlp, lambda h: 0.1 * h]

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


def test_copies_and_pickles():
    model, h = m.widen(shaken(Plain()), N, dim=C), mx.random.normal((2, 3, C))
    want = model(h)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layers[0]) is type(model.layers[0])
        model.layers[0].mix.weight = model.layers[0].mix.weight + 1
        assert mx.array_equal(other(h), want).item() and not mx.array_equal(model(h), want).item()
        model.layers[0].mix.weight = other.layers[0].mix.weight


@conventions
@pytest.mark.parametrize("reduce", ["mean", "first"])
def test_widen_keeps_the_function(convention, reduce, launched):
    model, h = Plain(), mx.random.normal((2, 3, C))
    want, names = model(h), {name for name, _ in tree_flatten(model.parameters())}
    other = model(h, 2.0)
    assert m.widen(model, N, dim=C, convention=convention, reduce=reduce) is model
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


def train(model, loss, steps=10):
    """Losses and the gradients by step, of Adam."""
    step, optimizer = nn.value_and_grad(model, loss), optim.Adam(1e-2, eps=1e-6)
    losses, gradients = [], []
    for _ in range(steps + 1):
        value, gradient = step(model)
        losses.append(value.item())
        gradients.append(gradient)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
    return losses, gradients


def every_gradient_is_alive_after_ten_steps(gradients, convention, first):
    """Of every part of every connection, but for what equal streams hide in the first. At step 0
    h_post's, while those of h_res and h_pre may be hidden. Alpha's is one sum, which may pass
    through zero: it is alive if it was at one of the last three steps."""
    start, *late = (
        {name for name in silent(gradients[k], convention, first, True) if ".connections." in name}
        for k in (0, 8, 9, 10)
    )
    later = set.intersection(*late)
    print(f"{convention.name}: zero at step 0, by symmetry: {sorted(start)}")
    assert all(name.endswith(("res", "pre")) for name in start), start
    print(f"{convention.name}: zero after ten steps: {sorted(later)}")
    assert later <= hidden(first, convention, True), later


@conventions
def test_a_widened_frozen_model_trains_its_connections(convention, launched):
    """A stream is read at the end: a mean would hide the last h_res, whose columns sum to one."""
    model, h = Plain(), mx.random.normal((2, 3, C))
    target = mx.random.normal(h.shape)
    model.freeze()
    m.widen(model, N, dim=C, convention=convention, reduce="first")
    losses, gradients = train(model, lambda model: ((model(h) - target) ** 2).mean())
    assert {name.split(".")[2] for name, _ in tree_flatten(gradients[0])} == {"connections"}
    assert losses[-1] < losses[0] - 1e-2
    every_gradient_is_alive_after_ten_steps(gradients, convention, "layers.0.connections.0")


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
    layer_types = ["sliding_attention"] + 2 * ["full_attention"]
    with_window = llama(layer_types=layer_types, sliding_window=3)
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
    losses, gradients = train(model, loss_fn)
    assert all({name for name, _ in tree_flatten(g)} == names for g in gradients)
    assert losses[-1] < losses[0] - 1e-3
    every_gradient_is_alive_after_ten_steps(gradients, m.PAPER, "model.layers.0.connections.0")


# ---- dtypes, modes and arguments of blocks


def state(model):
    """All that `widen` may change."""
    modules = [(type(module), sorted(module), module.training) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    return modules, attributes, [(k, a.shape, a.dtype) for k, a in tree_flatten(model.parameters())]


def mixtures(llama):
    """Models whose sublayers make other dtypes than their streams have."""
    for dtype, where, other in (
        (mx.bfloat16, (0, "input_layernorm"), mx.float32),
        (mx.bfloat16, (1, "post_attention_layernorm"), mx.float32),
        (mx.float16, (1, "input_layernorm"), mx.bfloat16),
        (mx.bfloat16, (2, "mlp"), mx.float32),
        (mx.float32, (1, "self_attn"), mx.float16),
    ):
        model = llama()
        model.set_dtype(dtype)
        model.layers[where[0]][where[1]].set_dtype(other)
        yield model
    model = llama()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=8)
    model.layers[1].input_layernorm.set_dtype(mx.float32)
    yield model


def test_streams_get_the_dtype_that_the_block_made(llama, launched):
    for model in mixtures(llama):
        want, coarsest = model(PROMPT), mx.finfo(mx.bfloat16).eps
        got = exact(m.widen(model, N))(PROMPT)
        close(got, want, 4 * coarsest)
        # With other coefficients: the same in float32, where nothing is promoted.
        got = shaken(model.freeze().unfreeze(keys=["phi", "bias", "alpha"]), 0.2)(PROMPT)
        assert got.dtype == want.dtype
        for module in model.modules():
            if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                floats = {k: a.astype(mx.float32) for k, a in module.items() if k == "weight"}
                module.update(floats)
            elif module.scales.dtype != mx.float32:
                module.update({k: module[k].astype(mx.float32) for k in ("scales", "biases")})
        wide = model(PROMPT)
        assert wide.dtype == mx.float32
        close(got.astype(mx.float32), wide, 16 * coarsest)


def test_a_promoted_write_back_is_right(launched):
    """The coefficients are those of the streams as they came, and nothing is rounded to them."""

    class Wide(nn.Module):
        def residual_branches(self):
            return [lambda h: mx.sin(h.astype(mx.float32))]

        def __call__(self, h):
            return h + mx.sin(h.astype(mx.float32))

    block = Wide()
    m.widen(None, N, layers=[block], dim=C, reduce="first")
    (connection,) = block.connections
    shaken(connection)
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        h = mx.random.normal((2, 3, C)).astype(dtype)
        x = m.expand_streams(h, N)
        u, _ = connection(x)
        _, h_post, h_res = connection.coefficients(x)
        y = mx.sin(u.astype(mx.float32))
        want = m.stream_mix_add(x.astype(mx.float32), y, h_post, h_res)[..., 0, :]
        close(block(h), want, 1e-5)


def test_every_block_is_looked_at():
    """One that differs from the first of its class, in what it computes, what it keeps or its
    weights; nothing has changed then, and the mode of each module is as it was."""

    class Odd(Block):
        odd = False

        def __call__(self, h, scale=None):
            return super().__call__(h, scale) + (h if self.odd else 0)

    def odd(block):
        block.odd = True

    def not_a_number(block):
        block.mix.weight = block.mix.weight * float("nan")

    def kept(block):
        block.leaves = "mine"

    def two_results(block):
        block.mlp = lambda h: (h, "cache")

    for change, message in (
        (odd, r"must compute x \+ F\(x\) .* Odd at layers\[1\], which does not"),
        (not_a_number, r"Odd at layers\[1\], which does not \(largest error nan"),
        (kept, "must have no attribute leaves, which widen adds, but got Odd"),
        (two_results, r"layers must run .* call of Odd at layers\[1\] raised"),
    ):
        model = Plain()
        model.layers = [Odd() for _ in range(3)]
        change(model.layers[1])
        model.layers[2].eval()
        before = state(model)
        with pytest.raises(ValueError, match=message):
            m.widen(model, N, dim=C)
        assert state(model) == before, message


def test_llamas_blocks_are_looked_at(llama):
    """Arrays of their own, arguments that self_attn does not take alike, tuples."""
    from mlx_lm.models.llama import TransformerBlock

    class Renamed(TransformerBlock):
        def __call__(self, x, attention_mask=None, cache=None):
            return super().__call__(x, attention_mask, cache)

    class Returns(TransformerBlock):
        def __call__(self, x, mask=None, cache=None):
            return super().__call__(x, mask, cache), None

    def renamed(block):
        block.__class__ = Renamed

    def returns(block):
        block.__class__ = Returns

    def scaled(block):
        block.layer_scalar = mx.ones(1)

    for change, message in (
        (renamed, r"take what self_attn takes after x but got .*\['attention_mask', 'cache'\]"),
        (returns, "an array of floats of the shape of x, but got tuple from Returns at layers"),
        (scaled, "the children .* alone but got .* with .*'layer_scalar'"),
    ):
        model = llama()
        change(model.layers[2])
        before = state(model)
        with pytest.raises(TypeError, match=message):
            m.widen(model, N)
        assert state(model) == before, message


def test_dropout_may_be_on(llama, launched):
    """Blocks are compared in evaluation; each module's mode stays, and the random state."""

    class Dropped(Block):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def residual_branches(self, scale=None):
            return [lambda h, f=f: self.dropout(f(h)) for f in super().residual_branches()]

    model, h = Plain(), mx.random.normal((2, 3, C))
    model.layers = [Dropped() for _ in range(3)]
    model.layers[1].eval()
    modes, want = [module.training for module in model.modules()], model.eval()(h)
    model.train()
    model.layers[1].eval()
    m.widen(model, N, dim=C, dynamic=False)
    olds = [module for module in model.modules() if not isinstance(module, m.HyperConnection)]
    assert [module.training for module in olds] == modes
    assert mx.abs(model(h) - want).max() > 0.1
    close(model.eval()(h), want)


def test_blocks_that_need_arguments(launched):
    """mlx-lm's gpt_oss and stablelm, and a block of its own: without an example a named error."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: widen on its models not tested")
    from mlx_lm.models import gpt_oss, stablelm

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    others = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}
    others |= {"layer_types": ["sliding_attention", "full_attention"], "rope_scaling": None}
    oss = gpt_oss.Model(gpt_oss.ModelArgs("gpt_oss", **sizes | others))
    others = {"rope_theta": 1e4, "use_qkv_bias": False, "partial_rotary_factor": 0.5}
    others |= {"layer_norm_eps": 1e-5, "use_parallel_residual": False}
    lm = stablelm.Model(stablelm.ModelArgs("stablelm", **sizes | others))
    for model, named in ((oss, {"mask": None}), (lm, {"mask": None, "cache": None})):
        want, before = shaken(model, 0.1)(PROMPT), state(model)
        message = r"\[widen\] example must be the arguments of"
        with pytest.raises(TypeError, match=f"{message} .* 'mask'"):
            m.widen(model, N)
        for wrong in ((None, None, None), {"msk": None}):
            with pytest.raises(TypeError, match=message):
                m.widen(model, N, example=wrong)
        assert state(model) == before
        exact(m.widen(model, N, example=named if model is oss else (None, None)))
        close(model(PROMPT), want)

    class Masked(Plain):
        def __init__(self):
            super().__init__()
            self.layers = [Needs() for _ in range(2)]

    class Needs(Block):
        def residual_branches(self, mask):
            return [lambda h: mask.pop() * self.mix(h), lambda h: 0.5 * h]

        def __call__(self, h, mask):
            for branch in self.residual_branches(mask):
                h = h + branch(h)
            return h

    model, h = Masked(), mx.random.normal((2, 3, C))
    with pytest.raises(TypeError, match="must be the arguments of Needs at layers.0. after"):
        m.widen(model, N, dim=C)
    want = model(h, [0.5, 2.0])
    m.widen(model, N, dim=C, example=([1.0],), dynamic=False)  # each call gets a copy of the list
    close(model(h, [0.5, 2.0]), want)


def test_blocks_are_widened_in_parts():
    """Each part expands and reduces for itself, and none may lose an end."""
    model, h = shaken(Plain()), mx.random.normal((2, 3, C))
    want = model(h)
    m.widen(model, N, layers=model.layers[:2], dim=C, dynamic=False)
    exact(m.widen(model, 2, layers=model.layers[2:], dim=C, dynamic=False))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(each(h), want)
    for lost, end in ((0, "first"), (1, "last"), (2, "first")):
        cut = copy.deepcopy(model)
        del cut.layers[lost]
        with pytest.raises(ValueError, match=f"a list without the {end} of them"):
            cut(h)


# ---- pipelines


class Group:
    """A group of two processes, of which this is one: it must not be used for more."""

    def __init__(self, rank):
        self.rank, self.size = lambda: rank, lambda: 2


def staged():
    """A tiny model of mlx-lm that can be a pipeline."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pipelines are not tested")
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return shaken(Model(ModelArgs("qwen2", rms_norm_eps=1e-5, **sizes, **heads)), 0.3)


def refusals(group) -> list[str]:
    """What is said to a pipeline that is widened, and to a widened model that becomes one, by its
    method or in other ways."""
    from mlx_lm.models.pipeline import PipelineMixin

    def pipelined(model):
        model.model.pipeline(group)
        m.widen(model, N)

    def later(model):
        m.widen(model, N).model.pipeline(group)

    def otherwise(model):
        PipelineMixin.pipeline(m.widen(model, N).model, group)
        model(PROMPT)

    def cut(model):
        del m.widen(model, N).model.layers[slice(2, 4) if group.rank() else slice(2)]
        model(PROMPT)

    said = []
    for f in (pipelined, later, otherwise, cut):
        with pytest.raises(ValueError) as error:
            f(staged())
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_pipelines_are_refused(rank):
    before, now, otherwise, cut = refusals(Group(rank))
    assert "[widen] model must run in one process but got a stage of a pipeline" in before
    assert "run in one process once widened but got a pipeline of 2 processes" in now
    for said in (otherwise, cut):
        assert f"a list without the {'last' if rank else 'first'} of them" in said, said
    model = staged()
    want = model(PROMPT)
    model = exact(m.widen(model, N))
    model.model.pipeline(mx.distributed.init())  # of one process
    close(model(PROMPT), want)
    assert not hasattr(m.widen(Plain(), N, dim=C), "pipeline")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="run in one process once widened"):
            other.model.pipeline(Group(0))


def in_two_processes(folder: str) -> None:
    """Each is refused, and both go on: the model that is not widened runs in stages."""
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(backend="ring")
    said = refusals(group)
    model = staged()
    want = model(PROMPT)
    model.model.pipeline(group)
    error = mx.abs(model(PROMPT) - want).max().item()
    report = {"said": said, "size": group.size(), "error": error, "most": mx.abs(want).max().item()}
    Path(folder, f"{group.rank()}.json").write_text(json.dumps(report))


def test_pipelines_in_two_processes(tmp_path):
    """Nothing hangs, and no process loses its peer."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pipelines are not tested")
    printed = processes.run_two([__file__, tmp_path], tmp_path / "log.txt")
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(f.exists() for f in files), printed
    for f in files:
        report = json.loads(f.read_text())
        assert len(report["said"]) == 4 and report["size"] == 2
        assert report["error"] <= 1e-5 * report["most"]


# ---- errors


CHILDREN = r"residual_branches or the children \['input_layernorm',"
COMPUTE = "must compute x .* but got Scaled at layers.0."
BAD = [
    (lambda: m.widen(nn.Module(), layers=[]), ValueError, "layers must have at least one block"),
    (lambda: m.widen(Plain(), reduce="max"), ValueError, "reduce must be 'mean', 'sum' or"),
    (lambda: m.widen(Plain()), ValueError, "dim must be the channels"),
    (lambda: m.widen(m.widen(Plain(), dim=C), dim=C), ValueError, "not yet widened but got Wid"),
    (lambda: m.widen(None, layers=2 * [Block()], dim=C), ValueError, "distinct.* but got Block"),
    (lambda: m.widen(None, layers=[nn.Linear(C, C)]), TypeError, rf"{CHILDREN} .* got Linear"),
    (lambda: m.widen(None, layers=[Scaled()], dim=C), ValueError, f"{COMPUTE}, which does not"),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


if __name__ == "__main__":
    in_two_processes(*sys.argv[1:])
