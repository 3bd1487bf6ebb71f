"""The oracle against finite differences of itself, in float64, and against the plain definition."""

import ast
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from cases import CONVENTIONS, EXACT, PROJECTED, Case

from mhc_mlx import DEEPSEEK_V4, reference
from mhc_mlx.conventions import SINKHORN
from proof import oracle
from proof.compare import case_arrays, doubles, several

SOURCE = Path(oracle.__file__).read_text()
# A central difference is off by step**2 / 6 = 2e-11 times the third derivative, and by the rounding
# of the sum over the step, 1e-16 * 10 / 1e-5 = 1e-10. Measured: 1e-9 of the largest gradient, so
# the bound leaves a factor of 100. ABSOLUTE is for a gradient that is zero (n = 1).
STEP, RELATIVE, ABSOLUTE = 1e-5, 1e-7, 1e-9
VISIBLE = replace(  # every number of a convention large enough to matter
    DEEPSEEK_V4, name="VISIBLE", eps=0.1, pre_eps=0.2, post_scale=1.5, post_eps=0.3
)
PLAIN = replace(  # likewise; some logits are cut
    VISIBLE, name="PLAIN", start="exp_plain", first="columns", clamp=(-3.0, 1.5)
)
EPS = 0.1  # of the norm, likewise


def cases() -> list[Case]:
    found = []
    for n in range(1, 6):
        for c in (*CONVENTIONS.values(), VISIBLE, PLAIN):
            for iters in (1, 3, 20):
                c = replace(c, iters=iters)
                found.append(Case("sinkhorn_knopp", (2,), n, n, convention=c))
                found.append(Case("mhc_layer", (2,), n, n % 3 + 2, convention=c, eps=EPS))
        for post in (False, True):
            for res in (False, True):
                found.append(Case("stream_mix_add", (2, 2), n, 3, per_token=(post, res)))
                gated = {"write_back": post, "inject": res, "per_token": (n % 2 > 0, False)}
                found.append(Case("stream_norm", (2,), n, 3, eps=EPS, **gated))
                found.append(
                    Case("mhc_seam", (2,), n, 3, norm=post, eps=EPS, per_token=(post, res))
                )
            found.append(Case("stream_mix_add", (3,), n, 2, per_token=(post, False), identity=True))
            found.append(Case("mhc_seam", (2,), n, 3, norm=post, eps=EPS, identity=True))
        found.append(Case("stream_aggregate_norm", (2, 2), n, 4, eps=EPS))
        found.append(Case("mhc_static", (3,), n, 4, eps=EPS))
        found.append(Case("mhc_static", (), n, 3, eps=EPS, identity=True))
        for per_token in (False, True):
            found.append(Case("stream_aggregate", (2, 2), n, 3, per_token=(per_token, False)))
        found.append(Case("mhc_head", (2,), n, 3, convention=VISIBLE, norm_eps=EPS))
        turned = [replace(EXACT[k], transposed=True) for k in ("MHC_LITE", "UNCONSTRAINED")]
        for c in (*CONVENTIONS.values(), *EXACT.values(), *turned, VISIBLE, PLAIN):
            if c.start == "kronecker" and n & (n - 1):
                continue
            c = replace(c, iters=3) if c.start in SINKHORN else c
            if c.res_size(n):
                found.append(Case("project", (2,), n, n, convention=c))
            if c.start == "additive":  # its sums may be 0
                continue
            parts = 2 if c.name.startswith("HUNYUAN") else 3
            made = {"convention": c, "norm_eps": EPS, "eps": EPS, "parts": parts}
            found.append(Case("mhc_coefficients", (2,), n, 2, **made))
            found.append(Case("mhc_pre", (1, 2), n, 2, norm=n % 2 == 0, **made))
            found.append(Case("mhc_single_pass", (2,), n, 2, norm=n % 2 == 1, **made))
    return found


