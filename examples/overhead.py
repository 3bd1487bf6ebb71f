"""What hyper-connections add to a training step: fused, by the reference, and the floor.

    python examples/overhead.py --json overhead.json

measures train_lm.py's whole step (forward, backward, clipping, AdamW) of a transformer of 24 layers
with ordinary residuals (plain), with mhc fused, and with mhc by the reference (use_metal=False).
The floor of what connections add is their traffic over the bandwidth of a copy on this device: a
dynamic sublayer of 4 streams moves at least 41 rows of C elements per token, 14 forward and 27
backward. Peak memory of the reference is foretold from one and two layers; where the device has
not as much, it is left out. --curves trains small models of both kinds for some steps and
compares their losses. --json FILE writes a new file. --from FILE prints the table of an earlier
one, with --copy-gb-s by the bandwidth that another program measured. Without a GPU both are the
reference, and it says so.

MLX lets ten parts of a graph wait for the GPU. With MLX_MAX_MB_PER_BUFFER=2000 in the environment
they are longer, so that a slow host keeps a fast NVIDIA GPU busy; they take more memory.
"""

import argparse
import gc
import json
import math
import statistics
import time
from pathlib import Path

import mlx.core as mx
from byte_lm import make_model
from experiment import about
from files import check_new, write_new
from mlx.utils import tree_flatten
from options import (
    MOST_STEPS,
    check_memory,
    option,
    options_named,
    parse,
    refuse_empty,
    trainer_parser,
)
from train_lm import train
from training_step import make_optimizer, make_step

from mhc_mlx import backend
from mhc_mlx.commands import memory

ROWS = 41  # n = 4: see the table of bytes in the README
KINDS = {
    "plain": ["--connection", "plain"],
    "fused": ["--connection", "mhc"],
    "reference": ["--connection", "mhc", "--no-metal"],
}
GIB = 2**30
DATA = 2**20  # bytes to train on


def copy_bandwidth(mib: int) -> float:
    """Bytes per second of `mx.abs` on a bfloat16 array of so many MiB, read and written: of the
    calls alone, without what an evaluation of any number of them takes, or a slow host adds."""
    x = mx.random.normal((mib << 19,)).astype(mx.bfloat16)
    mx.eval(x)

    def seconds(calls: int) -> float:
        times = []
        for _ in range(9):
            began = time.perf_counter()
            mx.eval([mx.abs(x) for _ in range(calls)])
            times.append(time.perf_counter() - began)
        return min(times[2:])  # the first allocate

    return 2 * x.nbytes * 12 / max(seconds(16) - seconds(4), 1e-9)  # small copies are noise


def measure(command: list[str], steps: int) -> dict:
    """Milliseconds of a step, and peak memory, of a model as train_lm.py's options say."""
    args = parse(command)
    mx.random.seed(0)
    model, optimizer = make_model(args), make_optimizer(args.lr, 1000, 100)
    optimizer.init(model.trainable_parameters())
    data = mx.random.randint(0, 256, (DATA,)).astype(mx.uint8)
    starts = mx.random.randint(0, data.size - args.context - 1, (1, args.batch))
    late = mx.array(0.0)
    mx.eval(model.parameters(), optimizer.state, data, starts, late)
    size = sum(v.size for _, v in tree_flatten(model.parameters()))
    run = make_step(model, optimizer, data, args.context, args.clip, mx.distributed.init())
    times, losses, pending = [], [], None
    mx.reset_peak_memory()
    began = time.perf_counter()
    for _ in range(steps + 4):  # as the trainer: a step is prepared while the last one runs
        values = run(starts, late)
        mx.async_eval(values, model.state, optimizer.state)
        if pending is not None:
            losses.append(pending[0].item())
            times.append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()
        pending = values
    times = times[3:]  # the first compile
    result = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return result | {"peak_gib": mx.get_peak_memory() / GIB, "parameters": size, "losses": losses}


def released(command: list[str], steps: int) -> dict:
    """`measure`, and its memory given back."""
    result = measure(command, steps)
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return result


def with_depth(command: list[str], depth: int) -> list[str]:
    return [*command, "--depth", str(depth)]


