"""Compute the outputs and all gradients of a call, and their errors against the float64 oracle."""

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
from mhc_mlx.devices import H100
from proof import oracle
from proof.bounded import Bounded, bounded, evaluate, rounding


def doubles(a):
    """Return an array, or each array of a tuple, in float64."""
    if isinstance(a, tuple):
        return tuple(map(doubles, a))
    return np.array(a.astype(mx.float32)).astype(np.float64)


def several(out) -> tuple:
    """Return the outputs of an op as a tuple, without those that are None."""
    return tuple(a for a in out if a is not None) if isinstance(out, tuple) else (out,)


def places_of_none(out) -> list[int]:
    return [k for k, a in enumerate(out) if a is None] if isinstance(out, tuple) else []


def results(f, case, given):
    """Return the outputs and the gradients of all arrays, evaluated.

    An output must be None exactly where that of the reference is.
    """
    want = getattr(reference, case.op)(*case_arrays(case, given), *case.statics)

    def call(*arrays):
        out = f(*case_arrays(case, arrays), *case.statics)
        none, expected = places_of_none(out), places_of_none(want)
        assert none == expected, f"None at {none}, not {expected}"
        return several(out)

    cotangents = several(case.cotangent(case_output(case, given)))
    outputs, gradients = mx.vjp(call, given, cotangents)
    # With differentiable=False mhc_single_pass does not save l, and may launch other kernels.
    if case.op == "mhc_single_pass" and f is not reference.mhc_single_pass:
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
    """Return the function that rounds float64 to the dtype of the streams."""
    return lambda a: doubles(mx.array(a.astype(np.float32)).astype(DTYPES[case.dtype]))


def exact(case, wide, cotangent, got=None) -> list[np.ndarray]:
    """Return the outputs and gradients by the oracle, for arrays in float64.

    The oracle of a seam reads the rounded streams of ``got``, and that of stream_norm also its
    rounded s: a tie that was rounded to the other side is then no error of u and of the gradients.
    """
    f, options = getattr(oracle, case.op), {}
    if case.op in SEAMS and got is not None:
        options = {"out": doubles(got[0]), "rounded": rounded(case)}
    if case.op == "stream_norm" and got is not None:
        options = {"out": doubles(got[0]), "s_read": doubles(got[1])}
    out, backward = f(*case_arrays(case, wide), *case.statics, **options)
    gradients = backward(cotangent)
    return [*several(out), *several(gradients)]


class Error(NamedTuple):
    """The error of one array: its name, what was computed, what is right, and their distance."""

    name: str
    got: np.ndarray
    want: np.ndarray
    ulps: np.ndarray  # |got - want| in units in the last place of the largest value
    bound: float  # of ulps


