"""`mhc_mlx.models` on mlx-lm's family: float64, verification, check, the command, and errors."""

import importlib.metadata
import json
import re
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from proof import oracle

from mhc_mlx import ops

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

from mlx_lm.models import deepseek_v41 as stock  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models import exact, families, run, times  # noqa: E402
from mhc_mlx.models.__main__ import main  # noqa: E402
from mhc_mlx.models.exact import random_inputs  # noqa: E402
from mhc_mlx.models.families import lm_deepseek_v41 as family  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import find_sites, tiny, tokens, within  # noqa: E402

launched = modules.launched


# ---- verification and check


def test_float64():
    """The measure is the oracle's, of another hand."""
    site = find_sites(tiny())[2]
    x, y = (np.array(a, np.float64) for a in random_inputs(site, mx.float32, 5))
    arrays = (np.array(a, np.float64) for a in (site.hc.fn, site.hc.base, site.hc.scale))
    c = site.settings.convention
    (h_pre, h_post, h_res), _ = oracle.mhc_coefficients(x, *arrays, c, site.hc.norm_eps)
    out, _ = oracle.stream_mix_add(x, y, h_post, h_res)
    weight = np.array(site.norm.weight, np.float64)
    u, _ = oracle.stream_aggregate_norm(out, h_pre, weight, site.norm.eps)
    found = exact.exact(site, x, y)
    for name, want in {"out": out, "h_pre": h_pre, "u": u}.items():
        np.testing.assert_allclose(found[name], want, rtol=1e-11, atol=1e-13)


def test_units_in_the_last_place():
    want = np.array([[1.0, 3.0], [0.5, -0.25]])
    got = mx.array([[1.0, 3.0 + 2**-6], [0.5 + 2**-9, -0.25]])
    assert exact.token_errors(got[None], want[None], mx.bfloat16).tolist() == [1.0, 0.5]
    assert exact.token_errors(got[None] * np.nan, want[None], mx.bfloat16).tolist() == 2 * [np.inf]


@pytest.mark.parametrize("hidden", [64, 256])
def test_verified(hidden, launched):
    """All sites of a right implementation are kept in bfloat16, without a warning, and the random
    state is left alone."""
    model = tiny(hidden, kind="4-bit")
    state = [a.tolist() for a in mx.random.state]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.patch(model)
    assert all(isinstance(s.hc, family.SinglePassConnection) for s in find_sites(model))
    assert state == [a.tolist() for a in mx.random.state]


def planted(monkeypatch, wrong):
    """Sites whose streams are 2 % off where wrong(x, fn)."""
    right = run.single_pass

    def single_pass(hc, prefix, settings, options, x, y, norm):
        out, *others = right(hc, prefix, settings, options, x, y, norm)
        return (out * 1.02 if wrong(x, hc) else out, *others)

    monkeypatch.setattr(run, "single_pass", single_pass)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_wrong_site_stays_as_it_was(trainable, monkeypatch, launched):
    model, prompt = tiny(kind="4-bit"), tokens(9)
    want, base = model(prompt), model.layers[2].attn_hc.base
    planted(monkeypatch, lambda x, hc: mx.array_equal(hc.base, base).item())
    where = "median of out, float32, logits of deviation 6, 1 tokens"
    numbers = rf"\({where}: \S+ units, mlx-lm \S+, limit \S+\)"
    message = rf"1 of 8 .* keep mlx-lm's code.*: model.layers.2.attn_hc {numbers}\.$"
    with pytest.warns(UserWarning, match=message) as warned:
        adapter.patch(model, trainable=trainable)
    assert [w.filename for w in warned] == [__file__], "the warning is not at the caller's line"
    kinds = [type(site.hc) for site in find_sites(model)]
    own = family.DifferentiableHyperConnection if trainable else stock.HyperConnection
    assert kinds.count(family.SinglePassConnection) == 7 and kinds[4] is own
    within(model(prompt), want, mx.bfloat16)
    report = adapter.check(model, times=(), verbose=False)
    assert report["patched"] == 7 and not report["sites"][4]["patched"]
    assert report["errors"]["random"]["max"] < 4
    adapter.patch(model, verify=False)  # and the same mistake is found by check
    report = adapter.check(model, times=(), verbose=False)
    assert report["errors"]["real"]["worst"] == "model.layers.2.attn_hc"
    assert report["errors"]["real"]["max"] > 4 > report["errors"]["real, mlx-lm"]["max"]


@pytest.mark.parametrize("count, last", [(1, False), (512, False), (512, True)])
def test_wrong_at_some_number_of_tokens(count, last, monkeypatch, launched):
    """In all sites, or in the last alone: each decides for itself."""
    model = tiny(kind="4-bit")
    base, failing = model.layers[-1].ffn_hc.base, 1 if last else 8

    def wrong(x, hc):
        return x.shape[1] == count and (not last or mx.array_equal(hc.base, base).item())

    planted(monkeypatch, wrong)
    with pytest.warns(UserWarning, match=f"{failing} of 8 hyper-connections keep mlx-lm's"):
        adapter.patch(model)
    kinds = [type(site.hc) for site in find_sites(model)]
    assert kinds[8 - failing :] == failing * [stock.HyperConnection]
    assert stock.HyperConnection not in kinds[: 8 - failing]


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
    report = adapter.check(model, tokens(20)[0], tokens=4)
    assert type(model.layers[0]) is stock.DecoderLayer and run._seen.get() is None
    assert json.loads(json.dumps(report)) == report
    sites = [row["site"] for row in report["sites"]]
    assert sites[:2] == ["model.layers.0.attn_hc", "model.layers.0.ffn_hc"]
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
    assert written["command"] == "python -m mhc_mlx.models " + " ".join(given)
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
    assert isinstance(model.layers[0], family.SinglePassLayer)


