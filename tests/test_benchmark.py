"""benchmark.py's bytes, its JSON, and the medians over processes."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import benchmark

ROOT = Path(__file__).parent.parent


def test_mandatory_bytes():
    rows = 16384 * 1024 * 2  # one row of C per token in bfloat16
    shape = (16384, 4, 1024)
    for op, forward, backward in (
        ("mhc_static", 8, 12),
        ("stream_mix_add", 9, 14),
        ("mhc_dynamic", 14, 27),
    ):
        got = [benchmark.mandatory_bytes(op, d, shape, mx.bfloat16) for d in benchmark.DIRECTIONS]
        assert got == [forward * rows, backward * rows, (forward + backward) * rows]


def test_verify_writes_json(tmp_path):
    command = [sys.executable, "benchmark.py", "--verify", "--shape", "3,4,4", "--json"]
    subprocess.run([*command, str(tmp_path / "a.json")], cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["mlx"] == mx.__version__ and result["rows"] == []
    assert all(r["ok"] and r["error"] < 1 for r in result["verified"])
    assert {r["op"] for r in result["verified"]} == set(benchmark.DEFAULT)


def test_medians_over_processes(tmp_path, monkeypatch):
    times = iter([30.0, 10.0, 20.0])

    def run(command, check):
        row = {"op": "mhc_static", "direction": "forward", "dtype": "float32", "shape": [1, 4, 8]}
        us = next(times)
        row |= {"us": us, "spread": 0.0, "gbps": 1 / us, "percent_of_copy": us}
        row |= {"speedup_vs_compiled": 2.0, "threads_per_group": None}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [row]}))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--processes", "3", "--json", "x.json"])
    benchmark.repeat(3, str(tmp_path / "all.json"))
    (row,) = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert (row["us"], row["spread"], row["speedup_vs_compiled"]) == (20.0, 1.0, 3.0)


def test_kept_figures_have_the_schema():
    for file in (ROOT / "benchmarks").glob("*.json"):
        result = json.loads(file.read_text())
        assert {"device", "mlx", "date", "command", "copy_gbps", "rows"} <= set(result)
        for row in result["rows"]:
            assert row["direction"] in benchmark.DIRECTIONS and row["dtype"] in benchmark.DTYPES
            assert row["us"] == pytest.approx(row["us"]) and row["us"] > 0
