"""`mhc_mlx.models` on tiny random models of mlx-vlm, against mlx-vlm's own: tokens, batches,
quantised models, saving, in place and back, speculative decoding, drafters, gradients.

A new family is one function in tiny_vlm.py; all tests of MODELS then run on it."""

import functools
import importlib

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")

from mlx_vlm.generate.ar import _make_cache, generate_step  # noqa: E402
from mlx_vlm.models.base import InputEmbeddingsFeatures  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models.exact import random_inputs, site_token_errors, spread  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_vlm import MODELS, SIZES, V4, randomised, run, tiny, tokens  # noqa: E402

launched = modules.launched
families = pytest.mark.parametrize("name", MODELS)
STEPS, LENGTHS = 64, (1, 7, 300)


def patched(model, **options):
    return adapter.patch(model, **{"verify": False} | options)


class Outer(nn.Module):
    """What mlx-vlm's generator takes: a language model and its embeddings, without vision."""

    def __init__(self, model):
        super().__init__()
        self.language_model, self.config = model, model.config

    def get_input_embeddings(self, input_ids=None, pixel_values=None, **kwargs):
        embed = getattr(self.language_model, "model", self.language_model).embed_tokens
        return InputEmbeddingsFeatures(inputs_embeds=embed(input_ids))

    def __call__(self, *args, **kwargs):
        return self.language_model(*args, **kwargs)


def generated(model, prompt: mx.array, steps: int = STEPS) -> tuple[list[int], mx.array]:
    """Greedy tokens and log-probabilities, by mlx-vlm's generator and the model's cache."""
    options = {"max_tokens": steps, "temperature": 0.0, "prefill_step_size": 128}
    cache = model.make_cache()
    pairs = generate_step(prompt[None], Outer(model), None, None, prompt_cache=cache, **options)
    found = [(int(token), row) for token, row in pairs]
    return [token for token, _ in found], mx.stack([row.reshape(-1) for _, row in found])


@functools.cache
def own(name: str, length: int) -> tuple[list[int], mx.array]:
    return generated(tiny(name), tokens(length)[0])


def alike(got: mx.array, want: mx.array, tolerance: float = 2e-5) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    error, most = mx.abs(got - want).max().item(), mx.abs(want).max().item()
    assert error <= tolerance * most, f"largest error {error}, largest value {most}"


# ---- tokens


def transposed(model, sites):
    """Swap h_res for its transpose: the rows of fn and base that make it, not the projection."""
    for site in sites:
        fn, base, _ = site.arrays
        order = np.arange(fn.shape[0])
        order[8:] = 8 + np.arange(16).reshape(4, 4).T.ravel()
        site.hc[site.prefix + "fn"] = fn[mx.array(order)]
        site.hc[site.prefix + "base"] = base[mx.array(order)]


def one_iteration(model, sites):
    for site in sites:
        for owner in (site.hc, getattr(site.hc, "config", None)):
            for name in ("sinkhorn_iters", "hc_sinkhorn_iters"):
                if hasattr(owner, name):
                    setattr(owner, name, 1)


def without_engram(model, sites):
    model.engram_hash = None


def swapped_gates(model, sites):
    for site in sites:
        for name in ("fn", "base"):
            a = site.hc[site.prefix + name]
            site.hc[site.prefix + name] = mx.roll(a, 4, axis=0)


def another_magnitude(model, sites):
    for site in sites:
        site.hc.hc_magnitude = 2.0


def without_clamp(model, sites):
    for site in sites:
        site.hc.config.mhc_h_res_clamp_min, site.hc.config.mhc_h_res_clamp_max = -30.0, 30.0


SINKHORN = ("deepseek_v41", "deepseek_v4", "glm5_next", "xing4_0")
MISTAKES = {transposed: SINKHORN, one_iteration: SINKHORN, without_engram: ("deepseek_v41",)}
MISTAKES |= {swapped_gates: ("hy_v4",), another_magnitude: ("hy_v4",)}
MISTAKES |= {without_clamp: ("xing4_0",)}


