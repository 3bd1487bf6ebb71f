"""Connections compared at equal parameters and steps, over seeds: curves, gains, table.

    python examples/experiment.py --out experiment

trains byte_lm.py's transformer with each connection and seed on the default corpus, in one
process. The MLPs of connections with fewer parameters of their own are wider, so that all models
have as many parameters. Every run leaves a CSV log and a JSON file with its figures and stability
report, both new; then summary.json, a table and the pictures are made of all that lie in the
folder. Means are over the runs that did not diverge. So machines or GPUs can share the work, and
--summary alone puts it together:

    CUDA_VISIBLE_DEVICES=0 python examples/experiment.py --out experiment --connections mhc &
    CUDA_VISIBLE_DEVICES=1 python examples/experiment.py --out experiment --connections hc &
    wait; python examples/experiment.py --out experiment --summary
"""

import argparse
import datetime
import gc
import json
import math
import os
import shlex
import statistics
import sys
from pathlib import Path

import mlx.core as mx
from byte_lm import CONVENTIONS, make_model
from files import check_new, make_folder, replace, write_new
from mlx.utils import tree_flatten
from options import option, options_named, parse, refuse_empty, trainer_parser
from train_lm import PICTURES, train

from mhc_mlx import backend
from mhc_mlx.diagnostics import StabilityReport, plot

CONNECTIONS = ("plain", "hc", "mhc", "mhc-lite", "identity")
# What every run is given here, and options that would make runs write to the same files.
SET_HERE = ("connection", "seed", "mlp", "log", "sample", "seconds", "plot", "checkpoint", "resume")
# What a table needs of a run's record.
RECORD = {"connection": str, "seed": int, "parameters": int, "steps": int, "finite": bool}
RECORD |= {"bits_per_byte": float, "validation": float, "similarity": float, "peak_mib": float}
RECORD |= {"ms_per_step": float, "report": dict, "log": str, "device": str, "mlx": str, "date": str}
OPTIONAL = ("bits_per_byte", "validation", "similarity", "report")


def possible(connection: str, streams: int) -> bool:
    """Whether a connection can have so many streams; a residual takes no notice."""
    try:
        if connection != "plain":
            CONVENTIONS[connection].check_streams("possible", streams)
    except ValueError:
        return False
    return True


def size(args: argparse.Namespace) -> int:
    """How many parameters a model has; they are not made."""
    return sum(v.size for _, v in tree_flatten(make_model(args).parameters()))


def equal_widths(command: list[str], connections: tuple | list) -> dict[str, int]:
    """The MLP width, a multiple of 8, with which each connection's model is as large as the largest
    of them with the usual one, as nearly as such widths allow."""
    command = [word for word in command if word != "--no-metal"]  # plain refuses it
    sizes = {c: size(parse([*command, "--connection", c])) for c in connections}
    args = parse(command)
    widths = {}
    for c, own in sizes.items():
        missing = (max(sizes.values()) - own) / (2 * args.dim * args.depth)
        widths[c] = 4 * args.dim + 8 * round(missing / 8)
    return widths


def device() -> str:
    return f"{mx.device_info().get('device_name', 'unknown')}, {backend() or 'CPU'}"


def about() -> dict:
    """How figures were made."""
    settings = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MLX_MAX_")]
    return {
        "command": shlex.join([*sorted(settings), "python", *sys.argv]),
        "device": device(),
        "mlx": mx.__version__,
        "date": datetime.date.today().isoformat(),
    }


def command_of(connection: str, seed: int, command: list[str], width: int, out: Path) -> list[str]:
    """The options of one run."""
    if connection == "plain":  # it has no kernels to leave out
        command = [word for word in command if word != "--no-metal"]
    own = ["--connection", connection, "--seed", str(seed), "--mlp", str(width)]
    log = str(out / f"{connection}-seed{seed}.csv")
    return [*command, *own, "--log", log, "--sample", "0", "--seconds", "1e9"]


def for_json(figures: dict) -> dict:
    """The figures, with None for what is not finite: JSON has no NaN and no infinity."""
    finite = {k: not isinstance(v, float) or math.isfinite(v) for k, v in figures.items()}
    return {k: v if finite[k] else None for k, v in figures.items()}


def run(connection: str, seed: int, command: list[str], width: int, out: Path) -> None:
    """Train one and write out/CONNECTION-seedSEED.csv and .json."""
    stem = out / f"{connection}-seed{seed}"
    print(f"{connection}, seed {seed}")
    result = train(parse(command_of(connection, seed, command, width, out)), diagnosed=True)
    report, _ = result.pop("report"), result.pop("losses")  # the log has these
    record = {"connection": connection, "seed": seed, "mlp": width, **result, **about()}
    record["report"] = report and report.to_dict()
    record["log"] = f"{stem.name}.csv"
    write_new(stem.with_suffix(".json"), json.dumps(for_json(record), allow_nan=False))
    gc.collect()  # so that the next run's peak of memory is its own
    mx.clear_cache()


