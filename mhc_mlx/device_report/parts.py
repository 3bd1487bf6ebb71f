"""The parts of a report: each has cases, and a function that makes the row of one."""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from .. import launch, reference
from ..commands import memory
from . import layers, shapes
from .measure import Bench
from .parity import BOUNDS, needed_bytes, worst_error
from .shapes import Case
from .suite import DTYPES, as_list, case_row
from .timing import array_limit, call_times
from .variants import Variant, call_of, compile_on_cuda, compile_on_metal, find_variants

PARTS = ("variants", "parity", "times", "decode")
BUDGET = 0.1  # seconds for each contestant of a row
NO_GPU = "kernels need a GPU, or the simulator of a checkout (tests/simulate.py)"


class Job(NamedTuple):
    """A row that is still to be made."""

    name: str
    row: dict[str, Any]  # what is known before it runs
    run: Callable[[], dict[str, Any]]


def reference_call(case: Case) -> Callable[[], Any]:
    """Return a call of the reference, which is not compiled, on arrays that are ready."""
    f, arrays = call_of(case, reference)
    mx.eval(arrays)
    return lambda: f(*arrays)


def compare(case: Case) -> dict[str, Any]:
    """Return the largest error of a call's results and gradients, relative to the largest value;
    without a GPU only whether the reference's are finite."""
    op, direction, shape, name = case
    if launch.backend() is None:
        results = as_list(reference_call(case)())
        finite = all(bool(mx.isfinite(a).all().item()) for a in results)
        return {"ok": None, "reference_is_finite": finite, "why": NO_GPU}
    options: dict[str, Any] = {"differentiable": False} if direction == "inference" else {}
    error = worst_error(op, shape, DTYPES[name], direction == "forward+backward", **options)
    bound = BOUNDS[DTYPES[name]]
    return {"largest_error": error, "bound": bound, "ok": error < bound}


def reference_times(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the time of a call of the reference where there are no kernels."""
    times = call_times(BUDGET / 10, call)
    return {"plain_us": 1e6 * statistics.median(times), "us": None, "why": NO_GPU}


def time_call(bench: Bench, case: Case) -> dict[str, Any]:
    """Return the time of a call, beside the compiled reference and a copy of as many bytes."""
    if launch.backend() is None:
        return reference_times(reference_call(case))
    return bench.row(*case, threads=None)


def time_sublayers(case: Case) -> dict[str, Any]:
    """Return the time of a sublayer in a row of many at one token, beside the reference."""
    op, _, shape, name = case
    if launch.backend():
        return layers.decode(BUDGET, op, shape, name)
    x = mx.zeros(shape, DTYPES[name])
    parameters = layers.quiet_parameters(x)
    mx.eval(x, parameters)
    return reference_times(lambda: layers.stack(op, reference)(x, *parameters))


def if_it_fits(case: Case, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a case if it fits in the device's memory; give back first what MLX keeps."""
    op, direction, shape, name = case
    if mx.get_cache_memory() > array_limit():
        mx.clear_cache()
    needed = needed_bytes(op, shape, DTYPES[name], direction == "forward+backward")
    if needed > memory():
        size = f"{needed / 2**30:.1f} of {memory() / 2**30:.1f} GiB of memory"
        return {"ok": None, "why": f"left out: it needs {size}"}
    return run()


def variant_jobs() -> list[Job]:
    """Return a job for each variant; on CUDA the first variant of a call compiles all of them."""
    backend = launch.backend()
    variants = find_variants(shapes.variant_cases(backend is not None), backend or "metal")
    on_cuda = functools.cache(compile_on_cuda)

    def run(variant: Variant) -> dict[str, Any]:
        if backend is None:
            return {"ok": None, "why": NO_GPU}
        if backend == "metal":
            return compile_on_metal(variant)
        return if_it_fits(variant.case, lambda: dict(on_cuda(variant.case)))

    jobs = []
    for variant in variants:
        row = variant.row()
        name = f"{row['body']} of {case_name(variant.case)}"
        jobs.append(Job(name, row, functools.partial(run, variant)))
    return jobs


def case_name(case: Case) -> str:
    op, direction, shape, name = case
    return f"{op} {direction} {name} {','.join(map(str, shape))}"


def case_jobs(cases: list[Case], run: Callable[[Case], dict[str, Any]]) -> list[Job]:
    def job(case: Case) -> Job:
        fits = functools.partial(if_it_fits, case, functools.partial(run, case))
        return Job(case_name(case), case_row(*case), fits)

    return [job(case) for case in cases]


def jobs_of(part: str) -> list[Job]:
    """Return the jobs of a part, most important first."""
    kernels = launch.backend() is not None
    if part == "variants":
        return variant_jobs()
    if part == "parity":
        return case_jobs(shapes.parity_cases(kernels), compare)
    if part == "times":
        bench = Bench(BUDGET, None)
        return case_jobs(shapes.timed_cases(kernels), functools.partial(time_call, bench))
    return case_jobs(shapes.decode_cases(kernels), time_sublayers)
