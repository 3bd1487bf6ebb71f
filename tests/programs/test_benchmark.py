"""benchmark.py has modes, writes JSON, and reads it."""

import contextlib
import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from proof import executor

import benchmark
from benchmarks import cases, overhead, processes
from benchmarks.report import SECTIONS, check_figures, show
from mhc_mlx import launch, ops
from mhc_mlx.commands import text
from mhc_mlx.device_report import layers, measure, parity, suite, timing
from mhc_mlx.device_report.measure import Bench
from programs.figures import RESULT, figure, shorten

ROOT = Path(__file__).parents[2]


def test_modes(monkeypatch):
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    for module in (cases, timing):
        monkeypatch.setattr(module, "memory", lambda: 1 << 36)

    def chosen(*argv):
        return benchmark.parse(argv).chosen

    assert list(chosen()) == list(chosen("--op", "mhc_pre", "--sweep")) == ["rows"]
    assert list(chosen("--all")) == list(SECTIONS[:4])
    assert list(chosen("--decode", "--sizes")) == ["sizes", "decode"]
    table = chosen()["rows"]
    assert {op for op, _, _ in table} == set(suite.OPS)
    for op in suite.TARGETS:
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
    """The default table has the shapes that the README has figures of, and the preset those that
    other projects measure: with others, figures could not be compared with theirs."""
    lists = {"mhc_static": [(16384, 4, 1024), (8192, 8, 1024), (64, 32, 1280)]}
    lists |= {"mhc_layer": [(320, 4, 1280)], "sinkhorn_knopp": [(65536, 4, 4)]}
    lists |= dict.fromkeys(suite.TARGETS, [(65536, 4, 1024), (16384, 4, 4096)])
    lists["mhc_pre_norm"] = lists["mhc_pre"]
    qwen = [(T, 4, 2560) for T in (1, 8, 512, 2048, 8192)]
    lists |= dict.fromkeys(("stream_norm", "stream_norm_write_back", "gate_mix"), qwen)
    usual = [(16384, 4, 1024)]
    assert {op: lists.get(op, usual) for op in suite.OPS} == cases.TABLE
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
    assert cases.PRESETS == {"seeds": want}
    assert cases.GRID == {
        4: (1024, 1280, 2560, 4096, 5120, 7168),
        **dict.fromkeys((2, 8, 16), (1024, 4096)),
    }
    assert cases.DECODE == [(T, 4, C) for C in (4096, 5120, 7168) for T in (1, 2, 4, 8, 16)]
    assert cases.OVERHEAD == [(1, 4, 4096), (16384, 4, 1024)]


def test_the_cache_is_given_back_once_it_is_large(monkeypatch):
    """A check and a row clear it: else arrays of a shape before would leave no memory."""
    cleared = []
    for module in (measure, parity):
        monkeypatch.setattr(module, "array_limit", lambda: 100)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    monkeypatch.setattr(parity, "worst_error", lambda *_, **__: 0.0)
    monkeypatch.setattr(measure, "input_sets", lambda make: [])
    monkeypatch.setattr(measure, "race", lambda *_: [[1.0], [1.0]])
    case = ("stream_aggregate", (2, 2, 8), "float32")
    for cached, count in ((0, 0), (100, 0), (101, 1)):
        monkeypatch.setattr(mx, "get_cache_memory", lambda cached=cached: cached)
        cleared.clear()
        parity.verify("rows", *case, ["forward"], None)
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
    assert {r["op"] for r in result["verified"]} == set(cases.TABLE)
    largest = max(r["error"] for r in result["verified"])
    told = f"parity: {len(result['verified'])} cases, largest relative error {largest:.1e}"
    assert told in capsys.readouterr().out.splitlines()


def test_what_fails_parity_is_not_timed(tmp_path, monkeypatch):
    plain = ops.mhc_head
    monkeypatch.setattr(ops, "mhc_head", lambda *a, **options: 1.1 * plain(*a, **options))
    shorten(monkeypatch)
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
    """Note launches as `timing.launches` does, whose spies see kernels built: here none is."""
    seen, run = [], launch.run

    def noted(name, *options):
        seen.append({"kernel": name, "source_bytes": 7, "template_arguments": 3})
        return run(name, *options)

    launch.run = noted
    try:
        yield seen
    finally:
        launch.run = run


