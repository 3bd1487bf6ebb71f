"""The Python around the sites of `mhc_mlx.models`: what is verified, on what, what is timed, and
what reports say. Functions that run are replaced by ones that record what they are asked."""

import inspect
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

from mlx_lm.models import deepseek_v41 as stock  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models import __main__ as command  # noqa: E402
from mhc_mlx.models import exact, run, times, verify  # noqa: E402
from mhc_mlx.models.check import activations  # noqa: E402
from mhc_mlx.models.exact import Errors, random_inputs, site_errors  # noqa: E402
from mhc_mlx.models.families import lm_deepseek_v41 as family  # noqa: E402
from mhc_mlx.models.family import Options  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import (  # noqa: E402
    exactly,
    find_sites,
    patched,
    run_ours,
    run_theirs,
    tiny,
    tokens,
    within,
)

launched = modules.launched
checking = inspect.getmodule(adapter.check)


def odd(site):
    """The site with constants that differ from each other and from the usual ones."""
    site.hc.iters, site.hc.hc_eps, site.hc.norm_eps = 3, 0.02, 0.3
    site.hc._eps = mx.array([0.02])  # mlx-lm's own copy
    if site.norm is not None:
        site.norm.eps = 0.07
    return site


# ---- constants


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_every_constant_of_a_site(dtype, launched):
    """Each at a value that shows, in each way to run a site; also in the float64 measure."""
    first, last = map(odd, find_sites(patched(tiny(layers=1))))
    first.norm.weight = first.norm.weight.astype(dtype)
    x, y = random_inputs(first, dtype, 3)
    x = x / 4  # so that norm_eps shows
    norms = {"fused": first.norm, "none": None, "a function": lambda u: mx.sin(u)}
    for name, norm in norms.items():
        for wide in (False, True):
            given = y.astype(mx.float32) * (1 + 2**-10) if wide else y
            pairs = zip(
                run_ours(first, x, given, norm), run_theirs(first, x, given, norm), strict=True
            )
            for a, b in pairs:
                assert (a is None) == (b is None) and (a is None or a.dtype == b.dtype), name
                if b is not None:
                    within(a, b, b.dtype)
    for site in (first, last):
        if dtype == mx.bfloat16:
            assert max(e.most for e in site_errors(site, site.options, x, y)) < 2
        else:
            want = exact.exact(site, *(np.array(a, np.float64) for a in (x, y)))
            made = run_theirs(site, x, y)
            for a, k in zip(made, ("out", "u", "h_pre"), strict=True):
                if a is not None:
                    within(a, mx.array(want[k].astype(np.float32)), mx.float32)
    for a, b in zip(last.hc(x), stock.HyperConnection.__call__(last.hc, x), strict=True):
        within(a, b, mx.float32)


# ---- verification


def spoiled(right, output, factor=1.02):
    """A function of sites whose output of that number is 2 % off."""

    def site(*args):
        made = list(right(*args))
        made[output] = None if made[output] is None else factor * made[output]
        return tuple(made)

    return site


@pytest.mark.parametrize("output, name", [(0, "out"), (1, "u"), (2, "h_pre")])
def test_an_error_in_any_output_is_an_error(output, name, monkeypatch):
    """Of the site as it is, and of mlx-lm's: each is told as its own. Patch keeps no such site."""
    model = tiny(layers=1, kind="4-bit")
    site = find_sites(patched(model))[0]
    x, y = random_inputs(site, mx.bfloat16, 3)
    right = [e[name] for e in site_errors(site, site.options, x, y)]
    assert max(right) < 2
    with monkeypatch.context() as context:
        context.setattr(run, "single_pass", spoiled(run.single_pass, output))
        ours, theirs = site_errors(site, site.options, x, y)
        assert ours[name] > 2.5 and theirs[name] == right[1] and ours.worst == name
        with pytest.warns(UserWarning, match=f"{1 if name == 'u' else 2} of 2 hyper-connections"):
            adapter.patch(model)
    with monkeypatch.context() as context:
        context.setattr(family, "stock_site", spoiled(family.stock_site, output))
        ours, theirs = site_errors(find_sites(patched(model))[0], site.options, x, y)
        assert theirs[name] > 2.5 and ours[name] == right[0] and theirs.worst == name


