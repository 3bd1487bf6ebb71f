"""The Python around the sites of `mhc_mlx.mlx_lm`: what is verified, on what, what is timed, and
what reports say. Functions that run are replaced by ones that record what they are asked."""

import inspect
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

from mlx_lm.models import deepseek_v41 as stock  # noqa: E402

import mhc_mlx as m  # noqa: E402
from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.mlx_lm import SinglePassConnection, exact, times  # noqa: E402
from mhc_mlx.mlx_lm import __main__ as command  # noqa: E402
from mhc_mlx.mlx_lm.exact import random_inputs, site_errors  # noqa: E402
from mhc_mlx.mlx_lm.sites import activations, find_sites, stock_coefficients, stock_site  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import exactly, patched, tiny, tokens, within  # noqa: E402

launched = modules.launched
patching = inspect.getmodule(adapter.patch)
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
    first, last = map(odd, find_sites(patched(tiny(layers=1)).model))
    first.norm.weight = first.norm.weight.astype(dtype)
    x, y = random_inputs(first, dtype, 3)
    x = x / 4  # so that norm_eps shows
    norms = {"fused": first.norm, "none": None, "a function": lambda u: mx.sin(u)}
    for name, norm in norms.items():
        for wide in (False, True):
            given = y.astype(mx.float32) * (1 + 2**-10) if wide else y
            ours = first.hc.site(x, given, norm)
            theirs = stock_site(stock_coefficients(first.hc), x, given, norm)
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None) and (a is None or a.dtype == b.dtype), name
                if b is not None:
                    within(a, b, b.dtype)
    for site in (first, last):
        if dtype == mx.bfloat16:
            assert max(site_errors(site, x, y)) < 2
        else:
            want = exact._exact(site, *(np.array(a, np.float64) for a in (x, y)))
            made = stock_site(stock_coefficients(site.hc), x, y, site.norm)
            for a, k in zip(made, ("out", "u", "h_pre"), strict=True):
                if a is not None:
                    within(a, mx.array(want[k].astype(np.float32)), mx.float32)
    for a, b in zip(last.hc(x), stock_coefficients(last.hc)(x), strict=True):
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
    site = find_sites(patched(model).model)[0]
    x, y = random_inputs(site, mx.bfloat16, 3)
    right, mine = site_errors(site, x, y), SinglePassConnection.site
    assert max(right) < 2
    with monkeypatch.context() as context:
        context.setattr(SinglePassConnection, "site", spoiled(mine, output))
        ours, theirs = site_errors(site, x, y)
        assert ours > 2.5 and theirs == right[1], name
        with pytest.warns(UserWarning, match=f"{1 if name == 'u' else 2} of 2 hyper-connections"):
            adapter.patch(model)
    with monkeypatch.context() as context:
        context.setattr(exact, "stock_site", spoiled(stock_site, output))
        ours, theirs = site_errors(find_sites(patched(model).model)[0], x, y)
        assert theirs > 2.5 and ours == right[0], name


def test_errors_of_every_token(monkeypatch):
    """The last of many copies counts, too; not a number is an error."""
    site = find_sites(patched(tiny(layers=1)).model)[0]
    x, y = random_inputs(site, mx.float32, 2)
    mine = SinglePassConnection.site
    for value in (2.0, float("nan")):

        def wrong(self, x, y, norm, value=value):
            out, u, h_pre = mine(self, x, y, norm)
            last = mx.arange(x.shape[1])[None, :, None] == x.shape[1] - 1
            return out, mx.where(last, value, u), h_pre

        monkeypatch.setattr(SinglePassConnection, "site", wrong)
        ours, theirs = site_errors(site, x, y, 5)
        assert ours > 1e4 and theirs < 16


def test_what_fails():
    for ours, theirs, fails in (
        *((2.0, 0.1, False), (2.1, 0.1, True), (3.0, 3.5, False), (3.6, 3.5, True)),
        *((float("nan"), 1.0, True), (float("inf"), float("inf"), False)),
    ):
        assert patching._fails(ours, theirs) == fails, (ours, theirs)


def test_verification_is_of_the_model(monkeypatch):
    """Each site on random tokens of the model's own dtype, others for each; one of each kind of
    norm on 1 and on 512 tokens too."""
    for kind, dtype in (("float32", mx.float32), ("4-bit", mx.bfloat16)):
        model, asked = tiny(layers=2, kind=kind), []

        def record(site, x, y, repeats=1, asked=asked):
            asked.append((site.name, x, y, repeats))
            return 0.0, 0.0

        monkeypatch.setattr(patching, "site_errors", record)
        adapter.patch(model)
        sites = [site.name for site in find_sites(model.model)]
        alone = [call for call in asked if call[1].shape[1] == 4 and call[3] == 1]
        assert [name for name, *_ in alone] == sites
        for k, (_, x, y, _) in enumerate(alone):
            assert x.dtype == y.dtype == dtype
            for other in alone[:k]:
                assert not mx.array_equal(other[1], x).item()
        counts = [(name, x.shape[1] * repeats) for name, x, _, repeats in asked]
        for site in (sites[0], sites[-1]):
            assert {1, 4, 512} == {count for name, count in counts if name == site}
        assert len(asked) == len(sites) + 4