def heads_of(dim: int) -> int:
    return max(dim // 64, 1)


def model_options(dim: int, args: argparse.Namespace) -> list[str]:
    """The trainer's options for all kinds at one dim, but for the depth."""
    sizes = ["--dim", str(dim), "--heads", str(heads_of(dim)), "--dtype", args.dtype]
    return [*sizes, "--context", str(args.context), "--batch", str(args.tokens // args.context)]


def overhead(dim: int, args: argparse.Namespace, bandwidth: float) -> dict:
    """All kinds at one dim, and what they add."""
    base = model_options(dim, args)
    size = {"bfloat16": 2, "float32": 4}[args.dtype]
    floor = ROWS * 2 * args.depth * dim * args.tokens * size / bandwidth * 1e3
    most = memory() if backend() else None
    result = {"dim": dim, "floor_ms": floor}
    for kind in [k for k in KINDS if k in args.kinds]:  # plain first: others add to it
        command = [*base, *KINDS[kind]]
        if kind == "reference" and most:
            one, two = (released(with_depth(command, d), 1)["peak_gib"] for d in (1, 2))
            needed = one + (args.depth - 1) * (two - one)
            if needed * GIB > 0.9 * most:
                result[kind] = {"needs_gib": needed}
                print(f"{kind}, dim {dim}: left out, needs about {needed:.0f} GiB", flush=True)
                continue
        steps = args.steps if kind != "reference" else min(args.steps, 5)
        result[kind] = made = released(with_depth(command, args.depth), steps)
        if kind != "plain" and "plain" in result:
            added = made["ms"] - result["plain"]["ms"]
            made |= {"added_ms": added, "share": added / made["ms"], "x_floor": added / floor}
        print(f"{kind}, dim {dim}: {made['ms']:.1f} ms, {made['peak_gib']:.1f} GiB", flush=True)
    return result


def curves(steps: int) -> float:
    """Largest difference of the losses of a float32 run with and without the kernels."""
    base = ["--connection", "mhc", "--depth", "6", "--dim", "128", "--context", "128"]
    base += ["--steps", str(steps), "--seconds", "1e9", "--sample", "0", "--warmup", "20"]
    losses = [train(parse([*base, *options]))["losses"] for options in ([], ["--no-metal"])]
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def by_floor(result: dict, factor: float) -> dict:
    """A result of `overhead` with its floor times a factor."""
    made = {k: dict(result[k]) for k in KINDS if k in result}
    for kind in made.values():
        if "x_floor" in kind:
            kind["x_floor"] /= factor
    return result | made | {"floor_ms": factor * result["floor_ms"]}


def table(results: list[dict]) -> str:
    """Markdown; and how far apart the losses are."""
    lines = [
        "| dim | connection | ms per step | added | share of step | floor | x floor | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for kind in KINDS:
            made = r.get(kind)
            if made is None:
                continue
            if "ms" not in made:
                cells = ["not run", "", "", "", "", f"needs {made['needs_gib']:.0f}"]
            elif "added_ms" not in made:
                cells = [f"{made['ms']:.1f}", "", "", "", "", f"{made['peak_gib']:.1f}"]
            else:
                cells = [f"{made['ms']:.1f}", f"{made['added_ms']:.1f} ms"]
                cells += [f"{100 * made['share']:.0f} %", f"{r['floor_ms']:.1f} ms"]
                cells += [f"{made['x_floor']:.2f}", f"{made['peak_gib']:.1f}"]
            lines.append(f"| {r['dim']} | {kind} | " + " | ".join(cells) + " |")
    for r in results:
        losses = [r.get(kind, {}).get("losses", []) for kind in ("fused", "reference")]
        steps = [abs(a - b) for a, b in zip(*losses, strict=False)]
        if steps:
            lines.append(
                f"\ndim {r['dim']}: the losses of {len(steps)} steps, fused and by the reference, "
                f"differ by at most {max(steps):.1e} bits per byte"
            )
    return "\n".join(lines)


def check_record(record: dict) -> None:
    """ValueError, LookupError, TypeError or OverflowError where --json has not written a record."""

    def number(v) -> None:
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError(f"{v!r} must be a number")

    def figures(of: dict, *names: str) -> None:
        for name in names:
            number(of[name])
            if not math.isfinite(of[name]):
                raise ValueError(f"{name} must be finite but is {of[name]}")

    figures(record, "copy_gb_s")
    if record["copy_gb_s"] <= 0:
        raise ValueError(f"copy_gb_s must be above 0 but is {record['copy_gb_s']}")
    for name, kind in (("device", str), ("mlx", str), ("date", str), ("results", list)):
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} must be of {kind} but is {record[name]!r}")
    for result in record["results"]:
        figures(result, "dim", "floor_ms")
        for made in (result[kind] for kind in KINDS if kind in result):
            if "ms" not in made:
                figures(made, "needs_gib")
                continue
            figures(made, "ms", "peak_gib")
            if "added_ms" in made:
                figures(made, "added_ms", "share", "x_floor")
            for loss in made["losses"]:
                number(loss)


def print_record(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The table of --from."""
    try:
        record = json.loads(Path(args.source).read_text())
        check_record(record)
        factor = record["copy_gb_s"] / (args.copy_gb_s or record["copy_gb_s"])
        lines = [f"{record['device']}, MLX {record['mlx']}, {record['date']}"]
        lines.append(table([by_floor(r, factor) for r in record["results"]]))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        parser.error(f"--from must be a file that --json wrote but is {args.source}: {error!r}")
    print(*lines, sep="\n")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, named: set) -> None:
    """Of a run that measures."""
    for name in ("depth", "tokens", "context", "steps", "copy_mib"):
        if getattr(args, name) < 1:
            parser.error(f"{option(name)} must be at least 1 but is {getattr(args, name)}")
    if min(args.dims, default=1) < 1:
        parser.error(f"--dims must be at least 1 but has {min(args.dims)}")
    for dim in args.dims:
        step = 2 * heads_of(dim)  # rotary positions turn pairs of a head's channels
        if dim % step:
            must = f"multiples of 2 x heads (dim // 64, at least 1), here of {step},"
            parser.error(f"--dims must be {must} but has {dim}")
    for name in ("dims", "kinds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(
                f"{option(name)} must differ from each other but are {getattr(args, name)}"
            )
    if not 0 <= args.curves <= MOST_STEPS:
        parser.error(f"--curves must be from 0 to {MOST_STEPS} but is {args.curves}")
    if not args.dims:
        if not args.curves:
            parser.error("--dims must have one at least, or go with --curves")
        if useless := named & {"kinds", "depth", "tokens", "context", "dtype", "steps"}:
            words = ", ".join(map(option, sorted(useless)))
            parser.error(f"--dims must have one at least to go with {words}")
    if args.context > DATA - 2:
        parser.error(f"--context must be at most {DATA - 2} but is {args.context}")
    if args.tokens % args.context:
        parser.error(f"--tokens must be a multiple of --context but is {args.tokens}")
    for dim in args.dims:
        for kind in args.kinds:
            command = with_depth(model_options(dim, args), args.depth)
            model = trainer_parser().parse_args([*command, *KINDS[kind]])
            check_memory(parser, model, "--tokens, --dims and --depth")
    most = min(memory() // (17 * 2**20), 2**12 - 1)  # 16 copies; elements are below 2**31
    if args.copy_mib > most:
        parser.error(f"--copy-mib must be at most {most} here but is {args.copy_mib}")


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dims", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--depth", type=int, default=24, help="layers, of two sublayers each")
    parser.add_argument("--tokens", type=int, default=8192, help="per step")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="measured, of the reference 5")
    parser.add_argument("--copy-mib", type=int, default=512, help="size of the array copied")
    parser.add_argument("--curves", type=int, default=0, metavar="STEPS")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--from", dest="source", metavar="FILE", help="run nothing, read this")
    parser.add_argument("--copy-gb-s", type=float, metavar="GB/S", help="of a copy, with --from")
    args = parser.parse_args(command)
    named = options_named(parser, command, args)
    refuse_empty(parser, args, "json")
    if args.source == "":
        parser.error("--from must be a path but is empty")
    if args.source is not None:
        if useless := named - {"source", "copy_gb_s"}:
            words = ", ".join(map(option, sorted(useless)))
            parser.error(f"--from runs nothing: it must go without {words}")
        if args.copy_gb_s is not None and not 0 < args.copy_gb_s < math.inf:
            parser.error(f"--copy-gb-s must be finite and above 0 but is {args.copy_gb_s}")
        print_record(parser, args)
        return
    if args.copy_gb_s is not None:
        parser.error(f"--copy-gb-s goes with --from but is {args.copy_gb_s} without")
    check_options(parser, args, named)
    if args.json:
        if Path(args.json).is_dir() or not Path(args.json).parent.is_dir():
            parser.error(f"--json must be a file in a folder that exists but is {args.json}")
        check_new("--json", Path(args.json))
    if backend() is None:
        print("no GPU: fused and reference are both the reference on the CPU")
    bandwidth = copy_bandwidth(args.copy_mib)
    sizes = {k: getattr(args, k) for k in ("depth", "tokens", "context", "dtype")}
    record = about() | sizes | {"copy_gb_s": bandwidth / 1e9}
    print(f"{record['device']}, MLX {record['mlx']}, copy {record['copy_gb_s']:.0f} GB/s")
    record["results"] = [overhead(dim, args, bandwidth) for dim in args.dims]
    if args.dims:
        print(table(record["results"]))
    if args.curves:
        record["curves"] = {"steps": args.curves, "largest_difference": curves(args.curves)}
        print(
            f"losses with and without kernels, {args.curves} steps in float32, differ by at most "
            f"{record['curves']['largest_difference']:.1e} bits per byte"
        )
    if args.json:
        write_new(Path(args.json), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
