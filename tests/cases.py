"""Inputs per op, shapes with their reasons, tolerances: the only test file with numbers."""

from dataclasses import replace

from calls import DTYPES, Array, Case, Op, always, half, logits, never, normal, scaled, uniform

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, XING, Convention
from mhc_mlx.conventions import (
    HUNYUAN_V4,
    HUNYUAN_V4_POST_EPS,
    IDENTITY,
    KRONECKER,
    MHC_LITE,
    UNCONSTRAINED,
)
from mhc_mlx.ops.autodiff import FUSED_OPS

CONVENTIONS = {c.name: c for c in (PAPER, ROW_FIRST, ADDITIVE, DEEPSEEK_V4, XING)}
IHC = (IDENTITY, HUNYUAN_V4, HUNYUAN_V4_POST_EPS)  # h_res is the identity
EXACT = {c.name: c for c in (MHC_LITE, KRONECKER, *IHC, UNCONSTRAINED)}  # no half-steps
STREAMS = (1, 2, 3, 4, 8, 12, 16, 32, 64)
# smallest, one pack, prime and ragged, small, ragged above a simdgroup, and three model widths
CHANNELS = (1, 8, 31, 64, 129, 1280, 1920, 4096)
ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
OUTPUT_ULPS = 8  # of the largest value of the token or matrix: a sum may cancel to anything
BOUNDS = 1  # times the bound of an element, see bounded.py: the worst one is off by 0.2
SIGMAS, DRAWS = 6, 16  # more, of the rounding of logits that are sums over n * C: see logit_ulps
GRADIENT = 4e-6  # times sqrt(tokens) times the largest gradient, in float32
REFERENCE = 3  # times that for the reference: MLX's plain sums over a row are less exact
HALF_GRADIENT_ULPS = 1  # more, where the gradient itself is float16 or bfloat16
AT_SCALE = ((0.1, 1e-5), (1.0, 1e-5), (5.0, 1e-5), (30.0, 1e-3))  # of logits; largest gradients
# Of COVERING, DYNAMIC, SINGLE, GATED, UNUSUAL and STANDARD. A Mac adds few rows in one more form.
# 57 are of XING and HUNYUAN_V4: a start and a clamp are template arguments. 20 are of gate_mix.
MAX_VARIANTS = (162, 252, 100, 45, 111, 100)


# ---- the ops

ARRAYS = {  # by the names that arguments have in every op, in the order in which they are drawn
    "x": Array("n C", normal(), "dtype", always),
    "weight": Array("C", uniform(0.5), "other_weights"),
    "phi": Array("L K", normal(lambda case: (case.n * case.C) ** -0.5), "phi"),
    "bias": Array("L", logits(normal(half)), "other_weights"),
    "alpha": Array("parts", uniform(0.5, half)),
    "h_post": Array("n", uniform(0.2), per_token=lambda case: case.per_token[0]),
    "H_post": Array("n", uniform(0.2)),
    "h_res": Array("n n", normal(), per_token=lambda case: case.per_token[1]),
    "h_pre": Array("n", uniform(0.2), "other_weights", lambda case: any(case.per_token)),
    "H_pre": Array("n", uniform(0.2), "other_weights"),
    "y": Array("C", normal(), "dtype", always),
    "H_res": Array("n n", logits(scaled)),
    "logits": Array("n n", logits(scaled), per_token=always),
}


def op(arrays: str, rows, statics: str = "", also: str = "", **special: Array) -> Op:
    """A row of OPS: names, those of arrays that may be None with a ?; `also` is drawn and left;
    `special` are arrays that are not in ARRAYS, or otherwise."""
    names, left = arrays.replace("?", "").split(), [*also.split(), "weight" if rows else ""]
    optional = tuple(name[:-1] for name in arrays.split() if name.endswith("?"))
    known = ARRAYS | special
    drawn = {name: array for name, array in known.items() if name in names or name in left}
    return Op({k: known[k] for k in names}, optional, rows, tuple(statics.split()), drawn)


