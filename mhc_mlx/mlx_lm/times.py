"""Measure times, dispatches and memory of sites, and tokens per second of a model.

All are measured patched and by mlx-lm's own code.
"""

import datetime
import functools
import math
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import generate_step

from .. import launch
from ..layers import check_sizes
from ..ops.checks import FLOATS, fail
from .exact import random_inputs, site_errors
from .layers import SinglePassLayer
from .patch import _fails, as_stock
from .sites import (
    SinglePassConnection,
    Site,
    run_site,
    stage_layers,
    stock,
    stock_coefficients,
    stock_site,
    text_model,
)

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
    """Return device, backend, versions of MLX and mlx-lm, and the date, for reports."""
    return {
        "device": mx.device_info().get("device_name", "cpu"),
        "backend": launch.backend() or "none: the reference runs",
        "mlx": mx.__version__,  # pyright: ignore[reportAttributeAccessIssue]
        "mlx-lm": mlx_lm.__version__,
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
def _compiled_stock(n: int, iters: int, hc_eps: float, norm_eps: float, eps: float) -> Callable:
    """Return mlx-lm's code of a site, compiled, of (x, y, fn, base, scale, weight)."""
    fixed = {"hc": n, "iters": iters, "hc_eps": hc_eps, "norm_eps": norm_eps}
    fixed |= {"_eps": mx.array([hc_eps]), "_scale_ids": mx.array([0] * n + [1] * n + [2] * n * n)}

    def run(x, y, fn, base, scale, weight):
        hc = stock_coefficients(types.SimpleNamespace(**fixed, fn=fn, base=base, scale=scale))
        return stock_site(hc, x, y, lambda u: mx.fast.rms_norm(u, weight, eps))

    return mx.compile(run)


def _chains(sites: list[Site], dtype: mx.Dtype, tokens: int) -> dict[str, Callable]:
    """Return functions that run all sites one after the other; the sublayers are the identity.

    "patched" runs them as a patched model does, which compiles each; "mlx-lm" as mlx-lm's model
    does; "mlx-lm, compiled" runs mlx-lm's code of each site, compiled.
    """
    sites = [site for site in sites if type(site.norm) is nn.RMSNorm]
    x, y = random_inputs(sites[0], dtype, tokens)
    hc = sites[0].hc
    numbers = (hc.hc, hc.iters, hc.hc_eps, hc.norm_eps, sites[0].norm.eps)
    compiled = _compiled_stock(*numbers)
    mx.eval(x, y, [(s.hc.parameters(), s.norm.parameters()) for s in sites])

    def chain(step: Callable) -> Callable:
        def run(count: int = len(sites)):
            streams, u, h_pre = x, y, None
            for site in sites[:count]:
                streams, u, h_pre = step(site, streams, u)
            return streams, u, h_pre

        return run

    def arrays(site: Site) -> tuple:
        return site.hc.fn, site.hc.base, site.hc.scale, site.norm.weight

    return {
        "patched": chain(lambda site, x, y: run_site(site.hc, x, y, site.norm)),
        "mlx-lm": chain(
            lambda site, x, y: stock_site(stock_coefficients(site.hc), x, y, site.norm)
        ),
        "mlx-lm, compiled": chain(lambda site, x, y: compiled(x, y, *arrays(site))),
    }


def site_times(sites: list[Site], dtype: mx.Dtype, tokens: int) -> dict[str, Any]:
    """Return the number of tokens, and the seconds per site of each function of `_chains`."""
    count = sum(type(site.norm) is nn.RMSNorm for site in sites)
    chains = _chains(sites, dtype, tokens)
    return {"tokens": tokens} | {k: _seconds(run) / count for k, run in chains.items()}


def time_line(t: dict) -> str:
    """Return the result of `site_times` in words."""
    ours, theirs, compiled = t["patched"], t["mlx-lm"], t["mlx-lm, compiled"]
    return (
        f"{t['tokens']:5} tokens: {ours * 1e6:.0f} us per sublayer, mlx-lm {theirs * 1e6:.0f} us "
        f"({theirs / ours:.1f} x), compiled {compiled * 1e6:.0f} us ({compiled / ours:.1f} x)"
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


def random_sites(d: int, count: int) -> list[Site]:
    """Return patched hyper-connections of hidden size d with random weights."""
    args, sites = stock.ModelArgs(hidden_size=d), []
    for k in range(count):
        hc, norm = stock.HyperConnection(args), nn.RMSNorm(d, eps=args.rms_norm_eps)
        kf, kb, ks = mx.random.split(mx.random.key(k), 3)
        hc.fn = mx.random.normal(hc.fn.shape, key=kf) * hc.fn.shape[1] ** -0.5
        hc.base = mx.random.normal(hc.base.shape, key=kb)
        hc.scale = mx.random.uniform(0.5, 1.5, (3,), key=ks)
        norm.weight = norm.weight.astype(mx.bfloat16)
        hc.__class__, hc.use_metal, hc.differentiable = SinglePassConnection, True, False
        sites.append(Site(f"random.{k}", hc, norm))
    return sites


def bench_sites(
    d: int, tokens: tuple[int, ...] = (1, 8, 512, 2048), dtype: mx.Dtype = mx.bfloat16
) -> dict[str, Any]:
    """Measure random hyper-connections of hidden size d, patched and by mlx-lm's code, and print.

    A call runs 122 sites one after the other, as many as DeepSeek V4.1 has (their weights are
    larger than a cache); the sublayers between them are the identity. Measured are the time per
    site of the patched sites, which are compiled, of mlx-lm's code and of mlx-lm's code compiled;
    the dispatches of a site in MLX's graph; and the peak memory of two sites at the largest number
    of tokens. Errors are measured first, at 24 sites with 4 tokens and at the first site with each
    number of tokens. If one is larger than `patch` allows, nothing is timed.

    Args:
        d: C, channels per stream; n is 4.
        tokens: The numbers of tokens in one call.
        dtype: The dtype of x and y.

    Returns:
        Numbers by name, in seconds, bytes, and units in the last place; ``ok`` tells whether the
        errors are small enough.

    Raises:
        TypeError: An argument has another type.
        ValueError: A number is not positive, or tokens is empty.
    """
    check_sizes("bench_sites", d=(d, math.inf))
    check_counts("bench_sites", tokens=tokens)
    if not tokens:
        raise ValueError(fail("bench_sites", "tokens", "have at least one number", "none"))
    if not isinstance(dtype, mx.Dtype) or dtype not in FLOATS:
        raise TypeError(fail("bench_sites", "dtype", "be float32, float16 or bfloat16", dtype))
    sites = random_sites(d, SITES)
    checked = enumerate(sites[:24])
    errors = [site_errors(site, *random_inputs(site, dtype, 4, k)) for k, site in checked]
    for count in tokens:
        distinct = math.gcd(4, count)  # these tokens are repeated, because float64 is slow
        inputs = random_inputs(sites[0], dtype, distinct)
        errors.append(site_errors(sites[0], *inputs, count // distinct))
    print(f"d = {d}, {str(dtype).split('.')[-1]}")
    report = {"d": d, "n": sites[0].hc.hc, "dtype": str(dtype).split(".")[-1], "sites": len(sites)}
    report["errors"] = {"patched": max(e for e, _ in errors), "mlx-lm": max(e for _, e in errors)}
    worst = ", ".join(f"{k} {v:.2f}" for k, v in report["errors"].items())
    print(f"largest error against float64, units in the last place: {worst}")
    wrong = [pair for pair in errors if _fails(*pair) or not math.isfinite(pair[0])]
    report["times"], report["ok"] = [], not wrong
    if not report["ok"]:
        print("parity FAILS: nothing is timed", flush=True)
        return report
    for count in tokens:
        report["times"].append(site_times(sites, dtype, count))
        print(time_line(report["times"][-1]), flush=True)
    report["graph"] = {
        str(count): {k: _dispatches(run) for k, run in _chains(sites, dtype, count).items()}
        for count in (1, max(tokens))
    }
    chains = _chains(sites, dtype, max(tokens))
    report["peak bytes"] = {"tokens": max(tokens)} | {k: _peak(run) for k, run in chains.items()}
    for count, graph in report["graph"].items():
        counts = ", ".join(f"{k} {v['dispatches']}" for k, v in graph.items())
        print(f"{count:>5} tokens: dispatches per sublayer: {counts}")
    peaks = ", ".join(
        f"{k} {v >> 20} MiB" for k, v in report["peak bytes"].items() if k != "tokens"
    )
    print(f"{max(tokens):5} tokens: most memory: {peaks}", flush=True)
    return report


def _model_times(model: Any, lengths: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Return tokens per second: of prefill by length, and of decoding after the first length."""

    def prompt(length: int) -> mx.array:
        return mx.random.randint(0, model.args.vocab_size, (length,), key=mx.random.key(1))

    def prefill(length: int) -> list:
        cache = model.make_cache()
        return [model(prompt(length)[None], cache)[:, -1], [c.state for c in cache]]

    speeds = {str(n): n / _seconds(functools.partial(prefill, n)) for n in lengths}
    warm, start = 4, 0.0
    for k, _ in enumerate(generate_step(prompt(lengths[0]), model, max_tokens=warm + steps)):
        if k == warm - 1:
            start = time.perf_counter()
    return {"prefill": speeds, "decode": steps / (time.perf_counter() - start)}


def bench(
    model: nn.Module, lengths: tuple[int, ...] = (512, 2048), steps: int = 32
) -> dict[str, Any]:
    """Measure tokens per second of a patched model, and of the same model as mlx-lm runs it.

    Args:
        model: A patched ``deepseek_v41`` model; it stays patched at the same sites.
        lengths: Prompt lengths in tokens: prefill is timed for each, decoding after the first.
        steps: The number of tokens to decode.

    Returns:
        Tokens per second by name.

    Raises:
        TypeError: The model is no ``deepseek_v41``, or lengths or steps are no integers.
        ValueError: The model is not patched, lengths is empty, or a length or steps is not
            positive.
    """
    text = text_model("bench", model)
    check_counts("bench", lengths=lengths)
    if not lengths:
        raise ValueError(fail("bench", "lengths", "have at least one number", "none"))
    check_sizes("bench", steps=(steps, math.inf))
    if not any(isinstance(layer, SinglePassLayer) for layer in stage_layers(text)):
        raise ValueError("[bench] model must be patched but got mlx-lm's own.")
    report = {**machine(), "patched": _model_times(model, lengths, steps)}
    with as_stock(text):
        report["mlx-lm"] = _model_times(model, lengths, steps)
    ours, theirs = report["patched"], report["mlx-lm"]
    for length in ours["prefill"]:
        a, b = ours["prefill"][length], theirs["prefill"][length]
        print(f"prefill {length}: {a:.0f} tokens/s, mlx-lm {b:.0f} ({a / b:.2f} x)")
    a, b = ours["decode"], theirs["decode"]
    print(f"decode: {a:.1f} tokens/s, mlx-lm {b:.1f} ({a / b:.2f} x)")
    return report
