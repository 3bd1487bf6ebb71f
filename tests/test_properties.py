"""Properties of the maths, on the reference, the simulator and the GPU."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import oracle
import pytest
from cases import CONVENTIONS
from conftest import executor

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, ops


@pytest.fixture(params=["reference", "simulator", "gpu"], autouse=True)
def runs(request, need):
    """Each test runs with kernels by this executor."""
    if request.param == "reference":
        if ops.kernel.backend():
            pytest.skip("reference: the default device has kernels")
        yield request.param
        return
    need(request.param)
    with executor(request.param):
        yield request.param


def bits(a: mx.array) -> bytes:
    return np.array(a.view(mx.uint16) if a.dtype.size == 2 else a).tobytes()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["PAPER", "ROW_FIRST", "DEEPSEEK_V4"])
def test_any_logits_give_finite_results(name, scale):
    logits = scale * mx.random.normal((8, 4, 4), key=mx.random.key(1))
    cotangent = mx.random.normal((8, 4, 4), key=mx.random.key(2))
    (h,), (gradient,) = mx.vjp(
        lambda a: ops.sinkhorn_knopp(a, CONVENTIONS[name]), [logits], [cotangent]
    )
    assert mx.isfinite(h).all() and mx.isfinite(gradient).all()
    wide, backward = oracle.sinkhorn_knopp(np.array(logits).astype(np.float64), CONVENTIONS[name])
    assert np.abs(np.array(h) - wide).max() < 1e-5 * max(1, scale)
    want = backward(np.array(cotangent).astype(np.float64))
    if scale <= 30:
        assert np.abs(np.array(gradient) - want).max() < 1e-5 * max(1, scale) * np.abs(want).max()


@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_rows_and_columns_sum_to_one(name):
    c = CONVENTIONS[name]
    logits = (
        mx.random.uniform(0.1, 1, (8, 4, 4)) if name == "ADDITIVE" else mx.random.normal((8, 4, 4))
    )
    h = np.array(ops.sinkhorn_knopp(logits, c))
    last = -1 if (c.first == "columns") != c.transposed else -2  # the axis of the last half-step
    assert np.abs(h.sum(last) - 1).max() < 3e-6
    assert np.abs(h.sum(-3 - last) - 1).max() < 1e-3  # truncated after 20 iterations


def test_conventions_differ_from_each_other_and_their_transposes():
    logits = mx.random.uniform(0.5, 3, (4, 4), key=mx.random.key(5))
    results = [
        np.array(ops.sinkhorn_knopp(logits, replace(c, iters=2))) for c in CONVENTIONS.values()
    ]
    for i, a in enumerate(results):
        assert np.abs(a - a.T).max() > 1e-3
        for b in results[:i]:
            assert np.abs(a - b).max() > 1e-3


def test_deepseek_without_eps_is_the_paper_transposed():
    logits = 2 * mx.random.normal((6, 4, 4))
    h = ops.sinkhorn_knopp(logits, replace(DEEPSEEK_V4, eps=0.0))
    assert mx.abs(h - ops.sinkhorn_knopp(logits.swapaxes(-1, -2), PAPER)).max() < 4e-7


def test_permuting_streams_permutes_results():
    x, y, post = mx.random.normal((3, 4, 24)), mx.random.normal((3, 24)), mx.random.normal((4,))
    res, p = mx.random.normal((4, 4)), mx.array([2, 0, 3, 1])
    a = ops.stream_mix_add(x, y, post, res)[:, p]
    b = ops.stream_mix_add(x[:, p], y, post[p], res[p][:, p])
    assert mx.abs(a - b).max() < 3e-6


def test_identity_and_no_write_return_x():
    x = mx.random.normal((3, 4, 24)).astype(mx.bfloat16)
    weight, zeros = mx.ones(24), mx.zeros(4)
    assert bits(ops.mhc_static(x, mx.ones(4), zeros, mx.eye(4), weight)) == bits(x)
    assert bits(ops.mhc_static(x, mx.ones(4), zeros, None, weight)) == bits(x)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("n", [4, 12])
def test_a_token_does_not_depend_on_its_neighbours(n, dtype, runs):
    """Bit for bit, however many tokens are in the call, forward and gradient."""
    x = mx.random.normal((9, n, 72)).astype(dtype)
    cotangent = mx.random.normal(x.shape).astype(dtype)
    rest = (
        mx.random.uniform(shape=(n,)),
        mx.random.normal((n,)),
        mx.random.normal((n, n)),
        mx.ones(72),
    )

    def f(a, g):
        (out,), (dx,) = mx.vjp(lambda a: ops.mhc_layer(a, *rest), [a], [g])
        return out, dx

    whole = f(x, cotangent)
    for t in (0, 4, 8):
        for part, all_of_it in zip(f(x[t : t + 1], cotangent[t : t + 1]), whole, strict=True):
            assert bits(part[0]) == bits(all_of_it[t])


def test_nan_stays_in_its_token():
    x = mx.random.normal((5, 4, 24))
    x[2, 1, 3] = float("nan")
    x[3, 0, 0] = float("inf")
    out = ops.mhc_layer(x, mx.zeros(4), mx.zeros(4), mx.eye(4), mx.ones(24))
    finite = np.isfinite(np.array(out)).all(axis=(1, 2))
    assert finite.tolist() == [True, True, False, False, True]


def test_zero_rows_and_extreme_gates():
    x = mx.zeros((2, 4, 24))
    gates = mx.array([1e4, -1e4, 0.0, 30.0])
    arrays = [x, gates, -gates, 1e4 * mx.random.normal((4, 4)), mx.ones(24)]
    (out,), gradients = mx.vjp(lambda *a: ops.mhc_layer(*a), arrays, [mx.random.normal(x.shape)])
    assert (out == 0).all()
    assert all(mx.isfinite(g).all() for g in gradients)


def test_same_input_same_bits():
    x, rest = mx.random.normal((7, 4, 129)), (mx.ones(4), mx.ones(4), mx.eye(4), mx.ones(129))
    cotangent = mx.random.normal(x.shape)

    def run():
        outputs, gradients = mx.vjp(lambda *a: ops.mhc_layer(*a), [x, *rest], [cotangent])
        return [bits(a) for a in outputs + gradients]

    assert run() == run()


def test_additive_zero_start_is_near_the_identity():
    h = ops.sinkhorn_knopp(mx.zeros((4, 4)), ADDITIVE)
    assert mx.abs(h - mx.eye(4)).max() < 1e-6


def test_iterations_are_not_run_to_convergence():
    logits = 5 * mx.random.normal((4, 4), key=mx.random.key(0))
    results = [ops.sinkhorn_knopp(logits, replace(ROW_FIRST, iters=k)) for k in (1, 2, 20)]
    assert mx.abs(results[0] - results[1]).max() > 1e-3
    assert mx.abs(results[1] - results[2]).max() > 1e-3
