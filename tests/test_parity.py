"""Outputs and every gradient against the float64 oracle: the reference, the simulator, the GPU."""

import contextlib
import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import oracle
import pytest
from bounded import Bounded, bounded, evaluate, rounding
from cases import (
    AT_SCALE,
    BOUNDS,
    CONVENTIONS,
    COVERING,
    DRAWS,
    DTYPES,
    DYNAMIC,
    EXACT,
    GRADIENT,
    HALF_GRADIENT_ULPS,
    MAX_VARIANTS,
    OUTPUT_ULPS,
    PROJECTED,
    REFERENCE,
    SEAMS,
    SIGMAS,
    SINGLE,
    ULP,
    UNUSUAL,
    Case,
)
from conftest import executor

from mhc_mlx import PAPER, ops, reference
from mhc_mlx.conventions import SINKHORN
from mhc_mlx.ops.dispatch import KERNELS

LISTS = (COVERING, DYNAMIC, SINGLE, UNUSUAL)
CASES = [case for cases in LISTS for case in cases]
compiled: set = set()  # (rung, list of cases, variant)


def doubles(a):
    """An array, or each of a tuple, in float64."""
    if isinstance(a, tuple):
        return tuple(map(doubles, a))
    return np.array(a.astype(mx.float32)).astype(np.float64)


def several(out) -> tuple:
    """The outputs of an op: without h_res where that is None."""
    return tuple(a for a in out if a is not None) if isinstance(out, tuple) else (out,)


def missing(out) -> list[int]:
    return [k for k, a in enumerate(out) if a is None] if isinstance(out, tuple) else []


def results(f, case, given):
    """Outputs and gradients of every array, evaluated; None exactly where the reference has it."""
    want = getattr(reference, case.op)(*case_arrays(case, given), *case.statics)

    def call(*arrays):
        out = f(*case_arrays(case, arrays), *case.statics)
        assert missing(out) == missing(want), f"None at {missing(out)}, not {missing(want)}"
        return several(out)

    cotangents = several(case.cotangent(case_output(case, given)))
    outputs, gradients = mx.vjp(call, given, cotangents)
    if case.op == "mhc_single_pass" and f is not reference.mhc_single_pass:  # without l
        outputs = f(*case_arrays(case, given), *case.statics, differentiable=False)
    mx.eval(outputs, gradients)
    return [*outputs, *gradients]


def case_arrays(case, given):
    arrays = list(given)
    for k in case.absent:
        arrays.insert(k, None)
    return arrays


def case_output(case, given):
    out = getattr(reference, case.op)(*case_arrays(case, given), *case.statics)
    return several(out) if isinstance(out, tuple) else out


def rounded(case):
    """The function that rounds float64 to the dtype of the streams."""
    return lambda a: doubles(mx.array(a.astype(np.float32)).astype(DTYPES[case.dtype]))


def exact(case, wide, cotangent, got=None) -> list[np.ndarray]:
    """Outputs and gradients by the oracle, of arrays in float64. What a seam reads is the streams
    as they were rounded: a tie that falls otherwise is no error of what follows."""
    f, options = getattr(oracle, case.op), {}
    if case.op in SEAMS and got is not None:
        options = {"out": doubles(got[0]), "rounded": rounded(case)}
    out, backward = f(*case_arrays(case, wide), *case.statics, **options)
    gradients = backward(cotangent)
    return [*several(out), *several(gradients)]


class Error(NamedTuple):
    """Of one array: what is compared, in float64, and how far apart it is."""

    name: str
    got: np.ndarray
    want: np.ndarray
    ulps: np.ndarray  # |got - want| in units in the last place of the largest value
    bound: float  # of ulps


