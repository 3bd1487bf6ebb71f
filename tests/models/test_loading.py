"""`load`: each source's tensors, against the source's own formula in float64; its errors; its page.

`PYTHONPATH=tests python -m models.test_loading` prints the tables of docs/converting.md.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mhc_mlx as m
from mhc_mlx import sources
from models import modules
from models.source_formulas import (
    MADE,
    C,
    deepseek_v4,
    flash_mhc,
    hy_v4,
    mhc_cu,
    mhc_lite,
    mhc_triton,
    normal,
    qwen4_exp,
    sigmoid,
    sublayer,
    unit,
    xing4_0,
)

launched = modules.launched
ROOT = Path(__file__).parents[2]


def arrays(tensors, prefix="", dtype=mx.float32):
    return {prefix + name: mx.array(a.astype(np.float32), dtype) for name, a in tensors.items()}


def float64(weights):
    return {name: np.array(a.astype(mx.float32), np.float64) for name, a in weights.items()}


def run(module, x):
    """What a module's sublayer reads, and the new streams."""
    f, seen = lambda u: mx.tanh(u) + 0.5, []

    def watched(u):
        seen.append(u)
        return f(u)

    if isinstance(module, m.MHCBlock):
        module.layer = watched
        out = module(x)
    elif isinstance(module, m.MHCLayer):
        out = module(x, watched)
    else:
        u, add_residual = module(x)
        out = add_residual(watched(u))
    return seen[0], out


@pytest.mark.parametrize("n", [4, 3])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_a_source(made, n, launched):
    """The sublayer by the source's own formula; other names are in the dict as well."""
    random = np.random.default_rng(n)
    tensors, module, own = made(random, n)
    weights = arrays(tensors, "h.0.") | {"h.0x": mx.zeros(3), "h.1.fn": mx.zeros(3)}
    assert m.load(module, weights, "h.0") is module
    x = normal(random, 2, 3, n, C).astype(np.float32)
    u, out = run(module, mx.array(x))
    want_u, want = own(x.astype(np.float64), sublayer, float64(arrays(tensors)))
    np.testing.assert_allclose(u, want_u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["deepseek_v4", "hy_v4"])
def test_a_read_out(source, launched):
    """mlx-vlm's `HyperHead` and `IdentityHyperHead`, whose formula is the same."""
    random, n = np.random.default_rng(0), 4
    names = {"deepseek_v4": "{}", "hy_v4": "hc_head_{}"}[source]
    tensors = {
        names.format("fn"): normal(random, n, n * C) * 2 / math.sqrt(n * C),
        names.format("base"): normal(random, n),
        names.format("scale"): random.uniform(0.5, 1.5, 1),
    }
    convention = {"deepseek_v4": m.DEEPSEEK_V4, "hy_v4": m.HUNYUAN_V4}[source]
    head = m.HyperHead(C, n, convention=replace(convention, pre_eps=1e-3), norm_eps=1e-2)
    m.load(head, arrays(tensors, "model.hc_head."), "model.hc_head")
    x = normal(random, 2, 3, n, C).astype(np.float32)
    fn, base, scale = float64(arrays(tensors)).values()
    pre = sigmoid(unit(x.astype(np.float64), 1e-2) @ fn.T * scale + base) + 1e-3
    np.testing.assert_allclose(
        head(mx.array(x)), (pre[..., None] * x).sum(-2), rtol=1e-4, atol=1e-5
    )


def test_flat_names_and_other_modules():
    """DeepSeek's own names; an MHCLayer keeps its norm; a block's connection is loaded."""
    tensors, connection, _ = deepseek_v4(np.random.default_rng(0), 4)
    weights = {f"layers.0.hc_attn_{k}": a for k, a in arrays(tensors).items()}
    m.load(connection, weights, "layers.0.hc_attn")
    options = {"convention": connection.convention, "norm_eps": 1e-2}
    layer = m.MHCLayer(4, C, dynamic=True, **options)
    layer.rms_weight = mx.full(C, 3.0)
    m.load(layer, weights, "layers.0.hc_attn", source="deepseek_v4")
    block = m.load(m.MHCBlock(nn.Linear(C, C), C, 4, **options), weights, "layers.0.hc_attn")
    for module in (layer, block.connection):
        for name in ("phi", "bias", "alpha"):
            assert mx.array_equal(module[name], connection[name]).item()
    assert mx.array_equal(layer.rms_weight, mx.full(C, 3.0)).item()


