"""``python -m mhc_mlx.device_report`` runs from a wheel, loses nothing, and says what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from proof import executor, simulator

from mhc_mlx import launch, ops
from mhc_mlx.device_report import __main__ as command
from mhc_mlx.device_report import machine, parity, parts, shapes, suite, summary, variants
from programs import figures
from programs.test_packaging import unpack_wheel

uncompiled = figures.uncompiled
REFUSAL = "Thread group size (1056) is greater than  the maximum allowed threads per threadgroup "
# As MLX words it, in mlx/backend/metal/custom_kernel.cpp and device.cpp.
REFUSED = ValueError(f"{REFUSAL}(832).")
UNCOMPILED = RuntimeError(
    "[metal::Device] Unable to build metal library from source\n"
    "program_source:87:3: warning: unused\nprogram_source:91:5: error: no member named 'foo'\n"
)


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory):
    """from_wheel(arguments, folder) runs the command with MLX and this wheel, and nothing else."""
    site = tmp_path_factory.mktemp("wheel")
    unpack_wheel(site)
    (site / "mlx").symlink_to(Path(mx.__file__).parent)
    flags = ["-S", "-c"]  # no site-packages
    start = f"import runpy, sys; sys.path[:0] = [{str(site)!r}]; "
    start += "runpy.run_module('mhc_mlx.device_report', run_name='__main__', alter_sys=True); "

    def run(arguments: list[str], folder: Path, before: str = "") -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        program = start.replace("runpy.run", f"{before}\nrunpy.run") if before else start
        return subprocess.Popen(
            [sys.executable, *flags, program, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def read(path: Path) -> dict:
    report = json.loads(path.read_text())
    command.check_report(report)
    return report


def test_it_runs_to_the_end_from_a_wheel(from_wheel, tmp_path):
    no_numpy = "sys.modules['numpy'] = None  # an import of it fails"
    process = from_wheel([], tmp_path, no_numpy)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == "", errors
    report = read(tmp_path / "mhc-report.json")
    assert report["finished"] and not any(report["missing"].values())
    assert report["machine"]["mhc_metal"] != "not installed"
    assert [len(report[part]) > 0 for part in parts.PARTS] == [True] * 4
    if launch.backend() is None:
        rows = [row for part in parts.PARTS for row in report[part]]
        assert {row.get("why") for row in rows} == {parts.NO_GPU}
        assert all(row["reference_is_finite"] for row in report["parity"])
        assert all(row["plain_us"] > 0 for row in report["times"] + report["decode"])
    assert {row["op"] for row in report["parity"]} == set(suite.OPS)
    lines = printed.splitlines()
    assert len(lines) <= 30 and f"MLX {report['machine']['mlx']}" in lines[1]
    again = from_wheel(["--from", "mhc-report.json"], tmp_path).communicate(timeout=60)
    assert again == ("\n".join(lines[:-1]) + "\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["mhc-report.json"]


BLOCKED = """
import mhc_mlx.device_report.parts as parts, time
usual, done = parts.compare, []
def compare(case):
    if len(done) == 3:
        print("blocked", flush=True)
        time.sleep(60)
    done.append(case)
    return usual(case)
