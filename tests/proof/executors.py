"""Executors run the kernels of a test: the simulator, the stand-in, clang, NVRTC or a GPU."""

import contextlib
import os
import shutil
import sys

# MLX reads this at its first product. By default its float32 products are TF32 on some GPUs, with
# errors of 1e-3.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx

from mhc_mlx import launch, ops

variants: set = set()
# The simulator gets so few threadgroups that each computes several tokens or matrices of a case.
FEW_GROUPS = {"FORWARD_GROUPS": 2, "MANY_GROUPS": 2, "BACKWARD_THREADS": 64}
FEW_GROUPS |= {"COEFFICIENT_GRADIENT_SIMDGROUPS": 4}
# The limits are so low that cases have tokens on both sides of them.
FEW_TOKENS = {"FEW_TOKENS": 6, "PARTIAL_LOGITS_TOKENS": 2}


def set_tiling(**literals) -> None:
    """Set literals of ops/tiling.py, and clear its caches, whose entries depend on them."""
    vars(ops.tiling).update(literals)
    for f in vars(ops.tiling).values():
        if hasattr(f, "cache_clear"):
            f.cache_clear()


def missing(rung: str) -> str | None:
    """Return why a rung cannot run here, or None if it can."""
    if rung == "stand-in":
        return None
    if rung == "gpu":
        return None if launch.backend() else "no Metal or CUDA device"
    if rung.startswith("simulator"):
        if not sys.platform.startswith("linux"):
            return "the simulator runs on Linux"
        return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"
    if rung == "dialect":
        from proof import dialect

        return None if dialect.available() else "libclang is not installed"
    if rung == "optimiser":
        from proof import optimiser

        return None if optimiser.available() else "clang-19 is not installed"
    from proof import nvrtc

    return None if nvrtc.toolkit() else "nvidia-cuda-nvrtc is not installed"


def forget_traces() -> None:
    """Drop the compiled sites of mhc_mlx.mlx_lm: a trace keeps the launches of its executor."""
    if "mhc_mlx.mlx_lm.sites" in sys.modules:
        sys.modules["mhc_mlx.mlx_lm.sites"]._site.cache_clear()


@contextlib.contextmanager
def executor(rung: str, few_groups: bool = True):
    """Let a rung run the kernels: the simulator (for Metal or CUDA), the stand-in, or the GPU.

    The rungs "dialect" and "nvrtc" check or compile them instead. Yields the set of the variants
    that were launched.
    """
    real_run, backend = launch.run, launch.backend
    literals = {k: getattr(ops.tiling, k) for k in (*FEW_GROUPS, *FEW_TOKENS)}
    set_tiling(**FEW_TOKENS)
    forget_traces()
    stack = contextlib.ExitStack()
    if rung.startswith("simulator"):
        from proof import simulator

        mx.disable_compile()  # because the simulator evaluates its inputs
        run = simulator.run
        set_tiling(**(FEW_GROUPS if few_groups else {}))
        launch.backend = lambda: "metal"
        if rung == "simulator, CUDA":
            stack.enter_context(simulator.cuda_form())
            launch.backend = lambda: "cuda"
    elif rung == "stand-in":
        from proof import standin

        run = standin.run
        launch.backend = lambda: "metal"
    elif rung == "dialect":
        from proof import dialect

        run = dialect.run
        launch.backend = lambda: "metal"
    elif rung == "nvrtc":
        from proof import nvrtc

        run = nvrtc.run
        launch.backend = lambda: "cuda"
    else:
        run = real_run

    launched = set()

    def counted(name, inputs, outputs, groups, threads, template, verbose=False):
        kinds = tuple((k, v.dtype, v.size < 8) for k, v in inputs.items() if v is not None)
        launched.add((rung, name, tuple(template.items()), kinds))
        return run(name, inputs, outputs, groups, threads, template, verbose)

    launch.run = counted
    try:
        yield launched
    finally:
        variants.update(launched)
        launch.run, launch.backend = real_run, backend
        set_tiling(**literals)
        forget_traces()
        stack.close()
        if rung.startswith("simulator"):
            mx.enable_compile()
