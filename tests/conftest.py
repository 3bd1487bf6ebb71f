"""Options, executors, and the count of compiled kernel variants."""

import contextlib
import os
import shutil
import sys

# Before MLX: its float32 products are TF32 by default on some GPUs, right to 1e-3.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import pytest

from mhc_mlx import kernel, ops

variants: set = set()
# In the simulator: so few threadgroups that each takes several of a case's tokens or matrices.
FEW_GROUPS = {"FORWARD_GROUPS": 2, "MANY_GROUPS": 2, "BACKWARD_THREADS": 64}
FEW_GROUPS |= {"TOKEN_SIMDGROUPS": 4}
FEW_TOKENS = {"FEW_TOKENS": 6, "SWEEP_TOKENS": 2}  # so few that cases have both sizes of tile


def set_geometry(**literals) -> None:
    """Set literals of ops/geometry.py, which caches what follows from them."""
    vars(ops.geometry).update(literals)
    for f in vars(ops.geometry).values():
        if hasattr(f, "cache_clear"):
            f.cache_clear()


def pytest_addoption(parser):
    parser.addoption("--all-rungs", action="store_true", help="a rung that cannot run fails")
    parser.addoption("--examples", type=int, help="new random calls of each op")


def missing(rung: str) -> str | None:
    """Why a rung cannot run here, or None."""
    if rung == "stand-in":
        return None
    if rung == "gpu":
        return None if kernel.backend() else "no Metal or CUDA device"
    if rung.startswith("simulator"):
        if not sys.platform.startswith("linux"):
            return "the simulator runs on Linux"
        return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"
    if rung == "dialect":
        import dialect

        return None if dialect.available() else "libclang is not installed"
    import nvrtc

    return None if nvrtc.toolkit() else "nvidia-cuda-nvrtc is not installed"


@pytest.fixture(autouse=True)
def alone():
    """A test draws the same numbers alone and among others, and leaves no executor behind."""
    mx.random.seed(1)
    launch = kernel.launch
    yield
    assert kernel.launch is launch, "kernels are left to another executor"


@pytest.fixture
def need(request):
    """need(rung) skips, or with --all-rungs fails, where the rung cannot run."""

    def need(rung: str) -> None:
        reason = missing(rung)
        if reason and request.config.getoption("--all-rungs") and rung != "gpu":
            pytest.fail(f"{rung}: {reason}")
        if reason:
            pytest.skip(f"{rung}: {reason}")

    return need


def forget_traces() -> None:
    """Compiled sites of mlx_lm keep the launches of the executor that they were traced with."""
    if "mhc_mlx.mlx_lm.sites" in sys.modules:
        sys.modules["mhc_mlx.mlx_lm.sites"]._site.cache_clear()


@contextlib.contextmanager
def executor(rung: str, few_groups: bool = True):
    """Kernels run by the simulator, as Metal or as CUDA has them, by this machine's GPU or the
    stand-in, or compiled by NVRTC.

    Yields the set of the variants that were launched.
    """
    launch, backend = kernel.launch, kernel.backend
    literals = {k: getattr(ops.geometry, k) for k in (*FEW_GROUPS, *FEW_TOKENS)}
    set_geometry(**FEW_TOKENS)
    forget_traces()
    stack = contextlib.ExitStack()
    if rung.startswith("simulator"):
        import simulator

        mx.disable_compile()  # it evaluates what it is given
        run = simulator.launch
        set_geometry(**(FEW_GROUPS if few_groups else {}))
        kernel.backend = lambda: "metal"
        if rung == "simulator, CUDA":
            stack.enter_context(simulator.cuda_form())
            kernel.backend = lambda: "cuda"
    elif rung == "stand-in":
        import standin

        run = standin.launch
        kernel.backend = lambda: "metal"
    elif rung == "dialect":
        import dialect

        run = dialect.launch
        kernel.backend = lambda: "metal"
    elif rung == "nvrtc":
        import nvrtc

        run = nvrtc.launch
        kernel.backend = lambda: "cuda"
    else:
        run = launch

    launched = set()

    def counted(name, inputs, outputs, groups, threads, template, verbose=False):
        kinds = tuple((k, v.dtype, v.size < 8) for k, v in inputs.items() if v is not None)
        launched.add((rung, name, tuple(template.items()), kinds))
        return run(name, inputs, outputs, groups, threads, template, verbose)

    kernel.launch = counted
    try:
        yield launched
    finally:
        variants.update(launched)
        kernel.launch, kernel.backend = launch, backend
        set_geometry(**literals)
        forget_traces()
        stack.close()
        if rung.startswith("simulator"):
            mx.enable_compile()


def pytest_terminal_summary(terminalreporter):
    for rung in ("simulator", "dialect", "nvrtc", "gpu"):
        bodies = [v[1] for v in variants if v[0] == rung]
        if bodies:
            each = ", ".join(f"{b} {bodies.count(b)}" for b in sorted(set(bodies)))
            terminalreporter.write_line(f"{rung}: {len(bodies)} kernel variants: {each}")
    if "nvrtc" in sys.modules and sys.modules["nvrtc"].figures:
        figures = sys.modules["nvrtc"].figures
        slowest = max(figures, key=lambda k: figures[k]["seconds"])
        most = max(figures, key=lambda k: figures[k]["registers"])
        line = f"nvrtc: slowest {slowest[0]} {figures[slowest]['seconds']:.1f} s, "
        line += f"most registers {most[0]} {figures[most]['registers']}"
        terminalreporter.write_line(line)
    terminalreporter.write_line(
        f"kernels on this machine: {kernel.backend() or 'none'}, MLX {mx.__version__}"
    )