def test_errors_of_every_token(monkeypatch):
    """The last of many copies counts, too; not a number is an error."""
    site = find_sites(patched(tiny(layers=1)))[0]
    x, y = random_inputs(site, mx.float32, 2)
    mine = run.single_pass
    for value in (2.0, float("nan")):

        def wrong(hc, prefix, settings, options, x, y, norm, value=value):
            out, u, h_pre = mine(hc, prefix, settings, options, x, y, norm)
            last = mx.arange(x.shape[1])[None, :, None] == x.shape[1] - 1
            return out, mx.where(last, value, u), h_pre

        monkeypatch.setattr(run, "single_pass", wrong)
        ours, theirs = site_errors(site, site.options, x, y, 5)
        assert ours.most > 1e4 and theirs.most < 16


def test_what_is_too_large():
    for ours, limit, fails in (
        *((2.0, 2.0, False), (2.1, 2.0, True), (float("nan"), 1.0, True)),
        (float("inf"), float("inf"), False),
    ):
        assert verify.too_large(ours, limit) == fails, (ours, limit)


def fed(monkeypatch, at, ours, theirs):
    """Errors of 0.5 units everywhere, but those given for (dtype, tokens, output)."""
    asked = []

    def errors(site, options, x, y, repeats=1):
        count = x.shape[1] * repeats
        asked.append((site.name, x, y, count))
        made = {k: (np.full(count, 0.5), np.full(count, 0.5)) for k in ("out", "u", "h_pre")}
        if at and (x.dtype, count) == at[:2]:
            made[at[2]] = tuple(np.resize(np.array(e, float), count) for e in (ours, theirs))
        return tuple({k: pair[i] for k, pair in made.items()} for i in (0, 1))

    monkeypatch.setattr(verify, "site_token_errors", errors)
    largest = lambda *a: [exact.Errors((k, e.max()) for k, e in d.items()) for d in errors(*a)]  # noqa: E731
    monkeypatch.setattr(verify, "site_errors", largest)
    return asked


@pytest.mark.parametrize("count", [1, 8, 512])
@pytest.mark.parametrize("output", ["out", "u", "h_pre"])
def test_the_rule(output, count, monkeypatch):
    """Each number that `patch` promises: in float32 twice the stock's median or 4 units, 16 times
    these at most; in bfloat16 the stock's largest or 2 units. (Deviation 24: test_verify.py.)"""
    site, options = find_sites(tiny(layers=1))[0], Options(True, False)
    f32, bf16 = ((dtype, count, output) for dtype in (mx.float32, mx.bfloat16))
    for at, ours, theirs, limit in (
        *((f32, 4.0, 1.0, None), (f32, 4.1, 1.0, 4.0), (f32, 5.9, 3.0, None)),
        *((f32, 6.1, 3.0, 6.0), (f32, float("inf"), 1.0, 4.0)),
        *((bf16, 2.0, 1.0, None), (bf16, 2.1, 1.0, 2.0)),
        *((bf16, 3.0, 3.0, None), (bf16, 3.1, 3.0, 3.0)),
    ):
        fed(monkeypatch, at, ours, theirs)
        found = verify.failure(site, options, mx.bfloat16, 0)
        assert (found and found.limit) == limit, (at, ours, theirs)
        if found:
            assert output in found.what and f"{count} tokens" in found.what
            assert str(found).startswith("model.layers.0.attn_hc (")
    if count > 1:  # one token in eight is far off: the median does not see it
        fed(monkeypatch, f32, [65.0, *7 * [1.0]], 1.0)
        assert verify.failure(site, options, mx.bfloat16, 0).limit == 64.0
        fed(monkeypatch, f32, [63.0, *7 * [1.0]], 1.0)
        assert verify.failure(site, options, mx.bfloat16, 0) is None


def test_verification_is_of_the_model(monkeypatch):
    """Each site, in float32 and in the model's dtype, on 1, 8 and 512 tokens, others for each."""
    for kind, dtypes in (("float32", {mx.float32}), ("4-bit", {mx.float32, mx.bfloat16})):
        model = tiny(layers=2, kind=kind)
        asked = fed(monkeypatch, None, 0, 0)
        adapter.patch(model)
        for dtype in dtypes:
            for site in find_sites(model):
                of = [(x, n) for name, x, y, n in asked if name == site.name and x.dtype == dtype]
                assert {n for _, n in of} == {1, 8, 512} and all(x.dtype == dtype for x, _ in of)
        assert {x.dtype for _, x, _, _ in asked} == dtypes
        drawn = [x for name, x, _, n in asked if n == 1 and x.dtype == mx.float32]
        assert len(drawn) == 2 * 16 * 4
        for k, x in enumerate(drawn):
            assert not any(mx.array_equal(other, x).item() for other in drawn[:k])