def test_command_on_sites(capsys, monkeypatch, launched):
    assert times.SITES == 2 * 61
    monkeypatch.setattr(times, "SITES", 12)
    report = main(["--sites", "64,32", "--tokens", "1,16"])
    for row, d in zip(report["per sublayer"], (64, 32), strict=True):
        assert (row["d"], row["n"], row["sites"]) == (d, 4, 12)
        assert [t["tokens"] for t in row["times"]] == [1, 16]
        assert row["errors"]["patched"] <= max(2, row["errors"]["mlx-lm"])
        graph = row["graph"]["1"]
        assert graph["mlx-lm"]["primitives"] > graph["mlx-lm, compiled"]["primitives"] > 1
        assert row["peak bytes"]["mlx-lm"] > 0
    assert "dispatches per sublayer" in capsys.readouterr().out


# ---- errors


def another_layer():
    model = tiny(layers=2)
    model.layers[1].attn_hc = nn.Linear(2, 2)
    return adapter.patch(model)


def check(given):
    return adapter.check(tiny(), given)


def zero_eps():
    model = tiny(layers=2)
    model.layers[1].ffn_hc.norm_eps = 0.0
    return adapter.patch(model)


LINEAR, EMPTY, UNKNOWN = nn.Linear(2, 2), mx.zeros((1, 0), mx.int32), mx.array([999, 3])


def check_version(found):
    families._check_version("patch", families.ROWS[0], found)


V41 = r"deepseek_v41 of mlx-lm >=0.32.2,<0.33"
FAMILIES = (
    rf"model must be one of these: {V41}; .*deepseek_v4, glm5_next of mlx-vlm >=0.7.10,<0.8.*"
)
BAD = [
    (lambda: adapter.patch(LINEAR), ValueError, rf"\[patch\] {FAMILIES}; but got .*Linear"),
    (
        lambda: adapter.unpatch(None),
        TypeError,
        r"\[unpatch\] model must be an nn.Module but got buil",
    ),
    (lambda: adapter.check(3), TypeError, r"\[check\] model must be an nn.Module"),
    (lambda: check([1, 2]), TypeError, r"\[check\] prompts must .* got int"),
    (lambda: check(mx.ones(3)), TypeError, r"integers but got mlx.core.float32"),
    (lambda: check(EMPTY), ValueError, r"prompts must have shape \[length\] .* but got \[1, 0\]"),
    (
        lambda: check(UNKNOWN),
        ValueError,
        r"\[check\] prompts must be from 0 to \d+ but got 3 to 999",
    ),
    (lambda: adapter.bench(tiny()), ValueError, r"\[bench\] model must be patched"),
    (
        another_layer,
        TypeError,
        r"as in deepseek_v41 of mlx-lm but got .*Linear for a HyperConnection",
    ),
    (lambda: adapter.patch(tiny(hc_sinkhorn_iters=0)), ValueError, "iters must be at least 1"),
    (zero_eps, ValueError, r"\[patch\] rms_norm_eps must be"),
    (lambda: check_version("0.32.1"), ValueError, f"must be a {V41} but mlx-lm is 0.32.1"),
    (lambda: check_version("0.33.0.dev1"), ValueError, "but mlx-lm is 0.33.0.dev1"),
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
        ("--sites 64 --prompts 3", "they go not with --sites"),
        ("--sites 64 --prompt Hello", "--prompt needs the tokenizer of --model"),
        (
            "--sites 64 --family v9",
            "family must be one of lm_deepseek_v41, vlm_deepseek_v41, .* but got 'v9'",
        ),
        ("--random 256,0", "--random must be positive numbers"),
        ("--random 64,4,9", "--random must be D or D,LAYERS but is 64,4,9"),
        ("--sites 64 --json nowhere/a.json", "--json must be in a folder that exists but is"),
        ("--random 100,2", "--random must have D a multiple of 32 but has 100"),
    ],
)
def test_command_names_mistakes(command, message, capsys):
    with pytest.raises(SystemExit):
        main(command.split())
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), capsys.readouterr().err)


def test_without_its_package(monkeypatch):
    """A family whose package is missing says so; the others work."""
    found = importlib.metadata.version

    def version(name):
        if name == "mlx-lm":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"have its package: pip install 'mhc-metal\[mlx-lm\]'"):
        adapter.bench_sites(32, (1,))
    assert "mlx-lm" not in times.machine()


def test_another_version_of_mlx_lm(monkeypatch):
    """Found when a model is patched, before any name of the version is used."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.1")
    with pytest.raises(ValueError, match=f"{V41} but mlx-lm is 0.33.1"):
        adapter.patch(tiny(layers=1))


def test_another_model_of_mlx_lm():
    from mlx_lm.models.llama import Model, ModelArgs

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 1}
    model = Model(ModelArgs("llama", num_attention_heads=4, rms_norm_eps=1e-5, **sizes))
    with pytest.raises(ValueError, match=rf"{FAMILIES}; but got mlx_lm.models.llama.Model"):
        adapter.patch(model)
