"""The simulator runs the Metal source that MLX generates for a launch on the CPU.

It sees every access of every thread. It needs Linux, with g++ >= 12 or clang >= 15. `run` takes the
place of `launch.run`: it runs the kernel under every schedule and raises SimulationError, which
names body, line, thread and element, for these faults: an access out of bounds or misaligned; a
read of memory that no thread wrote; a race; an output element that is written twice or never; lanes
that diverge before a simd operation or a barrier; a limit of Metal that is exceeded; results that
differ between schedules.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mhc_mlx import launch
from proof import tracing

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
CACHE = Path(tempfile.gettempdir()) / f"mhc_mlx_simulator_{os.getuid()}"
SCHEDULES = ("lock-step", "greedy forward", "greedy reverse", "lock-step, inputs one element off")
MAX_THREADS, MAX_BUFFERS = 1024, 31
SUMS = ("partial",)  # outputs whose elements a thread may read and write again, as running sums
GAP = 1 << 20  # bytes between buffers, which no thread may access
BOUNDS = "bounds" if "clang" in (COMPILER or "") else "bounds-strict"
BODY_FLAGS = ["-std=c++20", "-O1", "-g1", "-w", "-ffp-contract=off", "-fPIC"]
BODY_FLAGS += ["-ftrivial-auto-var-init=pattern"]  # a register that was never set reads as -1.7e38
BODY_FLAGS += [
    f"-fsanitize=thread,alignment,{BOUNDS},signed-integer-overflow,shift,integer-divide-by-zero",
    f"-I{HERE}",
]
# The runtime brings the libraries of C and C++. The linker spends 45 ms on them, g++ 130 on a body.
WITHOUT_LIBRARIES = ("-nostdlib", "-lgcc")
ENTRY = """
extern "C" void simulated() {{
  {kernel}({arguments});
}}
"""
POSITIONS = {
    "thread_position_in_threadgroup": "uint3{sim_thread(), 0, 0}",
    "threadgroup_position_in_grid": "uint3{sim_group(), 0, 0}",
    "threadgroups_per_grid": "uint3{sim_groups(), 1, 1}",
    "threads_per_threadgroup": "uint3{sim_threads(), 1, 1}",
    "thread_index_in_simdgroup": "sim_thread() % 32",
    "simdgroup_index_in_threadgroup": "sim_thread() / 32",
}


class SimulationError(RuntimeError):
    """A kernel broke a rule of the simulator."""


@dataclass
class Watched:
    """A buffer of a launch, with the loads and stores of each element and its last writer."""

    output: bool
    array: np.ndarray
    loads: np.ndarray = field(init=False)
    stores: np.ndarray = field(init=False)
    writer: np.ndarray = field(init=False)  # the index of the thread in the grid
    where: np.ndarray = field(init=False)  # the address of the instruction that stored

    def __post_init__(self):
        self.loads, self.stores, self.writer = np.zeros((3, self.array.size), np.uint32)
        self.where = np.zeros(self.array.size, np.uint64)

    def entry(self, name: str) -> "_Buffer":
        counts = [a.ctypes.data for a in (self.loads, self.stores, self.writer, self.where)]
        kind = 2 if self.output and name in SUMS else int(self.output)
        a = self.array
        return _Buffer(a.ctypes.data, a.nbytes, a.itemsize, name.encode(), kind, *counts)


@dataclass
class Record:
    """A simulated launch and its buffers."""

    name: str
    threads: int
    template: dict
    buffers: dict[str, Watched]
    library: Path

    def line(self, buffer: str, element: int) -> str:
        """The thread and the source line that stored an element, in words."""
        b = self.buffers[buffer]
        group, thread = divmod(int(b.writer[element]), self.threads)
        line = source_line(self.library, runtime().sim_offset(int(b.where[element])))
        return f"thread {thread} of threadgroup {group} at {line}"


_recording: list | None = None


_shifted: set | None = None


@contextlib.contextmanager
def shifting():
    """Run launches twice more for each input, which is moved alone: by an element, and by 8 bytes.

    Yields a set to which each launch adds (body, input, bytes).
    """
    global _shifted
    before, _shifted = _shifted, set()
    try:
        yield _shifted
    finally:
        _shifted = before


@contextlib.contextmanager
def recording():
    """Yield a list to which each launch adds the Record of its first schedule."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]
    _fields_ += [("element", ctypes.c_size_t), ("name", ctypes.c_char_p), ("output", ctypes.c_int)]
    _fields_ += [(k, ctypes.c_void_p) for k in ("loads", "stores", "writer", "where")]


