"""What is special in Qwen's gated residuals: write-backs joined with the reads after them, linear
layers of every kind in a site, the forward pass of decoding and verification, 16 bits.

What they share with other families is in test_mlx_vlm.py."""

import importlib
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")

from mlx_vlm.trainer import get_peft_model  # noqa: E402
from mlx_vlm.trainer.core import grad_checkpoint  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models import exact, graph, times, verify  # noqa: E402
from mhc_mlx.models.family import DOWN, INJECT, UP, Options  # noqa: E402
from mhc_mlx.models.patching import release  # noqa: E402
from models import modules  # noqa: E402
from models.test_mlx_vlm import alike, generated, own, patched  # noqa: E402
from models.tiny_vlm import run, tiny, tokens, whole  # noqa: E402

ONE = {"num_hidden_layers": 1, "ple_layer_ids": [1]}


@pytest.fixture
def family():
    return importlib.import_module("mhc_mlx.models.families.vlm_qwen4_exp")


@pytest.fixture
def calls(monkeypatch, family):
    """What sites launch, in order: a norm alone, a norm joined with a write-back, or that alone."""
    found, ops = [], family.run.ops
    norm, add = ops.stream_norm, ops.stream_mix_add

    def stream_norm(x, weight, y=None, *rest, **given):
        found.append("norm" if y is None else "joined")
        return norm(x, weight, y, *rest, **given)

    monkeypatch.setattr(ops, "stream_norm", stream_norm)
    monkeypatch.setattr(ops, "stream_mix_add", lambda *a, **k: found.append("add") or add(*a, **k))
    return found


# ---- mistakes


def written_back(model) -> list:
    parts = "attn_hyper_connection", "mlp_hyper_connection"
    return [layer[part] for layer in model.layers for part in parts]


def without_inject(model):
    """As if h_post were 1 everywhere."""
    for hc in written_back(model):
        inject = hc.block_inject_weight
        inject.weight = mx.zeros_like(inject.weight)


def without_ple(model):
    for layer in model.layers:
        layer.pop("ple", None)


def norms_around_one(model):
    """As if the norm's weight were the factor."""
    for hc in written_back(model):
        hc.hc_norm.weight = hc.hc_norm.weight - 1


@pytest.mark.parametrize("mistake", [without_inject, without_ple, norms_around_one])
def test_mistakes_change_the_tokens(mistake):
    """So that equal tokens say something."""
    model = tiny("qwen4_exp")
    mistake(model)
    assert generated(model, tokens(7)[0], 32)[0] != own("qwen4_exp", 7)[0][:32]


# ---- joined


ORDER = ["norm", "joined", "joined", "joined", "add", "norm", "joined", "joined"]


@pytest.mark.parametrize("prompt", [tokens(9), tokens(1), tokens(5, 2)], ids=["9", "1", "2 x 5"])
def test_ple_breaks_the_pair_there_and_only_there(family, calls, prompt):
    """Layers 0 and 2 have PLE, whose sums stand between a write-back and the norm after it. In a
    prompt, in decoding, and in a batch."""
    model = patched(tiny("qwen4_exp"))
    cache = model.make_cache()
    run(model, prompt, cache)
    assert calls == ORDER and family._handed.get() is None
    run(model, prompt[:, :1], cache)
    assert calls == 2 * ORDER and family._handed.get() is None


def test_checkpointed_layers_join_their_own_sites(family, calls, monkeypatch):
    """What they handed on would be made twice: mlx-vlm's grad_checkpoint sees no such array."""
    model = patched(tiny("qwen4_exp"), trainable=True)
    monkeypatch.setattr(family.PatchedLayer, "__call__", family.PatchedLayer.__call__)
    grad_checkpoint(model.layers[0])
    model(tokens(9))
    assert calls == 3 * ["norm", "joined", "add"] + ["norm"]


def test_states_that_others_read(family):
    """Those after chosen layers, which the read-out merges, and the streams of MTP."""
    model, found = tiny("qwen4_exp"), []
    for _ in range(2):
        states = model(tokens(9), capture_layer_ids=[0, 1, 2]).hidden_states
        cache = model.make_cache()
        states += model(tokens(9), cache=cache, return_hidden=True).hidden_states
        states += model(tokens(1), cache=cache, return_hidden=True).hidden_states
        states.append(model.speculative_verify_hidden(tokens(3, seed=1), cache)[0])
        states.append(model.speculative_logits_from_hidden(states[-1]))
        found.append(states)
        patched(model)
    assert [a.shape[-1] for a in found[0]] == [64, 64, 64, 256, 256, 256, 96]
    for want, got in zip(*found, strict=True):
        alike(got, want)
    assert family._handed.get() is None


