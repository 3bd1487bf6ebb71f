"""`plot` draws the reports and logs of several runs side by side, with matplotlib."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import StabilityReport


def _runs(values, kind: type | tuple, called: str, argument: str) -> dict[str, list]:
    """Return the dict with a list for each run, which has a value for each seed of the run."""
    if not isinstance(values, dict):
        got = type(values).__name__
        raise TypeError(f"[plot] {argument} must be a dict by name of run but got {got}.")
    runs = {k: list(v) if isinstance(v, (list, tuple)) else [v] for k, v in values.items()}
    for name, seeds in runs.items():
        for v in seeds:
            if not isinstance(v, kind):
                got = f"{type(v).__name__} for {name!r}"
                raise TypeError(f"[plot] {argument} must hold {called} but got {got}.")
        if not seeds:
            raise ValueError(f"[plot] {argument} must hold a value for each run but got {name!r}.")
    return runs


def plot(
    reports: dict[str, "StabilityReport | list[StabilityReport]"],
    folder: str | Path,
    *,
    logs: dict[str, "str | Path | list[Any]"] | None = None,
    column: str = "bits_per_byte",
) -> list[Path]:
    """Draw runs side by side into PNG files. This needs matplotlib, the extra ``plot``.

    gains.png has composite gains over depth, on a log axis; streams.png the similarity between
    streams, and gradient norms, over depth; h_res.png mixing matrices at up to four depths, and the
    composite, as heat maps; gates.png h_pre and h_post of each stream over depth, and the smallest
    and largest gate of each stream where a connection is a `GatedResidual`; loss.png a column of
    the logs over steps. The fields are those of `ConnectionReport`.

    Args:
        reports: A report, or a list with a report for each seed, by name of run. The matrices and
            gates of the first seed are drawn.
        folder: The folder of the files, which is created if it is missing.
        logs: Paths of CSV files by name of run, with columns ``step`` and ``column``. Rows in which
            that column is empty are left out.
        column: The column that loss.png shows; with ``bits_per_byte`` it also shows the column
            ``validation`` of logs that have one.

    Returns:
        The paths of the files: the first four if there are reports, the last if there are logs.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: reports or logs have another type.
        ValueError: There is no run, a run has no values, or a log has no such column or no values.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("[plot] needs matplotlib: pip install 'mhc-metal[plot]'.") from error
    runs = _runs(reports, StabilityReport, "StabilityReport", "reports")
    curves = _runs({} if logs is None else logs, (str, Path), "paths", "logs")
    if not runs and not curves:
        raise ValueError("[plot] reports must hold at least one run but got none, and no logs.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [*runs, *(name for name in curves if name not in runs)]
    colors = {name: f"C{k % 10}" for k, name in enumerate(names)}
    drawn = {}
    if runs:
        drawn = {
            "gains": _draw_gains(Figure, runs, colors),
            "streams": _draw_streams(Figure, runs, colors),
            "h_res": _draw_matrices(Figure, runs),
            "gates": _draw_gates(Figure, runs),
        }
    if curves:
        drawn["loss"] = _draw_curves(Figure, curves, colors, column)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in drawn]


def _depths(report: StabilityReport) -> range:
    return range(1, len(report.connections) + 1)


def _lines(axes, runs: dict, colors: dict, value: Callable, widths: dict, **style) -> None:
    """Draw value(connection) over depth, a line per seed; the legend has the first seed's line."""
    for name, seeds in runs.items():
        for k, report in enumerate(seeds):
            ys = [value(c) for c in report.connections]
            label = None if k or style else name
            missing = [
                not math.isfinite(y) and c.streams > 1  # a single stream has no similarity
                for c, y in zip(report.connections, ys, strict=True)
            ]
            if label and any(missing):
                label = f"{name} (not finite)"
            options = {"color": colors[name], "label": label, "linewidth": widths[name]} | style
            axes.plot(_depths(report), ys, marker="o" if len(ys) == 1 else None, **options)
    _depth_axis(axes, max(len(report.connections) for seeds in runs.values() for report in seeds))
    axes.grid(alpha=0.3)


def _depth_axis(axes, depth: int) -> None:
    axes.set_xlim(0.5, depth + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _log_axis(axes) -> None:
    def tick(y: float, _) -> str:
        first = f"{y:.0e}"[0]
        if first not in "125":
            return ""
        return f"{y:g}" if 1e-3 < y < 1e4 else f"{first}e{math.floor(math.log10(y) + 1e-9)}"

    if not any(y > 0 for line in axes.lines for y in line.get_ydata()):  # all values are NaN
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(tick)
    axes.yaxis.set_minor_formatter(tick)


def _legend(figure, title: str | None = None) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 5)
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns)


