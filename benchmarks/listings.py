"""Compile a launch to PTX, with the registers of a thread: by NVRTC for CUDA, clang-19 for Metal.

clang compiles the exact Metal text that MLX generates, inlines every helper, and gives PTX, as it
has no target for Apple's GPUs; registers are those of a GPU of AMD with 32 lanes. It stands for
Apple's compiler, which is a fork of clang.
"""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mhc_mlx import launch

HERE = Path(__file__).parent
CLANG = "clang-19"
FLAGS = "-x clcpp -cl-std=clc++2021 -cl-no-stdinc -w -O2 -ffp-contract=fast -S".split()
FLAGS += ["-mllvm", "-inline-threshold=100000"]
EXTENSIONS = "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"
EXTENSIONS += ",+__opencl_c_program_scope_global_variables"
PTX = ["--target=nvptx64-nvidia-cuda"]
for flag in ("-target-cpu", "sm_90", "-target-feature", "+ptx80"):
    PTX += ["-Xclang", flag]
AMD = ["--target=amdgcn-amd-amdhsa", "-mcpu=gfx1100", "-nogpulib"]
REGISTERS = 128  # of a thread of an Apple GPU
TESTS = str(HERE.parent / "tests")  # what compiles for the tests compiles here too


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
        return None if shutil.which(CLANG) else f"{CLANG} is missing: apt-get install {CLANG}"
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
    text, names = opencl(source, threads)
    memory = sum(map(int, re.findall(r"// threadgroup_bytes (\d+)", _clang(text, "ptx"))))
    limited = opencl(source, threads, REGISTERS)[0]
    return of_text(text, names, memory, limited)


def of_text(text: str, names: tuple[str, ...], memory: int, limited: str = "") -> Listing:
    """Compile one OpenCL kernel `entry`; limited is its text with REGISTERS registers at most."""
    assembly = _clang(limited or text, "amd")
    figures = (r"\.vgpr_count:\s+(\d+)", r"vgpr_spill_count:\s+(\d+)")
    registers, spilled = (int(re.findall(p, assembly)[0]) for p in figures)
    return Listing(_clang(text, "ptx"), registers, spilled, memory, names, text)


@functools.lru_cache(maxsize=256)
def _clang(text: str, target: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "kernel.cl", Path(folder) / "kernel.s"
        source.write_text(text)
        flags = [*FLAGS, "-Xclang", EXTENSIONS, *{"ptx": PTX, "amd": AMD}[target]]
        command = [CLANG, *flags, str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"[model] {CLANG} says: {done.stderr[:2000]}")
        return result.read_text()


ARRAYS = r"(?m)^threadgroup ([\w:]+(?:<[^;=]*?>)?) ([^;=]*);"
POSITIONS = {
    "thread_position_in_threadgroup": "(uint3)(POSITION, 0u, 0u)",
    "threadgroup_position_in_grid": "(uint3)(GROUP, 0u, 0u)",
    "threadgroups_per_grid": "(uint3)(groups, 1u, 1u)",
    "threads_per_threadgroup": "(uint3)(THREADS, 1u, 1u)",
    "thread_index_in_simdgroup": "uint(POSITION & 31)",
    "simdgroup_index_in_threadgroup": "uint(UNIFORM(int(POSITION) / 32))",
}


def opencl(source: str, threads: int, registers: int | None = None) -> tuple[str, tuple[str, ...]]:
    """Make one OpenCL kernel of the generated Metal text; return it and its parameters' names.

    OpenCL has no threadgroup arrays of template-dependent size, so that they become parameters.
    """
    instance = re.search(r"decltype\((\w+)(<.*>)?\) ", source)
    assert instance, source[-500:]
    name, arguments = instance[1], instance[2] or ""
    source = source[: source.rindex("\ntemplate [[host_name")]
    signature = re.search(rf"\[\[kernel\]\] void {re.escape(name)}\(\n(.*?)\) \{{\n", source, re.S)
    assert signature, name
    parameters = [re.sub(r" ?\[\[[^\]]*\]\]", "", p.strip()) for p in signature[1].split(",\n")]
    head, body = source[: signature.start()], source[signature.end() :]
    body = body.replace(  # OpenCL takes no choice between a register and a call that names it
        "CACHED ? xv[k * N + j] : mhc::load", "CACHED ? val(xv[k * N + j]) : mhc::load"
    )
    arrays: list[str] = []

    def parameter(m: re.Match) -> str:
        made = []
        for array, sizes in re.findall(r"(\w+)((?:\[[^\]]*\])+)", m[2]):
            arrays.append(f"threadgroup char* array{len(arrays)}")
            own = arrays[-1].split()[-1]
            made.append(
                f"threadgroup {m[1]} (&{array}){sizes} = *(threadgroup {m[1]} (*){sizes}){own};"
                f' __asm__ volatile("// threadgroup_bytes %0" :: "n"(sizeof({array})));'
            )
        return " ".join(made)

    body = re.sub(ARRAYS, parameter, body)
    given, passed, names = ["uint groups"], [], ["groups"]
    for i, p in enumerate(parameters):
        kind, what = p.rsplit(" ", 1)
        if kind.endswith("*"):
            given.append(f"__global char* a{i}")
            names.append(what)
        value = f"a{i}" if kind.endswith("*") else POSITIONS[what].replace("THREADS", f"{threads}u")
        passed.append(f"({kind}){value}" if kind.endswith("*") else value)
    given += [f"__local char* __restrict l{i}" for i in range(len(arrays))]
    passed += [f"l{i}" for i in range(len(arrays))]
    names += [f"threadgroup{i}" for i in range(len(arrays))]
    limit = f"__attribute__((amdgpu_num_vgpr({registers})))" if registers else ""
    size = f"__attribute__((amdgpu_flat_work_group_size({threads}, {threads}))) {limit}"
    size = f"\n#ifdef __AMDGCN__\n{size}\n#endif\n"
    entry = f"\n__kernel {size} void entry({', '.join(given)}) {{ "
    entry += f"{name}{arguments}({', '.join(passed)}); }}\n"
    whole = f"ALWAYS void {name}({', '.join(parameters + arrays)}) {{\n"
    return f'#include "{HERE}/metal_words.hpp"\n' + head + whole + body + entry, tuple(names)
