"""benchmarks/overhead.py times a copy and steps, adds up, and reads and writes records."""

import json
import math
import re
import shlex
import statistics
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest

from benchmarks import overhead
from programs import trainer

on_the_cpu, uncompiled = trainer.on_the_cpu, trainer.uncompiled
FIGURES = {"ms": 30.0, "ms_min": 20.0, "ms_max": 40.0, "peak_gib": 1.5, "parameters": 7}
FIGURES |= {"losses": [5.0, 4.0]}
RECORD = {"device": "some GPU", "mlx": "1", "date": "2026-01-01", "copy_gb_s": 2000.0}


def test_bandwidth_of_a_copy(monkeypatch):
    """The device moves 3 GB a second, and takes 0.1 s for an evaluation of any size."""
    now = [0.0]

    def evaluate(results):
        if isinstance(results, list):
            assert all(r.dtype == mx.bfloat16 for r in results)
            now[0] += 0.1 + sum(2 * r.nbytes for r in results) / 3e9

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(mx, "eval", evaluate)
    assert overhead.copy_bandwidth(2) == pytest.approx(3e9)


def test_time_of_a_step_is_a_median_without_the_first(monkeypatch):
    """The first three compile."""
    seconds = [90, 80, 70, 1, 1, 2, 3, 9, 5, 4]
    now, left = [0.0], iter(seconds)

    class Result:
        def item(self):  # the host waits for it
            now[0] += next(left)
            return 4.0

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(overhead, "make_step", lambda *_: lambda *_: (Result(), 0.0, 0.0, 0.0))
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    options = ["--dim", "8", "--depth", "1", "--heads", "1", "--batch", "2", "--context", "16"]
    figures = overhead.measure([*options, "--connection", "plain"], 7)
    want = seconds[3:]
    assert figures["ms"] == 1e3 * statistics.median(want) != 1e3 * statistics.mean(want)
    assert (figures["ms_min"], figures["ms_max"]) == (1e3, 9e3) and figures["losses"] == [4.0] * 10


def test_what_is_added_is_over_plain(monkeypatch, capsys):
    """It is added to a step, and is a share of the whole; rows and bandwidth make the floor."""
    ms = {"plain": 20.0, "fused": 50.0, "reference": 500.0}
    asked = []

    def released(command, steps):
        asked.append((command, steps))
        kind = (
            "plain" if "plain" in command else "reference" if "--no-metal" in command else "fused"
        )
        return FIGURES | {"ms": ms[kind]}

    monkeypatch.setattr(overhead, "released", released)
    options = {"dtype": "bfloat16", "context": 64, "tokens": 256, "depth": 3, "steps": 7}
    args = SimpleNamespace(**options, kinds=["reference", "fused", "plain"])
    result = overhead.overhead(128, args, 1e9)
    floor = 1e3 * 41 * 6 * 128 * 256 * 2 / 1e9  # = rows x sublayers x channels x tokens x bytes
    assert result["floor_ms"] == pytest.approx(floor)
    for kind, added in (("fused", 30.0), ("reference", 480.0)):
        found = [result[kind][k] for k in ("added_ms", "share", "x_floor")]
        assert found == pytest.approx([added, added / ms[kind], added / floor])
    assert "added_ms" not in result["plain"]
    for command, steps in asked:
        named = dict(zip(command[:-1], command[1:], strict=True))
        assert (named["--depth"], named["--batch"], named["--context"]) == ("3", "4", "64")
        assert (named["--dim"], named["--heads"], named["--dtype"]) == ("128", "2", "bfloat16")
        assert steps == (5 if "--no-metal" in command else 7)
    args.dtype = "float32"
    assert overhead.overhead(128, args, 2e9)["floor_ms"] == pytest.approx(floor)


