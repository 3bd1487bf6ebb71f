"""Where float32 is short of digits: saturated gates, matrices near a permutation as modules start
with, logits far apart, iterations long enough to bring up what was below all numbers.
"""

import contextlib
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from calls import Case
from cases import CONVENTIONS, COVERING, DYNAMIC, EXACT, GRADIENT, OUTPUT_ULPS, REFERENCE, SINGLE
from proof import executor, oracle
from proof.compare import case_arrays, check, doubles, results, several

from mhc_mlx import DEEPSEEK_V4, PAPER, ROW_FIRST, XING, Convention, ops, reference
from mhc_mlx.conventions import (
    ADDITIVE,
    EXPONENTIAL,
    IDENTITY,
    KRONECKER,
    MHC_LITE,
    SINKHORN,
    UNCONSTRAINED,
)
from mhc_mlx.layers import HyperConnection, MHCLayer, starting_logits

ULP = 2.0**-23
EXAMPLE = [[80.0, -60, -60], [60, -70, -60], [-30, -40, -50]]  # two rows need one column
TURNED = [replace(MHC_LITE, transposed=True), replace(UNCONSTRAINED, transposed=True)]


def running(rung: str):
    """The executor of kernels, or nothing for the reference."""
    return contextlib.nullcontext() if rung == "reference" else executor(rung)


def projection(rung: str, n: int, convention: Convention):
    """The op from R logits (Sinkhorn: n x n) to h_res."""
    if convention.start in SINKHORN:
        op = (reference if rung == "reference" else ops).sinkhorn_knopp
        return lambda a: op(a.reshape(*a.shape[:-1], n, n), convention)
    if rung == "reference":
        return lambda a: reference.project(a, n, convention)
    return lambda a: through_coefficients(a, n, convention)


def through_coefficients(logits: mx.array, n: int, convention: Convention) -> mx.array:
    """h_res of mhc_coefficients with alpha = 0, so that logits are the bias, a row at a time."""
    x, phi, alpha = mx.ones((1, n, 8)), mx.zeros((2 * n + logits.shape[-1], 8 * n)), mx.zeros(3)
    made = []
    for row in logits:
        bias = mx.concatenate([mx.zeros(2 * n), row])
        made.append(ops.mhc_coefficients(x, phi, bias, alpha, convention)[2][0])
    return mx.stack(made)


def wrong(rung: str, logits, n: int, convention: Convention, seed: int = 0):
    """Errors of h_res and, relative to the largest of a matrix, of the gradient; that largest."""
    rng = np.random.default_rng(seed)
    logits = mx.array(np.asarray(logits, np.float32).reshape(len(logits), -1))
    g = mx.array(rng.normal(size=(len(logits), n, n)).astype(np.float32))
    with running(rung):
        (h,), (d,) = mx.vjp(projection(rung, n, convention), [logits], [g])
        mx.eval(h, d)
    want, back = oracle.project(np.array(logits).astype(np.longdouble), n, convention)
    dwant = back(doubles(g).astype(np.longdouble)).reshape(d.shape)
    assert mx.isfinite(h).all() and mx.isfinite(d).all()
    largest = np.abs(dwant).max(axis=-1)
    off = np.abs(np.array(d) - dwant).max(axis=-1)
    return np.abs(np.array(h) - want).max(), off, largest, np.array(h), want


def at_start(n: int, convention: Convention) -> np.ndarray:
    """Logits as a module starts with, moved as training moves them, and permuted."""
    rng = np.random.default_rng(n)
    start = np.array(starting_logits(n, convention, 0)[2])
    rows = [start]
    for scale in (0.02, 0.3):
        rows.append(start + scale * rng.uniform(size=start.shape))
    if convention.start in EXPONENTIAL:
        rows += [a.reshape(n, n)[rng.permutation(n)].ravel() for a in rows]
    return np.stack(rows)


