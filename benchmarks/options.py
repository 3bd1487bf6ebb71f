"""benchmark.py has these options, and refuses those that would do nothing."""

import argparse
import importlib.util
import math
import os
import re
from collections.abc import Callable

from benchmarks import listings
from benchmarks.rates import DEVICES
from benchmarks.report import check_figures, check_result
from mhc_mlx import launch
from mhc_mlx.commands import Output, make_parser, read
from mhc_mlx.device_report.suite import DIRECTIONS, DTYPES, OPS
from mhc_mlx.ops import MAX_STREAMS, check_threads

RESULT = "a result of benchmark.py"
PICTURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
MODES = ("sizes", "decode", "overhead")  # the table is "rows"
# These options change the command, and each takes these others. Without them figures are timed.
COMMANDS = {
    "verify": {"op", "shape", "dtype", "preset", "direction", "threads", "json", "all", *MODES},
    "once": {"op", "shape", "dtype", "preset", "direction", "threads"},
    "sweep": {
        *("op", "shape", "dtype", "preset", "quick", "json", "processes"),
        *("compare", "plot", "peak_gbps"),
    },
    "source": {"compare", "plot"},
    "model": {"device", "op", "shape", "dtype", "direction", "threads"},
}
# Only these sections take these options.
SECTIONS_OF = {
    "op": ("rows", "sizes", "decode"),
    "shape": ("rows",),
    "preset": ("rows",),
    "direction": ("rows", "sizes"),
    "threads": ("rows", "sizes"),
}
SECTIONS_OF |= dict.fromkeys(("baseline", "plot", "peak_gbps"), ("rows", "sizes"))
# For these one section of several is enough: with --all they act on the table and the sizes.
ONE_IS_ENOUGH = ("baseline", "plot", "peak_gbps")
ON_A_GPU = (*MODES, "all", "sweep", "once", "threads", "baseline", "peak_gbps", "plot")


def option(name: str) -> str:
    return {"source": "--from"}.get(name, f"--{name.replace('_', '-')}")


def parser(description: str, presets) -> argparse.ArgumentParser:
    parser = make_parser("benchmark.py", description)
    add = parser.add_argument
    add("--op", action="append", choices=sorted(OPS), help="repeatable; all by default")
    add("--shape", action="append", metavar="B,n,C", help="repeatable; of the table")
    add("--dtype", action="append", choices=sorted(DTYPES), help="repeatable; bfloat16 and float32")
    add("--direction", action="append", choices=DIRECTIONS, help="repeatable; all by default")
    add("--preset", choices=sorted(presets))
    add("--sizes", action="store_true", help="percent of copy from 1 to 65536 tokens")
    add("--decode", action="store_true", help="a sublayer at 1 to 16 tokens, and its dispatches")
    add("--overhead", action="store_true", help="MLX's and Python's time per call of a layer")
    add("--all", action="store_true", help="the table and these three")
    add("--sweep", action="store_true", help="threads per group x vector width of each --op")
    add("--threads", type=int, help="threads_per_group for every op, 32 to 1024 by 32")
    add("--verify", action="store_true", help="parity only")
    add("--once", action="store_true", help="each call twice, nothing timed: for a profiler")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        help="time the compiled reference too; by default of the ops in BASELINE",
    )
    add("--processes", type=int, help="medians over this many processes")
    add("--quick", action="store_true", help="shorter runs")
    add("--json", metavar="FILE", help="written after each figure: new, or an earlier result")
    add("--plot", metavar="FILE", help="a .png, .pdf or .svg; needs matplotlib")
    add("--compare", metavar="FILE", help="the change against an earlier --json")
    add("--model", action="store_true", help="what a model expects of each kernel, in Markdown")
    add("--device", action="append", choices=list(DEVICES), help="of --model; repeatable")
    add("--from", dest="source", metavar="FILE", help="run nothing, read this --json")
    add("--peak-gbps", type=float, help="adds percent of this peak")
    return parser


def sections(args: argparse.Namespace) -> list[str]:
    modes = [m for m in MODES if args.all or getattr(args, m)]
    return ["rows", *modes] if args.all or not modes else modes


