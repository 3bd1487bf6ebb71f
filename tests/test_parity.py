"""Outputs and every gradient against the float64 oracle: the reference, the simulator, the GPU."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from cases import (
    COVERING,
    DTYPES,
    GRADIENT,
    HALF_GRADIENT_ULPS,
    MAX_VARIANTS,
    OUTPUT_ULPS,
    REFERENCE,
    ULP,
)
from conftest import executor, variants

from mhc_mlx import ops, reference


def doubles(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def results(f, case, given):
    """Output and gradients of every array, evaluated."""
    outputs, gradients = mx.vjp(
        lambda *a: f(*case_arrays(case, a), *case.statics),
        given,
        [case.cotangent(case_output(case, given))],
    )
    mx.eval(outputs, gradients)
    return [outputs[0], *gradients]


def case_arrays(case, given):
    rest = iter(given)
    return [
        None if case.identity and k == 3 else next(rest) for k in range(len(given) + case.identity)
    ]


def case_output(case, given):
    return getattr(reference, case.op)(*case_arrays(case, given), *case.statics)


def check(case, got, slack=1):
    """The largest error and where, against the oracle and its bound."""
    given = [a for a in case.arrays() if a is not None]
    wide = [doubles(a) for a in given]
    out = case_output(case, given)
    want, backward = getattr(oracle, case.op)(*case_arrays(case, wide), *case.statics)
    gradients = backward(doubles(case.cotangent(out)))
    wants = [want, *(gradients if isinstance(gradients, tuple) else (gradients,))]
    for k, (g, w, like) in enumerate(zip(got, wants, [out, *given], strict=True)):
        name = "output" if k == 0 else f"gradient of array {k - 1}"
        assert g.shape == like.shape and g.dtype == like.dtype, f"{name}: {g.shape} {g.dtype}"
        if g.size == 0:
            continue
        ulp = ULP[next(key for key, d in DTYPES.items() if d == g.dtype)]
        if k == 0:  # of the largest value of a token or matrix
            bound = (
                OUTPUT_ULPS
                * ulp
                * np.abs(w).max(axis=(-1, -2) if w.ndim > 1 else None, keepdims=True)
            )
        else:
            bound = slack * GRADIENT * np.sqrt(max(case.tokens, 1)) * np.abs(w).max()
            bound += HALF_GRADIENT_ULPS * ulp * np.abs(w).max() * (g.dtype != mx.float32)
        ratio = np.abs(doubles(g) - w) / np.maximum(bound, 1e-30)
        worst = np.unravel_index(np.argmax(ratio), ratio.shape)
        message = f"{name}{list(map(int, worst))}: got {doubles(g)[worst]}, want {w[worst]}"
        assert np.isfinite(doubles(g)).all(), f"{name} is not finite"
        assert ratio.max() <= 1, f"{message}, {ratio.max():.2f} of the bound"


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_reference(case):
    given = [a for a in case.arrays() if a is not None]
    check(case, results(getattr(reference, case.op), case, given), REFERENCE)


@pytest.mark.parametrize("rung", ["simulator", "gpu"])
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_kernels(case, rung, need):
    need(rung)
    given = [a for a in case.arrays() if a is not None]
    with executor(rung):
        check(case, results(getattr(ops, case.op), case, given))
    count = sum(v[0] == rung for v in variants)
    assert count <= MAX_VARIANTS, f"{count} compiled variants"
