"""Time a site of Qwen's gated residuals, fused and by mlx-vlm's own code of the site.

    python -m benchmarks.gated --json gated.json

A site is a write-back, the norm of each stream, down, silu, up and the read by gates; its sublayer
is the identity. "fused" has stream_norm and gate_mix, all else is MLX's; "mlx-vlm" is its class
Qwen4ExpGatedResidual, which compiles its elementwise work piece by piece, or where mlx-vlm is not
installed the same steps; "mlx-vlm, compiled" has the site in one mx.compile, as "fused" has.

Each is timed forward and forward+backward, in bfloat16 with weights in bfloat16 and with down, up
and inject in 4 bits; then as a chain of sites with weights of their own at one token, evaluated
once as a decoder does. Backward gives the gradients of the streams, of y, of h_post and of the
weights that are not quantised. Peak memory is what outputs and gradients of --train-sites sites
take beside the inputs. Dispatches that a site adds are counted in the graph as on Metal; for this
nothing runs.
"""

import argparse
import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from benchmarks.experiment import about
from mhc_mlx import backend, gate_mix, launch, stream_norm
from mhc_mlx.commands import Output, check_strings, make_parser
from mhc_mlx.device_report.timing import call_times, directed, gpu_time, input_sets, race
from mhc_mlx.models import graph

COMMAND = "python -m benchmarks.gated"
STOCK, COMPILED = "mlx-vlm", "mlx-vlm, compiled"
KINDS = ("fused", STOCK, COMPILED)
WEIGHTS = ("bfloat16", "4 bits")
PARTS = ("differences", "dispatches", "sites", "chains", "training")  # of a report
GROUP = 64  # elements that share a scale
EPS = 1e-6


# ---- mlx-vlm's steps


@functools.cache
def pieces(n: int, C: int) -> tuple[Callable, Callable, Callable, Callable]:
    """Return the four functions that mlx-vlm 0.7.10 compiles: norm, silu, read and gate."""

    def normalize(x, weight):
        v = x.astype(mx.float32).reshape(*x.shape[:-1], n, C)
        v = v * mx.rsqrt(mx.mean(mx.square(v), axis=-1, keepdims=True) + EPS)
        v = v.reshape(x.shape) * (1.0 + weight.astype(mx.float32))
        return v.astype(x.dtype)

    def mix(logits, normed):
        gates = mx.sigmoid(logits).reshape(*logits.shape[:-1], n, C)
        return mx.mean(gates * normed.reshape(*normed.shape[:-1], n, C), axis=-2)

    def activate(z):
        return nn.silu(z / n)

    def gate(z):
        return 2 * mx.sigmoid(z / n)

    norm, silu, read, post = map(mx.compile, (normalize, activate, mix, gate))
    return norm, silu, read, post


class GatedResidual(nn.Module):
    """mlx-vlm's Qwen4ExpGatedResidual, with its names of parameters."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.shape = n, C = config.hc_count, config.hidden_size
        self.hc_norm = nn.RMSNorm(n * C)  # for its weight; the norm is of each stream
        self.input_mix_weight_down = nn.Linear(n * C, config.hc_lowrank, bias=False)
        self.input_mix_weight_up = nn.Linear(config.hc_lowrank, n * C, bias=False)
        self.block_inject_weight = nn.Linear(n * C, n, bias=False)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        norm, silu, read, post = pieces(*self.shape)
        normed = norm(x, self.hc_norm.weight)
        logits = self.input_mix_weight_up(silu(self.input_mix_weight_down(normed)))
        return read(logits, normed), x, post(self.block_inject_weight(normed))


def stock_class() -> Any:
    """Return mlx-vlm's class, or the one above where mlx-vlm is not installed or lacks it."""
    try:
        module = importlib.import_module("mlx_vlm.models.qwen4_exp.language")
    except ImportError:
        return GatedResidual
    return module.Qwen4ExpGatedResidual


def make_site(n: int, C: int, rank: int, weights: str) -> nn.Module:
    """Return a site with random weights; in 4 bits its three products are."""
    names = {"hc_count": n, "hidden_size": C, "hc_lowrank": rank, "rms_norm_eps": EPS}
    site = stock_class()(SimpleNamespace(**names))
    site.hc_norm.weight = 0.1 * mx.random.normal((n * C,))
    site.set_dtype(mx.bfloat16)
    if weights != "bfloat16":
        nn.quantize(site, GROUP, 4)
    mx.eval(site.parameters())
    return site


# ---- a site: (site, x [T, n, C], y [T, C], h_post [T, n]) -> out, u, the next h_post


def stock_step(site: Any, x: mx.array, y: mx.array, h_post: mx.array) -> tuple[mx.array, ...]:
    T, n, C = x.shape
    hidden = x.reshape(1, T, n * C)
    injection = y[None, :, None] * h_post.astype(x.dtype)[None, ..., None]
    u, out, post = site(hidden + injection.reshape(hidden.shape))
    return out.reshape(x.shape), u.reshape(y.shape), post.reshape(T, n)


