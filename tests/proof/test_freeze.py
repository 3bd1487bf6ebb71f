"""The freeze sees a changed product, and does not see a renamed variable."""

import json
import subprocess
import sys

from cases import Case

from mhc_mlx import launch
from proof import freeze

CASE = Case("stream_aggregate", (2,), 4, 8)
BODY = "stream_aggregate.metal"


def recorded(folder, monkeypatch, edit=lambda text: text) -> dict:
    """CASE with its body edited."""
    plain = launch.text
    with monkeypatch.context() as m:
        m.setattr(launch, "text", lambda file: edit(plain(file)) if file == BODY else plain(file))
        launch._build.cache_clear()
        found = freeze.record(freeze.named([CASE]), folder)
    launch._build.cache_clear()
    assert not found["error"]
    return json.loads(json.dumps(found))


def differ(old: dict, new: dict) -> set[str]:
    """The kinds in which something changed."""
    lists = freeze.compared(old, new)
    assert not any(k["gone"] or k["new"] for k in lists.values())
    return {kind for kind, k in lists.items() if k["changed"]}


def test_a_recording(tmp_path, monkeypatch, need, capsys):
    for rung in ("simulator", "nvrtc"):
        need(rung)
    monkeypatch.setattr(freeze, "FORMS", freeze.FORMS[:1])
    first, again = (recorded(tmp_path / k, monkeypatch) for k in ("a", "b"))
    assert differ(first, again) == set()
    assert all(first[kind] for kind in freeze.KINDS)
    renamed = recorded(tmp_path, monkeypatch, lambda text: text.replace("acc", "total"))
    assert renamed["source"] != first["source"]
    assert differ(first, renamed) == set()
    planted = recorded(tmp_path, monkeypatch, lambda text: text.replace("acc[e] +=", "acc[e] -="))
    assert {"ptx", "bits"} <= differ(first, planted) <= {"ptx", "bits", "figures"}
    for allow, right in ((None, False), ("ptx", False), ("ptx|bits|figures", True)):
        assert freeze.report(first, planted, allow, 20, None) == right
    assert "changed bits stream_aggregate-2-n4-C8-float32" in capsys.readouterr().out


def test_what_is_gone_fails_and_what_is_new_does_not():
    old = {"bits": {"a": "1", "b": "2"}}
    assert freeze.report(old, {"bits": {"a": "1", "b": "2", "c": "3"}}, None, 9, None)
    assert not freeze.report(old, {"bits": {"a": "1"}}, None, 9, None)
    assert not freeze.report(old, {"bits": {"a": "1", "b": "3"}}, None, 9, None)


def test_names_may_change(tmp_path):
    words = "stream, 2 threadgroups of 32: T=float32, {}=True, READER=1"
    old = {"launch": {"READ / 0 stream, CUDA": words.format("READ"), "READ, CUDA": "stream, other"}}
    old["bits"] = {"READ / 0 stream, simulator / made": "made", "READ / 1 other, CUDA / made": "2"}
    lines = "stream flow\nREAD HAS_DU stream\nREAD WRITE_U other\n\nmade result stream"
    new = freeze.renamed(old, lines)
    assert new["launch"] == {
        "READ / 0 flow, CUDA": words.format("HAS_DU").replace("stream", "flow"),
        "READ, CUDA": "flow, other",
    }
    assert new["bits"] == {
        "READ / 0 flow, simulator / result": "made",
        "READ / 1 other, CUDA / made": "2",
    }
    for name, recording in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(recording))
    (tmp_path / "names").write_text(lines)
    command = [sys.executable, freeze.__file__, "compare", "old", "new"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    command += ["--renamed", "names"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_signatures():
    found = freeze.signatures()
    assert found["mhc_mlx.merge_streams"] == "(x: mlx.core.array) -> mlx.core.array"
    assert "mhc_mlx.HyperConnection.mixing_matrix" in found
    assert not any("_fuse" in k or " at 0x" in k + v for k, v in found.items())


def test_the_command_compares_files(tmp_path):
    for name, bits in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(json.dumps({"bits": {"case": bits}}))

    def compare(*arguments) -> int:
        command = [sys.executable, freeze.__file__, "compare", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    assert [compare("a", "b"), compare("a", "c")] == [0, 1]
    assert compare("a", "c", "--allow", "bits case") == 0


def test_every_case_has_a_name_of_its_own():
    cases = freeze.all_cases()
    assert len(freeze.named(cases)) == len(cases) > 100