def logit_ulps(case, wide, outs, chain) -> list[float]:
    """Per output, how far the rounding of float32 logits moves it: the root mean square, in ulps.

    With u = 2**-24, a sum s is rounded by u |s| / sqrt(3), rms, each time independently. Terms t of
    either sign add up as random walks: in chains of m additions the squares of all partial sums
    have the mean m/2 sum(t**2), so phi @ vec(x) is off by u sqrt(m/6 sum(t**2)). Partial sums of
    the m squares in the norm grow evenly to s: m/3 s**2, so s is off by u s sqrt(m) / 3, and its
    rsqrt by half of that. Products, scale, bias and x as it is read: once u each.
    The oracle carries the errors of the logits, drawn per token, to the outputs.
    """
    x, *y, phi, bias, alpha = wide[: 5 if case.op in SEAMS else 4]
    rest = wide[len(y) + 4 :]
    rng, u = np.random.default_rng(0), 2.0**-24
    v = x.reshape(*case.lead, case.n * case.C)
    r = 1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + case.norm_eps)
    parts = (case.n, case.n, len(phi) - 2 * case.n) if len(alpha) > 1 else (case.n,)
    scale = np.repeat(alpha, parts)
    made = scale * r * (v @ phi.T)
    random_walk = scale * r * np.sqrt(chain / 6 * (v * v) @ (phi * phi).T)
    spread = u * (np.hypot(random_walk, (np.sqrt(chain) / 6 + 1) * made) + np.abs(made + bias))
    squares = [0.0] * len(outs)
    for _ in range(DRAWS):
        moved = [x * (1 + u * rng.normal(size=x.shape)), *y, phi]
        moved += [bias + spread * rng.normal(size=spread.shape), alpha, *rest]
        of_moved = getattr(oracle, case.op)(*case_arrays(case, moved), *case.statics)[0]
        for k, (a, b) in enumerate(zip(several(of_moved), outs, strict=True)):
            squares[k] = squares[k] + (a - b) ** 2 / DRAWS
    axes = [tuple(range(len(case.lead), a.ndim)) for a in outs]
    largest = [np.abs(a).max(axis=k, keepdims=True) for a, k in zip(outs, axes, strict=True)]
    return [(np.sqrt(s) / w).max() for s, w in zip(squares, largest, strict=True)]


def errors(case, got, slack=1) -> list[Error]:
    """Of every output and every gradient, against the oracle."""
    given = [a for a in case.arrays() if a is not None]
    out = case_output(case, given)
    wide, outputs, found = [doubles(a) for a in given], several(out), []
    wants, logits = exact(case, wide, doubles(case.cotangent(out)), got), [0.0] * len(outputs)
    if (
        case.op in (*PROJECTED, "mhc_single_pass") and case.tokens
    ):  # MLX sums in one chain at worst, a kernel in 32 lanes
        chain = case.n * case.C if slack > 1 else case.n * case.C / 32 + 5
        logits = logit_ulps(case, wide, wants[: len(outputs)], chain)
    # a tie of round_aggregate that falls otherwise moves a gradient by what it rounds
    open_ties = [0.0] * len(wants)
    if case.rounded and case.dtype != "float32" and case.tokens:
        wide_wants = evaluated(case, got, slack == 1, True)
        open_ties = [w.e if Bounded.ties else 0.0 for w in wide_wants]
    for k, (g, w, like) in enumerate(zip(got, wants, [*outputs, *given], strict=True)):
        gradient = k - len(outputs)
        name = f"gradient of array {gradient}" if gradient >= 0 else f"output {k}"
        assert g.shape == like.shape and g.dtype == like.dtype, f"{name}: {g.shape} {g.dtype}"
        ulp = ULP[next(key for key, d in DTYPES.items() if d == g.dtype)]
        if gradient < 0:  # of the largest value of a token or matrix
            bound, axis = (
                OUTPUT_ULPS + SIGMAS * logits[k] / ulp,
                tuple(range(len(case.lead), g.ndim)),
            )
        else:
            bound, axis = slack * GRADIENT * np.sqrt(max(case.tokens, 1)) / ulp, None
            bound += HALF_GRADIENT_ULPS * (g.dtype != mx.float32)
        largest = np.abs(w).max(axis=axis, keepdims=True, initial=0)
        off = np.abs(doubles(g) - w) - (open_ties[k] if gradient >= 0 else 0.0)
        ulps = np.maximum(off, 0) / np.maximum(ulp * largest, 1e-30)
        found.append(Error(name, doubles(g), w, ulps, bound))
    return found


