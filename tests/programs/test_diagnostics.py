"""Stability reports against values computed by hand."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models.modules import TOKENS, Tiny, loss_fn, running, shaken

import mhc_mlx as m
from mhc_mlx.diagnostics import StabilityReport, stability_report, stream_similarity
from programs.reports import (
    CHAIN,
    CLOSE,
    FIRST,
    PRODUCT,
    SECOND,
    Chain,
    X,
    fixed,
    mean,
    streams,
    strict,
)


def test_gains_by_hand():
    report = stability_report(Chain(fixed(FIRST), fixed(SECOND)), streams(5, 2, 3))
    first, second = report.connections
    assert first.h_res == FIRST and second.h_res == SECOND
    assert np.allclose(second.composite, PRODUCT) and first.composite == FIRST
    want = {  # row sums of FIRST 1.5, -1.75, column sums -1, 0.75; SECOND -0.5, 3 and 0.5, 2
        "forward_gain": (1.75, 3.0),
        "backward_gain": (1.0, 2.0),
        "composite_forward_gain": (1.75, 5.25),  # of PRODUCT 2.5, -5.25
        "composite_backward_gain": (1.0, 3.5),  # and -3.5, 0.75
        "row_error": (2.75, 2.0),
        "column_error": (2.0, 1.0),
    }
    for field, values in want.items():
        got = [getattr(c, field) for c in report.connections]
        assert got == pytest.approx(values, **CLOSE), field
        if "gain" in field:  # all tokens have the same matrices
            assert [getattr(c, f"{field}_max") for c in report.connections] == got
    assert [c.streams for c in report.connections] == [2, 2]
    assert [c.convention for c in report.connections] == ["UNCONSTRAINED"] * 2


@pytest.mark.parametrize("convention", [m.UNCONSTRAINED, m.PAPER], ids=lambda c: c.name)
def test_gains_per_token(convention):
    """Against float64 products of each token's own matrices."""
    mx.random.seed(2)
    layers = [
        shaken(m.MHCLayer(4, 8, dynamic=True, convention=convention, layer_idx=k)) for k in range(3)
    ]
    x = start = streams(2, 5, 4, 8)
    report = stability_report(Chain(*layers), start)
    composite = np.eye(4)
    for layer, got in zip(layers, report.connections, strict=True):
        h_pre, h_post, h_res = (np.array(h, np.float64) for h in layer.coefficients(x))
        x = layer(x)
        composite = h_res @ composite
        for what, h in (("", h_res), ("composite_", composite)):
            for way, axis in (("forward", -1), ("backward", -2)):
                gains = np.abs(h.sum(axis)).max(-1)
                assert gains.std() > 1e-5 or convention is m.PAPER
                assert getattr(got, f"{what}{way}_gain") == pytest.approx(gains.mean(), rel=1e-5)
                assert getattr(got, f"{what}{way}_gain_max") == pytest.approx(gains.max(), rel=1e-5)
        assert np.allclose(got.h_pre, h_pre.mean((0, 1)), atol=1e-6)
        assert np.allclose(got.h_post, h_post.mean((0, 1)), atol=1e-6)
        assert np.allclose(got.h_res, h_res.mean((0, 1)), atol=1e-6)
        assert np.allclose(got.composite, composite.mean((0, 1)), atol=1e-5)
        assert got.row_error == pytest.approx(np.abs(h_res.sum(-1) - 1).max(), **CLOSE)
        assert got.column_error == pytest.approx(np.abs(h_res.sum(-2) - 1).max(), **CLOSE)
        v = np.array(x, np.float64)
        v /= np.linalg.norm(v, axis=-1, keepdims=True)
        cosines = [(v[:, :, i] * v[:, :, j]).sum(-1).mean() for i, j in combinations(range(4), 2)]
        assert got.similarity == pytest.approx(np.mean(cosines), abs=1e-5)
    if convention is m.PAPER:
        assert all(abs(c.composite_forward_gain_max - 1) < 1e-4 for c in report.connections)
    else:
        assert report.connections[-1].composite_forward_gain_max > 1.5


