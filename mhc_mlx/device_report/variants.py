"""The variants of the kernels that calls launch; each is compiled, and on Metal its limit read."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx

from .. import launch, ops
from .shapes import Case
from .suite import DTYPES, add_cotangents, function, make_inputs
from .timing import directed

TOO_MANY_THREADS = 1056  # no Metal device takes more than 1024 in a threadgroup
# Of a core of an M1 or M2, and of a thread: github.com/philipturner/metal-benchmarks
REGISTER_BYTES = 208 << 10
MOST_REGISTERS = 128


class Variant(NamedTuple):
    """A launch whose compiled text no other has, and the first call that makes it."""

    launch: launch.Launch
    case: Case

    def row(self) -> dict[str, Any]:
        """Begin the variant's row in the report."""
        op, direction, shape, name = self.case
        template = {k: str(v).split(".")[-1] for k, v in self.launch.template.items()}
        row: dict[str, Any] = {"body": self.launch.name, "threads": self.launch.threads}
        row |= {"op": op, "direction": direction, "shape": list(shape), "dtype": name}
        return row | {"template": template}


def call_of(case: Case, module: Any) -> tuple[Callable[..., Any], list[mx.array]]:
    """Return a function that runs a case by ops or reference, not compiled, and its arrays."""
    op, direction, shape, name = case
    inputs, options = make_inputs(op, shape, DTYPES[name]), {}
    if direction == "inference":
        direction = "forward"
        options = {"differentiable": False} if module is ops else {}
    f = directed(function(module, op, **options), direction, len(inputs), compiled=False)
    return f, add_cotangents(op, direction, inputs)


def record(case: Case, backend: str) -> list[launch.Launch]:
    """Return the launches of a call; nothing runs."""
    f, arrays = call_of(case, ops)
    with launch.record(backend) as launches:
        f(*arrays)
    return launches


def text_key(call: launch.Launch) -> tuple:
    """Return what MLX's text of a launch follows from; an input of fewer than 8 elements lies in
    another address space."""
    inputs = [(k, v and (str(v[1]), math.prod(v[0]) < 8)) for k, v in call.inputs.items()]
    outputs = [(k, v and str(v[1])) for k, v in call.outputs.items()]
    template = [(k, str(v)) for k, v in call.template.items()]
    return call.name, tuple(inputs), tuple(outputs), call.threads, tuple(template)


def find_variants(cases: Iterable[Case], backend: str) -> list[Variant]:
    """Return the variants of all kernels that these calls launch, in the order of the calls."""
    found: dict[tuple, Variant] = {}
    for case in cases:
        for call in record(case, backend):
            found.setdefault(text_key(call), Variant(call, case))
    return list(found.values())


def shortened(spec: launch.Spec | None) -> launch.Spec | None:
    """Return a spec of at most 8 elements that gives the same text."""
    return spec and ((min(8, max(1, math.prod(spec[0]))),), spec[1])


def refused_launch(call: launch.Launch) -> None:
    """Launch a pipeline with more threads than Metal has: MLX compiles it, and refuses to dispatch.

    Raises:
        ValueError: MLX's refusal, which names the limit.
        RuntimeError: The compiler's message.
    """
    inputs = {k: v and mx.zeros(*v) for k, v in ((k, shortened(v)) for k, v in call.inputs.items())}
    mx.eval([a for a in inputs.values() if a is not None])
    outputs = {k: shortened(v) for k, v in call.outputs.items()}
    mx.eval(launch.run(call.name, inputs, outputs, 1, TOO_MANY_THREADS, call.template))


def thread_limit(message: str) -> int | None:
    """Return the most threads of a threadgroup from MLX's refusal, or None if it is none."""
    found = re.search(r"maximum allowed threads per threadgroup \((\d+)\)", message)
    return int(found.group(1)) if found else None


def most_registers(limit: int) -> int:
    """Return how many registers of 32 bits a thread can have where this many threads fit, by the
    rule of M1 and M2; M3 and later give registers as a kernel runs."""
    return min(MOST_REGISTERS, REGISTER_BYTES // 4 // limit)


def compile_on_metal(variant: Variant) -> dict[str, Any]:
    """Return a variant's limit of threads and what follows from it, or the compiler's message."""
    try:
        refused_launch(variant.launch)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        limit = thread_limit(message)
        if limit is None:
            return {"ok": False, "error": message}
        threads = variant.launch.threads
        row: dict[str, Any] = {"ok": threads <= limit, "most_threads": limit}
        row["most_registers"] = most_registers(limit)
        if threads > limit:
            row["error"] = f"it is launched with {threads} threads, and {limit} fit"
        return row
    return {"ok": False, "error": f"MLX ran it with {TOO_MANY_THREADS} threads: no limit was named"}


def compile_on_cuda(case: Case) -> dict[str, Any]:
    """Return whether a call runs, which compiles its kernels, or the message."""
    f, arrays = call_of(case, ops)
    mx.eval(arrays)
    try:
        mx.eval(f(*arrays))
    except (RuntimeError, ValueError) as error:
        return {"ok": False, "error": str(error)}
    return {"ok": True}
