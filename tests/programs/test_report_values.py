"""`stability_report` has the numbers that NumPy finds in float64, where matrices are not symmetric
and do not commute, tokens differ, and the model is in bfloat16."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mhc_mlx as m
from mhc_mlx.diagnostics import stability_report
from mhc_mlx.diagnostics.report import stream_similarity

N, C, TOKENS = 3, 8, 5


class Pair(nn.Module):
    """Two connections lie around sublayers that write y = 0, so streams are only mixed."""

    def __init__(self, dynamic):
        super().__init__()
        options = {"convention": m.UNCONSTRAINED, "dynamic": dynamic}
        self.row = [m.HyperConnection(C, N, layer_idx=k, **options) for k in range(2)]
        for k, connection in enumerate(self.row):
            key = mx.random.key(k)
            if dynamic:  # each token has its own matrices
                connection.phi = 0.3 * mx.random.normal(connection.phi.shape, key=key)
                connection.alpha = mx.full(3, 0.7)
                connection.bias = connection.bias + mx.random.normal(connection.bias.shape, key=key)
            else:
                connection.H_res = mx.random.normal((N, N), key=key)

    def __call__(self, x):
        for connection in self.row:
            u, add_residual = connection(x)
            x = add_residual(0 * u)
        return x


def double(a):
    return np.array(a.astype(mx.float32), np.float64)


def gains(h, name):
    """Rows are outputs: forward adds a row, backward a column; the line with the most counts."""
    forward = np.abs(h.sum(-1)).max(-1)
    backward = np.abs(h.sum(-2)).max(-1)
    largest = {f"{name}forward_gain": forward, f"{name}backward_gain": backward}
    return {k: v.mean() for k, v in largest.items()} | {
        f"{k}_max": v.max() for k, v in largest.items()
    }


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_number_of_a_report(dynamic, dtype):
    model, random = Pair(dynamic), np.random.default_rng(0)
    model.set_dtype(dtype)
    x = mx.array(random.standard_normal((TOKENS, N, C)).astype(np.float32)).astype(dtype)
    weights = mx.array(random.standard_normal((TOKENS, N, C)).astype(np.float32)).astype(dtype)
    other = Pair(dynamic)
    for connection in other.row:
        gates = ("bias",) if dynamic else ("H_pre", "H_post")
        connection.update({k: connection[k] + mx.random.normal(connection[k].shape) for k in gates})
    start = stability_report(other, x.astype(mx.float32))
    loss = lambda model, x: (model(x) * weights).astype(mx.float32).sum()  # noqa: E731
    report = stability_report(model, (x,), loss, before=start)

    streams, composite, mixed, outs = x, np.eye(N), [], []
    for connection in model.row:
        h_pre, h_post, h_res = (double(h) for h in connection.coefficients(streams))
        streams = connection(streams)[1](mx.zeros((TOKENS, C), dtype))
        composite = h_res @ composite
        mixed.append((h_pre.reshape(-1, N), h_post.reshape(-1, N), h_res, composite))
        outs.append(streams)
    gradient = [np.swapaxes(mixed[1][2], -1, -2) @ double(weights), double(weights)]
    near = {mx.float32: 1e-5, mx.bfloat16: 2e-2}[dtype]  # of gradients that pass through dtype

    assert abs(report.loss - double(streams * weights).sum()) < 1e-4
    for k, found in enumerate(report.connections):
        h_pre, h_post, h_res, composite = mixed[k]
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for token in double(outs[k])
            for i, a in enumerate(token)
            for j, b in enumerate(token)
            if i != j
        ]
        want = gains(h_res, "") | gains(composite, "composite_")
        want |= {
            "row_error": np.abs(h_res.sum(-1) - 1).max(),
            "column_error": np.abs(h_res.sum(-2) - 1).max(),
            "similarity": np.mean(cosines),
            "h_pre": h_pre.mean(0),
            "h_post": h_post.mean(0),
            "h_res": h_res.reshape(-1, N, N).mean(0),
            "composite": composite.reshape(-1, N, N).mean(0),
            "h_pre_moved": np.abs(h_pre.mean(0) - start.connections[k].h_pre).max(),
            "h_post_moved": np.abs(h_post.mean(0) - start.connections[k].h_post).max(),
        }
        assert want["forward_gain"] > 1.02 * want["backward_gain"] or (
            want["backward_gain"] > 1.02 * want["forward_gain"]
        ), "this matrix would not tell one from the other"
        for name, value in want.items():
            got = np.array(getattr(found, name))
            error = np.abs(got - value).max() / np.abs(value).max()
            assert got.dtype == np.float64 and error < 2e-5, f"{k} {name}: {got}, must be {value}"
        norms = np.sqrt((gradient[k] ** 2).sum((0, 2)))
        if k == 1 or not dynamic:  # otherwise streams also make the next matrices
            np.testing.assert_allclose(found.gradient_norms, norms, rtol=1e-5 if k == 1 else near)
        assert (found.convention, found.dynamic, found.streams) == ("UNCONSTRAINED", dynamic, N)
        assert found.name == f"row.{k}"
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert type(report).from_dict(report.to_dict()) == report


def test_similarity_is_float32():
    """It is right for float16 streams whose squares are too large for float16."""
    x = mx.full((2, 3, 8), 300.0, dtype=mx.float16) * mx.array([1.0, 2.0, -1.0])[:, None]
    found = stream_similarity(x.astype(mx.float16))
    assert found.dtype == mx.float32 and abs(found.item() + 1 / 3) < 1e-6
