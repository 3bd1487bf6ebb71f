"""What the streams of a model do: gains over depth, collapse, gates, gradients; and pictures of it.

    report = stability_report(model, tokens)
    print(report)
    plot({"mhc": report}, "pictures")

Gains are arXiv 2512.24880's (section 3.1): of a mixing matrix M, row = output, the forward gain is
``max_i |sum_j M[i, j]|``, what it makes of streams that are equal, and the backward gain
``max_j |sum_i M[i, j]|``, the same of gradients. Both are 1 where M is doubly stochastic. The
composite of connections 1 to k is the product of their matrices, ``h_res_k @ ... @ h_res_1``: what
a stream's part in x becomes over depth.
"""

import contextlib
import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .layers import HyperConnection, MHCLayer, _start
from .reference import gates


@dataclasses.dataclass(frozen=True)
class ConnectionReport:
    """One connection in one run; plain numbers and nested lists.

    Each token has its matrices, and its gains are their largest line; a field without ``_max`` is
    the mean over tokens, one with ``_max`` the largest token's.

    Attributes:
        name: Where the model keeps it.
        convention, dynamic, streams: Its options; n streams.
        h_pre, h_post: ``[n]``, means over tokens.
        h_res: ``[n][n]``, mean over tokens, row = output.
        composite: ``[n][n]``, the same of the product of h_res from the first connection to this.
        forward_gain, forward_gain_max: Of h_res.
        backward_gain, backward_gain_max: Of h_res.
        composite_forward_gain, composite_forward_gain_max: Of the composite.
        composite_backward_gain, composite_backward_gain_max: Of the composite.
        row_error, column_error: ``max |line's sum - 1|`` of h_res, over lines and tokens.
        similarity: Mean cosine between two different streams after the connection; 1 where they
            have collapsed into copies, NaN for n = 1.
        h_pre_moved, h_post_moved: Largest ``|h - start|`` of an element, h the mean over tokens.
        gradient_norms: ``[n]``, the norm of d loss / d streams[i] after the connection, over all
            tokens and channels; None without a loss.
    """

    name: str
    convention: str
    dynamic: bool
    streams: int
    h_pre: list[float]
    h_post: list[float]
    h_res: list[list[float]]
    composite: list[list[float]]
    forward_gain: float
    forward_gain_max: float
    backward_gain: float
    backward_gain_max: float
    composite_forward_gain: float
    composite_forward_gain_max: float
    composite_backward_gain: float
    composite_backward_gain_max: float
    row_error: float
    column_error: float
    similarity: float
    h_pre_moved: float
    h_post_moved: float
    gradient_norms: list[float] | None = None


_COLUMNS = {
    "forward": "forward_gain",
    "backward": "backward_gain",
    "comp. fwd": "composite_forward_gain",
    "fwd max": "composite_forward_gain_max",
    "comp. bwd": "composite_backward_gain",
    "bwd max": "composite_backward_gain_max",
    "row err": "row_error",
    "col err": "column_error",
    "similarity": "similarity",
    "pre moved": "h_pre_moved",
    "post moved": "h_post_moved",
}