def roundings(case) -> dict:
    """The oracle's functions with the roundings between kernels, and the products of fewer bits,
    that ONBOARDING.md declares, of what has bounds."""
    plain, made, round_to = vars(oracle).copy(), {}, rounding(rounded(case))
    outs = 2 * case.n + (case.convention.res_size(case.n) if case.convention else 0)
    outs = case.n if case.op == "mhc_head" else outs
    multiplied = ops.geometry.multiplied(outs, DTYPES[case.dtype])

    def token_logits(x, phi, norm_eps):
        """mhc_projection_backward, on CUDA: dx's products are of two parts of bfloat16."""
        logits, back = plain["token_logits"](x, phi, norm_eps)
        v, size = bounded(x).v.reshape(*x.shape[:-2], -1), x.shape[-1] * x.shape[-2]
        r = 1 / np.sqrt((v * v).mean(-1, keepdims=True) + norm_eps)

        def backward(g):
            dx, dphi = back(g)
            products = np.abs(r * g.v) @ np.abs(bounded(phi).v)
            assert products.shape[-1] == size
            return Bounded(dx.v, dx.e + 2.0**-15 * products.reshape(x.shape)), dphi

        return logits, backward

    def stream_aggregate(x, h_pre):
        """mhc_token_backward writes du' of a norm in x's dtype."""
        u, back = plain["stream_aggregate"](x, h_pre)
        return u, lambda du: (back(round_to(du))[0], back(du)[1])

    def mhc_seam(*arrays):
        """The gradient of mhc_single_pass: the seam's dx is in x's dtype."""
        made, back = plain["mhc_seam"](*arrays)

        def backward(g):
            dx, *rest = back(g)
            return round_to(dx), *rest

        return made, backward

    if case.op in (*PROJECTED, "mhc_single_pass") and multiplied:
        made["token_logits"] = token_logits
        if case.op == "mhc_pre" and case.norm:
            made["stream_aggregate"] = stream_aggregate
    return made | ({"mhc_seam": mhc_seam} if case.op == "mhc_single_pass" else {})


def evaluated(case, got, kernels, gradients) -> list[Bounded]:
    """Outputs and gradients by the oracle, with bounds."""
    arrays, options = case.arrays(), {}
    outputs = several(case_output(case, [a for a in arrays if a is not None]))
    wide = [None if a is None else Bounded(doubles(a)) for a in arrays]
    if case.op in SEAMS:
        options = {"out": doubles(got[0]), "rounded": rounding(rounded(case))}
    with evaluate(32 if kernels else 1, **(roundings(case) if kernels else {})):
        out, backward = getattr(oracle, case.op)(*wide, *case.statics, **options)
        wants = list(several(out))
        if gradients:
            cotangent = doubles(case.cotangent(outputs if len(outputs) > 1 else outputs[0]))
            g = tuple(map(bounded, cotangent)) if len(outputs) > 1 else bounded(cotangent)
            wants += several(backward(g))
    return wants


def bounds(case, got, slack):
    """Of each output, and of kernels each gradient, of 16 bits: its name, got, want, and how far
    each element may be off: half a unit in its last place and BOUNDS times what float32 may make of
    its terms. A rounding in between that nobody declared is another half unit of what it rounds."""
    count = len(several(case_output(case, [a for a in case.arrays() if a is not None])))
    wants = evaluated(case, got, slack == 1, slack == 1)
    for k, (a, want) in enumerate(zip(got, wants, strict=False)):
        if a.dtype.size == 2 and a.size:
            digits, least = (7, -133) if a.dtype == mx.bfloat16 else (10, -24)
            largest = np.frexp(np.abs(want.v) + want.e)[1] - 1
            half = 2.0 ** (np.maximum(largest - digits, least) - 1)
            name = f"gradient of array {k - count}" if k >= count else f"output {k}"
            yield name, doubles(a), want.v, half, want.e


def check_bounds(case, got, slack=1):
    """Every element of 16 bits is within its own bound."""
    for name, value, want, half, off in bounds(case, got, slack):
        excess = (np.abs(value - want) - half) / np.maximum(off, 1e-30)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        message = f"{name}{list(map(int, worst))}: got {value[worst]}, want {want[worst]}"
        message += f", {excess[worst]:.1f} times what float32 may add to half a unit"
        assert excess.max() <= BOUNDS, f"{message}, {(excess > BOUNDS).mean():.1%} of the elements"


