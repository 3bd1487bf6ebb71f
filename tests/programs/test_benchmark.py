"""benchmark.py's bytes, modes and counters, its JSON, and what reads it."""

import contextlib
import functools
import json
import math
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from proof import executor, tracing

import benchmark
from benchmarks import ops as timed
from benchmarks import parity as parities
from benchmarks import timing
from benchmarks.parity import worst_error
from benchmarks.results import SECTIONS, predicted_us, show
from mhc_mlx import DEEPSEEK_V4, launch, ops, reference

ROOT = Path(__file__).parents[2]
Bench = benchmark.Bench
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


RESULT = {"device": "some GPU", "mlx": "0.32.4", "date": "2026-11-22", "command": "python b.py"}
RESULT |= {"copy_gbps": 1.0, "verified": [], "rows": []}


@pytest.fixture
def uncompiled(monkeypatch):
    """MLX compiles by the C++ compiler on a CPU: seconds."""
    monkeypatch.setattr(mx, "compile", lambda f: f)


def small(monkeypatch, iters: int = 2) -> None:
    """Runs of a moment."""
    values = {"GRID": {2: (8,)}, "TOKENS": [1, 4], "DECODE": [(2, 2, 8)], "OVERHEAD": [(1, 2, 8)]}
    for name, value in (values | {"LAYERS": 3, "PLAIN_LAYERS": 2}).items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(timing, "CACHE", 1)
    for module in (benchmark, timing):
        monkeypatch.setattr(module, "room", lambda: 1 << 20)
    for module in (benchmark, timed):
        monkeypatch.setattr(module, "DEEPSEEK_V4", replace(DEEPSEEK_V4, iters=iters))
    usual = benchmark.Bench
    monkeypatch.setattr(benchmark, "Bench", lambda budget, peak: usual(budget / 50, peak))


def test_mandatory_bytes():
    rows, shape = 16384 * 1024 * 2, (16384, 4, 1024)  # one row of C per token in bfloat16
    assert ROWS.keys() == timed.OPS.keys() - {"sinkhorn_knopp"}
    for op, (forward, backward) in ROWS.items():
        got = [timed.mandatory_bytes(op, d, shape, mx.bfloat16) for d in timed.DIRECTIONS]
        assert got == [forward * rows, backward * rows, (forward + backward) * rows]
    assert timed.mandatory_bytes("mhc_pre", "backward", (7, 8, 24), mx.float32) == 25 * 7 * 24 * 4
    for dtype, each in ((mx.float32, (8, 12, 20)), (mx.bfloat16, (6, 8, 14))):
        matrices = [("sinkhorn_knopp", d, (10, 4, 4), dtype) for d in timed.DIRECTIONS]
        assert [timed.mandatory_bytes(*m) for m in matrices] == [160 * size for size in each]


def test_inputs_of_every_op():
    """Of tokens, n and C that differ; of a stack, gates that write back next to nothing."""
    for op in timed.OPS:
        shape = (3, 2, 2 if op == "sinkhorn_knopp" else 8)
        results = timed.several(timed.function(ops, op)(*timed.make_inputs(op, shape, mx.float16)))
        assert all(mx.isfinite(a.astype(mx.float32)).all() for a in results if a is not None)
    phi, bias, alpha = benchmark.quiet_parameters(mx.zeros((3, 2, 8)))
    assert (phi.shape, bias.shape, alpha.shape) == ((8, 16), (8,), (3,))
    assert [k for k, b in enumerate(bias.tolist()) if b == -4.0] == [2, 3]  # of h_post


def test_modes(monkeypatch):
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    for module in (benchmark, timing):
        monkeypatch.setattr(module, "memory", lambda: 1 << 36)

    def chosen(*argv):
        return benchmark.cases(benchmark.parse(argv))

    assert list(chosen()) == list(chosen("--op", "mhc_pre", "--sweep")) == ["rows"]
    assert list(chosen("--all")) == list(SECTIONS[:4])
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


