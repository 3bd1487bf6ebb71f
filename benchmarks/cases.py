"""Options choose the cases that are measured: shapes of the table and of the other modes."""

import argparse
import math

from benchmarks import options
from mhc_mlx import launch
from mhc_mlx.commands import memory
from mhc_mlx.device_report.parity import needed_bytes
from mhc_mlx.device_report.shapes import DECODE, FLOAT32_TOO, TABLE
from mhc_mlx.device_report.suite import DIRECTIONS, DTYPES, OPS, mandatory_bytes
from mhc_mlx.device_report.timing import array_limit

SEEDS = [(320, 4, 1280), (512, 4, 1920), (1280, 4, 2560), (2560, 4, 1280), (128, 8, 1280)]
SEEDS += [(256, 8, 1280), (32, 32, 1280), (64, 32, 1280), (128, 32, 1280), (128, 4, 1280)]
SEEDS += [(256, 4, 1280), (512, 4, 2560), (1024, 4, 1920), (1024, 4, 2560), (65536, 4, 1024)]
SEEDS += [(16384, 4, 1024), (16384, 4, 4096), (8192, 8, 1024), (8192, 12, 1024)]
MATRICES = ((1, 4), (1, 8), (1, 16), (65536, 4), (8192, 8), (4096, 16), (1, 64))
PRESETS = {
    "seeds": {
        "mhc_static": SEEDS,
        "mhc_layer": SEEDS[:14],
        "stream_mix_add": SEEDS,
        "stream_aggregate_norm": SEEDS,
        "mhc_dynamic": SEEDS[:17],
        "sinkhorn_knopp": [(B, n, n) for B, n in MATRICES],
    }
}
# --sizes takes these C by n, tokens and ops.
GRID = {4: (1024, 1280, 2560, 4096, 5120, 7168), 2: (1024, 4096), 8: (1024, 4096), 16: (1024, 4096)}
TOKENS = [4**k for k in range(9)]
GROWING = ("stream_mix_add_per_token", "mhc_pre", "sublayer")
STACKS = ("sublayer", "single_pass")
OVERHEAD = [(1, 4, 4096), (16384, 4, 1024)]
REFERENCE_TOKENS = 256  # without kernels a shape has no more, because a CPU is slow


def table_cases(args: argparse.Namespace) -> list[tuple]:
    table = PRESETS[args.preset] if args.preset else TABLE
    if args.shape:
        shapes = [tuple(int(v) for v in s.split(",")) for s in args.shape]
        square = [s for s in shapes if s[1] == s[2]]
        table = {op: square if op == "sinkhorn_knopp" else shapes for op in args.op or table}
        if not table.get("sinkhorn_knopp", True):
            if args.op:
                got = " ".join(args.shape)
                raise ValueError(f"--shape must be B,n,n for sinkhorn_knopp but is {got}")
            print("left out: sinkhorn_knopp, whose shapes are B,n,n")

    def dtypes(op):
        if args.dtype or op == "sinkhorn_knopp":
            return args.dtype or ["float32"]
        return ["bfloat16", "float32"] if args.preset or op in FLOAT32_TOO else ["bfloat16"]

    chosen = [op for op in table if not args.op or op in args.op]
    return [(op, s, name) for op in chosen for s in table[op] for name in dtypes(op)]


def sizes_cases(args: argparse.Namespace) -> list[tuple]:
    grid = [(op, n, C) for op in args.op or GROWING for n in GRID for C in GRID[n]]
    grid = [(op, n, C) for op, n, C in grid if op != "sinkhorn_knopp"]  # its matrices have no C
    names = args.dtype or ["bfloat16"]
    every = [(op, (T, n, C), name) for op, n, C in grid for T in TOKENS for name in names]
    return [  # MLX's own random numbers take fewer than 2**31
        (op, s, name)
        for op, s, name in every
        if math.prod(s) < 2**31 and mandatory_bytes(op, "forward", s, DTYPES[name]) < array_limit()
    ]


def decode_cases(args: argparse.Namespace) -> list[tuple]:
    stacks = [op for op in STACKS if not args.op or op in args.op]
    return [(op, s, name) for op in stacks for s in DECODE for name in args.dtype or ["bfloat16"]]


def overhead_cases(args: argparse.Namespace) -> list[tuple]:
    return [("sublayer", shape, name) for shape in OVERHEAD for name in args.dtype or ["bfloat16"]]


CASES = {"rows": table_cases, "sizes": sizes_cases, "decode": decode_cases}
CASES |= {"overhead": overhead_cases}


def directions(args: argparse.Namespace, section: str) -> list[str]:
    """Return the directions that a section times, of ops that have them."""
    forward_only = section != "rows" or not (launch.backend() or args.verify)
    return args.direction or (["forward"] if forward_only else list(DIRECTIONS))


def fitting(cases: list[tuple], refuse: bool, gradients: bool) -> list[tuple]:
    """Return the cases that fit in memory, on a CPU with fewer tokens; name or refuse the
    others."""
    cut = (lambda B: B) if launch.backend() else (lambda B: min(B, REFERENCE_TOKENS))
    cases = list(dict.fromkeys((op, (cut(s[0]), *s[1:]), name) for op, s, name in cases))
    needed = {(op, s, name): needed_bytes(op, s, DTYPES[name], gradients) for op, s, name in cases}
    for (op, shape, name), size in needed.items():
        if size > memory():
            text = f"{','.join(map(str, shape))} needs {size / 2**30:.1f} GiB for {op} in {name}, "
            text += f"and this device has {memory() / 2**30:.1f} GiB"
            if refuse:
                raise ValueError(f"--shape {text}")
            print(f"left out: {text}")
    return [case for case in cases if needed[case] <= memory()]


def choose(args: argparse.Namespace) -> dict[str, list[tuple]]:
    """Return by section of the result (op, shape, dtype) of what to measure.

    Raises:
        ValueError: An op, a shape or a direction that is named gives nothing to measure.
    """
    named = args.op or []
    chosen = {section: CASES[section](args) for section in options.sections(args)}
    for section, cases in chosen.items():
        for op in named:
            if op not in [case[0] for case in cases]:
                where = f"--preset {args.preset}" if args.preset else f"--{section}"
                raise ValueError(f"--op {op} does nothing with {where}")
    timed = not (args.verify or args.once)
    for op in named if args.direction == ["backward"] and timed else []:
        if OPS[op].saves:
            must = "must be forward+backward for an op whose forward saves for its gradients"
            raise ValueError(f"--direction {must} but is backward for --op {op}")
    for section in chosen:
        gradients = any(direction != "forward" for direction in directions(args, section))
        chosen[section] = fitting(chosen[section], bool(args.shape), gradients)
        if not chosen[section]:
            raise ValueError(f"nothing is left to measure of {section}: no shape fits")
    return chosen
