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
from ..device_report.timing import CACHE
from ..layers import check_sizes
from ..ops.checks import FLOATS, fail
from . import graph
from .exact import random_inputs, site_errors
from .families import ROWS, family_of, named
from .family import Family, GatedSite, Options, Site
from .patching import as_stock, enable, is_patched
from .verify import own_limit, too_large

SITES = 122  # DeepSeek V4.1 has 61 layers with two sites each
UNCOMPILED = "patched, not compiled"
# Streams of more bytes than this meet cold caches when they are timed, as after a sublayer, whose
# weights are larger than a cache. Those of few tokens have just been written, there too.
SMALL = 1 << 20


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


def _seconds_beyond(run: Callable, alone: Callable) -> tuple[float, float]:
    """Return the median time of ``alone``, and by how much ``run`` takes longer, in seconds.

    Both run in turn, so that the clocks of one moment serve both.
    """
    times: list[tuple[float, float]] = []
    for k in range(9):
        pair = []
        for f in (alone, run):
            start = time.perf_counter()
            mx.eval(f())
            pair.append(time.perf_counter() - start)
        if k >= 2:
            times.append((pair[0], pair[1] - pair[0]))
    own, longer = zip(*times, strict=True)
    return statistics.median(own), statistics.median(longer)


@functools.cache
def _compiled_stock(settings: Any, kind: str, eps: float | None) -> tuple[list[Site], Callable]:
    """Return the package's step of a site, compiled, of the state and of the parameters.

    The list gets the site whose code it is before the first call.
    """
    of: list[Site] = []

    def run(state, parameters):
        return of[0].with_arrays(*parameters).step(None, *state)

    return of, mx.compile(run)


def _timed(sites: list[Site]) -> list[Site]:
    """Return the sites that are alike."""
    return [site for site in sites if site.timed]


def _chains(
    sites: list[Site], dtype: mx.Dtype, tokens: int, spacer: Callable | None = None
) -> dict[str, Callable]:
    """Return functions that run all sites one after the other, queued in one evaluation.

    Each site gets the streams that the last one wrote, and its sublayer is the identity.
    "patched" runs them as a patched model does, which compiles each; "patched, not compiled" is
    there where that differs; the package's name runs them as its own model does; with ", compiled"
    the package's code of each site is compiled.
    """
    sites = _timed(sites)
    first, package = sites[0], sites[0].family.package
    state = first.start(*random_inputs(first, dtype, tokens))
    of, compiled = _compiled_stock(first.settings, first.kind, getattr(first.norm, "eps", None))
    of[:] = [first]
    mx.eval(state, [s.parameters for s in sites])

    def chain(step: Callable) -> Callable:
        def run(count: int = len(sites)):
            after = state
            for site in sites[:count]:
                site = site if spacer is None else spacer(after[0], site)
                after = step(site, after)
            return after

        return run

    patched = chain(lambda site, state: site.step(site.options, *state))

    def not_compiled(count: int = len(sites)):
        mx.disable_compile()
        try:
            return patched(count)
        finally:
            mx.enable_compile()

    return {
        "patched": patched,
        **({UNCOMPILED: not_compiled} if launch.backend() else {}),
        package: chain(lambda site, state: site.step(None, *state)),
        f"{package}, compiled": chain(lambda site, state: compiled(state, site.parameters)),
    }