def test_shapes_of_the_tables():
    """Of the default one those that the README has figures of, and of the preset the shapes that
    other projects measure: with others, figures could not be compared with theirs."""
    lists = {"mhc_static": [(16384, 4, 1024), (8192, 8, 1024), (64, 32, 1280)]}
    lists |= {"mhc_layer": [(320, 4, 1280)], "sinkhorn_knopp": [(65536, 4, 4)]}
    lists |= dict.fromkeys(timed.TARGETS, [(65536, 4, 1024), (16384, 4, 4096)])
    lists["mhc_pre_norm"] = lists["mhc_pre"]
    usual = [(16384, 4, 1024)]
    assert {op: lists.get(op, usual) for op in timed.OPS} == benchmark.DEFAULT
    seeds = [
        *((320, 4, 1280), (512, 4, 1920), (1280, 4, 2560), (2560, 4, 1280), (128, 8, 1280)),
        *((256, 8, 1280), (32, 32, 1280), (64, 32, 1280), (128, 32, 1280), (128, 4, 1280)),
        *((256, 4, 1280), (512, 4, 2560), (1024, 4, 1920), (1024, 4, 2560), (65536, 4, 1024)),
        *((16384, 4, 1024), (16384, 4, 4096), (8192, 8, 1024), (8192, 12, 1024)),
    ]
    matrices = [(1, 4), (1, 8), (1, 16), (65536, 4), (8192, 8), (4096, 16), (1, 64)]
    want = dict.fromkeys(("mhc_static", "stream_mix_add", "stream_aggregate_norm"), seeds)
    want |= {"mhc_layer": seeds[:14], "mhc_dynamic": seeds[:17]}
    want["sinkhorn_knopp"] = [(B, n, n) for B, n in matrices]
    assert benchmark.PRESETS == {"seeds": want}
    assert benchmark.GRID == {
        4: (1024, 1280, 2560, 4096, 5120, 7168),
        **dict.fromkeys((2, 8, 16), (1024, 4096)),
    }
    assert benchmark.DECODE == [(T, 4, C) for C in (4096, 5120, 7168) for T in (1, 2, 4, 8, 16)]
    assert benchmark.OVERHEAD == [(1, 4, 4096), (16384, 4, 1024)]


def test_the_cache_is_given_back_once_it_is_large(monkeypatch):
    """Before a check and before a row: else arrays of a shape before would leave no memory."""
    cleared = []
    monkeypatch.setattr(benchmark, "room", lambda: 100)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    monkeypatch.setattr(benchmark, "worst_error", lambda *_, **__: 0.0)
    monkeypatch.setattr(benchmark, "input_sets", lambda make: [])
    monkeypatch.setattr(benchmark, "race", lambda *_: [[1.0], [1.0]])
    case = ("stream_aggregate", (2, 2, 8), "float32")
    for held, count in ((0, 0), (100, 0), (101, 1)):
        monkeypatch.setattr(mx, "get_cache_memory", lambda held=held: held)
        cleared.clear()
        benchmark.verify("rows", *case, ["forward"], None)
        assert len(cleared) == count
        cleared.clear()
        Bench(1.0, None).row(case[0], "forward", *case[1:], None, baseline=False)
        assert len(cleared) == count