def check_private(folder: Path) -> None:
    """Create the folder if it is missing; raise RuntimeError if other users can write to it.

    All users know its name and may create it. This process loads programs from it, so it must not
    hold theirs.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        got = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
    elif found.st_uid != os.getuid():
        got = f"one of user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        got = f"one with mode {stat.S_IMODE(found.st_mode):o}"
    else:
        return
    must = "be a folder that this user owns and nobody else can write to"
    raise RuntimeError(f"[simulator] {folder} must {must} but got {got}: remove it.")


def build(source: str, flags: list[str], digest: str, link_flags=WITHOUT_LIBRARIES) -> Path:
    """Return the shared library of C++ source; it is compiled once for each digest."""
    check_private(CACHE)
    library = CACHE / f"{hashlib.sha256(digest.encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        path, made = Path(folder, "program.cpp"), Path(folder, "program.so")
        path.write_text(source)
        # One command: a second for the linker takes 35 ms more, of 180.
        command = [COMPILER, "-pipe", "-shared", *flags, str(path), "-o", str(made), *link_flags]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SimulationError(f"it does not compile:\n{run.stderr[:4000]}")
        os.replace(made, library)
    return library


@functools.cache
def runtime() -> ctypes.CDLL:
    text = (HERE / "runtime.cpp").read_text()
    library = build(text, ["-std=c++20", "-O2", "-fPIC", "-U_FORTIFY_SOURCE"], text, ())
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.simulate.restype = ctypes.c_char_p
    loaded.sim_offset.restype = ctypes.c_uint64
    loaded.sim_offset.argtypes = [ctypes.c_uint64]
    return loaded


@functools.cache
def program(source: str) -> tuple[Path, ctypes._SimpleCData]:
    """Return the library and the entry function of a body's C++, compiled once per source."""
    runtime()
    words = "".join((HERE / file).read_text() for file in ("body.hpp", "ptx.hpp"))
    library = build(source, BODY_FLAGS, source + words + str(BODY_FLAGS))
    return library, ctypes.CDLL(str(library)).simulated


@functools.cache
def source_line(library: Path, offset: int) -> str:
    """Return file:line of an instruction, and of the calls into which it was inlined."""
    tool = shutil.which("addr2line")
    if not tool or not offset:
        return "an unknown line"
    command = [tool, "-i", "-e", str(library), hex(offset - 1)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
    lines = [Path(line).name for line in lines if re.search(r"\.(metal|h):\d", line)]
    return ", from ".join(dict.fromkeys(lines)) or "an unknown line"


def kernel_files() -> list[str]:
    """Return the files of kernels/ by the names that `launch.text` takes."""
    folder = launch._FOLDERS[1]
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))


def generated(name, inputs, outputs, groups, threads, template) -> str:
    """Return the Metal source that MLX generates for a launch."""
    arrays = {k: v for k, v in inputs.items() if v is not None}

    def traced(*values):
        given = inputs | dict(zip(arrays, values, strict=True))
        return _run(name, given, outputs, groups, threads, template, True)

    stand_ins = [mx.zeros(a.shape, a.dtype) for a in arrays.values()]
    return re.findall(r"```\n(.*?)```", tracing.metal_source(traced, *stand_ins), re.S)[-1]


_run = launch.run
_cuda = False  # whether launches include the headers of CUDA instead of Metal's


@contextlib.contextmanager
def cuda_form():
    """Let launches run the text of kernels/ for CUDA, inside the Metal kernel that MLX generates.

    `ptx.hpp` takes the place of `ptx.h`.
    """
    global _cuda
    header = launch._header
    _cuda, launch._header = True, lambda name, backend: header(name, "cuda")
    launch._build.cache_clear()
    try:
        yield
    finally:
        _cuda, launch._header = False, header
        launch._build.cache_clear()


def cpp(name: str, source: str) -> tuple[str, list[str]]:
    """Return C++ for generated Metal source, and the names of its buffers in order."""
    names, arguments = [], []
    (parameters,) = re.findall(r"(?s)\[\[kernel\]\] void \w+\((.*?)\) \{", source)
    for kind, parameter, attribute in re.findall(
        r"(\w[^,()]*?)[*&]? ?(\w+) \[\[(\w+)(?:\(\d+\))?\]\]", parameters
    ):
        if attribute == "buffer":
            kind = re.sub(r"\b(device|constant)\b", "", kind)
            arguments.append(f"({kind}*)sim_buffer({len(names)})")
            names.append(parameter)
        elif attribute in POSITIONS:
            arguments.append(POSITIONS[attribute])
    instance = re.search(r"decltype\((\w+<.*?>)\)", source)
    instance = instance or re.search(r"\[\[kernel\]\] void (\w+)", source)
    headers = [file for file in kernel_files() if file.endswith(".h")]
    if _cuda:
        source = source.replace(launch.text("include/cuda/ptx.h"), '\n#include "ptx.hpp"\n')
    for file in (*headers, f"{name}.metal"):  # so that errors name the lines of kernels/
        text = launch.text(file)
        source = source.replace(text, f'\n#line 1 "{file}"\n{text}\n#line 1 "generated"\n')
    source = re.sub(r"(?m)^template \[\[host_name.*$", "", source)
    source = re.sub(r" \[\[[^\]]*\]\]|\[\[kernel\]\]", "", source)
    source = re.sub(
        r"(?m)^threadgroup ([\w:]+(?:<[^;=]*?>)?) (\w+)((?:\[[^;]*\])+);",
        r"THREADGROUP_ARRAY(\2, \3, \1);",
        source,
    )
    left = re.search(r"(?m)^threadgroup .*", source)
    assert left is None, f"{name}: not one array on a line of its own: {left and left.group()}"
    source = re.sub(r"\b(device|constant|thread|threadgroup)\b", "", source)
    entry = ENTRY.format(kernel=instance.group(1), arguments=", ".join(arguments))
    return '#include "body.hpp"\n' + source + entry, names


