"""benchmarks/gated.py times sites of Qwen's gated residuals, and counts their dispatches."""

import json
import shlex
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from proof import executor

from benchmarks import gated

SIZES = "--tokens 1 3 --C 32 --n 2 --rank 64 --sites 2 --train-sites 2 --train-tokens 3".split()
N, C, T = 2, 32, 3


@pytest.fixture(params=gated.WEIGHTS)
def sites(request):
    mx.random.seed(0)
    return [gated.make_site(N, C, 64, request.param) for _ in range(3)]


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


def test_the_steps_are_those_of_the_class():
    """Bit for bit; so the figures are the same where mlx-vlm is not installed."""
    language = pytest.importorskip("mlx_vlm.models.qwen4_exp.language", reason="no mlx-vlm")
    assert gated.stock_class() is language.Qwen4ExpGatedResidual
    theirs = gated.make_site(N, C, 64, "bfloat16")
    names = {"hc_count": N, "hidden_size": C, "hc_lowrank": 64}
    ours = gated.GatedResidual(SimpleNamespace(**names))
    ours.update(theirs.parameters())
    streams = gated.make_streams(T, N, C)
    pairs = zip(gated.stock_step(theirs, *streams), gated.stock_step(ours, *streams), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("rung", ["reference", "stand-in"])
def test_both_compute_the_same(sites, rung):
    """Streams, what is read and the next h_post, to the digits of bfloat16; and the gradients."""
    streams = gated.make_streams(T, N, C)
    made = []
    for kind in gated.KINDS[:2]:
        f, weights = gated.of_parameters(sites[:1], gated.STEPS[kind])
        arrays = [*streams, *weights]
        ones = [mx.ones(a.shape, a.dtype) for a in f(*arrays)]
        if rung == "reference" or kind != "fused":
            made.append(sum(mx.vjp(f, arrays, ones), []))
        else:
            with executor(rung):
                made.append(sum(mx.vjp(f, arrays, ones), []))
    for a, b in zip(*made, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        assert a.shape == b.shape
        assert mx.abs(a - b).max().item() <= 0.03 * mx.abs(b).max().item()


def test_the_site_keeps_its_weights(sites):
    """Those that a call was given do not stay in it."""
    before = dict(nn.utils.tree_flatten(sites[0].parameters()))
    f, weights = gated.of_parameters(sites[:1], gated.stock_step)
    streams = gated.make_streams(T, N, C)
    other = f(*streams, *[a + 1 for a in weights])
    after = dict(nn.utils.tree_flatten(sites[0].parameters()))
    assert all(after[k] is before[k] for k in before)
    assert not same(other[1], f(*streams, *weights)[1])


def test_dispatches_of_a_site(sites):
    """Fused: stream_norm, down, silu, up, gate_mix, and where inject is quantised its product and
    gate; mlx-vlm's are those of its products and at least one for each compiled piece."""
    count = gated.dispatches(sites, 1, N, C)
    quantized = isinstance(sites[0].block_inject_weight, nn.QuantizedLinear)
    assert count["fused"] == (7 if quantized else 5)
    assert count[gated.STOCK] >= count[gated.COMPILED] > count["fused"]


def test_gated(tmp_path, capsys):
    file = tmp_path / "gated.json"
    gated.main([*SIZES, "--budget", "0.001", "--json", str(file)])
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    gated.check(report)
    assert {"device", "mlx", "date", "command"} <= set(report)
    assert {(r["weights"], r["tokens"], r["direction"]) for r in report["sites"]} == {
        (w, t, d) for w in gated.WEIGHTS for t in (1, 3) for d in ("forward", "forward+backward")
    }
    assert all(r["u"] < 0.03 for r in report["differences"])
    assert all(us > 0 for row in report["sites"] for us in row["us"].values())
    for part in ("chains", "training"):
        assert [r["weights"] for r in report[part]] == list(gated.WEIGHTS)
        assert all(row[k]["us"] > 0 for row in report[part] for k in gated.KINDS)
    assert all(row[k]["peak_bytes"] > 0 for row in report["training"] for k in gated.KINDS)
    for part in gated.PARTS:
        assert all(gated.show(part, row) in printed for row in report[part])
    gated.main([*SIZES, "--budget", "0.001", "--weights", "bfloat16", "--json", str(file)])
    assert len(json.loads(file.read_text())["chains"]) == 1


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    """Where a later figure fails, the earlier ones are in the file."""

    def fails(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gated, "chain_of_one_token", fails)
    file = tmp_path / "gated.json"
    with pytest.raises(RuntimeError, match="no kernel"):
        gated.main([*SIZES, "--budget", "0.001", "--weights", "bfloat16", "--json", str(file)])
    assert len(json.loads(file.read_text())["sites"]) == 4


@pytest.mark.parametrize(
    "options, must",
    [
        ("--n 0", "--n must be at least 1 but is 0"),
        ("--tokens 4 0", "--tokens must be at least 1 but is 0"),
        ("--train-sites 0", "--train-sites must be at least 1 but is 0"),
        ("--budget 0", "--budget must be above 0 but is 0.0"),
        ("--rank 10", "--rank must be a multiple of 64 with 4 bits but is 10"),
        ("--n 3 --C 30", "--n * --C must be a multiple of 64 with 4 bits but is 90"),
        ("--json /", "--json must be a file but is the folder /"),
    ],
)
def test_wrong_options(options, must, capsys):
    with pytest.raises(SystemExit):
        gated.main(shlex.split(options))
    assert must in capsys.readouterr().err


def test_no_other_file_is_replaced(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(SystemExit):
        gated.main([*SIZES, "--json", str(file)])
    assert "its device is missing" in capsys.readouterr().err and file.read_text() == "{}"