def test_logits_of_the_deviation_that_shows():
    """6, in float32, by parts, whatever the sign; a part whose fn is zero keeps its scale."""
    (site, *_), keys = find_sites(tiny(layers=1)), mx.random.split(mx.random.key(0), 2)
    site.hc.scale = mx.array([0.01, -3.0, 100.0])
    x = mx.random.normal((4000, 256), key=keys[0])
    spread = exact.spread(site, 6.0)
    z = (x @ spread.hc.fn.T) * mx.repeat(spread.hc.scale, 1)[mx.array([0] * 4 + [1] * 4 + [2] * 16)]
    for part in (z[:, :4], z[:, 4:8], z[:, 8:]):
        assert abs(mx.sqrt(mx.mean(part * part)).item() - 6) < 0.2
    assert spread.hc.scale[1].item() < 0 < spread.hc.scale[2].item()
    assert site.hc.scale[2].item() == 100 and spread.norm.weight.dtype == mx.float32
    site.hc.fn = site.hc.fn * mx.array([1.0] * 8 + [0.0] * 16)[:, None]
    assert exact.spread(site, 6.0).hc.scale[2].item() == 100


def test_more_tokens_decide(monkeypatch):
    """64 others, where 16 failed: those with the next seeds."""
    site, options, asked = find_sites(tiny(layers=1))[0], Options(True, False), []

    def errors(site, options, x, y, repeats=1):
        asked.append((x.shape[1], repeats))
        few = len(asked) <= 16
        ours = {"u": np.full(x.shape[1], 5.0 if few or right is False else 1.0)}
        return ours, {"u": np.ones(x.shape[1])}

    monkeypatch.setattr(verify, "site_token_errors", errors)
    for right in (True, False):
        asked.clear()
        found = verify.failure(site, options, mx.float32, 0)
        assert asked[:80] == 80 * [(1, 1)] and (found is None) == right
        larger = [*16 * [(1, 1)], (8, 1), (8, 1), (16, 32)]  # at logits of deviation 24
        assert asked[80:] == ([(8, 1), (8, 1), (16, 32), *larger] if right else [])


# ---- the command


def test_what_the_command_asks_for(monkeypatch, tmp_path):
    """Verification unless it is switched off; each number of tokens where it belongs."""
    asked = {}
    for name in ("patch", "check", "bench"):
        record = lambda *args, name=name, **kw: asked.setdefault(name, (args[1:], kw))  # noqa: E731
        monkeypatch.setattr(command, name, record)
    monkeypatch.setattr(mlx_lm, "load", lambda path: ("the model", "the tokenizer"))
    for options, verifies, numbers in (
        ("", True, ((1, 512), (512, 2048))),
        ("--rounding once", True, ((1, 512), (512, 2048))),
        ("--no-verify", False, ((1, 512), (512, 2048))),
        ("--tokens 3,5", True, ((3, 5), (3, 5))),
        ("--check", True, ((1, 512), None)),
        ("--bench --tokens 7", True, (None, (7,))),
    ):
        asked.clear()
        command.main(["--model", "here", *options.split()])
        rounding = "once" if "once" in options else "stock"
        assert asked["patch"] == ((), {"verify": verifies, "rounding": rounding}), options
        given = asked.get("check", ((None,), {"times": None}))
        assert given == ((None,), {"times": numbers[0]}), options
        assert asked.get("bench", ((None,), {})) == ((numbers[1],), {}), options


def test_prompts_of_the_command(monkeypatch):
    """Texts by the tokenizer, of mlx-lm or in mlx-vlm's processor; random ones of the lengths."""
    model, given = tiny(layers=1), []
    monkeypatch.setattr(command, "patch", lambda *args, **kw: None)
    monkeypatch.setattr(command, "check", lambda model, prompts, times: given.append(prompts))

    class Tokenizer:
        def encode(self, text):
            return [np.int64(ord(c)) for c in text]

    class Processor:
        tokenizer = Tokenizer()

    for tokenizer in (Tokenizer(), Processor()):
        monkeypatch.setattr(mlx_lm, "load", lambda path, found=tokenizer: (model, found))
        command.main("--model here --check --prompt ab --prompt c --prompts 3,5".split())
        *texts, short, long = given.pop()
        assert texts == [[97, 98], [99]] and (short.shape, long.shape) == ((3,), (5,))
        assert mx.max(mx.concatenate([short, long])).item() < 96
    command.main("--model here --check".split())
    assert given == [None]


