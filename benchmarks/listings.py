"""Compile a launch to PTX, with the registers of a thread: by NVRTC for CUDA, clang-19 for Metal.

clang compiles the exact Metal text that MLX generates to PTX, as it has no target for Apple's GPUs;
registers are those of a GPU of AMD with 32 lanes. It stands for Apple's compiler, a fork of it.
"""

import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mhc_mlx import launch

PTX = ["--target=nvptx64-nvidia-cuda"]
for flag in ("-target-cpu", "sm_90", "-target-feature", "+ptx80"):
    PTX += ["-Xclang", flag]
ARRAY = re.compile(r"threadgroup [^;]*? \(&(\w+)\)[^;]*;")  # in threadgroup memory
SIZE = r'\g<0> __asm__ volatile("// threadgroup_bytes %0" :: "n"(sizeof(\1)));'
REGISTERS = 128  # of a thread of an Apple GPU
TESTS = str(Path(__file__).parents[1] / "tests")  # what compiles for the tests compiles here too


class Listing(NamedTuple):
    ptx: str
    registers: int
    spilled: int  # registers that did not fit
    threadgroup_memory: int  # bytes
    names: tuple[str, ...]  # of the parameters, in order: an array, NAME_shape, or "groups"
    source: str


def missing(backend: str) -> str | None:
    """Say what this machine lacks to compile for a backend."""
    if backend == "metal":
        found = _proof("optimiser.llvm").available()
        return None if found else "clang-19 is missing: apt-get install clang-19"
    nvrtc = _proof("nvrtc")
    return None if nvrtc.toolkit() else "NVRTC is missing: pip install nvidia-cuda-nvrtc"


def _proof(name: str):
    """A module of tests/proof, which this package does not import unless a launch is compiled."""
    if TESTS not in sys.path:
        sys.path.append(TESTS)
    return __import__(f"proof.{name}", fromlist=[name])


def of_launch(call: launch.Launch, backend: str) -> Listing:
    """Compile what a launch runs on "cuda" or "metal"."""
    if reason := missing(backend):
        raise RuntimeError(f"[model] {reason}")
    arrays = {k: None if v is None else (tuple(v[0]), v[1]) for k, v in call.inputs.items()}
    outputs = {k: None if v is None else (tuple(v[0]), v[1]) for k, v in call.outputs.items()}
    stand_ins = {k: v and mx.zeros(*v) for k, v in arrays.items()}  # lazy: nothing is allocated
    given = (call.name, stand_ins, outputs)
    compile_ = _cuda if backend == "cuda" else _metal
    return compile_(*given, call.groups, call.threads, call.template)


def _cuda(name, inputs, outputs, groups, threads, template) -> Listing:
    nvrtc = _proof("nvrtc")
    source = nvrtc.cuda_source(name, inputs, outputs, threads, template)
    ptx, log = _nvrtc(name, source)
    found = {k: re.search(pattern, log) for k, pattern in nvrtc.FIGURES.items()}
    figure = {k: int(m[1]) if m else 0 for k, m in found.items()}
    names = []
    for k in [k for k, a in inputs.items() if a is not None]:
        names += [k] + [f"{k}_shape"] * (f"Shape {k}_shape" in source)
    names += [k for k, spec in outputs.items() if spec is not None]
    shared = figure["shared"] + template.get("RING_BYTES", 0)
    return Listing(ptx, figure["registers"], figure["spills"] // 4, shared, tuple(names), source)


@functools.lru_cache(maxsize=256)
def _nvrtc(name: str, source: str) -> tuple[str, str]:
    error, log, ptx = _proof("nvrtc").compile_program(name, (source,), "sm_90a")
    if error:
        raise RuntimeError(f"[model] {name} does not compile: {error[:1000]}")
    return ptx, log


def _metal(name, inputs, outputs, groups, threads, template) -> Listing:
    source = _proof("simulator").generated(name, inputs, outputs, groups, threads, template)
    return of_text(_proof("optimiser.opencl").program(source, threads))


def of_text(text: str) -> Listing:
    """Compile C++ for OpenCL with one kernel `entry`, as `proof.optimiser.opencl` writes it."""
    signature = re.search(r"void entry\((.*?)\)", text)
    assert signature, text[-500:]
    names = tuple(parameter.split()[-1] for parameter in signature[1].split(", "))
    assembly = _clang(text, "amd")
    figures = (r"\.vgpr_count:\s+(\d+)", r"vgpr_spill_count:\s+(\d+)")
    registers, spilled = (int(re.findall(p, assembly)[0]) for p in figures)
    ptx = _clang(ARRAY.sub(SIZE, text), "ptx")
    memory = sum(map(int, re.findall(r"// threadgroup_bytes (\d+)", ptx)))
    return Listing(ptx, registers, spilled, memory, names, text)


@functools.lru_cache(maxsize=256)
def _clang(text: str, target: str) -> str:
    llvm = _proof("optimiser.llvm")
    if target == "ptx":
        return llvm.compiled(text, PTX)
    return llvm.compiled(text, llvm.AMDGCN, REGISTERS)
