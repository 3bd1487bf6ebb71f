"""Measure what hyper-connections add to a training step: fused, by the reference, and the floor.

    python -m benchmarks.overhead --json overhead.json

measures the whole step of examples/train_lm (forward, backward, clipping, AdamW) of a transformer
of 24 layers with ordinary residuals (plain), with mhc fused, and with mhc by the reference
(use_metal=False). The floor of what connections add is their traffic over the bandwidth of a copy
on this device: a dynamic sublayer of 4 streams moves at least 41 rows of C elements per token, 14
forward and 27 backward. Peak memory of the reference is foretold from one and two layers; where the
device has not as much, it is left out. --curves trains small models of both kinds for some steps
and compares their losses. --json FILE writes a new file, or replaces an earlier one. --from FILE
prints the table of an earlier one, with --copy-gb-s by the bandwidth that another program measured.
Without a GPU both are the reference, and it says so.

MLX lets ten parts of a graph wait for the GPU. With MLX_MAX_MB_PER_BUFFER=2000 in the environment
they are longer, so that a slow host keeps a fast NVIDIA GPU busy; they take more memory.
"""

import argparse
import gc
import math
import statistics
import sys
import time

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.experiment import about
from examples.train_lm import options
from examples.train_lm.byte_lm import make_model
from examples.train_lm.options import option
from examples.train_lm.train import train
from examples.train_lm.training_step import make_optimizer, make_step
from mhc_mlx import backend
from mhc_mlx.commands import Output, check_strings, make_parser, memory, read

COMMAND = "python -m benchmarks.overhead"
ROWS = 41  # for n = 4: the README has the table of bytes
KINDS = {
    "plain": ["--connection", "plain"],
    "fused": ["--connection", "mhc"],
    "reference": ["--connection", "mhc", "--no-metal"],
}
NOT_FINITE = ("nan", "inf", "-inf")  # JSON has these strings
GIB = 2**30
DATA = 2**20  # it trains on so many bytes


def copy_bandwidth(mib: int) -> float:
    """Return the bytes per second that `mx.abs` of a bfloat16 array of so many MiB moves; what an
    evaluation takes beside its calls, or a slow host adds, is not counted."""
    x = mx.random.normal((mib << 19,)).astype(mx.bfloat16)
    mx.eval(x)

    def seconds(calls: int) -> float:
        times = []
        for _ in range(9):
            began = time.perf_counter()
            mx.eval([mx.abs(x) for _ in range(calls)])
            times.append(time.perf_counter() - began)
        return min(times[2:])  # the first two allocate

    return (
        2 * x.nbytes * 12 / max(seconds(16) - seconds(4), 1e-9)
    )  # of small copies only noise is left


def measure(command: list[str], steps: int) -> dict:
    """Measure milliseconds of a step, and peak memory, of a model as the trainer's options say."""
    args = options.parse(command)
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
    for _ in range(steps + 4):  # the trainer too prepares a step while the last one runs
        values = run(starts, late)
        mx.async_eval(values, model.state, optimizer.state)
        if pending is not None:
            losses.append(pending[0].item())
            times.append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()
        pending = values
    times = times[3:]  # the first three compile
    result = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return result | {"peak_gib": mx.get_peak_memory() / GIB, "parameters": size, "losses": losses}