SHARED = {k: ARRAYS[k]._replace(per_token=never) for k in ("h_pre", "h_post", "h_res")}
HEAD = {name: ARRAYS[name]._replace(axes=axes) for name, axes in (("phi", "n K"), ("bias", "n"))}
OPS = {
    "sinkhorn_knopp": op("logits", None, "convention"),
    "project": op("logits", None, "n convention", logits=ARRAYS["logits"]._replace(axes="R")),
    "stream_aggregate_norm": op(
        "x h_pre weight", lambda n: (n, 1, n + 1, n), "eps", also="h_post h_res", **SHARED
    ),
    "stream_mix_add": op("x y h_post h_res?", lambda n: (n + 1, n, 2 * n + 1, n + 1)),
    "mhc_static": op("x h_pre h_post h_res? weight", lambda n: (n, n, 2 * n, n), "eps", **SHARED),
    "mhc_layer": op(
        "x H_pre H_post H_res weight", lambda n: (n, n, 2 * n, n), "convention eps", also="h_res"
    ),
    "stream_aggregate": op("x h_pre", lambda n: (n, 1, n + 1, n), h_pre=ARRAYS["h_post"]),
    "gate_mix": op(
        "gate_logits s",
        lambda n: (2 * n, 1, 2 * n + 1, 2 * n),
        gate_logits=Array("n C", scaled, "dtype", always),
        s=ARRAYS["x"],
    ),
    "mhc_coefficients": op("x phi bias alpha", lambda n: (n, 0, n, n), "convention norm_eps"),
    "mhc_pre": op(
        "x phi bias alpha weight?", lambda n: (n, 1, 2 * n + 1, n), "convention norm_eps eps"
    ),
    "mhc_head": op(
        "x phi bias alpha",
        lambda n: (n, 1, n + 1, n),
        "convention norm_eps",
        alpha=ARRAYS["alpha"]._replace(axes="1"),
        **HEAD,
    ),
    "mhc_seam": op(
        "x y h_pre h_post h_res? weight?", lambda n: (n + 1, n + 1, 2 * n + 2, n + 1), "eps rounded"
    ),
    "mhc_single_pass": op(
        "x y phi bias alpha weight?",
        lambda n: (2 * n + 1, n + 1, 3 * n + 2, n + 1),
        "convention norm_eps eps rounded",
    ),
    "stream_norm": op(
        "x weight y? h_post? inject?",
        lambda n: (n + 1, 2 * n, 5 * n + 1, n + 1),  # sums over tokens need out and ds once more
        "eps",
        weight=Array("n C", uniform(-0.5), "other_weights"),
        inject=Array("n K", normal(lambda case: case.C**-0.5)),
    ),
}
FUSED = tuple(name for name in OPS if name in FUSED_OPS)
SEAMS = tuple(name for name, row in OPS.items() if "rounded" in row.statics)
OF_LOGITS = tuple(name for name, row in OPS.items() if "phi" in row.arrays)  # that tokens make
PROJECTED = tuple(name for name in OF_LOGITS if name not in SEAMS)  # of x, phi, bias and alpha

# ---- the cases


