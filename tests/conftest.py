"""Options of pytest, fixtures for every test, and a summary of the kernel variants that ran."""

import os
import sys

# Before NumPy: its threads would wait in a loop beside the other worker's tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import pytest
from proof import missing, variants
from proof.precompiled import precompile_mlx_header

from mhc_mlx import launch


def pytest_addoption(parser):
    parser.addoption("--all-rungs", action="store_true", help="a rung that cannot run fails")
    parser.addoption("--examples", type=int, help="new random calls of each op")


# A file is one worker's: those that take minutes start first, or the other worker waits at the end.
LONGEST = ("test_hypothesis", "test_nvrtc", "test_cuda_form", "test_parity", "test_mlx_lm")
LONGEST += ("test_mlx_vlm", "test_mlx_lm_training", "test_models", "test_planted", "test_operators")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: LONGEST.index(i.path.stem) if i.path.stem in LONGEST else len(LONGEST))


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's: by the number of tests, not by their time
    if not hasattr(config, "workerinput"):  # once, before xdist's workers start
        precompile_mlx_header()


@pytest.fixture(autouse=True)
def alone():
    """Each test starts with the same seed, and must put `launch.run` back before it ends."""
    mx.random.seed(1)
    run = launch.run
    yield
    assert launch.run is run, "kernels are left to another executor"


@pytest.fixture
def need(request):
    """need(rung) skips the test, or with --all-rungs fails it, if the rung cannot run here."""

    def need(rung: str) -> None:
        reason = missing(rung)
        if reason and request.config.getoption("--all-rungs") and rung != "gpu":
            pytest.fail(f"{rung}: {reason}")
        if reason:
            pytest.skip(f"{rung}: {reason}")

    return need


def pytest_terminal_summary(terminalreporter):
    for rung in ("simulator", "dialect", "nvrtc", "gpu"):
        bodies = [v[1] for v in variants if v[0] == rung]
        if bodies:
            each = ", ".join(f"{b} {bodies.count(b)}" for b in sorted(set(bodies)))
            terminalreporter.write_line(f"{rung}: {len(bodies)} kernel variants: {each}")
    if "proof.nvrtc" in sys.modules and sys.modules["proof.nvrtc"].figures:
        figures = sys.modules["proof.nvrtc"].figures
        slowest = max(figures, key=lambda k: figures[k]["seconds"])
        most = max(figures, key=lambda k: figures[k]["registers"])
        line = f"nvrtc: slowest {slowest[0]} {figures[slowest]['seconds']:.1f} s, "
        line += f"most registers {most[0]} {figures[most]['registers']}"
        terminalreporter.write_line(line)
    if "proof.optimiser.measure" in sys.modules and sys.modules["proof.optimiser.measure"].made:
        made = sys.modules["proof.optimiser.measure"].made
        most = max(made, key=lambda v: made[v].registers)
        line = f"optimiser: {len(made)} variants, most registers {most.body} {made[most].registers}"
        terminalreporter.write_line(f"{line}, {made[most].spills} spilled at 128")
    terminalreporter.write_line(
        f"kernels on this machine: {launch.backend() or 'none'}, MLX {mx.__version__}"
    )
