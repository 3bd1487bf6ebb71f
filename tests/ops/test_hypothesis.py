"""Random calls, by the reference and the simulator, against the oracle with test_parity's bounds.

The calls are the same in every run; `pytest --examples N` makes N new ones of each op.
"""

from functools import partial

import numpy as np
import pytest
from calls import LAYOUTS
from cases import DRAWS, DTYPES, FUSED, GRADIENT, OF_LOGITS, OPS, OUTPUT_ULPS, REFERENCE, ULP, Case
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from proof import executor
from proof.compare import case_output, check, doubles, exact, results

from mhc_mlx import PAPER, Convention, ops, reference
from mhc_mlx.conventions import AXES, EXPONENTIAL, SINKHORN, STARTS

EXAMPLES = 12  # of each op; each compiles two to five kernels, in a fifth of a second each
SENSITIVITY = 0.15  # of the bound: a kernel rounds several times on the way
PHI = 100_000  # elements at most, unless C is 1
FORMS = ("simulator", "simulator, CUDA")
flags = st.booleans()
LAID_OUT = st.tuples(st.sampled_from(LAYOUTS), st.integers(0, 9))  # of an array


MOST_STREAMS = {"permutations": 5, "identity": 64}


def streams(op: str, start: str | None) -> st.SearchStrategy[int]:
    """Every n that the projection exists for.

    At most 16 where a token makes n * n logits: the gradient of alpha adds up what all of them give
    it, on a CPU in one chain.
    """
    if start == "kronecker":
        return st.integers(0, 6).map(lambda bits: 2**bits)
    most = MOST_STREAMS.get(start, 16 if op in OF_LOGITS else 64)
    return st.integers(1, min(8, most)) | st.integers(1, most)


def between(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_subnormal=False)


@st.composite
def conventions(draw, op: str, start: str, n: int) -> Convention:
    """Every field that the start and the gates use."""
    half_steps = {}
    if start in ("permutations", "unconstrained"):
        half_steps["transposed"] = draw(flags)
    if start in SINKHORN:
        half_steps["first"] = "rows" if start == "softmax" else draw(st.sampled_from(AXES))
        # up to more half-steps than a body stores; many take long to simulate
        half_steps["iters"] = draw(st.sampled_from([1, 2, 20]) | st.integers(1, 40))
        half_steps["transposed"] = draw(flags)
        # n == 1: else the gradient is a power of eps, less than float32 resolves
        half_steps["eps"] = draw(st.just(0.0) | between(1e-8, 0.2)) if n > 1 else 0.0
    if start in EXPONENTIAL:
        clamps = st.tuples(between(-30.0, -0.5), between(0.5, 30.0))
        half_steps["clamp"] = draw(clamps if start == "exp_plain" else st.none() | clamps)
    gates, sigmoid = {}, op in OF_LOGITS or draw(flags)
    if sigmoid:
        gates = {name: draw(st.just(0.0) | between(1e-6, 0.5)) for name in ("pre_eps", "post_eps")}
        gates["post_scale"] = draw(st.sampled_from([2.0, 1.0]) | between(0.1, 4.0))
    return Convention("DRAWN", start, sigmoid=sigmoid, **half_steps, **gates)