def covering() -> list[Case]:
    """Every n and C with every dtype, each op and convention, in at most MAX_VARIANTS kernels."""
    cases, conventions = [], [PAPER, ROW_FIRST, ADDITIVE, DEEPSEEK_V4]
    layers = ["mhc_layer", "mhc_static", "mhc_layer", "stream_aggregate_norm", "mhc_layer"]
    k = 0
    for i, n in enumerate(STREAMS):
        for j, dtype in enumerate(DTYPES):
            C = CHANNELS[(i + 3 * j) % len(CHANNELS)]
            lead = (2,) if n >= 32 or C >= 1920 else (2, 3) if k % 3 else (5,)
            eps = 0.5 if 1 in (n, C) else 1e-5  # scale-free: without eps h_pre has no gradient
            weights = {2: dtype, 16: "mixed"}.get(n, "float32")
            special = {"offset": k % 4 and 1, "weights": weights}
            op = layers[k % len(layers)]
            turn = (i if n > 8 else k // 2) % len(conventions)
            convention = conventions[turn] if op == "mhc_layer" else None
            cases.append(Case(op, lead, n, C, dtype, convention, eps, **special))
            per_token = ((False, False), (True, True), (True, False), (False, True))[(i + j) % 4]
            cases.append(Case("stream_mix_add", lead, n, C, dtype, per_token=per_token, **special))
            k += 1
    for n, names in ((3, "A"), (4, "PRAD")):
        for name in names:
            convention = next(c for c in conventions if c.name.startswith(name))
            cases.append(Case("sinkhorn_knopp", (101,), n, n, convention=convention))
    few = replace(PAPER, iters=1)
    # of logits with deviation 6 the clamp cuts many, and in some lines all
    narrow = {"convention": replace(XING, clamp=(-8.0, 5.0)), "scale": 6.0}
    return cases + [
        Case("sinkhorn_knopp", (101,), 4, 4, convention=XING, scale=6.0),
        Case("sinkhorn_knopp", (101,), 4, 4, **narrow),
        Case("sinkhorn_knopp", (5,), 12, 12, "float16", weights="float16", **narrow),
        Case("sinkhorn_knopp", (2,), 33, 33, convention=XING),  # by two simdgroups
        Case("mhc_layer", (2, 3), 4, 64, convention=XING),
        Case(
            "sinkhorn_knopp", (2, 3), 4, 4, "float16", few, weights="float16"
        ),  # both steps in logs
        Case(
            "sinkhorn_knopp", (), 4, 4, convention=replace(ROW_FIRST, iters=300), scale=10.0
        ),  # in segments
        Case("mhc_static", (), 4, 8, "bfloat16", identity=True),  # the smallest: one token
        Case("stream_mix_add", (), 4, 8, "bfloat16", identity=True),
        Case("mhc_static", (0,), 4, 8),  # no tokens
        Case("stream_mix_add", (2, 0), 4, 8),
        Case("mhc_layer", (0,), 4, 8, convention=ROW_FIRST),
    ]


COVERING = covering()


def dynamic() -> list[Case]:
    """Every convention, n, C and dtype, kind of phi, of read, of tokens, of slice: see below."""
    f32, f16, bf16 = DTYPES
    P, R, V4, L, K, X = PAPER, ROW_FIRST, DEEPSEEK_V4, MHC_LITE, KRONECKER, XING
    hunyuan = {"parts": 2}  # alpha of IHC, where no logit is of h_res
    none, free = IDENTITY, UNCONSTRAINED
    two, few, many, axes = (2,), (5,), (70,), (2, 3)  # two: few enough for mhc_pre_partial_logits
    pre = [
        (few, 1, 8, f32, P, {}),
        (axes, 1, 31, bf16, none, {"norm": False}),
        (few, 1, 31, f16, K, {}),  # no logits: h_res is None
        (few, 2, 1, f32, L, {}),
        (axes, 2, 64, f16, K, {"phi": f16, "offset": 1}),
        (few, 2, 1026, f16, R, {}),  # u is made twice: where sums lay there is no place for squares
        (few, 3, 31, f32, V4, {"offset": 1}),
        (axes, 3, 129, bf16, L, {"phi": bf16, "norm": False}),
        (axes, 4, 1280, f32, P, {}),
        (many, 4, 64, f32, P, {"norm": False}),
        (many, 4, 8, bf16, L, {}),  # dp of a stage in several rounds of loads
        ((), 4, 1280, bf16, V4, {"weights": bf16, "phi": bf16, "norm": False}),  # decoding
        ((), 4, 2000, f16, R, {}),  # 250 runs in 8 slices: the first two take 32 at once
        (two, 8, 129, f32, P, {}),
        (two, 3, 31, f16, L, {"offset": 1}),
        (few, 4, 1280, f16, L, {"offset": 1}),
        (axes, 4, 129, bf16, R, {"weights": f16}),
        (many, 4, 31, bf16, K, {"offset": 1, "norm": False}),
        ((130,), 4, 64, bf16, P, {"norm": False}),  # two chunks of tokens for dphi
        (few, 4, 64, f16, none, {"phi": bf16}),
        (axes, 4, 8, f32, free, {}),
        (axes, 5, 31, f32, L, {"phi": f16}),
        (few, 8, 129, f32, K, {}),
        (few, 8, 1280, bf16, P, {"norm": False}),
        (axes, 12, 31, f16, R, {}),
        (few, 16, 64, f32, K, {"norm": False}),
        ((2,), 16, 31, bf16, V4, {"phi": bf16}),
        ((2,), 32, 8, f32, P, {}),
        ((2,), 32, 64, f16, none, {"offset": 1}),
        (two, 16, 264, bf16, none, {"norm": False}),
        (two, 16, 264, bf16, none, {}),
        # without a norm a Mac multiplies in float32, and by du of float16
        (many, 2, 31, f32, V4, {"norm": False, "offset": 1}),
        (few, 4, 129, f16, P, {"norm": False}),
        (axes, 2, 64, f16, P, {"norm": False}),
        (two, 4, 1280, bf16, X, {"scale": 6.0}),
        (few, 4, 129, f32, X, {"scale": 6.0}),
        (axes, 8, 64, bf16, X, {"norm": False}),
        (two, 4, 264, bf16, HUNYUAN_V4, hunyuan),
        (few, 4, 129, bf16, HUNYUAN_V4_POST_EPS, hunyuan | {"norm": False}),
    ]
    made = [
        (few, 1, 129, f16, L, {}),
        (two, 2, 64, f32, R, {}),
        (axes, 2, 31, f32, R, {"weights": bf16}),
        (many, 4, 129, f32, V4, {"offset": 1}),
        ((), 4, 64, bf16, free, {"phi": bf16}),
        (axes, 5, 8, bf16, P, {}),
        (axes, 8, 31, f16, free, {"phi": f16}),
        (few, 12, 64, f32, none, {}),
        ((2,), 32, 31, bf16, K, {}),
        (few, 4, 64, bf16, replace(X, clamp=(-1.0, 2.0)), {}),
        (axes, 4, 64, f32, HUNYUAN_V4_POST_EPS, hunyuan),
    ]
    head = [
        (few, 1, 1, f32, P, {}),
        (two, 4, 129, bf16, V4, {}),
        (axes, 4, 1280, bf16, V4, {"phi": bf16}),
        (many, 3, 129, f16, V4, {"offset": 1}),
        (few, 16, 31, f32, none, {"weights": f16}),
        (two, 17, 8, f32, P, {}),  # the last logit is alone in its block
        (two, 33, 8, f32, P, {}),  # more than products of matrices take backward
        (two, 12, 264, bf16, V4, {}),  # threadgroups share a tile, as in the last two of mhc_pre
    ]
    read = [
        (axes, 1, 8, f32, None, {"per_token": (True, False)}),
        (many, 4, 129, bf16, None, {"per_token": (True, False), "offset": 1}),
        (few, 4, 1280, f16, None, {"weights": f16}),
        ((), 12, 31, f32, None, {"offset": 1}),
        (few, 32, 64, bf16, None, {"per_token": (True, False), "weights": bf16}),
    ]
    gates = [
        (few, 1, 1, f32, None, {}),
        (axes, 2, 129, bf16, None, {"offset": 1}),
        ((), 4, 2000, bf16, None, {}),  # four threadgroups share a token, 250 packs
        (few, 4, 64, f32, None, {"scale": 30.0}),  # sigmoids of 0 and 1, and what is between
        (many, 4, 64, f16, None, {"offset": 1}),
        (axes, 5, 8, f16, None, {}),
        (few, 8, 64, f32, None, {}),
        (two, 12, 31, f32, None, {"offset": 1}),
        (two, 17, 8, bf16, None, {}),  # a stream at a time
        (two, 32, 64, bf16, None, {}),
    ]
    cases = []
    names = ("mhc_pre", "mhc_coefficients", "mhc_head", "stream_aggregate", "gate_mix")
    for op, rows in zip(names, (pre, made, head, read, gates), strict=True):
        for lead, n, C, dtype, convention, special in rows:
            # scale-free otherwise: see covering()
            eps = 0.5 if C == 1 else 1e-5
            norm_eps = 0.5 if n * C == 1 else 1e-6
            cases.append(Case(op, lead, n, C, dtype, convention, eps, norm_eps=norm_eps, **special))
    few = replace(PAPER, iters=1)
    return cases + [
        Case("mhc_coefficients", (5,), 4, 8, convention=few),
        # nobody's, but a Convention may be: I + l under gates
        Case("mhc_pre", (5,), 4, 8, convention=replace(ADDITIVE, sigmoid=True), scale=0.1),
        # in mhc_seam a thread makes several packs of u; one logit of h_res
        Case("mhc_pre", (), 1, 1026, convention=free, eps=0.5),
        Case("mhc_pre", (0,), 4, 8, convention=PAPER),
        Case("mhc_pre", (0,), 4, 8, "bfloat16", IDENTITY, norm=False),
        Case("mhc_coefficients", (2, 0), 4, 8, convention=MHC_LITE),
        Case("mhc_head", (0,), 4, 8, convention=PAPER),
        Case("stream_aggregate", (0,), 4, 8),
        Case("gate_mix", (2, 0), 4, 8),
    ]


DYNAMIC = dynamic()


def single() -> list[Case]:
    """The ops of "single pass" models: every dtype, rounding and way to share coefficients."""
    f32, f16, bf16 = DTYPES
    two, few, axes = (2,), (5,), (2, 3)
    each = {"per_token": (True, True)}
    seam = [
        (axes, 4, 1280, bf16, each | {"rounded": True}),
        (few, 4, 64, f32, each),
        (few, 1, 31, f16, {"offset": 1}),
        (axes, 2, 129, bf16, {"per_token": (True, False), "weights": bf16, "offset": 1}),
        (few, 3, 8, f32, {"per_token": (False, True), "norm": False}),
        ((), 4, 129, f16, {"identity": True, "rounded": True}),
        (few, 8, 64, bf16, each),
        (axes, 8, 31, f32, each | {"norm": False, "rounded": True}),
        (two, 8, 1280, f32, each),  # backward: a token is read twice, as in the first
        ((1,), 2, 8224, bf16, each),  # u not in registers
        (two, 12, 31, f32, each | {"weights": f16}),
        (two, 32, 8, bf16, {"norm": False, "identity": True}),
        ((0,), 4, 8, f32, each),
    ]
    whole = [  # one and two tokens: what mhc_pre_partial_logits projects
        ((), 4, 1280, bf16, DEEPSEEK_V4, {"rounded": True, "weights": bf16}),
        (two, 4, 129, f16, DEEPSEEK_V4, {"offset": 1}),
        (two, 8, 31, f32, ROW_FIRST, {"norm": False}),
        (few, 4, 129, f32, DEEPSEEK_V4, {}),
        (axes, 4, 64, bf16, PAPER, {"norm": False, "phi": bf16}),
        (few, 2, 31, f16, IDENTITY, {}),
        (few, 3, 8, bf16, MHC_LITE, {"rounded": True}),
        (axes, 12, 8, f32, PAPER, {}),
        (two, 4, 129, bf16, XING, {"scale": 6.0}),
        (few, 4, 64, bf16, HUNYUAN_V4, {"parts": 2}),
        ((0,), 4, 8, f32, DEEPSEEK_V4, {}),
    ]
    cases = []
    for *shape, special in seam:  # n = 1 is scale-free otherwise: see covering()
        eps = 0.5 if shape[1] == 1 else 1e-5
        cases.append(Case("mhc_seam", *shape, eps=eps, **special))
    for *shape, convention, special in whole:
        cases.append(Case("mhc_single_pass", *shape, convention, **special))
    return cases


SINGLE = single()


def gated() -> list[Case]:
    """The ops of gated residuals: every dtype and n, with and without y and inject, h_post shared
    and per token, one pass of channels and several, in registers and not."""
    f32, f16, bf16 = DTYPES
    two, few, axes = (2,), (5,), (2, 3)
    each, alone, last = {"per_token": (True, False)}, {"write_back": False}, {"inject": False}
    norm = [
        ((), 4, 2560, bf16, each | {"weights": bf16}),  # decoding: the widths of the model
        (few, 4, 64, f32, each),
        ((7,), 4, 129, bf16, alone | {"offset": 1}),  # three tiles of two tokens, one of one
        (few, 3, 31, f16, {"offset": 1}),
        (few, 4, 64, bf16, each | last),  # the read-out
        (two, 1, 8, f32, alone | last),
        (few, 1, 31, bf16, {"weights": "mixed"}),
        (axes, 2, 40, f16, each | {"weights": f16}),
        (two, 8, 264, bf16, each),
        (two, 4, 5124, f32, {}),  # forward and backward read a token twice
        (few, 12, 24, f32, each),
        (two, 16, 31, bf16, {}),
        (two, 33, 8, f16, alone),
        (two, 64, 8, f32, each | last),
        ((0,), 4, 8, f32, each),
    ]
    return [Case("stream_norm", *shape, **special) for *shape, special in norm]


GATED = gated()


def unusual() -> list[Case]:
    """Each constant at a value that no preset and no default has, and that shows in the results: if
    one is left out, taken for another or taken from a preset, the results are far off."""
    f32, f16, bf16 = DTYPES
    gates = {"pre_eps": 0.03, "post_scale": 1.7, "post_eps": 0.05}

    def convention(start="exp", first="rows", transposed=False, **more):
        name = "_".join(["ODD", start, first] + ["transposed"] * transposed).upper()
        return Convention(name, start, first, 3, 0.02, transposed, **gates | more)

    rows, columns = convention(transposed=True), convention(first="columns")
    columns_transposed = convention(first="columns", transposed=True)
    softmax, turned = convention("softmax"), convention("softmax", transposed=True)
    # some logits are cut at either end
    clamps = {"clamp": (-1.5, 1.0), "eps": 0.1, "iters": 4}
    plain = replace(convention("exp_plain", clamp=(-3.0, 2.5)), eps=0.1)
    plain_columns = convention("exp_plain", "columns", transposed=True, clamp=(-1.5, 1.0))
    cut, cut_softmax = (replace(c, **clamps) for c in (columns, turned))
    small = {"post_scale": 0.3}  # below 1, as no preset has it
    few, two, norms = (5,), (2,), {"eps": 0.5, "norm_eps": 0.25}
    rows_of_cases = [
        ("sinkhorn_knopp", few, 3, 3, f32, rows, {}),
        ("sinkhorn_knopp", few, 4, 4, f32, columns_transposed, {}),
        ("sinkhorn_knopp", few, 4, 4, f32, softmax, {}),
        ("sinkhorn_knopp", few, 12, 12, f32, convention("additive", "columns"), {}),
        ("sinkhorn_knopp", few, 4, 4, f32, plain, {}),
        ("sinkhorn_knopp", few, 3, 3, f32, plain_columns, {}),
        ("sinkhorn_knopp", few, 4, 4, f32, cut, {}),
        ("sinkhorn_knopp", few, 4, 4, f32, cut_softmax, {}),
        ("mhc_static", few, 4, 64, f32, None, {"eps": 0.5}),
        ("mhc_static", few, 12, 64, f32, None, {"eps": 0.5}),
        ("stream_aggregate_norm", few, 4, 64, f32, None, {"eps": 0.5}),
        ("stream_aggregate_norm", few, 12, 64, f32, None, {"eps": 0.5}),
        ("mhc_layer", few, 4, 64, f32, rows, {"eps": 0.5}),
        ("mhc_layer", two, 4, 64, f16, turned, {"eps": 0.5}),
        ("mhc_layer", few, 12, 64, f32, convention("softmax", **small), {"eps": 0.5}),
        ("mhc_coefficients", few, 4, 64, f32, columns_transposed, norms),
        ("mhc_coefficients", few, 4, 64, bf16, convention(**small), norms),
        ("mhc_coefficients", two, 4, 64, f32, softmax, norms),
        ("mhc_coefficients", two, 4, 64, bf16, plain, norms),
        ("mhc_pre", few, 4, 64, bf16, plain_columns, norms),
        ("mhc_pre", few, 4, 64, bf16, cut, norms),
        ("mhc_pre", few, 4, 64, f32, rows, norms),
        ("mhc_pre", few, 4, 64, bf16, turned, norms),
        ("mhc_pre", two, 4, 64, bf16, columns, norms),
        ("mhc_pre", two, 12, 64, f32, convention(transposed=True, **small), norms),
        ("mhc_pre", few, 4, 64, f32, replace(KRONECKER, **gates), norms),
        ("mhc_head", few, 4, 64, f32, columns, norms),
        ("mhc_head", few, 4, 64, bf16, columns, norms),
        ("mhc_head", two, 4, 64, bf16, columns, norms),
        ("mhc_seam", few, 4, 64, f32, None, {"eps": 0.5, "per_token": (True, True)}),
        ("mhc_seam", two, 12, 64, f32, None, {"eps": 0.5, "per_token": (True, True)}),
        ("mhc_seam", two, 12, 64, bf16, None, {"eps": 0.5, "rounded": True}),  # n > 8
        ("stream_norm", few, 4, 64, f32, None, {"eps": 0.5, "per_token": (True, False)}),
        ("mhc_single_pass", few, 4, 64, bf16, rows, norms),
        ("mhc_single_pass", two, 12, 64, f16, columns, norms | {"rounded": True}),
        ("mhc_single_pass", two, 4, 64, f32, convention(first="columns", **small), norms),
    ]
    cases = []
    for *shape, kind, special in rows_of_cases:
        cases.append(Case(*shape, convention=kind, **special))
    return cases


UNUSUAL = unusual()


def ringed() -> list[Case]:
    """What mhc_pre fetches through its ring on CUDA: every dtype, tails of tokens and of outputs,
    one run of k and several a slice."""
    f32, f16, bf16 = DTYPES
    rows = [
        ((17,), 4, 256, bf16, PAPER, {"norm": False}),  # 17 tokens: two tiles of 16
        ((9,), 4, 256, f32, DEEPSEEK_V4, {}),
        ((5,), 4, 64, f16, PAPER, {"phi": f16}),
        ((33,), 3, 32, bf16, ROW_FIRST, {"phi": bf16}),  # 15 outputs of 16, fewer runs than slices
        ((9,), 4, 72, f32, KRONECKER, {"norm": False, "phi": bf16}),  # 12 outputs of 16
        ((7,), 4, 136, f16, UNCONSTRAINED, {"offset": 1}),
    ]
    return [Case("mhc_pre", *shape, convention, **special) for *shape, convention, special in rows]


RINGED = ringed()


def standard() -> list[Case]:
    """Of an op that no list above names: every dtype; its arrays shared or per token, None or not;
    a C that packs divide and one that none does; n beyond what registers hold; one token and none;
    and each constant as in UNUSUAL."""
    f32, f16, bf16 = DTYPES
    each, gone = {"per_token": (True, True)}, {"identity": True, "norm": False}
    shapes = [
        ((5,), 4, 64, f32, {}),
        ((2, 3), 3, 31, f16, each | {"offset": 1}),
        ((5,), 4, 1280, bf16, {"weights": bf16} | gone),
        ((2,), 12, 40, f32, each | gone),
        ((), 8, 129, bf16, {}),
        ((0,), 4, 8, f32, {}),
        ((5,), 4, 64, f32, {"eps": 0.5, "norm_eps": 0.25}),
    ]
    listed = {c.op for cases in (COVERING, DYNAMIC, SINGLE, GATED) for c in cases}
    return [
        Case(name, lead, n, C, dtype, PAPER if "convention" in row.statics else None, **special)
        for name, row in OPS.items()
        if name not in listed and row.rows
        for lead, n, C, dtype, special in shapes
    ]


STANDARD = standard()
CASES = COVERING + DYNAMIC + SINGLE + GATED + STANDARD  # these launch every body
