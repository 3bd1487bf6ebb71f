"""Random calls, by the simulator, against the oracle with the bounds of test_parity.

The calls are the same in every run; `pytest --examples N` makes N new ones of each op.
"""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from cases import CONVENTIONS, DTYPES, Case
from conftest import executor
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_parity import case_output, check, doubles, errors, exact, results

from mhc_mlx import ops

OPS = ("stream_mix_add", "stream_aggregate_norm", "mhc_static", "mhc_layer", "sinkhorn_knopp")
EXAMPLES = 12  # of each op; each compiles about two kernels, in a fifth of a second each
SENSITIVITY = 0.25  # of the bound: a kernel rounds several times on the way
flags = st.booleans()


@st.composite
def calls(draw, op: str) -> tuple[Case, int | None]:
    """A case, and threads_per_group. A failure shrinks to the first or least of each choice."""
    n = draw(st.integers(1, 8) | st.integers(1, 64))
    C = n if op == "sinkhorn_knopp" else draw(st.integers(1, 300))
    convention = None
    if op in ("mhc_layer", "sinkhorn_knopp"):
        convention = draw(st.sampled_from(list(CONVENTIONS.values())))
        convention = replace(convention, iters=draw(st.sampled_from([1, 2, 3, 20])))
        if n == 1:  # else the gradient is a power of eps, less than float32 resolves
            convention = replace(convention, eps=0.0)
    case = Case(
        op,
        tuple(draw(st.lists(st.integers(1, 4), max_size=2))),
        n,
        C,
        draw(st.sampled_from(list(DTYPES))),
        convention,
        eps=n / 2 if 1 in (n, C) else 1e-5,  # as u**2: what is left of the gradient of h_pre
        per_token=draw(st.tuples(flags, flags)) if op == "stream_mix_add" else (False, False),
        identity=op in ("stream_mix_add", "mhc_static") and draw(flags),
        offset=draw(st.integers(0, 9)),
        weights=draw(st.sampled_from(list(DTYPES))),
    )
    return case, draw(st.none() | st.integers(1, 32).map(lambda simdgroups: 32 * simdgroups))


def sensitivity(case: Case) -> float:
    """How far the oracle moves, in bounds of the tests, where each float32 input is rounded anew.

    A gradient of one element, or one of which the norm takes nearly all, may cancel to anything.
    """
    case, rng = replace(case, dtype="float32", weights="float32"), np.random.default_rng(0)
    arrays = [a for a in case.arrays() if a is not None]
    cotangent = doubles(case.cotangent(case_output(case, arrays)))
    most = 0.0
    for _ in range(3):
        wide = [doubles(a) * (1 + 2**-24 * rng.uniform(-1, 1, a.shape)) for a in arrays]
        moved = [mx.array(a.astype(np.float32)) for a in exact(case, wide, cotangent)]
        most = max(most, *(e.ulps.max() / e.bound for e in errors(case, moved)))
    return most


def compare(case: Case, threads: int | None) -> None:
    arrays = [a for a in case.arrays() if a is not None]
    with executor("simulator"):
        fused = partial(getattr(ops, case.op), threads_per_group=threads)
        check(case, results(fused, case, arrays))


# Found here: a threadgroup held one matrix and a half, and wrote the half over another's.
FOUND = [(Case("sinkhorn_knopp", (2,), 33, 33, convention=CONVENTIONS["PAPER"]), 96)]


@pytest.mark.parametrize("call", FOUND, ids=lambda call: f"{call[0]}-threads{call[1]}")
def test_calls_that_failed_once(call, need):
    need("simulator")
    compare(*call)


@pytest.mark.parametrize("op", OPS)
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
