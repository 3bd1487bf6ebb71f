"""Small models whose reports are computed by hand, for the tests of diagnostics."""

import json

import mlx.core as mx
import mlx.nn as nn

import mhc_mlx as m
from mhc_mlx.diagnostics import StabilityReport

# Of float32 sums of a few numbers near 1.
CLOSE = {"rel": 1e-5, "abs": 1e-6}
FIRST = [[1.0, 0.5], [-2.0, 0.25]]
SECOND = [[0.5, -1.0], [0.0, 3.0]]
# SECOND @ FIRST by hand: [0.5 + 2, 0.25 - 0.25], [-6, 0.75]
PRODUCT = [[2.5, 0.0], [-6.0, 0.75]]


class Chain(nn.Module):
    """Layers in a row, in the order in which they are given."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def fixed(h_res, **parameters):
    """A static layer whose h_res is this matrix."""
    n = len(h_res)
    layer = m.MHCLayer(n, 3, convention=m.UNCONSTRAINED)
    layer.H_res = mx.array(h_res) - mx.eye(n)
    return layer.update({k: mx.array(v) for k, v in parameters.items()})


def streams(*shape):
    return mx.random.normal(shape, key=mx.random.key(7))


def mean(model, x):
    return model(x).mean()


def strict(report):
    """Written as JSON and read back; strict JSON has no NaN and no infinity."""
    text = json.dumps(report.to_dict(), allow_nan=False)
    return StabilityReport.from_dict(json.loads(text))


CHAIN, X = Chain(fixed(FIRST)), streams(4, 2, 3)
