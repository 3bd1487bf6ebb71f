"""An op is measured for a row of a table."""

import statistics

import mlx.core as mx

from .. import ops, reference
from . import suite
from .suite import DTYPES, case_row, function, make_inputs
from .timing import array_limit, directed, input_sets, race


def random_sets(op: str, direction: str, shape, dtype: mx.Dtype) -> list[list[mx.array]]:
    """Make input sets of calls, each with the cotangents that its direction takes."""
    return input_sets(lambda: suite.add_cotangents(op, direction, make_inputs(op, shape, dtype)))


def count_inputs(op: str, shape, dtype: mx.Dtype) -> int:
    return len(make_inputs(op, (1, *shape[1:]), dtype))


def median_and_range(times: list[float]) -> dict:
    median = statistics.median(times)
    return {"us": median * 1e6, "spread": (max(times) - min(times)) / median}


class Bench:
    def __init__(self, budget: float, peak: float | None):
        self.budget, self.peak, self.copy_gbps = budget, peak, 0.0

    def row(
        self, op: str, direction: str, shape, name: str, threads: int | None, baseline: bool = True
    ) -> dict:
        dtype = DTYPES[name]
        if mx.get_cache_memory() > array_limit():
            mx.clear_cache()
        arrays = count_inputs(op, shape, dtype)
        size = suite.mandatory_bytes(op, direction, shape, dtype)
        sets = random_sets(op, direction, shape, dtype)
        half = max(64, size // 2 // 4)  # elements of float32, which are read and written
        fused = directed(function(ops, op, threads_per_group=threads), direction, arrays)
        runners = [(fused, sets), (mx.abs, input_sets(lambda: [mx.random.normal((half,))]))]
        if baseline and direction != "backward":
            runners += [(directed(function(reference, op), direction, arrays), sets)]
        times = race(self.budget, *runners)
        median, copy, *compiled = map(statistics.median, times)
        self.copy_gbps = max(self.copy_gbps, 8e-9 * half / copy)
        row = case_row(op, direction, shape, name) | median_and_range(times[0])
        row |= {"gbps": size / median / 1e9, "percent_of_copy": 100 * copy / median}
        if self.peak:
            row["percent_of_peak"] = row["gbps"] / self.peak * 100
        row["speedup_vs_compiled"] = compiled[0] / median if compiled else None
        return row | {"threads_per_group": threads}

    def reference_row(self, op: str, direction: str, shape, name: str) -> dict:
        """Time the reference, compiled and plain, where there are no kernels."""
        plain, dtype = function(reference, op), DTYPES[name]
        arrays = count_inputs(op, shape, dtype)
        sets = random_sets(op, direction, shape, dtype)
        runners = [(directed(plain, direction, arrays, compiled=c), sets) for c in (True, False)]
        compiled, slow = race(self.budget, *runners)
        row = case_row(op, direction, shape, name) | median_and_range(compiled)
        row |= {"plain_us": statistics.median(slow) * 1e6, "speedup_vs_compiled": None}
        return row | {"threads_per_group": None}
