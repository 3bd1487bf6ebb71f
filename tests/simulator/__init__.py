"""Runs the exact Metal source that MLX generates for a launch, on the CPU.

Linux, with g++ >= 12 or clang >= 15.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mhc_mlx import kernel

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
SCHEDULES = ("lock-step", "greedy forward", "greedy reverse")
CACHE = Path(tempfile.gettempdir()) / "mhc_mlx_simulator"

MAIN = """
namespace {{
void** buffers;
void thread_main() {{
  auto& f = *sim::g.current;
  KERNEL({arguments});
  f.state = sim::DONE;
  f.line = 0;
  swapcontext(&f.context, &sim::g.main);
}}
}}
extern "C" const char* simulate(void** b, unsigned groups, unsigned threads, int schedule) {{
  constexpr size_t STACK = 128 << 10;
  buffers = b;
  auto& g = sim::g;
  g.error.clear();
  g.threads = threads;
  g.groups = groups;
  g.fibers.resize(threads);
  g.stacks.resize(threads * STACK);
  for (g.group = 0; g.group < groups; ++g.group) {{
    for (unsigned i = 0; i < threads; ++i) {{
      auto& f = g.fibers[i];
      f.state = sim::RUNNING;
      f.tid = i;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = &g.stacks[i * STACK];
      f.context.uc_stack.ss_size = STACK;
      makecontext(&f.context, thread_main, 0);
    }}
    if (!sim::run_group(schedule)) return g.error.c_str();
  }}
  return nullptr;
}}
"""
POSITIONS = {
    "thread_position_in_threadgroup": "uint3{f.tid, 0, 0}",
    "threadgroup_position_in_grid": "uint3{sim::g.group, 0, 0}",
    "threadgroups_per_grid": "uint3{sim::g.groups, 1, 1}",
    "threads_per_threadgroup": "uint3{sim::g.threads, 1, 1}",
    "thread_index_in_simdgroup": "f.tid % 32",
    "simdgroup_index_in_threadgroup": "f.tid / 32",
}


def program_source(source: str) -> tuple[str, list[str]]:
    """C++ for the generated Metal source, and the names of its buffers in order."""
    source = re.findall(r"```\n(.*?)```", source, re.S)[-1]
    parameters = re.findall(r"(\w[^,()]*?)[*&]? ?(\w+) \[\[(\w+)(?:\(\d+\))?\]\]", source)
    names, arguments = [], []
    for kind, name, attribute in parameters:
        if attribute == "buffer":
            kind = re.sub(r"\b(device|constant)\b", "", kind)
            arguments.append(f"({kind}*)buffers[{len(names)}]")
            names.append(name)
        elif attribute in POSITIONS:
            arguments.append(POSITIONS[attribute])
    instance = re.search(r"decltype\((\w+<.*?>)\)", source) or re.search(
        r"\[\[kernel\]\] void (\w+)", source
    )
    source = re.sub(r"(?m)^template \[\[host_name.*$", "", source)
    source = re.sub(r" \[\[[^\]]*\]\]|\[\[kernel\]\]", "", source)
    source = re.sub(r"(?m)^(\s*)threadgroup ", r"\1static ", source)
    source = re.sub(r"\b(device|constant|thread|threadgroup)\b", "", source)
    main = MAIN.format(arguments=", ".join(arguments)).replace("KERNEL", instance.group(1))
    return '#include <algorithm>\n#include "runtime.hpp"\n' + source + main, names


@functools.cache
def compiled(source: str):
    """The program's entry, compiled once per source."""
    digest = hashlib.sha256((source + (HERE / "runtime.hpp").read_text()).encode()).hexdigest()[:24]
    library = CACHE / f"{digest}.so"
    if not library.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "program.cpp")
            path.write_text(source)
            made = Path(folder, "program.so")
            run = subprocess.run(
                [COMPILER, "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared"]
                + [f"-I{HERE}", str(path), "-o", str(made)],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise RuntimeError(f"the simulated program does not compile:\n{run.stderr[:4000]}")
            shutil.copy(made, library.with_suffix(f".{os.getpid()}"))
            os.replace(library.with_suffix(f".{os.getpid()}"), library)
    entry = ctypes.CDLL(str(library)).simulate
    entry.restype = ctypes.c_char_p
    return entry


def to_numpy(a: mx.array) -> np.ndarray:
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def from_numpy(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(a).view(dtype) if dtype == mx.bfloat16 else mx.array(a)


_launch = kernel.launch


def launch(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """`kernel.launch` on the CPU, under every schedule."""
    arrays = {k: v for k, v in inputs.items() if v is not None}

    def traced(*values):
        return _launch(
            name,
            inputs | dict(zip(arrays, values, strict=True)),
            outputs,
            groups,
            threads,
            template,
            True,
        )

    stand_ins = [mx.zeros(a.shape, a.dtype) for a in arrays.values()]
    source, names = program_source(kernel.metal_source(traced, *stand_ins))
    entry = compiled(source)
    results = None
    for schedule, title in enumerate(SCHEDULES):
        buffers, outs = {}, {}
        for k, a in arrays.items():
            buffers[k] = np.ascontiguousarray(to_numpy(a))
            buffers[k + "_shape"] = np.array(a.shape, dtype=np.int32)
        for k, spec in outputs.items():
            if spec is not None:
                dtype = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}[
                    spec[1]
                ]
                outs[k] = np.full(spec[0], 0x7FC0 if dtype == np.uint16 else np.nan, dtype=dtype)
        pointers = (ctypes.c_void_p * len(names))(*((buffers | outs)[n].ctypes.data for n in names))
        error = entry(pointers, groups, threads, schedule)
        if error:
            raise RuntimeError(f"{name}.metal, {title}: {error.decode()}")
        if results is None:
            results = outs
        for k, v in outs.items():
            if results[k].tobytes() != v.tobytes():
                raise RuntimeError(f"{name}.metal: {k} differs between {SCHEDULES[0]} and {title}")
    return [from_numpy(results[k], spec[1]) for k, spec in outputs.items() if spec is not None]
