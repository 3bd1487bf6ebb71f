"""gate_mix where gates are shut or wide open, and by parts of a token."""

import contextlib
import functools

import mlx.core as mx
import numpy as np
import pytest
from cases import REFERENCE, ULP, Case
from proof import executor, oracle
from proof.compare import doubles, results

from mhc_mlx import ops, reference

RUNGS = ("reference", "simulator", "simulator, CUDA", "gpu")
# A float32 exp has no more digits below -87.3; that of -104 is 0.
LOGITS = (0.0, 1.0, 8.0, 17.0, 30.0, 60.0, 80.0)
BEYOND = (1e4, 3e38)


def gradients(rung: str, logits: mx.array, s: mx.array, du: mx.array) -> list[mx.array]:
    """u, and the gradients of the logits and of s."""
    op = reference.gate_mix if rung == "reference" else ops.gate_mix
    with contextlib.nullcontext() if rung == "reference" else executor(rung):
        (u,), found = mx.vjp(op, [logits, s], [du])
        mx.eval(u, *found)
    return [u, *found]


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saturated_gates_keep_their_digits(rung, dtype, need):
    """Each gate and slope by itself, one stream a token, to a few units in its own last place."""
    if rung != "reference":
        need(rung)
    rng, kind = np.random.default_rng(0), getattr(mx, dtype)
    row = np.array([sign * v for v in LOGITS for sign in (1, -1)])
    logits = mx.array(np.tile(row, (3, 1, 1)).astype(np.float32)).astype(kind)
    s, du = (mx.array(rng.uniform(0.5, 2, logits.shape)).astype(kind) for _ in range(2))
    got = gradients(rung, logits, s, du[:, 0])
    want, back = oracle.gate_mix(doubles(logits), doubles(s))
    most = 8 * ULP[dtype] * (REFERENCE if rung == "reference" else 1)  # MLX's exp on a CPU
    for name, g, w in zip(("u", "dl", "ds"), got, (want, *back(doubles(du[:, 0]))), strict=True):
        off = np.abs(doubles(g) / w - 1).max()
        assert off <= most, f"{name} is off by {off:.1e} of itself"


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", BEYOND)
def test_gates_beyond_all_digits(rung, dtype, size, need):
    """Such a gate is 0 or 1, and its logit has no gradient."""
    if rung != "reference":
        need(rung)
    kind = getattr(mx, dtype)
    logits = mx.broadcast_to(mx.array([size, -size])[:, None], (5, 2, 24)).astype(kind)
    s, du = mx.full((5, 2, 24), 3.0, kind), mx.full((5, 24), 0.5, kind)
    u, dlogits, ds = gradients(rung, logits, s, du)
    assert (u == 1.5).all() and (dlogits == 0).all()
    assert (ds[:, 0] == 0.25).all() and (ds[:, 1] == 0).all()


@pytest.mark.parametrize("form", ["simulator", "simulator, CUDA"])
@pytest.mark.parametrize("n, C, dtype", [(4, 2560, "bfloat16"), (3, 129, "float32")])
def test_parts_and_neighbours_change_no_bit(form, n, C, dtype, need):
    """However many threads take a token, and whichever tokens stand beside it."""
    need(form)
    given = Case("gate_mix", (5,), n, C, dtype).arrays()

    def bits(threads, begin, end):
        case, f = Case("gate_mix", (5,), n, C, dtype), ops.gate_mix
        f = functools.partial(f, threads_per_group=threads)
        du = case.cotangent(reference.gate_mix(*given))
        with executor(form):
            u, d = mx.vjp(f, [a[begin:end] for a in given], [du[begin:end]])
            mx.eval(u, d)
        return [np.array(a.astype(mx.float32)) for a in (*u, *d)]

    whole = bits(None, 0, 5)
    for threads in (32, 96, 1024):
        for a, b in zip(bits(threads, 0, 5), whole, strict=True):
            assert (a == b).all(), threads
    for a, b in zip(bits(None, 3, 4), whole, strict=True):
        assert (a == b[3:4]).all()


def test_results_of_a_call_without_a_gradient_are_the_same(need):
    need("simulator")
    case = Case("gate_mix", (2, 3), 4, 40, "float16")
    given = case.arrays()
    with executor("simulator"):
        bare = ops.gate_mix(*given, differentiable=False)
        u, *_ = results(ops.gate_mix, case, given)
        assert (bare == u).all().item()
