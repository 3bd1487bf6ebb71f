"""How many threadgroups each body of an op has, of many tokens and of few."""

import math

from mhc_mlx import PAPER, ROW_FIRST, launch
from mhc_mlx.conventions import KRONECKER, MHC_LITE
from mhc_mlx.devices import APPLE
from mhc_mlx.ops import tiling
from ops.test_limits import called
from ops.test_tiling import BF16

# Threadgroups of each body at 262,144 tokens of 64 channels: of 4 streams, of 12. Small ones read
# little before their first token: 65,536. Those that leave a row of sums: 132 * 512 threads in all.
MANY = 1 << 18
PROJECTED = {"sinkhorn_knopp": 1, "sinkhorn_knopp_backward": 1}
LAUNCHES = {
    ("sinkhorn_knopp", 4): {"sinkhorn_knopp": 8192, "sinkhorn_knopp_backward": 8192},  # 32 matrices
    # of 16 lanes: eight
    ("sinkhorn_knopp", 12): {"sinkhorn_knopp": 32768, "sinkhorn_knopp_backward": 32768},
    ("stream_aggregate_norm", 4): {"mhc_fused": 4096, "mhc_fused_backward": 2112},
    ("stream_aggregate_norm", 12): {"mhc_fused": 4096, "mhc_fused_backward_wide": 264},
    ("stream_mix_add", 4): {"stream_mix_add": 65536, "mhc_fused_backward": 2112},
    ("stream_mix_add", 12): {"stream_mix_add": 65536, "mhc_fused_backward_wide": 264},
    ("mhc_layer", 4): PROJECTED | {"mhc_fused": 4096, "mhc_fused_backward": 2112},
    ("mhc_layer", 12): PROJECTED | {"mhc_fused": 4096, "mhc_fused_backward_wide": 264},
    ("stream_aggregate", 4): {"stream_aggregate": 65536, "stream_aggregate_backward": 2112},
    ("stream_aggregate", 12): {"stream_aggregate": 65536, "stream_aggregate_backward": 2112},
    ("gate_mix", 4): {"gate_mix": 65536, "gate_mix_backward": 65536},
    ("mhc_pre", 4): {"mhc_pre": 16384, "mhc_pre_backward_coefficients_norm": 2112}
    | {"mhc_pre_backward_projection": 528},
    ("mhc_pre", 12): {"mhc_pre": 16384, "sinkhorn_knopp": 32768, "sinkhorn_knopp_backward": 32768}
    # 3 spans of 7 parts, 26 chunks
    | {"mhc_pre_backward_generic": 2112, "mhc_pre_backward_phi": 546},
    ("mhc_seam", 4): {"mhc_seam": 65536, "mhc_seam_backward": 2112},
    ("mhc_seam", 12): {"mhc_seam": 65536, "stream_mix_add": 65536}
    | {"mhc_fused_backward_wide": 65536},
}


def launches(op: str, tokens: int, n: int, **options) -> list[launch.Launch]:
    with launch.record() as found:
        options = {"convention": PAPER, "per_token": False} | options
        called(op, tokens, n, n if op == "sinkhorn_knopp" else 64, BF16, **options)
    return found


def test_threadgroups_of_many_tokens():
    for (op, n), want in LAUNCHES.items():
        found = launches(op, MANY, n)
        got = {one.name: one.groups for one in found if one.name != "sum_partials"}
        assert got == want, f"{op} of {n} streams"
        for one in (one for one in found if one.name == "sum_partials"):
            rows, columns = one.inputs["partial"][0]
            lines = tiling.threads_per_column(rows, columns, APPLE)
            assert one.groups == math.ceil(columns * lines / 256) and one.threads == 256
    for op, tokens in (("sinkhorn_knopp", 1 << 22), ("mhc_pre", 1 << 21)):  # no more than 65,536
        assert max(one.groups for one in launches(op, tokens, 4)[:1]) == 1 << 16
    for op in ("stream_mix_add", "stream_aggregate"):  # gradients per token: no sums to add
        *_, last = launches(op, MANY, 4, per_token=True)
        assert last.name.endswith("backward") and last.groups == 1 << 16
    for tokens, count in ((1024, 0), (1025, 1)):  # who projects H_res
        names = [one.name for one in launches("mhc_layer", tokens, 4, convention=ROW_FIRST)]
        assert names[: names.index("mhc_fused")] == ["sinkhorn_knopp"] * count


# op, tokens, n, convention: as many threadgroups as there is work for; more would be idle
FEW = {
    # runs of 32 k of 8 tokens by four simdgroups: 8 runs are two threadgroups; 9 tokens two tiles
    ("mhc_pre", 2, 4, PAPER): {"mhc_pre_partial_logits": 2, "mhc_seam": 2}
    | {"mhc_pre_backward_coefficients_norm": 1, "mhc_pre_backward_projection": 2},
    ("mhc_head", 9, 4, PAPER): {"mhc_pre_partial_logits": 4, "mhc_seam": 9}
    # a simdgroup two tokens, or a span
    | {"mhc_pre_backward_coefficients": 2, "mhc_pre_backward_projection": 2},
    # tiles of 8; backward with a norm two tokens each
    ("mhc_pre", 72, 4, PAPER): {"mhc_pre": 9}
    | {"mhc_pre_backward_coefficients_norm": 36, "mhc_pre_backward_projection": 2},
    # tiles of 16, each shared by four; 8 matrices; tiles of two; 3 spans of 7 parts
    ("mhc_pre", 40, 12, PAPER): {"mhc_pre": 12, "sinkhorn_knopp": 5, "sinkhorn_knopp_backward": 5}
    | {"mhc_pre_backward_generic": 20, "mhc_pre_backward_phi": 21},
    # of matrices a thread takes a row, backward all
    ("mhc_pre", 72, 3, MHC_LITE): {"mhc_pre": 9, "mixing_matrix": 2, "mixing_matrix_backward": 1}
    | {"mhc_pre_backward_coefficients_norm": 36, "mhc_pre_backward_projection": 2},
    ("mhc_pre", 72, 8, KRONECKER): {"mhc_pre": 9, "mixing_matrix": 5, "mixing_matrix_backward": 1}
    | {"mhc_pre_backward_coefficients_norm": 72, "mhc_pre_backward_projection": 4},
    ("sinkhorn_knopp", 40, 4, PAPER): {"sinkhorn_knopp": 2, "sinkhorn_knopp_backward": 2},
    ("stream_mix_add", 40, 4, PAPER): {"stream_mix_add": 40, "mhc_fused_backward": 40},
    ("mhc_static", 40, 12, PAPER): {"mhc_fused": 40, "mhc_fused_backward_wide": 40},
    ("mhc_seam", 40, 4, PAPER): {"mhc_seam": 40, "mhc_seam_backward": 40},
    ("stream_aggregate", 40, 4, PAPER): {"stream_aggregate": 40, "stream_aggregate_backward": 40},
    ("gate_mix", 40, 4, PAPER): {"gate_mix": 40, "gate_mix_backward": 40},
}


def test_threadgroups_of_few_tokens():
    for (op, tokens, n, convention), want in FEW.items():
        found = launches(op, tokens, n, convention=convention)
        got = {one.name: one.groups for one in found if one.name != "sum_partials"}
        assert got == want, f"{op} of {tokens} tokens, {n} streams"
