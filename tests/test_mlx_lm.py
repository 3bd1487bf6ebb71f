"""`mhc_mlx.mlx_lm` on tiny random models: patched against mlx-lm's own, verification, the command,
DeepSeek V4's tensors. Gradients are in test_mlx_lm_training.py."""

import concurrent.futures
import copy
import functools
import importlib
import itertools
import json
import pickle
import sys
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten, tree_map

import mhc_mlx as m
from mhc_mlx import kernel, ops

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

import models  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import deepseek_v41 as stock  # noqa: E402
from mlx_lm.utils import load_model, save_config, save_model  # noqa: E402
from tiny_deepseek import UNROUNDED, tiny, tokens  # noqa: E402

from mhc_mlx import mlx_lm as adapter  # noqa: E402
from mhc_mlx.mlx_lm.__main__ import main  # noqa: E402
from mhc_mlx.mlx_lm.exact import random_inputs, streams_dtype  # noqa: E402
from mhc_mlx.mlx_lm.sites import (  # noqa: E402
    activations,
    find_sites,
    own_coefficients,
    stock_site,
)
from mhc_mlx.mlx_lm.times import SITES  # noqa: E402

launched = models.launched


def within(got: mx.array, want: mx.array, dtype: mx.Dtype) -> None:
    """1e-5 of the largest value of a row in float32, 2 units in its last place otherwise."""
    got, want = (np.array(a.astype(mx.float32)) for a in (got, want))
    most = np.abs(want).max(-1, keepdims=True)
    unit = np.exp2(np.floor(np.log2(most))) * 2 * mx.finfo(dtype).eps
    allowed = 1e-5 * most if dtype == mx.float32 else unit
    wrong = np.abs(got - want) / allowed
    assert wrong.max() <= 1, f"{wrong.max()} times the allowed error, {(wrong > 1).sum()} elements"


def patched(model, **options):
    return adapter.patch(model, **{"verify": False} | options)


def exactly(a, b) -> None:
    assert a.dtype == b.dtype and mx.array_equal(a, b).item()


# ---- results, through mlx-lm's own generation


def generated(model, prompt: mx.array, steps: int, forced: list[int] | None = None):
    """Tokens and logits less their logarithm of sums, by mlx-lm's generator and its cache; greedy,
    or with the tokens that are forced."""
    given = itertools.chain(forced or [], itertools.repeat(0))
    options = {"sampler": lambda _: mx.array([next(given)])} if forced else {}
    pairs = list(generate_step(prompt, model, max_tokens=steps, prefill_step_size=200, **options))
    return [token for token, _ in pairs], mx.stack([row for _, row in pairs])


def generator(hidden: int, kind: str):
    return tiny(hidden, kind=kind, **UNROUNDED if kind == "float32" else {})


@functools.cache
def own(hidden: int, kind: str, length: int, steps: int):
    """What mlx-lm itself makes: tokens, their logits, and the logits of all tokens in one call."""
    model, prompt = generator(hidden, kind), tokens(length)[0]
    chosen, rows = generated(model, prompt, steps)
    whole = model(mx.concatenate([prompt, mx.array(chosen)])[None])
    mx.eval(rows, whole)
    return chosen, rows, whole


GENERATED = [
    *((64, "float32", length) for length in (1, 7, 512)),
    *((64, "4-bit", length) for length in (1, 7)),
    *((256, kind, 7) for kind in ("float32", "4-bit")),
]


@pytest.mark.parametrize("hidden, kind, length", GENERATED, ids=str)
def test_generation(hidden, kind, length, launched):
    generates_alike(hidden, kind, length)


@pytest.mark.parametrize("hidden, length", [(64, 1), (64, 512), (256, 7), (256, 512)])
def test_generation_in_plain_bfloat16(hidden, length, need):
    """MLX multiplies unquantised experts on a CPU in float32 only."""
    need("gpu")
    generates_alike(hidden, "bfloat16", length)


def generates_alike(hidden: int, kind: str, length: int) -> None:
    steps, dtype = 64, mx.float32 if kind == "float32" else mx.bfloat16
    chosen, rows, whole = own(hidden, kind, length, steps)
    model, prompt = patched(generator(hidden, kind)), tokens(length)[0]
    _, got = generated(model, prompt, steps, chosen)
    within(got, rows, dtype)
    within(model(mx.concatenate([prompt, mx.array(chosen)])[None]), whole, dtype)
    best = mx.sort(rows.astype(mx.float32), axis=-1)[:, -2:]
    error = mx.abs(got - rows).max().item()
    clear = np.array(best[:, 1] - best[:, 0]) > 2 * error
    same = np.array(got.argmax(-1)) == np.array(chosen)
    assert same[clear].all() and clear.sum() > steps // 2