def fused_step(site: Any, x: mx.array, y: mx.array, h_post: mx.array) -> tuple[mx.array, ...]:
    T, n, C = x.shape
    _, silu, _, post = pieces(n, C)
    inject, weight = site.block_inject_weight, site.hc_norm.weight.reshape(n, C)
    quantized = isinstance(inject, nn.QuantizedLinear)
    out, s, next_post = stream_norm(x, weight, y, h_post, None if quantized else inject.weight, EPS)
    v = s.reshape(T, n * C)
    logits = site.input_mix_weight_up(silu(site.input_mix_weight_down(v)))
    u = gate_mix(logits.reshape(x.shape), s)
    return out, u, post(inject(v)) if quantized else next_post


STEPS = {"fused": fused_step, STOCK: stock_step, COMPILED: stock_step}


def of_parameters(sites: list[nn.Module], step: Callable) -> tuple[Callable, list[mx.array]]:
    """Return the sites, one after another, as a function of x, y, h_post and of the weights that
    have gradients, and these weights."""
    found = [tree_flatten(site.trainable_parameters()) for site in sites]
    names = [[name for name, _ in pairs] for pairs in found]

    def run(x, y, h_post, *weights):
        remaining = iter(weights)
        for site, own, pairs in zip(sites, names, found, strict=True):
            site.update(tree_unflatten([(name, next(remaining)) for name in own]))
            x, y, h_post = step(site, x, y, h_post)
            site.update(tree_unflatten(pairs))
        return [x, y, h_post]

    return run, [a for pairs in found for _, a in pairs]


def make_streams(T: int, n: int, C: int) -> list[mx.array]:
    x, y = mx.random.normal((T, n, C)), mx.random.normal((T, C))
    return [x.astype(mx.bfloat16), y.astype(mx.bfloat16), mx.random.uniform(0, 2, (T, n))]


# ---- what is measured


def difference(site: nn.Module, T: int, n: int, C: int) -> float:
    """Return the largest difference of u, fused and by mlx-vlm, over the largest u."""
    streams = make_streams(T, n, C)
    fused, stock = (STEPS[k](site, *streams)[1].astype(mx.float32) for k in KINDS[:2])
    relative: Any = (mx.abs(fused - stock).max() / mx.abs(stock).max()).item()
    return relative


def stood_for(name, inputs, outputs, *_, **options) -> list[mx.array]:
    """`launch.run`, by one primitive for each launch."""
    made = [spec for spec in outputs.values() if spec is not None]
    return graph.kernel_like([a for a in inputs.values() if a is not None], made)


def dispatches(sites: list[nn.Module], T: int, n: int, C: int) -> dict[str, int]:
    """Return how many dispatches a site adds to a graph, by kind, on Metal."""
    streams, found = make_streams(T, n, C), {}
    place = launch.Place("metal", mx.default_device())
    with graph.replaced((launch, "run", stood_for)), launch.at(place):
        for kind in KINDS:

            def chain(count: int, kind: str = kind) -> list[mx.array]:
                f = of_parameters(sites[:count], STEPS[kind])[0]
                return (f if kind == STOCK else mx.compile(f))(*streams, *of_weights(sites[:count]))

            found[kind] = graph.dispatches(chain)["dispatches"]
    return found


def of_weights(sites: list[nn.Module]) -> list[mx.array]:
    return of_parameters(sites, stock_step)[1]


def race_site(site: nn.Module, direction: str, T: int, n: int, C: int, budget: float) -> dict:
    """Return microseconds of a site by kind, timed in turn."""
    runners = []
    for kind in KINDS:
        f, weights = of_parameters([site], STEPS[kind])

        def make(f=f, weights=weights) -> list[mx.array]:
            arrays = [*make_streams(T, n, C), *weights]
            if direction == "forward":
                return arrays
            return arrays + [mx.random.normal(a.shape).astype(a.dtype) for a in f(*arrays)]

        call = directed(f, direction, 3 + len(weights), compiled=kind != STOCK)
        runners.append((call, input_sets(make)))
    times = race(budget, *runners)
    return {kind: 1e6 * statistics.median(t) for kind, t in zip(KINDS, times, strict=True)}


def chain_of_one_token(sites: list[nn.Module], n: int, C: int, budget: float) -> dict:
    """Return microseconds a site of the whole chain at one token: all, and the GPU alone."""
    streams, found = make_streams(1, n, C), {}
    for kind in KINDS:
        f, weights = of_parameters(sites, STEPS[kind])
        f = f if kind == STOCK else mx.compile(f)
        run = functools.partial(f, *streams, *weights)
        wall = statistics.median(call_times(budget, run))
        found[kind] = {"us": 1e6 * wall / len(sites)}
        if backend():
            found[kind]["gpu_us"] = 1e6 * gpu_time(run, 2) / len(sites)
    return found


def training_step(sites: list[nn.Module], T: int, n: int, C: int) -> dict:
    """Return microseconds and bytes that outputs and gradients of all sites take at most."""
    found = {}
    for kind in KINDS:
        f, weights = of_parameters(sites, STEPS[kind])
        arrays = [*make_streams(T, n, C), *weights]
        arrays += [mx.random.normal(a.shape).astype(a.dtype) for a in f(*arrays)]
        call = directed(f, "forward+backward", 3 + len(weights), compiled=kind != STOCK)
        mx.eval(arrays)
        for _ in range(2):
            mx.eval(call(*arrays))
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(call(*arrays))
        peak = max(0, mx.get_peak_memory() - before)
        us = 1e6 * statistics.median(call_times(0.2, functools.partial(call, *arrays)))
        found[kind] = {"us": us, "peak_bytes": peak}
    return found