@dataclasses.dataclass(frozen=True)
class StabilityReport:
    """The connections of a model in the order in which they ran; ``str`` is a table.

    Attributes:
        connections: A report of each call of a connection.
        loss: What the loss function returned; None without one.
    """

    connections: list[ConnectionReport]
    loss: float | None = None

    def to_dict(self) -> dict:
        """Of plain numbers, strings and lists, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> "StabilityReport":
        return cls([ConnectionReport(**c) for c in d["connections"]], d["loss"])

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.connections)
        graded = self.connections[0].gradient_norms is not None
        head = [*_COLUMNS] + ["grad norm"] * graded
        lines = [f"{'':>4} {'connection':<{max(width, 10)}} " + " ".join(f"{h:>10}" for h in head)]
        for k, c in enumerate(self.connections, 1):
            values = [getattr(c, field) for field in _COLUMNS.values()]
            values += [math.hypot(*c.gradient_norms)] if graded else []
            cells = " ".join(f"{v:>10.4g}" for v in values)
            lines.append(f"{k:>4} {c.name:<{max(width, 10)}} {cells}")
        return "\n".join(lines)


def stream_similarity(x: mx.array) -> mx.array:
    """Mean cosine similarity between two different streams of a token, a float32 scalar.

    x ``[..., n, C]``; 1 where the streams are copies of each other; NaN for n = 1.
    """
    x = x.astype(mx.float32)
    x = x * mx.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)
    n = x.shape[-2]
    if n == 1:
        return mx.array(math.nan)
    return ((x.sum(-2) ** 2).sum(-1).mean() - n) / (n * (n - 1))


def _product(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b`` of ``[..., n, n]`` by sums of elements: ``@`` is TF32 on some GPUs."""
    terms = [a[..., :, j, None] * b[..., None, j, :] for j in range(a.shape[-1])]
    return sum(terms[1:], terms[0])


def _composed(h_res: mx.array, composite: mx.array | None) -> mx.array:
    """``h_res @ composite``; h_res alone where streams or tokens are others than before."""
    if composite is None or h_res.shape[-1] != composite.shape[-1]:
        return h_res
    a, b = h_res.shape[:-2], composite.shape[:-2]
    return _product(h_res, composite) if a == b or () in (a, b) else h_res


def _gains(h: mx.array, what: str) -> dict[str, mx.array]:
    """Mean and largest, over tokens, of the gains of ``[..., n, n]``."""
    gains = {"forward": mx.abs(h.sum(-1)).max(-1), "backward": mx.abs(h.sum(-2)).max(-1)}
    each = {f"{what}{k}_gain": g.mean() for k, g in gains.items()}
    return each | {f"{what}{k}_gain_max": g.max() for k, g in gains.items()}


def _mean(h: mx.array, ndim: int) -> mx.array:
    """Over tokens."""
    return h.mean(axis=tuple(range(h.ndim - ndim)))


def _moved(connection: HyperConnection, h_pre, h_post, before: ConnectionReport | None) -> list:
    """How far each gate is from its start, the nearest one that `HyperConnection` may have had."""
    c, n = connection.convention, connection.num_streams
    if before is not None:
        starts = [(mx.array(before.h_pre), mx.array(before.h_post))]
    else:
        starts = [gates(*_start(n, c, k)[:2], c) for k in range(n if c.sigmoid else 1)]
    return [
        mx.stack([mx.abs(h - start[k]).max() for start in starts]).min()
        for k, h in enumerate((h_pre, h_post))
    ]


@contextlib.contextmanager
def _watched(names: dict[int, str], see: Callable):
    """Replaces what each of these connections returns by ``see(connection, x, out)``."""
    read, layer = HyperConnection.__call__, MHCLayer.__call__

    def seen(connection, x, out):
        return see(connection, x, out) if id(connection) in names else out

    def watched_read(self, x):
        u, add_residual = read(self, x)
        return u, lambda y: seen(self, x, add_residual(y))

    def watched_layer(self, x, *args, **kwargs):
        return seen(self, x, layer(self, x, *args, **kwargs))

    HyperConnection.__call__, MHCLayer.__call__ = watched_read, watched_layer
    try:
        yield
    finally:
        HyperConnection.__call__, MHCLayer.__call__ = read, layer


def _plain(a):
    return a.tolist() if isinstance(a, mx.array) else a