def worst(case: Case, module: ModuleType = oracle) -> float:
    """The largest error of a gradient, in units of its bound, over every element of every array."""
    op = getattr(module, case.op)
    arrays = [doubles(a) for a in case.arrays() if a is not None]
    out, backward = op(*case_arrays(case, arrays), *case.statics)
    rng = np.random.default_rng(case.n)
    cotangents = [rng.normal(size=a.shape) for a in several(out)]
    gradients = backward(cotangents if isinstance(out, tuple) else cotangents[0])

    def value_now() -> float:
        outputs = several(op(*case_arrays(case, arrays), *case.statics)[0])
        return sum((a * g).sum() for a, g in zip(outputs, cotangents, strict=True))

    ratio = 0.0
    for a, gradient in zip(arrays, several(gradients), strict=True):
        assert a.shape == gradient.shape
        difference = np.empty_like(a)
        for index in np.ndindex(a.shape):
            value, ends = a[index], []
            for a[index] in (value + STEP, value - STEP):
                ends.append(value_now())
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
        ("sinkhorn_knopp", "q * rest - y * others"),
        ("sinkhorn_knopp", "y * others"),
        ("sinkhorn_knopp", "y * total"),
        ("sinkhorn_knopp", "rest - y * others"),
        ("sinkhorn_knopp", "y * shift * left"),
        ("sinkhorn_knopp", "q * share if"),
        ("sinkhorn_knopp", "y * (g - shift)"),
        ("sinkhorn_knopp", "np.where(top, 0, q)"),
        ("sinkhorn_knopp", "(low < logits) * (logits < high)"),
        ("stream_aggregate_norm", "r**3 * u"),
        ("stream_aggregate_norm", "dy * unit"),
        ("stream_aggregate_norm", "(x * du[..., None, :])"),
        ("stream_aggregate_norm", "h_pre[..., None] * du[..., None, :]"),
        ("stream_aggregate", "(x * du[..., None, :])"),
        ("stream_aggregate", "h_pre[..., None] * du[..., None, :]"),
        ("project", "softmax_backward(p, dp)\n"),
        ("project", "softmax_backward(p, dp).reshape"),
        ("project", "(dp * p).sum(-1, keepdims=True)"),
        ("project", "g.reshape(logits.shape)\n    if"),
        ("project", "back(g).reshape(logits.shape)"),
        ("project", 'np.einsum("...ij,kij->...k"'),
        ("project", "np.delete(factors, k, 0)"),
        ("project", "(choice[k] == b)"),
        ("mhc_coefficients", "(g * logits)"),
        ("mhc_coefficients", "(g @ phi)"),
        ("mhc_coefficients", "r**3 * v * dr"),
        ("mhc_coefficients", "(r * g).reshape"),
        ("mhc_coefficients", "dpre * slope_pre"),
        ("mhc_coefficients", "dpost * c.post_scale * slope_post"),
        ("mhc_coefficients", "over_tokens(dz, 1), dalpha"),
        ("mhc_coefficients", "over_tokens(dz * logits, 1)"),
        ("mhc_coefficients", "scale * dz)"),
        ("mhc_pre", "dx_made + dx_read + dx_out"),
        ("mhc_pre", "dx_read + dx_out"),
        ("mhc_pre", "dx_out, *dmade"),
        ("mhc_pre", "r**3 * u"),
        ("mhc_pre", "dy * unit"),
        ("mhc_pre", "dh_pre, *dkept"),
        ("mhc_head", "dx_made + dx_read, dphi"),
        ("mhc_head", "dx_read, dphi"),
        ("mhc_head", "dh_pre, 0.0"),
        ("mhc_head", "alpha * dz"),
        ("mhc_head", "over_tokens(dz, 1), (dz"),
        ("mhc_head", "(dz * logits)"),
        ("stream_mix_add", "np.swapaxes(mix, -1, -2) @ g"),
        ("stream_mix_add", "(h_post[..., None] * g)"),
        ("stream_mix_add", "(g * y[..., None, :])"),
        ("stream_mix_add", "g @ np.swapaxes(x, -1, -2)"),
        ("mhc_seam", "dout + dread"),
        ("mhc_seam", "dread)\n"),
        ("mhc_seam", "dx, dy, dh_pre, dh_post, *dh_res"),
        ("mhc_seam", "dh_pre, dh_post, *dh_res, *dweight"),
        ("mhc_single_pass", "dx + dx_made, dy"),
        ("mhc_single_pass", "dx_made, dy"),
        ("mhc_single_pass", "dpre + dh_pre"),
        ("mhc_single_pass", "dpost, *dres"),
        ("stream_norm", "dout + dnormed"),
        ("stream_norm", "dnormed)\n"),
        ("stream_norm", "dweight, *dwritten"),
        ("stream_norm", "(dz @ inject)"),
        ("stream_norm", "dz.reshape(-1, n).T"),
        ("mhc_static", "dx_read, dh_pre, dh_post"),
        ("mhc_layer", "dpre * slope_pre"),
        ("mhc_layer", "dpost * c.post_scale * slope_post"),
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
    assert modules == {"numpy", "dataclasses"}


