"""Find, build and launch the kernel bodies: the only module that knows which GPU backend runs."""

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import mlx.core as mx

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")  # in a wheel; in a checkout
_traced: str | None = None  # the backend while `metal_source` traces


def backend() -> str | None:
    """The default device's backend: ``"metal"``, ``"cuda"``, or None where the reference runs."""
    if _traced:
        return _traced
    if mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None


@functools.cache
def room(backend: str | None) -> int:
    """Bytes of threadgroup memory that a threadgroup with a ring can have: none but on CUDA, there
    without a GPU an H100's."""
    if backend != "cuda":
        return 0
    info = mx.device_info()
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
    """A file of kernels/ without comments and includes, lines kept: MLX hashes the source on every
    eval, and takes words in it for attributes."""
    return re.sub(r"[ \t]*//.*|#include.*", "", _read(name))


@functools.cache
def headers(name: str, backend: str) -> tuple[str, ...]:
    """The files that a file of kernels/ includes, in order, each once."""
    found = []
    for file in re.findall('#include "(.*)"', _read(name)):
        file = file.replace("BACKEND", backend)
        found += [f for f in (*headers(file, backend), file) if f not in found]
    return tuple(found)


# NVRTC gives these registers for too few threads at once, or too many and spills, unless told for
# how many.
_RESIDENT = {"mhc_pre": 512, "mhc_pre_backward": 512, "mhc_projection_backward": 512}
_RESIDENT |= {"mhc_sweep": 512, "mhc_phi_gradient": 512, "mhc_seam_backward": 320}
_RESIDENT |= {"mhc_token_backward": 512}


def cuda_header(name: str, threads: int) -> str:
    """What goes before a body on CUDA; it bounds the registers for this many threads."""
    bounds = f"{threads}"
    if name in _RESIDENT:
        bounds += f", {max(1, _RESIDENT[name] // threads)}"
    return text("cuda.h").replace("THREADS", bounds) + _header(name, "cuda")


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
        template: Compile-time constants of the body. RING, if there, is also the bytes of
            threadgroup memory that the launch adds on CUDA.
        verbose: Print the generated source.
    Returns the outputs that are not None, in order.
    """
    absent = absent_pointers(inputs, outputs)
    inputs = {k: v for k, v in inputs.items() if v is not None}
    outputs = {k: v for k, v in outputs.items() if v is not None}
    ring = template.get("RING", 0)
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


def metal_source(f, *arrays: mx.array) -> str:
    """The exact Metal source of the kernels that ``f(*arrays)`` launches; needs no GPU.

    MLX prints it while it records f for export.
    """
    global _traced
    sys.stdout.flush()
    saved = os.dup(1)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, saved)
        out = stack.enter_context(tempfile.TemporaryFile())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.dup2(out.fileno(), 1)
        before, _traced = _traced, "metal"
        try:
            mx.export_function(os.path.join(folder, "f.mlxfn"), f, *arrays)
        finally:
            _traced = before
            os.dup2(saved, 1)
        out.seek(0)
        return out.read().decode()


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