def _draw_gains(Figure, runs: dict, colors: dict):
    figure = Figure(figsize=(11, 5), layout="constrained")
    # Lines of gain 1 coincide, so each run's line is thinner than those of the runs before it.
    widths = {name: 1.5 + 1.5 * (1 - k / len(runs)) for k, name in enumerate(runs, 1)}
    for axes, way in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        line, gain = "row" if way == "forward" else "column", f"composite_{way}_gain"
        _lines(axes, runs, colors, lambda c, gain=gain: getattr(c, gain), widths)
        dotted = {"linestyle": ":", "linewidth": 1}
        _lines(axes, runs, colors, lambda c, k=gain: getattr(c, f"{k}_max"), widths, **dotted)
        axes.axhline(1, color="grey", linewidth=0.8, zorder=0)
        _log_axis(axes)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.5), max(high, 2))  # rounding about 1 must not fill the picture
        axes.set_title(f"{way} gain: largest |{line} sum|")
        axes.set_xlabel("connections from the first to this one")
    figure.axes[0].set_ylabel("gain of the product of h_res")
    _legend(figure, "line: mean over tokens; dotted: largest token")
    return figure


def _draw_streams(Figure, runs: dict, colors: dict):
    graded = all(
        c.gradient_norms for seeds in runs.values() for report in seeds for c in report.connections
    )
    figure = Figure(figsize=(11 if graded else 6, 4.8), layout="constrained")
    panels = figure.subplots(1, 2 if graded else 1, squeeze=False)[0]
    widths = dict.fromkeys(runs, 1.5)
    _lines(panels[0], runs, colors, lambda c: c.similarity if c.streams > 1 else math.nan, widths)
    panels[0].set_title("similarity between streams (1: copies)")
    panels[0].set_ylabel("mean cosine")
    reports = [report for seeds in runs.values() for report in seeds]
    if all(c.streams == 1 for report in reports for c in report.connections):
        place = {"transform": panels[0].transAxes, "ha": "center", "va": "center"}
        panels[0].text(0.5, 0.5, "one stream: none", **place)
    if graded:
        _lines(panels[1], runs, colors, lambda c: math.hypot(*c.gradient_norms), widths)
        _log_axis(panels[1])
        panels[1].set_title("gradient of the loss by the streams")
        panels[1].set_ylabel("norm over tokens, streams and channels")
    for axes in panels:
        axes.set_xlabel("after connection")
    _legend(figure)
    return figure


def _spread_indices(count: int, limit: int = 4) -> list[int]:
    """Return at most ``limit`` indices below count, evenly spread from the first to the last."""
    if count <= limit:
        return list(range(count))
    return [round(k * (count - 1) / (limit - 1)) for k in range(limit)]


def _draw_matrix(axes, matrix: list[list[float]], top: float):
    n = len(matrix)
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top)
    axes.set_xticks(range(n) if n <= 8 else [0, n - 1])
    axes.set_yticks(range(n) if n <= 8 else [0, n - 1])
    for i, j in ((i, j) for i in range(n) for j in range(n) if n <= 4):
        v = matrix[i][j]
        text = f"{v:.2f}" if abs(v) < 100 else f"{v:.0e}".replace("e+0", "e")
        color = "white" if abs(v) > 0.6 * top else "black"
        axes.text(j, i, text, color=color, ha="center", va="center", fontsize=8)
    return image


def _top(matrices: list) -> float:
    """Return the largest absolute value of a finite element, at least 1."""
    absolute = [abs(v) for matrix in matrices for row in matrix for v in row]
    return max([1.0, *filter(math.isfinite, absolute)])


def _draw_matrices(Figure, runs: dict):
    columns = 1 + max(len(_spread_indices(len(seeds[0].connections))) for seeds in runs.values())
    figure = Figure(figsize=(2.2 * columns + 3, 2.4 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), columns, squeeze=False)
    for row, (name, seeds) in zip(grid, runs.items(), strict=True):
        connections = seeds[0].connections
        indices = _spread_indices(len(connections))
        top, image = _top([connections[k].h_res for k in indices]), None
        for axes, k in zip(row, indices, strict=False):
            image = _draw_matrix(axes, connections[k].h_res, top)
            axes.set_title(f"{name}, h_res {k + 1}", fontsize=9)
        for axes in row[len(indices) : -1]:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(row[:-1]), label="mean over tokens")
        composite = connections[-1].composite
        image = _draw_matrix(row[-1], composite, _top([composite]))
        row[-1].set_title(f"{name}, product", fontsize=9)
        figure.colorbar(image, ax=row[-1], label="mean over tokens")
        row[0].set_ylabel("output stream")
    for axes in grid[-1]:
        axes.set_xlabel("input stream")
    return figure


