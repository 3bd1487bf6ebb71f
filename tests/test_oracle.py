"""The oracle against finite differences of itself, in float64, and against the plain definition."""

import ast
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import oracle
import pytest
from cases import CONVENTIONS, Case
from test_parity import case_arrays, doubles

from mhc_mlx import DEEPSEEK_V4

SOURCE = Path(oracle.__file__).read_text()
# A central difference is off by step**2 / 6 = 2e-11 times the third derivative, and by the rounding
# of the sum over the step, 1e-16 * 10 / 1e-5 = 1e-10. Measured: 1e-9 of the largest gradient, so
# the bound leaves a factor of 100. ABSOLUTE is for a gradient that is zero (n = 1).
STEP, RELATIVE, ABSOLUTE = 1e-5, 1e-7, 1e-9
VISIBLE = replace(  # every number of a convention large enough to matter
    DEEPSEEK_V4, name="VISIBLE", eps=0.1, pre_eps=0.2, post_scale=1.5, post_eps=0.3
)
EPS = 0.1  # of the norm, likewise


def cases() -> list[Case]:
    found = []
    for n in range(1, 6):
        for c in (*CONVENTIONS.values(), VISIBLE):
            for iters in (1, 3, 20):
                c = replace(c, iters=iters)
                found.append(Case("sinkhorn_knopp", (2,), n, n, convention=c))
                found.append(Case("mhc_layer", (2,), n, n % 3 + 2, convention=c, eps=EPS))
        for post in (False, True):
            for res in (False, True):
                found.append(Case("stream_mix_add", (2, 2), n, 3, per_token=(post, res)))
            found.append(Case("stream_mix_add", (3,), n, 2, per_token=(post, False), identity=True))
        found.append(Case("stream_aggregate_norm", (2, 2), n, 4, eps=EPS))
        found.append(Case("mhc_static", (3,), n, 4, eps=EPS))
        found.append(Case("mhc_static", (), n, 3, eps=EPS, identity=True))
    return found


def worst(case: Case, module: ModuleType = oracle) -> float:
    """The largest error of a gradient, in units of its bound, over every element of every array."""
    op = getattr(module, case.op)
    arrays = [doubles(a) for a in case.arrays() if a is not None]
    out, backward = op(*case_arrays(case, arrays), *case.statics)
    cotangent = np.random.default_rng(case.n).normal(size=out.shape)
    gradients = backward(cotangent)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    ratio = 0.0
    for a, gradient in zip(arrays, gradients, strict=True):
        assert a.shape == gradient.shape
        difference = np.empty_like(a)
        for index in np.ndindex(a.shape):
            value, ends = a[index], []
            for a[index] in (value + STEP, value - STEP):
                ends.append((op(*case_arrays(case, arrays), *case.statics)[0] * cotangent).sum())
            a[index], difference[index] = value, (ends[0] - ends[1]) / (2 * STEP)
        bound = RELATIVE * np.abs(difference).max() + ABSOLUTE
        ratio = max(ratio, np.abs(gradient - difference).max() / bound)
    return ratio


@pytest.mark.parametrize("case", cases(), ids=str)
def test_gradients_are_central_differences(case):
    assert worst(case) <= 1


@pytest.mark.parametrize(
    "op, term",
    [
        ("sinkhorn_knopp", "(g - (g * y).sum(axis=axis, keepdims=True)) / d"),
        ("sinkhorn_knopp", "y * (g - (g * y).sum(axis=axis, keepdims=True))"),
        ("sinkhorn_knopp", "y * g.sum(axis=axis, keepdims=True)"),
        ("sinkhorn_knopp", "g * y, False"),
        ("stream_aggregate_norm", "r**3 * u"),
        ("stream_aggregate_norm", "(dy * u * r)"),
        ("stream_aggregate_norm", "(x * du[..., None, :])"),
        ("stream_aggregate_norm", "h_pre[..., None] * du[..., None, :]"),
        ("stream_mix_add", "np.swapaxes(mix, -1, -2) @ g"),
        ("stream_mix_add", "(h_post[..., None] * g)"),
        ("stream_mix_add", "(g * y[..., None, :])"),
        ("stream_mix_add", "g @ np.swapaxes(x, -1, -2)"),
        ("mhc_static", "dx_read, dh_pre, dh_post"),
        ("mhc_layer", "dpre * pre * (1 - pre)"),
        ("mhc_layer", "dpost * c.post_scale * post * (1 - post)"),
        ("mhc_layer", "project_back(dres)"),
    ],
)
def test_a_planted_error_is_found(op, term):
    """One term of one gradient, larger by a ten-thousandth."""
    assert SOURCE.count(term) == 1
    wrong = ModuleType("wrong")
    exec(SOURCE.replace(term, f"1.0001 * {term}"), wrong.__dict__)
    assert any(worst(case, wrong) > 1 for case in cases() if case.op == op and case.n == 4)


def test_the_oracle_shares_nothing_with_the_package():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    modules = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules == {"numpy"}


@pytest.mark.parametrize("convention", [*CONVENTIONS.values(), VISIBLE], ids=lambda c: c.name)
def test_projection_is_its_definition(convention):
    """P = start(logits), then 2 * iters half-steps P / (P.sum + eps), none of them in logs."""
    c = replace(convention, iters=3)
    logits = np.random.default_rng(0).uniform(0.1, 1.1, (2, 3, 3))
    p = {"exp": np.exp(logits), "softmax": np.exp(logits), "additive": np.eye(3) + logits}[c.start]
    for k in range(6):
        axis = -1 if (c.first == "rows") == (k % 2 == 0) else -2
        softmax = c.start == "softmax" and k == 0  # whose eps comes after the division
        p = p / (p.sum(axis=axis, keepdims=True) + c.eps * (not softmax)) + c.eps * softmax
    h, _ = oracle.sinkhorn_knopp(logits, c)
    assert np.abs(h - (np.swapaxes(p, -1, -2) if c.transposed else p)).max() < 1e-14