def test_verify_writes_json(tmp_path, capsys):
    benchmark.main(["--verify", "--shape", "3,4,4", "--json", str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["mlx"] == mx.__version__ and result["rows"] == []
    assert all(r["ok"] and r["error"] < 1 for r in result["verified"])
    assert all(r["direction"] == "forward+backward" for r in result["verified"])
    assert {r["op"] for r in result["verified"]} == set(benchmark.DEFAULT)
    largest = max(r["error"] for r in result["verified"])
    told = f"parity: {len(result['verified'])} cases, largest relative error {largest:.1e}"
    assert told in capsys.readouterr().out.splitlines()


def test_once_launches_what_it_names_twice(monkeypatch):
    argv = ["--once", "--op", "mhc_seam", "--shape", "5,4,64", "--dtype", "float32"]
    calls, directed = [], benchmark.directed

    def ready(*options):
        run = directed(*options)

        def checked(*arrays):  # or the profiler would see how inputs are made, too
            assert not launch.primitives(*arrays)
            return run(*arrays)

        return checked

    with executor("stand-in"), monkeypatch.context() as patch:
        patch.setattr(benchmark, "directed", ready)
        run = launch.run

        def counted(name, *rest, **options):
            calls.append(name)
            return run(name, *rest, **options)

        patch.setattr(launch, "run", counted)
        patch.setattr(mx, "compile", lambda f: f)
        patch.setattr(benchmark, "race", None)  # nothing is timed
        benchmark.main(argv)
    assert Counter(calls) == {"mhc_seam": 2, "mhc_seam_backward": 2, "sum_partials": 2}


def test_what_fails_parity_is_not_timed(tmp_path, monkeypatch):
    plain = ops.mhc_head
    monkeypatch.setattr(ops, "mhc_head", lambda *a, **options: 1.1 * plain(*a, **options))
    small(monkeypatch)
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


@contextlib.contextmanager
def launches_of_the_stand_in():
    """As `timing.launches`, whose spies are on what builds kernels: the stand-in builds none."""
    seen, run = [], launch.run

    def noted(name, *rest):
        seen.append({"kernel": name, "source_bytes": 7, "template_arguments": 3})
        return run(name, *rest)

    launch.run = noted
    try:
        yield seen
    finally:
        launch.run = run


def test_every_mode_writes_its_section(tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    file = tmp_path / "a.json"
    monkeypatch.setattr(benchmark, "launches", launches_of_the_stand_in)
    with executor("stand-in"):
        benchmark.main(["--quick", "--sizes", "--decode", "--overhead", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["rows"] == [] and all(r["ok"] for r in result["verified"])
    printed = capsys.readouterr().out  # each as it is measured
    for section in ("sizes", "decode", "overhead"):
        assert result[section] and all(show(row) in printed for row in result[section])
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
    names = [[one["kernel"] for one in r["launches"]] for r in result["overhead"]]
    assert names[0] == ["mhc_fused"]  # of one call of each layer
    assert len(set(names[1])) == len(names[1]) > 1 and names[1][-1] == "stream_mix_add"
    assert printed.count("stream_mix_add: source 7 bytes, 3 template arguments") == 1


def test_a_row_as_text():
    """Every figure that a section has, under its name."""
    times = {"eager_us": 1.0, "many_us": 2.0, "gpu_us": 3.0, "plain_us": 4.0}
    times |= {"python_us": 5.0, "python_eager_us": 6.0}
    text = show(figure(spread=0.25, percent_of_peak=40.0, speedup_vs_compiled=8.0) | times)
    want = "10.0 us +- 25% | 1 GB/s | 50 % of copy | 40 % of peak | eager 1.0 | of many 2.0 | "
    want += "GPU alone 3.0 | plain 4.0 | Python 5.0 | Python eager 6.0 | 8.0 x compiled reference"
    assert " ".join(text.partition("|")[2].split()) == want


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
        files = (f"{row['kernel']}.metal", "include/common.h")
        assert row["source_bytes"] >= sum(len(launch.text(file)) for file in files)
        assert row["template_arguments"] > 3
    assert launch._build.cache_info().currsize == 0  # no spy stays


@pytest.mark.parametrize("devices", [None, "4,5"])
def test_medians_over_processes(devices, tmp_path, monkeypatch):
    """One after another, or as many at once as there are GPUs."""
    times, running, given = iter([30.0, 10.0, 20.0]), [], []

    class Process:
        def __init__(self, command, env):
            us = next(times)
            row = figure(us=us, gbps=1 / us, percent_of_copy=us, speedup_vs_compiled=2.0)
            row |= {"percent_of_peak": us}
            slow = figure(op="decode", us=us, plain_us=8 * us, speedup_vs_compiled=8.0)
            assert "--plot" not in command and "x.png" not in command
            assert ("--no-baseline" in command) == bool(given)
            case = {"op": "mhc_pre", "error": us, "ok": us < 25}
            result = RESULT | {"rows": [row], "decode": [slow], "verified": [case]}
            result |= {"copy_gbps": us}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(result))
            given.append(env.get("CUDA_VISIBLE_DEVICES"))
            running.append(self)
            assert len(running) <= (2 if devices else 1)

        def wait(self):
            running.remove(self)
            return 0

    monkeypatch.setattr(benchmark.subprocess, "Popen", Process)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    argv = ["--processes", "3", "--json", "all.json", "--plot", "x.png", "--quick"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with executor("stand-in"), pytest.raises(SystemExit, match="parity fails.*'error': 30.0"):
        benchmark.main(argv)
    assert (tmp_path / "x.png").exists()
    assert given == (["4", "5", "4"] if devices else [None] * 3)
    result = json.loads((tmp_path / "all.json").read_text())
    (row,), (slow,) = result["rows"], result["decode"]
    assert result["copy_gbps"] == 30.0 and result["verified"][0]["error"] == 30.0
    assert (row["percent_of_copy"], row["percent_of_peak"], row["gbps"]) == (20.0, 20.0, 1 / 20)
    assert (row["us"], row["spread"], row["speedup_vs_compiled"]) == (20.0, 1.0, 3.0)
    assert (slow["us"], slow["plain_us"], slow["speedup_vs_compiled"]) == (20.0, 160.0, 8.0)


@pytest.mark.parametrize("sections", ["", "--sizes", "--decode", "--overhead", "--all", "--sweep"])
def test_processes_are_given_options_that_they_take(sections, tmp_path, monkeypatch):
    """The reference is timed in the first alone, where it is timed at all: elsewhere an option that
    leaves it out does nothing, and would be refused."""
    given = []

    class Process:
        def __init__(self, command, env):
            args = benchmark.parse(command[2:])
            given.append((args.baseline, args.processes))
            Path(command[command.index("--json") + 1]).write_text(json.dumps(RESULT))

        def wait(self):
            return 0

    monkeypatch.setattr(benchmark.subprocess, "Popen", Process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(benchmark, "fitting", lambda those, *_: those)
    op = ["--op", "stream_mix_add"] if sections == "--sweep" else []
    with executor("stand-in"):
        benchmark.main(["--processes", "3", *sections.split(), *op])
    later = None if sections in ("--decode", "--overhead", "--sweep") else False
    assert given == [(None, 1), (later, 1), (later, 1)]


def test_compare(tmp_path, capsys):
    kept, gone, new = (figure(op=op) for op in ("mhc_pre", "mhc_head", "mhc_static"))
    before = RESULT | {"rows": [kept, gone], "sizes": [figure(op="mhc_pre")]}
    after = RESULT | {"rows": [kept | {"us": 8.0}, new], "sizes": [figure(op="mhc_pre", us=15.0)]}
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
    (tmp_path / "a").write_text(json.dumps(RESULT | {"rows": [row]}))
    benchmark.main(["--predict", "--from", str(tmp_path / "a")])
    text = capsys.readouterr().out
    assert "no Apple GPU has run this" in text
    size = 5 * 65536 * 1024 * 2
    us = [f"{size / (gbps * 1e3 * 0.8 * 0.8):.0f}" for gbps in (400, 819, 546, 614)]
    line = f"| `mhc_pre` | (65536, 4, 1024) | forward | 300 | 80 | {' | '.join(us)} |"
    assert line in text.splitlines()
    assert sum(line.startswith("| `") for line in text.splitlines()) == 16
    header = "| op | (tokens, n, C) | direction | some GPU, measured us | % of copy | M2 Max (400"
    assert header in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {10}
    benchmark.main(["--predict"])  # without figures
    text = capsys.readouterr().out
    assert f"(65536, 4, 1024) | forward | {size / (400e3 * 0.75):.0f} |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8}


@pytest.mark.parametrize("section", ["rows", "sizes"])
def test_plot(section, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        figure(op=op, shape=[T, n, C], percent_of_copy=T)
        for op in ("mhc_pre", "sublayer")
        for T in (1, 4)
        for n, C in ((2, 8), (4, 8), (4, 16))
    ]
    result = RESULT | {section: rows}
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


def test_help_says_the_docstring_as_it_is():
    text = benchmark.options.parser(benchmark.__doc__, benchmark.PRESETS).format_help()
    assert benchmark.__doc__.strip() in text
    for name in ("json", "plot", "compare", "from"):
        assert f"  --{name} FILE" in text


# ---- parity


def parity(op="stream_mix_add", shape=(5, 4, 8), dtype=mx.float32, **options) -> float:
    return worst_error(op, shape, dtype, **options)


def test_ops_of_both_modules_agree(monkeypatch, uncompiled):
    """Every op takes its inputs, and a cotangent for each result; in chunks, and at once."""
    with executor("stand-in"):
        for op in timed.OPS:
            monkeypatch.setattr(parities, "CHUNK_BYTES", 1 << 40)
            assert parity(op, (7, 4, 4)) < 3e-5
            monkeypatch.setattr(parities, "CHUNK_BYTES", 3 * parities.reference_bytes(op, 4, 4))
            assert parities.chunk(op, 4, 4) == 3
            assert parity(op, (7, 4, 4)) < 3e-5


def test_parity_sees_every_result(monkeypatch, uncompiled):
    """A wrong element of any output or gradient, at the first or last token, a NaN, another dtype
    or shape; also where the reference has the same NaN."""
    right = parities.directed
    monkeypatch.setattr(parities, "CHUNK_BYTES", 2 * parities.reference_bytes("mhc_pre", 2, 4))
    count = 4 + 4  # outputs of mhc_pre, and gradients

    def broken(index, change, ours=True, theirs=False):
        def directed(f, direction, arrays, compiled=True):
            def run(*a):
                results = list(right(f, direction, arrays, compiled)(*a))
                if ours if compiled else theirs:
                    results[index] = change(results[index])
                return results

            return run

        monkeypatch.setattr(parities, "directed", directed)
        return parity("mhc_pre", (5, 2, 4))

    last = lambda a: a + mx.eye(a.shape[0], 1)[::-1].reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    for index in range(count):
        assert broken(index, last) > 1e-2, index
        assert broken(index, lambda a: a * float("nan")) == math.inf
        assert broken(index, lambda a: a.at[-1].add(float("inf"))) == math.inf
        for ours in (True, False):  # the reference's too
            assert broken(index, lambda a: a * float("nan"), ours, theirs=True) == math.inf
        assert broken(index, lambda a: a.astype(mx.bfloat16)) == math.inf
        assert broken(index, lambda a: a[None]) == math.inf
    assert broken(0, lambda a: a) < 3e-5
    for error, ok in ((2e-5, True), (4e-5, False), (math.inf, False), (math.nan, False)):
        row = benchmark.parity_row("mhc_pre", (5, 2, 4), "float32", True, 64, error)
        assert row["ok"] == ok and row["shape"] == [5, 2, 4] and row["threads_per_group"] == 64


def test_parity_without_gradients_has_none(uncompiled):
    gradient_off = lambda *a: ops.stream_mix_add(*a) + 0 * mx.stop_gradient(a[0])  # noqa: E731
    wrong = lambda *a: ops.stream_mix_add(mx.stop_gradient(a[0]), *a[1:])  # noqa: E731
    assert parity(timed=gradient_off) < 3e-5
    assert parity(timed=wrong, gradients=False) < 3e-5 < 0.1 < parity(timed=wrong)


def peak(op, shape) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    parity(op, shape)
    return mx.get_peak_memory() - before


def test_memory_of_parity(monkeypatch, uncompiled):
    """What a check says that it needs is enough, and chunks bound it where kernels are."""
    for op in timed.OPS:
        shape = (12, 8, 8 if op == "sinkhorn_knopp" else 64)
        assert peak(op, shape) < parities.needed_bytes(op, shape, mx.float32), op
    right = parities.directed

    def directed(f, direction, arrays, compiled=True):  # kernels, that hold nothing but results
        if not compiled:
            return right(f, direction, arrays, compiled)
        return lambda *a: [mx.zeros_like(x) for x in (*timed.several(f(*a[:arrays])), *a[:arrays])]

    monkeypatch.setattr(parities, "directed", directed)
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    for op, tokens in (("mhc_coefficients", 24), ("stream_mix_add", 200)):
        plain = functools.partial(timed.function, reference)
        monkeypatch.setattr(parities, "function", lambda _, op, plain=plain: plain(op))
        monkeypatch.setattr(parities, "CHUNK_BYTES", 4 * parities.reference_bytes(op, 8, 64))
        needed = parities.needed_bytes(op, (tokens, 8, 64), mx.float32)
        assert peak(op, (tokens, 8, 64)) < needed
    assert needed < 100 * parities.reference_bytes(op, 8, 64)
    # (4096, 12, 1024), once 34 GB
    monkeypatch.setattr(parities, "CHUNK_BYTES", 1 << 30)
    most = max(parities.needed_bytes(op, (4096, 12, 1024), mx.bfloat16) for op in timed.OPS)
    assert most < 4 << 30


@pytest.mark.parametrize("argv", ["", "--verify"])
def test_parity_is_of_what_is_timed(argv, monkeypatch, uncompiled):
    """Its threads, dtype, all its tokens, and its directions."""
    small(monkeypatch)
    launched, timed_rows = [], []
    monkeypatch.setattr(benchmark, "race", None)
    with executor("stand-in"), monkeypatch.context() as patch:
        run = launch.run

        def seen(name, inputs, outputs, groups, threads, *rest):
            x = inputs["x"]
            launched.append((name, x.dtype, x.size, threads))
            return run(name, inputs, outputs, groups, threads, *rest)

        def row(self, *case, **options):
            timed_rows.append(case)
            return figure()

        patch.setattr(launch, "run", seen)
        patch.setattr(Bench, "row", row)
        command = "--op stream_aggregate --shape 700,2,64 --dtype float16 --threads 96"
        command += " --direction forward"
        benchmark.main([*command.split(), *argv.split()])
    assert launched == [("stream_aggregate", mx.float16, 700 * 2 * 64, 96)]
    case = ("stream_aggregate", "forward", (700, 2, 64), "float16", 96, False)
    assert timed_rows == ([] if argv else [case])


def test_a_sweep_verifies_each_variant(monkeypatch, capsys):
    small(monkeypatch)
    checked, timings = [], iter(range(100, 0, -1))

    def error(op, shape, dtype, gradients, threads_per_group):
        forced = ops.tiling.token_tiling(2, 512, 4, 1, None, "metal")
        checked.append((gradients, forced.vec, forced.threads, threads_per_group))
        return 1.0 if threads_per_group == 64 else 0.0

    def row(self, op, direction, shape, name, threads, baseline):
        assert threads != 64 and not baseline
        fields = {"us": float(next(timings)), "threads_per_group": threads}
        return figure(op=op, direction=direction, **fields)

    monkeypatch.setattr(benchmark, "worst_error", error)
    monkeypatch.setattr(Bench, "row", row)
    usual = ops.tiling.token_tiling
    monkeypatch.setattr(ops.tiling, "token_tiling", usual)  # put back whatever the sweep leaves
    command = "--sweep --op stream_mix_add --shape 3,2,512 --dtype float32"
    with executor("stand-in"), pytest.raises(SystemExit, match="parity fails"):
        benchmark.main(command.split())
    assert ops.tiling.token_tiling is usual  # or what is called next runs with the last one tried
    assert len(checked) > 10 and {gradients for gradients, *_ in checked} == {True, False}
    assert all(threads == forced for _, _, forced, threads in checked)
    out = capsys.readouterr().out
    assert out.count("<- best") == 2 and out.count("<- default") >= 1
    lines = [line for line in out.splitlines() if line.startswith("vec")]
    for best, worse in zip(lines, lines[1:], strict=False):  # each is faster than the one before
        last = "backward" in best or "backward" in worse and "forward" in best
        assert ("<- best" in best) == (last and "forward" in best)
    assert "<- best" in lines[-1]


def test_parity_of_layers_and_stacks(monkeypatch, uncompiled):
    """Of --overhead its layers, of --decode the ops that have no gradient, as they are timed."""
    small(monkeypatch)
    with executor("stand-in") as launched:
        cases = {}
        for section in ("overhead", "decode"):
            launched.clear()
            rows = benchmark.verify(section, "sublayer", (2, 2, 8), "bfloat16", ["forward"], None)
            assert all(row["ok"] and row["direction"] == "forward" for row in rows)
            assert launched and not [v for v in launched if "backward" in v[1]]
            cases[section] = [row["op"] for row in rows]
        assert cases == {"overhead": ["MHCLayer", "HyperConnection"], "decode": ["sublayer"]}
        given, usual = [], benchmark.worst_error
        record = lambda *a, **options: given.append(options) or usual(*a, **options)  # noqa: E731
        monkeypatch.setattr(benchmark, "worst_error", record)
        benchmark.verify("decode", "single_pass", (2, 2, 8), "float32", ["forward"], None)
        assert given == [{"differentiable": False}]
        plain = ops.stream_mix_add
        wrong = lambda *a, use_metal=True, **o: plain(*a, **o) * (1 + use_metal)  # noqa: E731
        monkeypatch.setattr(ops, "stream_mix_add", wrong)
        rows = benchmark.verify("overhead", "sublayer", (2, 2, 8), "bfloat16", ["forward"], None)
        assert {row["op"]: row["ok"] for row in rows} == {
            "MHCLayer": True,
            "HyperConnection": False,
        }


# ---- what is timed


class Clock:
    """A perf_counter whose time passes only in calls of what is timed."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "room", lambda: 1 << 30)

    def op(self, seconds):
        """An op whose next call takes the next of these seconds, the last of them from then on."""
        calls, left = [], list(seconds)

        def run(*arrays):
            calls.append(arrays)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return mx.zeros(1)

        return run, calls


def test_race(monkeypatch):
    """Five rounds in turn, after warm-up; every input set, in rotation."""
    clock, sets = Clock(monkeypatch), [[k] for k in range(3)]
    warm, round_of = 1 + 3 + 3, 5  # a call, the sets, the sets timed; then rounds of 5 calls
    seconds = [100.0] * 4 + [0.75] * 3
    for k in (50.0, 4.0, 1.0, 3.0, 2.0, 7.0):  # the first is for the allocator
        seconds += [k - 1] * 4 + [k + 4]
    slow, calls = clock.op(seconds)
    fast, others = clock.op([0.5])
    order = []
    times, more = timing.race(
        20.0,
        ((lambda *a: order.append("slow") or slow(*a)), sets),
        ((lambda *a: order.append("fast") or fast(*a)), sets[:1]),
    )
    assert times == pytest.approx([4.0, 1.0, 3.0, 2.0, 7.0]) and more == [0.5] * 5
    assert len(calls) == warm + 6 * round_of and len(others) == 3 + 6 * 8
    assert [a for (a,) in calls[warm:]] == [0, 1, 2, 0, 1] * 6
    turns = [one for one, last in zip(order, [None, *order], strict=False) if one != last]
    assert turns == ["slow", "fast"] * 7  # the warm-up, and six rounds
    clock.now, few = 0.0, clock.op([1e3])  # too slow for its sets: each of them runs all the same
    timing.race(1.0, (few[0], sets))
    assert [a for (a,) in few[1]][-3:] == [0, 1, 2]


def test_each_and_spread(monkeypatch):
    clock = Clock(monkeypatch)
    call, calls = clock.op([50.0, 50.0, 1.0, *range(1, 6)])
    assert timing.each(5.0, call) == [1, 2, 3, 4, 5]
    assert len(calls) == 2 + 1 + 5  # to warm up, to count, and timed
    assert timing.spread([4.0, 2.0, 3.0, 9.0, 1.0]) == pytest.approx((6.5 - 1) / 3)


def test_input_sets(monkeypatch):
    made = []

    def make(size=1000):
        made.append(mx.ones(size))
        return [made[-1]]

    for cache, count in ((1, 2), (9000, 3), (12000, 3), (12001, 4), (1 << 30, timing.MOST_SETS)):
        monkeypatch.setattr(timing, "CACHE", cache)
        made.clear()
        sets = timing.input_sets(make)
        assert len(sets) == count and [s[0] is a for s, a in zip(sets, made, strict=True)]
        assert len({id(s[0]) for s in sets}) == count
    assert timing.CACHE >= 1 << 28 or cache == 1 << 30


def test_both_are_compiled(monkeypatch):
    """The op and the baseline, of which without kernels the first is."""
    compiled, raced = [], []

    def compile(f):
        compiled.append(lambda *a: f(*a))
        return compiled[-1]

    def race(budget, *contestants):
        raced.extend(f for f, _ in contestants if f is not mx.abs)
        return [[1.0]] * len(contestants)

    monkeypatch.setattr(mx, "compile", compile)
    monkeypatch.setattr(benchmark, "race", race)
    for direction in timed.DIRECTIONS:
        Bench(1.0, None).row("mhc_static", direction, (2, 2, 2), "float32", None)
        assert len(raced) == (1 if direction == "backward" else 2)
        assert all(f in compiled for f in raced)
        raced.clear()
        benchmark.reference_row(Bench(1.0, None), "mhc_static", direction, (2, 2, 2), "float32")
        assert [f in compiled for f in raced] == [True, False]
        raced.clear()


def rows_of_fake(monkeypatch, times, direction="forward", **options):
    """A row, and what was raced, where the op, a copy and the reference take these times."""
    raced = []

    def race(budget, *contestants):
        raced.extend(contestants)
        return [list(t) for t in times]

    monkeypatch.setattr(benchmark, "race", race)
    monkeypatch.setattr(benchmark, "input_sets", lambda make: [make(), make()])
    bench = Bench(1.0, options.pop("peak", None))
    row = bench.row("stream_mix_add", direction, (6, 4, 8), "bfloat16", 64, **options)
    return bench, row, raced


def test_a_row(monkeypatch):
    op, copy, plain = (
        1e-6 * mx.array([[5, 1, 3, 2, 9], [4, 1, 1.5, 1, 6], [12, 1, 6, 5, 30]])
    ).tolist()
    bench, row, raced = rows_of_fake(monkeypatch, [op, copy, plain], peak=2.0)
    size = 9 * 6 * 8 * 2  # rows of C, in bytes
    want = {"us": 3.0, "spread": 8 / 3, "gbps": size / 3e3, "percent_of_copy": 50.0}
    want |= {"percent_of_peak": 100 * size / 3e3 / 2, "speedup_vs_compiled": 2.0}
    assert {k: row[k] for k in want} == pytest.approx(want)
    assert (row["op"], row["direction"], row["dtype"]) == ("stream_mix_add", "forward", "bfloat16")
    assert row["shape"] == [6, 4, 8] and row["threads_per_group"] == 64
    ours, theirs, reference = raced
    (a,) = theirs[1][0]
    assert theirs[0] is mx.abs and a.dtype == mx.float32 and 2 * a.nbytes == size
    assert bench.copy_gbps == pytest.approx(2 * a.nbytes / 1.5e3)  # read, and written
    assert ours[1] is reference[1] and len(ours[1]) == 2
    assert [(a.shape, a.dtype) for a in ours[1][0]][:2] == [
        ((6, 4, 8), mx.bfloat16),
        ((6, 8), mx.bfloat16),
    ]


def test_what_races(monkeypatch):
    """The op with its kernels and threads against the reference without any, in each direction."""
    for direction, results in (("forward", 1), ("backward", 4), ("forward+backward", 5)):
        with executor("stand-in"), monkeypatch.context() as patch:
            launches, run = [], launch.run

            def seen(*a, launches=launches, run=run):
                launches.append((a[0], a[4]))
                return run(*a)

            patch.setattr(launch, "run", seen)
            times = [[1.0]] * (2 if direction == "backward" else 3)
            _, row, raced = rows_of_fake(patch, times, direction)
            counts = []
            for f, sets in (raced[0], *raced[2:]):
                launches.clear()
                made = f(*sets[0])
                mx.eval(made)
                assert len(timed.several(made)) == results
                counts.append({name for name, _ in launches})
                assert {threads for name, threads in launches if "sum" not in name} <= {64}
        assert counts[0] and counts[1:] == [set()] * (len(raced) - 2)
        assert row["direction"] == direction
        assert (row["speedup_vs_compiled"] is None) == (direction == "backward")


def test_decode_and_its_stacks(monkeypatch):
    """Times are of a sublayer: of one stack by kernels, of a shorter one without."""
    small(monkeypatch)
    stacks = []

    def each(budget, f):
        stacks.append(timing.dispatches(f()))
        return [[3e-6, 6e-6, 30e-6], [2e-6, 8e-6, 10e-6]][len(stacks) - 1]

    monkeypatch.setattr(benchmark, "each", each)
    monkeypatch.setattr(benchmark, "gpu_time", lambda f, calls: 5e-6)
    with executor("stand-in"):
        row = benchmark.decode(Bench(1.0, None), "sublayer", (2, 2, 8))
    assert row["us"] == pytest.approx(2.0) and row["plain_us"] == pytest.approx(4.0)
    assert row["speedup_vs_compiled"] == pytest.approx(2.0)
    assert row["gpu_us"] == pytest.approx(2.5)
    assert stacks[0]["CustomKernel"] == stacks[1]["CustomKernel"] == 0  # the stand-in has none
    assert stacks[1].total() > stacks[0].total() / 3


# ---- options


@pytest.mark.parametrize("shape", ["1,2", "0,4,8", "1,2,3,4", "a,b,c", "1,65,8", "65536,64,4096"])
def test_shapes(shape, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--op", "mhc_pre", "--shape", shape])
    error = capsys.readouterr().err
    assert "--shape must" in error and f"but is {shape}" in error