def test_no_prefix_and_names_that_are_left():
    """A state_dict of a whole flash-mHC block has its sublayer's names too."""
    tensors, block, _ = flash_mhc(np.random.default_rng(0), 4)
    weights = arrays(tensors) | {
        "layer.weight": mx.zeros((C, C)),
        "layer.steps": mx.zeros(1, mx.int32),
    }
    m.load(block, weights, "", leave=("layer.",))
    assert mx.array_equal(block.connection.bias, weights["W_all.bias"]).item()
    with pytest.raises(TypeError, match="layer.steps must be float32"):
        m.load(block, weights, "")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_no_dtype_changes_in_silence(made, dtype):
    """Only the steps that the page says to compute in float32 give float32."""
    tensors, module, _ = made(np.random.default_rng(0), 4)
    m.load(module, arrays(tensors, dtype=dtype), "")
    target = module.connection if isinstance(module, m.MHCBlock) else module
    layouts = [x for x in sources.LAYOUTS if x.kind != "head"]
    layouts = [x for x in layouts if x.fits(getattr(target, "convention", None))]
    (layout,) = (x for x in layouts if {t.name for t in x.tensors} == set(tensors))
    for tensor in layout.tensors:
        if tensor.to:
            in_float32 = any(step.endswith("in float32") for step in tensor.steps)
            want = mx.float32 if in_float32 else dtype
            assert parameters(target)[tensor.to.split("[")[0]].dtype == want, tensor


def test_v4_is_v41_unlagged(launched):
    """V4's write-back with mlx-lm's V4.1 coefficients of the same tensors."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its V4.1 is not compared")
    from mlx_lm.models import deepseek_v41 as stock

    from models.tiny_deepseek import tiny, within

    hc, x = tiny().layers[0].attn_hc, mx.random.normal((1, 3, 4, 64))
    y = mx.random.normal((1, 3, 64))
    weights = {f"hc_ffn.{k}": a for k, a in hc.parameters().items()}
    connection = m.HyperConnection(64, 4, convention=m.DEEPSEEK_V4, norm_eps=hc.norm_eps)
    u, add_residual = m.load(connection, weights, "hc_ffn")(x)
    pre, post, comb = hc(x)
    within(u, stock._collapse(x, pre), mx.float32)
    within(add_residual(y), stock._expand(y, x, post, comb), mx.float32)


SITES = ["deepseek_v4", "deepseek_v4 head", "hy_v4", "hy_v4 head", "xing4_0"]


@pytest.mark.parametrize("source", SITES)
def test_the_names_of_mlx_vlm(source):
    """Its own modules, with every parameter at random: names, shapes and results."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its modules are not loaded")
    from mlx_vlm.models.deepseek_v4 import hyper_connection as deepseek
    from mlx_vlm.models.hy_v4 import hyper_connection as hunyuan
    from mlx_vlm.models.xing4_0 import language as xing

    sizes = {"hc_mult": 4, "hidden_size": C, "hc_sinkhorn_iters": 3, "rms_norm_eps": 1e-2}
    sizes |= {"hc_eps": 1e-3, "hc_magnitude": 1.7}
    config = SimpleNamespace(**sizes, mhc_h_res_clamp_min=-5.0, mhc_h_res_clamp_max=3.0)
    kind, convention = {
        "deepseek_v4": (deepseek.HyperConnection, m.DEEPSEEK_V4),
        "deepseek_v4 head": (deepseek.HyperHead, m.DEEPSEEK_V4),
        "hy_v4": (hunyuan.IdentityHyperConnection, m.HUNYUAN_V4),
        "hy_v4 head": (hunyuan.IdentityHyperHead, m.HUNYUAN_V4),
        "xing4_0": (xing.HyperConnection, m.XING),
    }[source]
    changed = {"hy_v4": {"post_scale": 1.7, "pre_eps": 1e-3}, "xing4_0": {"iters": 3, "eps": 1e-3}}
    changed["deepseek_v4"] = {"iters": 3, "eps": 1e-3, "pre_eps": 1e-3}
    changed["xing4_0"]["clamp"] = (-5.0, 3.0)
    convention = replace(convention, **changed[source.split()[0]])
    mx.random.seed(0)
    theirs = modules.shaken(kind(config)).eval()
    x, y = 3 * mx.random.normal((2, 3, 4, C)), mx.random.normal((2, 3, C))
    prefix = "layer.hc_pre" if source == "hy_v4" else "layer"
    weights = {f"layer.{k}": a for k, a in parameters(theirs).items()}
    make = m.HyperHead if source.endswith("head") else m.HyperConnection
    ours = m.load(make(C, 4, convention=convention, norm_eps=1e-2), weights, prefix)
    if source.endswith("head"):
        modules.close(ours(x), theirs(x))
        return
    u, add_residual = ours(x)
    if source == "xing4_0":
        post, comb, read = theirs(x)
        want = post[..., None] * y[:, :, None] + comb @ x
    elif source == "hy_v4":
        read, post = theirs(x)
        want = hunyuan.hc_expand(y, x, post)
    else:
        read, post, comb = theirs(x)
        want = deepseek.hc_expand(y, x, post, comb)
    modules.close(u, read)
    modules.close(add_residual(y), want)


