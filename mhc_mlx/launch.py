"""Find, build and launch the kernel bodies: the only module that asks MLX which GPU backend runs.

A body is a file of kernels/. A room of ops/ describes it by a `Body`, its template arguments, and
calls `launch`, which returns its outputs by name.
"""

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
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_type_hints

import mlx.core as mx

from . import devices
from .devices import Device

__all__ = ["Body", "Options", "backend", "device", "launch", "metal_source", "record"]

Spec = tuple[tuple[int, ...], mx.Dtype]  # the shape and dtype of an array
_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")  # in a wheel; in a checkout
# The backend inside `at` and `record`.
_fixed: ContextVar[str | None] = ContextVar("fixed", default=None)
# The launches that `record` collects, while it does.
_recorded: ContextVar["list[Launch] | None"] = ContextVar("recorded", default=None)


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
def at(place: Place) -> Iterator[None]:
    """Run what is inside at that place, whatever the default device is: so a gradient runs where
    its forward ran.

    MLX runs an operation without a stream on the default device, but a Metal kernel on the GPU.
    """
    token, here = _fixed.set(place.backend), mx.default_device() == place.device
    try:
        with contextlib.nullcontext() if here else mx.stream(place.device):
            yield
    finally:
        _fixed.reset(token)


def device() -> Device:
    """The record of the GPU on which kernels are launched, which need one."""
    if (found := backend()) is None:
        raise RuntimeError("[launch] kernels must run on a GPU but the default device is none.")
    # A Mac has one GPU, and a key of `_cuda_device` takes the host 1 us.
    return _metal_device() if found == "metal" else _cuda_device(Place(found, mx.default_device()))


@functools.cache
def _metal_device() -> Device:
    return devices.find("metal", mx.device_info(mx.gpu) if mx.metal.is_available() else {})


@functools.cache
def _cuda_device(place: Place) -> Device:
    return devices.find("cuda", mx.device_info(place.device))


@functools.cache
def _read(name: str) -> str:
    folder = next((f for f in _FOLDERS if f.is_dir()), None)
    if folder is None:
        places = [str(f) for f in _FOLDERS]
        raise FileNotFoundError(f"[launch] kernels/ must be at one of {places}.")
    return (folder / name).read_text()


@functools.cache
def text(name: str) -> str:
    """A file of kernels/ without comments, includes and the blanks that begin a line; lines stay.
    MLX hashes the source on every eval, and takes words in it for attributes."""
    return re.sub(r"(?m)^[ \t]+|[ \t]*//.*|#include.*", "", _read(name))


@functools.cache
def included_files(name: str, backend: str) -> tuple[str, ...]:
    """The files of kernels/include/ that a file of kernels/ includes, in order, each once."""
    found: list[str] = []
    for file in re.findall('#include "(.*)"', _read(name)):
        file = f"include/{file.replace('BACKEND', backend)}"
        found += [f for f in (*included_files(file, backend), file) if f not in found]
    return tuple(found)


# NVRTC gives these registers for too few threads at once, or too many and spills, unless told for
# how many.
_RESIDENT = {
    "mhc_seam_backward": 320,
    "stream_norm": 640,
    "stream_norm_backward": 320,
} | dict.fromkeys(
    "mhc_pre mhc_pre_partial_logits mhc_pre_backward_generic mhc_pre_backward_phi "
    "mhc_pre_backward_coefficients mhc_pre_backward_coefficients_norm "
    "mhc_pre_backward_projection".split(),
    512,
)


def cuda_header(name: str, threads: int) -> str:
    """What goes before a body on CUDA; it bounds the registers for this many threads."""
    bounds = f"{threads}"
    if name in _RESIDENT:
        bounds += f", {max(1, _RESIDENT[name] // threads)}"
    words = text("include/cuda/metal_words.h").replace("THREADS", bounds)
    return words + _header(name, "cuda")


def _header(name: str, backend: str) -> str:
    return "".join(map(text, included_files(f"{name}.metal", backend)))


@functools.cache
def _build(backend, name, inputs, outputs, absent_inputs, absent_outputs, threads, ring) -> Any:
    absent = absent_pointers(dict.fromkeys(absent_inputs), dict.fromkeys(absent_outputs))
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


def absent_pointers(inputs: Mapping[str, object], outputs: Mapping[str, object]) -> str:
    """Declarations of the arrays that a variant of a body names but does not use."""
    gone = [f"const device T* {k} = nullptr; " for k, v in inputs.items() if v is None]
    return "".join(gone + [f"device float* {k} = nullptr; " for k in outputs if outputs[k] is None])


@dataclass(frozen=True)
class Options:
    """How all kernels of an op are launched.

    threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks. On a
        Mac a body's registers may allow fewer, which only its compiled form tells: MLX then raises
        ValueError at evaluation, and names the limit.
    verbose: Print the generated source.
    """

    threads_per_group: int | None = None
    verbose: bool = False


class Arguments:
    """Template arguments: a frozen dataclass, whose values have exactly the types of its fields."""

    def __post_init__(self):
        types = _field_types(type(self))
        if tuple(map(type, vars(self).values())) == types:
            return
        for (name, value), kind in zip(vars(self).items(), types, strict=True):
            if type(value) is not kind:
                must, got, op = kind.__name__, type(value).__name__, type(self).__name__
                raise TypeError(f"[{op}] {name} must be of type {must} but got {got}.")


@functools.cache
def _field_types(cls: type) -> tuple[type, ...]:
    types = get_type_hints(cls)
    return tuple(types[field.name] for field in fields(cls))