def to_numpy(a: mx.array) -> np.ndarray:
    """Return a as NumPy's array, without a copy where it is contiguous.

    Its address is then the one that MLX would pass to a kernel.
    """
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a, copy=False)


def from_numpy(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(a).view(dtype) if dtype == mx.bfloat16 else mx.array(a)


@functools.cache
def fresh() -> int:
    """Return the address of an array that MLX has just allocated, modulo 16."""
    return to_numpy(mx.arange(64) + 0).ctypes.data % 16


NUMPY = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}


def place(arrays: dict[str, np.ndarray], offsets: dict[str, int]) -> dict[str, np.ndarray]:
    """Copy arrays to addresses ``offsets`` bytes after a multiple of 64, with gaps between them."""
    pages = mmap.mmap(-1, sum(a.nbytes + 2 * GAP for a in arrays.values()))
    pages.madvise(mmap.MADV_NOHUGEPAGE)  # else Linux clears two megabytes for each array
    room, placed, at = np.frombuffer(pages, np.uint8), {}, 0
    for k, a in arrays.items():
        start = at + GAP + offsets.get(k, 0)
        placed[k] = room[start : start + a.nbytes].view(a.dtype)
        placed[k][:] = a.ravel()
        at += GAP + -(-a.nbytes // 64) * 64 + 64
    return placed


def run(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """Run a launch on the CPU, under every schedule, in place of `launch.run`."""
    body = f"{name}.metal"
    if not 1 <= threads <= MAX_THREADS or threads % 32 or groups * threads >= 1 << 31:
        raise SimulationError(f"{body}: {groups} groups of {threads} threads")
    source, names = cpp(name, generated(name, inputs, outputs, groups, threads, template))
    if len(names) > MAX_BUFFERS:
        raise SimulationError(f"{body}: {len(names)} buffers, Metal has {MAX_BUFFERS}")
    library, entry = program(source)
    given = {k: to_numpy(v) for k, v in inputs.items() if v is not None}
    shapes = {f"{k}_shape": np.array(v.shape, np.int32) for k, v in given.items()}
    made = {k: v for k, v in outputs.items() if v is not None}
    blank = {k: np.empty(v[0], NUMPY[v[1]]) for k, v in made.items()}
    contiguous = {k: v for k, v in given.items() if v.flags.c_contiguous}  # MLX copies the others
    offsets = {k: (v.ctypes.data - fresh()) % 16 for k, v in contiguous.items()}
    odd = {k: (offsets.get(k, 0) + v.itemsize) % 16 for k, v in given.items()}
    schedules = [(title, k % 3, odd if k == 3 else offsets) for k, title in enumerate(SCHEDULES)]
    if _shifted is not None:
        for k, v in given.items():
            for step in sorted({v.itemsize, 8}):
                alone = offsets | {k: (offsets.get(k, 0) + step) % 16}
                schedules.append((f"lock-step, {k} {step} bytes off", 0, alone))
                _shifted.add((name, k, step))
    results = None
    for title, order, begin in schedules:
        arrays = place(given | shapes | blank, begin)
        watched = {k: Watched(k in made, arrays[k]) for k in names}
        table = (_Buffer * len(names))(*(w.entry(k) for k, w in watched.items()))
        where = ctypes.c_uint64()
        error = runtime().simulate(
            *(entry, table, len(names), groups, threads, order),
            *(ctypes.c_size_t(template.get("RING_BYTES", 0)), ctypes.byref(where)),
        )
        if error:
            place_of = f" at {source_line(library, where.value)}" if where.value else ""
            raise SimulationError(f"{body}, {title}: {error.decode()}{place_of}")
        if results is None:
            results = {k: arrays[k] for k in made}
            if _recording is not None:
                _recording.append(Record(name, threads, template, watched, library))
        for k in made:
            differ = results[k].view(np.uint8) != arrays[k].view(np.uint8)
            if differ.any():
                element = int(np.argmax(differ)) // arrays[k].itemsize
                raise SimulationError(
                    f"{body}: {k}[{element}] differs between {SCHEDULES[0]} and {title}"
                )
    return [from_numpy(results[k].reshape(v[0]), v[1]) for k, v in made.items()]
