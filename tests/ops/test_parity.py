"""Outputs and every gradient against the float64 oracle: the reference, the simulator, the GPU."""

import contextlib
import math

import mlx.core as mx
import numpy as np
import pytest
from cases import (
    AT_SCALE,
    CONVENTIONS,
    COVERING,
    DTYPES,
    DYNAMIC,
    EXACT,
    FUSED,
    GATED,
    MAX_VARIANTS,
    OF_LOGITS,
    OPS,
    OUTPUT_ULPS,
    PROJECTED,
    REFERENCE,
    SINGLE,
    STANDARD,
    ULP,
    UNUSUAL,
    Case,
)
from proof import check, errors, executor, oracle, results
from proof.compare import check_bounds, doubles, several

from mhc_mlx import PAPER, ops, reference
from mhc_mlx.conventions import SINKHORN

LISTS = (COVERING, DYNAMIC, SINGLE, GATED, UNUSUAL, STANDARD)
CASES = [case for cases in LISTS for case in cases]
# The smallest call of each op that has several tokens, streams and channels: pytest -m quick.
QUICK = [
    min(
        (c for c in CASES if c.op == op and min(c.tokens, c.n, c.C) > 1),
        key=lambda c: c.tokens * c.n * c.C,
    )
    for op in FUSED
]
MARKED = [pytest.param(c, marks=pytest.mark.quick if c in QUICK else ()) for c in CASES]
compiled: set = set()  # (rung, list of cases, variant)


def test_dynamic_covers():
    """Each op with every dtype, and over all ops each of what DYNAMIC lists."""
    names = (*PROJECTED, "stream_aggregate", "gate_mix")
    seen = {op: {c.dtype for c in DYNAMIC if c.op == op} for op in names}
    assert all(kinds == set(DTYPES) for kinds in seen.values()), seen
    assert {c.convention.name for c in DYNAMIC if c.convention} == {*CONVENTIONS, *EXACT}
    assert {c.n for c in DYNAMIC} == {1, 2, 3, 4, 5, 8, 12, 16, 17, 32, 33}
    assert {c.C for c in DYNAMIC} == {1, 8, 31, 64, 129, 264, 1026, 1280, 2000}
    assert {c.phi for c in DYNAMIC} == {c.weights for c in DYNAMIC} == set(DTYPES)
    assert {c.lead for c in DYNAMIC} >= {(), (0,), (2, 3), (5,), (70,)}
    assert {(c.offset, c.norm) for c in DYNAMIC} >= {(0, True), (1, True), (1, False)}


def test_unusual_covers():
    """Every op that has a constant, each of its constants unlike every preset's and default's."""
    constant = {op for op in FUSED if OPS[op].statics}
    assert {c.op for c in UNUSUAL} == constant - {c.op for c in STANDARD}
    odd = {c.convention for c in UNUSUAL if c.convention}
    for name in ("eps", "pre_eps", "post_scale", "post_eps"):
        usual = {getattr(c, name) for c in (CONVENTIONS | EXACT).values()}
        users = [c for c in odd if name != "eps" or c.start in SINKHORN]
        assert min(abs(getattr(c, name) - v) for c in users for v in usual) >= 0.01, name
    made = [c for c in UNUSUAL if c.op in OF_LOGITS]
    assert {c.norm_eps for c in made} == {0.25}
    assert {c.eps for c in UNUSUAL if c.op != "sinkhorn_knopp"} == {0.5}
    forms = {(c.start, c.first, c.transposed) for c in odd}
    assert forms >= {("exp", f, t) for f in ("rows", "columns") for t in (False, True)}
    assert forms >= {("softmax", "rows", t) for t in (False, True)}


@pytest.mark.parametrize("case", MARKED, ids=str)
def test_reference(case):
    given = [a for a in case.arrays() if a is not None]
    check(case, results(getattr(reference, case.op), case, given), REFERENCE)