STARTS = [
    (c, n)
    for c in (PAPER, ROW_FIRST, DEEPSEEK_V4, XING, ADDITIVE, MHC_LITE, KRONECKER, *TURNED)
    for n in (2, 3, 4, 5, 8, 12, 16, 32, 64)
    if not (c.start == "permutations" and n > 5) and not (c.start == "kronecker" and n & (n - 1))
]
# templates that test_parity.py compiles as well; mhc_coefficients of MHC_LITE and KRONECKER
SIMULATED = [(PAPER, 4), (DEEPSEEK_V4, 4), (ROW_FIRST, 16), (MHC_LITE, 5), (KRONECKER, 8)]
SIMULATED += [(XING, 4)]


@pytest.mark.parametrize("rung", ["reference", "simulator", "gpu"])
def test_starts_of_modules(rung, need):
    """Near a permutation s (ds - sum(s ds)) and 1 - p keep their digits."""
    if rung != "reference":
        need(rung)
    for c, n in STARTS if rung == "reference" else SIMULATED:
        for iters in (1, 2, 20) if rung == "reference" and c.start in SINKHORN else (20,):
            convention = replace(c, iters=iters) if iters != c.iters else c
            logits = at_start(n, convention)
            off_h, off, largest, h, want = wrong(rung, logits, n, convention)
            at = f"{c.name}, n = {n}, iters = {iters}"
            assert off_h <= OUTPUT_ULPS * ULP, f"{at}: h_res is off by {off_h}"
            bound = (REFERENCE if rung == "reference" else 1) * GRADIENT * len(logits) ** 0.5
            ratio = (off / (bound * largest.max())).max()
            assert ratio <= 1, f"{at}: gradient, {ratio:.2f} of the bound"
            if c.start == "kronecker":  # by element, since none is a sum
                assert (np.abs(h - want) <= 4 * n.bit_length() * ULP * want).all(), at


@pytest.mark.parametrize("rung", ["reference", "simulator", "gpu"])
def test_ops_at_the_start_of_modules(rung, need):
    """mhc_coefficients and mhc_pre with the parameters that a HyperConnection starts with."""
    if rung != "reference":
        need(rung)
    rng = np.random.default_rng(0)
    for op, n, dtype, c in (
        ("mhc_coefficients", 4, "float32", DEEPSEEK_V4),
        ("mhc_coefficients", 5, "float32", MHC_LITE),
        ("mhc_pre", 4, "bfloat16", ROW_FIRST),
    ):
        mx.random.seed(n)
        case = Case(op, (5,), n, 8 if op == "mhc_coefficients" else 129, dtype, c)
        module = HyperConnection(case.C, n, convention=c)
        x, *_, weight = case.arrays()
        noise = mx.array(0.02 * rng.normal(size=module.bias.shape).astype(np.float32))
        given = [x, module.phi, module.bias + noise, module.alpha]
        given += [weight] if op == "mhc_pre" else []

        class Start(Case):
            def arrays(self, given=given):
                return given

        case = Start(**{k: getattr(case, k) for k in Case.__dataclass_fields__})
        with running(rung):
            f = getattr(reference if rung == "reference" else ops, op)
            check(case, results(f, case, given), REFERENCE if rung == "reference" else 1)


GATES = [-80.0, -30, -17, -10, -1, 0, 1, 10, 17, 25, 40, 80]


def gate_slopes(z: np.ndarray) -> np.ndarray:
    return oracle.sigmoid(z) * oracle.sigmoid(-z)


def test_saturated_gates_of_the_reference():
    """The derivative is sigmoid(z) sigmoid(-z) to its last digits, and so is that of mx.jvp."""
    z = np.array(GATES)
    c = replace(PAPER, post_scale=1.5)

    def f(pre, post):
        return reference.gates(pre, post, c)

    arrays, ones = [mx.array(z)] * 2, [mx.ones(len(z))] * 2
    for found in (mx.vjp(f, arrays, ones)[1], mx.jvp(f, arrays, ones)[1]):
        for got, scale in zip(found, (1, 1.5), strict=True):
            assert (np.abs(np.array(got) / (scale * gate_slopes(z)) - 1) < 1e-5).all(), got
    second = mx.grad(lambda a: mx.grad(lambda b: f(b, b)[0].sum())(a).sum())(arrays[0])
    want = gate_slopes(z) * (1 - 2 * oracle.sigmoid(z))
    assert (np.abs(np.array(second) - want) <= 1e-5 * np.abs(want) + 1e-8).all()


