"""Compare connections at equal parameters and steps, over seeds: curves, gains, table.

    python -m benchmarks.experiment --out experiment

trains the transformer of examples/train_lm with each connection and seed on the default corpus, in
one process. The MLPs of connections with fewer parameters of their own are wider, so that all
models have as many parameters. Every run leaves a new CSV log, and a JSON file with its figures and
stability report; then summary.json, a table and the pictures are made of all that lie in the
folder. Means are over the runs that did not diverge. So machines or GPUs can share the work, and
--summary alone puts it together:

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.experiment --out experiment --connections mhc &
    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.experiment --out experiment --connections hc &
    wait; python -m benchmarks.experiment --out experiment --summary
"""

import argparse
import datetime
import gc
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from examples.train_lm import options
from examples.train_lm.byte_lm import CONVENTIONS, make_model
from examples.train_lm.files import check_new, make_folder
from examples.train_lm.train import PICTURES, train
from mhc_mlx import backend
from mhc_mlx.commands import Output, make_parser, read
from mhc_mlx.diagnostics import StabilityReport, plot

COMMAND = "python -m benchmarks.experiment"
CONNECTIONS = ("plain", "hc", "mhc", "mhc-lite", "identity", "gated")
# This program sets these for every run, or they would make runs write to the same files.
SET_HERE = ("connection", "seed", "mlp", "log", "sample", "seconds", "plot", "checkpoint", "resume")
# A table needs these of a run's record.
RECORD = {"connection": str, "seed": int, "parameters": int, "steps": int, "finite": bool}
RECORD |= {"bits_per_byte": float, "validation": float, "similarity": float, "peak_mib": float}
RECORD |= {"ms_per_step": float, "report": dict, "log": str, "device": str, "mlx": str, "date": str}
OPTIONAL = ("bits_per_byte", "validation", "similarity", "report")


def supports(connection: str, streams: int) -> bool:
    """Tell whether a connection can have so many streams; one without a convention can."""
    try:
        if connection in CONVENTIONS:
            CONVENTIONS[connection].check_streams("supports", streams)
    except ValueError:
        return False
    return True


def count_parameters(args: argparse.Namespace) -> int:
    """Count the parameters of a model, which are not evaluated."""
    return sum(v.size for _, v in tree_flatten(make_model(args).parameters()))


def equal_widths(command: list[str], connections: tuple | list) -> dict[str, int]:
    """Choose MLP widths, multiples of 8, so that the model of each connection is as large as the
    largest of them with the usual width, as nearly as such widths allow."""
    command = [word for word in command if word != "--no-metal"]  # plain refuses it
    parsed = {c: options.parse([*command, "--connection", c]) for c in connections}
    sizes = {c: count_parameters(args) for c, args in parsed.items()}
    args = options.parse(command)
    widths = {}
    for c, size in sizes.items():
        missing = (max(sizes.values()) - size) / (2 * args.dim * args.depth)
        widths[c] = 4 * args.dim + 8 * round(missing / 8)
    return widths


def device() -> str:
    return f"{mx.device_info().get('device_name', 'unknown')}, {backend() or 'CPU'}"


def about(command: str) -> dict:
    """Say how figures were measured."""
    settings = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MLX_MAX_")]
    return {
        "command": shlex.join([*sorted(settings), *command.split(), *sys.argv[1:]]),
        "device": device(),
        "mlx": mx.__version__,
        "date": datetime.date.today().isoformat(),
    }


def command_of(connection: str, seed: int, command: list[str], width: int, out: Path) -> list[str]:
    """Return the options of one run."""
    if connection == "plain":  # it has no kernels to leave out
        command = [word for word in command if word != "--no-metal"]
    command = [*command, "--connection", connection, "--seed", str(seed), "--mlp", str(width)]
    log = str(out / f"{connection}-seed{seed}.csv")
    return [*command, "--log", log, "--sample", "0", "--seconds", "1e9"]


def for_json(figures: dict) -> dict:
    """Return the figures, with None for what is not finite: JSON has no NaN and no infinity."""
    finite = {k: not isinstance(v, float) or math.isfinite(v) for k, v in figures.items()}
    return {k: v if finite[k] else None for k, v in figures.items()}