@pytest.mark.parametrize("kind, wide", [("float32", False), ("4-bit", False), ("4-bit", True)])
def test_every_site_on_real_activations(kind, wide, launched):
    """No drift: each site gets what the model gave it, y in float32 where wide. In bfloat16 the
    outputs are mlx-lm's bit for bit, but for one in a thousand whose rounding was nearly a tie."""
    model = patched(tiny(64, kind=kind))
    sites = find_sites(model.model)
    assert len(sites) == 8 and sites[-1].norm is None and all(s.norm for s in sites[:-1])
    real = activations(model, sites, tokens(40))
    h = model.model.embed_tokens(tokens(40)[:, -8:])
    exactly(real[0][0], mx.repeat(h[:, :, None], 4, 2))
    differ = count = 0
    for site, (x, y) in zip(sites, real, strict=True):
        if wide:
            y = y.astype(mx.float32) * (1 + 2**-10)
        ours = site.hc.site(x, y, site.norm)
        theirs = stock_site(own_coefficients(site.hc), x, y, site.norm)
        assert (ours[1] is None) == (theirs[1] is None) == (site.norm is None)
        for a, b in zip(ours, theirs, strict=True):
            if b is not None:
                assert a.dtype == b.dtype
                within(a, b, b.dtype)
                differ += (a != b).sum().item() if b.dtype == mx.bfloat16 else 0
                count += b.size
    assert differ <= 1e-3 * count, f"{differ} of {count} differ"


def test_a_connection_called_alone(launched):
    """pre, post, comb as mlx-lm's module returns them."""
    model, x = tiny(), mx.random.normal((2, 3, 4, 64))
    want = model.layers[1].ffn_hc(x)
    for a, b in zip(patched(model).layers[1].ffn_hc(x), want, strict=True):
        within(a, b, mx.float32)


