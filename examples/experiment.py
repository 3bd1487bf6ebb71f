"""Connections compared at equal parameters and steps, over seeds: curves, gains, table.

    python examples/experiment.py --out experiment

trains byte_lm.py's transformer with each connection and seed on the default corpus, in one
process. The MLPs of connections with fewer parameters of their own are wider, so that all models
have as many parameters. Every run leaves a CSV log and a JSON file with its figures and stability
report; then summary.json, a table and the pictures are made of all that lie in the folder. So
machines or GPUs can share the work, and --summary alone puts it together:

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
from mlx.utils import tree_flatten
from options import parse
from train_lm import train

from mhc_mlx import backend
from mhc_mlx.diagnostics import StabilityReport, plot

CONNECTIONS = ("plain", "hc", "mhc", "mhc-lite", "identity")


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


def run(connection: str, seed: int, command: list[str], width: int, out: Path) -> None:
    """Train one and write out/CONNECTION-seedSEED.csv and .json."""
    stem = out / f"{connection}-seed{seed}"
    own = ["--connection", connection, "--seed", str(seed), "--mlp", str(width)]
    own += ["--log", f"{stem}.csv", "--sample", "0", "--seconds", "1e9"]
    print(f"{connection}, seed {seed}")
    result = train(parse([*command, *own]), diagnosed=True)
    report, _ = result.pop("report"), result.pop("losses")  # the log has these
    record = {"connection": connection, "seed": seed, "mlp": width, **result, **about()}
    record["report"] = report and report.to_dict()
    record["log"] = f"{stem.name}.csv"
    stem.with_suffix(".json").write_text(json.dumps(record))
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
    base = runs.get("plain")
    for name, seeds in runs.items():
        whole = [r for r in seeds if r["finite"]]
        cells = [f"`{name}`", f"{seeds[0]['parameters']:,}"]
        for key, digits in (("bits_per_byte", 3), ("validation", 3), ("similarity", 3)):
            values = [r[key] for r in whole if r[key] is not None]
            cells.append(spread(values, digits) if values else "")
        for way in ("forward", "backward"):
            found = [gains(r, way) for r in seeds]
            text = f"{statistics.median(found):.3g}"
            cells.append(text if len(found) == 1 else f"{text} (at most {max(found):.3g})")
        ms = statistics.median(r["ms_per_step"] for r in seeds)
        cells.append(f"{ms:.1f}")
        plain = base and statistics.median(r["ms_per_step"] for r in base)
        cells.append(f"{ms / plain:.2f}" if plain else "")
        cells.append(f"{max(r['peak_mib'] for r in seeds):.0f}")
        if len(whole) < len(seeds):
            cells[0] += f" ({len(seeds) - len(whole)} of {len(seeds)} diverged)"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarise(out: Path) -> dict[str, list[dict]]:
    """Of all runs in a folder: summary.json, the pictures, and the table on the terminal."""
    found = [json.loads(p.read_text()) for p in sorted(out.glob("*-seed*.json"))]
    if not found:
        raise SystemExit(f"{out} has no runs")
    order = [*CONNECTIONS, *sorted({r["connection"] for r in found} - set(CONNECTIONS))]
    runs = {c: [r for r in found if r["connection"] == c] for c in order}
    runs = {c: sorted(seeds, key=lambda r: r["seed"]) for c, seeds in runs.items() if seeds}
    reports = {
        c: [StabilityReport.from_dict(r["report"]) for r in seeds]
        for c, seeds in runs.items()
        if all(r["report"] for r in seeds)
    }
    logs = {c: [out / r["log"] for r in seeds] for c, seeds in runs.items()}
    pictures = plot(reports, out, logs=logs)
    short = [{k: v for k, v in r.items() if k != "report"} for s in runs.values() for r in s]
    for r in short:
        whole = next(w for w in runs[r["connection"]] if w["seed"] == r["seed"])
        r |= {f"{way}_gain": gains(whole, way) for way in ("forward", "backward")}
    (out / "summary.json").write_text(json.dumps({"runs": short}, indent=1) + "\n")
    steps = {r["steps"] for r in short if r["finite"]}
    devices = {(r["device"], r["mlx"], r["date"]) for r in short}
    print(f"steps {sorted(steps)}; " + "; ".join(f"{d}, MLX {v}, {t}" for d, v, t in devices))
    print(table(runs))
    print("wrote", out / "summary.json", *pictures)
    return runs


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are train_lm.py's.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--connections", nargs="+", default=CONNECTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--summary", action="store_true", help="of the runs there, no new ones")
    args, options = parser.parse_known_args(command)
    args.out.mkdir(parents=True, exist_ok=True)
    # 48 sublayers, as wide as three seeds of five connections allow in minutes on a GPU.
    base = ["--depth", "24", "--dim", "128", "--context", "256", "--batch", "16"]
    base += ["--lr", "2e-3", "--warmup", "100", "--steps", "300", "--validate-every", "100"]
    base += ["--gates-rate", "1"]  # the trainer's 10 suits projected logits; without, they explode
    if not args.summary:
        # Of all that there can be, so that machines which train a few of them have the same widths.
        streams = parse([*base, *options]).streams
        usual = [c for c in CONNECTIONS if possible(c, streams)]
        widths = equal_widths([*base, *options], [*usual, *args.connections])
        for seed in args.seeds:
            for connection in args.connections:
                run(connection, seed, [*base, *options], widths[connection], args.out)
    summarise(args.out)


if __name__ == "__main__":
    main()
