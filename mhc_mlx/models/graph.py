"""Count, from MLX's graph, what a site dispatches and how many rows of C it moves.

Nothing is evaluated, so that Metal's form is counted where there is no Mac.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from .. import launch
from . import run
from .exact import random_inputs
from .family import Family, Site

# With one sequence the slices that mlx-vlm makes contiguous are so already.
VIEWS = launch.VIEWS | {"Contiguous"}

# The number of tokens at which rows are counted: an array has a row of C for each token if its
# size is a multiple of TOKENS * C, which a prime tells from parameters. Up to 256 tokens mlx-vlm
# does not tile, and kernels that split the projection of a few tokens do not run.
TOKENS = 251


def dispatches(chain: Callable[[int], Any]) -> dict[str, int]:
    """Return the numbers of primitives, and of launches, that the third site adds to a graph."""
    added = launch.primitives(*chain(3))
    added.subtract(launch.primitives(*chain(2)))
    # A view as another dtype is called "View" with the dtype.
    launching = sum(count for name, count in added.items() if name.split(" ")[0] not in VIEWS)
    return {
        "primitives": sum(added.values()),
        "dispatches": launching,
        "kernels": added["CustomKernel"],
    }


def one_primitive(x: mx.array) -> mx.array:
    """Stand for a kernel: one primitive, which mx.compile does not fuse with its neighbours."""
    return mx.cumsum(x, axis=-1)


def kernel_like(inputs: list[Any], outputs: list[tuple[tuple[int, ...], mx.Dtype]]) -> list[Any]:
    """Return arrays of these shapes and dtypes that one primitive makes of the inputs."""
    first = one_primitive(mx.depends(inputs[0], inputs[1:]))
    return [mx.as_strided(mx.view(first, dtype), shape) for shape, dtype in outputs]


NORM = (mx.fast, "rms_norm", lambda x, weight, eps: one_primitive(x))  # one kernel on a GPU
SAME = (mx, "contiguous", lambda a, **_: a)  # MLX does not export it; see VIEWS


@contextlib.contextmanager
def replaced(*swaps: tuple[Any, str, Callable]) -> Iterator[None]:
    """Replace functions, each by its module and name, until the context ends."""
    usual = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    try:
        for module, name, f in swaps:
            setattr(module, name, f)
        yield
    finally:
        for module, name, f in usual:
            setattr(module, name, f)


def metal_form(family: Family) -> contextlib.AbstractContextManager[None]:
    """Replace the package's functions that are kernels on Metal by functions of one primitive."""
    return replaced(NORM, *family.metal_kernels())


def launched(site: Site, dtype: mx.Dtype, tokens: int, backend: str) -> list[launch.Launch]:
    """Return the launches of a patched site on a backend, which need not be here."""
    x, y = random_inputs(site, dtype, tokens)
    run.clear()  # functions that are compiled here must hold no launch that was only recorded
    try:
        with launch.record(backend) as launches:
            site.step(site.options, *site.start(x, y))
    finally:
        run.clear()
    return launches


def _rows(size: int, dtype: mx.Dtype, unit: int, itemsize: int) -> float:
    """Return rows of C in x's dtype, or 0 of an array without a row of C for each token."""
    return size / unit * dtype.size / itemsize if size and size % unit == 0 else 0.0


def rows_of_kernels(site: Site, dtype: mx.Dtype) -> float:
    """Return the rows of C per token that a patched site's kernels, and its norm, read and write.

    What a kernel reads twice counts once: the second time it is in a cache.
    """
    unit, rows = TOKENS * site.size[1], 0.0
    for one in launched(site, dtype, TOKENS, "cuda"):
        for spec in (*one.inputs.values(), *one.outputs.values()):
            if spec is not None:
                rows += _rows(math.prod(spec[0]), spec[1], unit, dtype.size)
    return rows + site.product_rows


