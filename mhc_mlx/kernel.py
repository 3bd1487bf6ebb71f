"""Find, build and launch the kernel bodies: the only module that knows which GPU backend runs."""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")  # in a wheel; in a checkout
_fixed: ContextVar[str | None] = ContextVar("fixed", default=None)  # the backend inside `at`
_recorded: ContextVar[list | None] = ContextVar("recorded", default=None)  # while `record` listens


def backend() -> str | None:
    """The default device's backend: ``"metal"``, ``"cuda"``, or None where the reference runs."""
    if _fixed.get():
        return _fixed.get()
    if mx.default_device().type != mx.DeviceType.gpu:  # a second GPU does not equal `mx.gpu`
        return None
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None


class Place(NamedTuple):
    """Where kernels run. It is a key of caches; a device is none, as equal ones differ in hash."""

    backend: str
    device: mx.Device

    def __hash__(self) -> int:
        return hash(self.backend)


def place() -> Place | None:
    """Where an op that is called now runs its kernels; None where the reference runs."""
    found = backend()
    return Place(found, mx.default_device()) if found else None


@contextlib.contextmanager
def at(place: Place):
    """What is inside runs at that place, whatever the default device is: so a gradient runs where
    its forward ran.

    MLX runs an operation without a stream on the default device, but a Metal kernel on the GPU.
    """
    token, here = _fixed.set(place.backend), mx.default_device() == place.device
    try:
        with contextlib.nullcontext() if here else mx.stream(place.device):
            yield
    finally:
        _fixed.reset(token)


def room(backend: str | None) -> int:
    """Bytes of threadgroup memory that a threadgroup with a ring can have: none but on CUDA, there
    without a GPU an H100's."""
    return _cuda_room(Place(backend, mx.default_device())) if backend == "cuda" else 0


@functools.cache
def _cuda_room(place: Place) -> int:
    info = mx.device_info(place.device)
    kind = tuple(info.get(f"compute_capability_{k}", v) for k, v in (("major", 9), ("minor", 0)))
    return (163 if kind in ((8, 0), (8, 7)) else 227 if kind[0] in (9, 10) else 99) << 10


@functools.cache
def _read(name: str) -> str:
    folder = next((f for f in _FOLDERS if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"[kernel] kernels/ must be at one of {[str(f) for f in _FOLDERS]}."
        )
    return (folder / name).read_text()


@functools.cache
def text(name: str) -> str:
    """A file of kernels/ without comments, includes and the blanks that begin a line; lines stay.
    MLX hashes the source on every eval, and takes words in it for attributes."""
    return re.sub(r"(?m)^[ \t]+|[ \t]*//.*|#include.*", "", _read(name))


@functools.cache
def headers(name: str, backend: str) -> tuple[str, ...]:
    """The files of kernels/include/ that a file of kernels/ includes, in order, each once."""
    found = []
    for file in re.findall('#include "(.*)"', _read(name)):
        file = f"include/{file.replace('BACKEND', backend)}"
        found += [f for f in (*headers(file, backend), file) if f not in found]
    return tuple(found)


# NVRTC gives these registers for too few threads at once, or too many and spills, unless told for
# how many.
_RESIDENT = dict.fromkeys(
    (
        "mhc_pre",
        "mhc_pre_backward_coefficients",
        "mhc_pre_backward_generic",
        "mhc_pre_backward_phi",
        "mhc_pre_backward_projection",
        "mhc_pre_partial_logits",
    ),
    512,
) | {"mhc_seam_backward": 320}


def cuda_header(name: str, threads: int) -> str:
    """What goes before a body on CUDA; it bounds the registers for this many threads."""
    bounds = f"{threads}"
    if name in _RESIDENT:
        bounds += f", {max(1, _RESIDENT[name] // threads)}"
    words = text("include/cuda/metal_words.h").replace("THREADS", bounds)
    return words + _header(name, "cuda")


def _header(name: str, backend: str) -> str:
    return "".join(map(text, headers(f"{name}.metal", backend)))


@functools.cache
def _build(
    backend: str, name: str, inputs: tuple, outputs: tuple, absent: str, threads: int, ring: int
):
    source = absent + text(f"{name}.metal")
    names = {"name": name, "input_names": inputs, "output_names": outputs}
    if backend == "metal":
        return mx.fast.metal_kernel(**names, source=source, header=_header(name, "metal"))
    header = cuda_header(name, threads)
    names |= {"source": "METAL_POSITIONS " + source, "header": header}
    # from 48,000 bytes on MLX raises the kernel's limit, which also counts the kernel's own arrays:
    # beside a small ring they stay below it
    bytes_ = ring if ring <= 32 << 10 else max(ring, 48 << 10)
    return mx.fast.cuda_kernel(**names, shared_memory=bytes_)


def absent_pointers(inputs: dict, outputs: dict) -> str:
    """Declarations of the arrays that a variant of a body names but does not use."""
    gone = [f"const device T* {k} = nullptr; " for k, v in inputs.items() if v is None]
    return "".join(gone + [f"device float* {k} = nullptr; " for k in outputs if outputs[k] is None])


def launch(
    name: str,
    inputs: dict[str, mx.array | None],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype] | None],
    groups: int,
    threads: int,
    template: dict[str, int | bool | mx.Dtype],
    verbose: bool = False,
) -> list[mx.array]:
    """Run ``kernels/<name>.metal``.

    Args:
        name: File stem of the body.
        inputs: Arrays by the name the body uses; None where this variant does not read it.
        outputs: Shape and dtype by the name in the body; None where this variant has none.
        groups: Threadgroups, along x.
        threads: Threads in a threadgroup.
        template: Compile-time constants of the body. RING_BYTES, if there, is also what the launch
            adds of threadgroup memory on CUDA.
        verbose: Print the generated source.
    Returns the outputs that are not None, in order.
    """
    if (found := _recorded.get()) is not None:
        shapes = {k: None if a is None else (a.shape, a.dtype) for k, a in inputs.items()}
        found.append(Launch(name, shapes, outputs, groups, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]
    absent = absent_pointers(inputs, outputs)
    inputs = {k: v for k, v in inputs.items() if v is not None}
    outputs = {k: v for k, v in outputs.items() if v is not None}
    ring = template.get("RING_BYTES", 0)
    build = _build(backend(), name, tuple(inputs), tuple(outputs), absent, threads, ring)
    return build(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=list(template.items()),
        verbose=verbose,
    )


class Launch(NamedTuple):
    """The arguments of `launch`, with shape and dtype for each array of inputs."""

    name: str
    inputs: dict[str, tuple[tuple[int, ...], mx.Dtype] | None]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype] | None]
    groups: int
    threads: int
    template: dict[str, int | bool | mx.Dtype]