parts.compare = compare
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_stop_loses_no_row(name, from_wheel, tmp_path):
    process, number = from_wheel(["--json", "r.json"], tmp_path, BLOCKED), signal.Signals[name]
    assert process.stdout.readline() == "blocked\n"
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number) and errors == ""
    report = read(tmp_path / "r.json")
    assert not report["finished"] and len(report["parity"]) == 3
    assert report["stopped"] == (None if killed else name)
    running = report["running"].removeprefix("parity: ")
    assert report["missing"]["parity"][0] == running and len(report["missing"]["times"]) == 5
    assert report["missing"]["variants"] == [] and report["variants"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    told = "\n".join(command.summary(report))
    assert f"NOT FINISHED: {'it ended' if killed else name} while this ran: parity: " in told
    assert "3 not run, 15 not reached" in told and (killed or told in printed)


def test_every_row_is_in_the_file_before_the_next_starts(on_metal, tmp_path, monkeypatch, capsys):
    """So that a kill at any moment loses at most the row that runs, whose name is there."""
    on_metal({})
    done: list[dict] = []

    def run_job(job):
        report = read(tmp_path / "r.json")
        assert [row for part in parts.PARTS for row in report[part]] == done
        part, name = report["running"].split(": ", 1)
        assert name == job.name == report["missing"][part][0]
        done.append(json.loads(json.dumps(job.row)) | {"ok": None, "why": "a test"})
        return dict(done[-1])

    monkeypatch.setattr(command, "run_job", run_job)
    with pytest.raises(SystemExit) as ended:
        command.main(["--json", str(tmp_path / "r.json")])
    assert ended.value.code == 0 and len(done) > 40
    report = read(tmp_path / "r.json")
    assert [row for part in parts.PARTS for row in report[part]] == done
    assert report["finished"] and not any(report["missing"].values())


def test_wrong_options_end_before_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "measure", None)
    other, link = tmp_path / "other.json", tmp_path / "link.json"
    other.write_text('{"command": "python b.py", "date": "2026-11-22"}')
    link.symlink_to(link)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({"command": command.COMMAND, "date": "", "format": 1}))
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"command": command.COMMAND, "date": "", "format": 0}))
    for argv, message in (
        ("--json", "expected one argument"),
        (f"--json {tmp_path}", "--json must be a file but is the folder"),
        (f"--json {tmp_path}/none/r.json", "--json must be in a folder that exists"),
        (f"--json {other}", "--json must be a new file or a report of .*: its command is python b"),
        (f"--json {link}", "--json must be a file that can be written but is .*leads to itself"),
        (f"--json {damaged}", "it is damaged: KeyError"),
        (f"--json {old}", "its format is 0, and this version reads 1"),
        ("--minutes 0", "--minutes must be positive and finite but is 0.0"),
        ("--minutes nan", "--minutes must be positive and finite but is nan"),
        ("--minutes inf", "--minutes must be positive and finite but is inf"),
        ("--only all", "invalid choice: 'all'"),
        ("--only times --only times", "--only times must be given once"),
        (f"--from {other}", "--from must be a report of .*: its command is python b.py"),
        (f"--from {tmp_path}/none", "--from must be a file but is"),
        (f"--from {other} --only times", "--only does nothing with --from"),
        (f"--from {other} --minutes 1", "--minutes does nothing with --from"),
        (f"--from {other} --json r.json", "--json does nothing with --from"),
    ):
        assert re.search(message, figures.refused(command.main, argv.split(), capsys)), argv


@pytest.fixture
def on_metal(monkeypatch, uncompiled):
    """on_metal(outcomes) lets the command run as on a Mac, by the stand-in on shapes of a moment;
    the launches with too many threads end as the outcomes say, by name of the body."""
    figures.shorten(monkeypatch)
    monkeypatch.setattr(parts, "BUDGET", 1e-3)
    monkeypatch.setattr(parts, "array_limit", lambda: 1 << 20)
    for name in ("SITES", "OTHER_DTYPES", "OTHER_STREAMS", "TIMED_SITES"):
        monkeypatch.setattr(shapes, name, [(2, 2, 8)])
    monkeypatch.setattr(shapes, "DECODED", [(1, 2, 8)])
    monkeypatch.setattr(machine, "power", lambda: {})

    recording = launch.run

    def prepare(outcomes):
        usual = launch.run

        def run(name, inputs, outputs, groups, threads, template, verbose=False):
            if launch._recorded.get() is not None:
                return recording(name, inputs, outputs, groups, threads, template)
            if threads != variants.TOO_MANY_THREADS:
                return usual(name, inputs, outputs, groups, threads, template, verbose)
            assert groups == 1
            raise outcomes.get(name, ValueError(f"{REFUSAL}(1024)."))

        monkeypatch.setattr(launch, "run", run)

    with executor("stand-in"):
        yield prepare
        monkeypatch.undo()


