"""examples/overhead.py: its copy, its times, what it adds up, and the files it reads and writes."""

import json
import statistics
from types import SimpleNamespace

import mlx.core as mx
import pytest

from programs import trainer  # which finds examples/

# isort: split
import overhead

on_the_cpu = trainer.on_the_cpu
MADE = {"ms": 30.0, "ms_min": 20.0, "ms_max": 40.0, "peak_gib": 1.5, "parameters": 7}
MADE |= {"losses": [5.0, 4.0]}
RECORD = {"device": "some GPU", "mlx": "1", "date": "2026-01-01", "copy_gb_s": 2000.0}


def test_bandwidth_of_a_copy(monkeypatch):
    """By a device that moves 3 GB a second, and takes 0.1 s for an evaluation of any size."""
    now = [0.0]

    def evaluate(results):
        if isinstance(results, list):
            assert all(r.dtype == mx.bfloat16 for r in results)
            now[0] += 0.1 + sum(2 * r.nbytes for r in results) / 3e9

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(mx, "eval", evaluate)
    assert overhead.copy_bandwidth(2) == pytest.approx(3e9)


def test_time_of_a_step_is_a_median_without_the_first(monkeypatch):
    """Which compile."""
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
    made = overhead.measure([*options, "--connection", "plain"], 7)
    want = seconds[3:]
    assert made["ms"] == 1e3 * statistics.median(want) != 1e3 * statistics.mean(want)
    assert (made["ms_min"], made["ms_max"]) == (1e3, 9e3) and made["losses"] == [4.0] * 10


def test_what_is_added_is_over_plain(monkeypatch, capsys):
    """To a step, and as a share of the whole step; the floor is by rows and bandwidth."""
    ms = {"plain": 20.0, "fused": 50.0, "reference": 500.0}
    asked = []

    def released(command, steps):
        asked.append((command, steps))
        kind = (
            "plain" if "plain" in command else "reference" if "--no-metal" in command else "fused"
        )
        return MADE | {"ms": ms[kind]}

    monkeypatch.setattr(overhead, "released", released)
    options = {"dtype": "bfloat16", "context": 64, "tokens": 256, "depth": 3, "steps": 7}
    args = SimpleNamespace(**options, kinds=["reference", "fused", "plain"])
    result = overhead.overhead(128, args, 1e9)
    floor = 1e3 * 41 * 6 * 128 * 256 * 2 / 1e9  # rows, sublayers, channels, tokens, bytes
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


def test_malformed_records_are_one_error(tmp_path, capsys):
    path = tmp_path / "record.json"
    result = {"dim": 8, "floor_ms": 1.0, "plain": MADE}
    result["fused"] = MADE | {"added_ms": 3.0, "share": 0.1, "x_floor": 3.0}
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
        *(changed(fused=MADE | {"losses": v}) for v in (7, "abc", ["a"], None)),
        *(changed(fused=MADE | {k: "7"}) for k in ("ms", "peak_gib", "added_ms")),
        changed(plain=MADE | {"ms": 10**400}),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit):
            overhead.main(["--from", str(path)])
        told = capsys.readouterr()
        assert f"error: --from must be a file that --json wrote but is {path}" in told.err, text
        assert told.out == "" and "Traceback" not in told.err
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit):
        overhead.main(["--from", str(path)])
    assert "--from must be a file that --json wrote" in capsys.readouterr().err


def test_json_is_a_new_file(tmp_path, monkeypatch, capfd):
    """Or what is no regular file; it is looked at before anything is measured."""
    for name in ("copy_bandwidth", "overhead"):
        monkeypatch.setattr(overhead, name, None)
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "link").symlink_to("notes")
    for name in ("notes", "link"):
        with pytest.raises(SystemExit, match="--json must be a new file but .* exists"):
            overhead.main(["--json", str(tmp_path / name)])
    assert (tmp_path / "notes").read_text() == "kept"
    monkeypatch.setattr(overhead, "copy_bandwidth", lambda mib: 2e9)
    monkeypatch.setattr(overhead, "overhead", lambda *_: {"dim": 8, "floor_ms": 1.0, "plain": MADE})
    (tmp_path / "dangling").symlink_to("made.json")
    overhead.main(["--dims", "8", "--json", str(tmp_path / "dangling")])
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["results"][0]["plain"] == MADE and made["copy_gb_s"] == 2
    assert (tmp_path / "dangling").is_symlink()
    capfd.readouterr()
    (tmp_path / "output").symlink_to("/dev/stdout")
    overhead.main(["--dims", "8", "--json", str(tmp_path / "output")])
    out = capfd.readouterr().out
    assert json.loads(out[out.index("{") : out.rindex("}") + 1])["results"] == made["results"]
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="cannot write .*/full: No space left"):
        overhead.main(["--dims", "8", "--json", str(tmp_path / "full")])
    assert (tmp_path / "full").is_symlink()
    out = capfd.readouterr().out  # what was measured is not lost
    assert json.loads(out[out.index("{") : out.rindex("}") + 1])["results"] == made["results"]


def test_options_that_do_nothing_or_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overhead, "copy_bandwidth", None)  # nothing is measured before
    (tmp_path / "FILE").write_text(json.dumps(RECORD | {"results": []}))
    given = ["--dims 1024", "--kinds plain", "--depth 24", "--tokens 8192", "--context 1024"]
    given += ["--dtype bfloat16", "--steps 20", "--copy-mib 512", "--curves 0", "--json new.json"]
    cases = {f"--from FILE {option}": f"without {option.split()[0]}" for option in given}
    cases |= {f"--dims --curves 2 {o}": f"go with {o.split()[0]}" for o in given[1:7]}
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
        "--json=": "--json must be a path but is empty",
        "--from=": "--from must be a path but is empty",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit):
            overhead.main(options.split())
        assert message in capsys.readouterr().err.rpartition("error:")[2], options
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"]


def test_context_at_its_bound(capsys, monkeypatch):
    """A sequence and the byte after it start in the data at 0 alone: the starts are below 1."""

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
