"""The main shapes: what benchmark.py and the report of a device measure."""

from .suite import LARGE, OPS, TARGETS

Shape = tuple[int, int, int]  # tokens, n, C

# The table of benchmark.py, by op.
USUAL: list[Shape] = [(16384, 4, 1024)]
TABLE: dict[str, list[Shape]] = {
    "mhc_static": [(16384, 4, 1024), (8192, 8, 1024), (64, 32, 1280)],
    "mhc_layer": [(320, 4, 1280)],
    "stream_mix_add": USUAL,
    "sinkhorn_knopp": [(65536, 4, 4)],
    **dict.fromkeys((*TARGETS, "mhc_pre_norm"), LARGE),
}
TABLE |= {op: USUAL for op in OPS if op not in TABLE}
FLOAT32_TOO = ("mhc_static",)  # the table has float32 of these
DECODE: list[Shape] = [(T, 4, C) for C in (4096, 5120, 7168) for T in (1, 2, 4, 8, 16)]
