"""What is special in Xing 4: its Sinkhorn-Knopp, and its rounding in 16 bits, which is coarser than
that of these kernels.

What it shares with other families is in test_mlx_vlm.py."""

import importlib
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")

from mhc_mlx import models as adapter  # noqa: E402
from models import modules  # noqa: E402
from models.test_mlx_vlm import Rank, alike, patched, stock_errors  # noqa: E402
from models.tiny_vlm import run, tiny, tokens  # noqa: E402

launched = modules.launched
WIDE = {"mhc_h_res_clamp_min": -30.0, "mhc_h_res_clamp_max": 30.0}  # as in the released model


@pytest.fixture
def family():
    return importlib.import_module("mhc_mlx.models.families.vlm_xing4_0")


def with_convention(monkeypatch, family, wrong: dict, base: mx.array | None = None) -> None:
    """Let patched sites, or the one with this base, have another convention."""
    right = family.run.read

    def read(hc, prefix, settings, *given):
        if base is None or mx.array_equal(hc[prefix + "base"], base).item():
            settings = replace(settings, convention=replace(settings.convention, **wrong))
        return right(hc, prefix, settings, *given)

    monkeypatch.setattr(family.run, "read", read)


MISTAKES = {
    "eps only from the third half-step": {"start": "exp"},
    "a smaller eps": {"eps": 1e-7},
    "columns first": {"first": "columns"},
    "transposed": {"transposed": True},
    "one iteration less": {"iters": 19},
    "a clamp wider by 2": {"clamp": (-32.0, 32.0)},
    "eps on h_pre": {"pre_eps": 1e-6},
    "eps on h_post": {"post_eps": 1e-6},
    "no factor 2": {"post_scale": 1.0},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_convention_is_refused(mistake, family, monkeypatch):
    """What Xing's is taken for most easily."""
    with_convention(monkeypatch, family, MISTAKES[mistake])
    with pytest.warns(UserWarning, match="2 of 2 hyper-connections keep mlx-vlm's code"):
        adapter.patch(tiny("xing4_0", num_hidden_layers=1, **WIDE))


def test_another_clamp_is_refused(family, monkeypatch):
    with_convention(monkeypatch, family, {"clamp": (-30.0, 30.0)})
    with pytest.warns(UserWarning, match=r"2 of 2 hyper-connections keep mlx-vlm's code"):
        adapter.patch(tiny("xing4_0", num_hidden_layers=1))


def test_sites_in_float64():
    """With the released model's clamp; in a few matrices eps beside a small sum shows."""
    assert max(stock_errors(tiny("xing4_0", **WIDE), np.max)) < 128


@pytest.mark.parametrize("kind", ["float32", "4-bit"])
def test_every_site_is_kept(kind, launched):
    """With the released model's clamp, in float32 and with 16-bit streams and parameters."""
    model = tiny("xing4_0", kind, **WIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.patch(model)


@pytest.mark.parametrize("seed", range(3))
def test_quantised(seed, launched):
    """4-bit with bfloat16 activations. mlx-vlm rounds more often, so that most logits differ, by as
    much as two independent errors of the size of mlx-vlm's against float32 activations."""
    prompt, wide = tokens(64, seed=seed), tiny("xing4_0", "4-bit", seed, **WIDE)

    def widened(a: mx.array) -> mx.array:
        return a.astype(mx.float32) if a.dtype == mx.bfloat16 else a

    wide.update(tree_map(widened, wide.parameters()))
    exact, model = run(wide, prompt), tiny("xing4_0", "4-bit", seed, **WIDE)
    want = run(model, prompt)
    got = run(patched(model), prompt)
    assert got.dtype == want.dtype == mx.bfloat16 and exact.dtype == mx.float32

    def distance(a: mx.array, b: mx.array) -> float:
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        return (mx.abs(a - b).max(-1) / mx.abs(b).max(-1)).mean().item()

    theirs = distance(want, exact)
    assert distance(got, want) < 2**0.5 * theirs and distance(got, exact) < 1.1 * theirs < 2**-5


def test_coefficients_are_rounded(family, launched):
    """h_post and h_res leave a site in 16 bits, as mlx-vlm's, and a connection alone returns them.

    Each is the nearest bfloat16 to the float32 coefficient."""
    model, x = tiny("xing4_0", "4-bit"), mx.random.normal((2, 3, 4, 64)).astype(mx.bfloat16)
    hc = patched(model).model.layers[0].attn_hc
    site = adapter.family_of("test", model).sites(model)[0]
    settings, (fn, base, scale) = site.settings, site.arrays
    made = family.run.ops.mhc_pre(x, fn, base, scale, None, settings.convention, settings.norm_eps)
    for got, want in zip(hc(x), (made[1], made[2], made[0]), strict=True):
        assert got.dtype == mx.bfloat16
        assert mx.array_equal(got, want.astype(mx.bfloat16)).item()
    found = site.outputs(site.options, x, x[..., 0, :])
    for key, want in (("h_post", made[1]), ("h_res", made[2])):
        assert mx.array_equal(found[key], want.astype(mx.bfloat16)).item()
        assert not mx.array_equal(found[key], want).item()


@pytest.mark.parametrize("wide", ["streams", "sublayer"])
def test_the_wider_dtype_is_written(wide, launched):
    """As mlx-vlm's sum of streams and sublayer in two dtypes."""
    x, y = mx.random.normal((1, 3, 4, 64)), mx.random.normal((1, 3, 64))
    narrow = (x, y.astype(mx.bfloat16)) if wide == "streams" else (x.astype(mx.bfloat16), y)
    model, found = tiny("xing4_0"), []
    for layer in (model.layers[0], patched(tiny("xing4_0")).layers[0]):
        layer.self_attn = lambda u, mask, cache: narrow[1]
        layer.mlp = lambda u: narrow[1]
        found.append(layer(narrow[0]))
    assert found[0].dtype == found[1].dtype == mx.float32
    alike(found[1], found[0], 2**-6)


def test_one_wrong_site(family, monkeypatch, launched):
    """It keeps mlx-vlm's code, and the other site of its layer stays patched."""
    model = tiny("xing4_0")
    want, base = run(model, tokens(9)), model.layers[1].ffn_hc.hc_base
    with_convention(monkeypatch, family, {"transposed": True}, base)
    wrong = r"1 of 8 .*: model.layers.1.ffn_hc.hc \(median of h_res, float32, "
    with pytest.warns(UserWarning, match=wrong):
        adapter.patch(model)
    kept = [site.options is not None for site in family.FAMILY.sites(model)]
    assert kept == 3 * [True] + [False] + 4 * [True]
    assert type(model.layers[1]) is family.PatchedLayer
    alike(run(model, tokens(9)), want)


def test_stages_are_refused():
    """mlx-vlm's xing4_0 can be split, but its call sends nothing."""
    model = tiny("xing4_0")
    model.model.pipeline(Rank(0, 2))
    with pytest.raises(ValueError, match="model must be whole but is a stage of 2"):
        patched(model)


def test_sharded(launched):
    """Split over a group of one, before and after it is patched."""
    want = run(tiny("xing4_0"), tokens(9))
    first, second = tiny("xing4_0"), patched(tiny("xing4_0"))
    first.shard()
    second.shard()
    alike(run(patched(first), tokens(9)), want)
    alike(run(second, tokens(9)), want)