@st.composite
def calls(draw, op: str) -> tuple[Case, int | None, str]:
    """A case, threads_per_group and the form of the kernels. A failure shrinks to the first or
    least of each choice."""
    row, start, convention, most = OPS[op], None, None, 300
    if op in OF_LOGITS:
        start = draw(st.sampled_from(STARTS))
    elif "convention" in row.statics:
        start = draw(st.sampled_from(SINKHORN))
    n = draw(streams(op, start))
    if start:
        convention = draw(conventions(op, start, n))
    if op in OF_LOGITS:
        outs = n if op == "mhc_head" else 2 * n + convention.res_size(n)
        most = min(most, max(1, PHI // (outs * n)))
    C = draw(st.integers(1, most)) if row.rows else n
    per_token = [flags if says else st.just(False) for says in row.per_token]
    shown = between(0.01, 1.0)  # of eps
    case = Case(
        op,
        tuple(draw(st.lists(st.integers(1, 4), max_size=2))),
        n,
        C,
        draw(st.sampled_from(list(DTYPES))),
        convention,
        # as u**2, where C or n is 1: what is left of the gradient of h_pre
        eps=n / 2 if 1 in (n, C) else draw(st.just(1e-5) | shown),
        per_token=draw(st.tuples(*per_token)),
        identity="h_res" in row.optional and draw(flags),
        weights=draw(st.sampled_from(list(DTYPES))),
        # I + l of sums that are no quotient of what cancels
        scale=0.1 if op in OF_LOGITS and start == "additive" else 2.0,
        phi=draw(st.sampled_from(list(DTYPES))) if op in OF_LOGITS else "float32",
        norm="weight" not in row.optional or draw(flags),
        rounded="rounded" in row.statics and draw(flags),
        # else logits keep only the sign of x
        norm_eps=0.5 if n * C == 1 else draw(st.just(1e-6) | shown),
        layouts=tuple(draw(st.lists(LAID_OUT, min_size=1, max_size=7))),
    )
    form = draw(st.sampled_from(FORMS)) if op in OF_LOGITS else FORMS[0]
    return case, draw(st.none() | st.integers(1, 32).map(lambda simdgroups: 32 * simdgroups)), form


def sensitivity(case: Case) -> float:
    """How far the oracle moves, in float32's bounds, where each input is rounded to float32 anew.

    A gradient of one element, one of which the norm takes nearly all, or alpha's, a sum over tokens
    and outputs, may cancel to anything.
    """
    arrays, rng = [a for a in case.arrays() if a is not None], np.random.default_rng(0)
    wide = [doubles(a) for a in arrays]
    cotangent = doubles(case.cotangent(case_output(case, arrays)))
    want, most = exact(case, wide, cotangent), 0.0
    for _ in range(DRAWS):
        anew = [a * (1 + 2**-24 * rng.uniform(-1, 1, a.shape)) for a in wide]
        for k, (a, w) in enumerate(zip(exact(case, anew, cotangent), want, strict=True)):
            bound, axis = GRADIENT * np.sqrt(case.tokens), None
            if k < len(want) - len(arrays):
                bound, axis = OUTPUT_ULPS * ULP["float32"], tuple(range(len(case.lead), a.ndim))
            largest = bound * np.abs(w).max(axis=axis, keepdims=True)
            most = max(most, (np.abs(a - w) / np.maximum(largest, 1e-30)).max())
    return most


def compare(case: Case, threads: int | None, form: str = FORMS[0]) -> None:
    arrays = [a for a in case.arrays() if a is not None]
    check(case, results(getattr(reference, case.op), case, arrays), REFERENCE)
    with executor(form):
        fused = partial(getattr(ops, case.op), threads_per_group=threads)
        check(case, results(fused, case, arrays))


# Found here: a threadgroup held one matrix and a half, and wrote the half over another's; more
# threads took more tokens than threadgroup memory holds. The last makes the most outputs.
FOUND = [
    (Case("sinkhorn_knopp", (2,), 33, 33, convention=PAPER), 96),
    (Case("mhc_coefficients", (2,), 4, 8, convention=PAPER), 992),
    (Case("mhc_coefficients", (), 53, 1, convention=PAPER), 416),
    (Case("mhc_pre", (2,), 64, 3, convention=PAPER), None),
]


@pytest.mark.parametrize("call", FOUND, ids=lambda call: f"{call[0]}-threads{call[1]}")
def test_calls_that_failed_once(call, need):
    need("simulator")
    compare(*call)


@pytest.mark.parametrize("op", FUSED)
def test_any_call(op, request, need):
    need("simulator")
    examples = request.config.getoption("--examples")

    @settings(
        max_examples=examples or EXAMPLES,
        derandomize=examples is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
    @given(calls(op))
    def run(call):
        assume(sensitivity(call[0]) < SENSITIVITY)
        compare(*call)

    run()