@pytest.mark.parametrize("rung", ["simulator", "gpu"])
def test_saturated_gates_of_kernels(rung, need):
    """In sum_partials, mhc_pre_backward_generic and mhc_pre_backward_coefficients, gate by gate."""
    need(rung)
    z = np.array([-17.0, 10, 17, 25], np.float32)
    layer = Case("mhc_layer", (2,), 4, 16, convention=replace(PAPER, iters=2))
    x, _, _, H_res, weight = layer.arrays()
    cases = [(layer, [x, mx.array(z), mx.array(z[::-1].copy()), H_res, weight], slice(1, 3))]
    for op, C, dtype in (("mhc_coefficients", 8, "float32"), ("mhc_pre", 129, "bfloat16")):
        case = Case(op, (5,), 4, C, dtype, ROW_FIRST)
        x, phi, _, _, *rest = case.arrays()
        bias = mx.concatenate([mx.array(z), mx.array(z[::-1].copy()), mx.zeros(16)])
        cases.append((case, [x, phi, bias, mx.full(3, 0.01), *rest], slice(2, 3)))
    for case, given, gates in cases:
        with executor(rung):
            found = results(getattr(ops, case.op), case, given)
        wide = [doubles(a) for a in given]
        out, back = getattr(oracle, case.op)(*case_arrays(case, wide), *case.statics)
        cotangent = doubles(case.cotangent(getattr(ops, case.op)(*given, *case.statics)))
        wants = back(cotangent)
        for got, want in zip(found[len(several(out)) :][gates], wants[gates], strict=True):
            got, want = doubles(got)[:8], want[:8]
            bound = 1e-3 if case.dtype == "bfloat16" else 3e-5  # of dh_pre, a sum over channels
            assert (np.abs(got / want - 1) <= bound).all(), (case.op, got, want)


@pytest.mark.parametrize("rung", ["reference", "stand-in", "simulator", "gpu"])
def test_softmax_without_eps(rung, need):
    """The map of the start exp, finite where a softmax has nothing but zeros in a column."""
    need(rung) if rung != "reference" else None
    c = replace(DEEPSEEK_V4, eps=0.0)
    logits = [[[0.0, -110], [0, -110]], [[0, -110], [-3, -115]], [[-300, 0], [0, 300]]]
    off_h, off, largest, h, _ = wrong(rung, logits, 2, c)
    assert np.abs(h[0] - 0.5).max() < 1e-7 and off_h < 2e-5
    assert (off <= 1e-4 * largest + 1e-7).all(), off / largest