@pytest.mark.parametrize(
    "name, mistake", [(name, mistake) for mistake, names in MISTAKES.items() for name in names]
)
def test_mistakes_change_the_tokens(name, mistake):
    """So that equal tokens say something."""
    model = tiny(name)
    sites = [site for site in adapter.family_of("test", model).sites(model) if site.kind != "head"]
    mistake(model, sites)
    assert generated(model, tokens(7)[0], 32)[0] != own(name, 7)[0][:32]


@pytest.mark.parametrize("length", LENGTHS)
@families
def test_tokens(name, length):
    """Greedy, token for token, through mlx-vlm's generator, by the reference."""
    chosen, rows = own(name, length)
    assert len(set(chosen)) > 4
    found, got = generated(patched(tiny(name)), tokens(length)[0])
    assert found == chosen
    alike(got, rows)


@families
def test_tokens_by_kernels(name):
    with modules.running("stand-in") as launches:
        chosen, rows = own(name, 7)
        found, got = generated(patched(tiny(name)), tokens(7)[0], 16)
        assert launches and found == chosen[:16]
        alike(got, rows[:16])


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("xing4_0", "qwen4_exp")])
def test_quantised(name, launched):
    """4-bit with bfloat16 activations. Logits differ by the rounding of few elements. (Xing and
    Qwen round more than these kernels: test_mlx_vlm_xing4_0.py, test_mlx_vlm_qwen4_exp.py.)"""
    model, prompt = tiny(name, "4-bit"), tokens(20)
    want = run(model, prompt).astype(mx.float32)
    got = run(patched(model), prompt).astype(mx.float32)
    error = mx.abs(got - want).max(-1) / mx.abs(want).max(-1)
    assert error.max().item() < 2**-5 and error.mean().item() < 2**-8


@families
def test_a_site_by_the_simulator(name, need):
    """The Metal text, executed, against mlx-vlm's functions."""
    need("simulator")
    with modules.running("simulator"):
        site = adapter.family_of("test", model := patched(tiny(name))).sites(model)[0]
        x, y = mx.random.normal((1, 2, 4, 64)), mx.random.normal((1, 2, 64))
        got, want = (site.outputs(options, x, y) for options in (site.options, None))
        assert got.keys() == want.keys()
        for key, a in want.items():
            alike(got[key], a, 1e-5)


# ---- in place, and back


def outline(model):
    parameters = [(k, a.shape, a.dtype) for k, a in tree_flatten(model.parameters())]
    return parameters, [(k, set(module.children())) for k, module in model.named_modules()]


@families
def test_unpatch(name, launched):
    model, prompt = tiny(name), tokens(9)
    want, before = run(model, prompt), outline(model)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    assert patched(model) is model and outline(model) == before
    alike(run(model, prompt), want)
    patched(model, trainable=True)
    adapter.unpatch(model)
    assert mx.array_equal(run(model, prompt), want).item()
    assert classes == [type(module) for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]


@families
def test_save_and_load(name, tmp_path):
    model, prompt = patched(tiny(name)), tokens(9)
    file = str(tmp_path / "model.safetensors")
    model.save_weights(file)
    other = tiny(name, seed=1)
    other.load_weights(file)
    want = run(adapter.unpatch(model), prompt)
    assert mx.array_equal(run(other, prompt), want).item()
    alike(run(patched(other), prompt), want)


@families
def test_verified(name):
    """Every site of a right implementation is kept; none of one that transposes h_res."""
    model = adapter.patch(tiny(name))
    sites = adapter.family_of("test", model).sites(model)
    assert all(site.options is not None for site in sites)


def stock_errors(model, over_tokens=np.median) -> list[float]:
    """The median (or another) error of each output of each site by mlx-vlm's code."""
    found = []
    for site in adapter.family_of("test", model).sites(model):
        large = spread(site, 6.0)
        _, theirs = site_token_errors(large, None, *random_inputs(large, mx.float32, 16))
        found += [float(over_tokens(errors)) for errors in theirs.values()]
    return found


@families
def test_sites_in_float64(name):
    """Errors are measured against what mlx-vlm computes."""
    assert max(stock_errors(tiny(name))) < 16