def test_layers_called_in_another_order(family):
    """What one layer has read for the next is dropped if the next gets other streams."""
    model, x = tiny("qwen4_exp", ple_layer_ids=[]), mx.random.normal((1, 5, 256))

    def ran(order) -> list[mx.array]:
        out = [x]
        given = tokens(5), None, None, mx.arange(5)[None]
        for k in order:
            layer = model.layers[k]
            out.append(layer(out[-1], *given))
            out.append(layer(x + 1, *given))
            out.append(model.layers[(k + 1) % 3](out[-2], *given))
        return out

    want = ran((1, 0, 2))
    patched(model)
    for got, a in zip(ran((1, 0, 2)), want, strict=True):
        alike(got, a)


def test_one_wrong_site(family, monkeypatch):
    """It keeps mlx-vlm's code in both forward passes, beside joined sites that are patched."""
    model, right = tiny("qwen4_exp"), family.run.gated_residual
    hc = model.layers[1].mlp_hyper_connection
    prompt, cache = tokens(9), model.make_cache()
    want = [run(model, prompt, cache), run(model, tokens(1), cache)]
    weight = hc.hc_norm.weight

    def gated_residual(hc, *given, **more):
        out, u, h_post = right(hc, *given, **more)
        return out, u * (1.02 if hc.hc_norm.weight.tolist() == weight.tolist() else 1), h_post

    monkeypatch.setattr(family.run, "gated_residual", gated_residual)
    named = r"1 of 7 .*: model.layers.1.mlp_hyper_connection \(median of u, float32"
    with pytest.warns(UserWarning, match=named):
        adapter.patch(model)
    kept = [site.options is not None for site in family.FAMILY.sites(model)]
    assert kept == 3 * [True] + [False] + 3 * [True]
    cache = model.make_cache()
    for a, got in zip(want, [run(model, prompt, cache), run(model, tokens(1), cache)], strict=True):
        alike(got, a)


