"""Measure every op: `op direction dtype shape | us | GB/s | % of copy | x compiled reference`.

Bytes are the fewest that an op can move (inputs read once, outputs written once; coefficients and
parameters are noise), and the roof is `mx.abs` moving as many bytes, timed in turn with the op.
Parity with the reference is checked first: what fails is not timed. Input sets rotate, together
larger than the cache, so that caches do not flatter; one evaluation spans many calls, so the time
holds MLX's own work too. Backward is the gradients alone (no baseline: the reference cannot skip
its forward; nor an op whose forward saves for them), forward+backward output and gradients.

Other modes, alone or after the table with --all: --sizes, forward from 1 token to 65536 (for
--plot); --decode, a sublayer in a compiled stack at 1 to 16 tokens; --overhead, what MLX and Python
add to a layer's kernels. With --from FILE nothing runs: --compare and --plot read FILE. --model
says how long each kernel should take on a GPU that need not be here (docs/model.md).
"""

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Iterator

import mlx.core as mx

from benchmarks import cases, options, predictions
from benchmarks.processes import repeat
from benchmarks.report import compare, plot, show
from benchmarks.sweep import launch_twice, sweep
from mhc_mlx import launch
from mhc_mlx.device_report.layers import decode, overhead
from mhc_mlx.device_report.measure import Bench
from mhc_mlx.device_report.parity import verify
from mhc_mlx.device_report.suite import OPS

BASELINE = (
    "mhc_static",
    "mhc_layer",
    "stream_mix_add",
    "sinkhorn_knopp",
)  # --baseline or --no-baseline changes that


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options, choose what to measure, and read and open the files."""
    parser = options.parser(__doc__, cases.PRESETS)
    args = parser.parse_args(argv)
    try:
        options.check_values(args)
        options.check_combination(args)
        args.chosen = {} if args.source is not None or args.model else cases.choose(args)
        options.check_files(args)
    except ValueError as error:
        parser.error(str(error))
    args.processes = args.processes or 1
    return args


def rows_of(args, bench: Bench, result: dict, section: str, op: str, shape, name: str) -> Iterator:
    """Yield the rows of a case, each as soon as it is measured."""
    directions = cases.directions(args, section)
    if not launch.backend():
        for direction in directions:
            yield bench.reference_row(op, direction, shape, name)
    elif section == "decode":
        yield decode(bench.budget, op, shape, name)
    elif section == "overhead":
        yield from overhead(bench.budget, shape, name)
    elif args.sweep:
        yield from sweep(bench, op, shape, name, result["verified"])
    else:
        baseline = args.baseline
        if baseline is None:
            baseline = section == "rows" and op in BASELINE
        for direction in directions:
            if direction != "backward" or not OPS[op].saves:
                yield bench.row(op, direction, shape, name, args.threads, baseline)


def check_parity(args: argparse.Namespace, result: dict) -> set[tuple]:
    """Check the parity of all cases, and return those that fail."""
    failed = set()
    for section in args.chosen:
        for case in args.chosen[section]:
            rows = verify(section, *case, cases.directions(args, section), args.threads)
            result["verified"] += rows
            if not all(row["ok"] for row in rows):
                failed.add((section, *case))
            args.output.update(result)
    worst = max(row["error"] for row in result["verified"])
    print(f"parity: {len(result['verified'])} cases, largest relative error {worst:.1e}")
    return failed


def measure(args: argparse.Namespace, result: dict) -> None:
    """Fill result, which is written after each figure."""
    mx.random.seed(0)
    chosen, bench = args.chosen, Bench(0.1 if args.quick else 0.5, args.peak_gbps)
    info = mx.device_info() if launch.backend() else {}
    kernels = launch.backend() or "none here, so compiled against plain reference"
    result |= {"device": info.get("device_name", "CPU")} | result
    print(f"{result['device']}, MLX {mx.__version__}, kernels: {kernels}")
    if not launch.backend():
        print(f"on a CPU, of each shape at most {cases.REFERENCE_TOKENS} tokens")
    result |= {section: [] for section in chosen if launch.backend()}
    if args.once:
        for op, shape, name in chosen["rows"]:
            launch_twice(op, shape, name, args.direction or ["forward+backward"], args.threads)
        return
    failed = set() if args.sweep else check_parity(args, result)
    done, total = 0, sum(map(len, chosen.values()))
    for section in chosen if not args.verify else []:
        rows = result.setdefault(section if launch.backend() else "reference", [])
        for case in chosen[section]:
            if (section, *case) in failed:
                continue
            for row in rows_of(args, bench, result, section, *case):
                rows.append(row)
                result["copy_gbps"] = bench.copy_gbps
                if not args.sweep:
                    print(show(row), flush=True)
                args.output.update(result)
            done += 1
            if sys.stderr.isatty():
                print(f"\r{done}/{total}", end="\r", file=sys.stderr)


def run(args: argparse.Namespace, argv: list[str]) -> tuple[dict, list[str]]:
    """Measure what the options choose; return the result, and what went wrong."""
    result = {"mlx": mx.__version__, "date": datetime.date.today().isoformat()}
    result |= {"command": shlex.join(["python", "benchmark.py", *argv])}
    result |= {"copy_gbps": 0.0, "verified": [], "rows": []}
    with args.output.finishing(result, lambda: result["verified"]) as wrong:
        if args.processes > 1:
            wrong += repeat(os.path.abspath(__file__), args, argv, result)
        else:
            measure(args, result)
    failed = [row for row in result["verified"] if not row["ok"]]
    return result, wrong + [f"parity fails: {failed}"] * bool(failed)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.model:
        print(
            predictions.said(
                args.device, args.op, args.shape, args.direction, args.dtype, args.threads
            )
        )
        return
    result, wrong = (args.result, []) if args.source is not None else run(args, argv)
    if args.before:
        print(*compare(args.before, result), sep="\n")
    if args.plot and options.plotted(result):
        plot(result, args.plot)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