def test_a_transposed_site_is_refused(monkeypatch):
    from mhc_mlx.models.families import vlm_deepseek_v4 as family

    right = family.run.read

    def read(*args):
        u, h_post, h_res = right(*args)
        return u, h_post, h_res.swapaxes(-1, -2)

    monkeypatch.setattr(family.run, "read", read)
    with pytest.warns(UserWarning, match=r"2 of 3 .*layers.0.attn_hc \(median of h_res, float32"):
        model = adapter.patch(tiny("deepseek_v4", num_hidden_layers=1, compress_ratios=[0]))
    kinds = [site.options is None for site in family.FAMILY.sites(model)]
    assert kinds == [True, True, False]  # the read-out has no h_res


# ---- what is special


SPECULATIVE = ("deepseek_v4", "glm5_next")


def each_token_alone(model, lengths):
    x, y = mx.random.normal((1, 8, 4, 64)), mx.random.normal((1, 8, 64))
    for site in adapter.family_of("test", model).sites(model):
        for length in lengths:
            whole = site.outputs(site.options, x[:, :length], y[:, :length])
            for k in range(length):
                alone = site.outputs(site.options, x[:, k : k + 1], y[:, k : k + 1])
                for key, a in whole.items():
                    assert mx.array_equal(a[:, k : k + 1], alone[key]).item(), (site.name, key)


@pytest.mark.parametrize("where", ["here", "simulator"])
@pytest.mark.parametrize("name", SPECULATIVE)
def test_each_token_alone(name, where, need):
    """At every site one call on L <= 8 tokens equals L single-token calls bit for bit."""
    if where == "simulator":
        need(where)
    with modules.running(where):
        kinds = {"compress_ratios": [0]} if name == "deepseek_v4" else {}
        kinds |= {"layer_types": ["linear_attention"]} if name == "glm5_next" else {}
        short = {"num_hidden_layers": 1, **kinds}
        model = patched(tiny(name, **short if where == "simulator" else {}))
        each_token_alone(model, (3,) if where == "simulator" else (2, 5, 8))


@pytest.mark.parametrize("name", SPECULATIVE)
def test_speculative_verification(name):
    """The whole model, with its cache: the same bits as when tokens come one by one."""
    model, prompt, draft = patched(tiny(name)), tokens(9), tokens(5, seed=1)
    caches = [model.make_cache() for _ in range(2)]
    for cache in caches:
        mx.eval(run(model, prompt, cache))
    whole = run(model, draft, caches[0])
    alone = [run(model, draft[:, k : k + 1], caches[1]) for k in range(5)]
    assert mx.array_equal(whole, mx.concatenate(alone, axis=1)).item()


def test_branches_of_every_kind(launched):
    """A tuple's first entry is written back, arguments reach the branch, and no branch expands."""
    model = tiny("deepseek_v4", num_hidden_layers=1, compress_ratios=[0])
    x, hc, norm = mx.random.normal((1, 3, 4, 64)), model.layers[0].attn_hc, nn.RMSNorm(64)

    def branch(u, scale, extra=0):
        return scale * u, extra

    want = hc.apply_branch(x, norm, branch, 2.0, extra="kept")
    moe = model.layers[0].ffn_hc.apply_branch(x, norm, model.layers[0].ffn, tokens(3))
    patched(model)
    got = hc.apply_branch(x, norm, branch, 2.0, extra="kept")
    assert got[1] == want[1] == "kept"
    alike(got[0], want[0])
    alike(model.layers[0].ffn_hc.apply_branch(x, norm, model.layers[0].ffn, tokens(3)), moe)


def test_engram_breaks_the_pair_there_and_only_there(monkeypatch, launched):
    """Layers 1 and 3 read the streams that engram changed; layer 2 gets what layer 1 read."""
    from mhc_mlx.models.families import vlm_deepseek_v41 as family

    model, calls = patched(tiny("deepseek_v41")), []
    right = family._collapse
    monkeypatch.setattr(family, "_collapse", lambda x, h: calls.append(x.shape) or right(x, h))
    cache = model.make_cache()
    run(model, tokens(9), cache)
    assert len(calls) == 3  # layers 0, 1 and 3
    assert not any(k.startswith("_mhc") for k in vars(cache[0]))
    model.engram_hash = None  # where hashes are missing the streams do not change
    alike(run(model, tokens(9)), run(adapter.unpatch(model), tokens(9)))