# ---- the command


def test_what_the_command_asks_for(monkeypatch, tmp_path):
    """Verification unless it is switched off; each number of tokens where it belongs."""
    asked = {}
    for name in ("patch", "check", "bench"):
        record = lambda *args, name=name, **kw: asked.setdefault(name, (args[1:], kw))  # noqa: E731
        monkeypatch.setattr(command, name, record)
    monkeypatch.setattr(command.mlx_lm, "load", lambda path: ("the model", "the tokenizer"))
    for options, verify, numbers in (
        ("", True, ((1, 512), (512, 2048))),
        ("--no-verify", False, ((1, 512), (512, 2048))),
        ("--tokens 3,5", True, ((3, 5), (3, 5))),
        ("--check", True, ((1, 512), None)),
        ("--bench --tokens 7", True, (None, (7,))),
    ):
        asked.clear()
        command.main(["--model", "here", *options.split()])
        assert asked["patch"] == ((), {"verify": verify}), options
        assert asked.get("check", ((), {"times": None})) == ((), {"times": numbers[0]}), options
        assert asked.get("bench", ((None,), {})) == ((numbers[1],), {}), options


# ---- check


def test_check_is_of_the_models_activations(monkeypatch, capsys):
    """Errors on the activations of the tokens that are given, and on random ones; whose is whose;
    in the model's dtype."""
    for kind, dtype in (("float32", mx.float32), ("4-bit", mx.bfloat16)):
        model, prompt = patched(tiny(layers=2, kind=kind)), tokens(12, 2)
        sites, asked, timed = find_sites(model.model), [], []

        def record(site, x, y, asked=asked):
            asked.append((site.name, x, y))
            return float(len(asked)), 100.0 + len(asked)

        monkeypatch.setattr(checking, "site_errors", record)
        monkeypatch.setattr(checking, "site_times", lambda *a, to=timed: to.append(a))
        report = adapter.check(model, prompt, times=(3, 1), verbose=False)
        real = activations(model, sites, prompt)
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
        adapter.check(model, prompt[1], times=(), verbose=False)  # [length]
        exactly(asked[1][1], activations(model, sites, prompt[1:])[0][0])
        assert not mx.array_equal(asked[1][1], real[0][0]).item()
    assert capsys.readouterr().out == ""


def test_activations_are_the_last_tokens_of_the_first_row():
    model, prompt = patched(tiny(layers=1)), tokens(12, 2)
    (x, y), _ = activations(model, find_sites(model.model), prompt, keep=3)
    exactly(x, mx.repeat(model.model.embed_tokens(prompt)[:1, -3:, None], 4, 2))
    assert y.shape == (1, 3, 64)


# ---- times


def test_bench_times_the_patched_model_and_mlx_lms(monkeypatch, capsys):
    model, runs = patched(tiny(layers=2)), []

    def record(given, lengths, steps):
        kinds = {type(layer) for layer in given.layers}
        kinds |= {type(site.hc) for site in find_sites(given.model)}
        runs.append((kinds, lengths, steps))
        speed = 30.0 if len(runs) == 1 else 10.0
        return {"prefill": {"7": speed}, "decode": speed + 5}

    monkeypatch.setattr(times, "_model_times", record)
    report = adapter.bench(model, (7,), 9)
    ours = {adapter.SinglePassLayer, SinglePassConnection}
    assert runs == [(ours, (7,), 9), ({stock.DecoderLayer, stock.HyperConnection}, (7,), 9)]
    assert {type(layer) for layer in model.layers} == {adapter.SinglePassLayer}
    assert report["patched"] == {"prefill": {"7": 30.0}, "decode": 35.0}
    assert report["mlx-lm"] == {"prefill": {"7": 10.0}, "decode": 15.0}
    printed = capsys.readouterr().out
    assert "prefill 7: 30 tokens/s, mlx-lm 10 (3.00 x)" in printed
    assert "decode: 35.0 tokens/s, mlx-lm 15.0 (2.33 x)" in printed