# ---- check


def test_check_is_of_the_models_activations(monkeypatch, capsys):
    """Errors on the activations of the tokens that are given, and on random ones; whose is whose;
    in the model's dtype."""
    for kind, dtype in (("float32", mx.float32), ("4-bit", mx.bfloat16)):
        model, prompt = patched(tiny(layers=2, kind=kind)), tokens(12, 2)
        sites, asked, timed = find_sites(model), [], []

        def record(site, options, x, y, asked=asked):
            assert options == site.options is not None
            asked.append((site.name, x, y))
            return Errors(u=float(len(asked))), Errors(out=100.0 + len(asked))

        monkeypatch.setattr(checking, "site_errors", record)
        monkeypatch.setattr(checking, "site_times", lambda *a, to=timed: to.append(a))
        report = adapter.check(model, prompt, 1, times=(3, 1), verbose=False)
        real = activations(family.FAMILY, model, sites, prompt[:1])
        for k, (site, row) in enumerate(zip(sites, report["sites"], strict=True)):
            (_, *drawn), (_, *own) = asked[2 * k : 2 * k + 2]
            for got, want in ((drawn, random_inputs(site, dtype, 4, k)), (own, real[k])):
                for a, b in zip(got, want, strict=True):
                    exactly(a, b)
            assert (row["site"], row["patched"]) == (site.name, True)
            assert (row["random"], row["random, mlx-lm"]) == (2 * k + 1, 101 + 2 * k)
            assert (row["real"], row["real, mlx-lm"]) == (2 * k + 2, 102 + 2 * k)
        errors = report["errors"]["real, mlx-lm"]
        assert errors == {"max": 108.0, "median": 105.0, "worst": "model.layers.1.ffn_hc"}
        assert report["dtype"] == str(dtype).split(".")[-1] and report["patched"] == 4
        assert [(len(s), d, count) for s, d, count in timed] == [(4, dtype, 3), (4, dtype, 1)]
        asked.clear()
        adapter.check(model, prompt[1], 1, times=(), verbose=False)  # [length]
        exactly(asked[1][1], activations(family.FAMILY, model, sites, prompt[1:])[0][0])
        assert not mx.array_equal(asked[1][1], real[0][0]).item()
    assert capsys.readouterr().out == ""


def test_activations_are_the_last_tokens_of_the_first_row():
    model, prompt = patched(tiny(layers=1)), tokens(12, 2)
    (x, y), _ = activations(family.FAMILY, model, find_sites(model), prompt, keep=3)
    exactly(x, mx.repeat(model.model.embed_tokens(prompt)[:1, -3:, None], 4, 2))
    assert y.shape == (1, 3, 64)


# ---- times


def test_bench_times_the_patched_model_and_mlx_lms(monkeypatch, capsys):
    model, runs = patched(tiny(layers=2)), []

    def record(of, given, lengths, steps):
        assert of is family.FAMILY
        kinds = {type(layer) for layer in given.layers}
        kinds |= {type(site.hc) for site in find_sites(given)}
        runs.append((kinds, lengths, steps))
        speed = 30.0 if len(runs) == 1 else 10.0
        return {"prefill": {"7": speed}, "decode": speed + 5}

    monkeypatch.setattr(times, "_model_times", record)
    report = adapter.bench(model, (7,), 9)
    ours = {family.SinglePassLayer, family.SinglePassConnection}
    assert runs == [(ours, (7,), 9), ({stock.DecoderLayer, stock.HyperConnection}, (7,), 9)]
    assert {type(layer) for layer in model.layers} == {family.SinglePassLayer}
    assert report["patched"] == {"prefill": {"7": 30.0}, "decode": 35.0}
    assert report["mlx-lm"] == {"prefill": {"7": 10.0}, "decode": 15.0}
    printed = capsys.readouterr().out
    assert "prefill 7: 30 tokens/s, mlx-lm 10 (3.00 x)" in printed
    assert "decode: 35.0 tokens/s, mlx-lm 15.0 (2.33 x)" in printed