def released(command: list[str], steps: int) -> dict:
    """Measure, and give the memory back."""
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
    """Return the trainer's options for all kinds at one dim, but for the depth."""
    sizes = ["--dim", str(dim), "--heads", str(heads_of(dim)), "--dtype", args.dtype]
    return [*sizes, "--context", str(args.context), "--batch", str(args.tokens // args.context)]


def overhead(dim: int, args: argparse.Namespace, bandwidth: float) -> dict:
    """Measure all kinds at one dim, and what they add."""
    base = model_options(dim, args)
    size = {"bfloat16": 2, "float32": 4}[args.dtype]
    floor = ROWS * 2 * args.depth * dim * args.tokens * size / bandwidth * 1e3
    most = memory() if backend() else None
    result = {"dim": dim, "floor_ms": floor}
    for kind in [
        k for k in KINDS if k in args.kinds
    ]:  # plain comes first, because others add to it
        command = [*base, *KINDS[kind]]
        if kind == "reference" and most:
            one, two = (released(with_depth(command, d), 1)["peak_gib"] for d in (1, 2))
            needed = one + (args.depth - 1) * (two - one)
            if needed * GIB > 0.9 * most:
                result[kind] = {"needs_gib": needed}
                print(f"{kind}, dim {dim}: left out, needs about {needed:.0f} GiB", flush=True)
                continue
        steps = args.steps if kind != "reference" else min(args.steps, 5)
        result[kind] = figures = released(with_depth(command, args.depth), steps)
        if kind != "plain" and "plain" in result:
            added = figures["ms"] - result["plain"]["ms"]
            figures |= {"added_ms": added, "share": added / figures["ms"], "x_floor": added / floor}
        ms, gib = figures["ms"], figures["peak_gib"]
        print(f"{kind}, dim {dim}: {ms:.1f} ms, {gib:.1f} GiB", flush=True)
    return result


def curves(steps: int) -> float:
    """Return the largest difference of losses of a float32 run with and without the kernels."""
    base = ["--connection", "mhc", "--depth", "6", "--dim", "128", "--context", "128"]
    base += ["--steps", str(steps), "--seconds", "1e9", "--sample", "0", "--warmup", "20"]
    runs = [options.parse([*base, *more]) for more in ([], ["--no-metal"])]
    losses = [train(args)["losses"] for args in runs]
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def by_floor(result: dict, factor: float) -> dict:
    """Return a result of `overhead` with its floor times a factor."""
    kinds = {k: dict(result[k]) for k in KINDS if k in result}
    for figures in kinds.values():
        if "x_floor" in figures:
            figures["x_floor"] /= factor
    return result | kinds | {"floor_ms": factor * result["floor_ms"]}


def table(results: list[dict]) -> str:
    """Return Markdown, and how far apart the losses are."""
    lines = [
        "| dim | connection | ms per step | added | share of step | floor | x floor | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for kind in KINDS:
            figures = r.get(kind)
            if figures is None:
                continue
            if "ms" not in figures:
                cells = ["not run", "", "", "", "", f"needs {figures['needs_gib']:.0f}"]
            elif "added_ms" not in figures:
                cells = [f"{figures['ms']:.1f}", "", "", "", "", f"{figures['peak_gib']:.1f}"]
            else:
                cells = [f"{figures['ms']:.1f}", f"{figures['added_ms']:.1f} ms"]
                cells += [f"{100 * figures['share']:.0f} %", f"{r['floor_ms']:.1f} ms"]
                cells += [f"{figures['x_floor']:.2f}", f"{figures['peak_gib']:.1f}"]
            lines.append(f"| {r['dim']} | {kind} | " + " | ".join(cells) + " |")
    for r in results:
        losses = [r.get(kind, {}).get("losses", []) for kind in ("fused", "reference")]
        steps = [abs(float(a) - float(b)) for a, b in zip(*losses, strict=False)]
        if steps:
            lines.append(
                f"\ndim {r['dim']}: the losses of {len(steps)} steps, fused and by the reference, "
                f"differ by at most {max(steps):.1e} bits per byte"
            )
    return "\n".join(lines)


def check_record(record: dict) -> None:
    """Raise ValueError where --json has not written a record."""
    check_strings(record, "device", "mlx", "date")
    try:
        numbers = [record["copy_gb_s"]]
        if not isinstance(record["results"], list):
            raise TypeError("results must be a list")
        for result in record["results"]:
            numbers += [result["dim"], result["floor_ms"]]
            for figures in (result[kind] for kind in KINDS if kind in result):
                names = ["ms", "peak_gib"] if "ms" in figures else ["needs_gib"]
                names += ["added_ms", "share", "x_floor"] if "added_ms" in figures else []
                numbers += [figures[name] for name in names]
                losses = figures["losses"] if "ms" in figures else []
                numbers += [loss for loss in losses if loss not in NOT_FINITE]
    except (LookupError, TypeError) as error:
        raise ValueError(repr(error)) from error
    for number in numbers:
        if type(number) not in (int, float) or not abs(number) < 1e300:
            raise ValueError(f"it has {number!r}, which is no finite number")
    if record["copy_gb_s"] <= 0:
        raise ValueError(f"copy_gb_s must be above 0 but is {record['copy_gb_s']}")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, named: set) -> None:
    """Check the options of a run that measures."""
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
            parser.error(f"--{name} must differ from each other but are {getattr(args, name)}")
    if not 0 <= args.curves <= options.MOST_STEPS:
        parser.error(f"--curves must be from 0 to {options.MOST_STEPS} but is {args.curves}")
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
            model = options.trainer_parser().parse_args([*command, *KINDS[kind]])
            options.check_memory(parser, model, "--tokens, --dims and --depth")
    most = min(
        memory() // (17 * 2**20), 2**12 - 1
    )  # 16 copies must fit, with fewer than 2**31 elements
    if args.copy_mib > most:
        parser.error(f"--copy-mib must be at most {most} here but is {args.copy_mib}")


def overhead_parser() -> argparse.ArgumentParser:
    parser = make_parser(COMMAND, __doc__)
    add = parser.add_argument
    add("--dims", nargs="*", type=int, default=[1024, 2048])
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--depth", type=int, default=24, help="layers, of two sublayers each")
    add("--tokens", type=int, default=8192, help="per step")
    add("--context", type=int, default=1024)
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--steps", type=int, default=20, help="measured, of the reference 5")
    add("--copy-mib", type=int, default=512, help="size of the array copied")
    add("--curves", type=int, default=0, metavar="STEPS")
    add("--json", metavar="FILE", help="new, or an earlier one")
    add("--from", dest="source", metavar="FILE", help="run nothing, read this")
    add("--copy-gb-s", type=float, metavar="GB/S", help="of a copy, with --from")
    return parser


def print_record(args: argparse.Namespace) -> None:
    """Print the table of --from."""
    record = read("--from", args.source, "a file that --json wrote", check_record)
    factor = record["copy_gb_s"] / (args.copy_gb_s or record["copy_gb_s"])
    print(f"{record['device']}, MLX {record['mlx']}, {record['date']}")
    print(table([by_floor(r, factor) for r in record["results"]]))


def run(args: argparse.Namespace, record: dict) -> None:
    """Fill record, which is written after each figure."""
    if backend() is None:
        print("no GPU: fused and reference are both the reference on the CPU")
    bandwidth = copy_bandwidth(args.copy_mib)
    record["copy_gb_s"] = bandwidth / 1e9
    print(f"{record['device']}, MLX {record['mlx']}, copy {record['copy_gb_s']:.0f} GB/s")
    record["results"] = []
    for dim in args.dims:
        record["results"].append(overhead(dim, args, bandwidth))
        args.output.update(record)
    if args.dims:
        print(table(record["results"]))
    if args.curves:
        record["curves"] = {"steps": args.curves, "largest_difference": curves(args.curves)}
        print(
            f"losses with and without kernels, {args.curves} steps in float32, differ by at most "
            f"{record['curves']['largest_difference']:.1e} bits per byte"
        )


def main(command: list[str] | None = None) -> None:
    parser = overhead_parser()
    args = parser.parse_args(command)
    named = options.options_named(parser, command, args)
    try:
        if args.source is not None:
            if useless := named - {"source", "copy_gb_s"}:
                words = ", ".join(map(option, sorted(useless)))
                parser.error(f"--from runs nothing: it must go without {words}")
            if args.copy_gb_s is not None and not 0 < args.copy_gb_s < math.inf:
                parser.error(f"--copy-gb-s must be finite and above 0 but is {args.copy_gb_s}")
            print_record(args)
            return
        if args.copy_gb_s is not None:
            parser.error(f"--copy-gb-s goes with --from but is {args.copy_gb_s} without")
        check_options(parser, args, named)
        args.output = Output("--json", args.json, f"a record of {COMMAND}", check_record)
    except ValueError as error:
        parser.error(str(error))
    record = about(COMMAND)
    record |= {k: getattr(args, k) for k in ("depth", "tokens", "context", "dtype")}
    with args.output.finishing(record, lambda: record.get("results")) as wrong:
        run(args, record)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