def check(case, got, slack=1):
    """The largest error and where, against the oracle and its bound, and every element of 16 bits
    against its own."""
    for name, value, want, ulps, bound in errors(case, got, slack):
        if value.size == 0:
            continue
        worst = np.unravel_index(np.argmax(ulps), ulps.shape)
        message = f"{name}{list(map(int, worst))}: got {value[worst]}, want {want[worst]}"
        assert np.isfinite(value).all(), f"{name} is not finite"
        assert ulps.max() <= bound, f"{message}, {ulps.max() / bound:.2f} of the bound"
    if case.tokens and any(a.dtype.size == 2 for a in got):
        check_bounds(case, got, slack)


def test_dynamic_covers():
    """Each op with every dtype, and over all ops each of what DYNAMIC lists."""
    seen = {op: {c.dtype for c in DYNAMIC if c.op == op} for op in (*PROJECTED, "stream_aggregate")}
    assert all(kinds == set(DTYPES) for kinds in seen.values()), seen
    names = {"PAPER", "ROW_FIRST", "ADDITIVE", "DEEPSEEK_V4", *EXACT}
    assert {c.convention.name for c in DYNAMIC if c.convention} == names
    assert {c.n for c in DYNAMIC} == {1, 2, 3, 4, 5, 8, 12, 16, 32}
    assert {c.C for c in DYNAMIC} == {1, 8, 31, 64, 129, 264, 1026, 1280}
    assert {c.phi for c in DYNAMIC} == {c.weights for c in DYNAMIC} == set(DTYPES)
    assert {c.lead for c in DYNAMIC} >= {(), (0,), (2, 3), (5,), (70,)}
    assert {(c.offset, c.norm) for c in DYNAMIC} >= {(0, True), (1, True), (1, False)}


def test_unusual_covers():
    """Every op that has a constant, each of its constants unlike every preset's and default's."""
    assert {c.op for c in UNUSUAL} == {*KERNELS} - {"stream_aggregate", "stream_mix_add"}
    odd = {c.convention for c in UNUSUAL if c.convention}
    for name in ("eps", "pre_eps", "post_scale", "post_eps"):
        usual = {getattr(c, name) for c in (CONVENTIONS | EXACT).values()}
        users = [c for c in odd if name != "eps" or c.start in SINKHORN]
        assert min(abs(getattr(c, name) - v) for c in users for v in usual) >= 0.01, name
    made = [c for c in UNUSUAL if c.op in (*PROJECTED, "mhc_single_pass")]
    assert {c.norm_eps for c in made} == {0.25}
    assert {c.eps for c in UNUSUAL if c.op != "sinkhorn_knopp"} == {0.5}
    forms = {(c.start, c.first, c.transposed) for c in odd}
    assert forms >= {("exp", f, t) for f in ("rows", "columns") for t in (False, True)}
    assert forms >= {("softmax", "rows", t) for t in (False, True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    given = [a for a in case.arrays() if a is not None]
    check(case, results(getattr(reference, case.op), case, given), REFERENCE)


@pytest.mark.parametrize("rung", ["reference", "simulator"])
@pytest.mark.parametrize("scale, bound", AT_SCALE)
@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["PAPER", "ROW_FIRST", "DEEPSEEK_V4"])
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
@pytest.mark.parametrize("case", CASES, ids=str)
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
    forms = [dict(t) for _, name, t, _ in launched if name in ("mhc_pre", "mhc_token_backward")]
    shared = {(t["TEAM"] > 1, t["HELD"] > 0) for t in forms if "TEAM" in t}
    kept = {(t["THREADS"] > 32, t["PASSES"], t["CACHED"]) for t in forms if "CACHED" in t}
    metal = form == "simulator"
    assert kept == {(threads > 32, math.ceil(C / 8 / threads), C < 8 * threads or not metal)}
    if C == 1280 and metal:
        assert ((False, False) if threads == 96 else (True, True)) in shared, shared


def test_bits_do_not_depend_on_the_size_of_a_tile(need):
    need("simulator")
    case = Case("mhc_pre", (9,), 3, 33, convention=CONVENTIONS["DEEPSEEK_V4"])
    x, *rest = case.arrays()
    with executor("simulator"):  # nine tokens are many there, and three are few
        many = ops.mhc_pre(x, *rest, *case.statics)
        few = ops.mhc_pre(x[4:7], *rest, *case.statics)
    assert all(mx.array_equal(a[4:7], b) for a, b in zip(many, few, strict=True))


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
