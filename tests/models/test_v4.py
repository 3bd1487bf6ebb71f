"""DeepSeek V4's tensors in a HyperConnection and a HyperHead: the official names, and errors."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from proof import oracle

import mhc_mlx as m

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

from mlx_lm.models import deepseek_v41 as stock  # noqa: E402

from mhc_mlx import models as adapter  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import tiny, within  # noqa: E402

launched = modules.launched


def v4(dim: int, random: np.random.Generator, head: bool) -> dict[str, np.ndarray]:
    outs, parts = (4, 1) if head else (24, 3)
    return {
        "fn": random.standard_normal((outs, 4 * dim)) * (4 * dim) ** -0.5,
        "base": random.standard_normal(outs),
        "scale": random.uniform(0.5, 1.5, parts),
    }


@pytest.mark.parametrize("separator", ["_", "."])
def test_v4_tensors(separator, launched):
    """The official names of a layer's two connections and of the read-out, against the oracle."""
    dim, random, weights = 48, np.random.default_rng(0), {"layers.0.attn_norm.weight": mx.ones(3)}
    x, y = random.standard_normal((2, 3, 4, dim)), random.standard_normal((2, 3, dim))
    parts = {p: v4(dim, random, p == "hc_head") for p in ("layers.0.hc_attn", "hc_head")}
    for prefix, arrays in parts.items():
        weights |= {f"{prefix}{separator}{k}": mx.array(a) for k, a in arrays.items()}
    weights = {k: a.astype(mx.float32) for k, a in weights.items()}

    connection = m.HyperConnection(dim, 4, convention=m.DEEPSEEK_V4, norm_eps=1e-20)
    assert adapter.load_v4(connection, weights, "layers.0.hc_attn") is connection
    u, add_residual = connection(mx.array(x).astype(mx.float32))
    out = add_residual(mx.array(y).astype(mx.float32))
    given = [a.astype(np.float32).astype(np.float64) for a in parts["layers.0.hc_attn"].values()]
    made, _ = oracle.mhc_pre(x, *given, None, m.DEEPSEEK_V4, 1e-20)
    np.testing.assert_allclose(u, made[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        out, oracle.stream_mix_add(x, y, *made[1:3])[0], rtol=1e-4, atol=1e-5
    )

    layer = m.MHCLayer(4, dim, convention=m.DEEPSEEK_V4, dynamic=True, norm_eps=1e-20)
    adapter.load_v4(layer, weights, "layers.0.hc_attn")  # and keeps its own norm
    for a, b in zip(
        layer.coefficients(mx.array(x)), connection.coefficients(mx.array(x)), strict=True
    ):
        assert mx.array_equal(a, b).item()

    head = m.HyperHead(dim, 4, convention=m.DEEPSEEK_V4, norm_eps=1e-20)
    adapter.load_v4(head, weights, "hc_head")
    given = [a.astype(np.float32).astype(np.float64) for a in parts["hc_head"].values()]
    want, _ = oracle.mhc_head(x, *given, m.DEEPSEEK_V4, 1e-20)
    np.testing.assert_allclose(head(mx.array(x).astype(mx.float32)), want, rtol=1e-4, atol=1e-5)


def test_v4_is_v41_unlagged(launched):
    """V4's write-back with mlx-lm's V4.1 coefficients of the same tensors."""
    hc, x = tiny().layers[0].attn_hc, mx.random.normal((1, 3, 4, 64))
    y = mx.random.normal((1, 3, 64))
    weights = {f"hc_ffn.{k}": a for k, a in hc.parameters().items()}
    connection = m.HyperConnection(64, 4, convention=m.DEEPSEEK_V4, norm_eps=hc.norm_eps)
    u, add_residual = adapter.load_v4(connection, weights, "hc_ffn")(x)
    pre, post, comb = hc(x)
    within(u, stock._collapse(x, pre), mx.float32)
    within(add_residual(y), stock._expand(y, x, post, comb), mx.float32)


# ---- errors

TENSORS = {"c_fn": mx.zeros((24, 32)), "c_base": mx.zeros(24), "c_scale": mx.zeros(3)}


def of_v4(dim):
    return m.HyperConnection(dim, convention=m.DEEPSEEK_V4)


BAD = [  # a module, the tensors, and what is said of them
    (nn.Linear(2, 2), {}, TypeError, "HyperHead but got Linear"),
    (m.HyperConnection(8, dynamic=False), TENSORS, TypeError, "must be a dynamic HyperConnection"),
    (of_v4(8), {}, ValueError, "must have c_fn"),
    (m.HyperConnection(8), TENSORS, ValueError, "convention must be DEEPSEEK_V4's but got PAPER"),
    (of_v4(9), TENSORS, ValueError, r"c_fn must have shape \[24, 36\] but got \[24, 32\]"),
]


@pytest.mark.parametrize("module, tensors, kind, message", BAD)
def test_errors(module, tensors, kind, message):
    with pytest.raises(kind, match=message):
        adapter.load_v4(module, tensors, "c")