def run(connection: str, seed: int, command: list[str], width: int, out: Path) -> None:
    """Train one and write out/CONNECTION-seedSEED.csv and .json."""
    output = output_of(out, f"{connection}-seed{seed}.json", check_run)
    print(f"{connection}, seed {seed}")
    args = options.parse(command_of(connection, seed, command, width, out))
    result = train(args, diagnosed=True)
    report, _ = result.pop("report"), result.pop("losses")  # the log has these
    record = {"connection": connection, "seed": seed, "mlp": width, **result, **about(COMMAND)}
    record["report"] = report and report.to_dict()
    record["log"] = f"{connection}-seed{seed}.csv"
    finish(output, record)
    gc.collect()  # so that the next run's peak of memory is its own
    mx.clear_cache()


def mean_and_range(values: list[float], digits: int) -> str:
    """Return the mean, and the range where it is not a point."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def gains(run: dict, way: str) -> float:
    """Return the largest composite gain of any token at any depth, infinity where one is not
    finite; a residual on one stream has 1."""
    if run["report"] is None:
        return 1.0
    found = [c[f"composite_{way}_gain_max"] for c in run["report"]["connections"]]
    return math.inf if None in found else max(found)


def table(runs: dict[str, list[dict]]) -> str:
    """Return Markdown: means over seeds, and their range."""
    lines = [
        "| connection | parameters | bits per byte | validation | similarity | forward gain | "
        "backward gain | ms per step | x plain | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = [r["ms_per_step"] for r in runs.get("plain", []) if r["finite"]]
    for name, seeds in runs.items():
        finite = [r for r in seeds if r["finite"]]
        cells = [f"`{name}`", f"{seeds[0]['parameters']:,}"]
        for key, digits in (("bits_per_byte", 3), ("validation", 3), ("similarity", 3)):
            values = [r[key] for r in finite if r[key] is not None]
            cells.append(mean_and_range(values, digits) if values else "")
        for way in ("forward", "backward"):
            found = [gains(r, way) for r in finite]
            text = f"{statistics.median(found):.3g}" if found else ""
            cells.append(text if len(found) < 2 else f"{text} (at most {max(found):.3g})")
        ms = [r["ms_per_step"] for r in finite]
        cells.append(f"{statistics.median(ms):.1f}" if ms else "")
        ratio = statistics.median(ms) / statistics.median(base) if ms and base else None
        cells.append(f"{ratio:.2f}" if ratio else "")
        cells.append(f"{max(r['peak_mib'] for r in seeds):.0f}")
        if len(finite) < len(seeds):
            cells[0] += f" ({len(seeds) - len(finite)} of {len(seeds)} diverged)"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_run(record: dict) -> None:
    """Raise ValueError where this is no run's record."""
    try:
        for key, kind in RECORD.items():
            if not isinstance(record[key], kind) and not (key in OPTIONAL and record[key] is None):
                raise TypeError(f"{key} must be of {kind} but is {record[key]!r}")
        if record["report"] is not None:
            StabilityReport.from_dict(record["report"])
            gains(record, "forward")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error


def check_summary(summary: dict) -> None:
    if not isinstance(summary, dict) or not isinstance(summary.get("runs"), list):
        raise ValueError("it has no runs")


def output_of(out: Path, name: str, check: Callable) -> Output:
    try:
        return Output(f"--out: {name}", str(out / name), "an earlier one", check)
    except ValueError as error:
        raise SystemExit(error) from error


def check_files(out: Path) -> None:
    """Raise SystemExit where a summary would replace what another program wrote."""
    output_of(out, "summary.json", check_summary)
    for name in PICTURES if not (out / "summary.json").exists() else []:
        check_new("--out: a picture", out / name, ", or beside an earlier summary.json,")


def finish(output: Output, report: dict) -> None:
    if lost := output.finish(for_json(report)):
        raise SystemExit(lost)


def read_run(path: Path) -> dict:
    """Read a run's record; SystemExit says why the file is none, or its log is missing."""
    try:
        record = read("--out: a file", str(path), "a run's record", check_run)
        if path.name != f"{record['connection']}-seed{record['seed']}.json":
            raise ValueError(f"it must be of {record['connection']} and seed {record['seed']}")
        open(path.parent / record["log"]).close()
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} must be a run's record but is not: {error}") from error
    return record