WRONG = {
    "u": lambda out, u, h_post: (out, u.at[..., 3].multiply(1.01), h_post),
    "h_post": lambda out, u, h_post: (out, u, h_post * 1.001),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sites_are_refused(name, family, monkeypatch):
    model, right = tiny("qwen4_exp", **ONE), family.run.gated_residual
    site = family.FAMILY.sites(model)[0]
    assert verify.failure(site, Options(True, False), mx.float32, 0) is None
    wrong = lambda *a, **k: WRONG[name](*right(*a, **k))  # noqa: E731
    monkeypatch.setattr(family.run, "gated_residual", wrong)
    assert f" {name}, float32" in str(verify.failure(site, Options(True, False), mx.float32, 0))


@pytest.mark.parametrize("bits", [None, 4])
def test_right_sites_are_kept(bits, family):
    """In each of 20 draws of the 64 tokens that decide, and against mlx-vlm's own errors."""
    (site,) = times.random_sites(64, 1, family.FAMILY, bits)
    large, (bounds, *_) = exact.spread(site, 6.0), verify.BOUNDS.values()
    inputs = exact.random_inputs(large, mx.float32, 64 * 20, 3)
    ours, theirs = exact.site_token_errors(large, site.options, *inputs)
    assert ours.keys() == {"u", "h_post", "out", "next u", "next h_post"}
    for output in ours:
        for bound in bounds:
            draws = [e[output].reshape(20, 64) for e in (ours, theirs)]
            got, own = (np.array([bound.statistic(d) for d in e]) for e in draws)
            assert (got <= np.maximum(bound.factor * own, bound.least)).all(), output
        assert np.median(theirs[output]) < 64
    own = exact.site_errors(site, site.options, *exact.random_inputs(site, mx.bfloat16, 4))
    assert all(errors.keys() == {"u", "h_post", "out"} for errors in own)
    logits = large.hc[UP](nn.silu(large.hc[DOWN](mx.random.normal((64, 256))) / 4))
    assert 3 < mx.std(logits).item() < 12


# ---- linear layers


def test_every_site_of_a_quantised_model_is_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.patch(tiny("qwen4_exp", "4-bit", **ONE))


def test_quantised():
    """4-bit with bfloat16 activations. mlx-vlm rounds more often, so that most logits differ, by as
    much as two independent errors of the size of mlx-vlm's against float32 activations."""
    prompt, wide = tokens(64), tiny("qwen4_exp", "4-bit")
    widened = lambda a: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a  # noqa: E731
    wide.update(tree_map(widened, wide.parameters()))
    right, model = run(wide, prompt), tiny("qwen4_exp", "4-bit")
    want = run(model, prompt)
    got = run(patched(model), prompt)
    assert got.dtype == want.dtype == mx.bfloat16 and right.dtype == mx.float32

    def distance(a: mx.array, b: mx.array) -> float:
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        return (mx.abs(a - b).max(-1) / mx.abs(b).max(-1)).mean().item()

    theirs = distance(want, right)
    assert distance(got, want) < 2**0.5 * theirs and distance(got, right) < 1.1 * theirs < 2**-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("wide", ["streams", "sublayer"])
def test_the_wider_dtype_is_written(wide, dtype, family):
    """As mlx-vlm's sum of streams and sublayer in two dtypes."""
    (site,) = times.random_sites(64, 1, family.FAMILY)
    x, y = mx.random.normal((1, 3, 4, 64)), mx.random.normal((1, 3, 64))
    x, y = (x, y.astype(dtype)) if wide == "streams" else (x.astype(dtype), y)
    h_post = mx.ones((1, 3, 4), x.dtype)
    got, want = (site.step(options, x, y, h_post)[0] for options in (site.options, None))
    alike(got, want, 1e-6)


def by_kernels_of_one_dispatch(monkeypatch, family):
    """Let each of the two ops be one dispatch, as a kernel is."""

    def stream_norm(x, weight, y, h_post, inject, eps, **_):
        given = [a for a in (x, weight, y, h_post, inject) if a is not None]
        post = [] if inject is None else [(x.shape[:-1], mx.float32)]
        made = graph.kernel_like(given, [(x.shape, x.dtype), (x.shape, x.dtype), *post])
        return *made, *([None] if inject is None else [])

    def gate_mix(logits, s, **_):
        return graph.one_primitive(mx.depends(logits, [s])[..., 0, :])

    monkeypatch.setattr(family.run.ops, "stream_norm", stream_norm)
    monkeypatch.setattr(family.run.ops, "gate_mix", gate_mix)


@pytest.mark.parametrize("bits, dispatches", [(None, 5), (4, 7)])
def test_dispatches_of_decoding(bits, dispatches, family, monkeypatch):
    """Norm, DOWN, silu, UP, gates; where INJECT is quantised its product and its gate. mlx-vlm's
    own 16 are counted, too."""
    sites = times.random_sites(64, 3, family.FAMILY, bits)
    by_kernels_of_one_dispatch(monkeypatch, family)
    chains = times._chains(sites, mx.bfloat16, 1)
    counts = {k: graph.dispatches(chain)["dispatches"] for k, chain in chains.items()}
    assert counts["patched"] == dispatches
    assert counts["mlx-vlm"] == counts["mlx-vlm, compiled"] == 16


@pytest.mark.parametrize("bits", [None, 4])
def test_compiled_sites(bits, family, monkeypatch):
    """One trace serves sites with the same constants; one with LoRA runs its own layers."""
    monkeypatch.setattr(family.run, "_backend", lambda x, options: "cuda")
    family.run.clear()
    made, right = [], family.run._gated_residual
    monkeypatch.setattr(family.run, "_gated_residual", lambda *a: made.append(1) or right(*a))
    sites = times.random_sites(64, 3, family.FAMILY, bits)
    state = mx.random.normal((1, 2, 4, 64)), mx.random.normal((1, 2, 64)), mx.ones((1, 2, 4))
    before = mx.random.state[0].tolist()
    for site in sites:
        for a, b in zip(*(site.step(o, *state) for o in (site.options, None)), strict=True):
            alike(a.astype(mx.float32), b.astype(mx.float32), 1e-5 if bits is None else 2**-6)
    assert len(made) == 1 and mx.random.state[0].tolist() == before
    family.run.clear()


class Adapted(nn.Module):
    """A layer of a class that is none of MLX's."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.inner = linear

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "another class", "bias"])
def test_other_layers(kind, family, monkeypatch):
    """They are verified, and those of MLX's classes compiled: quantised without biases, or with a
    bias, which INJECT then adds outside the kernel."""
    (site,) = times.random_sites(64, 1, family.FAMILY)
    site.hc.set_dtype(mx.float32)
    for name in (DOWN, UP, INJECT):
        linear = site.hc[name]
        if kind == "another class":
            site.hc[name] = Adapted(linear)
        elif kind == "bias":
            linear.bias = mx.random.normal((linear.weight.shape[0],), key=mx.random.key(1))
        else:
            site.hc[name] = linear.to_quantized(mode=kind)
    before = site.arrays
    assert verify.failure(site, site.options, mx.float32, 0) is None
    site.with_arrays(*(a + 1 for a in before))
    assert all(a is b for a, b in zip(site.arrays, before, strict=True)), "the model has changed"
    monkeypatch.setattr(family.run, "_backend", lambda x, options: "cuda")
    family.run.clear()
    state = mx.random.normal((1, 2, 4, 64)), mx.random.normal((1, 2, 64)), mx.ones((1, 2, 4))
    for a, b in zip(*(site.step(o, *state) for o in (site.options, None)), strict=True):
        alike(a, b, 1e-5)
    assert family.run._compiled_gated_residual.cache_info().currsize == (kind != "another class")
    family.run.clear()


def test_lora_on_quantised_layers(family):
    """As mlx-vlm attaches it: to all three of a site; results and gradients of plain ops."""

    def ready():
        model = whole("qwen4_exp", "4-bit", **ONE)
        floats = lambda a: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a  # noqa: E731
        model.update(tree_map(floats, model.parameters()))
        mx.random.seed(3)
        get_peft_model(model, rank=4, alpha=8, dropout=0.0, verbose=False)
        for layer in model.modules():
            if "lora_b" in layer:
                layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(7))
        return model.train()

    def found(model):
        def loss(model):
            logits = model.language_model(tokens(12)[:, :-1]).logits
            return nn.losses.cross_entropy(logits, tokens(12)[:, 1:], reduction="mean")

        value, gradients = nn.value_and_grad(model, loss)(model)
        return value, dict(tree_flatten(gradients))

    want, ours = found(ready()), ready()
    hc = ours.language_model.model.layers[0].attn_hyper_connection
    assert {type(hc[name]).__name__ for name in (DOWN, UP, INJECT)} == {"LoRALinear"}
    got = found(adapter.patch(ours, trainable=True))  # verified, too
    sites = family.FAMILY.sites(ours)
    assert all(site.options is not None for site in sites)
    alike(got[0], want[0])
    learned = [k for k in got[1] if "hyper_connection" in k]
    assert len(learned) == 2 * (3 + 3 + 2) and got[1].keys() == want[1].keys()
    for name, g in got[1].items():
        assert mx.abs(g).max() > 0 or "hyper_connection" not in name
        assert mx.abs(g - want[1][name]).max() <= 3e-4 * mx.abs(want[1][name]).max() + 1e-9, name


def test_training_attends_by_a_mask(family, monkeypatch):
    """mlx-vlm's kernel for chosen keys has no gradient; evaluation asks for it as before."""
    asked, right = [], family.stock.dispatch_qsa_attention

    def dispatch(*args, **given):
        asked.append(given["causal"])
        return right(*args, **given)

    monkeypatch.setattr(family.stock, "dispatch_qsa_attention", dispatch)
    model = patched(tiny("qwen4_exp"), trainable=True)
    want = run(model.eval(), tokens(20))
    got = model.train()(tokens(20)).logits
    assert asked == [True, False]
    alike(got, want)


# ---- verification of drafts


@pytest.mark.parametrize("kind", ["float32", "4-bit"])
def test_speculative_verification(kind, family, monkeypatch):
    """One call on L tokens has the bits of L calls that decode, by mlx-vlm's products; those of a
    site that keeps mlx-vlm's code, too."""
    model, prompt, draft = patched(tiny("qwen4_exp", kind)), tokens(9), tokens(5, seed=1)
    sites = family.FAMILY.sites(model)
    release(sites[3])
    caches = [model.make_cache() for _ in range(2)]
    for cache in caches:
        mx.eval(run(model, prompt, cache))
    through, right = [], family.InvariantForward._linear

    def linear(self, layer, x):
        through.append(id(layer))
        return right(self, layer, x)

    monkeypatch.setattr(family.InvariantForward, "_linear", linear)
    streams, _, _, logits = model.speculative_verify_logits(draft, caches[0], lambda a: a)
    layers = {id(site.hc[k]) for site in sites for k in site.linears}
    fused = {id(s.hc[INJECT]) for s in sites[:-1] if kind == "float32" and s.options is not None}
    assert layers & set(through) == layers - fused
    alone = [model(draft[:, k : k + 1], cache=caches[1]) for k in range(5)]
    found = [[a.hidden_states[0] for a in alone], [a.logits for a in alone]]
    for whole_call, parts in zip((streams, logits), found, strict=True):
        assert mx.array_equal(whole_call, mx.concatenate(parts, axis=1)).item()


@pytest.mark.parametrize("where", ["here", "simulator"])
def test_each_token_alone(where, family, need):
    """With products of one row at a time, a site's bits do not depend on the number of tokens."""
    if where == "simulator":
        need(where)

    def by_row(layer, x):
        return mx.concatenate([layer(x[:, k : k + 1]) for k in range(x.shape[1])], axis=1)

    with modules.running(where):
        hc = patched(tiny("qwen4_exp", **ONE)).layers[0].attn_hyper_connection
        x, y = mx.random.normal((1, 3, 4, 64)), mx.random.normal((1, 3, 64))
        state, products = (x, y, mx.random.uniform(0, 2, (1, 3, 4))), family.run.Products(by_row)
        whole_call = hc.site(products, *state)
        for k in range(3):
            alone = hc.site(products, *(a[:, k : k + 1] for a in state))
            for a, b in zip(whole_call, alone, strict=True):
                assert mx.array_equal(a[:, k : k + 1], b).item()
