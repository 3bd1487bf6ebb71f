"""Compile the CUDA form of a launch with NVRTC and MLX's own options. This needs no GPU.

pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl
"""

import contextlib
import ctypes
import functools
import os
import re
import site
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx

from mhc_mlx import launch

UTILS = b"""#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
"""
WRAPPER = """
#include "mlx/backend/cuda/device/utils.cuh"
#include <cooperative_groups.h>
{header}
namespace mlx::core::cu {{
namespace cg = cooperative_groups;
__global__ void custom_kernel_{name}({parameters}) {{
{constants}
METAL_POSITIONS {body}
}}
}}
"""
NAMESPACE = "\nnamespace mlx::core::cu {\n"
FIGURES = {
    "registers": r"Used (\d+) registers",
    "spills": r"(\d+) bytes spill stores",
    "shared": r"(\d+) bytes smem",
    "stack": r"(\d+) bytes stack frame",
}
TOGETHER = 12  # a program has at most this number of launches
PRECOMPILED = 320 << 20  # bytes of NVIDIA's headers, which each process precompiles once
# Registers, bytes of spills, stack and shared memory, and seconds of each compiled variant.
figures: dict = {}
TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}


@functools.cache
def toolkit():
    """Return (NVRTC's library, its include folders), or None if the wheels are missing."""
    for packages in [*site.getsitepackages(), site.getusersitepackages()]:
        for root in Path(packages).glob("nvidia/cu1*"):
            libraries = sorted(root.glob("lib/libnvrtc.so.1*"))
            if libraries:
                library = ctypes.CDLL(str(libraries[0]))
                library.nvrtcSetPCHHeapSize(ctypes.c_size_t(PRECOMPILED))
                return library, [root / "include", root / "include/cccl"]
    return None


def cuda_source(name, inputs, outputs, threads, template) -> str:
    """Return the source that MLX's cuda_kernel would compile for this launch."""
    body = launch.absent_pointers(inputs, outputs) + launch.text(f"{name}.metal")
    parameters = []
    for k, a in inputs.items():
        if a is not None:
            parameters.append(f"const {TYPES[a.dtype]}* {k}")
            if f"{k}_shape" in body:
                parameters.append(f"const __grid_constant__ Shape {k}_shape")
    parameters += [f"{TYPES[v[1]]}* {k}" for k, v in outputs.items() if v is not None]
    constants = []
    for k, v in template.items():
        if isinstance(v, mx.Dtype):
            constants.append(f"using {k} = {TYPES[v]};")
        else:
            constants.append(
                f"constexpr {'bool' if isinstance(v, bool) else 'int'} {k} = {int(v)};"
            )
    return WRAPPER.format(
        header=launch.cuda_header(name, threads),
        name=name,
        parameters=", ".join(parameters),
        constants="\n".join(constants),
        body=body,
    )


def compile_cuda(name: str, source: str, arch: str = "sm_90a") -> tuple[str, dict[str, float]]:
    """Compile one launch; return the compiler's errors ("" if none) and its `figures`."""
    error, found = compile_together(name, (source,), arch)
    return error, found[0] if found else {}


def compile_together(name: str, sources: tuple[str, ...], arch: str) -> tuple[str, list[dict]]:
    """Compile launches with the same header as one program; return the errors and all figures.

    Most of the time goes into what stands before a kernel. Each launch gets an equal part of it.
    """
    start = time.perf_counter()
    error, log, _ = compile_program(name, sources, arch)
    seconds = time.perf_counter() - start
    if error:
        return error, []
    each = re.split(r"Compiling entry function '(\S+)'", log)[1:]
    logs, made = dict(zip(each[::2], each[1::2], strict=True)), []
    for k in range(len(sources)):
        kernel_name = f"custom_kernel_{name}_{k}"
        (own,) = (
            text for symbol, text in logs.items() if re.search(rf"{kernel_name}(?!\d)", symbol)
        )
        made.append({"seconds": seconds / len(sources)})
        for key, pattern in FIGURES.items():
            found = re.search(pattern, own)
            made[-1][key] = int(found.group(1)) if found else 0
    return "", made


