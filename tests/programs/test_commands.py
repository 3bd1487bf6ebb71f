"""Commands write a report into a new file, an earlier report or a stream, and lose none."""

import json
import math
import os
from pathlib import Path

import pytest

import benchmark
from mhc_mlx.commands import Output, is_stream, text
from mhc_mlx.device_report import parity


def anything(data) -> None:
    """Let all JSON pass."""


def test_output_replaces_a_file_and_nothing_else(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to("a.json")
    output = Output("--json", str(link), "a report", anything)
    assert not file.exists(), "an output is checked without leaving a file"
    output.update({"k": 1})
    assert json.loads(file.read_text()) == {"k": 1} and link.is_symlink()
    os.chmod(file, 0o640)
    assert output.finish({"k": [math.inf, math.nan, -math.inf, 2.5]}) is None
    assert json.loads(file.read_text())["k"] == ["inf", "nan", "-inf", 2.5]
    assert file.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link.json"]
    Output("--json", str(file), "a report", anything)
    (tmp_path / "empty.json").touch()
    Output("--json", str(tmp_path / "empty.json"), "a report", anything)
    late = Output("--json", str(tmp_path / "late.json"), "a report", anything)
    (tmp_path / "late.json").mkdir()  # while something is measured
    late.update({"k": 1})
    assert "late.json cannot be written: " in late.finish({"k": 1})
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["a.json", "empty.json", "late.json", "link.json"], "a half-written file is left"


def test_a_kill_while_a_report_is_written_leaves_the_one_before(tmp_path):
    """A new file takes the place of the old one at once: who has the old one open reads it all."""
    output = Output("--json", str(tmp_path / "a.json"), "a report", anything)
    for write in (output.update, output.finish):
        output.update({"rows": [1, 2]})
        with open(tmp_path / "a.json") as before:
            write({"rows": [1, 2, 3]})
            assert json.load(before) == {"rows": [1, 2]}
        assert json.loads((tmp_path / "a.json").read_text()) == {"rows": [1, 2, 3]}


def test_output_refuses(tmp_path):
    (tmp_path / "text").write_text("a letter")
    (tmp_path / "other.json").write_text("[3]")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "astray").symlink_to("nowhere/a.json")
    os.mkfifo(tmp_path / "pipe")

    def check(data):
        raise ValueError("it is another's")

    bad = {
        "": "must be a file but is empty",
        str(tmp_path): "must be a file but is the folder",
        f"{tmp_path}/nowhere/a.json": "must be in a folder that exists but is",
        f"{tmp_path}/astray": "must be in a folder that exists but is",
        f"{tmp_path}/loop": "must be a file that can be written but is",
        f"{tmp_path}/text": "must be a file of JSON but is",
        f"{tmp_path}/other.json": "must be a new file or a report but is .*: it is another's",
        f"{tmp_path}/text/a.json": "must be in a folder that exists but is",
        f"{tmp_path}/{'a' * 300}": "must be a file that can be written but is",
    }
    if os.path.exists("/dev/full"):
        bad["/dev/full"] = "must be a file that can be written but is /dev/full: .*No space"
    for file, message in bad.items():
        with pytest.raises(ValueError, match=message):
            Output("--json", file, "a report", check)
    assert (tmp_path / "text").read_text() == "a letter"
    assert (tmp_path / "other.json").read_text() == "[3]"
    Output("--json", str(tmp_path / "pipe"), "a report", check)  # is written through


def test_a_character_device_stays_one():
    output = Output("--json", "/dev/null", "a report", anything)
    output.update({"k": 1})
    assert output.finish({"k": 1}) is None and not os.path.isfile("/dev/null")


def test_what_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    """Where the folder goes away while something is measured, a line says so at once, JSON is
    printed at the end, and the exit code is an error; an exception keeps what was measured."""
    folder = tmp_path / "gone"
    argv = ["--verify", "--op", "stream_aggregate", "--op", "mhc_head", "--shape", "2,2,2"]
    calls = []

    def error(*case, **options):
        calls.append(case)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        monkeypatch.setattr(parity, "worst_error", lambda *case, **options: 0.25e-9)
        return 0.5e-9

    monkeypatch.setattr(parity, "worst_error", error)
    folder.mkdir()
    with pytest.raises(SystemExit, match="cannot be written: .*its JSON is printed instead"):
        benchmark.main([*argv, "--json", str(folder / "a.json")])
    printed = capsys.readouterr()
    assert printed.err.count("cannot be written now") == 1
    result = json.loads(printed.out[printed.out.index("{\n") :])
    assert [row["error"] for row in result["verified"]] == [0.25e-9, 0.5e-9] or [
        row["error"] for row in result["verified"]
    ] == [0.5e-9, 0.25e-9]

    def broken(*case, **options):
        raise KeyboardInterrupt

    def once(*case, **options):
        monkeypatch.setattr(parity, "worst_error", broken)
        return 0.5e-9

    monkeypatch.setattr(parity, "worst_error", once)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*argv, "--json", str(tmp_path / "b.json")])
    assert len(json.loads((tmp_path / "b.json").read_text())["verified"]) == 1


def test_a_report_has_a_line_for_each_row():
    """An object in a list at any depth of the report is a row; what is in a row stays there."""
    rows = [{"us": 1.5, "launches": [{"kernel": "a"}]}, {"us": math.inf, "shape": [1, 2]}]
    sizes = {"prefill": {"4": 8.0}}
    report = {"device": "d", "rows": rows, "none": [], "check": {"sites": rows[:1], "n": 1} | sizes}
    want = [
        *("{", ' "device": "d",', ' "rows": [', '  {"us": 1.5, "launches": [{"kernel": "a"}]},'),
        *('  {"us": "inf", "shape": [1, 2]}', " ],", ' "none": [],', ' "check": {'),
        *('  "sites": [', '   {"us": 1.5, "launches": [{"kernel": "a"}]}', "  ],", '  "n": 1,'),
        *('  "prefill": {"4": 8.0}', " }", "}"),
    ]
    assert text(report).splitlines() == want
    assert json.loads(text(report | {"rows": rows[:1]})) == report | {"rows": rows[:1]}
    assert json.loads(text({})) == {}


def test_streams_are_written_through(tmp_path, capfd):
    """A FIFO, a device and this process's output are streams, also by a link; neither a file nor a
    folder nor what is not there yet is one."""
    fifo, file, new = (tmp_path / name for name in ("fifo", "file", "new"))
    os.mkfifo(fifo)
    file.write_text("kept")
    want = {tmp_path: False, file: False, new: False, fifo: True, Path("/dev/null"): True}
    for k, (path, is_one) in enumerate((want | {Path("/dev/stdout"): True}).items()):
        link = tmp_path / f"link {k}"
        link.symlink_to(path)
        assert [is_stream(path), is_stream(link)] == [is_one] * 2, path
    output = Output("--json", str(link), "a report", anything)
    output.update({"k": 1})  # a report that is not complete is not written to a stream
    assert output.finish({"k": 2}) is None and link.is_symlink()
    os.write(1, b"what is printed later")  # where the output is a file, after the report
    assert capfd.readouterr().out.strip() == text({"k": 2}) + "what is printed later"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    assert is_stream(Path(f"/dev/fd/{descriptor}"))
    Output("--json", f"/dev/fd/{descriptor}", "a report", anything).finish({"k": 3})
    os.close(descriptor)
    assert file.read_text() == "kept" + text({"k": 3})
