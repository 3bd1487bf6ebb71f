"""Calls are timed, and what they dispatch is counted."""

import contextlib
import math
import statistics
import time
from collections import Counter

import mlx.core as mx

from .. import launch
from ..commands import memory
from .suite import as_list

CACHE = 256 << 20  # input sets together reach this many bytes: several times any L2
MOST_SETS = 32  # more do not matter: small inputs' time is MLX's and not the memory's


def array_limit() -> int:
    """Return the bytes that arrays of one kind may take together: a fifth of the memory."""
    return memory() // 5


def race(budget: float, *contestants: tuple) -> list[list[float]]:
    """Measure seconds per call in five rounds, for each (function, input sets). They run in turn,
    so that the clocks and the memory of one moment serve all alike."""

    def run(f, sets, calls):
        start = time.perf_counter()
        mx.eval([f(*sets[i % len(sets)]) for i in range(calls)])
        mx.synchronize()
        return (time.perf_counter() - start) / calls

    plan = []
    for f, sets in contestants:
        size = sum(a.nbytes for a in as_list(f(*sets[0])))
        run(f, sets, len(sets))
        calls = min(400, int(budget / 5 / max(run(f, sets, len(sets)), 1e-6)))
        calls = min(max(len(sets), calls), array_limit() // max(1, size))
        plan.append((f, sets, max(2, calls)))
    times: list[list[float]] = []
    for _ in range(2):  # the first round at a size is for the allocator: often half as fast
        times = [[run(*entry)] for entry in plan]
    for _ in range(4):
        for rounds, entry in zip(times, plan, strict=True):
            rounds.append(run(*entry))
    return times


def directed(f, direction: str, arrays: int, compiled: bool = True):
    """Return f, its gradients, or both, as a compiled function of the arrays and the cotangents."""
    wrap = mx.compile if compiled else lambda f: f
    if direction == "forward":
        return wrap(lambda *a: f(*a[:arrays]))

    def both(*a):
        outputs, gradients = mx.vjp(f, list(a[:arrays]), list(a[arrays:]))
        return gradients if direction == "backward" else outputs + gradients

    return wrap(both)


def input_sets(make) -> list[list[mx.array]]:
    """Make two input sets or more, until together they reach CACHE or there are MOST_SETS."""
    sets = []
    while len(sets) < 2 or len(sets) < min(MOST_SETS, CACHE / sum(a.nbytes for a in sets[0])):
        sets.append(make())
        mx.eval(sets[-1])
    return sets


def dispatches(results) -> Counter:
    """Count by kind the primitives that launch work in the graph of results that are not yet
    evaluated."""
    found = launch.primitives(*as_list(results))
    return Counter({k: count for k, count in found.items() if k not in launch.VIEWS})


@contextlib.contextmanager
def launches():
    """Collect of every launch the kernel, the bytes of its source, which MLX hashes at each
    evaluation, and the number of its template arguments."""
    launched, makers = [], ("metal_kernel", "cuda_kernel")
    usual = {k: getattr(mx.fast, k) for k in makers}

    def spying(make):
        def construct(name, source, header="", **options):
            run = make(name=name, source=source, header=header, **options)

            def launch(**call):
                row = {"kernel": name, "source_bytes": len(source) + len(header)}
                launched.append(row | {"template_arguments": len(call["template"])})
                return run(**call)

            return launch

        return construct

    launch._build.cache_clear()  # now spies build the kernels, and afterwards none does
    try:
        for k in makers:
            setattr(mx.fast, k, spying(usual[k]))
        yield launched
    finally:
        for k in makers:
            setattr(mx.fast, k, usual[k])
        launch._build.cache_clear()


def call_times(budget: float, f, evaluate: bool = True) -> list[float]:
    """Measure seconds of single calls of f; each is evaluated alone, or only its graph is built."""

    def run():
        start = time.perf_counter()
        results = f()
        if evaluate:
            mx.eval(results)
        return time.perf_counter() - start

    for _ in range(2):
        run()
    mx.synchronize()
    return [run() for _ in range(max(5, min(200, int(budget / max(run(), 1e-6)))))]


def spread(times: list[float]) -> float:
    """Return the range of single calls, whose slowest are accidents: from the fastest to the third
    quartile, over the median."""
    return (statistics.quantiles(times)[2] - min(times)) / statistics.median(times)


def gpu_time(f, calls: int = 32) -> float:
    """Measure seconds of f on the GPU alone: how much longer a long copy takes with the calls
    queued behind it. The host is done before the copy is, so its own time is hidden, as far as MLX
    queues."""
    pad = mx.ones(max(64, array_limit() // 6 // 4))
    mx.eval(pad)

    def run(passes, calls):
        results, busy = [f() for _ in range(calls)], pad
        for _ in range(passes):
            busy = mx.abs(busy)
        start = time.perf_counter()
        mx.async_eval(busy)
        mx.eval(results)
        mx.synchronize()
        return time.perf_counter() - start

    run(8, calls)
    passes = max(4, min(40, math.ceil(2 * run(0, calls) / (run(8, 0) / 8))))
    run(passes, calls)
    added = [run(passes, calls) - run(passes, 0) for _ in range(7)]
    return max(0.0, statistics.median(added) / calls)