def stability_report(
    model: nn.Module,
    batch: mx.array | tuple,
    loss_fn: Callable | None = None,
    *,
    before: StabilityReport | None = None,
) -> StabilityReport:
    """Run a model once and report on its connections in the order in which they ran.

    Connections are the `HyperConnection` and `MHCLayer` modules in it, also inside `MHCBlock`, its
    subclasses and blocks of `widen`; static or dynamic, with any convention. With a loss function
    the model runs once more, for gradients. The model, and its parameters, stay as they are.

    The composite multiplies h_res of each token in that order (float32, not TF32); it starts anew
    where the number of streams or the leading axes change.

    Args:
        model: Not compiled: that would hide its connections. And with a loss function without
            mx.checkpoint: nobody sees gradients inside.
        batch: What the model takes: an array, or a tuple of positional arguments.
        loss_fn: A scalar loss, called as ``loss_fn(model, *batch)`` instead of ``model(*batch)``.
        before: A report of the same model, from which gates moved. None measures from the nearest
            of the n starts that a connection may have: it does not keep its layer_idx, and the
            start of h_pre is 0.9 on that stream.

    Returns:
        Numbers and nested lists; ConnectionReport has the formulas.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: No connection ran, one ran in mx.checkpoint, the loss is not a scalar, there
            were no tokens, or ``before`` is of another model.
    """
    op = "stability_report"
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model must be an mlx.nn.Module but got {type(model).__name__}.")
    if not isinstance(batch, (mx.array, tuple)):
        must = "be an mx.array or a tuple of arguments"
        raise TypeError(f"[{op}] batch must {must} but got {type(batch).__name__}.")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"[{op}] loss_fn must be a function but got {type(loss_fn).__name__}.")
    if before is not None and not isinstance(before, StabilityReport):
        must = "be a StabilityReport"
        raise TypeError(f"[{op}] before must {must} but got {type(before).__name__}.")
    batch = batch if isinstance(batch, tuple) else (batch,)
    names = {id(m): k for k, m in model.named_modules() if isinstance(m, HyperConnection)}
    found, outs, composite = [], [], None

    def record(connection, x, out):
        nonlocal composite
        if x.size == 0:
            raise ValueError(f"[{op}] batch must have tokens but got streams {list(x.shape)}.")
        h_pre, h_post, h_res = connection.coefficients(x)
        n = connection.num_streams
        h_res = mx.eye(n) if h_res is None else h_res
        composite = _composed(h_res, composite)
        k, means = len(found), (_mean(h_pre, 1), _mean(h_post, 1))
        start = before.connections[k] if before and k < len(before.connections) else None
        pre_moved, post_moved = _moved(connection, *means, start)
        found.append(
            {
                "name": names[id(connection)] or type(connection).__name__,
                "convention": connection.convention.name,
                "dynamic": connection.dynamic,
                "streams": n,
                "h_pre": means[0],
                "h_post": means[1],
                "h_res": _mean(h_res, 2),
                "composite": _mean(composite, 2),
                **_gains(h_res, ""),
                **_gains(composite, "composite_"),
                "row_error": mx.abs(h_res.sum(-1) - 1).max(),
                "column_error": mx.abs(h_res.sum(-2) - 1).max(),
                "similarity": stream_similarity(out),
                "h_pre_moved": pre_moved,
                "h_post_moved": post_moved,
            }
        )
        outs.append(out)
        return out

    with _watched(names, record):
        loss = model(*batch) if loss_fn is None else loss_fn(model, *batch)
    if not found:
        must = "run a HyperConnection or MHCLayer of its own, outside mx.compile"
        raise ValueError(
            f"[{op}] model must {must} but got {type(model).__name__}, which ran none."
        )
    if before is not None and len(before.connections) != len(found):
        got = f"{len(before.connections)} connections"
        raise ValueError(f"[{op}] before must be of {len(found)} connections but got {got}.")
    if loss_fn is not None:
        if not isinstance(loss, mx.array) or loss.size != 1:
            got = list(loss.shape) if isinstance(loss, mx.array) else type(loss).__name__
            raise ValueError(f"[{op}] loss_fn must return a scalar but got {got}.")

        rest = iter(())

        def shift(connection, x, out):
            delta = next(rest, None)
            if delta is None:  # it runs once more for the gradient, and deltas have none there
                must, name = "run without mx.checkpoint", names[id(connection)]
                raise ValueError(f"[{op}] model must {must} but got one around {name}.")
            return out + delta

        def loss_of(deltas, parameters):
            nonlocal rest
            rest = iter(deltas)
            model.update(parameters)
            return loss_fn(model, *batch).squeeze()

        # The parameters' gradients are never evaluated; they make mx.checkpoint run again.
        parameters, zeros = model.trainable_parameters(), [mx.zeros_like(out) for out in outs]
        try:
            with _watched(names, shift):
                gradients, _ = mx.grad(loss_of, argnums=(0, 1))(zeros, parameters)
        finally:
            model.update(parameters)
        for each, g in zip(found, gradients, strict=True):
            g = g.astype(mx.float32).moveaxis(-2, 0).reshape(each["streams"], -1)
            each["gradient_norms"] = mx.sqrt((g * g).sum(-1))
    mx.eval(found)
    connections = [ConnectionReport(**{k: _plain(v) for k, v in each.items()}) for each in found]
    return StabilityReport(connections, None if loss_fn is None else loss.item())