@contextlib.contextmanager
def record():
    """Collects the launches of this thread, as for Metal; each returns zeros and runs nothing."""
    found = []
    tokens = _recorded.set(found), _fixed.set("metal")
    try:
        yield found
    finally:
        _recorded.reset(tokens[0])
        _fixed.reset(tokens[1])


def metal_source(f, *arrays: mx.array) -> str:
    """The exact Metal source of the kernels that ``f(*arrays)`` launches; needs no GPU.

    MLX prints it on the standard output of its process, which all threads share: so another process
    traces the launches.
    """
    with record() as found:
        f(*arrays)
    return _printed(json.dumps(found, default=_dtype_name)) if found else ""


def _dtype_name(dtype: mx.Dtype) -> dict[str, str]:
    return {"dtype": str(dtype).split(".")[-1]}


_PRINT = f"""
import json, sys
path, launches = json.load(sys.stdin)
sys.path[:] = path
from {__name__} import print_sources
print_sources(launches)
"""


@functools.lru_cache(maxsize=64)
def _printed(launches: str) -> str:
    """The Metal source of launches (in JSON), as MLX prints it in another process."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise RuntimeError("[verbose] needs a Python interpreter to run, but this one is frozen.")
    run = subprocess.run(
        [sys.executable, "-c", _PRINT],
        input=f"[{json.dumps([str(folder) for folder in sys.path])}, {launches}]",
        capture_output=True,
        encoding="utf-8",
    )
    if run.returncode:
        why = run.stderr.strip()[-2000:]
        raise RuntimeError(
            f"[verbose] the process that prints it ended with {run.returncode}: {why}"
        )
    return run.stdout


def print_sources(launches: list) -> None:
    """Make MLX print the Metal source of launches, which come from JSON: it prints each while it
    records it for export.
    """

    def dtype(v):
        return getattr(mx, v["dtype"]) if isinstance(v, dict) else v

    def specs(arrays: dict) -> dict:
        return {k: v and (tuple(v[0]), dtype(v[1])) for k, v in arrays.items()}

    found = [Launch(*each) for each in launches]
    given = [{k: v and mx.zeros(*v) for k, v in specs(each.inputs).items()} for each in found]

    def f(*arrays):
        rest, results = iter(arrays), []
        for each, inputs in zip(found, given, strict=True):
            inputs = {k: None if a is None else next(rest) for k, a in inputs.items()}
            template = {k: dtype(v) for k, v in each.template.items()}
            results += launch(
                *(each.name, inputs, specs(each.outputs), each.groups, each.threads, template),
                verbose=True,
            )
        return results

    _fixed.set("metal")
    with tempfile.TemporaryDirectory() as folder:
        arrays = [a for inputs in given for a in inputs.values() if a is not None]
        mx.export_function(os.path.join(folder, "f.mlxfn"), f, *arrays)


# Primitives that launch nothing, or at most a copy that they share.
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Reshape "
    "Slice Split Squeeze StopGradient Transpose Unflatten View".split()
)


def primitives(*results: mx.array) -> Counter:
    """How many primitives of each kind the graph of results, not yet evaluated, has."""
    text = io.StringIO()
    mx.export_to_dot(text, *results)
    return Counter(re.findall(r'label ="([^"]*)", shape=rectangle', text.getvalue()))
