"""`patch(model, rounding="once")`: a site rounds what it reads and what it writes, and no more."""

import mlx.core as mx
import numpy as np
import pytest
from programs.figures import refused

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")

from mhc_mlx import models as adapter
from mhc_mlx.models import __main__ as command
from mhc_mlx.models.families import ROWS, named
from mhc_mlx.models.family import Options
from mhc_mlx.models.times import random_sites
from mhc_mlx.models.verify import random_inputs, site_token_errors
from models import modules
from models.tiny_vlm import tiny, tokens

launched = modules.launched
FAMILIES = [row.file for row in ROWS if "once" in named("test", row.file).roundings]


def made(family: str, rounding: str) -> tuple[dict, dict]:
    """Outputs of a site in bfloat16, and the mean error of each over tokens."""
    (site,) = random_sites(64, 1, named("test", family))
    options, (x, y) = Options(True, False, rounding), random_inputs(site, mx.bfloat16, 64)
    ours, _ = site_token_errors(site, options, x, y)
    return site.outputs(options, x, y), {name: float(np.mean(e)) for name, e in ours.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_nearer_to_float32(family, launched):
    """What is written is the same bit for bit, but for Xing's rounded coefficients."""
    (stock, stock_errors), (once, errors) = (made(family, k) for k in ("stock", "once"))
    assert errors["u"] < 0.9 * stock_errors["u"]
    assert errors["out"] <= stock_errors["out"]
    if "xing" not in family:
        assert mx.array_equal(once["out"], stock["out"]).item()


def test_a_model_that_rounds_once(launched):
    """In float32 nothing is rounded: its results are those of "stock" but for the last digits."""
    prompt, found = tokens(9), []
    for rounding in ("stock", "once"):
        model = adapter.patch(tiny("xing4_0"), rounding=rounding)
        sites = adapter.family_of("test", model).sites(model)
        assert {site.options.rounding for site in sites} == {rounding}
        found.append(model(prompt, cache=model.make_cache()).logits)
    assert mx.abs(found[0] - found[1]).max() < 1e-4 * mx.abs(found[0]).max()


def test_wrong_roundings(capsys):
    model = tiny("hy_v4")
    with pytest.raises(ValueError, match=r"\[patch\] rounding must be 'stock' or 'once' for this"):
        adapter.patch(model, rounding="never")
    with pytest.raises(TypeError, match=r"\[patch\] rounding must be a str but got bool"):
        adapter.patch(model, rounding=True)
    with pytest.raises(ValueError, match=r"rounding must be 'stock' for this model but got 'once'"):
        adapter.patch(tiny("qwen4_exp"), rounding="once")
    assert not adapter.patching.is_patched(model)
    message = refused(command.main, ["--random", "64", "--rounding", "never"], capsys)
    assert "--rounding: invalid choice: 'never'" in message
    message = refused(command.main, ["--sites", "64", "--rounding", "once"], capsys)
    assert "--rounding and --prompts are of a model" in message
