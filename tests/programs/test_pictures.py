"""Pictures of stability reports: what they draw, and texts that do not overlap."""

import csv
import math
import sys
from itertools import combinations

import mlx.core as mx
import mlx.nn as nn
import pytest
from models.modules import shaken

import mhc_mlx as m
from mhc_mlx.diagnostics import plot, stability_report
from programs.reports import CHAIN, FIRST, Chain, X, fixed, mean, streams, strict


def test_plot_names_mistakes(tmp_path, monkeypatch):
    report = stability_report(CHAIN, X)
    with pytest.raises(TypeError, match=r"\[plot\] reports must be a dict .* but got Stability"):
        plot(report, tmp_path)
    with pytest.raises(TypeError, match="reports must hold StabilityReport but got int for 'a'"):
        plot({"a": 3}, tmp_path)
    with pytest.raises(ValueError, match="at least one run but got none"):
        plot({}, tmp_path)
    with pytest.raises(ValueError, match="a value for each run but got 'a'"):
        plot({"a": []}, tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="columns step and bits_per_byte but got .*'loss', 'step'"):
        plot({}, tmp_path, logs={"a": tmp_path / "log.csv"})
    (tmp_path / "log.csv").write_text("step,similarity\n1,\n2,\n")
    with pytest.raises(ValueError, match="column must have a value in a log but similarity is"):
        plot({}, tmp_path, logs={"a": tmp_path / "log.csv"}, column="similarity")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"\[plot\] needs matplotlib: .*\[plot\]"):
        plot({"a": report}, tmp_path)


