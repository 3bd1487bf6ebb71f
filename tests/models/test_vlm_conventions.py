"""XING and HUNYUAN_V4 are what mlx-vlm 0.7.10 computes: its code, or where it is not installed its
formulas, in float32, at logits large enough to show a wrong eps, clamp, order or transpose."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from cases import ULP
from proof import executor, oracle

import mhc_mlx as m
from mhc_mlx import ops, reference

UNITS = 4  # float32 units of the largest element of a matrix or token, in the median over them
N, C = 4, 48
XING = SimpleNamespace(
    hc_mult=N,
    hidden_size=C,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    mhc_h_res_clamp_min=-30.0,
    mhc_h_res_clamp_max=30.0,
)
HUNYUAN = SimpleNamespace(
    hc_mult=N, hidden_size=C, hc_eps=1e-6, hc_magnitude=2.0, rms_norm_eps=1e-5
)
MOST_UNITS = 16  # in the worst of them: an eps in fewer sums moves few matrices, but far
# What XING is taken for most easily.
WRONG = {
    "eps only from the third half-step": replace(m.ROW_FIRST, eps=1e-6, clamp=(-30.0, 30.0)),
    "no eps": replace(m.XING, eps=0.0),
    "clamp at 20": replace(m.XING, clamp=(-20.0, 20.0)),
    "columns first": replace(m.XING, first="columns"),
    "transposed": replace(m.XING, transposed=True),
    "one iteration less": replace(m.XING, iters=19),
}


def xing(x, fn, base, scale):
    """post, comb and the read of mlx-vlm's xing4_0 HyperConnection, line by line."""
    c, n = XING, N
    flat = x.reshape(*x.shape[:2], -1)
    flat = flat * mx.rsqrt(mx.mean(flat * flat, axis=-1, keepdims=True) + c.rms_norm_eps)
    pre, post, comb = mx.split(flat @ fn.T, [n, 2 * n], axis=-1)
    pre_b, post_b, comb_b = mx.split(base, [n, 2 * n])
    pre = mx.sigmoid(pre * scale[0] + pre_b)
    post = 2 * mx.sigmoid(post * scale[1] + post_b)
    comb = xing_projection(comb.reshape(*comb.shape[:-1], n, n) * scale[2] + comb_b.reshape(n, n))
    return post, comb, (pre[..., None] * x).sum(axis=2)


def xing_projection(comb):
    c = XING
    comb = mx.clip(comb, c.mhc_h_res_clamp_min, c.mhc_h_res_clamp_max)
    comb = mx.exp(comb - comb.max(axis=-1, keepdims=True))
    for _ in range(c.hc_sinkhorn_iters):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + c.hc_eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + c.hc_eps)
    return comb


def hunyuan(x, fn, base, scale):
    """The read and post of mlx-vlm's hy_v4 IdentityHyperConnection, line by line."""
    c = HUNYUAN
    mixes = mx.fast.rms_norm(x.flatten(-2), None, c.rms_norm_eps) @ fn.T
    pre, post = mx.split(mixes, 2, axis=-1)
    pre_base, post_base = mx.split(base, 2, axis=-1)
    pre = mx.sigmoid(pre * scale[0] + pre_base) + c.hc_eps
    post = c.hc_magnitude * mx.sigmoid(post * scale[1] + post_base)
    return (pre[..., None] * x).sum(axis=2), post


def site(rows: int, parts: int, deviation: float, seed: int = 0) -> list[mx.array]:
    """x, fn, base and scale; the logits alpha l + bias have the deviation."""
    rng, half = np.random.default_rng(seed), deviation / 2**0.5
    arrays = [
        rng.normal(size=(1, 64, N, C)),
        rng.normal(size=(rows, N * C)) * (N * C) ** -0.5,
        half * rng.normal(size=rows),
        half * rng.uniform(0.9, 1.1, parts),
    ]
    return [mx.array(a.astype(np.float32)) for a in arrays]


def units(got, want, axes: int, over_tokens=np.median) -> float:
    """The median over tokens of the largest error, in units of the token's largest element."""
    got, want = (np.array(a, np.float64) for a in (got, want))
    axis = tuple(range(-axes, 0))
    off = np.abs(got - want).max(axis) / np.abs(want).max(axis)
    return float(over_tokens(off)) / ULP["float32"]


def logits(deviation: float) -> mx.array:
    rng = np.random.default_rng(int(deviation))
    return mx.array((deviation * rng.normal(size=(256, N, N))).astype(np.float32))


def test_formulas_are_the_code_of_mlx_vlm():
    """Bit for bit: so the tests below speak of the package, also where it is not installed."""
    reason = "mlx-vlm is not installed: its formulas as written here stand for its code"
    pytest.importorskip("mlx_vlm", reason=reason)
    from mlx_vlm.models.hy_v4.hyper_connection import IdentityHyperConnection
    from mlx_vlm.models.xing4_0.language import HyperConnection

    for module, config, formula, rows, parts in (
        (HyperConnection, XING, xing, N * N + 2 * N, 3),
        (IdentityHyperConnection, HUNYUAN, hunyuan, 2 * N, 2),
    ):
        x, *parameters = site(rows, parts, 10.0)
        stock = module(config)
        names = dict(zip(("hc_fn", "hc_base", "hc_scale"), parameters, strict=True))
        (stock.hc_pre if parts == 2 else stock).update(names)
        for a, b in zip(stock(x), formula(x, *parameters), strict=True):
            assert mx.array_equal(a, b).item(), module.__name__