def test_norms_that_cannot_be_fused(launched):
    """A weight in float32 makes mlx-lm's sublayer float32, whose output is rounded with the sum;
    a norm of another class is called."""

    class Doubled(nn.RMSNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = tiny(kind="4-bit")
    layers, prompt = model.layers, tokens(16)
    layers[1].input_layernorm.weight = layers[1].input_layernorm.weight.astype(mx.float32)
    layers[2].post_attention_layernorm.__class__ = Doubled
    layers[3].post_attention_layernorm.eps = 0.0
    want = model(prompt)
    within(patched(model)(prompt), want, mx.bfloat16)
    sites = find_sites(model.model)
    x, y = random_inputs(sites[1], mx.bfloat16, 3)
    assert [site.hc.site(x, y, site.norm)[1].dtype for site in sites[:3]] == [
        *(mx.bfloat16, mx.float32, mx.bfloat16),
    ]


@pytest.mark.parametrize(
    "others",
    [
        {"hc_eps": 1e-2, "hc_sinkhorn_iters": 3},
        {"hc_mult": 2, "rms_norm_eps": 1e-20},
        {"hc_mult": 3, "rms_norm_eps": 0.1, "hidden_size": 72},
    ],
)
def test_other_settings(others, launched):
    """Of a model's configuration; 1e-20 is V4.1's own eps."""
    model, prompt = tiny(layers=2, **others), tokens(9)
    want = model(prompt)
    within(patched(model)(prompt), want, mx.float32)


def test_use_metal():
    model, prompt = tiny(layers=2), tokens(9)
    with models.running("stand-in") as found:
        patched(model, use_metal=False)(prompt)
        assert not found
        patched(model)(prompt)
        assert found


# ---- in place, and back


def outline(model):
    """All that mlx-lm and its tuner see of a model."""
    parameters = [(k, a.shape, a.dtype) for k, a in tree_flatten(model.parameters())]
    modules = [(k, set(module.children())) for k, module in model.named_modules()]
    trained = [k for k, _ in tree_flatten(model.trainable_parameters())]
    return parameters, modules, trained, [k for k, _ in tree_flatten(model.leaf_modules())]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", ["float32", "4-bit"])
def test_unpatch(kind, trainable, launched):
    model, prompt = tiny(kind=kind), tokens(9)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    want, before = model(prompt), outline(model)
    assert adapter.unpatch(model) is model
    assert patched(model, trainable=trainable) is model
    assert outline(model) == before
    within(model(prompt), want, want.dtype)
    patched(model, trainable=not trainable)  # anew: the last call's options
    found = any(isinstance(x, adapter.DifferentiableRouter) for x in model.modules())
    assert found != trainable
    adapter.unpatch(model)
    exactly(model(prompt), want)
    assert classes == [type(module) for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("trainable", [False, True])
def test_copies(trainable, launched):
    """Copied and pickled, the layers of a copy are linked to each other, not to the first's."""
    model, prompt = patched(tiny(), trainable=trainable), tokens(9)
    want = model(prompt)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.layers[1].input_layernorm.weight = model.layers[1].input_layernorm.weight + 1
        exactly(other(prompt), want)
        model.layers[1].input_layernorm.weight = model.layers[1].input_layernorm.weight - 1


def saved(model, folder):
    save_model(folder, model)
    config = vars(model.args) | {"quantization": {"group_size": 32, "bits": 4}}
    save_config(config, folder / "config.json")
    return folder


def test_save_and_load(tmp_path, launched):
    """A patched model's file is a stock model's, in both directions."""
    model, prompt = tiny(kind="4-bit"), tokens(9)
    want = model(prompt)
    got = patched(model)(prompt)
    again = load_model(saved(model, tmp_path / "patched"))[0]
    exactly(again(prompt), want)
    exactly(patched(again)(prompt), got)
    again.load_weights(str(saved(adapter.unpatch(model), tmp_path / "own") / "model.safetensors"))
    exactly(again(prompt), got)


def test_weights_are_read_when_called(launched):
    """`update`, casts and new norms after the patch are seen."""
    model, prompt = patched(tiny()), tokens(9)
    model.update(tree_map(lambda a: 1.01 * a, model.parameters()))
    got = model(prompt)
    within(got, adapter.unpatch(model)(prompt), mx.float32)


class Rank:
    """A process group of which this process is every rank, one after the other."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("when", ["before", "after"])
def test_pipeline(when, monkeypatch, launched):
    """Two stages, split between layers that share compressed keys. A stage keeps to itself what
    its layers hand on, and nothing holds the layers of another stage."""
    sent = []
    group = {"send": lambda a, to: sent.append(a) or a, "recv": lambda shape, dtype, of: sent[-1]}
    for name, f in (group | {"all_gather": lambda a: a}).items():
        monkeypatch.setattr(mx.distributed, name, f)
    whole = tiny()
    stages = [tiny(), tiny()]
    for rank, stage in enumerate(stages):
        if when == "before":
            patched(stage)
        stage.model.pipeline(Rank(rank, 2))
        if when == "after":
            patched(stage)
    assert [layer is None for layer in stages[0].model.layers] == [True, True, False, False]
    assert len(find_sites(stages[0].model)) == len(find_sites(stages[1].model)) == 4
    assert stages[1].layers[-1]._next() is None
    caches = [stage.make_cache() for stage in stages]
    cache = whole.make_cache()
    for count in (9, 1, 1):
        prompt = tokens(count, seed=count)
        mx.eval(stages[1](prompt, caches[1]))
        within(stages[0](prompt, caches[0]), whole(prompt, cache), mx.float32)


def test_shard(launched):
    model, prompt = tiny(kind="4-bit float32"), tokens(9)
    want = model(prompt)
    patched(model).shard(mx.distributed.init())
    within(model(prompt), want, mx.float32)


def test_what_is_handed_on_belongs_to_its_streams(launched):
    """A layer uses what another left for it with the very streams, once; otherwise it reads its
    streams itself, as when they were changed or layers have changed places."""
    model, own = patched(tiny()), tiny()
    fixed = {"start_pos": 0, "window_idx": mx.zeros((1, 3, 1), mx.int32)}
    x, pre_mix = mx.random.normal((1, 3, 4, 64)), mx.random.uniform(shape=(1, 3, 4))

    def call(model, k, x, pre_mix, shared):
        cache = stock.LayerCache(8)
        return model.layers[k](x, pre_mix, cache=cache, shared=shared, **fixed)

    for changed, after in ((False, 1), (True, 1), (False, 3)):
        ours, theirs = {}, {}
        got, want = call(model, 0, x, pre_mix, ours), call(own, 0, x, pre_mix, theirs)
        assert adapter.layers._HANDED in ours
        if changed:
            got, want = ([a[:, ::-1] for a in pair] for pair in (got, want))
        got, want = call(model, after, *got, ours), call(own, after, *want, theirs)
        assert (adapter.layers._HANDED in ours) == (after != 3)
        for a, b in zip(got, want, strict=True):
            within(a, b, mx.float32)
        assert ours.keys() - {adapter.layers._HANDED} == theirs.keys()

    for swapped in (model, own):
        layers = swapped.model.layers
        layers[1], layers[2] = layers[2], layers[1]
    within(model(tokens(9)), own(tokens(9)), mx.float32)


# ---- compiled sites


@pytest.fixture
def launches(monkeypatch):
    """Names of the bodies that Python launches, by the stand-in: none where a trace is used."""
    with models.running("stand-in"), monkeypatch.context() as context:
        launch, names = kernel.launch, []
        counted = lambda name, *rest, **k: names.append(name) or launch(name, *rest, **k)  # noqa: E731
        context.setattr(kernel, "launch", counted)
        yield names


def run(site, x, y):
    made = site.hc.site(x, y, site.norm)
    mx.eval(made)
    return made


def uncompiled(site, x, y):
    mx.disable_compile()
    try:
        return run(site, x, y)
    finally:
        mx.enable_compile()


def same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            exactly(a, b)


@pytest.mark.parametrize("kind, wide", [("float32", False), ("4-bit", False), ("4-bit", True)])
def test_sites_share_a_trace_of_each_shape(kind, wide, launches):
    """All with a norm one, the last one another; bit for bit what each makes uncompiled."""
    model = patched(tiny(kind=kind))
    dtype, sites = streams_dtype(model.model), find_sites(model.model)
    for count, traced in ((3, False), (1, False), (3, True), (40, False)):
        for k, site in enumerate(sites):
            x, y = random_inputs(site, dtype, count, k)
            y = y.astype(mx.float32) * (1 + 2**-10) if wide else y
            launches.clear()
            got = run(site, x, y)
            assert bool(launches) == (not traced and site in (sites[0], sites[-1]))
            same(got, uncompiled(site, x, y))


def test_a_compiled_site_follows_its_parameters(launches):
    site = find_sites(patched(tiny()).model)[1]
    x, y = random_inputs(site, mx.float32, 3)
    before = run(site, x, y)
    for module, name in (
        *((site.hc, "fn"), (site.hc, "base"), (site.hc, "scale"), (site.norm, "weight")),
    ):
        module.update({name: 1.5 * module[name]})
        launches.clear()
        after = run(site, x, y)
        assert not launches
        same(after, uncompiled(site, x, y))
        assert not mx.array_equal(before[1], after[1]).item(), name
        before = after


def test_a_compiled_site_follows_its_constants(launches):
    site = find_sites(patched(tiny()).model)[1]
    x, y = random_inputs(site, mx.float32, 3)
    before = run(site, x, y)
    for module, name in (
        *((site.hc, "iters"), (site.hc, "hc_eps"), (site.hc, "norm_eps"), (site.norm, "eps")),
    ):
        setattr(module, name, 1 if name == "iters" else 0.1)
        after = run(site, x, y)
        same(after, uncompiled(site, x, y))
        assert not mx.array_equal(before[1], after[1]).item(), name
        before = after


def test_sites_that_are_not_compiled(launches, monkeypatch):
    """With a gradient, without kernels, without a GPU, without tokens, and of a length that is no
    decoder's and no whole chunk: each call calls the op."""
    site = find_sites(patched(tiny()).model)[1]
    x, y = random_inputs(site, mx.float32, 3)
    rest, chunk = (random_inputs(site, mx.float32, length) for length in (65, 256))
    with monkeypatch.context() as context:
        op, calls = ops.mhc_single_pass, []
        counted = lambda *args, **options: calls.append(options) or op(*args, **options)  # noqa: E731
        context.setattr(ops, "mhc_single_pass", counted)
        none = (x[:, :0], y[:, :0])
        for given, backend, use_metal, differentiable, count in (
            *(((x, y), "metal", True, True, 2), ((x, y), "metal", False, False, 2)),
            *(((x, y), None, True, False, 2), (none, "metal", True, False, 2)),
            *((rest, "metal", True, False, 2), (chunk, "metal", True, False, 1)),
            ((x, y), "metal", True, False, 1),
        ):
            context.setattr(kernel, "backend", lambda backend=backend: backend)
            site.hc.use_metal, site.hc.differentiable = use_metal, differentiable
            calls.clear()
            for _ in range(2):
                assert [a.shape[1] for a in run(site, *given)] == 3 * [given[0].shape[1]]
            options = {"use_metal": use_metal, "differentiable": differentiable}
            assert calls == count * [options | {"round_aggregate": True}]


def test_a_trace_is_of_one_backend(launches, monkeypatch):
    site = find_sites(patched(tiny()).model)[1]
    x, y = random_inputs(site, mx.float32, 3)
    with monkeypatch.context() as wrong:  # so that a trace that is used shows
        launch = kernel.launch
        wrong.setattr(kernel, "launch", lambda *a, **k: [2 * made for made in launch(*a, **k)])
        doubled = run(site, x, y)
    right = uncompiled(site, x, y)
    assert not mx.array_equal(doubled[0], right[0]).item()
    with monkeypatch.context() as moved:
        for backend, want in (("metal", doubled), ("cuda", right), (None, right)):
            moved.setattr(kernel, "backend", lambda backend=backend: backend)
            for a, b in zip(run(site, x, y), want, strict=True):
                within(a, b, mx.float32)


def test_a_compiled_site_inside_others(tmp_path, launches):
    """Compiled and exported again, on a stream and in a thread, after it was traced alone."""
    site = find_sites(patched(tiny()).model)[1]
    x, y = random_inputs(site, mx.float32, 3)
    want = run(site, x, y)

    def f(x, y):
        return site.hc.site(x, y, site.norm)

    launches.clear()
    same(mx.compile(f)(x, y), want)
    assert launches  # into the outer trace
    mx.export_function(str(tmp_path / "f.mlxfn"), f, x, y)
    same(mx.import_function(str(tmp_path / "f.mlxfn"))(x, y), want)
    with mx.stream(mx.new_stream(mx.default_device())):
        same(run(site, x, y), want)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        same(pool.submit(run, site, x, y).result(), want)


# ---- speculative decoding


@pytest.mark.parametrize("where", ["gpu", "simulator"])
@pytest.mark.parametrize("kind", ["float32", "4-bit"])
def test_tokens_in_one_call_and_alone(where, kind, need):
    """Bit for bit at every site by kernels, whose sums do not depend on the number of tokens. (The
    reference's do: MLX sums one row in another order than several.)"""
    need(where)
    model = patched(tiny(layers=2 if where == "simulator" else 4, kind=kind))
    with models.running("here" if where == "gpu" else where):
        for site in find_sites(model.model):
            x, y = random_inputs(site, streams_dtype(model.model), 5)
            whole = site.hc.site(x, y, site.norm)
            for k in range(5):
                alone = site.hc.site(x[:, k : k + 1], y[:, k : k + 1], site.norm)
                for a, b in zip(whole, alone, strict=True):
                    assert (a is None and b is None) or mx.array_equal(a[:, k : k + 1], b).item()


# ---- verification and check


def test_float64():
    """The measure is the oracle's, of another hand."""
    site = find_sites(tiny().model)[2]
    x, y = (np.array(a, np.float64) for a in random_inputs(site, mx.float32, 5))
    arrays = (np.array(a, np.float64) for a in (site.hc.fn, site.hc.base, site.hc.scale))
    c = adapter.sites.convention(site.hc.iters, site.hc.hc_eps)
    (h_pre, h_post, h_res), _ = oracle.mhc_coefficients(x, *arrays, c, site.hc.norm_eps)
    out, _ = oracle.stream_mix_add(x, y, h_post, h_res)
    weight = np.array(site.norm.weight, np.float64)
    u, _ = oracle.stream_aggregate_norm(out, h_pre, weight, site.norm.eps)
    found = adapter.exact._exact(site, x, y)
    for name, want in {"out": out, "h_pre": h_pre, "u": u}.items():
        np.testing.assert_allclose(found[name], want, rtol=1e-11, atol=1e-13)


def test_units_in_the_last_place():
    want = np.array([[1.0, 3.0], [0.5, -0.25]])
    got = mx.array([[1.0, 3.0 + 2**-6], [0.5 + 2**-9, -0.25]])
    assert adapter.exact._error(got[:1], want[:1], mx.bfloat16) == 1.0
    assert adapter.exact._error(got[1:], want[1:], mx.bfloat16) == 0.5
    assert adapter.exact._error(got[1:] * np.nan, want[1:], mx.bfloat16) == np.inf


@pytest.mark.parametrize("hidden", [64, 256])
def test_verified(hidden, launched):
    """All sites of a right implementation are kept in bfloat16, without a warning, and the random
    state is left alone."""
    model = tiny(hidden, kind="4-bit")
    state = [a.tolist() for a in mx.random.state]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.patch(model)
    assert all(isinstance(s.hc, adapter.SinglePassConnection) for s in find_sites(model.model))
    assert state == [a.tolist() for a in mx.random.state]


def planted(monkeypatch, wrong):
    """Sites whose streams are 2 % off where wrong(x, fn)."""
    right = adapter.SinglePassConnection.site

    def site(self, x, y, norm):
        out, *others = right(self, x, y, norm)
        return (out * 1.02 if wrong(x, self.fn) else out, *others)

    monkeypatch.setattr(adapter.SinglePassConnection, "site", site)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_wrong_site_stays_as_it_was(trainable, monkeypatch, launched):
    model, prompt = tiny(kind="4-bit"), tokens(9)
    want, phi = model(prompt), model.layers[2].attn_hc.fn
    planted(monkeypatch, lambda x, given: given is phi)
    with pytest.warns(UserWarning, match=r"1 of 8 .* stay mlx-lm's.*: model.layers.2.attn_hc\.$"):
        adapter.patch(model, trainable=trainable)
    kinds = [type(site.hc) for site in find_sites(model.model)]
    own = adapter.DifferentiableHyperConnection if trainable else stock.HyperConnection
    assert kinds.count(adapter.SinglePassConnection) == 7 and kinds[4] is own
    within(model(prompt), want, mx.bfloat16)
    report = adapter.check(model, times=(), verbose=False)
    assert report["patched"] == 7 and not report["sites"][4]["patched"]
    assert report["errors"]["random"]["max"] < 4
    adapter.patch(model, verify=False)  # and the same mistake is found by check
    report = adapter.check(model, times=(), verbose=False)
    assert report["errors"]["real"]["worst"] == "model.layers.2.attn_hc"
    assert report["errors"]["real"]["max"] > 4 > report["errors"]["real, mlx-lm"]["max"]


@pytest.mark.parametrize("count", [1, 512])
def test_wrong_at_some_number_of_tokens(count, monkeypatch, launched):
    model = tiny(kind="4-bit")
    planted(monkeypatch, lambda x, fn: x.shape[1] == count)
    with pytest.warns(UserWarning, match="8 of 8 hyper-connections stay mlx-lm's"):
        adapter.patch(model)
    assert all(type(site.hc) is stock.HyperConnection for site in find_sites(model.model))


def test_an_error_while_verifying_leaves_the_model(monkeypatch):
    model = tiny()

    def broken(*args, **kwargs):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(ops, "mhc_single_pass", broken)
    with pytest.raises(RuntimeError, match="does not compile"):
        adapter.patch(model)
    assert all(type(layer) is stock.DecoderLayer for layer in model.layers)


def test_check(capsys, launched):
    """What it returns, what it prints; a stock model is stock afterwards."""
    model = tiny(kind="4-bit")
    report = adapter.check(model, tokens(20)[0])
    assert type(model.layers[0]) is stock.DecoderLayer and adapter.sites._seen is None
    assert json.loads(json.dumps(report)) == report
    assert [row["site"] for row in report["sites"]][:2] == [
        "model.layers.0.attn_hc",
        "model.layers.0.ffn_hc",
    ]
    assert report["patched"] == 8 and report["dtype"] == "bfloat16"
    for ours in ("random", "real"):
        assert 0.1 < report["errors"][ours]["max"] < 4
    assert [t["tokens"] for t in report["times"]] == [1, 512]
    assert all(t[k] > 0 for t in report["times"] for k in ("patched", "mlx-lm"))
    printed = capsys.readouterr().out
    assert "8 of 8 hyper-connections patched, bfloat16" in printed
    assert "random, patched" in printed and "us per sublayer" in printed


# ---- the command


def test_command(tmp_path, capsys):
    """On a random model and on a saved one; the numbers are there, the model generates."""
    file = tmp_path / "report.json"
    given = ["--random", "32,2", "--tokens", "4,8", "--json", str(file)]
    report = main(given)
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(report))
    assert written["command"] == "python -m mhc_mlx.mlx_lm " + " ".join(given)
    assert written["mlx"] == mx.__version__ and written["check"]["patched"] == 4
    assert set(written["bench"]["patched"]["prefill"]) == {"4", "8"}
    assert written["bench"]["mlx-lm"]["decode"] > 0
    printed = capsys.readouterr().out
    assert "prefill 8:" in printed and "decode:" in printed and "patched in" in printed


def test_command_on_a_path(tmp_path, monkeypatch):
    """--model loads with mlx-lm; --check and --bench run one part each."""
    model = tiny(kind="4-bit")
    asked = []
    monkeypatch.setattr(mlx_lm, "load", lambda path: asked.append(path) or (model, None))
    assert "bench" not in main(["--model", "here", "--check", "--no-verify", "--tokens", "2"])
    report = main(["--model", "here", "--bench", "--tokens", "4"])
    assert "check" not in report and asked == ["here", "here"]
    assert isinstance(model.layers[0], adapter.SinglePassLayer)


def test_command_on_sites(capsys, launched):
    report = main(["--sites", "64,32", "--tokens", "1,16"])
    for row, d in zip(report["per sublayer"], (64, 32), strict=True):
        assert (row["d"], row["n"], row["sites"]) == (d, 4, SITES)
        assert [t["tokens"] for t in row["times"]] == [1, 16]
        assert row["errors"]["patched"] <= max(2, row["errors"]["mlx-lm"])
        graph = row["graph"]["1"]
        assert graph["mlx-lm"]["primitives"] > graph["mlx-lm, compiled"]["primitives"] > 1
        assert row["peak bytes"]["mlx-lm"] > 0
    assert "dispatches per sublayer" in capsys.readouterr().out


@pytest.mark.parametrize("count, most", [(1, 2), (16, 2), (17, 2), (2048, 2)])
def test_launches(count, most, launches):
    """Kernels of one sublayer at a model's size, recorded and not run; everything else that its
    graph has is a view."""
    (site,) = adapter.times.random_sites(4096, 1)
    site.hc.site(*random_inputs(site, mx.bfloat16, count), site.norm)
    assert 1 <= len(launches) <= most, launches


# ---- DeepSeek V4


def v4(dim: int, random: np.random.Generator, head: bool) -> dict[str, np.ndarray]:
    outs, parts = (4, 1) if head else (24, 3)
    return {
        "fn": random.standard_normal((outs, 4 * dim)) * (4 * dim) ** -0.5,
        "base": random.standard_normal(outs),
        "scale": random.uniform(0.5, 1.5, parts),
    }


@pytest.mark.parametrize("separator", ["_", "."])
def test_v4_tensors(separator, launched):
    """The official names of a layer's two connections and of the read-out, against the oracle."""
    dim, random, weights = 48, np.random.default_rng(0), {"layers.0.attn_norm.weight": mx.ones(3)}
    x, y = random.standard_normal((2, 3, 4, dim)), random.standard_normal((2, 3, dim))
    parts = {p: v4(dim, random, p == "hc_head") for p in ("layers.0.hc_attn", "hc_head")}
    for prefix, arrays in parts.items():
        weights |= {f"{prefix}{separator}{k}": mx.array(a) for k, a in arrays.items()}
    weights = {k: a.astype(mx.float32) for k, a in weights.items()}

    connection = m.HyperConnection(dim, 4, convention=m.DEEPSEEK_V4, norm_eps=1e-20)
    assert adapter.load_v4(connection, weights, "layers.0.hc_attn") is connection
    u, add_residual = connection(mx.array(x).astype(mx.float32))
    out = add_residual(mx.array(y).astype(mx.float32))
    given = [a.astype(np.float32).astype(np.float64) for a in parts["layers.0.hc_attn"].values()]
    made, _ = oracle.mhc_pre(x, *given, None, m.DEEPSEEK_V4, 1e-20)
    np.testing.assert_allclose(u, made[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        out, oracle.stream_mix_add(x, y, *made[1:3])[0], rtol=1e-4, atol=1e-5
    )

    head = m.HyperHead(dim, 4, convention=m.DEEPSEEK_V4, norm_eps=1e-20)
    adapter.load_v4(head, weights, "hc_head")
    given = [a.astype(np.float32).astype(np.float64) for a in parts["hc_head"].values()]
    want, _ = oracle.mhc_head(x, *given, m.DEEPSEEK_V4, 1e-20)
    np.testing.assert_allclose(head(mx.array(x).astype(mx.float32)), want, rtol=1e-4, atol=1e-5)


def test_v4_is_v41_unlagged(launched):
    """V4's write-back with mlx-lm's V4.1 coefficients of the same tensors."""
    hc, x = tiny().layers[0].attn_hc, mx.random.normal((1, 3, 4, 64))
    y = mx.random.normal((1, 3, 64))
    weights = {f"hc_ffn.{k}": a for k, a in hc.parameters().items()}
    connection = m.HyperConnection(64, 4, convention=m.DEEPSEEK_V4, norm_eps=hc.norm_eps)
    u, add_residual = adapter.load_v4(connection, weights, "hc_ffn")(x)
    pre, post, comb = hc(x)
    within(u, stock._collapse(x, pre), mx.float32)
    within(add_residual(y), stock._expand(y, x, post, comb), mx.float32)


# ---- errors


def another_layer():
    model = tiny(layers=2)
    model.layers[1].attn_hc = nn.Linear(2, 2)
    return adapter.patch(model)


def bad_iterations():
    return adapter.patch(tiny(layers=2, hc_sinkhorn_iters=0))


def zero_eps():
    model = tiny(layers=2)
    model.layers[1].ffn_hc.norm_eps = 0.0
    return adapter.patch(model)


V41 = r"deepseek_v41 of mlx-lm >=0.32.2,<0.33"
CONNECTION = {"c_fn": mx.zeros((24, 32)), "c_base": mx.zeros(24), "c_scale": mx.zeros(3)}
BAD = [
    (
        lambda: adapter.patch(nn.Linear(2, 2)),
        TypeError,
        rf"\[patch\] model must be a {V41} but .*Li",
    ),
    (lambda: adapter.unpatch(None), TypeError, rf"\[unpatch\] model must be a {V41} but got buil"),
    (lambda: adapter.check(3), TypeError, r"\[check\] model must be a deepseek_v41"),
    (lambda: adapter.check(tiny(), [1, 2]), TypeError, r"\[check\] tokens must .* got list"),
    (lambda: adapter.check(tiny(), mx.ones(3)), TypeError, r"integers but got mlx.core.float32"),
    (
        lambda: adapter.check(tiny(), mx.zeros((1, 0), mx.int32)),
        ValueError,
        r"tokens must have shape \[length\] .* but got \[1, 0\]",
    ),
    (
        lambda: adapter.check(tiny(), mx.array([10**6, 3])),
        ValueError,
        r"\[check\] tokens must be from 0 to \d+ but got 3 to 1000000",
    ),
    (lambda: adapter.bench(tiny()), ValueError, r"\[bench\] model must be patched"),
    (another_layer, TypeError, rf"as in {V41} but got .*Linear for a HyperConnection"),
    (bad_iterations, ValueError, "iters must be at least 1"),
    (zero_eps, ValueError, r"\[patch\] rms_norm_eps must be"),
    (
        lambda: adapter.sites._check_version("0.32.1"),
        ImportError,
        f"must be {V41} but mlx-lm is 0.32.1",
    ),
    (lambda: adapter.sites._check_version("0.33.0.dev1"), ImportError, "but mlx-lm is 0.33.0.dev1"),
    (lambda: adapter.load_v4(nn.Linear(2, 2), {}, "c"), TypeError, "HyperHead but got Linear"),
    (
        lambda: adapter.load_v4(m.HyperConnection(8, 4, dynamic=False), CONNECTION, "c"),
        TypeError,
        "must be a dynamic HyperConnection",
    ),
    (
        lambda: adapter.load_v4(m.HyperConnection(8, convention=m.DEEPSEEK_V4), {}, "c"),
        ValueError,
        "must have c_fn",
    ),
    (
        lambda: adapter.load_v4(m.HyperConnection(8), CONNECTION, "c"),
        ValueError,
        "convention must be DEEPSEEK_V4's but got PAPER",
    ),
    (
        lambda: adapter.load_v4(m.HyperConnection(9, convention=m.DEEPSEEK_V4), CONNECTION, "c"),
        ValueError,
        r"c_fn must have shape \[24, 36\] but got \[24, 32\]",
    ),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "command, message",
    [
        ("--sites abc", "--sites must be positive numbers with commas between but is 'abc'"),
        ("--sites 0", "--sites must be positive numbers"),
        ("--sites 64 --tokens 1,0", "--tokens must be positive numbers"),
        ("--sites 64 --check", "they go not with --sites"),
        ("--random 256,0", "--random must be positive numbers"),
        ("--random 100,2", "--random must have D a multiple of 32 but has 100"),
    ],
)
def test_command_names_mistakes(command, message, capsys):
    with pytest.raises(SystemExit):
        main(command.split())
    assert message in capsys.readouterr().err


def test_another_version_of_mlx_lm(monkeypatch):
    """Found at import, before any of its names is used."""
    monkeypatch.setattr(mlx_lm, "__version__", "0.33.1")
    for name in [name for name in sys.modules if name.startswith("mhc_mlx.mlx_lm")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=f"{V41} but mlx-lm is 0.33.1"):
        importlib.import_module("mhc_mlx.mlx_lm")


def test_another_model_of_mlx_lm():
    from mlx_lm.models.llama import Model, ModelArgs

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 1}
    model = Model(ModelArgs("llama", num_attention_heads=4, rms_norm_eps=1e-5, **sizes))
    with pytest.raises(TypeError, match=rf"{V41} but got mlx_lm.models.llama.Model"):
        adapter.patch(model)
