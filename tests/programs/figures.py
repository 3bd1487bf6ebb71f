"""Tests of the benchmark share a row and a result, and runs that are short."""

from dataclasses import replace

import mlx.core as mx
import pytest

import benchmark
from benchmarks import cases
from mhc_mlx import DEEPSEEK_V4
from mhc_mlx.device_report import layers, measure, parity, suite, timing


def figure(**fields) -> dict:
    """Return a row of the result."""
    row = {"op": "sublayer", "direction": "forward", "dtype": "bfloat16", "shape": [1, 4, 8]}
    row |= {"us": 10.0, "spread": 0.0, "gbps": 1.0, "percent_of_copy": 50.0}
    return row | {"speedup_vs_compiled": None, "threads_per_group": None} | fields


RESULT = {"device": "some GPU", "mlx": "0.32.4", "date": "2026-11-22", "command": "python b.py"}
RESULT |= {"copy_gbps": 1.0, "verified": [], "rows": []}


@pytest.fixture
def uncompiled(monkeypatch):
    """On a CPU MLX compiles by the C++ compiler, which takes seconds."""
    monkeypatch.setattr(mx, "compile", lambda f: f)


def shorten(monkeypatch, iters: int = 2) -> None:
    """Let each run take a moment."""
    values = {"GRID": {2: (8,)}, "TOKENS": [1, 4], "DECODE": [(2, 2, 8)], "OVERHEAD": [(1, 2, 8)]}
    for name, value in values.items():
        monkeypatch.setattr(cases, name, value)
    for name, value in {"LAYERS": 3, "PLAIN_LAYERS": 2}.items():
        monkeypatch.setattr(layers, name, value)
    monkeypatch.setattr(timing, "CACHE", 1)
    for module in (cases, measure, parity, timing):
        monkeypatch.setattr(module, "array_limit", lambda: 1 << 20)
    for module in (layers, suite):
        monkeypatch.setattr(module, "DEEPSEEK_V4", replace(DEEPSEEK_V4, iters=iters))
    usual = benchmark.Bench
    monkeypatch.setattr(benchmark, "Bench", lambda budget, peak: usual(budget / 50, peak))


def refused(main, argv, capsys) -> str:
    """Return what a command says that ends before it measures: one line after its usage."""
    with pytest.raises(SystemExit) as found:
        main(argv)
    assert found.value.code == 2, argv
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err[captured.err.index("error: ") + 7 :].strip()
