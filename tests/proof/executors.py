"""Executors run the kernels of a test: the simulator, the stand-in, clang, NVRTC or a GPU."""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace

# MLX reads this at its first product. By default its float32 products are TF32 on some GPUs, with
# errors of 1e-3.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx

from mhc_mlx import launch
from mhc_mlx.devices import Device

variants: set = set()
# The simulator gets so few threadgroups that each computes several tokens or matrices of a case.
FEW_GROUPS = {"forward_groups": 2, "many_groups": 2, "backward_threads": 64}
FEW_GROUPS |= {"coefficient_gradient_simdgroups": 4}
# The limits are so low that cases have tokens, and rows of sums, on both sides of them.
FEW_TOKENS = {"few_tokens": 6, "few_backward_tokens": 6, "partial_logits_tokens": 2}
FEW_TOKENS |= {"one_thread_rows": 2, "norm_tile_tokens": 6}


@functools.cache
def changed(device: Device, numbers: tuple[tuple[str, int], ...]) -> Device:
    """The same record each time, because caches know records by their identity. A number that is 0
    stays: the device does not do that."""
    return replace(device, **{k: v for k, v in numbers if getattr(device, k)})


@contextlib.contextmanager
def set_tiling(**numbers: int) -> Iterator[None]:
    """Change numbers in the records of all devices, by their names in `Device`."""
    real = launch.device
    launch.device = lambda: changed(real(), tuple(numbers.items()))
    try:
        yield
    finally:
        launch.device = real


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
    """Drop the compiled sites of mhc_mlx.models: a trace keeps the launches of its executor."""
    if "mhc_mlx.models.run" in sys.modules:
        sys.modules["mhc_mlx.models.run"].clear()


@contextlib.contextmanager
def executor(rung: str, few_groups: bool = True):
    """Let a rung run the kernels: the simulator (for Metal or CUDA), the stand-in, or the GPU.

    The rungs "dialect" and "nvrtc" check or compile them instead. Yields the set of the variants
    that were launched.
    """
    real_run, backend = launch.run, launch.backend
    forget_traces()
    stack = contextlib.ExitStack()
    stack.enter_context(set_tiling(**FEW_TOKENS))
    if rung.startswith("simulator"):
        from proof import simulator

        mx.disable_compile()  # because the simulator evaluates its inputs
        run = simulator.run
        stack.enter_context(set_tiling(**(FEW_GROUPS if few_groups else {})))
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
        forget_traces()
        stack.close()
        if rung.startswith("simulator"):
            mx.enable_compile()