def test_image_tokens(launched):
    """Engram leaves them out, and gates pick experts for them by another bias."""
    model, prompt = tiny("deepseek_v41"), tokens(9)
    image = model.config.image_token_id
    with_image = mx.where(mx.arange(9) // 3 == 1, image, prompt)
    want = run(model, with_image)
    assert mx.abs(want - run(model, prompt)).max().item() > 0.1
    alike(run(patched(model), with_image), want)


@families
def test_a_model_that_holds_the_language_model(name):
    """As mlx-vlm loads it: sites have the names of its parameters, and `check` finds its tokens."""
    model = Outer(tiny(name))
    want = run(model.language_model, tokens(9))
    sites = adapter.family_of("test", patched(model)).sites(model)
    names = {key for key, _ in tree_flatten(model.parameters())}
    for site in sites:
        under, parts = "_" if site.prefix else ".", ("fn", "base", "scale")
        if name == "qwen4_exp":
            parts = [k for k, _ in tree_flatten(site.hc.parameters())]
        assert {f"{site.name}{under}{k}" for k in parts} <= names
    alike(run(model.language_model, tokens(9)), want)
    report = adapter.check(model, tokens(5), tokens=1, times=(), verbose=False)
    assert report["patched"] == len(sites) == len(report["sites"])
    assert set(adapter.bench(model, (4,), 2)) >= {"patched", "mlx-vlm"}


@pytest.mark.parametrize("trainable", [False, True])
def test_a_wrong_site_of_two_in_a_block(trainable, monkeypatch, launched):
    """One site of a block keeps mlx-vlm's code, the other stays patched; `check` sees both."""
    from mhc_mlx.models.families import vlm_deepseek_v41 as family

    model, right = tiny("deepseek_v41"), family.run.single_pass
    want, base = run(model, tokens(9)), model.layers[1].hc_ffn_base

    def single_pass(hc, prefix, *given):
        out, u, h_pre = right(hc, prefix, *given)
        wrong = prefix == family.FFN and mx.array_equal(hc[prefix + "base"], base).item()
        return out * 1.02 if wrong else out, u, h_pre

    monkeypatch.setattr(family.run, "single_pass", single_pass)
    with pytest.warns(UserWarning, match=r"1 of 8 .*: layers.1.hc_ffn \(median of out, float32"):
        adapter.patch(model, trainable=trainable)
    patched_ones = [site.options is not None for site in family.FAMILY.sites(model)]
    assert patched_ones == 3 * [True] + [False] + 4 * [True]
    alike(run(model, tokens(9)), want)
    report = adapter.check(model, tokens(9), tokens=1, times=(), verbose=False)
    assert [row["patched"] for row in report["sites"]] == patched_ones
    assert report["errors"]["real"]["max"] < 64
    assert all(type(block) is family.SinglePassBlock for block in model.layers)
    assert mx.array_equal(run(adapter.unpatch(model), tokens(9)), want).item()


class Rank:
    """A process group of which this process is every rank, one after the other."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_pipeline(monkeypatch, launched):
    """DeepSeek V4 in two stages, patched before and after it is split."""
    sent = []
    group = {"send": lambda a, to: sent.append(a) or a, "recv_like": lambda a, of: sent[-1]}
    for key, f in (group | {"all_gather": lambda a: a}).items():
        monkeypatch.setattr(mx.distributed, key, f)
    want = run(tiny("deepseek_v4"), tokens(9))
    stages = [tiny("deepseek_v4"), tiny("deepseek_v4")]
    for rank, stage in enumerate(stages):
        if rank == 0:
            patched(stage)
        stage.model.pipeline(Rank(rank, 2))
        if rank == 1:
            patched(stage)
    kinds = [[site.kind for site in adapter.family_of("t", s).sites(s)] for s in stages]
    assert kinds == 2 * [4 * ["pair"] + ["head"]]
    mx.eval(run(stages[1], tokens(9)))
    alike(run(stages[0], tokens(9)), want)


@families
def test_batches_of_unequal_prompts(name):
    """Left-padded, through the cache that mlx-vlm makes for a batch."""
    lengths = (5, 9)
    rows = [tokens(n, seed=n)[0] for n in lengths]
    padding = [max(lengths) - n for n in lengths]
    batch = mx.stack([mx.pad(row, [(p, 0)]) for row, p in zip(rows, padding, strict=True)])
    model, found = tiny(name), []
    for patch in (False, True):
        if patch:
            patched(model)
        caches = _make_cache(model, padding)
        out = [run(model, batch, caches)[:, -1:]]
        for _ in range(3):
            out.append(run(model, out[-1].argmax(-1), caches))
        found.append(mx.concatenate(out, axis=1))
    alike(found[1], found[0])
    assert mx.array_equal(found[0].argmax(-1), found[1].argmax(-1)).item()


# ---- drafters


def drafter(kind: str):
    folder = f"mlx_vlm.speculative.drafters.deepseek_v4_{kind}"
    config = importlib.import_module("mlx_vlm.models.deepseek_v4.config")
    sizes = SIZES | V4 | {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
    text = config.ModelConfig(**sizes)
    module = importlib.import_module(f"{folder}.deepseek_v4_{kind}")
    configs = importlib.import_module(f"{folder}.config")
    if kind == "mtp":
        return randomised(
            module.DeepseekV4MTPDraftModel(configs.DeepseekV4MTPConfig(text_config=text))
        )
    given = {"text_config": text, "n_mtp_layers": 2, "target_layer_ids": [0, 2], "markov_rank": 16}
    return randomised(module.Model(configs.DeepseekV4DsparkConfig(**given, block_size=5)))


def drafted(kind: str, model) -> mx.array:
    keys = mx.random.split(mx.random.key(0), 2)
    if kind == "mtp":
        embedded = mx.random.normal((1, 6, 64), key=keys[0])
        hidden = mx.random.normal((1, 6, 4, 64), key=keys[1])
        model._next_position = 0
        logits, h = model._forward_hidden(embedded, hidden, tokens(6), model.make_cache())
        return mx.concatenate([logits[:, :, None], h], axis=2)
    model._input_embed = nn.Embedding(96, 64)
    model._input_embed.weight = mx.random.normal((96, 64), key=keys[0])
    return model._hidden(tokens(5), mx.random.normal((1, 3, 128), key=keys[1]), model.make_cache())


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_drafters(kind, launched):
    """MTP owns a block and a read-out; a stage of DSpark calls its connections itself."""
    model = drafter(kind)
    want = drafted(kind, model)
    patched(model)
    sites = adapter.family_of("test", model).sites(model)
    assert [site.kind for site in sites] == (2 if kind == "mtp" else 4) * ["pair"] + ["head"]
    assert all(site.options is not None for site in sites)
    alike(drafted(kind, model), want)
    assert mx.array_equal(drafted(kind, adapter.unpatch(model)), want).item()


# ---- token parity


@families
def test_check_compares_tokens(name, capsys):
    """Equal models agree, and the report is printed."""
    model, prompts = tiny(name), [tokens(n)[0].tolist() for n in (1, 7)]
    report = adapter.check(model, prompts, tokens=8, times=())
    for row, length in zip(report["tokens"]["prompts"], (1, 7), strict=True):
        assert (row["length"], row["tokens"]) == (length, 8)
        assert row["top-1 agreement"] == 1.0 and row["first difference"] is None
        assert 0 <= row["mean difference"] < row["largest difference"] < 1e-3
    for speeds in report["tokens"]["tokens/s"].values():
        assert speeds["prefill"] > 0 and speeds["decode"] > 0
    assert set(report["tokens"]["peak bytes"]) == {"mlx-vlm", "patched"}
    printed = capsys.readouterr().out
    assert "prompt of 7, then 8: most likely token the same at 100.00 %" in printed
    assert "all tokens are the same" in printed and "most memory: mlx-vlm" in printed


def test_check_finds_tokens_that_differ(monkeypatch, capsys):
    from mhc_mlx.models.families import vlm_deepseek_v4 as family

    right = family.run.write_back

    def write_back(settings, options, x, y, h_post, h_res):
        return right(settings, options, x, y, h_post, h_res.swapaxes(-1, -2))

    monkeypatch.setattr(family.run, "write_back", write_back)
    report = adapter.check(tiny("deepseek_v4"), tokens(40), tokens=16, times=())
    (row,) = report["tokens"]["prompts"]
    assert row["top-1 agreement"] < 1 and row["largest difference"] > 0.1
    first = row["first difference"]
    chosen, _ = generated(tiny("deepseek_v4"), tokens(40)[0], 16)
    assert first["stock"] == chosen[first["token"]] != first["patched"]
    before = mx.concatenate([tokens(40)[0], mx.array(chosen[: first["token"]], mx.int32)])
    best = mx.sort(run(tiny("deepseek_v4"), before[None])[0, -1])[-2:]
    assert abs(first["gap of stock's two best"] - (best[1] - best[0]).item()) < 1e-4
    assert (
        f"token {first['token']} differs, where mlx-vlm's two best are" in capsys.readouterr().out
    )


# ---- gradients

BATCH = tokens(17)


def loss(model) -> mx.array:
    logits = run(model, BATCH[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, BATCH[:, 1:], reduction="mean")


def gradients(model):
    value, found = nn.value_and_grad(model, loss)(model)
    mx.eval(value, found)
    return value.item(), dict(tree_flatten(found))


def by_plain_ops(name: str):
    """mlx-vlm's own model, mended only where it chooses or rounds."""
    model = tiny(name).train()
    trained = adapter.family_of("test", model).trained
    for module in model.modules():
        module.__class__ = trained.get(type(module), type(module))
    return model


def silent(found: dict) -> set[str]:
    return {name for name, g in found.items() if mx.abs(g).max().item() < 1e-9}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "xing4_0"])