def test_composite_starts_anew_where_streams_change():
    """Static and per-token matrices multiply; another n, or other tokens, begin again."""
    mx.random.seed(3)
    dynamic = shaken(m.MHCLayer(2, 3, dynamic=True, convention=m.UNCONSTRAINED))
    three = fixed([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [fixed(FIRST), dynamic, three]

        def __call__(self, x):
            x = self.layers[1](self.layers[0](x))
            return self.layers[2](m.expand_streams(m.reduce_streams(x), 3))

    first, second, third = stability_report(Model(), streams(5, 2, 3)).connections
    assert np.allclose(second.composite, np.array(second.h_res) @ FIRST, atol=1e-5)
    assert third.composite == third.h_res and third.composite_forward_gain == 2


def test_similarity_by_hand():
    copies = mx.array([[[1.0, 2.0], [1.0, 2.0]]])
    assert stream_similarity(copies).item() == pytest.approx(1)
    assert stream_similarity(copies * mx.array([[1.0], [-3.0]])).item() == pytest.approx(-1)
    assert stream_similarity(mx.array([[1.0, 0.0], [0.0, 2.0]])).item() == pytest.approx(0)
    # cosines 0, 1/sqrt(2), 1/sqrt(2); and a token of copies: mean of both tokens
    token = mx.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    want = (2 / 3 * 2**-0.5 + 1) / 2
    both = mx.stack([token, mx.ones((3, 2))])
    assert stream_similarity(both).item() == pytest.approx(want, rel=1e-6)
    assert math.isnan(stream_similarity(mx.ones((4, 1, 2))).item())
    for size in (1e-30, 1e-7, 1e19, 1e38):  # squares leave float32
        assert stream_similarity(copies * size / 4).item() == pytest.approx(1)
    assert stream_similarity(mx.zeros((2, 4, 8))).item() == 0
    assert math.isnan(stream_similarity(mx.full((2, 4, 8), math.inf)).item())


def test_gates_moved():
    """From the nearest start, or from the report before: 0.9 on stream layer_idx % n."""
    connection = m.HyperConnection(8, 4, layer_idx=2, dynamic=False)
    model = m.MHCBlock(nn.Linear(8, 8), 8)
    model.connection = connection
    x = streams(3, 4, 8)
    before = stability_report(model, x)
    (start,) = before.connections
    assert start.h_pre == pytest.approx([0.1 / 3] * 2 + [0.9, 0.1 / 3], rel=1e-5)
    assert start.h_post == pytest.approx([1] * 4)
    assert max(start.h_pre_moved, start.h_post_moved) < 1e-6
    connection.H_pre[2] = math.log(0.7 / 0.3)
    connection.H_post[1] = math.log(0.2 / 0.8)  # h_post = 2 * 0.2
    (moved,) = stability_report(model, x).connections
    assert moved.h_pre_moved == pytest.approx(0.2, **CLOSE)
    assert moved.h_post_moved == pytest.approx(0.6, **CLOSE)
    # It now reads stream 0: the nearest start is another one, the report before is not.
    connection.H_pre = mx.array([math.log(9)] + [math.log((0.1 / 3) / (1 - 0.1 / 3))] * 3)
    (other,) = stability_report(model, x).connections
    assert other.h_pre_moved < 1e-6
    (other,) = stability_report(model, x, before=before).connections
    assert other.h_pre_moved == pytest.approx(0.9 - 0.1 / 3, **CLOSE)


def test_gradient_norms_by_hand():
    """With h_post = 0 the streams are only mixed, so gradients are transposes times weights."""
    closed = {"H_post": [-200.0, -200.0]}
    model = Chain(fixed(FIRST, **closed), fixed(SECOND, **closed))
    weight = np.array(streams(4, 2, 3), np.float64)

    def loss(model, x, scale):
        return scale * (mx.array(weight, mx.float32) * model(x)).sum()

    report = stability_report(model, (streams(4, 2, 3), mx.array(2.0)), loss)
    last = 2 * weight
    first = np.einsum("ij,tic->tjc", np.array(SECOND), last)
    for got, g in zip(report.connections, (first, last), strict=True):
        want = np.sqrt((g**2).sum((0, 2)))
        assert got.gradient_norms == pytest.approx(want, rel=1e-5)
    want = 2 * (weight * np.einsum("ij,tjc->tic", PRODUCT, np.array(streams(4, 2, 3)))).sum()
    assert report.loss == pytest.approx(want, rel=1e-4)


def test_gradients_may_vanish():
    """A loss that does not depend on the streams: no ratio of norms is taken."""
    model = Chain(fixed(SECOND), fixed(SECOND))
    report = stability_report(model, X, lambda model, x: 0 * model(x).sum())
    assert [c.gradient_norms for c in report.connections] == [[0, 0], [0, 0]]


def test_gradient_norms_of_a_model():
    """Of the loss by the streams after a block, by splitting the model there."""
    model = shaken(Tiny(), 0.3)
    report = stability_report(model, TOKENS, loss_fn)
    assert report.loss == pytest.approx(loss_fn(model).item(), rel=1e-5)
    x = m.expand_streams(model.embedding(TOKENS[:, :-1]), 4)
    for k, got in enumerate(report.connections):
        x = model.blocks[k](x)

        def rest(x, k=k):
            for block in model.blocks[k + 1 :]:
                x = block(x)
            logits = model.embedding.as_linear(model.head(x))
            return nn.losses.cross_entropy(logits, TOKENS[:, 1:], reduction="mean")

        want = mx.sqrt((mx.grad(rest)(x) ** 2).sum((0, 1, 3))).tolist()
        assert got.gradient_norms == pytest.approx(want, rel=1e-4) and min(want) > 1e-4


class Sublayers(nn.Module):
    """A block that `widen` takes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def residual_branches(self):
        return [self.b, self.a]

    def __call__(self, x):
        x = x + self.b(x)
        return x + self.a(x)


def every_kind():
    """A model with every module that connects, called in another order than they are kept."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = m.MHCLayer(4, 8, dynamic=True, convention=m.DEEPSEEK_V4)
            self.block = m.MHCBlock(nn.Linear(8, 8), 8, convention=m.KRONECKER)
            self.lite = m.MHCLiteBlock(nn.Linear(8, 8), 8)
            self.bare = m.HyperConnection(8, convention=m.IDENTITY)
            self.static = m.MHCLayer(4, 8)
            self.additive = m.MHCLayer(4, 8, convention=m.ADDITIVE)
            self.layers = [Sublayers(), Sublayers()]
            m.widen(self, 4, dim=8)

        def __call__(self, h):
            for layer in self.layers:
                h = layer(h)
            x = self.static(m.expand_streams(h, 4), mx.tanh)
            x = self.lite(self.block(self.additive(self.static(x))))
            u, add_residual = self.bare(x)
            return self.last(add_residual(mx.tanh(u)))

    names = [f"layers.{k}.connections.{b}" for k in (0, 1) for b in (0, 1)]
    names += ["static", "static", "additive", "block.connection", "lite.connection", "bare", "last"]
    return shaken(Model(), 0.1), names


def test_every_module_is_seen_in_the_order_in_which_it_runs():
    model, names = every_kind()
    h = streams(2, 3, 8)
    calls, want = [m.HyperConnection.__call__, m.MHCLayer.__call__], model(h)
    weights = tree_flatten(model)
    report = stability_report(model, h, lambda model, h: (model(h) ** 2).mean())
    assert [c.name for c in report.connections] == names
    kinds = ["PAPER"] * 4 + ["ROW_FIRST"] * 2
    kinds += ["ADDITIVE", "KRONECKER", "MHC_LITE", "IDENTITY", "DEEPSEEK_V4"]
    assert [c.convention for c in report.connections] == kinds
    assert [c.dynamic for c in report.connections] == [True] * 4 + [False] * 3 + [True] * 4
    assert [c.h_pre_moved > 1e-3 for c in report.connections] == [True] * 11
    assert report.connections[-2].h_res == np.eye(4).tolist()
    assert [m.HyperConnection.__call__, m.MHCLayer.__call__] == calls
    assert mx.array_equal(model(h), want)
    assert all(a is b for (_, a), (_, b) in zip(tree_flatten(model), weights, strict=True))
    table = str(report).splitlines()
    assert len(table) == 12 and len({len(line) for line in table}) == 1
    for name, line, c in zip(names, table[1:], report.connections, strict=True):
        assert name in line and f"{c.similarity:.4g}" in line


def test_classes_are_restored_after_an_error():
    calls = [m.HyperConnection.__call__, m.MHCLayer.__call__]
    with pytest.raises(ValueError, match="x must have shape"):
        stability_report(Chain(fixed(FIRST)), streams(5, 3, 3))
    assert [m.HyperConnection.__call__, m.MHCLayer.__call__] == calls


def test_json_and_back():
    report = stability_report(Tiny(), TOKENS, loss_fn)
    text = json.dumps(report.to_dict())
    assert StabilityReport.from_dict(json.loads(text)) == report


def test_json_of_one_stream():
    """One stream is similar to none: None, not NaN."""
    report = stability_report(m.MHCBlock(nn.Linear(8, 8), 8, 1), streams(2, 1, 8))
    assert report.connections[0].similarity is None and strict(report) == report
    head, line = str(report).splitlines()
    assert len(head) == len(line) and "nan" not in line and "None" not in line


def test_json_of_numbers_that_are_not_finite():
    """They are null, and NaN when read back."""
    diverged = Chain(fixed(FIRST), fixed([[math.inf, 0.0], [0.0, math.nan]]))
    report = stability_report(diverged, X, mean)
    read = strict(report)
    first, second = read.connections
    assert math.isnan(read.loss) and math.isnan(second.forward_gain_max)
    assert math.isnan(second.similarity) and all(map(math.isnan, first.gradient_norms))
    assert math.isnan(second.h_res[0][0]) and second.h_res[0][1] == 0 and second.streams == 2
    assert first.h_res == FIRST and second.gradient_norms == report.connections[1].gradient_norms
    assert strict(read).to_dict() == read.to_dict() == report.to_dict()
    ungraded = stability_report(diverged, X)
    assert strict(ungraded).loss is None and strict(ungraded).connections[0].gradient_norms is None


@pytest.mark.parametrize("where", ["here", "stand-in"])
def test_other_threads_are_not_disturbed(where):
    """While a report runs, others use the same model: what they compute is neither recorded nor
    shifted, their reports are the same, and they find the model's own parameters."""
    with running(where):
        model, x = shaken(Chain(*(m.MHCLayer(2, 3, dynamic=k > 0) for k in range(3)))), X
        want, alone = model(x), stability_report(model, x, mean)
        weights = tree_flatten(model)
        mx.eval(want, model, x)
        calls, seen = [], []

        def elsewhere():
            out = model(x)
            mx.eval(out)
            mine = all(a is b for (_, a), (_, b) in zip(tree_flatten(model), weights, strict=True))
            return out, mine, stability_report(model, x, mean) if len(calls) == 2 else alone

        def loss(model, x):
            calls.append(None)
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(elsewhere).result())
            return mean(model, x)

        assert stability_report(model, x, loss) == alone
        assert len(seen) == 2  # the second time for gradients
        for out, mine, report in seen:
            assert mx.array_equal(out, want) and mine and report == alone


def test_a_model_must_run_its_connections_each_time():
    for first, then, got in ((1, 2, "got more"), (2, 1, "got 1 fewer")):
        depths = iter((first, then))

        def loss(model, x, depths=depths):
            return Chain(*model.layers[: next(depths)])(x).mean()

        with pytest.raises(ValueError, match=f"run the same {first} connections .* but {got}"):
            stability_report(Chain(fixed(FIRST), fixed(SECOND)), X, loss)


class Recomputed(Chain):
    def __call__(self, x):
        for layer in self.layers:
            x = nn.utils.checkpoint(layer)(x)
        return x


class Hidden(Chain):
    """In mx.checkpoint from the start, whose arguments no connection has made."""

    def __call__(self, x):
        return mx.checkpoint(super().__call__)(x)


class Stopped(Chain):
    """Whose first streams have no gradient, outside mx.checkpoint."""

    def __call__(self, x):
        first, *rest = self.layers
        return mx.checkpoint(rest[-1])(mx.stop_gradient(first(x)))


MISTAKES = {
    "model": ((print, X), TypeError, "model must be an mlx.nn.Module but got builtin"),
    "batch": ((CHAIN, [X]), TypeError, "batch must be an mx.array or a tuple .* but got list"),
    "loss_fn": ((CHAIN, X, 3), TypeError, "loss_fn must be a function but got int"),
    "no connection": ((nn.Linear(3, 3), X), ValueError, "model must run a .* but got Linear"),
    "no tokens": ((CHAIN, mx.zeros((0, 2, 3))), ValueError, r"tokens but got streams \[0, 2, 3\]"),
    "loss of tokens": ((CHAIN, X, lambda model, x: model(x)), ValueError, r"scalar but got \[4, 2"),
    "a pair": (
        (CHAIN, X, lambda model, x: (mean(model, x), x)),
        ValueError,
        "scalar but got tuple",
    ),
    "checkpoint": ((Recomputed(fixed(FIRST)), X, mean), ValueError, "checkpoint but .* layers.0"),
    "all in one": ((Hidden(fixed(FIRST)), X, mean), ValueError, "checkpoint but .* layers.0"),
    "a stop before": (
        (Stopped(fixed(FIRST), fixed(SECOND)), X, mean),
        ValueError,
        "checkpoint but .* layers.1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_report_names_mistakes(mistake):
    args, error, match = MISTAKES[mistake]
    with pytest.raises(error, match=rf"\[stability_report\] .*{match}"):
        stability_report(*args)


def test_report_before_must_be_of_the_same_model():
    before = stability_report(Chain(fixed(FIRST), fixed(SECOND)), X)
    with pytest.raises(ValueError, match="before must be of 1 connections but got 2 connections"):
        stability_report(CHAIN, X, before=before)
    with pytest.raises(ValueError, match="before must be of connections with 2 streams"):
        stability_report(CHAIN, X, before=stability_report(m.MHCLayer(3, 3), streams(4, 3, 3)))
    with pytest.raises(TypeError, match="before must be a StabilityReport but got dict"):
        stability_report(CHAIN, X, before={})
