"""README counts what mlx-lm dispatches at a site of DeepSeek V4.1, on CUDA and on Metal."""

import json

import mlx.core as mx
import pytest
from programs.test_packaging import ROOT

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
from mhc_mlx.models import graph, times
from mhc_mlx.models.families import lm_deepseek_v41 as family

RESULT = "benchmarks/results/h100/v41.json"
STOCK = ("mlx-lm", "mlx-lm, compiled")


def counts() -> list[int]:
    times._compiled_stock.cache_clear()  # it may hold a trace of other functions
    chains = times._chains(times.random_sites(64, 3, family.FAMILY), mx.bfloat16, 1)
    return [graph.dispatches(chains[k])["dispatches"] for k in STOCK]


def test_readme_counts_mlx_lms_dispatches(monkeypatch):
    """On a GPU rms_norm is one kernel; with that the counts are those that were found on CUDA. On
    Metal mlx-lm's Sinkhorn is one kernel too."""
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: graph.one_primitive(x))
    on_cuda = counts()
    for row in json.loads((ROOT / RESULT).read_text())["per sublayer"]:
        assert [row["graph"]["1"][k]["dispatches"] for k in STOCK] == on_cuda
    monkeypatch.setattr(
        family.stock, "_sinkhorn", lambda comb, iters, eps: graph.one_primitive(comb)
    )
    on_metal = counts()
    times._compiled_stock.cache_clear()
    text = " ".join((ROOT / "README.md").read_text().split())
    eager, compiled = on_cuda
    assert f"instead of mlx-lm's {eager}, or {compiled} where its own code is compiled" in text
    eager, compiled = on_metal
    assert f"on Metal it dispatches {eager}, or {compiled} compiled" in text