class _Spacer:
    """It stands for a sublayer's weights: a product with zeros reads CACHE / 2 bytes.

    The product waits for the streams before it, and adds its zero to a small array of the next
    site, of an mHC to the ``base``, whose coefficients so wait for it. What a site does before
    these may overlap with it: in the package's code that is x in float32 and its norm; of kernels
    it is nothing. A gated residual adds it to the weight of its norm. Nothing large is written, so
    that no time depends on which memory MLX reuses.
    """

    def __init__(self) -> None:
        self._weight = mx.zeros((CACHE // 8192, 1024), mx.float32)
        mx.eval(self._weight)

    def __call__(self, before: mx.array, site: Site) -> Site:
        scalar = before.flatten()[0].astype(mx.float32)
        zero = (self._weight @ mx.broadcast_to(scalar, (1024, 1)))[0]
        parameters = list(site.parameters)
        parameters[site.waits] = parameters[site.waits] + zero.astype(parameters[site.waits].dtype)
        return site.with_arrays(*parameters)


def site_times(sites: list[Site], dtype: mx.Dtype, tokens: int) -> dict[str, Any]:
    """Return the number of tokens, and the seconds per site of each function of `_chains`.

    Where streams are larger than SMALL, caches are cold: before each site a `_Spacer` reads as many
    bytes as fill them, and its own time, measured alone, is taken off.
    """
    timed = _timed(sites)
    x, _ = random_inputs(timed[0], dtype, tokens)
    if x.nbytes <= SMALL:
        chains = _chains(sites, dtype, tokens)
        return {"tokens": tokens} | {k: _seconds(run) / len(timed) for k, run in chains.items()}
    spacer = _Spacer()

    def alone() -> mx.array:
        last = x
        for site in timed:
            last = spacer(last, site).arrays[site.waits]
        return last

    mx.eval(x)
    found: dict[str, Any] = {"tokens": tokens}
    for k, run in _chains(sites, dtype, tokens, spacer).items():
        own, longer = _seconds_beyond(run, alone)
        found |= {"stand-in": own / len(timed), k: longer / len(timed)}
    return found


def time_line(t: dict, package: str) -> str:
    """Return the result of `site_times` in words."""
    ours, theirs, compiled = t["patched"], t[package], t[f"{package}, compiled"]
    return (
        f"{t['tokens']:5} tokens: {ours * 1e6:.0f} us per sublayer, {package} {theirs * 1e6:.0f} "
        f"us ({theirs / ours:.1f} x), compiled {compiled * 1e6:.0f} us ({compiled / ours:.1f} x)"
        + (f"; {UNCOMPILED} {t[UNCOMPILED] * 1e6:.0f} us" if UNCOMPILED in t else "")
    )


def _metal_dispatches(sites: list[Site], dtype: mx.Dtype, tokens: int) -> dict[str, Any]:
    """Return what a site would dispatch on Metal, where the package may have kernels of its own.

    Patched it differs in its kernels alone, so that is there where kernels run.
    """
    _compiled_stock.cache_clear()  # it may hold a trace of other functions
    package = sites[0].family.package
    try:
        with graph.metal_form(sites[0].family):
            chains = _chains(sites[:3], dtype, tokens)
            counts = {k: graph.dispatches(chains[k]) for k in (package, f"{package}, compiled")}
    finally:
        _compiled_stock.cache_clear()
    found = {k: v["dispatches"] for k, v in counts.items()}
    kernels = len(graph.launched(sites[0], dtype, tokens, "metal"))
    found["patched, kernels"] = kernels
    if launch.backend():
        here = graph.dispatches(_chains(sites[:3], dtype, tokens)["patched"])
        found["patched"] = here["dispatches"] - here["kernels"] + kernels
    return found


def _peak(run: Callable) -> int:
    """Return the peak memory of two sites in bytes, beyond their inputs."""
    mx.eval(run(2))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run(2))
    return mx.get_peak_memory() - before


def random_sites(d: int, count: int, family: Family, bits: int | None = None) -> list[Site]:
    """Return patched hyper-connections of hidden size d with random weights.

    With bits the linear layers that a site has are quantised, in groups of 64.
    """
    sites = []
    for k in range(count):
        site = family.new_site(d)._replace(name=f"random.{k}")
        site.hc.eval()  # as in a model that is loaded: some packages run other code in training
        site.draw(k)
        module = site.hc if site.norm is None else site.norm
        module.set_dtype(mx.bfloat16)
        if bits is not None:
            nn.quantize(site.hc, GROUP, bits)
        enable(site, Options(True, False))
        sites.append(site)
    return sites


BITS = (2, 3, 4, 5, 6, 8)  # to which MLX quantises
GROUP = 64  # weights that have one scale


def check_bits(op: str, bits: Any, d: int, family: Family) -> None:
    """Raise TypeError or ValueError unless sites of this size can have weights of these bits."""
    if type(bits) is not int:
        must = "be an int or None"
        raise TypeError(fail(op, "bits", must, type(bits).__name__))
    if bits not in BITS:
        raise ValueError(fail(op, "bits", f"be one of {BITS}", bits))
    site = family.new_site(d)
    if not isinstance(site, GatedSite):
        must = "be None where sites have no linear layers"
        raise ValueError(fail(op, "bits", must, bits))
    n, _ = site.size
    if n * d % GROUP:
        must = f"be a multiple of {GROUP // n} with bits"
        raise ValueError(fail(op, "d", must, d))


def bench_sites(
    d: int,
    tokens: tuple[int, ...] = (1, 8, 512, 2048),
    dtype: mx.Dtype = mx.bfloat16,
    family: str = "lm_deepseek_v41",
    count: int | None = None,
    bits: int | None = None,
) -> dict[str, Any]:
    """Measure random hyper-connections of a hidden size, patched and by the package's code.

    A call runs 122 sites one after the other, as many as DeepSeek V4.1 has (their weights are
    larger than a cache); the sublayers between them are the identity, and where streams are larger
    than 1 MiB caches are cold. Measured are the time per site of the patched sites, which are
    compiled, and on a GPU of these without `mx.compile`; of the package's code and of that code
    compiled; the dispatches of a site in MLX's graph, here and in Metal's form; the rows of C that
    a site reads and writes per token; and the peak memory of two sites at the largest number of
    tokens. Errors are measured first, at 24 sites with 4 tokens and at the first site with each
    number of tokens. If one is larger than `patch` allows, nothing is timed.

    Args:
        d: C, channels per stream; n is 4.
        tokens: The numbers of tokens in one call.
        dtype: The dtype of x and y.
        family: Of which family, by the name of its file in `mhc_mlx.models.families`.
        count: The number of sites, at least 3; 122 without.
        bits: Of the quantised linear layers of a gated residual, 2 to 6 or 8; None leaves floats.

    Returns:
        Numbers by name, in seconds, bytes, and units in the last place; ``ok`` tells whether the
        errors are small enough.

    Raises:
        TypeError: An argument has another type.
        ValueError: A number is not positive, tokens is empty, count is less than 3, there is no
            such family here, or its sites have nothing that is quantised to these bits.
    """
    count = SITES if count is None else count
    check_sizes("bench_sites", d=(d, math.inf), count=(count, math.inf))
    if count < 3:
        raise ValueError(fail("bench_sites", "count", "be at least 3", count))
    check_counts("bench_sites", tokens=tokens)
    if not tokens:
        raise ValueError(fail("bench_sites", "tokens", "have at least one number", "none"))
    if not isinstance(dtype, mx.Dtype) or dtype not in FLOATS:
        raise TypeError(fail("bench_sites", "dtype", "be float32, float16 or bfloat16", dtype))
    from tqdm import tqdm  # both packages need it

    of = named("bench_sites", family)
    if bits is not None:
        check_bits("bench_sites", bits, d, of)
    sites, package = random_sites(d, count, of, bits), of.package
    report = {
        "family": family,
        "d": d,
        "n": sites[0].size[0],
        "dtype": str(dtype).split(".")[-1],
        "sites": len(sites),
        **({} if bits is None else {"bits": bits}),
    }
    weights = "" if bits is None else f", weights of {bits} bits"
    print(f"{family}, d = {d}, {report['dtype']}{weights}", flush=True)
    steps = len(sites[:24]) + 3 * len(tokens) + 1
    with tqdm(total=steps, desc=f"sites of {d}", leave=False) as bar:
        report["errors"], report["ok"] = _site_errors(sites, dtype, tokens, bar)
        worst = ", ".join(f"{k} {v:.2f}" for k, v in report["errors"].items())
        bar.write(f"largest error against float64, units in the last place: {worst}")
        report["times"] = []
        if not report["ok"]:
            bar.write("parity FAILS: nothing is timed")
            return report
        for length in tokens:
            report["times"].append(site_times(sites, dtype, length))
            bar.write(time_line(report["times"][-1], package))
            bar.update()
        report |= _site_counts(sites, dtype, tokens, bar)
    _print_counts(report)
    return report


def _site_errors(
    sites: list[Site], dtype: mx.Dtype, tokens: tuple[int, ...], bar: Any
) -> tuple[dict[str, float], bool]:
    """Return the largest errors, and whether each is as small as `patch` wants."""
    errors = []
    for k, site in enumerate(sites[:24]):
        errors.append(_largest(site, *random_inputs(site, dtype, 4, k)))
        bar.update()
    for count in tokens:
        distinct = math.gcd(4, count)  # these tokens are repeated, because float64 is slow
        inputs = random_inputs(sites[0], dtype, distinct)
        errors.append(_largest(sites[0], *inputs, count // distinct))
        bar.update()
    right = [
        math.isfinite(ours) and not too_large(ours, own_limit(sites[0], theirs))
        for ours, theirs in errors
    ]
    package = sites[0].family.package
    return {"patched": max(e for e, _ in errors), package: max(e for _, e in errors)}, all(right)


def _site_counts(
    sites: list[Site], dtype: mx.Dtype, tokens: tuple[int, ...], bar: Any
) -> dict[str, Any]:
    """Return dispatches, rows of C and memory of sites."""
    counts, metal, largest = {}, {}, max(tokens)
    for length in tokens:
        chains = _chains(sites[:3], dtype, length)
        counts[str(length)] = {k: graph.dispatches(run) for k, run in chains.items()}
        metal[str(length)] = _metal_dispatches(sites, dtype, length)
        bar.update()
    of_package = graph.rows_of_package(sites[0], dtype)
    rows = {"patched": graph.rows_of_kernels(sites[0], dtype)} | {
        f"{sites[0].family.package}, {k}": v for k, v in of_package.items()
    }
    peaks = {k: _peak(run) for k, run in _chains(sites, dtype, largest).items()}
    bar.update()
    return {
        "graph": counts,
        "Metal's form": metal,
        "rows of C": rows,
        "peak bytes": {"tokens": largest} | peaks,
    }


def _print_counts(report: dict[str, Any]) -> None:
    for length, here in report["graph"].items():
        counts = ", ".join(f"{k} {v['dispatches']}" for k, v in here.items())
        metal = ", ".join(f"{k} {v}" for k, v in report["Metal's form"][length].items())
        print(f"{length:>5} tokens: dispatches per sublayer: {counts}; on Metal: {metal}")
    print("rows of C per token: " + ", ".join(f"{k} {v:g}" for k, v in report["rows of C"].items()))
    peaks = dict(report["peak bytes"])
    largest = peaks.pop("tokens")
    memory = ", ".join(f"{k} {v >> 20} MiB" for k, v in peaks.items())
    print(f"{largest:5} tokens: most memory: {memory}", flush=True)


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
