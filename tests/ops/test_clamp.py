"""The clamp of logits, and the start exp_plain that needs one."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from proof import executor, oracle

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, XING, Convention, launch, ops
from mhc_mlx.conventions import MHC_LITE


@pytest.fixture(params=["reference", "stand-in", "simulator", "gpu"])
def runs(request, need):
    """A test runs with kernels by this executor."""
    if request.param == "reference":
        if launch.backend():
            pytest.skip("reference: the default device has kernels")
        yield
        return
    need(request.param)
    with executor(request.param):
        yield


def projected(logits: mx.array, c: Convention) -> list[mx.array]:
    """h_res and the gradient of the logits."""
    g = mx.random.normal(logits.shape, key=mx.random.key(3))
    return [a[0] for a in mx.vjp(lambda a: ops.sinkhorn_knopp(a, c), [logits], [g])]


def test_a_clamp_that_cuts_nothing_changes_nothing(runs):
    """Bit for bit, and exp_plain without eps is exp; a clamp is mx.clip before the projection."""
    logits = 3 * mx.random.normal((6, 4, 4), key=mx.random.key(1))
    wide, narrow = (-1e30, 1e30), (-2.0, 3.0)
    for c in (PAPER, DEEPSEEK_V4):
        for a, b in zip(
            projected(logits, c), projected(logits, replace(c, clamp=wide)), strict=True
        ):
            assert mx.array_equal(a, b).item(), c.name
        cut = projected(logits, replace(c, clamp=narrow))
        clipped = projected(mx.clip(logits, *narrow), c)
        assert mx.array_equal(cut[0], clipped[0]).item()
        inside = mx.logical_and(narrow[0] < logits, logits < narrow[1])
        assert mx.array_equal(cut[1], mx.where(inside, clipped[1], 0)).item()
        assert 0 < inside.sum().item() < logits.size
    plain = replace(ROW_FIRST, clamp=(-30.0, 30.0))
    found = [projected(logits, c) for c in (plain, replace(plain, start="exp_plain"))]
    assert all(mx.array_equal(a, b).item() for a, b in zip(*found, strict=True))


def test_gradient_at_the_ends_of_a_clamp(runs):
    """As that of mx.clip: a logit at an end has none, its neighbour inside has one."""
    low, high = np.float32(-1.5), np.float32(2.0)
    inner = [np.nextafter(low, high), np.nextafter(high, low)]
    line = mx.array(np.array([low, *inner, high, low - 1, high + 1, 0, 1], np.float32))
    mask = mx.grad(lambda a: mx.clip(a, low.item(), high.item()).sum())(line)
    assert mask.tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    logits = mx.stack([mx.roll(line, k) for k in range(8)])
    masks = mx.stack([mx.roll(mask, k) for k in range(8)])
    for c in (XING, PAPER, DEEPSEEK_V4):
        c = replace(c, clamp=(low.item(), high.item()), eps=0.1)
        _, d = projected(logits, c)
        assert mx.array_equal(d != 0, masks == 1).item(), c.name


def test_exp_plain_of_equal_logits(runs):
    """The first of them has the gradient of the maximum; a shift of a line changes nothing."""
    c = replace(XING, eps=0.3, iters=2)
    logits = mx.array([[1.0, 1, 1, 1], [0, 2, 2, -1], [0, 1, 2, 2], [-1, -1, -1, 0]])
    h, d = projected(logits, c)
    g = mx.random.normal(logits.shape, key=mx.random.key(3))
    want, back = oracle.sinkhorn_knopp(np.array(logits).astype(np.float64), c)
    dwant = back(np.array(g).astype(np.float64))
    assert np.abs(np.array(h) - want).max() < 1e-6 and np.abs(np.array(d) - dwant).max() < 1e-6
    assert np.abs(np.array(d).sum(-1)).max() < 1e-6 < np.abs(dwant).max()
    shifted = projected(logits + mx.array([[4.0], [-3.0], [0.5], [8.0]]), c)
    assert mx.array_equal(shifted[0], h).item()


BAD = [
    (lambda: replace(PAPER, clamp=[-1, 1]), TypeError, r"clamp must be None or two numbers \(low"),
    (lambda: replace(PAPER, clamp=(-1, "1")), TypeError, r"clamp must be .* but got \(-1, '1'\)"),
    (lambda: replace(PAPER, clamp=(True, 2)), TypeError, r"clamp must be .* but got \(True, 2\)"),
    (lambda: replace(PAPER, clamp=30), TypeError, "clamp must be None or two numbers .* got 30"),
    (lambda: replace(PAPER, clamp=(1.0,)), ValueError, r"clamp must be .* but got \(1.0,\)"),
    (lambda: replace(PAPER, clamp=(1.0, 1.0)), ValueError, "clamp must be .* with low < high, but"),
    (lambda: replace(PAPER, clamp=(-1e39, 1)), ValueError, "clamp must be finite in float32"),
    (lambda: replace(PAPER, clamp=(0, float("nan"))), ValueError, "clamp must be finite"),
    (lambda: replace(XING, clamp=None), ValueError, "clamp must be two numbers .* but got None"),
    (lambda: replace(XING, clamp=(-40, 40)), ValueError, r"with low < high <= low \+ 64, but got"),
    (lambda: Convention("X", start="exp_plain"), ValueError, "with start 'exp_plain' but got None"),
    (lambda: replace(ADDITIVE, clamp=(-1, 1)), ValueError, "clamp must be None with start 'addit"),
    (lambda: replace(MHC_LITE, clamp=(-1, 1)), ValueError, "clamp must be None with start 'permu"),
]


@pytest.mark.parametrize("k", range(len(BAD)))
def test_bad_clamps(k):
    call, kind, message = BAD[k]
    with pytest.raises(kind, match=message):
        call()
