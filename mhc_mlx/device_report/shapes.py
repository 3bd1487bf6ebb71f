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
QWEN: list[Shape] = [(T, 4, 2560) for T in (1, 8, 512, 2048, 8192)]
TABLE |= dict.fromkeys(("stream_norm", "stream_norm_write_back", "gate_mix"), QWEN)
TABLE |= {op: USUAL for op in OPS if op not in TABLE}
FLOAT32_TOO = ("mhc_static",)  # the table has float32 of these
DECODE: list[Shape] = [(T, 4, C) for C in (4096, 5120, 7168) for T in (1, 2, 4, 8, 16)]

# The report of a device, most important first: sites of DeepSeek V4 and V4.1, a shape of other
# dtypes, and other numbers of streams.
SITES: list[Shape] = [(T, 4, C) for C in (4096, 5120, 7168, 2048) for T in (1, 8, 512, 2048)]
OTHER_DTYPES: list[Shape] = [(T, 4, 4096) for T in (1, 2048)]
OTHER_STREAMS: list[Shape] = [(T, n, 4096) for n in (2, 8, 16) for T in (1, 2048)]
TINY: list[Shape] = [(2, 2, 8)]  # where the reference runs alone, because a CPU is slow

# Op, direction, shape, dtype. Besides suite.DIRECTIONS there is "inference", a forward that saves
# nothing for gradients (differentiable=False).
Case = tuple[str, str, Shape, str]
SITE_OPS = ("single_pass", "mhc_pre", "mhc_head", "sublayer")
TIMED_SITES: list[Shape] = [(T, 4, C) for C in (4096, 7168) for T in (1, 512, 2048)]
TIMED_OPS = ("single_pass", "mhc_pre", "stream_mix_add_per_token", "stream_aggregate", "mhc_static")
DECODED: list[Shape] = [(1, 4, 5120), (1, 4, 4096), (1, 4, 7168)]


def case(op: str, direction: str, shape: Shape, name: str) -> Case:
    """Return a case; that of sinkhorn_knopp has matrices in place of channels."""
    T, n, C = shape
    return op, direction, (T, n, n if op == "sinkhorn_knopp" else C), name


def variant_cases(kernels: bool) -> list[Case]:
    """Return the calls whose kernels the report compiles, each once."""
    shapes = [("bfloat16", s) for s in SITES] if kernels else [("bfloat16", s) for s in TINY]
    if kernels:
        shapes += [(name, s) for name in ("float32", "float16") for s in OTHER_DTYPES]
        shapes += [("bfloat16", s) for s in OTHER_STREAMS]
    sites_first = [*SITE_OPS, *(op for op in OPS if op not in SITE_OPS)]
    directions = ("inference", "forward", "forward+backward")
    found = [case(op, d, s, name) for name, s in shapes for op in sites_first for d in directions]
    return list(dict.fromkeys(found))


def parity_cases(kernels: bool) -> list[Case]:
    """Return the calls whose results and gradients the report compares with the reference."""
    if not kernels:
        return [case(op, "forward+backward", s, "float32") for op in OPS for s in TINY]
    shapes = [(name, s) for name in ("bfloat16", "float32", "float16") for s in OTHER_DTYPES]
    shapes += [("bfloat16", s) for s in OTHER_STREAMS]
    found = [(op, "inference", s, "bfloat16") for op in SITE_OPS for s in SITES[:4]]
    found += [case(op, "forward+backward", s, name) for name, s in shapes for op in OPS]
    return list(dict.fromkeys(found))


def timed_cases(kernels: bool) -> list[Case]:
    """Return the calls that the report times beside the reference."""
    if not kernels:
        return [case(op, "forward", s, "float32") for op in TIMED_OPS for s in TINY]
    both = ("forward", "forward+backward")
    found = [(op, d, s, "bfloat16") for d in both for op in TIMED_OPS for s in TIMED_SITES]
    small = [entry for entry in found if entry[1] == "forward" or entry[2][0] > 1]
    return small  # nobody trains on a single token


def decode_cases(kernels: bool) -> list[Case]:
    """Return the rows of sublayers that the report times at one token."""
    shapes = DECODED if kernels else [(1, *s[1:]) for s in TINY]
    name = "bfloat16" if kernels else "float32"
    return [(op, "forward", s, name) for op in ("single_pass", "sublayer") for s in shapes]