def test_as_on_a_mac(on_metal, tmp_path, capsys):
    on_metal({"mhc_pre_backward_coefficients": REFUSED, "mhc_seam": UNCOMPILED})
    with pytest.raises(SystemExit) as ended:
        command.main(["--json", str(tmp_path / "r.json")])
    assert ended.value.code == 1
    report, told = read(tmp_path / "r.json"), capsys.readouterr().out
    by_body = {row["body"]: row for row in report["variants"]}
    tight = by_body["mhc_pre_backward_coefficients"]
    assert tight["ok"] and (tight["most_threads"], tight["most_registers"]) == (832, 64)
    assert by_body["stream_aggregate"]["most_registers"] == 52
    failed = by_body["mhc_seam"]
    assert not failed["ok"] and failed["error"] == str(UNCOMPILED)  # the whole message
    assert all(row["ok"] for row in report["parity"])
    assert {row["dtype"] for row in report["parity"]} == set(suite.DTYPES)
    assert {row["direction"] for row in report["times"]} == {"forward", "forward+backward"}
    gains = [row["speedup_vs_compiled"] for row in report["times"] + report["decode"]]
    assert all(gain > 0 for gain in gains) and len(gains) >= 10
    for row in report["decode"]:
        assert row["speedup_vs_compiled"] == pytest.approx(row["plain_us"] / row["us"])
    assert "compile FAILS: mhc_seam bfloat16 2,2,8: program_source:91:5: error: no member" in told
    assert "fewer than 1024 threads fit: " in told and "mhc_pre_backward_coefficients 832" in told
    assert re.search(r"single_pass forward 2,2,8: \d+ \(\d+\.\d x\)", told)
    assert len(told.splitlines()) <= 40


def test_a_wrong_kernel_fails(on_metal, tmp_path, capsys, monkeypatch):
    on_metal({})
    right = ops.stream_aggregate
    with monkeypatch.context() as patch:
        patch.setattr(ops, "stream_aggregate", lambda *a, **o: 1.1 * right(*a, **o))
        with pytest.raises(SystemExit) as ended:
            command.main(["--json", str(tmp_path / "r.json"), "--only", "parity"])
    assert ended.value.code == 1
    report, told = read(tmp_path / "r.json"), capsys.readouterr().out
    assert {row["op"] for row in report["parity"] if not row["ok"]} == {"stream_aggregate"}
    assert "parity FAILS: stream_aggregate forward+backward bfloat16 2,2,8: error 0." in told
    assert set(report["missing"]) == {"parity"} and "times" not in report


def test_time_that_is_up_is_told(on_metal, tmp_path, capsys):
    on_metal({})
    with pytest.raises(SystemExit) as ended:
        command.main(["--json", str(tmp_path / "r.json"), "--minutes", "1e-9"])
    assert ended.value.code == 0
    report = read(tmp_path / "r.json")
    assert report["finished"] and not any(report[part] for part in parts.PARTS)
    assert all(report["missing"].values()) and "not reached" in capsys.readouterr().out


def test_each_part_leaves_time_for_the_next(monkeypatch):
    """Of 10.5 s, where each row takes one: none starts after the share of its part."""
    clock = [0.0]

    def run():
        clock[0] += 1
        return {"ok": True}

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    jobs = {part: [parts.Job(str(k), {}, run) for k in range(20)] for part in parts.PARTS}
    report: dict = {part: [] for part in parts.PARTS}
    report["missing"] = {part: [job.name for job in jobs[part]] for part in parts.PARTS}
    output = SimpleNamespace(update=lambda report: None)
    command.fill(report, jobs, SimpleNamespace(minutes=10.5 / 60, output=output))
    assert [len(report[part]) for part in parts.PARTS] == [5, 2, 2, 1]
    assert [len(report["missing"][part]) for part in parts.PARTS] == [15, 18, 18, 19]


