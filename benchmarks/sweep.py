"""An op runs for a profiler, or in a sweep of its tilings."""

import mlx.core as mx

from benchmarks.report import show
from mhc_mlx import launch, ops
from mhc_mlx.device_report import suite
from mhc_mlx.device_report.measure import Bench
from mhc_mlx.device_report.parity import verify
from mhc_mlx.device_report.suite import DIRECTIONS, DTYPES, OPS, function, make_inputs
from mhc_mlx.device_report.timing import directed
from mhc_mlx.devices import Device

# The loads of these do not follow `tiling.token_tiling`, so a sweep tries their threads alone.
THREADS_ALONE = [(op, d) for op in ("sinkhorn_knopp", "gate_mix") for d in DIRECTIONS]
THREADS_ALONE += [("mhc_seam", "backward")]


def launch_twice(op: str, shape, name: str, directions: list[str], threads: int | None) -> None:
    """Run each direction twice, the second time compiled and allocated, for a profiler that counts
    each launch."""
    f, inputs = function(ops, op, threads_per_group=threads), make_inputs(op, shape, DTYPES[name])
    arrays = suite.add_cotangents(op, "forward+backward", inputs)
    mx.eval(arrays)
    for direction in directions:
        run = directed(f, direction, len(inputs))
        for _ in range(2):
            mx.eval(run(*arrays))


def sweep(bench: Bench, op: str, shape, name: str, verified: list[dict]) -> list[dict]:
    """Try threads per group x vector width, or threads alone of an op that has another rule for its
    loads; mark the best and what the default picks. Each is timed if its parity is right."""
    rows, usual = [], ops.tiling.token_tiling
    for direction in ("forward", "forward+backward" if OPS[op].saves else "backward"):
        candidates = [(None, threads, None) for threads in (None, 32, 64, 128, 160, 256, 320, 512)]
        if (op, direction) not in THREADS_ALONE and not OPS[op].saves:
            copies = 1 if direction == "forward" else 2
            size, device = DTYPES[name].size, launch.device()
            chosen = usual(shape[1], shape[2], size, copies, None, device)
            candidates = list(tilings(*shape[1:], size, copies, device, chosen))
        timed = []
        for vec, threads, tiling in candidates:
            ops.tiling.token_tiling = (lambda *_, tiling=tiling, **__: tiling) if tiling else usual
            try:
                verified += verify("rows", op, shape, name, [direction], threads)
                if not verified[-1]["ok"]:
                    continue
                row = bench.row(op, direction, shape, name, threads, baseline=False)
            finally:
                ops.tiling.token_tiling = usual
            picked = (vec, threads) == (chosen.vec, chosen.threads) if vec else threads is None
            timed.append(row | {"vec": vec, "default": picked})
        print_sweep(timed)
        rows += timed
    return rows


def print_sweep(rows: list[dict]) -> None:
    for row in rows:
        best = row is min(rows, key=lambda r: r["us"])
        mark = " <- best" * best + " <- default" * row["default"]
        threads = row["threads_per_group"] or "its own"
        print(f"vec {row['vec']} threads {threads:>7} {show(row)}{mark}", flush=True)


def tilings(n: int, C: int, size: int, copies: int, device: Device, chosen):
    """Yield vector width, threads and `Geometry` of what a sweep tries."""
    for vec in (1, 2, 4, 8):
        for threads in (32, 64, 128, 160, 256, 512):
            if C % vec or vec * size > 16 or vec * n > 64:
                continue
            passes = -(-C // (vec * threads))
            if threads > 32 and (threads - 32) * vec >= C or passes > 16:
                continue
            registers = passes * copies * n * (max(4, vec * size) if copies == 1 else 4 * vec)
            most = device.forward_register_bytes if copies == 1 else device.backward_register_bytes
            cached = n <= 8 and registers <= most
            yield (
                vec,
                threads,
                chosen._replace(vec=vec, threads=threads, passes=passes, cached=cached),
            )