def rows(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yield each figure with the part of the report to which it belongs."""
    n, C = args.n, args.C
    most = max(args.sites, args.train_sites, 3)
    for weights in args.weights:
        sites = [make_site(n, C, args.rank, weights) for _ in range(most)]
        head = {"weights": weights}
        off = difference(sites[0], max(args.tokens), n, C)
        yield "differences", head | {"tokens": max(args.tokens), "u": off}
        for T in args.tokens:
            yield "dispatches", head | {"tokens": T} | dispatches(sites, T, n, C)
        for direction in ("forward", "forward+backward"):
            for T in args.tokens:
                us = race_site(sites[0], direction, T, n, C, args.budget)
                yield "sites", head | {"tokens": T, "direction": direction, "us": us}
        chain = chain_of_one_token(sites[: args.sites], n, C, args.budget)
        yield "chains", head | {"tokens": 1, "sites": args.sites} | chain
        for T in args.train_tokens:
            step = training_step(sites[: args.train_sites], T, n, C)
            yield "training", head | {"tokens": T, "sites": args.train_sites} | step


def show(part: str, row: dict) -> str:
    """Return a line of a table for a figure."""
    where = f"{part}, {row['weights']}, {row['tokens']} tokens"
    if part == "differences":
        return f"{where}: u differs by {row['u']:.1e} of the largest"
    if part == "dispatches":
        return f"{where}: " + ", ".join(f"{k} {row[k]}" for k in KINDS) + " a site"
    if part == "sites":
        times = ", ".join(f"{k} {us:.1f} us" for k, us in row["us"].items())
        most = row["us"]["fused"]
        gain = ", ".join(f"{row['us'][k] / most:.1f} x" for k in KINDS[1:])
        return f"{where}, {row['direction']}: {times} ({gain})"
    each = []
    for k in KINDS:
        text = f"{k} {row[k]['us']:.1f} us"
        if "gpu_us" in row[k]:
            text += f" ({row[k]['gpu_us']:.1f} us the GPU alone)"
        if "peak_bytes" in row[k]:
            text += f", {row[k]['peak_bytes'] / 2**20:.1f} MiB"
        each.append(text)
    unit = "a site" if part == "chains" else "in all"
    return f"{where}, {row['sites']} sites, {unit}: " + "; ".join(each)


def check(report: Any) -> None:
    """Raise ValueError with the reason if this is no report of this command."""
    check_strings(report, "device", "mlx", "date", "command")
    for part in PARTS:
        if not isinstance(report.get(part), list):
            raise ValueError(f"its {part} are no list")


def options() -> argparse.ArgumentParser:
    parser = make_parser(COMMAND, __doc__)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1, 8, 512, 2048, 8192])
    add("--n", type=int, default=4)
    add("--C", type=int, default=2560)
    add("--rank", type=int, default=320)
    add("--sites", type=int, default=96, help="of the chain at one token")
    add("--train-sites", type=int, default=8, help="of a training step")
    add("--train-tokens", type=int, nargs="+", default=[2048])
    add("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    add("--budget", type=float, default=0.3, help="seconds for a figure, roughly")
    add("--json", metavar="FILE", help="written after each figure: new, or an earlier result")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = options()
    args = parser.parse_args(argv)
    counts = {k: getattr(args, k) for k in ("n", "C", "rank", "sites", "train_sites")}
    for name, value in counts.items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1 but is {value}")
    for name in ("tokens", "train_tokens"):
        if min(getattr(args, name)) < 1:
            must = f"--{name.replace('_', '-')} must be at least 1"
            parser.error(f"{must} but is {min(getattr(args, name))}")
    if args.budget <= 0:
        parser.error(f"--budget must be above 0 but is {args.budget}")
    for name, size in (("--n * --C", args.n * args.C), ("--rank", args.rank)):
        if "4 bits" in args.weights and size % GROUP:
            parser.error(f"{name} must be a multiple of {GROUP} with 4 bits but is {size}")
    try:
        args.output = Output("--json", args.json, "a result of this command", check)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    mx.random.seed(0)
    whose = "its steps, written again" if stock_class() is GatedResidual else "its class"
    report: dict[str, Any] = about(COMMAND) | {"mlx-vlm is": whose, "n": args.n, "C": args.C}
    report |= {"rank": args.rank, "kernels": backend() or "none: fused is the reference"}
    report |= {part: [] for part in PARTS}
    print(
        f"{report['device']}, MLX {report['mlx']}, kernels: {report['kernels']}; mlx-vlm is {whose}"
    )
    with args.output.finishing(report, lambda: report["dispatches"]) as wrong:
        for part, row in rows(args):
            report[part].append(row)
            print(show(part, row), flush=True)
            args.output.update(report)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
