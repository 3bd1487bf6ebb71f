"""`mhc_mlx.models` on tiny random models, against mlx-lm's own: generation, sites, in place and
back. Compiled sites, verification and the command, and gradients are in test_mlx_lm_*.py."""

import copy
import functools
import gc
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import deepseek_v41 as stock  # noqa: E402
from mlx_lm.utils import load_model, save_config, save_model  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models.check import activations  # noqa: E402
from mhc_mlx.models.exact import random_inputs  # noqa: E402
from mhc_mlx.models.families import lm_deepseek_v41 as family  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import (  # noqa: E402
    UNROUNDED,
    exactly,
    find_sites,
    patched,
    run_ours,
    run_theirs,
    streams_dtype,
    tiny,
    tokens,
    within,
)

launched = modules.launched


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
    sites = find_sites(model)
    assert len(sites) == 8 and sites[-1].norm is None and all(s.norm for s in sites[:-1])
    real = activations(family.FAMILY, model, sites, tokens(40))
    h = model.model.embed_tokens(tokens(40)[:, -8:])
    exactly(real[0][0], mx.repeat(h[:, :, None], 4, 2))
    differ = count = 0
    for site, (x, y) in zip(sites, real, strict=True):
        if wide:
            y = y.astype(mx.float32) * (1 + 2**-10)
        got, want = run_ours(site, x, y), run_theirs(site, x, y)
        assert (got[1] is None) == (want[1] is None) == (site.norm is None)
        for a, b in zip(got, want, strict=True):
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
    sites = find_sites(model)
    x, y = random_inputs(sites[1], mx.bfloat16, 3)
    assert [run_ours(site, x, y)[1].dtype for site in sites[:3]] == [
        *(mx.bfloat16, mx.float32, mx.bfloat16)
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
    with modules.running("stand-in") as found:
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
    found = any(isinstance(x, family.DifferentiableRouter) for x in model.modules())
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


@pytest.mark.parametrize("trainable", [False, True])
def test_a_model_that_is_gone_leaves_no_memory(trainable, launched):
    """At once, as mlx-lm's own; a layer of it still runs, and a copy of one is not of a model."""
    model = patched(tiny(layers=2), trainable=trainable)
    mx.eval(model(tokens(5)))
    text, layer = weakref.ref(model.model), copy.deepcopy(model.layers[0])
    assert layer._owner.layers[0] is model.layers[0] is not layer
    gc.collect()
    gc.disable()
    try:
        del model
        assert text() is None
    finally:
        gc.enable()
    assert layer._next() is None
    assert pickle.loads(pickle.dumps(layer))._next() is None


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
    assert len(find_sites(stages[0])) == len(find_sites(stages[1])) == 4
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
        assert family._HANDED in ours
        if changed:
            got, want = ([a[:, ::-1] for a in pair] for pair in (got, want))
        got, want = call(model, after, *got, ours), call(own, after, *want, theirs)
        assert (family._HANDED in ours) == (after != 3)
        for a, b in zip(got, want, strict=True):
            within(a, b, mx.float32)
        assert ours.keys() - {family._HANDED} == theirs.keys()

    for swapped in (model, own):
        layers = swapped.model.layers
        layers[1], layers[2] = layers[2], layers[1]
    within(model(tokens(9)), own(tokens(9)), mx.float32)


def test_activations_are_those_of_their_own_thread():
    """Another thread runs the same sites on other streams while they are collected."""
    site = find_sites(patched(tiny(layers=1)))[0]
    here, there = (random_inputs(site, mx.float32, 3 + k) for k in range(2))
    mx.eval(here, there)

    class Model(family.DeepseekV41):
        def cache(self, model):
            return None

        def logits(self, model, tokens, cache):
            out = family.run_site(site.hc, *here, site.norm)[0]
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: mx.eval(family.run_site(site.hc, *there, site.norm))).result()
            return out

    ((x, y),) = activations(Model(), nn.Module(), [site], mx.zeros((1, 3)))
    assert mx.array_equal(x, here[0]) and mx.array_equal(y, here[1])


# ---- speculative decoding


@pytest.mark.parametrize("where", ["gpu", "simulator"])
@pytest.mark.parametrize("kind", ["float32", "4-bit"])
def test_tokens_in_one_call_and_alone(where, kind, need):
    """Bit for bit at every site by kernels, whose sums do not depend on the number of tokens. (The
    reference's do: MLX sums one row in another order than several.)"""
    need(where)
    model = patched(tiny(layers=2 if where == "simulator" else 4, kind=kind))
    with modules.running("here" if where == "gpu" else where):
        for site in find_sites(model):
            x, y = random_inputs(site, streams_dtype(model), 5)
            whole = run_ours(site, x, y)
            for k in range(5):
                alone = run_ours(site, x[:, k : k + 1], y[:, k : k + 1], site.norm)
                for a, b in zip(whole, alone, strict=True):
                    assert (a is None and b is None) or mx.array_equal(a[:, k : k + 1], b).item()