def logit_ulps(case, wide, outs, chain) -> list[float]:
    """Return by how much the rounding of float32 logits moves each output: the rms, in ulps.

    Let u = 2**-24. Each rounding of a sum s has the rms error u |s| / sqrt(3), independent of the
    others. The phi product adds terms t of either sign, so its partial sums are a random walk: in a
    chain of m additions their squares have the sum m/2 sum(t**2) in the mean, and the error is
    u sqrt(m/6 sum(t**2)). The norm adds m squares, so its partial sums grow evenly to s: their
    squares have the sum m/3 s**2, the error of s is u s sqrt(m) / 3, and that of its rsqrt is half
    as large. Products, scale, bias and the load of x add u each.
    Errors of the logits are drawn for each token, and the oracle carries them to the outputs.
    """
    x, *y, phi, bias, alpha = wide[: 5 if case.op in SEAMS else 4]
    rest = wide[len(y) + 4 :]
    rng, u = np.random.default_rng(0), 2.0**-24
    v = x.reshape(*case.lead, case.n * case.C)
    r = 1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + case.norm_eps)
    parts = (case.n, case.n, len(phi) - 2 * case.n) if len(alpha) > 1 else (case.n,)
    scale = np.repeat(alpha, parts[: len(alpha)])
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
    """Return the Error of every output and every gradient against the oracle."""
    given = [a for a in case.arrays() if a is not None]
    out = case_output(case, given)
    wide, outputs, found = [doubles(a) for a in given], several(out), []
    wants, logits = exact(case, wide, doubles(case.cotangent(out)), got), [0.0] * len(outputs)
    # MLX may sum in a single chain; a kernel shares a sum among 32 lanes.
    if case.op in OF_LOGITS and case.tokens:
        chain = case.n * case.C if slack > 1 else case.n * case.C / 32 + 5
        logits = logit_ulps(case, wide, wants[: len(outputs)], chain)
    # A tie of round_aggregate may be rounded to the other side; that moves a gradient.
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
    """Return functions for the oracle that also round between kernels, on arrays with bounds.

    docs/equations.md declares these roundings, and the products of fewer bits.
    """
    plain, made, round_to = vars(oracle).copy(), {}, rounding(rounded(case))
    outs = 2 * case.n + (case.convention.res_size(case.n) if case.convention else 0)
    outs = case.n if case.op == "mhc_head" else outs
    multiplied = ops.tiling.use_matrix_gradient(outs, DTYPES[case.dtype], case.norm, H100)

    def token_logits(x, phi, norm_eps):
        """On CUDA mhc_pre_backward_projection splits dp and phi in two bfloat16 parts for dx."""
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
        """With a norm mhc_pre_backward_coefficients writes du' in x's dtype."""
        u, back = plain["stream_aggregate"](x, h_pre)
        return u, lambda du: (back(round_to(du))[0], back(du)[1])

    def mhc_seam(*arrays):
        """In the gradient of mhc_single_pass the dx of the seam is rounded to x's dtype."""
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
    """Return the outputs and gradients by the oracle, with bounds."""
    arrays, options = case.arrays(), {}
    outputs = several(case_output(case, [a for a in arrays if a is not None]))
    wide = [None if a is None else Bounded(doubles(a)) for a in arrays]
    if case.op in SEAMS:
        options = {"out": doubles(got[0]), "rounded": rounding(rounded(case))}
    if case.op == "stream_norm":
        options = {"out": doubles(got[0]), "s_read": doubles(got[1])}
    with evaluate(32 if kernels else 1, **(roundings(case) if kernels else {})):
        out, backward = getattr(oracle, case.op)(*wide, *case.statics, **options)
        wants = list(several(out))
        if gradients:
            cotangent = doubles(case.cotangent(outputs if len(outputs) > 1 else outputs[0]))
            g = tuple(map(bounded, cotangent)) if len(outputs) > 1 else bounded(cotangent)
            wants += several(backward(g))
    return wants


def bounds(case, got, slack):
    """Yield the bounds of each 16-bit output and, for kernels, of each 16-bit gradient.

    A tuple has the name, got, want, half a unit in the last place of each element, and the bound e
    of the error of float32 on its terms: an element may be off by the half unit and BOUNDS * e. A
    rounding that `roundings` does not declare adds half a unit of what it rounds, and so fails.
    """
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
    """Assert that every element of 16 bits is within its own bound."""
    for name, value, want, half, off in bounds(case, got, slack):
        excess = (np.abs(value - want) - half) / np.maximum(off, 1e-30)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        message = f"{name}{list(map(int, worst))}: got {value[worst]}, want {want[worst]}"
        message += f", {excess[worst]:.1f} times what float32 may add to half a unit"
        assert excess.max() <= BOUNDS, f"{message}, {(excess > BOUNDS).mean():.1%} of the elements"


def check(case, got, slack=1):
    """Assert that the largest error of each array, and every 16-bit element, is within its bound.

    The message says where the largest error is.
    """
    for name, value, want, ulps, bound in errors(case, got, slack):
        if value.size == 0:
            continue
        worst = np.unravel_index(np.argmax(ulps), ulps.shape)
        message = f"{name}{list(map(int, worst))}: got {value[worst]}, want {want[worst]}"
        assert np.isfinite(value).all(), f"{name} is not finite"
        assert ulps.max() <= bound, f"{message}, {ulps.max() / bound:.2f} of the bound"
    if case.tokens and any(a.dtype.size == 2 for a in got):
        check_bounds(case, got, slack)