def test_a_case_that_does_not_fit_is_left_out(monkeypatch):
    case = ("mhc_pre", "forward+backward", (2048, 4, 4096), "bfloat16")
    needed = parity.needed_bytes("mhc_pre", (2048, 4, 4096), mx.bfloat16)
    monkeypatch.setattr(parts, "memory", lambda: needed)
    assert parts.if_it_fits(case, lambda: {"ok": True}) == {"ok": True}
    monkeypatch.setattr(parts, "memory", lambda: needed - 1)
    row = parts.if_it_fits(case, lambda: {"ok": True})
    assert row["ok"] is None and row["why"].startswith("left out: it needs ")


def test_limits_of_threads():
    """MLX's refusal is read; a launch with more threads than fit is wrong, and so is another end
    of the launch."""
    assert variants.thread_limit(str(REFUSED)) == 832
    assert variants.thread_limit(str(UNCOMPILED)) is None
    registers = {1024: 52, 896: 59, 832: 64, 512: 104, 448: 118, 384: 128, 64: 128}
    assert {k: variants.most_registers(k) for k in registers} == registers


def test_a_launch_that_needs_more_threads_than_fit(monkeypatch):
    (variant,) = variants.find_variants(
        [("stream_aggregate", "forward", (2, 4, 4096), "bfloat16")], "metal"
    )
    assert variant.launch.threads == 256
    for limit, ok in ((256, True), (224, False)):

        def run(*_, limit=limit):
            raise ValueError(f"{REFUSAL}({limit}).")

        monkeypatch.setattr(launch, "run", run)
        row = variants.compile_on_metal(variant)
        assert row["ok"] is ok and ("error" in row) is not ok
    monkeypatch.setattr(launch, "run", lambda *_: [mx.zeros(1)])
    assert "no limit was named" in variants.compile_on_metal(variant)["error"]
    monkeypatch.undo()


def test_as_on_cuda(on_metal, monkeypatch):
    """A call that runs compiles its variants; MLX's message is the row of one that does not."""
    on_metal({})
    case = ("stream_aggregate", "forward+backward", (2, 2, 8), "bfloat16")
    found = variants.find_variants([case], "cuda")
    assert [v.launch.name for v in found] == ["stream_aggregate", "stream_aggregate_backward"]
    assert variants.compile_on_cuda(case) == {"ok": True}
    usual = launch.run

    def run(name, *call):
        if name.endswith("backward") and launch._recorded.get() is None:
            raise RuntimeError("Failed to compile kernel: NVRTC")
        return usual(name, *call)

    evaluated: list = []
    with monkeypatch.context() as patch:  # MLX compiles, and says what is wrong, at evaluation
        patch.setattr(mx, "eval", evaluated.append)
        variants.compile_on_cuda(case)
    assert [a.shape for a in evaluated[-1]] == [(2, 8), (2, 2, 8), (2, 2)]
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(shapes, "variant_cases", lambda kernels: [case])
    jobs = parts.variant_jobs()
    rows = [command.run_job(job) for job in jobs]
    assert [row["error"] for row in rows] == ["Failed to compile kernel: NVRTC"] * 2


def test_what_mlx_refuses_is_a_row_that_fails():
    row = {"op": "mhc_pre", "direction": "forward", "dtype": "float32", "shape": [2, 2, 8]}
    for error, words in (
        (RuntimeError("no memory"), "no memory"),
        (ValueError("no shape"), "no shape"),
        (MemoryError(), "MemoryError"),
    ):

        def run(error=error):
            raise error

        got = command.run_job(parts.Job("a name", row, run))
        assert got == row | {"ok": False, "error": words}
        for lines in summary.LINES.values():
            assert "0 right, 1 fail" in lines([got], 0)[0]
            assert any(k.endswith(f"float32 2,2,8: {words}") for k in lines([got], 0))


