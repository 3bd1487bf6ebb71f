"""An op is measured for a row of the table, for a profiler, or in a sweep of its tilings."""

import statistics

import mlx.core as mx

from benchmarks import suite
from benchmarks.parity import verify
from benchmarks.report import show
from benchmarks.suite import DIRECTIONS, DTYPES, OPS, case_row, function, make_inputs
from benchmarks.timing import array_limit, directed, input_sets, race
from mhc_mlx import launch, ops, reference
from mhc_mlx.devices import Device

# The loads of these do not follow `tiling.token_tiling`, so a sweep tries their threads alone.
THREADS_ALONE = [("sinkhorn_knopp", d) for d in DIRECTIONS] + [("mhc_seam", "backward")]


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


def launch_twice(op: str, shape, name: str, directions: list[str], threads: int | None) -> None:
    """Run each direction twice, the second time compiled and allocated, for a profiler that counts
    each launch."""
    f, inputs = function(ops, op, threads_per_group=threads), make_inputs(op, shape, DTYPES[name])
    arrays = suite.add_cotangents(op, "forward+backward", inputs)
    mx.eval(arrays)
    for direction in directions:
        run = directed(f, direction, len(inputs))
        for _ in range(2):
            mx.eval(run(*arrays))


def sweep(bench: Bench, op: str, shape, name: str, verified: list[dict]) -> list[dict]:
    """Try threads per group x vector width, or threads alone of an op that has another rule for its
    loads; mark the best and what the default picks. Each is timed if its parity is right."""
    rows, usual = [], ops.tiling.token_tiling
    for direction in ("forward", "forward+backward" if OPS[op].saves else "backward"):
        candidates = [(None, threads, None) for threads in (None, 64, 128, 256, 512)]
        if (op, direction) not in THREADS_ALONE and not OPS[op].saves:
            copies = 1 if direction == "forward" else 2
            size, device = DTYPES[name].size, launch.device()
            chosen = usual(shape[1], shape[2], size, copies, None, device)
            candidates = list(tilings(*shape[1:], size, copies, device, chosen))
        timed = []
        for vec, threads, tiling in candidates:
            ops.tiling.token_tiling = (lambda *_, tiling=tiling, **__: tiling) if tiling else usual
            try:
                verified += verify("rows", op, shape, name, [direction], threads)
                if not verified[-1]["ok"]:
                    continue
                row = bench.row(op, direction, shape, name, threads, baseline=False)
            finally:
                ops.tiling.token_tiling = usual
            picked = (vec, threads) == (chosen.vec, chosen.threads) if vec else threads is None
            timed.append(row | {"vec": vec, "default": picked})
        print_sweep(timed)
        rows += timed
    return rows


def print_sweep(rows: list[dict]) -> None:
    for row in rows:
        best = row is min(rows, key=lambda r: r["us"])
        mark = " <- best" * best + " <- default" * row["default"]
        threads = row["threads_per_group"] or "its own"
        print(f"vec {row['vec']} threads {threads:>7} {show(row)}{mark}", flush=True)


def tilings(n: int, C: int, size: int, copies: int, device: Device, chosen):
    """Yield vector width, threads and `Geometry` of what a sweep tries."""
    for vec in (1, 2, 4, 8):
        for threads in (32, 64, 128, 160, 256, 512):
            if C % vec or vec * size > 16 or vec * n > 64:
                continue
            passes = -(-C // (vec * threads))
            if threads > 32 and (threads - 32) * vec >= C or passes > 16:
                continue
            registers = passes * copies * n * (max(4, vec * size) if copies == 1 else 4 * vec)
            most = device.forward_register_bytes if copies == 1 else device.backward_register_bytes
            cached = n <= 8 and registers <= most
            yield (
                vec,
                threads,
                chosen._replace(vec=vec, threads=threads, passes=passes, cached=cached),
            )