def _runs(values, kind: type | tuple, called: str, argument: str) -> dict[str, list]:
    """The values of a dict as lists: one for each seed of a run."""
    if not isinstance(values, dict):
        got = type(values).__name__
        raise TypeError(f"[plot] {argument} must be a dict by name of run but got {got}.")
    runs = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in values.items()}
    for name, each in runs.items():
        for v in each:
            if not isinstance(v, kind):
                got = f"{type(v).__name__} for {name!r}"
                raise TypeError(f"[plot] {argument} must hold {called} but got {got}.")
        if not each:
            raise ValueError(f"[plot] {argument} must hold a value for each run but got {name!r}.")
    return runs


def plot(
    reports: dict[str, "StabilityReport | list[StabilityReport]"],
    folder: str | Path,
    *,
    logs: dict[str, "str | Path | list"] | None = None,
    column: str = "bits_per_byte",
) -> list[Path]:
    """Draw runs side by side into PNG files of a folder. Needs matplotlib, the extra ``plot``.

    gains.png: composite gains over depth, on a log axis. streams.png: similarity between streams
    and gradient norms over depth. h_res.png: mixing matrices as heat maps, at four depths, and
    the composite. gates.png: h_pre and h_post of each stream over depth. loss.png: the logs.

    Args:
        reports: By name of run; a list has one for each seed. The matrices and gates drawn are the
            first's.
        folder: Made if need be.
        logs: CSV files by name of run, with columns ``step``, ``column`` and, if they have one,
            ``validation``.
        column: What loss.png shows.

    Returns:
        The files written: the first four if there are reports, the last if there are logs.
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
    """A line per seed of value(connection) over depth; the first seed's is in the legend."""
    for name, seeds in runs.items():
        for k, report in enumerate(seeds):
            ys = [value(c) for c in report.connections]
            label = None if k or style else name
            odd = [
                not math.isfinite(y) and c.streams > 1
                for c, y in zip(report.connections, ys, strict=True)
            ]
            if label and any(odd):  # one stream has no similarity
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

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(tick)
    axes.yaxis.set_minor_formatter(tick)


def _legend(figure, title: str | None = None) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 5)
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns)


def _draw_gains(Figure, runs: dict, colors: dict):
    figure = Figure(figsize=(11, 5), layout="constrained")
    # Gains of 1 coincide: each run is thinner than those below it.
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
    _lines(panels[0], runs, colors, lambda c: c.similarity, widths)
    panels[0].set_title("similarity between streams (1: copies)")
    panels[0].set_ylabel("mean cosine")
    if graded:
        _lines(panels[1], runs, colors, lambda c: math.hypot(*c.gradient_norms), widths)
        _log_axis(panels[1])
        panels[1].set_title("gradient of the loss by the streams")
        panels[1].set_ylabel("norm over tokens, streams and channels")
    for axes in panels:
        axes.set_xlabel("after connection")
    _legend(figure)
    return figure