def write_log(path, steps, end):
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["step", "bits_per_byte", "validation"])
        for k in range(1, steps + 1):
            bits = end + (8 - end) * math.exp(-k / steps * 4) + 0.2 * math.sin(k)
            out.writerow([k, bits, bits + 0.1 if k % (steps // 3) == 0 else ""])
    return path


def drawn_runs(folder):
    """Reports and logs of runs that differ in depth, streams, seeds and gains."""

    def report(convention, depth, n=4, scale=0.0):
        mx.random.seed(0)
        options = {"dynamic": True, "convention": convention}
        layers = [m.MHCLayer(n, 8, layer_idx=k, **options) for k in range(depth)]
        model = shaken(Chain(*layers), scale)
        return stability_report(model, streams(6, n, 8), lambda f, x: (f(x) ** 2).mean())

    reports = {
        "hc": [report(m.UNCONSTRAINED, 48, scale=s) for s in (0.3, 0.25, 0.2)],
        "mhc": [report(m.PAPER, 48, scale=0.3)],
        "mhc-lite": report(m.MHC_LITE, 12, scale=0.3),
        "identity, 8 streams": report(m.IDENTITY, 48, n=8, scale=0.3),
        "one": report(m.PAPER, 1, n=1),
    }
    logs = {"hc": [write_log(folder / f"hc{k}.csv", 300, 2 + k / 9) for k in range(3)]}
    logs |= {"mhc": write_log(folder / "mhc.csv", 300, 2), "plain": write_log(folder / "p", 30, 3)}
    return reports, logs


def texts(figure):
    """Visible texts, but for legends: titles, labels, ticks, numbers; with where they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        if not axes.axison:
            continue
        found = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted(limits)
            ticks = axis.get_major_ticks() + axis.get_minor_ticks()
            shown = [t for t in ticks if low <= t.get_loc() <= high]
            found += [t for tick in shown for t in (tick.label1, tick.label2)]
        for text in found:
            if text.get_visible() and text.get_text():
                yield text.get_text(), text.get_window_extent(renderer)


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, by name of file."""
    from matplotlib.figure import Figure

    found, save = {}, Figure.savefig

    def savefig(figure, path, **options):
        save(figure, path, **options)
        figure.set_dpi(options["dpi"])  # as it was saved
        found[path.stem] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def test_a_column_that_is_empty_in_some_rows(tmp_path, figures):
    """As a run with plain residuals has no similarity; the validation is of another column."""
    (tmp_path / "mhc.csv").write_text("step,similarity,validation\n1,1.0,\n2,0.5,7.0\n3,,\n4")
    (tmp_path / "plain.csv").write_text("step,similarity,validation\n1,,6.0\n")
    logs = {name: tmp_path / f"{name}.csv" for name in ("mhc", "plain")}
    plot({}, tmp_path, logs=logs, column="similarity")
    (axes,) = figures["loss"].axes
    drawn = {
        line.get_label(): list(line.get_ydata()) for line in axes.lines if len(line.get_xdata())
    }
    assert drawn == {"mhc": [1.0, 0.5]}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["mhc", "plain (none)"]


def test_one_stream_has_no_similarity(tmp_path, figures):
    model = m.MHCBlock(nn.Linear(8, 8), 8, 1)
    plot({"one": stability_report(model, mx.random.normal((2, 1, 8)))}, tmp_path)
    assert [t.get_text() for t in figures["streams"].axes[0].texts] == ["one stream: none"]


def test_a_single_point_is_marked(tmp_path, monkeypatch):
    """A line of one point would not be seen; of zeros alone, a log axis has none."""
    from matplotlib.figure import Figure

    def report(depth):  # of a loss without a gradient
        layers = [m.MHCLayer(4, 8, dynamic=True) for _ in range(depth)]
        return stability_report(Chain(*layers), streams(6, 4, 8), lambda f, x: 0 * f(x).mean())

    found = {}
    monkeypatch.setattr(Figure, "savefig", lambda f, path, **_: found.update({path.stem: f}))
    logs = {name: tmp_path / f"{name}.csv" for name in ("one", "two")}
    logs["one"].write_text("step,bits_per_byte,validation\n1,2.0,3.0\n")
    logs["two"].write_text("step,bits_per_byte,validation\n1,2.0,\n2,1.0,\n")
    plot({"one": report(1), "two": report(2)}, tmp_path, logs=logs)
    similarity, gradients = found["streams"].axes
    for axes in [*found["loss"].axes, *found["gains"].axes, similarity]:
        marks = {line.get_label(): line.get_marker() for line in axes.lines}
        assert (marks["one"], marks["two"]) == ("o", "None")
    crosses = [
        k for k in found["loss"].axes[0].lines if len(k.get_xdata()) and k.get_marker() == "x"
    ]
    assert [list(k.get_ydata()) for k in crosses] == [[3.0]]
    assert similarity.get_yscale() == gradients.get_yscale() == "linear"
    shown = [axes.get_title() for axes in found["h_res"].axes if axes.get_title()]
    assert shown[:2] == ["one, h_res 1", "one, product"]
    assert shown[2:] == ["two, h_res 1", "two, h_res 2", "two, product"]


LABELS = {
    "gains": {
        *("gain of the product of h_res", "connections from the first to this one", "1", "10"),
        *("forward gain: largest |row sum|", "backward gain: largest |column sum|"),
    },
    "streams": {
        *("mean cosine", "norm over tokens, streams and channels", "after connection"),
        *("similarity between streams (1: copies)", "gradient of the loss by the streams"),
    },
    "h_res": {"input stream", "output stream", "mean over tokens", "hc, h_res 1", "hc, product"},
    "gates": {"stream", "connection", "mean over tokens", "hc, h_pre", "hc, h_post"},
    "loss": {"step", "bits per byte"},
}


def test_pictures_are_legible(tmp_path, figures):
    """Every axis says what it is, and no text overlaps another or leaves the picture."""
    reports, logs = drawn_runs(tmp_path)
    files = plot(reports, tmp_path / "pictures", logs=logs)
    assert [f.name for f in files] == [f"{name}.png" for name in figures]
    assert list(figures) == ["gains", "streams", "h_res", "gates", "loss"]
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in files)
    for name, figure in figures.items():
        found = list(texts(figure))
        assert len(found) > 8
        page = figure.bbox
        for text, box in found:
            inside = page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1
            assert inside and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, f"{name}: {text!r}"
        for (one, a), (two, b) in combinations(found, 2):
            apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
            assert apart, f"{name}: {one!r} overlaps {two!r}"
        assert LABELS[name] <= {text for text, _ in found}
    gains, streams_, _, _, loss = figures.values()
    assert [axes.get_yscale() for axes in gains.axes] == ["log", "log"]
    for figure in (gains, streams_):
        (legend,) = figure.legends
        assert {t.get_text() for t in legend.get_texts()} == set(reports)
        box = legend.get_window_extent()
        assert all(not box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    legends = [gains.legends[0], loss.axes[0].get_legend()]
    assert [legend.get_title().get_text() for legend in legends] == [
        "line: mean over tokens; dotted: largest token",
        "line: mean over a 50th of the run\ncross: validation",
    ]
    line = next(k for k in gains.axes[0].lines if k.get_label() == "mhc-lite")
    want = [c.composite_forward_gain for c in reports["mhc-lite"].connections]
    assert list(line.get_ydata()) == want and list(line.get_xdata()) == list(range(1, 13))
    assert max(max(k.get_ydata()) for k in gains.axes[0].lines) > 10  # hc grows
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in streams_.axes + loss.axes)


def test_diverged_runs_can_be_drawn(tmp_path, monkeypatch):
    """Gains that are infinite or no number: the legend says so."""
    from matplotlib.figure import Figure

    legend, titles, ticks = Figure.legend, [], []

    def noted(figure, handles, labels, **options):
        titles.extend(labels)
        ticks.extend(t for axes in figure.axes for t in axes.get_xticks())
        return legend(figure, handles, labels, **options)

    monkeypatch.setattr(Figure, "legend", noted)
    report = stability_report(Chain(fixed(FIRST), fixed([[math.inf, 0.0], [0.0, math.nan]])), X)
    files = plot({"diverged": report}, tmp_path)
    assert len(files) == 4 and all(f.exists() for f in files)
    assert titles == ["diverged (not finite)"] * 2  # gains and streams
    assert ticks and all(float(t).is_integer() for t in ticks), "half a connection"
    lost = strict(stability_report(m.MHCLayer(2, 3, dynamic=True), X * math.nan, mean))
    assert len(plot({"lost": lost}, tmp_path)) == 4  # not a number anywhere