def test_a_refused_launch_has_the_text_of_the_true_one(monkeypatch):
    """Its arrays are shorter, and MLX's text depends on their dtype and on whether they have fewer
    than 8 elements."""
    cases = [(op, "forward+backward", (1, 4, 32), "bfloat16") for op in ("single_pass", "mhc_pre")]
    seen: list = []
    found = variants.find_variants(cases, "metal")
    assert len(found) > 6
    for variant in found:
        call = variant.launch
        monkeypatch.setattr(launch, "run", lambda *call: seen.append(call) or [])
        variants.refused_launch(call)
        monkeypatch.undo()
        name, inputs, outputs, groups, threads, template = seen.pop()
        assert (groups, threads) == (1, 1056)
        true = {k: v and mx.zeros(*v) for k, v in call.inputs.items()}
        texts = [
            simulator.generated(name, arrays, specs, groups, 32, template)
            for arrays, specs in ((inputs, outputs), (true, call.outputs))
        ]
        assert texts[0] == texts[1], name


def test_variants_differ_in_their_text():
    """No two variants have the same text, and each text of the calls is a variant's."""
    calls = [("single_pass", "inference", (T, 4, 32), "bfloat16") for T in (1, 2, 3)]
    calls += [("single_pass", "forward", (T, 4, 32), "bfloat16") for T in (1, 2)]
    calls += [("stream_aggregate", "forward", (3, 4, 32), k) for k in ("float16", "bfloat16")]
    calls += [("stream_aggregate", "forward", (3, 8, 32), "bfloat16")]  # differs by its template
    texts = {
        simulator.generated(
            call.name, {k: v and mx.zeros(*v) for k, v in call.inputs.items()}, *call[2:]
        )
        for case in calls
        for call in variants.record(case, "metal")
    }
    found = variants.find_variants(calls, "metal")
    # Inference has 2, a forward 2 others, of which one reads h_pre: a single token's has fewer than
    # 8 elements, and so another text. stream_aggregate has 3.
    assert len(found) == len(texts) == 2 + 2 + 1 + 3


def test_variants_are_those_of_inference_too():
    """At one token a site without gradients is two launches, with them three."""
    case = ("single_pass", "inference", (1, 4, 32), "bfloat16")
    assert len(variants.record((case[0], "forward", *case[2:]), "metal")) == 3
    assert len(variants.record(case, "metal")) == 2


def test_main_shapes():
    """Every op is compiled, and compared in both directions, in each dtype and number of streams;
    what is timed is compiled before."""
    compiled, compared = set(shapes.variant_cases(True)), set(shapes.parity_cases(True))
    for op in suite.OPS:
        for name in suite.DTYPES:
            assert shapes.case(op, "forward+backward", (2048, 4, 4096), name) in compared
        for n in (2, 4, 8, 16):
            assert shapes.case(op, "forward+backward", (2048, n, 4096), "bfloat16") in compared
    for op in shapes.SITE_OPS:
        for T in (1, 8, 512, 2048):
            assert (op, "inference", (T, 4, 4096), "bfloat16") in compared
    assert compared < compiled
    assert set(shapes.timed_cases(True)) < compiled
    chains = {(op, "inference", *rest) for op, _, *rest in shapes.decode_cases(True)}
    assert chains < compiled and all(shape[0] == 1 for _, _, shape, _ in chains)


def test_power_of_a_mac():
    battery = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=21561443)\t85%; discharging; 5:12 remaining present: true"""
    assert machine.battery(battery) == {"source": "Battery Power", "battery_percent": 85}
    assert machine.battery("Now drawing from 'AC Power'\n") == {"source": "AC Power"}
    therm = "Note: No thermal warning level has been recorded\n\tCPU_Speed_Limit \t= 70\n"
    assert machine.limits(therm) == {"CPU_Speed_Limit": 70}
    settings = (
        "Currently in use:\n standby              1\n lowpowermode         1\n powermode  0\n"
    )
    assert machine.power_modes(settings) == {"lowpowermode": 1, "powermode": 0}
    assert machine.battery("") == machine.limits("") == machine.power_modes("") == {}
    assert machine.printed("no-such-command") == machine.printed("false") == ""