# What mx.compile fuses with its neighbours, as far as these packages use it.
_FUSED = frozenset(
    "Abs Add AsType Broadcast Clip Divide Exp Greater Less Maximum Minimum Multiply Negative Power "
    "Rsqrt Select Sigmoid Sqrt Square Subtract".split()
)


class Trace:
    """The primitives that a function launches, and which arrays they read and write.

    A view stands for the array that it shows.
    """

    def __init__(self, f: Callable, *arrays: mx.array):
        self.launching: list[str] = []  # the names of primitives, in order
        self.reads: list[list[str]] = []
        self.writes: list[list[str]] = []
        self.readers: dict[str, list[int]] = {}
        self.arrays: dict[str, tuple[int, mx.Dtype]] = {}  # size and dtype
        self.outputs: set[str] = set()
        self._of: dict[str, str] = {}  # the array of a view
        mx.export_function(self._add, f, *arrays)
        self.outputs = {self._of.get(name, name) for name in self.outputs}

    def _add(self, entry: dict[str, Any]) -> None:
        if entry["type"] == "outputs":  # they come before the primitives
            self.outputs = {name for name, *_ in entry["outputs"]}
        if entry["type"] != "primitive":
            return
        for name, shape, dtype in (*entry["inputs"], *entry["outputs"]):
            self.arrays.setdefault(name, (math.prod(shape), dtype))
        names = [str(name) for name, *_ in entry["inputs"]]
        inputs = [self._of.get(name, name) for name in names]
        outputs = [str(name) for name, *_ in entry["outputs"]]
        if entry["name"] in VIEWS:
            self._of |= dict.fromkeys(outputs, inputs[0])
            return
        for name in inputs:
            self.readers.setdefault(name, []).append(len(self.launching))
        self.launching.append(entry["name"])
        self.reads.append(inputs)
        self.writes.append(outputs)

    def groups(self) -> list[int]:
        """Return the launch of each primitive if all is compiled.

        As in MLX, elementwise work joins what alone reads it, if that is elementwise, too.
        """
        group = list(range(len(self.launching)))
        for k in reversed(group):
            used = [r for name in self.writes[k] for r in self.readers.get(name, [])]
            into = {group[r] for r in used}
            fused = {self.launching[k], *(self.launching[r] for r in used)} <= _FUSED
            if fused and len(into) == 1 and not self.outputs & set(self.writes[k]):
                group[k] = into.pop()
        return group

    def rows(self, group: list[int], unit: int, itemsize: int) -> float:
        """Return the rows of C that launches read and write."""
        made = {name: group[k] for k, names in enumerate(self.writes) for name in names}
        moved: set[tuple[int, str]] = set()
        for k, launched in enumerate(group):
            for name in self.reads[k]:
                if made.get(name) != launched:
                    moved.add((launched, name))
            for name in self.writes[k]:
                elsewhere = {group[r] for r in self.readers.get(name, [])} - {launched}
                if elsewhere or name in self.outputs:
                    moved.add((launched, name))
        return sum(_rows(*self.arrays[name], unit, itemsize) for _, name in moved)


def package_trace(site: Site, dtype: mx.Dtype, tokens: int = TOKENS) -> Trace:
    """Return what the package's code of a site launches on a GPU, without mx.compile."""
    state = site.start(*random_inputs(site, dtype, tokens))
    mx.eval(state, site.parameters)  # how they are drawn is no part of the site
    with replaced(NORM, SAME):
        return Trace(lambda *state: site.step(None, *state), *state)


def rows_of_package(site: Site, dtype: mx.Dtype) -> dict[str, float]:
    """Return the rows of C per token that the package's code reads and writes.

    "by op" is without mx.compile at all, also where the package has it; "compiled" is with all of
    the site compiled.
    """
    trace, unit = package_trace(site, dtype), TOKENS * site.size[1]
    alone = list(range(len(trace.launching)))
    return {
        "by op": trace.rows(alone, unit, dtype.size),
        "compiled": trace.rows(trace.groups(), unit, dtype.size),
    }
