"""Measure times, dispatches and memory of sites, and tokens per second of a model.

All are measured patched and by the package's own code.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import launch
from ..layers import check_sizes
from ..ops.checks import FLOATS, fail
from .exact import random_inputs, site_errors
from .families import ROWS, family_of, named
from .family import Family, Options, Settings, Site
from .patching import as_stock, enable, is_patched
from .verify import LEAST, too_large

SITES = 122  # DeepSeek V4.1 has 61 layers with two sites each


def check_counts(op: str, **counts: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless each argument is a tuple of positive ints."""
    for name, values in counts.items():
        if not isinstance(values, (tuple, list)):
            must = "be a tuple of positive ints"
            raise TypeError(fail(op, name, must, type(values).__name__))
        for value in values:
            check_sizes(op, **{name: (value, math.inf)})


def machine() -> dict[str, Any]:
    """Return device, backend, versions of MLX and the packages, and the date, for reports."""
    versions = {}
    for package in dict.fromkeys(row.package for row in ROWS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": mx.device_info().get("device_name", "cpu"),
        "backend": launch.backend() or "none: the reference runs",
        "mlx": mx.__version__,  # pyright: ignore[reportAttributeAccessIssue]
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def _seconds(run: Callable) -> float:
    """Return the median time of ``mx.eval(run())`` after two calls, in seconds.

    There are at least 5 calls, and up to 50 until they have taken 50 ms together.
    """
    for _ in range(2):
        mx.eval(run())
    times = []
    while len(times) < 5 or (sum(times) < 0.05 and len(times) < 50):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@functools.cache
def _compiled_stock(settings: Settings, kind: str, eps: float) -> tuple[list[Site], Callable]:
    """Return the package's code of a site, compiled, of (x, y, fn, base, scale, weight).

    The list gets the site whose code it is before the first call.
    """
    of: list[Site] = []

    def run(x, y, *arrays):
        return _step(of[0].with_arrays(*arrays), None, x, y)

    return of, mx.compile(run)


def _step(site: Site, options: Options | None, x: mx.array, y: mx.array) -> tuple:
    """Run a site whose sublayer is the identity: return its streams and what is read.

    Where sites are not lagged, what is read is what is written back.
    """
    outputs = site.outputs(options, x, y if site.kind == "lagged" else None)
    return outputs["out"], outputs["u"]


def _timed(sites: list[Site]) -> list[Site]:
    """Return the sites that are alike: those with a plain norm and streams as results."""
    return [site for site in sites if type(site.norm) is nn.RMSNorm and site.kind != "head"]


def _chains(sites: list[Site], dtype: mx.Dtype, tokens: int) -> dict[str, Callable]:
    """Return functions that run all sites one after the other; the sublayers are the identity.

    "patched" runs them as a patched model does, which compiles each; the package's name as its own
    model does; with ", compiled" the package's code of each site is compiled.
    """
    sites = _timed(sites)
    first, package = sites[0], sites[0].family.package
    x, y = random_inputs(first, dtype, tokens)
    of, compiled = _compiled_stock(first.settings, first.kind, first.norm.eps)
    of[:] = [first]
    mx.eval(x, y, [(s.arrays, s.norm.parameters()) for s in sites])

    def chain(step: Callable) -> Callable:
        def run(count: int = len(sites)):
            streams, u = x, y
            for site in sites[:count]:
                streams, u = step(site, streams, u)
            return streams, u

        return run

    return {
        "patched": chain(lambda site, x, y: _step(site, site.options, x, y)),
        package: chain(lambda site, x, y: _step(site, None, x, y)),
        f"{package}, compiled": chain(
            lambda site, x, y: compiled(x, y, *site.arrays, site.norm.weight)
        ),
    }


def site_times(sites: list[Site], dtype: mx.Dtype, tokens: int) -> dict[str, Any]:
    """Return the number of tokens, and the seconds per site of each function of `_chains`."""
    count = len(_timed(sites))
    chains = _chains(sites, dtype, tokens)
    return {"tokens": tokens} | {k: _seconds(run) / count for k, run in chains.items()}


def time_line(t: dict, package: str) -> str:
    """Return the result of `site_times` in words."""
    ours, theirs, compiled = t["patched"], t[package], t[f"{package}, compiled"]
    return (
        f"{t['tokens']:5} tokens: {ours * 1e6:.0f} us per sublayer, {package} {theirs * 1e6:.0f} "
        f"us ({theirs / ours:.1f} x), compiled {compiled * 1e6:.0f} us ({compiled / ours:.1f} x)"
    )


def _dispatches(run: Callable) -> dict[str, Any]:
    """Return the numbers of primitives, and of launches, that the third site adds to a graph."""
    added = launch.primitives(*run(3))
    added.subtract(launch.primitives(*run(2)))
    launching = sum(count for name, count in added.items() if name not in launch.VIEWS)
    return {"primitives": sum(added.values()), "dispatches": launching}


def _peak(run: Callable) -> int:
    """Return the peak memory of two sites in bytes, beyond their inputs."""
    mx.eval(run(2))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run(2))
    return mx.get_peak_memory() - before