def _gate_values(seeds: list, gate: str) -> list[list[float]] | None:
    """Return a gate by stream and depth, in the first seed, NaN where a connection has none."""
    connections = seeds[0].connections
    if all(getattr(c, gate) is None for c in connections):
        return None
    n = max(c.streams for c in connections)
    columns = [((getattr(c, gate) or []) + [math.nan] * n)[:n] for c in connections]
    return [list(row) for row in zip(*columns, strict=True)]


# What is drawn of a GatedResidual beside h_pre, the mean of its gates, and h_post.
_GATES = {"gate_min": "smallest gate", "gate_max": "largest gate"}


def _draw_gates(Figure, runs: dict):
    values = {
        gate: {name: _gate_values(seeds, gate) for name, seeds in runs.items()}
        for gate in ("h_pre", "h_post", "gate_min", "gate_max")
    }
    values = {gate: of for gate, of in values.items() if any(of.values())}
    figure = Figure(figsize=(6 * len(values), 1.7 * len(runs) + 1), layout="constrained")
    grid = figure.subplots(len(runs), len(values), squeeze=False)
    for column, (gate, of_run) in enumerate(values.items()):
        drawn = [v for rows in of_run.values() for row in rows or [] for v in row]
        top = max([2.0 if gate == "h_post" else 1.0, *filter(math.isfinite, drawn)])
        shown = []
        for axes, (name, rows) in zip(grid[:, column], of_run.items(), strict=True):
            if rows is None:
                axes.set_axis_off()
                continue
            n, depth = len(rows), len(rows[0])
            scale = {"vmin": 0, "vmax": top, "cmap": "viridis", "aspect": "auto"}
            extent = (0.5, depth + 0.5, n - 0.5, -0.5)
            image = axes.imshow(rows, extent=extent, interpolation="nearest", **scale)
            shown.append((axes, image))
            axes.set_yticks(range(n) if n <= 8 else [0, n - 1])
            _depth_axis(axes, depth)
            axes.set_title(f"{name}, {_GATES.get(gate, gate)}", fontsize=9)
            axes.set_ylabel("stream")
        last, image = shown[-1]
        last.set_xlabel("connection")
        label = _GATES.get(gate, "mean over tokens")
        figure.colorbar(image, ax=list(grid[:, column]), label=label)
    return figure


def _read_log(path: str | Path, column: str) -> tuple[list, list, list, list]:
    """Return steps and values of the column, then steps and values of the validation."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows or "step" not in rows[0] or column not in rows[0]:
        got = f"{path} with {sorted(rows[0]) if rows else 'no rows'}"
        raise ValueError(f"[plot] logs must have columns step and {column} but got {got}.")
    validated = [r for r in rows if r.get("validation") and column == "bits_per_byte"]
    rows = [r for r in rows if r[column]]
    return (
        [int(r["step"]) for r in rows],
        [float(r[column]) for r in rows],
        [int(r["step"]) for r in validated],
        [float(r["validation"]) for r in validated],
    )


def _draw_curves(Figure, curves: dict, colors: dict, column: str):
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    logs = {name: [_read_log(path, column) for path in paths] for name, paths in curves.items()}
    if not any(values for seeds in logs.values() for _, values, _, _ in seeds):
        got = ", ".join(str(path) for paths in curves.values() for path in paths)
        got = f"{column} is empty in {got}"
        raise ValueError(f"[plot] column must have a value in a log but {got}.")
    has_validation = False
    for name, seeds in logs.items():
        for k, (steps, values, validation_steps, validation) in enumerate(seeds):
            window = max(1, len(values) // 50)
            means = [
                sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
                for i in range(len(values))
            ]
            label = None if k else name if values else f"{name} (none)"
            mark = "o" if len(steps) == 1 else None
            axes.plot(steps, means, color=colors[name], linewidth=1.2, label=label, marker=mark)
            axes.plot(validation_steps, validation, "x", color=colors[name], markersize=6)
            has_validation = has_validation or bool(validation_steps)
    title = "line: mean over a 50th of the run" + ("\ncross: validation" if has_validation else "")
    axes.legend(title=title, fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel(column.replace("_", " "))
    axes.grid(alpha=0.3)
    return figure