def compile_program(name: str, sources: tuple[str, ...], arch: str) -> tuple[str, str, str]:
    """Compile launches with the same header as one program; return the errors, the log and the PTX.

    The kernels are called custom_kernel_{name}_0, custom_kernel_{name}_1, ...
    """
    nvrtc, includes = toolkit()
    kernels, parts = [f"custom_kernel_{name}_{k}" for k in range(len(sources))], []
    for kernel_name, source in zip(kernels, sources, strict=True):
        header, namespace, rest = source.rpartition(NAMESPACE)
        parts.append(namespace + rest.replace(f"custom_kernel_{name}(", f"{kernel_name}(", 1))
    source = header + "".join(parts)
    program = ctypes.c_void_p()
    names, texts = (
        (ctypes.c_char_p * 1)(b"mlx/backend/cuda/device/utils.cuh"),
        (ctypes.c_char_p * 1)(UTILS),
    )
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"body.cu", 1, texts, names)
    for kernel_name in kernels:
        nvrtc.nvrtcAddNameExpression(program, f"mlx::core::cu::{kernel_name}".encode())
    flags = [
        "--device-as-default-execution-space",
        f"--gpu-architecture={arch}",
        "--ptxas-options=-v",
        "--pch",  # without it two thirds of the time go into NVIDIA's headers
        "--pch-messages=false",
    ]
    flags = [f.encode() for f in flags + [f"--include-path={p}" for p in includes]]
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))

    def text(of: str) -> str:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{of}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{of}")(program, buffer)
        return buffer.value.decode()

    log = text("ProgramLog")
    ptx = "" if failed else text("PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return (log or "failed without a message") if failed else "", log, ptx


def run(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """Compile a launch in place of `launch.run`, and return zeros."""
    key = (name, cuda_source(name, inputs, outputs, threads, template))
    rings[key] = template.get("RING_BYTES", 0)
    if _collecting is not None:
        _collecting.append(key)
    else:
        compile_all([key])
    return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]


_collecting: list | None = None
rings: dict[tuple[str, str], int] = {}  # RING_BYTES, threadgroup memory that a launch adds


@contextlib.contextmanager
def collecting():
    """Let launches append (name, source) to a list, for `compile_all`, and compile nothing."""
    global _collecting
    _collecting = []
    try:
        yield _collecting
    finally:
        _collecting = None


def compile_all(keys: list[tuple[str, str]]) -> None:
    """Compile launches for sm_90a, and the first variant of each body for sm_80; fill `figures`.

    Launches with the same header form a program. Many programs are spread over one process per
    core, because NVRTC compiles one program at a time in a process.
    """
    new = [key for key in dict.fromkeys(keys) if key not in figures]
    seen = {name for name, _ in figures}
    older = {k: s for k, s in reversed(new) if k not in seen}
    groups: dict[tuple[str, str], list[str]] = {}
    for name, source in new:
        groups.setdefault((name, source.rpartition(NAMESPACE)[0]), []).append(source)
    jobs = [
        (name, tuple(sources[i : i + TOGETHER]), "sm_90a")
        for (name, _), sources in groups.items()
        for i in range(0, len(sources), TOGETHER)
    ] + [(name, (source,), "sm_80") for name, source in older.items()]
    if len(jobs) > 8:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            made = list(pool.map(compile_together, *zip(*jobs, strict=True)))
    else:
        made = [compile_together(*job) for job in jobs]
    for (name, sources, arch), (error, found) in zip(jobs, made, strict=True):
        assert not error, f"{name}.metal does not compile for {arch}:\n{error[:2000]}"
        if arch == "sm_90a":
            figures.update({(name, s): f for s, f in zip(sources, found, strict=True)})