def test_chains_run_what_they_are_called(monkeypatch):
    """The same numbers by three ways, with constants that show; and each by its own."""
    sites, calls = [odd(site) for site in times.random_sites(32, 3)], []
    for name in ("run_site", "stock_site"):
        right = getattr(times, name)
        record = lambda *a, name=name, right=right: calls.append(name) or right(*a)  # noqa: E731
        monkeypatch.setattr(times, name, record)
    for site in sites:
        site.norm.weight = site.norm.weight.astype(mx.float32)
    chains, made = times._chains(sites, mx.float32, 5), {}
    for name, expected in (
        ("patched", ["run_site"] * 3),
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

    def site_errors(site, x, y, repeats=1):
        seen.append(x)
        counts.append(x.shape[1] * repeats)
        return next(errors)

    monkeypatch.setattr(times, "SITES", 3)
    monkeypatch.setattr(times, "site_errors", site_errors)
    monkeypatch.setattr(times, "_seconds", lambda run: 1e-3)
    monkeypatch.setattr(times, "_peak", lambda run: run(1)[0].shape[1] << 20)
    report = adapter.bench_sites(32, (2, 6), mx.float16)
    assert report["errors"] == {"patched": 4.0, "mlx-lm": 9.0}
    assert (report["d"], report["dtype"], report["sites"]) == (32, "float16", 3)
    assert set(report["peak bytes"].values()) == {6, 6 << 20}  # of the most tokens
    assert list(report["graph"]) == ["1", "6"]
    assert counts == [4, 4, 4, 2, 6] and all(x.dtype == mx.float16 for x in seen)
    assert not mx.array_equal(seen[0], seen[1]).item()
    assert "d = 32, float16" in capsys.readouterr().out


# ---- arguments


def test_every_argument_of_every_function():
    """Wrong once in each way; the model stays as it was."""
    model, own = patched(tiny(layers=1)), tiny(layers=1)
    bools = (1, 0, None, "False", np.True_)
    counts = (3, None, "512", (0,), (-1,), (2.0,), (True,), (None,), (np.int64(3),))
    v4 = m.HyperConnection(8, 4, convention=m.DEEPSEEK_V4)
    other = m.Convention("V4", "softmax", eps=1e-6, transposed=True, pre_eps=1e-6, post_eps=0.1)
    weights = {"c_fn": mx.zeros((24, 32)), "c_base": mx.zeros(24), "c_scale": mx.zeros(3)}
    loaded = {"module": v4, "weights": weights, "prefix": "c"}
    wrong = {"trainable": bools, "verify": bools, "use_metal": bools, "verbose": bools}
    wrong |= {"times": counts, "lengths": (*counts, ()), "steps": (0, 2.0, True, None, "8")}
    wrong |= {"d": (0, 32.0, True, None, "32"), "dtype": (mx.int32, None, "float32", float)}
    wrong |= {"module": (None, nn.Linear(2, 2), m.HyperConnection(8, 4, convention=other))}
    wrong |= {"weights": (None, [], {}, {"c_fn": 3}), "prefix": (None, 3, "d")}
    prompts = ([1], mx.zeros(2), mx.zeros((1, 1, 1), mx.int32))
    for f, right, arguments, more in (
        (adapter.patch, {"model": own}, "trainable verify use_metal", {"model": (None, nn.Linear)}),
        (adapter.unpatch, {}, "", {"model": (None, 3, nn.Linear(2, 2))}),
        (adapter.check, {"model": own}, "times verbose", {"tokens": prompts}),
        (adapter.bench, {"model": model}, "lengths steps", {"model": (None, own)}),
        (adapter.bench_sites, {"d": 32}, "d dtype", {"tokens": (*counts, ())}),
        (adapter.load_v4, loaded, "module weights prefix", {}),
    ):
        kinds = [type(module) for module in [*model.modules(), *own.modules()]]
        for argument, values in ({k: wrong[k] for k in arguments.split()} | more).items():
            for bad in values:
                with pytest.raises((TypeError, ValueError)) as error:
                    f(**right | {argument: bad})
                said = str(error.value)
                named = "weights|c_fn" if argument in ("weights", "prefix") else argument
                ours = rf"\[{f.__name__}\] ({argument}|{named})(\.\w+)? must .* but "
                assert re.match(ours, said), f"{argument} = {bad!r}: {said}"
        assert kinds == [type(module) for module in [*model.modules(), *own.modules()]]


def test_options_of_a_site_that_are_set_later():
    site = find_sites(patched(tiny(layers=1)).model)[0]
    x, y = random_inputs(site, mx.float32, 2)
    for name in ("use_metal", "differentiable"):
        for bad in (1, None, "False"):
            right = getattr(site.hc, name)
            setattr(site.hc, name, bad)
            for run in (lambda: site.hc.site(x, y, site.norm), lambda: site.hc(x)):
                with pytest.raises(TypeError, match=rf"\] {name} must be a bool but got"):
                    run()
            setattr(site.hc, name, right)
