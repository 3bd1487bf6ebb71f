"""Loads and stores of device memory, counted per buffer and pinned: no body moves a byte more.

The simulator counts them element by element. With two threadgroups (FEW_GROUPS in
proof/executors.py) what is fetched once per threadgroup counts 2, or 1 where 256 threads leave the
backward pass only one.
"""

import itertools
from dataclasses import replace

import pytest
from cases import FUSED, OF_LOGITS, OPS, PROJECTED, Case
from proof import executor, results, simulator

from mhc_mlx import PAPER, ROW_FIRST, ops
from mhc_mlx.conventions import IDENTITY, KRONECKER, MHC_LITE

STREAMS = ("x", "y", "dout", "out", "dx", "dy", "u", "du", "dx_out")
STREAMS += ("gate_logits", "s", "dgate_logits", "ds")
SCALARS = ("params", "alpha", "rows", "_shape")  # a few numbers in registers
HERE = {"lead": (5,), "n": 4, "C": 64}  # one pass, a token in registers
WIDE = {"lead": (2,), "n": 8, "C": 4096, "dtype": "float16"}  # backward: not in registers
TILED = HERE | {"n": 12}
LAYER = {"convention": ROW_FIRST}
TILES = HERE | {"lead": (16,), "convention": PAPER}
TOKENS = {"per_token": (True, True)}
RETURNS = Case("sinkhorn_knopp", (1,), 4, 4, convention=replace(ROW_FIRST, iters=100), scale=30.0)
# A case, then its launches in turn:
# loads of each element of an input, stores of each of an output; "in all" where elements differ.
# Apart, after the semicolon: weights and coefficients. The floor in rows is that of cases.py.
COUNTS = [
    Case("mhc_static", **HERE),
    "mhc_fused: x 1, out 1; H_pre 2, H_post 2, H_res 2, weight 5",
    "mhc_fused_backward: x 1, dout 1, dx 1; H_pre 2, H_post 2, H_res 2, weight 10, partial 1",
    "sum_partials: out 1; partial 1",
    Case("mhc_static", **WIDE),  # dweight keeps its running sum in partial
    "mhc_fused: x 1, out 1; H_pre 2, H_post 2, H_res 2, weight 2",
    "mhc_fused_backward: x 2, dout 2, dx 1; H_pre 1, H_post 1, H_res 1, weight 4, partial 8272 "
    "in all and 4096 loads",
    Case("mhc_static", **TILED),
    "mhc_fused: x 2, out 1; H_pre 2, H_post 2, H_res 2, weight 5",
    "mhc_fused_backward_wide: x 2, dout 2, dx 1; H_pre 1, H_post 1, H_res 1, weight 10, "
    "partial 488 in all and 256 loads",
    Case("stream_aggregate_norm", **HERE),
    "mhc_fused: x 1, out 1; H_pre 2, weight 5",
    "mhc_fused_backward: x 1, dout 1, dx 1; H_pre 2, weight 10, partial 1",
    "sum_partials: out 1; partial 1",
    Case("stream_aggregate_norm", **TILED),
    "mhc_fused: x 2, out 1; H_pre 2, weight 5",
    "mhc_fused_backward_wide: x 2, dout 2, dx 1; H_pre 1, weight 10, partial 332 in all and "
    "256 loads",
    Case("stream_mix_add", **HERE),
    "stream_mix_add: x 1, y 1, out 1; h_post 2, h_res 2",
    "mhc_fused_backward: x 1, y 1, dout 1, dx 1, dy 1; H_post 2, H_res 2, partial 1",
    "sum_partials: out 1; partial 1",
    Case("stream_mix_add", **HERE, **TOKENS),  # 16 threads: each reads its token's
    "stream_mix_add: x 1, y 1, out 1; h_post 16, h_res 16",
    "mhc_fused_backward: x 1, y 1, dout 1, dx 1, dy 1; H_post 1, H_res 1, dh_post 1, dh_res 1",
    Case("stream_mix_add", **TILED),
    "stream_mix_add: x 1, y 1, out 1; h_post 2, h_res 2",
    "mhc_fused_backward_wide: x 1, y 1, dout 1, dx 1, dy 1; H_post 1, H_res 1, partial 1",
    Case("stream_mix_add", **TILED, **TOKENS),
    "stream_mix_add: x 1, y 1, out 1; h_post 16, h_res 16",
    "mhc_fused_backward_wide: x 1, y 1, dout 1, dx 1, dy 1; H_post 1, H_res 1, dh_post 1, dh_res 1",
    Case("mhc_layer", **HERE, **LAYER),  # eight lots of lanes project the same matrix
    "mhc_fused: x 1, out 1; H_pre 2, H_post 2, H_res 16, weight 5",
    "mhc_fused_backward: x 1, dout 1, dx 1; H_pre 2, H_post 2, H_res 16, weight 10, partial 1",
    "sum_partials: out 1; partial 1, H_pre 1, H_post 1",
    "sinkhorn_knopp_backward: ; logits 96, dh_res 32, dlogits 1",
    Case("mhc_layer", **TILED, **LAYER),  # idle lanes read line 0 as well
    "sinkhorn_knopp: ; logits 1536 in all, h_res 1",
    "mhc_fused: x 2, out 1; H_pre 2, H_post 2, H_res 2, weight 5",
    "sinkhorn_knopp: ; logits 1536 in all, h_res 1",
    "mhc_fused_backward_wide: x 2, dout 2, dx 1; H_pre 1, H_post 1, H_res 1, weight 10, "
    "partial 488 in all and 256 loads",
    "sum_partials: out 1; partial 1, H_pre 1, H_post 1",
    "sinkhorn_knopp_backward: ; logits 4608 in all, dh_res 1536 in all, dlogits 1",
    Case("sinkhorn_knopp", (128,), 4, 4, **LAYER),
    "sinkhorn_knopp: ; logits 1, h_res 1",
    "sinkhorn_knopp_backward: ; logits 3, dh_res 1, dlogits 1",
    RETURNS,  # small elements are made of the logits again, now and then
    "sinkhorn_knopp: ; logits 1184 in all, h_res 1",
    "sinkhorn_knopp_backward: ; logits 5312 in all, dh_res 32, dlogits 1",
    Case("stream_aggregate", **HERE),
    "stream_aggregate: x 1, u 1; h_pre 2",
    "stream_aggregate_backward: x 1, du 1, dx 1; h_pre 2, partial 1",
    "sum_partials: out 1; partial 1",
    Case("stream_aggregate", **HERE, per_token=(True, False)),
    "stream_aggregate: x 1, u 1; h_pre 16",
    "stream_aggregate_backward: x 1, du 1, dx 1; h_pre 1, dh_pre 1",
    Case("gate_mix", **HERE),
    "gate_mix: gate_logits 1, s 1, u 1; ",
    "gate_mix_backward: gate_logits 1, s 1, du 1, dgate_logits 1, ds 1; ",
    Case("gate_mix", **HERE | {"lead": (2,), "C": 2000}),  # eight parts of a token, 500 packs
    "gate_mix: gate_logits 1, s 1, u 1; ",
    "gate_mix_backward: gate_logits 1, s 1, du 1, dgate_logits 1, ds 1; ",
    # Sixteen tokens. mhc_pre: two tiles of eight share a fetch of phi. x: for each block of up to
    # 24 outputs, and for u, from the cache: twice with a norm. Rows past the last output or token
    # are the first again. Its backward by products of matrices: x is read for dh_pre, then once for
    # dx and dphi. A stream reads du, each of two threadgroups of four spans of 32 channels dp and
    # side. One token at a time fills one of eight places for matrices, which all read it; a line
    # reads its logits (l and bias) for each of five segments of eight half-steps, and twice at the
    # end. The eight lanes past the last output read dh_pre of the first.
    Case("mhc_coefficients", **TILES),
    "mhc_pre: x 1; phi 1, bias 16, h_pre 1, h_post 1, h_res 1, l 1",
    "mhc_pre_backward_coefficients: x 0; bias 4224 in all, l 5120 in all, dh_post 1, dh_pre 192 "
    "in all, dh_res 1024 in all, token_factors 1, dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, dx 1; phi 1, dp 2, token_factors 2, partial 1",
    "sum_partials: out 1; partial 1",
    Case("mhc_pre", **TILES, norm=False),
    "mhc_pre: x 2, u 1; phi 1, bias 16, h_post 1, h_res 1, l 1",
    "mhc_pre_backward_coefficients: x 1, du 1; bias 4224 in all, l 5120 in all, dh_post 1, "
    "dh_res 1024 in all, token_factors 1, dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, du 4, dx_out 1, dx 1; phi 1, dp 2, token_factors 2, "
    "partial 1",
    "sum_partials: out 1; partial 1",
    # Of more than 32 outputs: four tiles of four tokens, each a fetch of phi; two threadgroups,
    # each with a running sum. x: for dh_pre, and for dx, both twice with a norm. du: for both.
    # bias: of the gates. l: a gate's for z, dalpha and pull, another's but for z; the last, the
    # token's norm, for the dp of each output and for pull. Sixteen times 16 * 3 + 64 * 2 + 80 + 1
    # is 4112. dphi: four blocks of 20 outputs read x, two spans of 256 k dp.
    Case("mhc_coefficients", **TILES | {"n": 8}),
    "mhc_pre: x 4; phi 49152 in all, bias 16, h_pre 1, h_post 1, h_res 1, l 1",
    "sinkhorn_knopp_backward: ; logits 3, dh_res 1, dlogits 1",
    "mhc_pre_backward_generic: x 1, dx 1; phi 4, bias 256 in all, l 4112 in all, dz_res 1, "
    "dh_post 1, dh_pre 1, dp 1, partial 2 and 320 loads",
    "mhc_pre_backward_phi: x 4; dp 2, partial 1",
    "sum_partials: out 1; partial 1",
    # Tiles of sixteen.
    Case("mhc_pre", **TILES | {"dtype": "bfloat16"}, norm=False),
    "mhc_pre: x 2, u 1; phi 1, bias 16, h_post 1, h_res 1, l 1",
    "mhc_pre_backward_coefficients: x 1, du 1; bias 4224 in all, l 5120 in all, dh_post 1, "
    "dh_res 1024 in all, token_factors 1, dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, du 4, dx_out 1, dx 1; phi 1, dp 2, token_factors 2, "
    "partial 1",
    "sum_partials: out 1; partial 1",
    Case("mhc_pre", **TILES | {"dtype": "bfloat16"}),  # u is kept for its norm, du' is written
    "mhc_pre: x 2, u 1; phi 1, bias 16, weight 16, h_post 1, h_res 1, l 1",
    "mhc_pre_backward_coefficients_norm: x 1, du 2; bias 4224 in all, l 5120 in "
    "all, dh_post 1, weight 32, dh_res 1024 in all, token_factors 1, dread 1, dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, du 4, dx_out 1, dx 1; phi 1, dp 2, token_factors 2, "
    "partial 1",
    "sum_partials: out 1; partial 1",
    # With a norm float32 is made as more outputs are. 32 outputs: blocks of 16.
    Case("mhc_pre", **TILES | {"convention": MHC_LITE}),
    "mhc_pre: x 3, u 1; phi 1, bias 16, weight 16, h_post 1, logits 1, l 1",
    "mixing_matrix: ; logits 8, h_res 1",
    "mixing_matrix_backward: ; logits 3, dh_res 3136 in all, dlogits 1",
    # weight for dh_pre of each of sixteen tokens, for dx of each of four tiles
    "mhc_pre_backward_generic: x 4, du 2, dx_out 1, dx 1; phi 4, bias 128 in all, l "
    "1680 in all, dz_res 1, dh_post 1, weight 20, dp 1, partial 2 and 256 loads",
    "mhc_pre_backward_phi: x 2; dp 1, partial 1",  # 32 outputs in two halves
    "sum_partials: out 1; partial 1",
    Case("mhc_head", **TILES),
    "mhc_pre: x 2, u 1; phi 2048 in all, bias 16, l 1",
    "mhc_pre_backward_coefficients: x 1, du 1; bias 128 in all, l 1024 in all, token_factors 1, "
    "dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, du 4, dx 1; phi 1, dp 2, token_factors 2, partial 1",
    "sum_partials: out 1; partial 1",
    # Five tokens. Two threadgroups share a tile: x for 24 outputs, for 16, and by one for u.
    # Backward, both make gates, dh_pre and pull: twice all that these read. dx: half by each.
    # dphi: two halves of the outputs read x, 32 spans of 256 k read dp.
    Case("mhc_pre", (5,), 16, 512, convention=KRONECKER, norm=False),
    "mhc_pre: x 172032 in all, u 1; phi 393216 in all, bias 5, h_post 1, logits 1, l 1",
    "mixing_matrix: ; logits 256, h_res 1",
    "mixing_matrix_backward: ; logits 1024, dh_res 4, dlogits 1",
    "mhc_pre_backward_generic: x 3, du 3, dx_out 1, dx 1; phi 3, bias 320 in all, l 1530 in "
    "all, dz_res 2, dh_post 2, dp 1, partial 3 and 160 loads",
    "mhc_pre_backward_phi: x 2; dp 32, partial 1",
    # Two tokens. Eight rows of a tile are projected; then x is read once more, since a lane
    # keeps u for its norm, be it one pack. Backward: x and du for dh_pre and dx, x twice each.
    Case("mhc_pre", (2,), 12, 8, convention=IDENTITY),
    "mhc_pre: x 960 in all, u 1; phi 1, bias 2, weight 2, h_post 1, l 1",
    "mhc_pre_backward_generic: x 4, du 2, dx_out 1, dx 1; phi 1, bias 2, l 194 in "
    "all, dh_post 1, weight 3, dp 1, partial 1",
    "mhc_pre_backward_phi: x 1; dp 1, partial 1",
    Case("mhc_seam", **HERE, **TOKENS),
    "mhc_seam: x 1, y 1, out 1, u 1; h_pre 1, h_post 1, h_res 1, weight 5",
    "mhc_seam_backward: x 1, y 1, dout 1, du 1, dx 1, dy 1; h_pre 1, h_post 1, h_res 1, weight "
    "10, dh_pre 1, dh_post 1, dh_res 1, partial 1",
    "sum_partials: out 1; partial 1",
    Case("mhc_seam", (2,), 4, 1280, **TOKENS),  # two passes: the second read from the cache
    "mhc_seam: x 1, y 1, out 1, u 1; h_pre 1, h_post 1, h_res 1, weight 2",
    "mhc_seam_backward: x 2, y 2, dout 1, du 2, dx 1, dy 1; h_pre 1, h_post 1, h_res 1, weight "
    "4, dh_pre 1, dh_post 1, dh_res 1, partial 2 and 1280 loads",
    Case("stream_norm", **HERE, **TOKENS),  # 16 threads: each reads its token's h_post and roots
    "stream_norm: x 1, y 1, out 1, s 1; h_post 16, weight 5, inject 5, next_post 1, roots 1, "
    "post_logits 1",
    "stream_norm_backward: x 1, ds 1, dout 1, y 1, dx 1, dy 1; roots 16, weight 5, inject 5, "
    "h_post 16, dnext_post 1, post_logits 1, dh_post 1, dlogits 1",
    "stream_norm_backward_weights: x 1, ds 1; roots 16, weight 1, inject 1, dlogits 64, partial 1",
    # Tiles of two tokens share weight and inject. The last token fills a tile alone: it is read in
    # both places.
    Case("stream_norm", **HERE | {"lead": (7,), "dtype": "bfloat16"}, **TOKENS),
    "stream_norm: x 2048 in all, y 512 in all, out 1, s 1; h_post 256 in all, weight 4, inject 4, "
    "next_post 1, roots 1, post_logits 1",
    "stream_norm_backward: x 1, ds 1, dout 1, y 1, dx 1, dy 1; roots 8, weight 7, inject 7, "
    "h_post 8, dnext_post 1, post_logits 1, dh_post 1, dlogits 1",
    "stream_norm_backward_weights: x 1, ds 1; roots 16, weight 1, inject 1, dlogits 64, partial 1",
    Case("stream_norm", **HERE, write_back=False, inject=False),
    "stream_norm: x 1, s 1; weight 5, roots 1",
    "stream_norm_backward: x 1, ds 1, dout 1, dx 1; roots 16, weight 5",
    "stream_norm_backward_weights: x 1, ds 1; roots 16, partial 1",
    Case("stream_norm", **TILED),  # three blocks of four streams
    "stream_norm: x 1, y 3, out 1, s 1; h_post 80, weight 5, inject 5, next_post 1, roots 1, "
    "post_logits 1",
    "stream_norm_backward: x 2, ds 2, dout 1, y 1, dx 1, dy 1; roots 16, weight 10, inject 10, "
    "h_post 80, dnext_post 1, post_logits 1, partial 1, dlogits 1",
    "sum_partials: out 1; partial 1",
    "stream_norm_backward_weights: x 2, ds 2; roots 64, weight 2, inject 1, dlogits 384, partial 1",
    # Two tokens, a threadgroup each. Last, without a gradient: a sublayer in two launches.
    Case("mhc_pre", **TILES | {"lead": (2,)}, norm=False),
    "mhc_pre_partial_logits: x 2048 in all; phi 1, partial_logits 1",
    "mhc_seam: x 1, u 1; partial_logits 1, bias 2, new_h_post 1, new_h_res 1, l 1",
    "mhc_pre_backward_coefficients: x 1, du 1; bias 640 in all, l 640 in all, dh_post 1, dh_res "
    "128 in all, token_factors 1, dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, du 4, dx_out 1, dx 1; phi 1, dp 2, token_factors 2, "
    "partial 1",
    "sum_partials: out 1; partial 1",
    Case("mhc_single_pass", **TILES | {"lead": (2,)}),
    "mhc_pre_partial_logits: x 2048 in all; phi 1, partial_logits 1",
    "mhc_seam: x 0; partial_logits 1, bias 2, new_h_pre 1, new_h_post 1, new_h_res 1, l 1",
    "mhc_seam: x 1, y 1, out 1, u 1; h_pre 1, h_post 1, h_res 1, weight 2",
    "mhc_seam_backward: x 1, y 1, dout 1, du 1, dx 1, dy 1; h_pre 1, h_post 1, h_res 1, weight "
    "4, dh_pre 1, dh_post 1, dh_res 1, partial 1",
    "sum_partials: out 1; partial 1",
    "mhc_pre_backward_coefficients: x 0; bias 640 in all, l 640 in all, dh_post 1, dh_pre 24 in "
    "all, dh_res 128 in all, token_factors 1, dp 1, partial 1",
    "mhc_pre_backward_projection: x 1, dx_out 1, dx 1; phi 1, dp 2, token_factors 2, partial 1",
    "sum_partials: out 1; partial 1",
    "mhc_pre_partial_logits: x 2048 in all; phi 1, partial_logits 1",
    "mhc_seam: x 1, y 1, out 1, u 1; weight 2, partial_logits 1, bias 2, new_h_pre 1",
]
STARTS = [k for k, row in enumerate(COUNTS) if isinstance(row, Case)] + [len(COUNTS)]
PINNED = [COUNTS[k:end] for k, end in itertools.pairwise(STARTS)]