X, Y, U = (3, 4, 8), (3, 8), (3, 8)
NO_X, NO_Y, NO_POST = np.zeros(X), np.zeros(Y), np.zeros((3, 4))
WITHOUT_KERNELS = {  # op: shapes of its arrays, what else it takes, the oracle and its gradients
    "rms_norm": ([U, (8,)], (0.5,), oracle.rms_norm, slice(2)),
    "gates": ([(4,), (4,)], (PAPER,), oracle.gates, slice(2)),
    "project": ([(3, 16)], (4, PAPER), oracle.project, slice(1)),
    "stream_mix": (
        *([X, (3, 4, 4)], ()),
        *(lambda x, h_res: oracle.stream_mix_add(x, NO_Y, NO_POST, h_res), slice(0, 4, 3)),
    ),
    "stream_distribute": (
        *([Y, (3, 4)], ()),
        *(lambda y, h_post: oracle.stream_mix_add(NO_X, y, h_post), slice(1, 3)),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("op", WITHOUT_KERNELS)
def test_ops_without_kernels(op):
    shapes, statics, in_float64, gradients = WITHOUT_KERNELS[op]
    given = [mx.random.normal(shape) for shape in shapes]
    out, backward = in_float64(*map(doubles, given), *statics)
    cotangents = [mx.random.normal(a.shape) for a in several(out)]
    got = mx.vjp(lambda *a: several(getattr(ops, op)(*a, *statics)), given, cotangents)
    back = backward(*map(doubles, cotangents))
    for a, b in zip(sum(got, []), [*several(out), *several(back)[gradients]], strict=True):
        assert np.abs(doubles(a) - b).max() <= 1e-5 * np.abs(b).max()


def test_every_op_is_quick():
    public = {k for k, f in vars(ops).items() if callable(f) and hasattr(reference, k)}
    assert {case.op for case in QUICK} | {*WITHOUT_KERNELS} == public


@pytest.mark.parametrize("rung", ["reference", "simulator"])
@pytest.mark.parametrize("scale, bound", AT_SCALE)
@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["PAPER", "ROW_FIRST", "DEEPSEEK_V4", "XING"])
def test_dynamic_gradients_at_scale(name, n, scale, bound, rung, need):
    """Of the logits of h_res, of x, phi, bias and alpha: within `bound` of the largest."""
    if rung != "reference":
        need(rung)
    made = {"convention": CONVENTIONS[name], "scale": scale}
    for case in (
        Case("sinkhorn_knopp", (5,), n, n, **made),
        Case("mhc_coefficients", (5,), n, 8, **made),
    ):
        given = case.arrays()
        with contextlib.nullcontext() if rung == "reference" else executor(rung):
            f = getattr(reference if rung == "reference" else ops, case.op)
            found = errors(case, results(f, case, given), REFERENCE)
        assert len(found) == 2 if case.op == "sinkhorn_knopp" else 7
        for name, got, want, *_ in found[-len(given) :]:
            ratio = np.abs(got - want).max() / (bound * np.abs(want).max())
            assert ratio <= 1, f"{case.op}, {name}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("rung", ["stand-in", "simulator", "gpu"])
@pytest.mark.parametrize("case", MARKED, ids=str)
def test_kernels(case, rung, need):
    need(rung)
    given = [a for a in case.arrays() if a is not None]
    with executor(rung) as launched:
        slack = REFERENCE if rung == "stand-in" else 1  # its sums are MLX's
        check(case, results(getattr(ops, case.op), case, given), slack)
    which = next(k for k, cases in enumerate(LISTS) if case in cases)
    compiled.update((rung, which, v) for v in launched)
    count = sum(v[:2] == (rung, which) for v in compiled)
    assert count <= MAX_VARIANTS[which], f"{count} compiled variants"


def test_a_rounding_in_between_is_caught():
    """y, or the sum over streams, rounded to bfloat16 before the last step of the reference: within
    8 units of the token's largest element, not within an element's own half unit."""
    case = Case("mhc_static", (5,), 4, 64, "bfloat16")
    x, pre, post, res, weight = arrays = case.arrays()
    y = reference.stream_aggregate_norm(x, pre, weight)
    mixed = reference.stream_mix(x, res).astype(mx.float32)
    exact_y = reference.stream_aggregate_norm(x.astype(mx.float32), pre, weight)
    written = reference.stream_distribute(exact_y, post)
    right = reference.mhc_static(*arrays)
    check_bounds(case, [right], REFERENCE)
    for wrong in (reference.stream_mix_add(x, y, post, res), (mixed + written).astype(x.dtype)):
        off = np.abs(doubles(wrong) - doubles(right)).max(axis=(1, 2))
        largest = np.abs(doubles(right)).max(axis=(1, 2))
        assert (off <= OUTPUT_ULPS * ULP["bfloat16"] * largest).all()
        with pytest.raises(AssertionError, match="times what float32 may add"):
            check_bounds(case, [wrong], REFERENCE)


@pytest.mark.parametrize("threads", [32, 96, 1024])
@pytest.mark.parametrize("op", ["stream_aggregate", *PROJECTED])
def test_threads_per_group_of_dynamic_ops(op, threads, need):
    need("simulator")
    case = Case(op, (9,), 4, 33, convention=CONVENTIONS["PAPER"] if op in PROJECTED else None)
    given = [a for a in case.arrays() if a is not None]
    with executor("simulator"):
        f = getattr(ops, op)
        check(case, results(lambda *a: f(*a, threads_per_group=threads), case, given))


@pytest.mark.parametrize("form", ["simulator", "simulator, CUDA"])
@pytest.mark.parametrize("C, threads", [(512, 32), (1000, 64), (1280, 96), (1280, 256)])
def test_tokens_that_simdgroups_share(C, threads, form, need):
    """Of mhc_pre with a norm: u is kept by one simdgroup, by several, or made twice; backward a
    threadgroup keeps x or reads it twice, in whole passes or not."""
    need(form)
    case = Case("mhc_pre", (19,), 4, C, "bfloat16", CONVENTIONS["PAPER"])
    given = [a for a in case.arrays() if a is not None]
    with executor(form) as launched:
        check(case, results(lambda *a: ops.mhc_pre(*a, threads_per_group=threads), case, given))
        x, *rest = given
        many = ops.mhc_pre(x, *rest, *case.statics)
        for few in (x[4:8], x[4:5]):  # a small tile, and swept
            for a, b in zip(many, ops.mhc_pre(few, *rest, *case.statics), strict=True):
                assert mx.array_equal(a[4 : 4 + len(few)], b)
    forms = [
        dict(t)
        for _, name, t, _ in launched
        if name in ("mhc_pre", "mhc_pre_backward_coefficients_norm")
    ]
    shared = {(t["U_SIMDGROUPS"] > 1, t["U_PACKS"] > 0) for t in forms if "U_SIMDGROUPS" in t}
    kept = {(t["THREADS"] > 32, t["PASSES"], t["CACHED"]) for t in forms if "CACHED" in t}
    metal = form == "simulator"
    assert kept == {(threads > 32, math.ceil(C / 8 / threads), C < 8 * threads or not metal)}
    if C == 1280 and metal:
        assert ((False, False) if threads == 96 else (True, True)) in shared, shared


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op, n, C", [("mhc_pre", 2, 31), ("mhc_pre", 4, 64), ("mhc_head", 4, 31)])
@pytest.mark.parametrize("norm", [False, True])
def test_products_backward_of_other_dtypes(op, n, C, dtype, norm, need, monkeypatch):
    """A Mac takes products of matrices backward without a norm. With one it could, with du' in
    float32, which is slower by the model."""
    need("simulator")
    if op == "mhc_head" and norm:
        op = "mhc_coefficients"
    case = Case(op, (19,), n, C, dtype, CONVENTIONS["PAPER"], norm=norm or op != "mhc_pre")
    with executor("simulator") as launched, monkeypatch.context() as patch:
        if norm:
            patch.setattr(ops.tiling, "use_matrix_gradient", lambda *_: True)
        got = results(getattr(ops, op), case, [a for a in case.arrays() if a is not None])
    check(case, got)
    (template,) = [dict(t) for _, name, t, _ in launched if name == "mhc_pre_backward_projection"]
    assert template["DU_T"] == (mx.float32 if norm and op == "mhc_pre" else DTYPES[dtype])


def test_bits_do_not_depend_on_the_size_of_a_tile(need):
    need("simulator")
    case = Case("mhc_pre", (9,), 3, 33, convention=CONVENTIONS["DEEPSEEK_V4"])
    x, *rest = case.arrays()
    with executor("simulator"):  # nine tokens are many there, and three are few
        many = ops.mhc_pre(x, *rest, *case.statics)
        few = ops.mhc_pre(x[4:7], *rest, *case.statics)
    assert all(mx.array_equal(a[4:7], b) for a, b in zip(many, few, strict=True))


def test_bits_of_stream_norm_do_not_depend_on_the_size_of_a_tile(need):
    need("simulator")
    case = Case("stream_norm", (9,), 4, 264, "bfloat16", per_token=(True, False))
    x, weight, y, h_post, inject = case.arrays()
    with executor("simulator") as launched:  # nine tokens take tiles of two, two tokens of one
        many = ops.stream_norm(x, weight, y, h_post, inject)
        few = ops.stream_norm(x[4:6], weight, y[4:6], h_post[4:6], inject)
    assert {dict(template)["TILE"] for _, _, template, _ in launched} == {1, 2}
    assert all(mx.array_equal(a[4:6], b) for a, b in zip(many, few, strict=True))


def test_a_part_of_alpha_that_overflows_alone(need):
    """The sum of one part is infinite, those of the others are not a number of it."""
    need("simulator")
    case = Case("mhc_coefficients", (5,), 4, 64, convention=PAPER)
    given = [a for a in case.arrays() if a is not None]
    with executor("simulator"):
        made = ops.mhc_coefficients(*given, PAPER)
        cotangents = [mx.random.normal(a.shape) for a in made]
        cotangents[1] = mx.full(made[1].shape, 3e38)
        *_, dalpha = mx.vjp(lambda *a: ops.mhc_coefficients(*a, PAPER), given, cotangents)[1]
    assert mx.isfinite(dalpha).tolist() == [True, False, True]