def _some(count: int, most: int = 4) -> list[int]:
    """Up to so many indices, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


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
    """The largest size of a finite element, at least 1."""
    sizes = [abs(v) for matrix in matrices for line in matrix for v in line]
    return max([1.0, *filter(math.isfinite, sizes)])


def _draw_matrices(Figure, runs: dict):
    columns = 1 + max(len(_some(len(seeds[0].connections))) for seeds in runs.values())
    figure = Figure(figsize=(2.2 * columns + 3, 2.4 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), columns, squeeze=False)
    for row, (name, seeds) in zip(grid, runs.items(), strict=True):
        found = seeds[0].connections
        shown = _some(len(found))
        top = _top([found[k].h_res for k in shown])
        for axes, k in zip(row, shown, strict=False):
            image = _draw_matrix(axes, found[k].h_res, top)
            axes.set_title(f"{name}, h_res {k + 1}", fontsize=9)
        for axes in row[len(shown) : -1]:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(row[:-1]), label="mean over tokens")
        image = _draw_matrix(row[-1], found[-1].composite, _top([found[-1].composite]))
        row[-1].set_title(f"{name}, product", fontsize=9)
        figure.colorbar(image, ax=row[-1], label="mean over tokens")
        row[0].set_ylabel("output stream")
    for axes in grid[-1]:
        axes.set_xlabel("input stream")
    return figure


def _draw_gates(Figure, runs: dict):
    figure = Figure(figsize=(12, 1.7 * len(runs) + 1), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False)
    tops = {}
    for gate in ("h_pre", "h_post"):
        values = [v for s in runs.values() for c in s[0].connections for v in getattr(c, gate)]
        tops[gate] = max([1.0 if gate == "h_pre" else 2.0, *filter(math.isfinite, values)])
    for row, (name, seeds) in zip(grid, runs.items(), strict=True):
        for axes, gate in zip(row, tops, strict=True):
            found = seeds[0].connections
            n = max(c.streams for c in found)
            gap = [math.nan] * n
            lines = [(getattr(c, gate) + gap)[:n] for c in found]
            values = [list(line) for line in zip(*lines, strict=True)]  # stream by depth
            extent = (0.5, len(found) + 0.5, n - 0.5, -0.5)
            scale = {"vmin": 0, "vmax": tops[gate], "cmap": "viridis", "aspect": "auto"}
            axes.imshow(values, extent=extent, interpolation="nearest", **scale)
            axes.set_yticks(range(n) if n <= 8 else [0, n - 1])
            _depth_axis(axes, len(found))
            axes.set_title(f"{name}, {gate}", fontsize=9)
            axes.set_ylabel("stream")
    for k in range(2):
        grid[-1][k].set_xlabel("connection")
        image = grid[-1][k].images[0]
        figure.colorbar(image, ax=list(grid[:, k]), label="mean over tokens")
    return figure


def _read_log(path: str | Path, column: str) -> tuple[list, list, list, list]:
    """Steps and values, and steps and values of the validation."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows or "step" not in rows[0] or column not in rows[0]:
        got = f"{path} with {sorted(rows[0]) if rows else 'no rows'}"
        raise ValueError(f"[plot] logs must have columns step and {column} but got {got}.")
    tested = [r for r in rows if r.get("validation")]
    return (
        [int(r["step"]) for r in rows],
        [float(r[column]) for r in rows],
        [int(r["step"]) for r in tested],
        [float(r["validation"]) for r in tested],
    )


def _draw_curves(Figure, curves: dict, colors: dict, column: str):
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    tested = False
    for name, paths in curves.items():
        for k, path in enumerate(paths):
            steps, values, at, validation = _read_log(path, column)
            window = max(1, len(values) // 50)
            means = [
                sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
                for i in range(len(values))
            ]
            label = None if k else name
            mark = "o" if len(steps) == 1 else None
            axes.plot(steps, means, color=colors[name], linewidth=1.2, label=label, marker=mark)
            axes.plot(at, validation, "x", color=colors[name], markersize=6)
            tested = tested or bool(at)
    title = "line: mean over a 50th of the run" + ("\ncross: validation" if tested else "")
    axes.legend(title=title, fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel(column.replace("_", " "))
    axes.grid(alpha=0.3)
    return figure