def test_the_stock_model_has_no_gradient(name):
    """As MLX words it: of choices by index, or of rounding to 8 bits. Xing's has one."""
    with pytest.raises(ValueError, match=r"VJP with respect to indices|Not implemented for"):
        gradients(tiny(name).train())


@families
def test_every_gradient(name, launched):
    """Against plain ops, of the whole model; the loss falls after a step. What only chooses learns
    nothing, in both."""
    want_value, want = gradients(by_plain_ops(name))
    model = patched(tiny(name), trainable=True).train()
    value, got = gradients(model)
    assert abs(value - want_value) < 1e-5 * want_value
    assert got.keys() == want.keys() and silent(got) == silent(want)
    for key, g in got.items():
        if key not in silent(want):
            alike(g, want[key], 3e-4)
    connections = [k for k in got if k.endswith(("fn", "base", "scale")) and "hc" in k]
    connections += [k for k in got if "hyper_connection" in k]
    assert len(connections) >= 24 and not silent(got) & set(connections)
    trained = {k: g for k, g in got.items() if mx.issubdtype(g.dtype, mx.floating)}
    optimizer = optim.SGD(1e-2)
    optimizer.update(model, tree_unflatten(list(trained.items())))
    assert loss(model).item() < value


@families
def test_results_of_a_trainable_model(name, launched):
    """They are those of the model as it was."""
    model, prompt = tiny(name), tokens(20)
    want = run(model, prompt)
    alike(run(patched(model, trainable=True), prompt), want)


def test_checkpointed_blocks_are_refused(monkeypatch):
    """mlx-vlm's trainer replaces the call of the class."""
    from mhc_mlx.models.families import vlm_deepseek_v41 as family

    model, call = patched(tiny("deepseek_v41"), trainable=True), family.SinglePassBlock.__call__
    monkeypatch.setattr(family.SinglePassBlock, "__call__", lambda *args: call(*args))
    with pytest.raises(ValueError, match="must not be under mlx-vlm's grad_checkpoint"):
        run(model, tokens(3))