def random_sites(d: int, count: int, family: Family) -> list[Site]:
    """Return patched hyper-connections of hidden size d with random weights."""
    sites = []
    for k in range(count):
        site = family.new_site(d)
        (fn, base, scale), norm = site.arrays, site.norm
        kf, kb, ks = mx.random.split(mx.random.key(k), 3)
        fn = mx.random.normal(fn.shape, key=kf) * fn.shape[1] ** -0.5
        base = mx.random.normal(base.shape, key=kb)
        scale = mx.random.uniform(0.5, 1.5, scale.shape, key=ks)
        norm.weight = norm.weight.astype(mx.bfloat16)
        site = site.with_arrays(fn, base, scale, norm.weight)._replace(name=f"random.{k}")
        enable(site, Options(True, False))
        sites.append(site)
    return sites


def bench_sites(
    d: int,
    tokens: tuple[int, ...] = (1, 8, 512, 2048),
    dtype: mx.Dtype = mx.bfloat16,
    family: str = "lm_deepseek_v41",
) -> dict[str, Any]:
    """Measure random hyper-connections of a hidden size, patched and by the package's code.

    A call runs 122 sites one after the other, as many as DeepSeek V4.1 has (their weights are
    larger than a cache); the sublayers between them are the identity. Measured are the time per
    site of the patched sites, which are compiled, of the package's code and of that code compiled;
    the dispatches of a site in MLX's graph; and the peak memory of two sites at the largest number
    of tokens. Errors are measured first, at 24 sites with 4 tokens and at the first site with each
    number of tokens. If one is larger than `patch` allows, nothing is timed.

    Args:
        d: C, channels per stream; n is 4.
        tokens: The numbers of tokens in one call.
        dtype: The dtype of x and y.
        family: Of which family, by the name of its file in `mhc_mlx.models.families`.

    Returns:
        Numbers by name, in seconds, bytes, and units in the last place; ``ok`` tells whether the
        errors are small enough.

    Raises:
        TypeError: An argument has another type.
        ValueError: A number is not positive, tokens is empty, or there is no such family here.
    """
    check_sizes("bench_sites", d=(d, math.inf))
    check_counts("bench_sites", tokens=tokens)
    if not tokens:
        raise ValueError(fail("bench_sites", "tokens", "have at least one number", "none"))
    if not isinstance(dtype, mx.Dtype) or dtype not in FLOATS:
        raise TypeError(fail("bench_sites", "dtype", "be float32, float16 or bfloat16", dtype))
    of = named("bench_sites", family)
    sites, package = random_sites(d, SITES, of), of.package
    errors = [
        _largest(site, *random_inputs(site, dtype, 4, k)) for k, site in enumerate(sites[:24])
    ]
    for count in tokens:
        distinct = math.gcd(4, count)  # these tokens are repeated, because float64 is slow
        inputs = random_inputs(sites[0], dtype, distinct)
        errors.append(_largest(sites[0], *inputs, count // distinct))
    report = {
        "d": d,
        "n": sites[0].size[0],
        "dtype": str(dtype).split(".")[-1],
        "sites": len(sites),
    }
    print(f"d = {d}, {report['dtype']}")
    report["errors"] = {"patched": max(e for e, _ in errors), package: max(e for _, e in errors)}
    worst = ", ".join(f"{k} {v:.2f}" for k, v in report["errors"].items())
    print(f"largest error against float64, units in the last place: {worst}")
    limits = [max(theirs, LEAST) for _, theirs in errors]
    pairs = zip(errors, limits, strict=True)
    wrong = [e for (e, _), most in pairs if too_large(e, most) or not math.isfinite(e)]
    report["times"], report["ok"] = [], not wrong
    if not report["ok"]:
        print("parity FAILS: nothing is timed", flush=True)
        return report
    for count in tokens:
        report["times"].append(site_times(sites, dtype, count))
        print(time_line(report["times"][-1], package), flush=True)
    report["graph"] = {
        str(count): {k: _dispatches(run) for k, run in _chains(sites, dtype, count).items()}
        for count in (1, max(tokens))
    }
    peaks = {k: _peak(run) for k, run in _chains(sites, dtype, max(tokens)).items()}
    report["peak bytes"] = {"tokens": max(tokens)} | peaks
    for count, graph in report["graph"].items():
        counts = ", ".join(f"{k} {v['dispatches']}" for k, v in graph.items())
        print(f"{count:>5} tokens: dispatches per sublayer: {counts}")
    memory = ", ".join(f"{k} {v >> 20} MiB" for k, v in peaks.items())
    print(f"{max(tokens):5} tokens: most memory: {memory}", flush=True)
    return report


def _largest(site: Site, x: mx.array, y: mx.array, repeats: int = 1) -> tuple[float, float]:
    """Return the largest error of a site as it runs now, and by the package's code."""
    ours, theirs = site_errors(site, site.options, x, y, repeats)
    return ours.most, theirs.most


def _model_times(
    family: Family, model: Any, lengths: tuple[int, ...], steps: int
) -> dict[str, Any]:
    """Return tokens per second: of prefill by length, and of decoding after the first length."""

    def prompt(length: int) -> mx.array:
        return mx.random.randint(0, family.vocabulary(model), (length,), key=mx.random.key(1))

    def prefill(length: int) -> mx.array:
        return family.logits(model, prompt(length)[None], family.cache(model))[:, -1]

    speeds = {str(n): n / _seconds(functools.partial(prefill, n)) for n in lengths}
    warm, start = 4, 0.0
    for k, _ in enumerate(family.generate(model, prompt(lengths[0]), warm + steps)):
        if k == warm - 1:
            start = time.perf_counter()
    return {"prefill": speeds, "decode": steps / (time.perf_counter() - start)}


def bench(
    model: nn.Module, lengths: tuple[int, ...] = (512, 2048), steps: int = 32
) -> dict[str, Any]:
    """Measure tokens per second of a patched model, and of the same model as its package runs it.

    Args:
        model: A patched model; it stays patched at the same sites.
        lengths: Prompt lengths in tokens: prefill is timed for each, decoding after the first.
        steps: The number of tokens to decode.

    Returns:
        Tokens per second by name.

    Raises:
        TypeError: The model is no `nn.Module`, or lengths or steps are no integers.
        ValueError: The model is of no family or not patched, lengths is empty, or a length or steps
            is not positive.
    """
    family = family_of("bench", model)
    package = family.package
    check_counts("bench", lengths=lengths)
    if not lengths:
        raise ValueError(fail("bench", "lengths", "have at least one number", "none"))
    check_sizes("bench", steps=(steps, math.inf))
    if not is_patched(model):
        raise ValueError(f"[bench] model must be patched but got {package}'s own.")
    report = {**machine(), "patched": _model_times(family, model, lengths, steps)}
    with as_stock(model):
        report[package] = _model_times(family, model, lengths, steps)
    ours, theirs = report["patched"], report[package]
    for length in ours["prefill"]:
        a, b = ours["prefill"][length], theirs["prefill"][length]
        print(f"prefill {length}: {a:.0f} tokens/s, {package} {b:.0f} ({a / b:.2f} x)")
    a, b = ours["decode"], theirs["decode"]
    print(f"decode: {a:.1f} tokens/s, {package} {b:.1f} ({a / b:.2f} x)")
    return report
