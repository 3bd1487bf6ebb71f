"""Which sites `patch` keeps: bounds on float32 errors that right sites never reach and that sites
of another convention always pass, over 200 draws of each."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its sites are not verified")
pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its sites are not verified")

from mhc_mlx import models as adapter  # noqa: E402
from mhc_mlx.models import exact, verify  # noqa: E402
from mhc_mlx.models.family import Options  # noqa: E402
from models import modules, tiny_deepseek, tiny_vlm  # noqa: E402

launched = modules.launched
DRAWS = 200
XING_CLAMP = {"mhc_h_res_clamp_min": -30.0, "mhc_h_res_clamp_max": 30.0}  # the released model's
# A gated residual is no mHC: it is in test_mlx_vlm_qwen4_exp.py.
FAMILIES = ("mlx-lm's deepseek_v41", *(k for k in tiny_vlm.MODELS if k != "qwen4_exp"))


def sites_of(name):
    """The connections of a tiny model with random parameters, read-outs not among them."""
    if name == FAMILIES[0]:
        return tiny_deepseek.find_sites(tiny_deepseek.tiny())
    model = tiny_vlm.tiny(name, **XING_CLAMP if name == "xing4_0" else {})
    sites = adapter.family_of("test", model).sites(model)
    return [site for site in sites if site.kind != "head"]


def by_draw(bound, errors: np.ndarray, drawn: int) -> np.ndarray:
    """The statistic of a bound in each draw of so many tokens."""
    return np.array([bound.statistic(draw) for draw in errors.reshape(-1, drawn)])


@pytest.mark.parametrize("name", FAMILIES)
def test_right_sites_are_kept(name, launched):
    """In each of 200 draws of the 64 tokens that decide."""
    site = sites_of(name)[-1]
    for deviation, bounds in verify.BOUNDS.items():
        large = exact.spread(site, deviation)
        inputs = exact.random_inputs(large, mx.float32, 64 * DRAWS, 3)
        ours, theirs = exact.site_token_errors(large, Options(True, False), *inputs)
        for output, bound in itertools.product(ours, bounds):
            got, own = (by_draw(bound, e[output], 64) for e in (ours, theirs))
            share = (got / np.maximum(bound.factor * own, bound.least)).max()
            assert share < (0.5 if deviation == 24 else 1), (output, bound.name, share)


OTHERS = {
    "a tenth of eps": lambda c: {"eps": c.eps / 10},
    "ten eps": lambda c: {"eps": c.eps * 10},
    "start exp": lambda c: {"start": "exp"},
    "start exp_plain": lambda c: {"start": "exp_plain", "clamp": (-32.0, 32.0)},
    "start softmax": lambda c: {"start": "softmax", "first": "rows"},
    "one iteration less": lambda c: {"iters": c.iters - 1},
    "one iteration more": lambda c: {"iters": c.iters + 1},
    "transposed": lambda c: {"transposed": not c.transposed},
    "columns first": lambda c: {"start": "exp_plain", "clamp": (-30.0, 30.0), "first": "columns"},
    "a clamp wider by 2": lambda c: {"clamp": (-32.0, 32.0)},
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "hy_v4"])
def test_other_conventions_are_refused(name, monkeypatch):
    """In float64 against the right one, at deviation 24, in each of 200 draws of 16 tokens."""
    site, (bound,) = sites_of(name)[-1], verify.BOUNDS[24.0]
    settings, large = site.settings, exact.spread(site, 24.0)
    x, y = exact.random_inputs(large, mx.float32, 16 * DRAWS, 5)
    _, theirs = exact.site_token_errors(large, None, x, y)
    x, y = (np.array(a, np.float64) for a in (x, y))
    right, shares = exact.exact(large, x, y), {}
    own = "start exp_plain" if name == "xing4_0" else "start softmax"
    for other in OTHERS.keys() - {own, *(() if name == "xing4_0" else ["a clamp wider by 2"])}:
        convention = replace(settings.convention, **OTHERS[other](settings.convention))
        wrong = replace(settings, convention=convention)
        with monkeypatch.context() as patched:
            patched.setattr(type(site.family), "settings", lambda *_, wrong=wrong: wrong)
            found = exact.exact(large, x, y)
        share = []
        for k, a in right.items():
            errors = exact.token_errors(mx.array(found[k].astype(np.float32)), a, mx.float32)
            limit = np.maximum(bound.factor * by_draw(bound, theirs[k], 16), bound.least)
            share.append(by_draw(bound, errors, 16) / limit)
        shares[other] = np.max(share, axis=0).min()
    assert min(shares.values()) > 2, shares


def test_eps_from_the_third_half_step_is_refused_by_each_seed(monkeypatch):
    """The whole rule: the median at deviation 6 does not see this one."""
    from mhc_mlx.models.families import vlm_xing4_0 as family

    right = family.run.read

    def read(hc, prefix, settings, *given):
        other = replace(settings, convention=replace(settings.convention, start="exp"))
        return right(hc, prefix, other, *given)

    site = sites_of("xing4_0")[0]
    assert verify.failure(site, Options(True, False), mx.float32, 0) is None
    monkeypatch.setattr(family.run, "read", read)
    medians = {6.0: verify.BOUNDS[6.0][:1]}
    deciles = medians | {24.0: verify.BOUNDS[24.0]}
    for seed in range(4):
        for bounds, refused in ((deciles, True), (medians, False)):
            monkeypatch.setattr(verify, "BOUNDS", bounds)
            found = verify.failure(site, Options(True, False), mx.float32, seed)
            assert (found is not None and found.ours > 4 * found.limit) == refused, (seed, found)


def test_the_rule_of_the_ninth_decile(monkeypatch):
    """128 units or twice the package's; one bad token of 16 is not enough."""
    site, asked = sites_of("xing4_0")[0], []

    def fed(ours, theirs):
        def errors(large, options, x, y, repeats=1):
            count, z = x.shape[1] * repeats, large.arrays[0].astype(mx.float32)
            scale = mx.sqrt(mx.square(z[8:]).sum(-1).mean()) * large.arrays[2][2]
            asked.append(round(abs(scale.item())))
            large_logits = asked[-1] == 24
            return tuple(
                {"h_res": np.resize(np.array(e if large_logits else [1.0]), count)}
                for e in (ours, theirs)
            )

        monkeypatch.setattr(verify, "site_token_errors", errors)
        return verify.failure(site, Options(True, False), mx.float32, 0)

    assert fed([128.0], [1.0]) is None
    assert set(asked) == {6, 24} and asked.count(6) == asked.count(24)
    found = fed([129.0], [1.0])
    assert (found.ours, found.theirs, found.limit) == (129.0, 1.0, 128.0)
    assert found.what == "ninth decile of h_res, float32, logits of deviation 24, 1 tokens"
    assert fed([399.0], [200.0]) is None and fed([401.0], [200.0]).limit == 400.0
    assert fed([np.inf], [1.0]) is not None and fed([np.nan], [1.0]) is not None


def test_no_sums_no_larger_logits(monkeypatch):
    """A site whose h_res is the identity, and a read-out, are verified at deviation 6 alone."""
    for name, index, count in (("hy_v4", 0, 1), ("deepseek_v4", 0, 2), ("deepseek_v4", -1, 1)):
        model = tiny_vlm.tiny(name)
        site, asked = adapter.family_of("test", model).sites(model)[index], set()

        def spread(site, deviation, asked=asked):
            asked.add(deviation)
            return exact.spread(site, deviation)

        monkeypatch.setattr(verify, "spread", spread)
        assert verify.failure(site, Options(True, False), mx.float32, 0) is None
        assert len(asked) == count, (name, index)


def test_small_gates_in_float64():
    """A gate of exp(-60) keeps its relative precision; logits of deviation 24 reach it."""
    z = np.array([-700.0, -60.0, -1.0, 0.0, 40.0])
    want = np.exp(np.minimum(z, 0)) / (1 + np.exp(-np.abs(z)))
    np.testing.assert_allclose(exact._sigmoid(z), want, rtol=1e-13)