@pytest.mark.parametrize("rung", ["reference", "stand-in", "simulator", "gpu"])
@pytest.mark.parametrize("deviation", [6.0, 10.0])
def test_projection_of_xing(deviation, rung, need):
    """Of h_res and of its gradient, beside mlx-vlm's."""
    l, rng = logits(deviation), np.random.default_rng(1)  # noqa: E741
    g = mx.array(rng.normal(size=l.shape).astype(np.float32))
    stock = [a[0] for a in mx.vjp(xing_projection, [l], [g])]
    want, back = oracle.sinkhorn_knopp(np.array(l, np.float64), m.XING)
    if rung == "reference":
        made = mx.vjp(lambda a: reference.sinkhorn_knopp(a, m.XING), [l], [g])
    else:
        need(rung)
        with executor(rung):
            made = mx.vjp(lambda a: ops.sinkhorn_knopp(a, m.XING), [l], [g])
            mx.eval(made)
    (h,), (d,) = made
    assert units(h, want, 2) < UNITS and units(h, stock[0], 2) < UNITS
    assert units(h, want, 2, np.max) < MOST_UNITS and units(h, stock[0], 2, np.max) < MOST_UNITS
    dwant = back(np.array(g, np.float64))
    assert units(d, dwant, 2) <= max(UNITS, 2 * units(stock[1], dwant, 2))
    cut = np.abs(np.array(l)) >= 30
    assert cut.any() == (deviation == 10) and not np.array(d)[cut].any()


@pytest.mark.parametrize("name", WRONG)
def test_another_convention_shows(name):
    for deviation in (6.0, 10.0):
        l = logits(deviation)  # noqa: E741
        off = units(reference.sinkhorn_knopp(l, WRONG[name]), xing_projection(l), 2, np.max)
        print(f"{name}, deviation {deviation:g}: {off * ULP['float32']:.1e}")
        assert off > 10 * MOST_UNITS


@pytest.mark.parametrize("rung", ["reference", "stand-in", "simulator", "gpu"])
def test_sites(rung, need):
    """mhc_pre of a site's own tensors: u, h_post and h_res of Xing, u and h_post of Hunyuan."""
    if rung != "reference":
        need(rung)
    for deviation in (6.0, 10.0):
        for formula, convention, rows, parts, eps in (
            (xing, m.XING, N * N + 2 * N, 3, XING.rms_norm_eps),
            (hunyuan, m.HUNYUAN_V4, 2 * N, 2, HUNYUAN.rms_norm_eps),
        ):
            arrays = site(rows, parts, deviation)
            if rung == "reference":
                made = reference.mhc_pre(*arrays, None, convention, eps)
            else:
                with executor(rung):
                    made = ops.mhc_pre(*arrays, None, convention, eps)
                    mx.eval([a for a in made if a is not None])
            u, post, comb = made[:3]
            wide = [np.array(a, np.float64) for a in arrays]
            want, _ = oracle.mhc_pre(*wide, None, convention, eps)
            found = formula(*arrays)
            stock = (found[2], found[0], found[1]) if parts == 3 else found
            for k, (a, b, w) in enumerate(zip((u, post, comb), stock, want, strict=False)):
                # logits are sums over n C: their rounding moves both by more than UNITS here
                limit = max(UNITS, 2 * units(b, w, 2 if k == 2 else 1))
                assert units(a, w, 2 if k == 2 else 1) <= limit, (convention.name, k)
            assert (comb is None) == (parts == 2)


def test_post_eps_of_hunyuan():
    """transformers adds hc_eps to h_post, mlx-vlm does not: float32 shows it where h_post is 0."""
    z = mx.array([-20.0, 0.0])
    plain, more = (ops.gates(z, z, c)[1] for c in (m.HUNYUAN_V4, m.HUNYUAN_V4_POST_EPS))
    assert np.allclose(np.array(more) - np.array(plain), 1e-6, rtol=0.1)
    assert ops.gates(z, z, m.HUNYUAN_V4)[0][0].item() == pytest.approx(1e-6, rel=0.01)


def test_alpha_of_two_entries():
    """A third entry, of logits that are not there, changes nothing and has no gradient."""
    x, fn, base, scale = site(2 * N, 2, 2.0)
    three = mx.concatenate([scale, mx.array([7.0])])
    made = [m.mhc_coefficients(x, fn, base, a, m.HUNYUAN_V4)[:2] for a in (scale, three)]
    assert all(mx.array_equal(a, b).item() for a, b in zip(*made, strict=True))

    def loss(alpha):
        h_pre, h_post, _ = m.mhc_coefficients(x, fn, base, alpha, m.HUNYUAN_V4)
        return (h_pre * h_post * mx.arange(N)).sum()

    two, third = mx.grad(loss)(scale), mx.grad(loss)(three)
    assert two.shape == (2,) and mx.array_equal(two, third[:2]).item() and third[2].item() == 0
    connection = m.HyperConnection(C, N, convention=m.HUNYUAN_V4)
    assert connection.alpha.shape == (2,) and connection.phi.shape == (2 * N, N * C)
    with pytest.raises(ValueError, match=r"alpha must have shape \[parts=2\] but got \[4\]"):
        m.mhc_coefficients(x, fn, base, mx.zeros(4), m.HUNYUAN_V4)


def test_a_module_starts_inside_its_clamp():
    """A logit at an end of the clamp would never move, so a narrow clamp moves the start."""
    for clamp in ((-30.0, 30.0), (-1.0, 1.0), (0.5, 4.0)):
        connection = m.HyperConnection(8, N, convention=replace(m.XING, clamp=clamp), dynamic=False)
        start = connection.H_res
        assert ((clamp[0] < start) & (start < clamp[1])).all().item(), clamp

        def loss(logits, c=connection.convention):
            h = m.sinkhorn_knopp(logits, c)
            return (h * mx.arange(N * N).reshape(N, N) ** 2).sum()

        assert (mx.grad(loss)(start) != 0).all().item(), clamp