@pytest.mark.parametrize(
    "convention", [*CONVENTIONS.values(), VISIBLE, PLAIN], ids=lambda c: c.name
)
def test_projection_is_its_definition(convention):
    """P = start(logits), then 2 * iters half-steps P / (P.sum + eps), none of them in logs."""
    c = replace(convention, iters=3)
    logits = np.random.default_rng(0).uniform(0.1, 1.1, (2, 3, 3))
    logits *= 30 if c.name == "XING" else 1  # so that the clamp and eps show
    if c.start == "additive":
        p = np.eye(3) + logits
    else:
        cut = logits if c.clamp is None else np.clip(logits, *c.clamp)
        top = cut.max(axis=-1 if c.first == "rows" else -2, keepdims=True)
        p = np.exp(cut - top if c.start == "exp_plain" else cut)
    for k in range(6):
        axis = -1 if (c.first == "rows") == (k % 2 == 0) else -2
        softmax = c.start == "softmax" and k == 0  # whose eps comes after the division
        p = p / (p.sum(axis=axis, keepdims=True) + c.eps * (not softmax)) + c.eps * softmax
    h, _ = oracle.sinkhorn_knopp(logits, c)
    assert np.abs(h - (np.swapaxes(p, -1, -2) if c.transposed else p)).max() < 1e-14


def test_exact_projections_are_their_definitions():
    """By itertools and numpy.kron, token by token."""
    rng, n = np.random.default_rng(0), 4
    logits = rng.normal(size=(3, 24))
    h, _ = oracle.project(logits, n, EXACT["MHC_LITE"])
    for token, got in zip(logits, h, strict=True):
        want = np.zeros((n, n))
        for weight, order in zip(np.exp(token), itertools.permutations(range(n)), strict=True):
            for i, j in enumerate(order):
                want[i, j] += weight / np.exp(token).sum()
        assert np.abs(got - want).max() < 1e-15
    logits = rng.normal(size=(3, 6))
    h, _ = oracle.project(logits, 8, EXACT["KRONECKER"])
    for (a, b, c, d, e, f), got in zip(np.exp(logits), h, strict=True):
        pairs = [np.array([[p, q], [q, p]]) / (p + q) for p, q in ((a, b), (c, d), (e, f))]
        assert np.abs(got - np.kron(np.kron(*pairs[:2]), pairs[2])).max() < 1e-15
    logits = rng.normal(size=(3, 16))
    h, _ = oracle.project(logits, n, EXACT["UNCONSTRAINED"])
    assert (h[1, 2, 3], h[1, 3, 3]) == (logits[1, 11], 1 + logits[1, 15])
    assert oracle.project(np.zeros((3, 0)), n, EXACT["IDENTITY"])[0] is None


@pytest.mark.parametrize("op", PROJECTED)
def test_dynamic_ops_are_their_definitions(op):
    """Token by token, output by output, element by element."""
    convention = replace(VISIBLE, iters=2)
    case = Case(op, (2,), 3, 2, convention=convention, eps=EPS, norm_eps=EPS)
    x, phi, bias, alpha, *weight = (doubles(a) for a in case.arrays())
    outputs = several(getattr(oracle, op)(x, phi, bias, alpha, *weight, *case.statics)[0])
    for t in range(2):
        elements = [x[t, j, c] for j in range(3) for c in range(2)]
        norm = (sum(e * e for e in elements) / 6 + EPS) ** 0.5
        z = []
        for o, row in enumerate(phi):
            part = 0 if o < 3 else 1 if o < 6 else 2
            z.append(alpha[part] * sum(map(float.__mul__, row, elements)) / norm + bias[o])
        h_pre = [1 / (1 + np.exp(-a)) + 0.2 for a in z[:3]]
        h_post = [1.5 / (1 + np.exp(-a)) + 0.3 for a in z[3:6]]
        u = [sum(h_pre[j] * x[t, j, c] for j in range(3)) for c in range(2)]
        if op == "mhc_pre":
            root = (sum(a * a for a in u) / 2 + EPS) ** 0.5
            u = [a / root * w for a, w in zip(u, weight[0], strict=True)]
        wants = [u]
        if op != "mhc_head":
            h_res, _ = oracle.sinkhorn_knopp(np.array(z[6:]).reshape(3, 3), convention)
            first = h_pre if op == "mhc_coefficients" else u
            wants = [first, h_post, h_res, x[t]][: len(outputs)]
        for got, want in zip(outputs, wants, strict=True):
            assert np.abs(got[t] - want).max() < 1e-14


def test_long_rows_of_the_reference():
    """Of all same sign, which lose most: to a few roundings, however long."""
    x, phi = mx.random.uniform(0.5, 1, (1, 8, 20481)), mx.random.uniform(0.5, 1, (1, 8 * 20481))
    found = reference._logits(x, phi, 1e-6).item()
    v, row = (np.array(a).astype(np.float64).ravel() for a in (x, phi))
    want = v @ row / math.sqrt((v * v).mean() + 1e-6)
    assert abs(found - want) < 1e-6 * want