def far_apart(rng, n: int, deviation: float, count: int) -> np.ndarray:
    """Logits in blocks, n - 1 rows that need one column, and plainly random ones, permuted."""
    made = []
    for k in range(count):
        a = deviation * rng.normal(size=(n, n))
        if k % 3 == 1:
            rows, columns = rng.integers(0, 2 + n // 3, (2, n))
            a = -deviation * rng.uniform(size=(n, n))[rows][:, columns] + rng.normal(size=(n, n))
        if k % 3 == 2:
            a = np.full((n, n), -float(deviation))
            a[:-1, 0] = a[-1, 1:] = 0
            a += rng.choice([0, 1, 10]) * rng.normal(size=(n, n))
        made.append(a[rng.permutation(n)][:, rng.permutation(n)])
    return np.stack(made)


def long_cases(rung: str):
    """Convention, n, deviations: the last of SIMULATED bring elements back from logits."""
    if rung == "simulator":  # (4, 300) and (16, 20) are templates of test_parity.py
        # 300: what comes to matter only after two returns
        cases = [(replace(ROW_FIRST, iters=300), 4, (100, 300)), (PAPER, 16, (30, 200))]
        # the last one returns, after a column whose elements all grow by 1 / eps
        return cases + [(XING, 4, (10, 60)), (FAR, 4, (60,)), (replace(FAR, iters=20), 16, (60,))]
    cases = [(replace(c, iters=i), n, (3, 100, 300)) for c, n, i in LONG]
    return cases + [(replace(ROW_FIRST, iters=1000), 3, (100, 300))]


# As far as float32 goes without a logarithm, at the ends of whose clamp logits are many.
FAR = replace(XING, name="FAR", clamp=(-50.0, 14.0), iters=100)
LONG = [(XING, 4, 20), (XING, 8, 20), (FAR, 4, 100), (FAR, 16, 20), (FAR, 33, 20)]
LONG += [(replace(FAR, eps=1e-25), 4, 60), (replace(FAR, eps=0.02), 5, 40)]
LONG += [(PAPER, 2, 300), (ROW_FIRST, 3, 100), (DEEPSEEK_V4, 4, 100), (ROW_FIRST, 5, 40)]
LONG += [(PAPER, 8, 20), (PAPER, 8, 100), (replace(DEEPSEEK_V4, eps=1e-25), 6, 60)]
LONG += [(ROW_FIRST, 16, 20), (DEEPSEEK_V4, 33, 20), (PAPER, 64, 20)]


@pytest.mark.parametrize("rung", ["reference", "simulator", "gpu"])
def test_many_iterations_of_logits_far_apart(rung, need):
    """Elements below all float32 that come to matter, and those that pass through there.

    A logit l is a float32 number to l / 2**24, by which h_res is off relatively at least; the
    gradient's bound is relative to its largest, or to an ulp of the cotangent where that is less.
    """
    if rung != "reference":
        need(rung)
    rng = np.random.default_rng(0)
    for c, n, deviations in long_cases(rung):
        for deviation in deviations:
            logits = far_apart(rng, n, deviation, 6 if n <= 16 else 3)
            off_h, off, largest, *_ = wrong(rung, logits, n, c)
            lost = np.abs(logits).max() / 2**24
            at = f"{c.name}, n = {n}, iters = {c.iters}, deviation {deviation}"
            assert off_h <= OUTPUT_ULPS * ULP + 2 * lost, f"{at}: h_res is off by {off_h}"
            bound = (2e-5 + 16 * lost) * largest + ULP * 4
            assert (off <= bound).all(), f"{at}: gradient, {(off / bound).max():.2f} of the bound"


@pytest.mark.parametrize("rung", ["reference", "stand-in", "simulator", "gpu"])
def test_two_rows_that_need_one_column(rung, need):
    need(rung) if rung != "reference" else None
    c = replace(ROW_FIRST, iters=300 if rung == "simulator" else 100)
    logits = np.full((1, 4, 4), -400.0) if rung == "simulator" else np.array([EXAMPLE])
    if rung == "simulator":  # beside a stream of its own: a template of test_parity.py
        logits[0, :3, :3], logits[0, 3, 3] = EXAMPLE, 0
    off_h, off, largest, h, want = wrong(rung, logits, logits.shape[-1], c)
    assert off_h <= 2e-5 and (off <= 1e-3 * largest).all()
    near = np.abs(h[0, :3, :3] - [[0.964, 0, 0], [0.036, 0, 0.963], [0, 1, 0.037]]).max() < 1e-3
    simulated = rung == "simulator"
    assert near or simulated and np.abs(want[0, 0, 0] - h[0, 0, 0]) < 2e-5 < want[0, 1, 2]


@pytest.mark.parametrize("rung", ["simulator", "gpu"])
def test_extreme_logits_through_coefficients(rung, need):
    """Of mhc_coefficients, mhc_pre and mixing matrices, where logits are alpha l + bias."""
    need(rung)
    rng = np.random.default_rng(0)
    for op, tokens, n, C, dtype, c in (
        ("mhc_coefficients", 5, 4, 8, "float32", PAPER),
        ("mhc_coefficients", 2, 4, 8, "float32", PAPER),  # mhc_seam makes them
        ("mhc_pre", 5, 4, 129, "bfloat16", ROW_FIRST),
        ("mhc_coefficients", 5, 4, 8, "float32", XING),
        ("mhc_coefficients", 1, 5, 8, "float32", MHC_LITE),
        ("mhc_coefficients", 1, 8, 8, "float32", KRONECKER),
        ("mhc_coefficients", 2, 4, 8, "float32", replace(PAPER, iters=60)),  # by several lanes
    ):
        case = Case(op, (tokens,), n, C, dtype, c)
        x, phi, bias, _, *weight = case.arrays()
        for k in range(3):
            if c.start in SINKHORN:
                res = far_apart(rng, n, 100, 3)[k].ravel()
            else:
                res = rng.choice([-300.0, -100, 0, 100, 300], size=c.res_size(n))
            bias = mx.array(np.concatenate([rng.normal(size=2 * n), res]).astype(np.float32))
            given = [x, phi, bias, mx.array([1.0, 1.0, 1e-3]), *weight]
            wide = [doubles(a) for a in given]
            with executor(rung):
                found = results(getattr(ops, op), case, given)
            outs, back = getattr(oracle, op)(*case_arrays(case, wide), *case.statics)
            assert all(np.isfinite(doubles(a)).all() for a in found), (op, c.name)
            got, want = doubles(found[2]), outs[2]
            assert np.abs(got - want).max() <= 1e-4, (op, c.name, np.abs(got - want).max())
            cotangent = doubles(case.cotangent(getattr(ops, op)(*given, *case.statics)))
            dbias, dwant = doubles(found[len(outs) + 2]), back(cotangent)[2]
            off = np.abs(dbias - dwant)[2 * n :].max()
            assert off <= 1e-3 * np.abs(dwant[2 * n :]).max() + 1e-6, (op, c.name, off)


@pytest.mark.parametrize("rung", ["reference", "stand-in", "simulator", "gpu"])
def test_logits_as_large_as_float32_holds(rung, need):
    """Also where their difference is more, and where a line across has such elements alone: as
    logits that are so far apart that the rest is 0."""
    if rung != "reference":
        need(rung)
    rng = np.random.default_rng(0)
    for c, n in ((PAPER, 4), (DEEPSEEK_V4, 4), (XING, 4), (ROW_FIRST, 16)):
        signs = rng.choice([-1.0, 1.0], size=(8, n, n))
        signs[0], signs[0, :, 0] = -1, 1
        signs[1], signs[1, 0] = -1, 1
        largest = mx.array((3e38 * signs).astype(np.float32).reshape(8, -1))
        g = mx.array(rng.normal(size=(8, n, n)).astype(np.float32))
        want, back = oracle.project(256 * signs.reshape(8, -1), n, c)
        dwant = np.array(back(doubles(g))).reshape(8, -1)
        with running(rung):
            (h,), (d,) = mx.vjp(projection(rung, n, c), [largest], [g])
            mx.eval(h, d)
            if c is PAPER and rung != "reference":  # the matrix in one lane
                close = np.abs(np.array(through_coefficients(largest[:2], n, c)) - want[:2])
                assert close.max() <= 1e-6, (c.name, "mhc_coefficients")
        assert np.abs(np.array(h) - want).max() <= 1e-5, (c.name, n)
        assert np.abs(np.array(d) - dwant).max() <= 1e-5 * np.abs(dwant).max(), (c.name, n)


NAN_CASES = [  # bodies that read x; each forward and backward: templates of test_parity.py
    ("stream_aggregate", (70,), True),
    ("stream_aggregate_norm", (5,), False),
    ("stream_mix_add", (2, 3), False),
    ("mhc_static", (2, 3), False),
    ("mhc_pre", (5,), False),
    ("mhc_coefficients", (2, 3), True),
    ("mhc_seam", (5,), False),
    ("gate_mix", (5,), False),
]


def test_nan_reaches_all_that_depends_on_it(need):
    """Of an element of x, in outputs and gradients where it does in the equations."""
    need("simulator")
    for op, lead, half in NAN_CASES:
        cases = [c for c in COVERING + DYNAMIC + SINGLE if (c.op, c.lead) == (op, lead) and c.n > 1]
        cases = [c for c in cases if half == (c.dtype == "bfloat16")]
        case = min(cases, key=lambda c: c.n * c.C)
        x, *rest = (a for a in case.arrays() if a is not None)
        at = x.size - 1 - x.size // 3
        x = mx.where(mx.arange(x.size).reshape(x.shape) == at, float("nan"), x).astype(x.dtype)
        with executor("simulator"):
            got = results(getattr(ops, op), case, [x, *rest])
        wide = case_arrays(case, [doubles(a) for a in (x, *rest)])
        out, back = getattr(oracle, op)(*wide, *case.statics)
        like = getattr(reference, op)(*case_arrays(case, [x, *rest]), *case.statics)
        cotangent = case.cotangent(tuple(several(like)) if isinstance(out, tuple) else like)
        wants = [*several(out), *several(back(doubles(cotangent)))]
        for k, (g, w) in enumerate(zip(got, wants, strict=True)):
            lost = np.isnan(w) & np.isfinite(doubles(g))
            message = f"{case}: {lost.sum()} of result {k}"
            assert np.isnan(wants[0]).any() and not lost.any(), message


def test_zero_tokens_of_every_projection():
    """Results and gradients of no tokens, in one or two axes."""
    presets = (PAPER, DEEPSEEK_V4, XING, ADDITIVE, MHC_LITE, KRONECKER, UNCONSTRAINED, IDENTITY)
    for c in (*presets, *TURNED):
        for lead in ((0,), (2, 0)):
            for module in (reference, ops):
                h = module.project(mx.zeros((*lead, c.res_size(4))), 4, c)
                assert h is None if c is IDENTITY else h.shape == (*lead, 4, 4)
            if c.res_size(4):
                logits = mx.zeros((*lead, c.res_size(4)))
                f = lambda a, c=c: ops.project(a, 4, c)  # noqa: E731
                _, (d,) = mx.vjp(f, [logits], [mx.zeros((*lead, 4, 4))])
                assert d.shape == logits.shape
            if c.sigmoid:
                outs = 8 + c.res_size(4)
                arrays = [mx.zeros((*lead, 4, 8)), mx.zeros((outs, 32)), mx.zeros(outs)]
                made = ops.mhc_coefficients(*arrays, mx.ones(3), c)
                made = [a for a in made if a is not None]
                f = lambda *a, c=c: [b for b in ops.mhc_coefficients(*a, c) if b is not None]  # noqa: E731
                zeros = [mx.zeros(a.shape) for a in made]
                grads = mx.vjp(f, [*arrays, mx.ones(3)], zeros)[1]
                assert [a.shape for a in grads] == [a.shape for a in [*arrays, mx.ones(3)]]
                assert all(a.sum().item() == 0 for a in grads)


@pytest.mark.parametrize("rung", ["stand-in", "simulator", "gpu"])
def test_transposed_projections(rung, need):
    """Of the starts without half-steps that can be transposed, forward and backward, in kernels."""
    need(rung)
    for c, n in ((TURNED[0], 3), (TURNED[1], 4)):
        case = Case("mhc_coefficients", (5,), n, 8, convention=c)
        given = case.arrays()
        check(case, results(reference.mhc_coefficients, case, given), REFERENCE)
        with executor(rung):
            check(case, results(ops.mhc_coefficients, case, given), REFERENCE)
        plain = ops.mhc_coefficients(*given, replace(c, transposed=False))[2]
        turned = ops.mhc_coefficients(*given, c)[2]
        assert mx.array_equal(turned, plain.swapaxes(-1, -2)) and not mx.array_equal(turned, plain)


INTEGERS = mx.zeros((1, 4), mx.int32)
BAD = [
    (lambda: Convention("X", start="kronecker", transposed=True), ValueError, "transposed must be"),
    (lambda: replace(IDENTITY, transposed=True), ValueError, "transposed must be False"),
    (lambda: replace(MHC_LITE, iters=3), ValueError, "iters must be 20 with start 'permutations'"),
    (lambda: replace(KRONECKER, eps=1e-6), ValueError, "eps must be 0.0 with start 'kronecker'"),
    (lambda: replace(IDENTITY, first="columns"), ValueError, "first must be 'rows'"),
    (lambda: replace(UNCONSTRAINED, eps=0.1), ValueError, "eps must be 0.0"),
    (lambda: replace(ADDITIVE, pre_eps=0.1), ValueError, "pre_eps must be 0.0 with sigmoid=False"),
    (lambda: replace(ADDITIVE, post_scale=1.0), ValueError, "post_scale must be 2.0"),
    (lambda: replace(ADDITIVE, post_eps=1.0), ValueError, "post_eps must be 0.0"),
    (lambda: replace(PAPER, eps=1e-39), ValueError, r"eps must be 0 or at least 2\*\*-100"),
    (lambda: replace(PAPER, pre_eps=1e39), ValueError, "pre_eps must be finite and at least 0"),
    (lambda: replace(PAPER, transposed=1), TypeError, "transposed must be a bool but got int"),
    (lambda: replace(PAPER, sigmoid=None), TypeError, "sigmoid must be a bool but got NoneType"),
    (lambda: replace(PAPER, name=3), TypeError, "name must be a str but got int"),
    (lambda: MHC_LITE.res_size(6), ValueError, r"\[res_size\] n must be at most 5"),
    (lambda: KRONECKER.res_size(3), ValueError, r"\[res_size\] n must be a power of two"),
    (lambda: PAPER.res_size(2.0), TypeError, r"\[res_size\] n must be an int but got float"),
    (lambda: PAPER.check_streams("op", 0), ValueError, r"\[op\] n must be at least 1 but got 0"),
    (lambda: HyperConnection(8, convention=MHC_LITE, sinkhorn_iters=3), ValueError, "half-steps"),
    (lambda: MHCLayer(4, 8, convention=IDENTITY, sinkhorn_iters=20), ValueError, "half-steps"),
    (lambda: ops.project(mx.zeros((1, 9)), 3, MHC_LITE), ValueError, r"shape \[\.\.\., R=6\]"),
    (lambda: ops.project(mx.zeros((1, 3, 3)), 3, PAPER), ValueError, r"shape \[\.\.\., R=9\]"),
    (lambda: ops.project(mx.zeros(()), 3, PAPER), ValueError, "logits must have shape"),
    (lambda: ops.project(None, 3, PAPER), TypeError, "logits must be an mx.array"),
    (lambda: ops.project(INTEGERS, 2, PAPER), TypeError, "logits must be float32"),
    (lambda: ops.project(mx.zeros((1, 9)), 3, "PAPER"), TypeError, "must be a Convention"),
    (lambda: ops.project(mx.zeros((1, 6)), 3, KRONECKER), ValueError, "n must be a power of two"),
    (lambda: ops.project(mx.zeros((1, 4225)), 65, PAPER), ValueError, "n must be at most 64"),
    (lambda: ops.gates(mx.zeros(4), mx.zeros(4), None), TypeError, "must be a Convention"),
    (lambda: ops.gates(mx.zeros(4), [0.0], PAPER), TypeError, r"\[gates\] H_post must be an mx.ar"),
    (lambda: ops.gates(INTEGERS, mx.zeros(4), PAPER), TypeError, "H_pre must be float"),
]


def test_bad_options_and_arguments():
    for k, (call, kind, message) in enumerate(BAD):
        with pytest.raises(kind, match=message):
            call()
            pytest.fail(f"BAD[{k}] is accepted")


def test_presets_are_conventions():
    for c in (*CONVENTIONS.values(), *EXACT.values()):
        assert replace(c) == c