def test_overhead(tmp_path, capsys, uncompiled):
    file = tmp_path / "overhead.json"
    sizes = ["--dims", "8", "--depth", "1", "--tokens", "32", "--context", "16", "--copy-mib", "1"]
    overhead.main([*sizes, "--dtype", "float32", "--steps", "1", "--json", str(file)])
    record = json.loads(file.read_text())
    (result,) = record["results"]
    # 41 rows of 8 float32 move for 32 tokens in 2 sublayers.
    floor = 41 * 2 * 8 * 32 * 4 / record["copy_gb_s"] / 1e6
    assert result["floor_ms"] == pytest.approx(floor)
    added_fused = result["fused"]["added_ms"]
    for kind in ("fused", "reference"):
        added = result[kind]["ms"] - result["plain"]["ms"]
        assert result[kind]["added_ms"] == pytest.approx(added)
        assert result[kind]["x_floor"] == pytest.approx(added / floor)
    assert (
        result["fused"]["losses"] == result["reference"]["losses"][: len(result["fused"]["losses"])]
    )
    out = capsys.readouterr().out
    assert "both the reference on the CPU" in out and "| 8 | fused |" in out
    assert "dim 8: the losses of 4 steps" in out and "by at most 0.0e+00 bits" in out
    apart = json.loads(file.read_text())
    apart["results"][0]["reference"]["losses"][1] += 0.25
    (tmp_path / "apart.json").write_text(json.dumps(apart))
    overhead.main(["--from", str(tmp_path / "apart.json")])
    assert "by at most 2.5e-01 bits per byte" in capsys.readouterr().out
    table = next(line for line in out.splitlines() if line.startswith("| 8 | fused |"))
    overhead.main(["--from", str(file)])
    assert table in capsys.readouterr().out
    overhead.main(["--from", str(file), "--copy-gb-s", str(record["copy_gb_s"] / 2)])
    halved = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 | fused |")
    )
    assert halved.split("|")[7].strip() == f"{added_fused / floor / 2:.2f}"


def test_overhead_in_any_order(capsys, uncompiled):
    sizes = ["--dims", "8", "--depth", "1", "--tokens", "32", "--context", "16", "--copy-mib", "1"]
    overhead.main([*sizes, "--dtype", "float32", "--steps", "1", "--kinds", "fused", "plain"])
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 |")]
    assert [line.split("|")[2].strip() for line in found] == ["plain", "fused"]
    assert " ms |" in found[1]


@pytest.mark.parametrize(
    "options",
    [
        *(["--steps", "0"], ["--context", "0"], ["--copy-mib", "0"], ["--tokens", "0"]),
        *(["--depth", "0"], ["--dims", "0"], ["--dims", "7"], ["--dims", "200"]),
        *(["--curves", "-1"], ["--context", str(2**20)]),
        *(["--copy-gb-s", "0", "--from", "FILE"], ["--copy-gb-s", "nan", "--from", "FILE"]),
        *(["--copy-gb-s", "0"], ["--from", "missing"], ["--from", "FILE"], ["--from", "."]),
        *(["--json", "missing/overhead.json"], ["--json", "."]),
    ],
    ids=lambda o: " ".join(o),
)
def test_bad_options_of_overhead_are_named(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overhead, "copy_bandwidth", None)  # nothing is measured before
    (tmp_path / "FILE").write_text('{"copy_gb_s": 1, "results": []}')  # no device
    with pytest.raises(SystemExit):
        overhead.main(options)
    found = capsys.readouterr().err.rpartition("error:")[2]
    assert found.strip().startswith(options[0]) and options[1] in found


def test_malformed_records_are_one_error(tmp_path, capsys):
    path = tmp_path / "record.json"
    result = {"dim": 8, "floor_ms": 1.0, "plain": FIGURES}
    result["fused"] = FIGURES | {"added_ms": 3.0, "share": 0.1, "x_floor": 3.0}
    result["reference"] = {"needs_gib": 300.0}
    good = RECORD | {"results": [result]}
    path.write_text(json.dumps(good))
    overhead.main(["--from", str(path)])
    assert "| 8 | fused | 30.0 | 3.0 ms | 10 % | 1.0 ms | 3.00 | 1.5 |" in capsys.readouterr().out

    def changed(**fields):
        return json.dumps(good | {"results": [result | fields]})

    for text in (
        *("", "{", "[]", "7", "null", '"text"', "{}", "[" * 100_000, "\0"),
        *(json.dumps({k: v for k, v in good.items() if k != name}) for name in good),
        *(json.dumps(good | {"copy_gb_s": v}) for v in (0, -1, "7", None, True, 10**400, [])),
        *(json.dumps(good | {"results": v}) for v in ({}, "abc", 7, [7], ["text"], [[]], [{}])),
        *(json.dumps(good | {"device": 7}), '{"copy_gb_s": NaN, "results": []}'),
        *(changed(fused=v) for v in (7, "text", None, [], {}, {"ms": 3})),
        *(changed(dim="8"), changed(floor_ms=None)),
        *(changed(fused=FIGURES | {"losses": v}) for v in (7, "abc", ["a"], None)),
        *(changed(fused=FIGURES | {k: "7"}) for k in ("ms", "peak_gib", "added_ms")),
        changed(plain=FIGURES | {"ms": 10**400}),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit):
            overhead.main(["--from", str(path)])
        told = capsys.readouterr()
        must = f"error: --from must be a file (of JSON|that --json wrote) but is {path}: "
        assert re.search(must, told.err), text
        assert told.out == "" and "Traceback" not in told.err
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit):
        overhead.main(["--from", str(path)])
    assert "--from must be a file of JSON" in capsys.readouterr().err