def test_chains_run_what_they_are_called(monkeypatch):
    """The same numbers by three ways, with constants that show; and each by its own."""
    sites, calls = [odd(site) for site in times.random_sites(32, 3, family.FAMILY)], []
    for module, name in ((run, "single_pass"), (family, "stock_site")):
        right = getattr(module, name)
        record = lambda *a, name=name, right=right: calls.append(name) or right(*a)  # noqa: E731
        monkeypatch.setattr(module, name, record)
    for site in sites:
        site.norm.weight = site.norm.weight.astype(mx.float32)
    chains, made = times._chains(sites, mx.float32, 5), {}
    for name, expected in (
        ("patched", ["single_pass"] * 3),
        ("mlx-lm", ["stock_site"] * 3),
        ("mlx-lm, compiled", ["stock_site"]),  # one trace
    ):
        calls.clear()
        made[name] = chains[name]()
        assert calls == expected, name
    assert list(made) == list(chains)
    for name in made:
        for a, b in zip(made[name], made["mlx-lm"], strict=True):
            assert a.shape[1] == 5
            within(a, b, mx.float32)


def test_bench_of_sites_reports_whose_errors_they_are(monkeypatch, capsys):
    errors, seen = iter([(1.0, 5.0), (2.0, 1.0), (1.5, 8.0), (4.0, 9.0), (1.0, 1.0)]), []
    counts = []

    def site_errors(site, options, x, y, repeats=1):
        assert options == Options(True, False)
        seen.append(x)
        counts.append(x.shape[1] * repeats)
        return [Errors(u=e, out=e / 2) for e in next(errors)]

    monkeypatch.setattr(times, "SITES", 3)
    monkeypatch.setattr(times, "site_errors", site_errors)
    monkeypatch.setattr(times, "_seconds", lambda run: 1e-3)
    monkeypatch.setattr(times, "_peak", lambda run: run(1)[0].shape[1] << 20)
    report = adapter.bench_sites(32, (2, 6), mx.float16)
    assert report["errors"] == {"patched": 4.0, "mlx-lm": 9.0}
    assert (report["d"], report["dtype"], report["sites"]) == (32, "float16", 3)
    assert set(report["peak bytes"].values()) == {6, 6 << 20}  # of the most tokens
    assert list(report["graph"]) == list(report["Metal's form"]) == ["2", "6"]
    assert counts == [4, 4, 4, 2, 6] and all(x.dtype == mx.float16 for x in seen)
    assert not mx.array_equal(seen[0], seen[1]).item()
    assert "d = 32, float16" in capsys.readouterr().out


# ---- arguments


def test_every_argument_of_every_function():
    """Wrong once in each way; the model stays as it was."""
    model, own = patched(tiny(layers=1)), tiny(layers=1)
    bools = (1, 0, None, "False", np.True_)
    counts = (3, None, "512", (0,), (-1,), (2.0,), (True,), (None,), (np.int64(3),))
    wrong = {"trainable": bools, "verify": bools, "use_metal": bools, "verbose": bools}
    wrong |= {"times": counts, "lengths": (*counts, ()), "steps": (0, 2.0, True, None, "8")}
    wrong |= {"d": (0, 32.0, True, None, "32"), "dtype": (mx.int32, None, "float32", float)}
    prompts = ([1], [], [[]], [[96]], [[1.0]], "a", mx.zeros(2), mx.zeros((1, 1, 1), mx.int32))
    for f, right, arguments, more in (
        (adapter.patch, {"model": own}, "trainable verify use_metal", {"model": (None, nn.Linear)}),
        (adapter.unpatch, {}, "", {"model": (None, 3, nn.Linear(2, 2))}),
        (
            adapter.check,
            {"model": own},
            "times verbose",
            {"prompts": prompts, "tokens": (0, 2.0, True, None)},
        ),
        (adapter.bench, {"model": model}, "lengths steps", {"model": (None, own)}),
        (
            adapter.bench_sites,
            {"d": 32},
            "d dtype",
            {"tokens": (*counts, ()), "family": ("v9", None)},
        ),
    ):
        kinds = [type(module) for module in [*model.modules(), *own.modules()]]
        for argument, values in ({k: wrong[k] for k in arguments.split()} | more).items():
            for bad in values:
                with pytest.raises((TypeError, ValueError)) as error:
                    f(**right | {argument: bad})
                said = str(error.value)
                ours = rf"\[{f.__name__}\] {argument}(\.\w+)? must .* but "
                assert re.match(ours, said), f"{argument} = {bad!r}: {said}"
        assert kinds == [type(module) for module in [*model.modules(), *own.modules()]]