def words(record: simulator.Record) -> str:
    """A launch as a line of PINNED."""

    def count(b: simulator.Watched) -> str:
        counts = b.stores if b.output else b.loads
        text = f"{counts[0]}" if counts.min() == counts.max() else f"{counts.sum()} in all"
        return text + f" and {b.loads.sum()} loads" * bool(b.output and b.loads.any())

    counts = {k: f"{k} {count(b)}" for k, b in record.buffers.items() if not k.endswith(SCALARS)}
    streams = ", ".join(v for k, v in counts.items() if k in STREAMS)
    return f"{record.name}: {streams}; " + ", ".join(
        v for k, v in counts.items() if k not in STREAMS
    )


def launches(case: Case) -> list[simulator.Record]:
    given = [a for a in case.arrays() if a is not None]
    with executor("simulator"), simulator.recording() as records:
        results(getattr(ops, case.op), case, given)
    return records


@pytest.mark.parametrize("case, lines", [(c, lines) for c, *lines in PINNED], ids=str)
def test_loads_and_stores(case, lines, need):
    need("simulator")
    assert [words(r) for r in launches(case)] == lines


def rows(records: list[simulator.Record], size: int, once: bool) -> float:
    """How many rows launches move, where all tokens have `size` elements of a row: each time, or
    each array once."""
    moved: dict[str, int] = {}
    for name, b in [item for record in records for item in record.buffers.items()]:
        if name != "partial" and b.array.size and b.array.size % size == 0:
            count, before = int((b.loads + b.stores).sum()), moved.get(name, 0)
            moved[name] = max(before, min(count, b.array.size)) if once else before + count
    return sum(moved.values()) / size


@pytest.mark.parametrize("op", [op for op in FUSED if OPS[op].rows])
@pytest.mark.parametrize("C, dtype", [(1024, "bfloat16"), (129, "float32")])
def test_rows_of_design(op, C, dtype, need):
    """Rows of C elements per token at n = 4, ragged or not: the floor of cases.py, exactly. Ops
    whose tokens make logits read x again for what they read with these, from the cache, and in the
    next launch: of these each array counts once, and mhc_single_pass, which has x twice in its
    floor, may stay below it."""
    need("simulator")
    convention = PAPER if "convention" in OPS[op].statics else None
    records = launches(Case(op, (5,), 4, C, dtype, convention, norm=op not in PROJECTED))
    backward = [r for r in records if "backward" in r.name]
    forward = [r for r in records if "backward" not in r.name]
    moved = [rows(of, 5 * C, op in OF_LOGITS) for of in (forward, backward)]
    floor = OPS[op].rows(4)
    floor = [sum(floor[:2]), sum(floor[2:])]
    below = op == "mhc_single_pass" and moved[0] <= floor[0] and moved[1] <= floor[1]
    assert moved == floor or below, (moved, floor)