def test_json_replaces_an_earlier_record_alone(tmp_path, monkeypatch, capfd):
    """A link stays one. The file is looked at before anything is measured, and no dim is lost."""
    for name in ("copy_bandwidth", "overhead"):
        monkeypatch.setattr(overhead, name, None)
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "link").symlink_to("notes")
    (tmp_path / "other").write_text('{"device": "some GPU"}')
    must = {"notes": "a file of JSON", "link": "a file of JSON", "other": "a new file or a record"}
    for name, message in must.items():
        with pytest.raises(SystemExit):
            overhead.main(["--json", str(tmp_path / name)])
        assert f"--json must be {message}" in capfd.readouterr().err
    assert (tmp_path / "notes").read_text() == "kept"

    def measured(dim, *_):
        if dim == 16:
            raise KeyboardInterrupt
        return {"dim": dim, "floor_ms": 1.0, "plain": FIGURES | {"losses": [dim / 2, math.nan]}}

    monkeypatch.setattr(overhead, "copy_bandwidth", lambda mib: 2e9)
    monkeypatch.setattr(overhead, "overhead", measured)
    (tmp_path / "dangling").symlink_to("made.json")
    for dim in (8, 24):
        with pytest.raises(KeyboardInterrupt):
            command = ["--dims", str(dim), "16", "--json", str(tmp_path / "dangling")]
            overhead.main(command)
        record = json.loads((tmp_path / "made.json").read_text())
        (result,) = record["results"]
        assert (
            result["plain"] == FIGURES | {"losses": [dim / 2, "nan"]} and record["copy_gb_s"] == 2
        )
        assert record["command"] == shlex.join([*overhead.COMMAND.split(), *sys.argv[1:]])
        assert (tmp_path / "dangling").is_symlink()
    overhead.main(["--from", str(tmp_path / "dangling")])
    capfd.readouterr()
    (tmp_path / "output").symlink_to("/dev/stdout")
    overhead.main(["--dims", "24", "--json", str(tmp_path / "output")])
    out = capfd.readouterr().out
    assert json.loads(out[out.index("{") : out.rindex("}") + 1])["results"] == record["results"]


def test_options_that_do_nothing_or_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overhead, "copy_bandwidth", None)  # nothing is measured before
    (tmp_path / "FILE").write_text(json.dumps(RECORD | {"results": []}))
    named = ["--dims 1024", "--kinds plain", "--depth 24", "--tokens 8192", "--context 1024"]
    named += ["--dtype bfloat16", "--steps 20", "--copy-mib 512", "--curves 0", "--json new.json"]
    cases = {f"--from FILE {option}": f"without {option.split()[0]}" for option in named}
    cases |= {f"--dims --curves 2 {o}": f"go with {o.split()[0]}" for o in named[1:7]}
    cases |= {
        "--dims": "--dims must have one at least, or go with --curves",
        "--dims 8 8": "--dims must differ from each other",
        "--kinds plain plain": "--kinds must differ from each other",
        "--tokens 99999999999": "--tokens ",
        "--tokens 102400000000": "--tokens, --dims and --depth need at least",
        "--depth 99999999999": "--tokens, --dims and --depth need at least",
        "--dims 99999999999488": "--tokens, --dims and --depth need at least",
        "--copy-mib 99999999999": "--copy-mib must be at most",
        "--curves 99999999999": "--curves must be from 0 to",
        "--json=": "--json must be a file but is empty",
        "--from=": "--from must be a file but is empty",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit):
            overhead.main(options.split())
        assert message in capsys.readouterr().err.rpartition("error:")[2], options
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"]


def test_context_at_its_bound(capsys, monkeypatch):
    """A sequence and the byte after it can start in the data at 0 alone."""

    def measured(mib):
        raise SystemExit("measured")

    monkeypatch.setattr(overhead, "copy_bandwidth", measured)
    monkeypatch.setattr(overhead, "DATA", 34)
    sizes = ["--dims", "8", "--depth", "1"]
    with pytest.raises(SystemExit, match="measured"):
        overhead.main([*sizes, "--context", "32", "--tokens", "32"])
    with pytest.raises(SystemExit):
        overhead.main([*sizes, "--context", "33", "--tokens", "33"])
    assert "--context must be at most 32 but is 33" in capsys.readouterr().err