def check_values(args: argparse.Namespace) -> None:
    for name in ("op", "shape", "dtype", "direction", "device"):
        values = getattr(args, name) or []
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{option(name)} {value} must be given once but is given twice")
    for shape in args.shape or []:
        if not re.fullmatch(r"[1-9][0-9]{0,9}(,[1-9][0-9]{0,9}){2}", shape):
            raise ValueError(f"--shape must be three positive numbers B,n,C but is {shape}")
        if int(shape.split(",")[1]) > MAX_STREAMS:
            raise ValueError(f"--shape must have n at most {MAX_STREAMS} but is {shape}")
        if math.prod(map(int, shape.split(","))) >= 2**31:  # MLX makes fewer random numbers at once
            raise ValueError(f"--shape must have fewer than 2**31 elements but is {shape}")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes must be at least 1 but is {args.processes}")
    if args.peak_gbps is not None and not 0 < args.peak_gbps < math.inf:
        raise ValueError(f"--peak-gbps must be positive and finite but is {args.peak_gbps}")
    try:
        check_threads("benchmark", args.threads)
    except ValueError:
        message = f"--threads must be a multiple of 32 from 32 to 1024 but is {args.threads}"
        raise ValueError(message) from None


def check_combination(args: argparse.Namespace) -> None:
    # None and False say that an option is not there; 0 does not.
    named = [k for k, v in vars(args).items() if v is not None and v is not False]
    if args.baseline is False:
        named.append("baseline")
    for command, takes in COMMANDS.items():
        for name in named:
            if command in named and name != command and name not in takes:
                raise ValueError(f"{option(name)} does nothing with {option(command)}")
    if args.all:
        for mode in MODES:
            if mode in named:
                raise ValueError(f"--{mode} does nothing with --all, which has it")
    reads = args.source is not None
    if reads and args.compare is None and args.plot is None:
        raise ValueError("--from must come with --compare or --plot")
    if args.device and not args.model:
        raise ValueError("--device must come with --model")
    if args.model:
        for backend in {DEVICES[name].backend for name in args.device or []} or {"metal"}:
            if reason := listings.missing(backend):
                raise ValueError(f"--model needs a compiler, but {reason}")
    if args.sweep and not args.op:
        raise ValueError("--sweep must come with --op: it tries many variants of each")
    if args.preset and args.shape:
        raise ValueError("--preset does nothing with --shape")
    if reads or args.model:
        return
    chosen = sections(args)
    for name, takers in SECTIONS_OF.items():
        others = [s for s in chosen if s not in takers]
        if name in named and others and (name not in ONE_IS_ENOUGH or others == chosen):
            raise ValueError(f"{option(name)} does nothing with --{others[0]}")
    if not launch.backend():
        for name in named:
            if name in ON_A_GPU:
                raise ValueError(
                    f"{option(name)} needs kernels, by Metal or CUDA, and this machine has none: "
                    "here run --verify, or the plain reference beside the compiled one"
                )


def read_start(option: str, file: str, what: str, check: Callable) -> None:
    with open(file, "rb") as f:
        if not check(f.read(8)):
            raise ValueError(f"{option} must be {what} but is {file}")


def check_plot(file: str, inputs: list[str]) -> None:
    kind = os.path.splitext(file)[1]
    if kind not in PICTURES:
        raise ValueError(f"--plot must be a .png, .pdf or .svg but is {file or 'empty'}")
    if any(os.path.realpath(file) == os.path.realpath(other) for other in inputs):
        raise ValueError(f"--plot must be a file of its own but is {file}")
    is_picture = lambda start: start.startswith(PICTURES[kind])  # noqa: E731
    Output("--plot", file, f"a {kind} picture", is_picture, read_start)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot must have matplotlib, which is not installed: pip install it")


def check_files(args: argparse.Namespace) -> None:
    """Read the results that are read, into before and result; open the output."""
    args.before = args.result = None
    for name, field in (("source", "result"), ("compare", "before")):
        file = getattr(args, name)
        if file is not None:
            result = read(option(name), file, f"{RESULT} with figures", check_figures)
            setattr(args, field, result)
    if args.result and args.plot is not None and not plotted(args.result):
        raise ValueError(f"--from must have rows or sizes for --plot but is {args.source}")
    if args.plot is not None:
        files = [args.source, args.compare, args.json]
        check_plot(args.plot, [file for file in files if file])
    args.output = Output("--json", args.json, RESULT, check_result)


def plotted(result: dict) -> bool:
    return any(result.get(section) for section in ("rows", "sizes"))
