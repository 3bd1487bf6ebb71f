"""Outputs and every gradient against the float64 oracle: the reference, the simulator, the GPU."""

from typing import NamedTuple

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
from conftest import executor

from mhc_mlx import ops, reference

compiled: set = set()  # the variants of COVERING


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


def exact(case, wide, cotangent) -> list[np.ndarray]:
    """Output and gradients by the oracle, of arrays in float64."""
    out, backward = getattr(oracle, case.op)(*case_arrays(case, wide), *case.statics)
    gradients = backward(cotangent)
    return [out, *(gradients if isinstance(gradients, tuple) else (gradients,))]


class Error(NamedTuple):
    """Of one array: what is compared, in float64, and how far apart it is."""

    name: str
    got: np.ndarray
    want: np.ndarray
    ulps: np.ndarray  # |got - want| in units in the last place of the largest value
    bound: float  # of ulps


def errors(case, got, slack=1) -> list[Error]:
    """Of the output and every gradient, against the oracle."""
    given = [a for a in case.arrays() if a is not None]
    out = case_output(case, given)
    wants, found = exact(case, [doubles(a) for a in given], doubles(case.cotangent(out))), []
    for k, (g, w, like) in enumerate(zip(got, wants, [out, *given], strict=True)):
        name = "output" if k == 0 else f"gradient of array {k - 1}"
        assert g.shape == like.shape and g.dtype == like.dtype, f"{name}: {g.shape} {g.dtype}"
        ulp = ULP[next(key for key, d in DTYPES.items() if d == g.dtype)]
        if k == 0:  # of the largest value of a token or matrix
            bound, axis = OUTPUT_ULPS, -1 if case.op == "stream_aggregate_norm" else (-1, -2)
        else:
            bound, axis = slack * GRADIENT * np.sqrt(max(case.tokens, 1)) / ulp, None
            bound += HALF_GRADIENT_ULPS * (g.dtype != mx.float32)
        largest = np.abs(w).max(axis=axis, keepdims=True, initial=0)
        ulps = np.abs(doubles(g) - w) / np.maximum(ulp * largest, 1e-30)
        found.append(Error(name, doubles(g), w, ulps, bound))
    return found


def check(case, got, slack=1):
    """The largest error and where, against the oracle and its bound."""
    for name, value, want, ulps, bound in errors(case, got, slack):
        if value.size == 0:
            continue
        worst = np.unravel_index(np.argmax(ulps), ulps.shape)
        message = f"{name}{list(map(int, worst))}: got {value[worst]}, want {want[worst]}"
        assert np.isfinite(value).all(), f"{name} is not finite"
        assert ulps.max() <= bound, f"{message}, {ulps.max() / bound:.2f} of the bound"


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_reference(case):
    given = [a for a in case.arrays() if a is not None]
    check(case, results(getattr(reference, case.op), case, given), REFERENCE)


@pytest.mark.parametrize("rung", ["stand-in", "simulator", "gpu"])
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_kernels(case, rung, need):
    need(rung)
    given = [a for a in case.arrays() if a is not None]
    with executor(rung) as launched:
        slack = REFERENCE if rung == "stand-in" else 1  # its sums are MLX's
        check(case, results(getattr(ops, case.op), case, given), slack)
    compiled.update(launched)
    count = sum(v[0] == rung for v in compiled)
    assert count <= MAX_VARIANTS, f"{count} compiled variants"