@pytest.mark.parametrize("made", [m.GatedResidual, m.GatedHead])
def test_the_names_of_mlx_vlm_for_qwen(made):
    """Its class, with and without a write-back; and that a head is told from a connection."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its modules are not loaded")
    from mlx_vlm.models.qwen4_exp.language import Qwen4ExpGatedResidual

    config = SimpleNamespace(hc_count=4, hidden_size=C, hc_lowrank=5, rms_norm_eps=1e-2)
    mx.random.seed(0)
    theirs = modules.shaken(Qwen4ExpGatedResidual(config, use_combine=made is m.GatedResidual))
    weights = {f"h.attn.{k}": a for k, a in parameters(theirs).items()}
    ours = m.load(made(C, 4, 5, 1e-2), weights, "h.attn")
    x, y = 3 * mx.random.normal((2, 3, 4, C)), mx.random.normal((2, 3, C))
    mx.disable_compile()
    try:
        found = theirs(m.merge_streams(x))
        if made is m.GatedHead:
            modules.close(ours(x), found)
            return
        read, streams, weights = found
        u, add_residual = ours(x)
        modules.close(u, read)
        want = m.split_streams(streams, 4) + weights[..., None] * y[..., None, :]
        modules.close(add_residual(y), want)
    finally:
        mx.enable_compile()


# ---- errors


def parameters(module):
    return dict(nn.utils.tree_flatten(module.parameters()))


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_each_tensor_wrong_in_each_way(made):
    """Missing, of another shape, no array of floats, or beside an unknown one: the module stays."""
    tensors, module, _ = made(np.random.default_rng(0), 4)
    weights, before = arrays(tensors, "c."), parameters(module)

    def raises(kind, match, **changed):
        wrong = {k: a for k, a in (weights | changed).items() if a is not None}
        with pytest.raises(kind, match=match):
            m.load(module, wrong, "c")

    for name, a in weights.items():
        shape = ", ".join(map(str, a.shape))
        must = rf"weights must have {name} of shape \[{shape}\] .* but got only \['c\."
        raises(ValueError, must, **{name: None})
        longer = mx.zeros((*a.shape, 2))
        must = (
            rf"{name} must have shape \[{shape}\] but got \[{', '.join(map(str, longer.shape))}\]"
        )
        raises(ValueError, must, **{name: longer})
        raises(
            TypeError, f"{name} must be float32, float16 or bfloat16", **{name: a.astype(mx.int32)}
        )
        raises(TypeError, f"{name} must be an mx.array but got ndarray", **{name: np.array(a)})
    must = (
        r"c.other must be a tensor of .* or be left by leave but got an unknown one of shape \[3\]"
    )
    raises(ValueError, must, **{"c.other": mx.zeros(3)})
    for name, a in parameters(module).items():
        assert a is before[name], name


@pytest.mark.parametrize("name", ["phi_post", "b_res", "alpha_res"])
def test_parts_of_one_parameter_have_one_dtype(name):
    tensors, module, _ = mhc_cu(np.random.default_rng(0), 4)
    weights = arrays(tensors)
    weights[name] = weights[name].astype(mx.bfloat16)
    with pytest.raises(ValueError, match=rf"{name} must have the dtype of \w+, mlx.core.float32"):
        m.load(module, weights, "")


def test_a_perm_mat_that_is_none():
    tensors, block, _ = flash_mhc(np.random.default_rng(0), 3)
    for change in (lambda p: p[[0, 0, 2, 3, 4, 5]], lambda p: p + 1e-3, lambda p: 0 * p):
        weights = arrays(tensors | {"perm_mat": change(tensors["perm_mat"])})
        with pytest.raises(ValueError, match="perm_mat must have each of the 6 permutation"):
            m.load(block, weights, "")


V4 = deepseek_v4(np.random.default_rng(0), 4)
WEIGHTS = {f"c_{k}": a for k, a in arrays(V4[0]).items()}
CU, LITE = mhc_cu(np.random.default_rng(0), 4), mhc_lite(np.random.default_rng(0), 4)
HY4, XING_4 = hy_v4(np.random.default_rng(0), 4), xing4_0(np.random.default_rng(0), 4)
FLASH, QWEN = flash_mhc(np.random.default_rng(0), 4), qwen4_exp(np.random.default_rng(0), 4)


def v4(dim=C, **options):
    return m.HyperConnection(dim, convention=m.DEEPSEEK_V4, **options)


def adapted():
    """As a module whose product is quantised or has LoRA."""
    module = m.GatedResidual(C, 4, 5)
    module.up = nn.Sequential(module.up)
    return module


BAD = [  # a module, the tensors, further arguments, and what is said
    (nn.Linear(2, 2), WEIGHTS, {}, TypeError, "module must be a HyperConnection, .* got Linear"),
    (None, WEIGHTS, {}, TypeError, "module must be"),
    (
        QWEN[1],
        arrays(QWEN[0], "c."),
        {"source": "hy_v4"},
        ValueError,
        "hy_v4 has .* only .'hc_norm",
    ),
    (m.HyperConnection(C), arrays(QWEN[0], "c."), {}, ValueError, "be a GatedResidual for .*Qwen"),
    (m.GatedHead(C, 4, 5), arrays(QWEN[0], "c."), {}, ValueError, "GatedResidual .* GatedHead"),
    (m.GatedResidual(C, 4, 6), arrays(QWEN[0], "c."), {}, ValueError, r"shape \[6, 48\] but got"),
    (m.GatedResidual(C), WEIGHTS, {}, ValueError, "dynamic HyperConnection for .* GatedResidual"),
    (adapted(), arrays(QWEN[0], "c."), {}, TypeError, "module.up must be an nn.Linear .* Sequent"),
    (v4(), [], {}, TypeError, "weights must be a dict of str but got list"),
    (v4(), {3: mx.zeros(2)}, {}, TypeError, "weights must be a dict of str"),
    (v4(), WEIGHTS, {"prefix": None}, TypeError, "prefix must be a str but got NoneType"),
    (v4(), WEIGHTS, {"source": "v4"}, ValueError, "source must be None or one of .*mhc_lite"),
    (v4(), WEIGHTS, {"leave": "fn"}, TypeError, "leave must be a tuple of str but got 'fn'"),
    (v4(), WEIGHTS, {"leave": (1,)}, TypeError, "leave must be a tuple of str"),
    (v4(), {}, {}, ValueError, "weights must have tensors of a source under 'c'.*hy_v4 has hc_fn"),
    (
        XING_4[1],
        arrays(HY4[0], "c."),
        {},
        ValueError,
        "must be HUNYUAN_V4's .* got XING",
    ),
    (
        HY4[1],
        arrays(XING_4[0], "c."),
        {},
        ValueError,
        "must be XING's but for .* HUNYUAN",
    ),
    (v4(), WEIGHTS, {"source": "hy_v4"}, ValueError, r"hy_v4 has .* only \['fn', 'base', 'scale'"),
    (v4(9), WEIGHTS, {}, ValueError, r"c_fn must have shape \[24, 36\] but got \[24, 48\]"),
    (v4(dynamic=False), WEIGHTS, {}, ValueError, "must be a dynamic HyperConnection for the tens"),
    (m.HyperHead(C), WEIGHTS, {}, ValueError, "convention must be DEEPSEEK_V4's .* got PAPER"),
    (m.HyperConnection(C), WEIGHTS, {}, ValueError, "DEEPSEEK_V4's but for iters, eps, pre_eps f"),
    (
        *(m.HyperConnection(C, convention=replace(m.DEEPSEEK_V4, post_eps=0.1)), WEIGHTS, {}),
        *(ValueError, "module.convention must be DEEPSEEK_V4's"),
    ),
    (v4(), WEIGHTS | {"c.fn": mx.zeros(3)}, {}, ValueError, "c.fn must stand for .* as c_fn"),
    (m.HyperConnection(C), arrays(CU[0], "c."), {}, ValueError, "be a dynamic MHCLayer for"),
    (m.MHCLayer(4, C), arrays(CU[0], "c."), {}, ValueError, "MHCLayer .* got static MHCLayer"),
    (m.HyperHead(C), arrays(CU[0], "c."), {}, ValueError, "MHCLayer .* but got HyperHead"),
    (FLASH[1], arrays(LITE[0], "c."), {}, ValueError, "subtract_input .* be False for mhc_lite"),
    (LITE[1], arrays(FLASH[0], "c."), {}, ValueError, "subtract_input .* be True for flash_mhc"),
]


@pytest.mark.parametrize("module, weights, options, kind, message", BAD)
def test_errors(module, weights, options, kind, message):
    before = parameters(module) if isinstance(module, nn.Module) else {}
    with pytest.raises(kind, match=rf"\[load\] .*{message}"):
        m.load(module, weights, **{"prefix": "c"} | options)
    assert all(a is before[name] for name, a in before.items())


def test_a_dynamic_mhc_triton_is_not_taken_for_a_static_one():
    """Its dynamic names are unknown; its static part alone is loaded where they are left."""
    tensors, module, _ = mhc_triton(np.random.default_rng(0), 4)
    dynamic = {"phi": mx.zeros((4 * C, 24))} | {
        f"alpha_{k}": mx.ones(1) for k in ("pre", "post", "res")
    }
    with pytest.raises(ValueError, match="phi must be a tensor of mhc_triton"):
        m.load(module, arrays(tensors) | dynamic, "")
    m.load(module, arrays(tensors) | dynamic, "", leave=("phi", "alpha_"))


# ---- the page


def tables() -> str:
    """The tables of docs/converting.md."""
    lines = ["| source | models | module | convention | its constants and `norm_eps` | prefix |"]
    lines.append("|---|---|---|---|---|---|")
    for x in sources.LAYOUTS:
        kind = sources.KINDS[x.kind].split(" ", 1)[1]
        convention = f"`{x.convention.name}`" if x.convention else "none"
        row = (f"`{x.source}`", x.models, kind, convention, x.settings, x.prefixes)
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "| source | module | tensor | shape | goes to | how |",
        "|---|---|---|---|---|---|",
    ]
    for x in sources.LAYOUTS:
        for t in x.tensors:
            shape, to = f"[{', '.join(t.shape)}]", f"`{t.to}`" if t.to else "no parameter"
            row = (
                f"`{x.source}`",
                x.kind,
                f"`{t.name}`",
                shape,
                to,
                "; ".join(t.steps) or "as it is",
            )
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_tables_of_the_code():
    page = (ROOT / "docs/converting.md").read_text()
    assert tables() in page, "PYTHONPATH=tests python -m models.test_loading prints them"
    for source in {layout.source for layout in sources.LAYOUTS}:
        assert f"`{source}`" in page and source in m.load.__doc__


def test_every_layout_is_tested():
    """Of Hy4 and Xing, which have the same names, both."""
    tested = []
    for made in MADE.values():
        tensors, module, _ = made(np.random.default_rng(0), 4)
        target = module.connection if isinstance(module, m.MHCBlock) else module
        convention = getattr(target, "convention", None)
        tested.append((set(tensors), convention and convention.start))
    for x in sources.LAYOUTS:
        if not x.kind.endswith("head"):
            start = x.convention and x.convention.start
            assert ({t.name for t in x.tensors}, start) in tested, x.source


if __name__ == "__main__":
    print(tables(), end="")