def spread(values: list[float], digits: int) -> str:
    """Mean, and the range where it is not a point."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def gains(run: dict, way: str) -> float:
    """The largest composite gain of any token at any depth, infinite where one is not finite; a
    residual on one stream has 1."""
    if run["report"] is None:
        return 1.0
    found = [c[f"composite_{way}_gain_max"] for c in run["report"]["connections"]]
    return math.inf if None in found else max(found)


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: means over seeds, and their range."""
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
            cells.append(spread(values, digits) if values else "")
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


def read_run(path: Path) -> dict:
    """A run's record; SystemExit where the file is none, or its log is missing."""
    try:
        record = json.loads(path.read_text())
        for key, kind in RECORD.items():
            if not isinstance(record[key], kind) and not (key in OPTIONAL and record[key] is None):
                raise TypeError(f"{key} must be of {kind} but is {record[key]!r}")
        if path.name != f"{record['connection']}-seed{record['seed']}.json":
            raise ValueError(f"it has {record['connection']} and seed {record['seed']}")
        if record["report"] is not None:
            StabilityReport.from_dict(record["report"])
            gains(record, "forward")
        open(path.parent / record["log"]).close()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SystemExit(f"{path} must be a run's record but is not: {error!r}") from error
    return record


def check_summary(out: Path) -> None:
    """SystemExit where the summary would replace what another program wrote."""
    summary = out / "summary.json"
    try:
        ours = isinstance(json.loads(summary.read_text())["runs"], list)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        ours = False
    if not ours:
        for path in (summary, *(out / name for name in PICTURES)):
            check_new("--out: the summary's", path, ", or beside an earlier summary.json,")


def summarise(out: Path) -> dict[str, list[dict]]:
    """Of all runs in a folder: summary.json, the pictures, and the table on the terminal."""
    check_summary(out)
    found = [read_run(p) for p in sorted(out.glob("*-seed*.json"))]
    if not found:
        raise SystemExit(f"--out must be a folder with runs but {out} has none")
    order = [*CONNECTIONS, *sorted({r["connection"] for r in found} - set(CONNECTIONS))]
    runs = {c: [r for r in found if r["connection"] == c] for c in order}
    runs = {c: sorted(seeds, key=lambda r: r["seed"]) for c, seeds in runs.items() if seeds}
    reports = {
        c: [StabilityReport.from_dict(r["report"]) for r in seeds]
        for c, seeds in runs.items()
        if all(r["report"] for r in seeds)
    }
    logs = {c: [out / r["log"] for r in seeds] for c, seeds in runs.items()}
    short = [{k: v for k, v in r.items() if k != "report"} for s in runs.values() for r in s]
    for r in short:
        whole = next(w for w in runs[r["connection"]] if w["seed"] == r["seed"])
        r |= {f"{way}_gain": gains(whole, way) for way in ("forward", "backward")}
    summary = {"runs": [for_json(r) for r in short]}
    replace(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    try:
        pictures = plot(reports, out, logs=logs)
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"cannot draw the logs and reports in --out {out}: {error!r}") from error
    steps = {r["steps"] for r in short if r["finite"]}
    devices = {(r["device"], r["mlx"], r["date"]) for r in short}
    print(f"steps {sorted(steps)}; " + "; ".join(f"{d}, MLX {v}, {t}" for d, v, t in devices))
    print(table(runs))
    print("wrote", out / "summary.json", *pictures)
    return runs


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are train_lm.py's.",
    )
    every = [*CONVENTIONS, "plain"]
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--connections", nargs="+", choices=every, default=CONNECTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--summary", action="store_true", help="of the runs there, no new ones")
    args, options = parser.parse_known_args(command)
    refuse_empty(parser, args, "out")
    named = options_named(parser, command, args) - {"out", "summary"}
    if args.summary and (named or options):
        words = [option(name) for name in sorted(named)] + options
        parser.error(f"--summary runs nothing: it must go without {' '.join(words)}")
    for name in ("connections", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} must differ from each other but are {getattr(args, name)}")
    trainer = trainer_parser()
    for name in sorted(options_named(trainer, options, trainer.parse_args(options))):
        if name in SET_HERE:
            parser.error(f"{option(name)} is this program's to set: leave it out")
    out = Path(args.out)
    if args.summary:
        summarise(out)
        return
    # 48 sublayers, as wide as three seeds of five connections allow in minutes on a GPU.
    base = ["--depth", "24", "--dim", "128", "--context", "256", "--batch", "16"]
    base += ["--lr", "2e-3", "--warmup", "100", "--steps", "300", "--validate-every", "100"]
    base += ["--gates-rate", "1"]  # the trainer's 10 suits projected logits; without, they explode
    base += options
    # Of all that there can be, so that machines which train a few of them have the same widths.
    usual = [c for c in CONNECTIONS if possible(c, parse(base).streams)]
    widths = equal_widths(base, [*usual, *args.connections])
    runs = [(c, seed) for seed in args.seeds for c in args.connections]
    make_folder("--out", out)
    check_summary(out)
    for connection, seed in runs:
        parse(command_of(connection, seed, base, widths[connection], out))
        for ending in ("csv", "json"):
            check_new("--out: a run's", out / f"{connection}-seed{seed}.{ending}")
    for connection, seed in runs:
        run(connection, seed, base, widths[connection], out)
    summarise(out)


if __name__ == "__main__":
    main()
