"""Reports and pictures of Qwen's gated residual."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models.modules import shaken

import mhc_mlx as m
from mhc_mlx.diagnostics import plot, stability_report, stream_similarity
from programs.reports import Chain, streams, strict


@pytest.fixture(autouse=True)
def uncompiled():
    """Compile nothing: on a CPU a second for each fused kernel would be most of a test."""
    mx.random.seed(0)
    mx.disable_compile()
    yield
    mx.enable_compile()


class Site(nn.Module):
    def __init__(self, scale=0.5):
        super().__init__()
        self.connection = shaken(m.GatedResidual(8, 4, 3, 1e-3), scale)

    def __call__(self, x):
        u, add_residual = self.connection(x)
        return add_residual(mx.tanh(u))


def test_gates_and_h_post_by_hand():
    """In float64, by the equations; h_res is the identity."""
    model, x = Chain(Site(), Site()), streams(2, 3, 4, 8)
    report = stability_report(model, x, lambda model, x: (model(x) ** 2).mean())
    assert [c.name for c in report.connections] == [f"layers.{k}.connection" for k in (0, 1)]
    for site, got in zip(model.layers, report.connections, strict=True):
        c = site.connection
        weight, down, up, inject = (
            np.array(a, np.float64) for a in (c.weight, c.down.weight, c.up.weight, c.inject.weight)
        )
        v = np.array(x, np.float64)
        s = v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-3) * (1 + weight)
        s = s.reshape(2, 3, 32)
        z = s @ down.T / 4
        gates = 1 / (1 + np.exp(-(z / (1 + np.exp(-z))) @ up.T)).reshape(2, 3, 4, 8)
        h_post = 2 / (1 + np.exp(-s @ inject.T / 4))
        x = site(x)
        assert got.h_pre == pytest.approx(gates.mean((0, 1, 3)), rel=1e-5)
        assert got.gate_min == pytest.approx(gates.min((0, 1, 3)), rel=1e-5)
        assert got.gate_max == pytest.approx(gates.max((0, 1, 3)), rel=1e-5)
        assert got.h_post == pytest.approx(h_post.mean((0, 1)), rel=1e-5)
        assert (got.convention, got.dynamic, got.streams) == ("gated", True, 4)
        assert got.h_res == got.composite == np.eye(4).tolist()
        assert got.forward_gain == got.backward_gain == got.composite_forward_gain_max == 1
        assert got.row_error == got.column_error == 0
        assert got.h_pre_moved == pytest.approx(np.abs(gates.mean((0, 1, 3)) - 0.5).max(), 1e-4)
        assert got.h_post_moved == pytest.approx(np.abs(h_post.mean((0, 1)) - 1).max(), rel=1e-4)
        assert got.similarity == pytest.approx(stream_similarity(x).item(), rel=1e-5)
        assert min(got.gradient_norms) > 0
    assert strict(report) == report and "layers.1.connection" in str(report)


def test_moved_since_a_report_before():
    model, x = Chain(Site(0.0)), streams(3, 4, 8)
    before = stability_report(model, x)
    (start,) = before.connections
    assert start.h_pre_moved < 0.01 and start.h_post_moved < 0.6  # the start has noise there
    shaken(model)
    (moved,) = stability_report(model, x, before=before).connections
    want = np.abs(np.array(moved.h_pre) - start.h_pre).max()
    assert moved.h_pre_moved == pytest.approx(want, rel=1e-4) and want > 1e-3


def test_blocks_of_widen_and_reads_are_seen_or_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.RMSNorm(8), nn.Linear(8, 8)

        def residual_branches(self):
            return [lambda h: self.mix(self.norm(h))]

        def __call__(self, h):
            return h + self.mix(self.norm(h))

    model = nn.Sequential(Block(), Block())
    m.widen(model, 4, dim=8, connection="gated")
    report = stability_report(model, mx.random.normal((2, 3, 8)))
    assert [c.name for c in report.connections] == [f"layers.{k}.connections.0" for k in (0, 1)]
    for c in report.connections:
        assert c.h_pre == c.gate_min == c.gate_max == [0.5] * 4 and c.h_post == [1.0] * 4

    class Joined(Site):
        def __call__(self, x):
            return self.connection.read(x)[0]

    with pytest.raises(ValueError, match="must run a HyperConnection, MHCLayer or GatedResidual"):
        stability_report(Joined(), streams(2, 4, 8))


def test_pictures(tmp_path, monkeypatch):
    """Gates beside those of other connections, which have no smallest and no largest gate."""
    from matplotlib.figure import Figure

    figures, x = {}, streams(6, 4, 8)
    monkeypatch.setattr(Figure, "savefig", lambda f, path, **_: figures.update({path.stem: f}))
    both = Chain(Site(), m.MHCLayer(4, 8, dynamic=True))
    models = {"gated": Chain(Site(), Site()), "both": both, "mhc": Chain(m.MHCLayer(4, 8))}
    reports = {name: stability_report(model, x) for name, model in models.items()}
    assert len(plot(reports, tmp_path)) == 4
    gates = [axes for axes in figures["gates"].axes if axes.get_title()]
    titles = ["h_pre", "h_post", "smallest gate", "largest gate"]
    shown = {axes.get_title(): axes.images[0].get_array() for axes in gates}
    want = {f"{name}, {title}" for name in ("gated", "both") for title in titles}
    assert shown.keys() == want | {"mhc, h_pre", "mhc, h_post"}
    first, second = reports["gated"].connections
    for title, field in zip(titles, ("h_pre", "h_post", "gate_min", "gate_max"), strict=True):
        drawn = np.array(shown[f"gated, {title}"])
        assert np.allclose(drawn.T, [getattr(c, field) for c in (first, second)])
    hidden = shown["both, largest gate"]
    assert np.isnan(np.ma.filled(hidden, np.nan)[:, 1]).all()  # the second has no such gates
    labels = [axes.get_ylabel() for axes in figures["gates"].axes if not axes.get_title()]
    bars = ["mean over tokens", "mean over tokens", "smallest gate", "largest gate"]
    assert [label for label in labels if label] == bars
    named = {axes.get_title() for axes in gates if axes.get_xlabel() == "connection"}
    assert named == {"mhc, h_pre", "mhc, h_post", "both, smallest gate", "both, largest gate"}
