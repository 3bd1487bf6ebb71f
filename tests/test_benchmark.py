"""benchmark.py's bytes, modes and counters, its JSON, and what reads it."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import tracing
from conftest import executor

import benchmark
from benchmarks import ops as timed
from benchmarks import timing
from benchmarks.results import SECTIONS, predicted_us
from mhc_mlx import DEEPSEEK_V4, kernel, ops

ROOT = Path(__file__).parent.parent
ROWS = {  # forward, backward at n = 4
    "mhc_static": (8, 12),
    "mhc_layer": (8, 12),
    "stream_mix_add": (9, 14),
    "stream_mix_add_per_token": (9, 14),
    "stream_aggregate": (5, 9),
    "stream_aggregate_norm": (5, 9),
    "mhc_coefficients": (4, 8),
    "mhc_pre": (5, 13),
    "mhc_pre_norm": (5, 13),
    "mhc_head": (5, 9),
    "sublayer": (14, 27),
    "mhc_dynamic": (14, 27),
    "mhc_seam": (10, 15),
    "single_pass": (14, 19),
}


def figure(**fields) -> dict:
    """A row of the result."""
    row = {"op": "sublayer", "direction": "forward", "dtype": "bfloat16", "shape": [1, 4, 8]}
    row |= {"us": 10.0, "spread": 0.0, "gbps": 1.0, "percent_of_copy": 50.0}
    return row | {"speedup_vs_compiled": None, "threads_per_group": None} | fields


def test_mandatory_bytes():
    rows, shape = 16384 * 1024 * 2, (16384, 4, 1024)  # one row of C per token in bfloat16
    assert ROWS.keys() == timed.OPS.keys() - {"sinkhorn_knopp"}
    for op, (forward, backward) in ROWS.items():
        got = [timed.mandatory_bytes(op, d, shape, mx.bfloat16) for d in timed.DIRECTIONS]
        assert got == [forward * rows, backward * rows, (forward + backward) * rows]
    matrices = ("sinkhorn_knopp", "forward+backward", (10, 4, 4), mx.float32)
    assert timed.mandatory_bytes(*matrices) == 160 * (8 + 12)


@pytest.mark.parametrize("op", timed.OPS)
def test_ops_of_both_modules_agree(op):
    """Every op takes its inputs, and a cotangent for each result."""
    arrays = timed.make_inputs(op, (3, 4, 4), mx.float32)
    with executor("stand-in"):
        assert benchmark.worst_error(op, arrays, gradients=True) < 3e-5


def test_modes():
    def chosen(*argv):
        return benchmark.cases(benchmark.parse(argv))

    assert list(chosen()) == list(chosen("--op", "mhc_pre", "--sweep")) == ["rows"]
    assert list(chosen("--all")) == list(SECTIONS)
    assert list(chosen("--decode", "--sizes")) == ["sizes", "decode"]
    table = chosen()["rows"]
    assert {op for op, _, _ in table} == set(timed.OPS)
    for op in timed.TARGETS:
        for shape in ((65536, 4, 1024), (16384, 4, 4096)):
            assert (op, shape, "bfloat16") in table
    one = chosen("--op", "mhc_head", "--shape", "2,4,8", "--dtype", "float16")
    assert one == {"rows": [("mhc_head", (2, 4, 8), "float16")]}
    sizes = chosen("--sizes")["sizes"]
    assert {s[0] for _, s, _ in sizes} == {4**k for k in range(9)}
    assert {s[1] for _, s, _ in sizes} == {2, 4, 8, 16}
    assert max(math.prod(s) for _, s, _ in sizes) < 2**31
    assert {s[0] for _, s, _ in chosen("--decode")["decode"]} == {1, 2, 4, 8, 16}
    assert benchmark.parse([]).baseline is None and not benchmark.parse(["--no-baseline"]).baseline


def test_verify_writes_json(tmp_path):
    command = [sys.executable, "benchmark.py", "--verify", "--shape", "3,4,4", "--json"]
    subprocess.run([*command, str(tmp_path / "a.json")], cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["mlx"] == mx.__version__ and result["rows"] == []
    assert all(r["ok"] and r["error"] < 1 for r in result["verified"])
    assert {r["op"] for r in result["verified"]} == set(benchmark.DEFAULT)


def test_once_launches_what_it_names_twice(monkeypatch):
    args = benchmark.parse(
        ["--once", "--op", "mhc_seam", "--shape", "5,4,64", "--dtype", "float32"]
    )
    calls = []
    with executor("stand-in"), monkeypatch.context() as patch:
        launch = kernel.launch

        def counted(name, *rest, **options):
            calls.append(name)
            return launch(name, *rest, **options)

        patch.setattr(kernel, "launch", counted)
        patch.setattr(mx, "compile", lambda f: f)
        patch.setattr(benchmark, "race", None)  # nothing is timed
        assert benchmark.measure(args)["rows"] == []
    assert Counter(calls) == {"mhc_seam": 2, "mhc_seam_backward": 2, "sum_partials": 2}


def test_what_fails_parity_is_not_timed(tmp_path, monkeypatch):
    plain = ops.mhc_head
    monkeypatch.setattr(ops, "mhc_head", lambda *a, **options: 1.1 * plain(*a, **options))
    for module in (benchmark, timing):
        monkeypatch.setattr(module, "room", lambda: 1 << 20)
    argv = ["--quick", "--no-baseline", "--shape", "3,4,4", "--direction", "forward"]
    argv += ["--op", "mhc_head", "--op", "stream_aggregate", "--json", str(tmp_path / "a.json")]
    with executor("stand-in"), pytest.raises(SystemExit, match="parity fails.*mhc_head"):
        benchmark.main(argv)
    result = json.loads((tmp_path / "a.json").read_text())
    assert {r["op"]: r["ok"] for r in result["verified"]} == {
        "mhc_head": False,
        "stream_aggregate": True,
    }
    assert {r["op"] for r in result["rows"]} == {"stream_aggregate"}


def test_every_mode_writes_its_section(tmp_path, monkeypatch):
    small = {"GRID": {2: (8,)}, "TOKENS": [1, 4], "DECODE": [(2, 2, 8)], "OVERHEAD": [(1, 2, 8)]}
    small |= {"LAYERS": 3, "PLAIN_LAYERS": 2}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(timing, "CACHE", 1)
    for module in (benchmark, timing):
        monkeypatch.setattr(module, "room", lambda: 1 << 20)
    for module in (benchmark, timed):
        monkeypatch.setattr(module, "DEEPSEEK_V4", replace(DEEPSEEK_V4, iters=2))
    usual = benchmark.Bench
    monkeypatch.setattr(benchmark, "Bench", lambda budget, peak: usual(budget / 50, peak))
    file = tmp_path / "a.json"
    with executor("stand-in"):
        benchmark.main(["--quick", "--sizes", "--decode", "--overhead", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["rows"] == [] and all(r["ok"] for r in result["verified"])
    assert [(r["op"], r["shape"]) for r in result["sizes"]] == [
        (op, [T, 2, 8]) for op in benchmark.GROWING for T in (1, 4)
    ]
    assert [r["op"] for r in result["decode"]] == ["decode sublayer", "decode single_pass"]
    for row in result["decode"]:
        assert row["speedup_vs_compiled"] == pytest.approx(row["plain_us"] / row["us"])
        assert row["dispatches"] > 0 and row["plain_dispatches"] > 20
    assert [r["op"] for r in result["overhead"]] == ["MHCLayer", "HyperConnection"]
    for r in result["overhead"]:
        assert r["us"] > 0 and r["eager_us"] > 0 and r["python_us"] > 0 and r["many_us"] > 0


def test_counter_of_dispatches():
    x = mx.ones((4, 6))
    mx.eval(x)
    halves = mx.split(mx.exp(x), 2, axis=1)
    results = [halves[0].T.sum(0), halves[1][None] * 2.0, x]
    assert timing.dispatches(results) == Counter(Exp=1, Sum=1, Multiply=1)
    assert timing.dispatches(mx.compile(lambda x: mx.exp(x) * x)(x)).total() == 1


@pytest.mark.parametrize("op, launched", [("sublayer", 3), ("single_pass", 2)])
def test_dispatches_and_sources_of_a_sublayer(op, launched):
    """At one token: the kernels of the graph are those launched, and nothing else is."""
    arrays, counts = timed.make_inputs(op, (1, 4, 64), mx.bfloat16), []

    def traced(*arrays):
        call = mx.compile(lambda *a: getattr(timed, op)(ops, *a, differentiable=False))
        counts.append(timing.dispatches(out := call(*arrays)))
        return out

    tracing.metal_source(traced, *arrays)  # kernels built before are counted too
    with timing.launches() as seen:
        tracing.metal_source(traced, *arrays)
    assert counts[1]["CustomKernel"] == counts[1].total() == len(seen) == launched
    for row in seen:
        files = (f"{row['kernel']}.metal", "common.h")
        assert row["source_bytes"] >= sum(len(kernel.text(file)) for file in files)
        assert row["template_arguments"] > 3
    assert kernel._build.cache_info().currsize == 0  # no spy stays


@pytest.mark.parametrize("devices", [None, "4,5"])
def test_medians_over_processes(devices, tmp_path, monkeypatch):
    """One after another, or as many at once as there are GPUs."""
    times, running, given = iter([30.0, 10.0, 20.0]), [], []

    class Process:
        def __init__(self, command, env):
            us = next(times)
            row = figure(us=us, gbps=1 / us, percent_of_copy=us, speedup_vs_compiled=2.0)
            slow = figure(op="decode", us=us, plain_us=8 * us, speedup_vs_compiled=8.0)
            assert "--plot" not in command and "x.png" not in command
            assert ("--no-baseline" in command) == bool(given)
            result = {"rows": [row], "decode": [slow], "verified": []}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(result))
            given.append(env.get("CUDA_VISIBLE_DEVICES"))
            running.append(self)
            assert len(running) <= (2 if devices else 1)

        def wait(self):
            running.remove(self)
            return 0

    monkeypatch.setattr(benchmark.subprocess, "Popen", Process)
    argv = ["benchmark.py", "--processes", "3", "--json", "x.json", "--plot", "x.png", "--quick"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    benchmark.repeat(3, str(tmp_path / "all.json"))
    assert given == (["4", "5", "4"] if devices else [None] * 3)
    result = json.loads((tmp_path / "all.json").read_text())
    (row,), (slow,) = result["rows"], result["decode"]
    assert (row["us"], row["spread"], row["speedup_vs_compiled"]) == (20.0, 1.0, 3.0)
    assert (slow["us"], slow["plain_us"], slow["speedup_vs_compiled"]) == (20.0, 160.0, 8.0)


def test_compare(tmp_path, capsys):
    kept, gone, new = (figure(op=op) for op in ("mhc_pre", "mhc_head", "mhc_static"))
    before = {"rows": [kept, gone], "sizes": [figure(op="mhc_pre")]}
    after = {"rows": [kept | {"us": 8.0}, new], "sizes": [figure(op="mhc_pre", us=15.0)]}
    for name, result in (("a", before), ("b", after)):
        (tmp_path / name).write_text(json.dumps(result))
    benchmark.main(["--from", str(tmp_path / "b"), "--compare", str(tmp_path / "a")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("mhc_pre forward")
    assert lines[0].endswith("10.0 ->       8.0 us   -20.0 %")
    assert "(sizes)" in lines[1] and lines[1].endswith("+50.0 %")
    assert "mhc_static" in lines[2] and lines[2].endswith("not there before")
    assert "mhc_head" in lines[3] and lines[3].endswith("only before")


def test_predictions(tmp_path, capsys):
    assert predicted_us(4_000_000, 400, None) == pytest.approx(10 / 0.75)
    assert predicted_us(4_000_000, 400, 50.0) == pytest.approx(10 / (0.8 * 0.5))
    row = figure(op="mhc_pre", shape=[65536, 4, 1024], us=300.0, percent_of_copy=80.0)
    (tmp_path / "a").write_text(json.dumps({"device": "some GPU", "rows": [row]}))
    benchmark.main(["--predict", "--from", str(tmp_path / "a")])
    text = capsys.readouterr().out
    assert "no Apple GPU has run this" in text
    size = 5 * 65536 * 1024 * 2
    us = [f"{size / (gbps * 1e3 * 0.8 * 0.8):.0f}" for gbps in (400, 819, 546, 614)]
    line = f"| `mhc_pre` | (65536, 4, 1024) | forward | 300 | 80 | {' | '.join(us)} |"
    assert line in text.splitlines()
    assert sum(line.startswith("| `") for line in text.splitlines()) == 16
    benchmark.main(["--predict"])  # without figures
    text = capsys.readouterr().out
    assert f"(65536, 4, 1024) | forward | {size / (400e3 * 0.75):.0f} |" in text


@pytest.mark.parametrize("section", ["rows", "sizes"])
def test_plot(section, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        figure(op=op, shape=[T, n, C], percent_of_copy=T)
        for op in ("mhc_pre", "sublayer")
        for T in (1, 4)
        for n, C in ((2, 8), (4, 8), (4, 16))
    ]
    result = {"device": "some GPU", "rows": [], section: rows}
    (tmp_path / "a.json").write_text(json.dumps(result))
    argv = ["--from", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    benchmark.main(argv)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_kept_figures_have_the_schema():
    made = {"device", "mlx", "date", "command"}
    for file in (ROOT / "benchmarks").glob("*.json"):
        result = json.loads(file.read_text())
        if "runs" in result:  # of experiment.py, by several processes
            assert len(result["runs"]) == 15 and all(made <= set(run) for run in result["runs"])
            continue
        assert made <= set(result)
        if result["command"].startswith("ncu"):
            for k in result["kernels"]:
                rows = k["rows_read"] + k["rows_written"]
                assert k["us"] > 0 and (k["kernel"] == "mhc_pre" or rows < 1.05 * k["floor"])
        elif "benchmark.py" in result["command"]:
            assert {"copy_gbps", "rows"} <= set(result)
        elif "overhead.py" in result["command"]:
            assert {"dim", "floor_ms", "plain", "fused"} <= set(result["results"][0])
        else:  # by mhc_mlx.mlx_lm
            of_sites = result.get("per sublayer", [result.get("check")])
            times = [t for k in of_sites for t in k["times"]]
            assert times and all(0 < value < float("inf") for t in times for value in t.values())
        for row in (row for section in SECTIONS for row in result.get(section, [])):
            assert row["direction"] in timed.DIRECTIONS and row["dtype"] in timed.DTYPES
            assert row["us"] == pytest.approx(row["us"]) and row["us"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ("--process 2", "unrecognized arguments: --process 2"),  # its children would take it too
        ("--processes 0", "--processes must be at least 1 but is 0"),
        ("--once --processes 2", "--processes must be 1 with --once but is 2"),
        ("--compare nowhere.json", "--compare must be a file but is nowhere.json"),
        ("--from nowhere.json", "--from must be a file but is nowhere.json"),
        ("--json nowhere/a.json", "--json must be in a folder that exists but is nowhere/a.json"),
    ],
)
def test_options_are_checked_before_anything_runs(options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--op", "mhc_head", "--shape", "1,2,3", *options.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["1,2", "0,4,8", "1,2,3,4", "a,b,c"])
def test_shapes_are_three_positive_numbers(shape, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--op", "mhc_pre", "--shape", shape])
    assert f"--shape must be three positive numbers B,n,C but is {shape}" in capsys.readouterr().err
