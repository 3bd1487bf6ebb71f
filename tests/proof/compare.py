"""Outputs and every gradient of a call, and how far they are from the float64 oracle."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from cases import (
    BOUNDS,
    DRAWS,
    DTYPES,
    GRADIENT,
    HALF_GRADIENT_ULPS,
    OF_LOGITS,
    OUTPUT_ULPS,
    SEAMS,
    SIGMAS,
    ULP,
)

from mhc_mlx import ops, reference
from proof import oracle
from proof.bounded import Bounded, bounded, evaluate, rounding


def doubles(a):
    """An array, or each of a tuple, in float64."""
    if isinstance(a, tuple):
        return tuple(map(doubles, a))
    return np.array(a.astype(mx.float32)).astype(np.float64)


def several(out) -> tuple:
    """The outputs of an op: without h_res where that is None."""
    return tuple(a for a in out if a is not None) if isinstance(out, tuple) else (out,)


def places_of_none(out) -> list[int]:
    return [k for k, a in enumerate(out) if a is None] if isinstance(out, tuple) else []


def results(f, case, given):
    """Outputs and gradients of every array, evaluated; None exactly where the reference has it."""
    want = getattr(reference, case.op)(*case_arrays(case, given), *case.statics)

    def call(*arrays):
        out = f(*case_arrays(case, arrays), *case.statics)
        none, expected = places_of_none(out), places_of_none(want)
        assert none == expected, f"None at {none}, not {expected}"
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
    if case.op in OF_LOGITS and case.tokens:  # MLX sums in one chain at worst, a kernel in 32 lanes
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
    multiplied = ops.tiling.use_matrix_gradient(outs, DTYPES[case.dtype])

    def token_logits(x, phi, norm_eps):
        """mhc_pre_backward_projection, on CUDA: dx's products are of two parts of bfloat16."""
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
        """mhc_pre_backward_coefficients writes du' of a norm in x's dtype."""
        u, back = plain["stream_aggregate"](x, h_pre)
        return u, lambda du: (back(round_to(du))[0], back(du)[1])

    def mhc_seam(*arrays):
        """The gradient of mhc_single_pass: the seam's dx is in x's dtype."""
        made, back = plain["mhc_seam"](*arrays)

        def backward(g):
            dx, *rest = back(g)
            return round_to(dx), *rest

        return made, backward

    if case.op in OF_LOGITS and multiplied:
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