def test_every_mode_writes_its_section(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    file = tmp_path / "a.json"
    monkeypatch.setattr(layers, "launches", launches_of_the_stand_in)
    with executor("stand-in"):
        benchmark.main(["--quick", "--sizes", "--decode", "--overhead", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["rows"] == [] and all(r["ok"] for r in result["verified"])
    printed = capsys.readouterr().out  # it has each row as it is measured
    for section in ("sizes", "decode", "overhead"):
        assert result[section] and all(show(row) in printed for row in result[section])
    assert [(r["op"], r["shape"]) for r in result["sizes"]] == [
        (op, [T, 2, 8]) for op in cases.GROWING for T in (1, 4)
    ]
    assert [r["op"] for r in result["decode"]] == ["decode sublayer", "decode single_pass"]
    for row in result["decode"]:
        assert row["speedup_vs_compiled"] == pytest.approx(row["plain_us"] / row["us"])
        assert row["dispatches"] > 0 and row["plain_dispatches"] > 20
    assert [r["op"] for r in result["overhead"]] == ["MHCLayer", "HyperConnection"]
    for r in result["overhead"]:
        assert r["us"] > 0 and r["eager_us"] > 0 and r["python_us"] > 0 and r["many_us"] > 0
    names = [[launch["kernel"] for launch in r["launches"]] for r in result["overhead"]]
    assert names[0] == ["mhc_fused"]  # one call of each layer launches these
    assert len(set(names[1])) == len(names[1]) > 1 and names[1][-1] == "stream_mix_add"
    assert printed.count("stream_mix_add: source 7 bytes, 3 template arguments") == 1


def test_a_row_as_text():
    """Every figure that a section has stands under its name."""
    times = {"eager_us": 1.0, "many_us": 2.0, "gpu_us": 3.0, "plain_us": 4.0}
    times |= {"python_us": 5.0, "python_eager_us": 6.0}
    printed = show(figure(spread=0.25, percent_of_peak=40.0, speedup_vs_compiled=8.0) | times)
    want = "10.0 us +- 25% | 1 GB/s | 50 % of copy | 40 % of peak | eager 1.0 | of many 2.0 | "
    want += "GPU alone 3.0 | plain 4.0 | Python 5.0 | Python eager 6.0 | 8.0 x compiled reference"
    assert " ".join(printed.partition("|")[2].split()) == want


@pytest.mark.parametrize("devices", [None, "4,5"])
def test_medians_over_processes(devices, tmp_path, monkeypatch):
    """They run one after another, or as many at once as there are GPUs."""
    times, running, used = iter([30.0, 10.0, 20.0]), [], []

    class Process:
        def __init__(self, command, env):
            us = next(times)
            row = figure(us=us, gbps=1 / us, percent_of_copy=us, speedup_vs_compiled=2.0)
            row |= {"percent_of_peak": us}
            slow = figure(op="decode", us=us, plain_us=8 * us, speedup_vs_compiled=8.0)
            assert "--plot" not in command and "x.png" not in command
            assert ("--no-baseline" in command) == bool(used)
            case = {"op": "mhc_pre", "error": us, "ok": us < 25}
            result = RESULT | {"rows": [row], "decode": [slow], "verified": [case]}
            result |= {"copy_gbps": us}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(result))
            used.append(env.get("CUDA_VISIBLE_DEVICES"))
            running.append(self)
            assert len(running) <= (2 if devices else 1)

        def wait(self):
            running.remove(self)
            return 0

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    argv = ["--processes", "3", "--json", "all.json", "--plot", "x.png", "--quick"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with executor("stand-in"), pytest.raises(SystemExit, match="parity fails.*'error': 30.0"):
        benchmark.main(argv)
    assert (tmp_path / "x.png").exists()
    assert used == (["4", "5", "4"] if devices else [None] * 3)
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
    parsed = []

    class Process:
        def __init__(self, command, env):
            args = benchmark.parse(command[2:])
            parsed.append((args.baseline, args.processes))
            Path(command[command.index("--json") + 1]).write_text(json.dumps(RESULT))

        def wait(self):
            return 0

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cases, "fitting", lambda found, *_: found)
    op = ["--op", "stream_mix_add"] if sections == "--sweep" else []
    with executor("stand-in"):
        benchmark.main(["--processes", "3", *sections.split(), *op])
    later = None if sections in ("--decode", "--overhead", "--sweep") else False
    assert parsed == [(None, 1), (later, 1), (later, 1)]


def test_compare(tmp_path, capsys):
    same, gone, new = (figure(op=op) for op in ("mhc_pre", "mhc_head", "mhc_static"))
    before = RESULT | {"rows": [same, gone], "sizes": [figure(op="mhc_pre")]}
    after = RESULT | {"rows": [same | {"us": 8.0}, new], "sizes": [figure(op="mhc_pre", us=15.0)]}
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


def test_results_have_the_schema_and_a_line_for_each_row():
    provenance = {"device", "mlx", "date", "command"}
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert len(files) >= 13
    for file in files:
        result = json.loads(file.read_text())
        assert file.read_text() == text(result), file
        if "runs" in result:  # experiment.py made it, in several processes
            assert len(result["runs"]) == 15
            assert all(provenance <= set(run) for run in result["runs"])
            continue
        assert provenance <= set(result)
        if "predictions" in result:  # the model said it
            assert all(row["us"] > 0 for row in result["predictions"])
        elif "metrics" in result:  # ncu measured every figure of a launch
            assert all(row["ns"] > 0 and row["groups"] > 0 for row in result["kernels"])
        elif "chains" in result:  # benchmarks.gated measured it
            figures = [us for row in result["sites"] for us in row["us"].values()]
            assert figures and all(us > 0 for us in figures)
        elif "kernels" in result:  # ncu measured it
            for k in result["kernels"]:
                rows = k["rows_read"] + k["rows_written"]
                assert k["us"] > 0 and (k["kernel"] == "mhc_pre" or rows < 1.05 * k["floor"])
        elif "copy_gbps" in result:
            assert check_figures(result) is None
        elif "copy_gb_s" in result:
            overhead.check_record(result)
            assert {"dim", "floor_ms", "plain", "fused"} <= set(result["results"][0])
        else:  # mhc_mlx.models measured it
            of_sites = result.get("per sublayer", [result.get("check")])
            times = [t for k in of_sites for t in k["times"]]
            assert times and all(0 < value < float("inf") for t in times for value in t.values())


def test_help_says_the_docstring_as_it_is():
    printed = benchmark.options.parser(benchmark.__doc__, cases.PRESETS).format_help()
    assert benchmark.__doc__.strip() in printed
    for name in ("json", "plot", "compare", "from"):
        assert f"  --{name} FILE" in printed


@pytest.mark.parametrize("shape", ["1,2", "0,4,8", "1,2,3,4", "a,b,c", "1,65,8", "65536,64,4096"])
def test_shapes(shape, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--op", "mhc_pre", "--shape", shape])
    error = capsys.readouterr().err
    assert "--shape must" in error and f"but is {shape}" in error
