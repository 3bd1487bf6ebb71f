"""What is special in Hy4: states that its MTP reads, layers of which one site is patched, stages.

What it shares with other families is in test_mlx_vlm.py."""

import importlib
from dataclasses import replace

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")

from mhc_mlx import models as adapter  # noqa: E402
from models import modules  # noqa: E402
from models.test_mlx_vlm import Rank, alike, patched  # noqa: E402
from models.tiny_vlm import randomised, run, tiny, tokens  # noqa: E402

launched = modules.launched


@pytest.fixture
def family():
    return importlib.import_module("mhc_mlx.models.families.vlm_hy_v4")


def drafter(text_config):
    folder = "mlx_vlm.speculative.drafters.hy_v4_mtp"
    config = importlib.import_module(f"{folder}.config").HyV4MTPConfig(text_config=text_config)
    return randomised(importlib.import_module(f"{folder}.hy_v4_mtp").HyV4MTPDraftModel(config))


def test_mtp_reads_what_it_read(launched):
    """The merged states, those of verified tokens, and what the drafter makes of them."""
    model = tiny("hy_v4")
    mtp = drafter(model.config)
    embedded = model.model.embed_tokens(tokens(9, seed=1))

    def states() -> list[mx.array]:
        cache = model.make_cache()
        hidden = model(tokens(9), cache=cache, return_hidden=True).hidden_states[0]
        verified, _ = model.speculative_verify_hidden(tokens(3, seed=1), cache)
        return [hidden, verified, mtp._forward_hidden(embedded, hidden, mtp.make_cache(), None)]

    want = states()
    patched(model)
    for got, a in zip(states(), want, strict=True):
        assert a.shape[-1] == 64 and a.ndim == 3
        alike(got, a)
    with pytest.raises(ValueError, match="model must be one of these: .*hy_v4 of mlx-vlm"):
        patched(mtp)  # it has no streams, so there is nothing to patch


def test_one_wrong_site(family, monkeypatch, launched):
    """It keeps mlx-vlm's code, and the other site of its layer stays patched."""
    model, right = tiny("hy_v4"), family.run.read
    want, base = run(model, tokens(9)), model.layers[1].hc_mlp_layer.hc_pre.hc_base

    def read(hc, prefix, settings, *given):
        if mx.array_equal(hc[prefix + "base"], base).item():
            settings = replace(settings, convention=family.HUNYUAN_V4)  # another magnitude
        return right(hc, prefix, settings, *given)

    monkeypatch.setattr(family.run, "read", read)
    wrong = r"1 of 9 .*: model.layers.1.hc_mlp_layer.hc_pre.hc \(median of h_post, float32"
    with pytest.warns(UserWarning, match=wrong):
        adapter.patch(model)
    kept = [site.options is not None for site in family.FAMILY.sites(model)]
    assert kept == 3 * [True] + [False] + 5 * [True]
    assert type(model.layers[1]) is family.PatchedLayer
    alike(run(model, tokens(9)), want)


def test_a_connection_called_alone(launched):
    """As in mlx-vlm it returns what is read, and post."""
    model, x = tiny("hy_v4"), mx.random.normal((2, 3, 4, 64))
    connection = model.layers[0].hc_attn_layer
    want = connection(x)
    patched(model)
    for got, a in zip(connection(x), want, strict=True):
        alike(got, a)


def test_stages_are_refused():
    """mlx-vlm's hy_v4 can be split, but its call sends nothing."""
    model = tiny("hy_v4")
    model.model.pipeline(Rank(0, 2))
    with pytest.raises(ValueError, match="model must be whole but is a stage of 2"):
        patched(model)