def summarise(out: Path) -> dict[str, list[dict]]:
    """Of all runs in a folder write summary.json and pictures, and print the table."""
    check_files(out)
    found = [read_run(p) for p in sorted(out.glob("*-seed*.json"))]
    if not found:
        raise SystemExit(f"--out must be a folder with runs but {out} has none")
    order = [*CONNECTIONS, *sorted({r["connection"] for r in found} - set(CONNECTIONS))]
    runs = {c: [r for r in found if r["connection"] == c] for c in order}
    runs = {c: sorted(seeds, key=lambda r: r["seed"]) for c, seeds in runs.items() if seeds}
    short = []
    for r in (r for seeds in runs.values() for r in seeds):
        figures = {f"{way}_gain": gains(r, way) for way in ("forward", "backward")}
        short.append(for_json({k: v for k, v in r.items() if k != "report"} | figures))
    finish(output_of(out, "summary.json", check_summary), {"runs": short})
    pictures = draw(runs, out)
    steps = {r["steps"] for r in short if r["finite"]}
    devices = {(r["device"], r["mlx"], r["date"]) for r in short}
    print(f"steps {sorted(steps)}; " + "; ".join(f"{d}, MLX {v}, {t}" for d, v, t in devices))
    print(table(runs))
    print("wrote", out / "summary.json", *pictures)
    return runs


def draw(runs: dict[str, list[dict]], out: Path) -> list[Path]:
    reports = {
        c: [StabilityReport.from_dict(r["report"]) for r in seeds]
        for c, seeds in runs.items()
        if all(r["report"] for r in seeds)
    }
    logs = {c: [out / r["log"] for r in seeds] for c, seeds in runs.items()}
    try:
        return plot(reports, out, logs=logs)
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"cannot draw the logs and reports in --out {out}: {error!r}") from error


def parse(command: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's options, checked, and the trainer's."""
    epilog = "Other options are those of examples/train_lm."
    parser = make_parser(COMMAND, __doc__, epilog=epilog)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--connections", nargs="+", choices=options.CONNECTIONS, default=CONNECTIONS
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--summary", action="store_true", help="of the runs there, no new ones")
    args, trainer_options = parser.parse_known_args(command)
    options.refuse_empty(parser, args, "out")
    named = options.options_named(parser, command, args) - {"out", "summary"}
    if args.summary and (named or trainer_options):
        words = [options.option(name) for name in sorted(named)] + trainer_options
        parser.error(f"--summary runs nothing: it must go without {' '.join(words)}")
    for name in ("connections", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} must differ from each other but are {getattr(args, name)}")
    trainer = options.trainer_parser()
    for name in sorted(
        options.options_named(trainer, trainer_options, trainer.parse_args(trainer_options))
    ):
        if name in SET_HERE:
            parser.error(f"{options.option(name)} is this program's to set: leave it out")
    return args, trainer_options


def main(command: list[str] | None = None) -> None:
    args, trainer_options = parse(command)
    out = Path(args.out)
    if args.summary:
        summarise(out)
        return
    # 48 sublayers are as wide as three seeds of five connections allow in minutes on a GPU.
    base = ["--depth", "24", "--dim", "128", "--context", "256", "--batch", "16"]
    base += ["--lr", "2e-3", "--warmup", "100", "--steps", "300", "--validate-every", "100"]
    base += ["--gates-rate", "1"]  # the trainer's 10 suits projected logits; without, they explode
    base += trainer_options
    # Widths are of all that there can be, so that machines which train a few have the same.
    usual = [c for c in CONNECTIONS if supports(c, options.parse(base).streams)]
    widths = equal_widths(base, [*usual, *args.connections])
    runs = [(c, seed) for seed in args.seeds for c in args.connections]
    make_folder("--out", out)
    check_files(out)
    for connection, seed in runs:
        options.parse(command_of(connection, seed, base, widths[connection], out))
        check_new("--out: a run's log", out / f"{connection}-seed{seed}.csv")
        output_of(out, f"{connection}-seed{seed}.json", check_run)
    for connection, seed in runs:
        run(connection, seed, base, widths[connection], out)
    summarise(out)


if __name__ == "__main__":
    main()