class Body(Arguments):
    """Those of kernels/<name>.metal, in the order of its header; a subclass for each body.

    The fields of a field that is itself `Arguments` stand in its place.
    """

    name: ClassVar[str]
    THREADS: int  # in a threadgroup

    @functools.cached_property
    def template(self) -> dict[str, int | bool | mx.Dtype]:
        """The arguments by name."""
        found: dict[str, int | bool | mx.Dtype] = {}
        for name, value in vars(self).items():
            if isinstance(value, Arguments):
                found.update(vars(value))
            else:
                found[name] = value
        return found


def launch(
    body: Body,
    inputs: Mapping[str, mx.array | None],
    outputs: Mapping[str, Spec | None],
    groups: int,
    options: Options,
) -> dict[str, mx.array]:
    """Launch a body; returns the outputs that this variant has, by name.

    Args:
        body: Its template arguments.
        inputs: Arrays by the name that the body uses; None where this variant does not read it.
        outputs: Shape and dtype by the name in the body; None where this variant has none.
        groups: Threadgroups, along x.
        options: Whether to print the source.
    """
    arguments = (body.name, inputs, outputs, groups, body.THREADS, body.template)
    names = [k for k, spec in outputs.items() if spec is not None]
    return dict(zip(names, run(*arguments, options.verbose), strict=True))


def run(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """What `launch` does, of a body by its name; tests put another executor in its place.
    `Launch` says what the arguments are.

    RING_BYTES in the template is also what the launch adds of threadgroup memory on CUDA. Returns
    the outputs that are not None, in order.
    """
    if (launches := _recorded.get()) is not None:
        specs = {k: None if a is None else (a.shape, a.dtype) for k, a in inputs.items()}
        launches.append(Launch(name, specs, outputs, groups, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]
    arrays = {k: v for k, v in inputs.items() if v is not None}
    specs = {k: v for k, v in outputs.items() if v is not None}
    absent_inputs = tuple([k for k in inputs if k not in arrays])
    absent_outputs = tuple([k for k in outputs if k not in specs])
    names = (tuple(arrays), tuple(specs), absent_inputs, absent_outputs)
    kernel = _build(device().backend, name, *names, threads, template.get("RING_BYTES", 0))
    return kernel(
        inputs=list(arrays.values()),
        output_shapes=[shape for shape, _ in specs.values()],
        output_dtypes=[dtype for _, dtype in specs.values()],
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=list(template.items()),
        verbose=verbose,
    )


class Launch(NamedTuple):
    """The arguments of `run`, with shape and dtype for each array of inputs."""

    name: str
    inputs: Mapping[str, Spec | None]
    outputs: Mapping[str, Spec | None]
    groups: int
    threads: int
    template: Mapping[str, Any]


@contextlib.contextmanager
def record(backend: str = "metal") -> "Iterator[list[Launch]]":
    """Collect the launches of this thread, as for that backend; each returns zeros and runs
    nothing."""
    launches: list[Launch] = []
    tokens = _recorded.set(launches), _fixed.set(backend)
    try:
        yield launches
    finally:
        _recorded.reset(tokens[0])
        _fixed.reset(tokens[1])


def metal_source(f: Callable[..., object], *arrays: mx.array) -> str:
    """The exact Metal source of the kernels that ``f(*arrays)`` launches; needs no GPU.

    MLX prints it on the standard output of its process, which all threads share: so another process
    traces the launches.
    """
    with record() as launches:
        f(*arrays)
    return _printed(json.dumps(launches, default=_dtype_name)) if launches else ""


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
    process = subprocess.run(
        [sys.executable, "-c", _PRINT],
        input=f"[{json.dumps([str(folder) for folder in sys.path])}, {launches}]",
        capture_output=True,
        encoding="utf-8",
    )
    if process.returncode:
        why = f"{process.returncode}: {process.stderr.strip()[-2000:]}"
        raise RuntimeError(f"[verbose] the process that prints it ended with {why}")
    return process.stdout


def print_sources(launches: list[list[Any]]) -> None:
    """Make MLX print the Metal source of launches, which come from JSON: it prints each while it
    records it for export.
    """

    def dtype(v):
        return getattr(mx, v["dtype"]) if isinstance(v, dict) else v

    def specs(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v and (tuple(v[0]), dtype(v[1])) for k, v in arrays.items()}

    calls = [Launch(*call) for call in launches]
    inputs = [{k: v and mx.zeros(*v) for k, v in specs(call.inputs).items()} for call in calls]

    def f(*arrays):
        remaining, results = iter(arrays), []
        for call, named in zip(calls, inputs, strict=True):
            named = {k: None if a is None else next(remaining) for k, a in named.items()}
            template = {k: dtype(v) for k, v in call.template.items()}
            outputs = specs(call.outputs)
            results += run(call.name, named, outputs, call.groups, call.threads, template, True)
        return results

    _fixed.set("metal")
    with tempfile.TemporaryDirectory() as folder:
        arrays = [a for named in inputs for a in named.values() if a is not None]
        mx.export_function(os.path.join(folder, "f.mlxfn"), f, *arrays)


# Primitives that launch nothing, or at most a copy that they share.
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Reshape "
    "Slice Split Squeeze StopGradient Transpose Unflatten View".split()
)


def primitives(*results: mx.array) -> Counter[str]:
    """How many primitives of each kind the graph of results, not yet evaluated, has."""
    text = io.StringIO()
    mx.export_to_dot(text, *results)
    return Counter(re.findall(r'label ="([^"]*)", shape=rectangle', text.getvalue()))
