"""Measure every op: `op direction dtype shape | us | GB/s | % of copy | x compiled reference`.

Bytes are the fewest that an op can move (inputs read once, outputs written once; coefficients are
noise), and the roof is `mx.abs` moving as many bytes, timed in turn with the op. Parity with the
reference is checked first. Input sets rotate, together larger than the cache, so that caches do not
flatter; one evaluation spans many calls, so the time holds MLX's own work too. Backward is the
gradients alone (no baseline: the reference cannot skip its forward), forward+backward output and
gradients.
"""

import argparse
import datetime
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import mlx.core as mx

from mhc_mlx import ROW_FIRST, ops, reference
from mhc_mlx.kernel import backend

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DIRECTIONS = ("forward", "backward", "forward+backward")
CACHE = 256 << 20  # input sets together exceed this many bytes: several times any L2
DEFAULT = {
    "mhc_static": [(16384, 4, 1024), (8192, 8, 1024), (64, 32, 1280)],
    "mhc_layer": [(320, 4, 1280)],
    "stream_mix_add": [(16384, 4, 1024)],
    "sinkhorn_knopp": [(65536, 4, 4)],
}
BFLOAT16_ALONE = ("mhc_layer", "stream_mix_add")  # of the default list
SEEDS = [
    (320, 4, 1280),
    (512, 4, 1920),
    (1280, 4, 2560),
    (2560, 4, 1280),
    (128, 8, 1280),
    (256, 8, 1280),
]
SEEDS += [
    (32, 32, 1280),
    (64, 32, 1280),
    (128, 32, 1280),
    (128, 4, 1280),
    (256, 4, 1280),
    (512, 4, 2560),
]
SEEDS += [(1024, 4, 1920), (1024, 4, 2560), (65536, 4, 1024), (16384, 4, 1024), (16384, 4, 4096)]
SEEDS += [(8192, 8, 1024), (8192, 12, 1024)]
PRESETS = {
    "seeds": {
        "mhc_static": SEEDS,
        "mhc_layer": SEEDS[:14],
        "stream_mix_add": SEEDS,
        "stream_aggregate_norm": SEEDS,
        "mhc_dynamic": SEEDS[:17],
        "sinkhorn_knopp": [
            (1, 4, 4),
            (1, 8, 8),
            (1, 16, 16),
            (65536, 4, 4),
            (8192, 8, 8),
            (4096, 16, 16),
            (1, 64, 64),
        ],
    }
}


def make_inputs(op: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> list[mx.array]:
    """Random arrays for one call; coefficients are shared by all tokens."""
    B, n, C = shape
    if op == "sinkhorn_knopp":
        return [mx.random.normal(shape).astype(dtype)]
    x = mx.random.normal(shape).astype(dtype)
    gate, weight = mx.random.uniform(0.1, 1, (n,)), mx.random.uniform(0.5, 1.5, (C,))
    mix = mx.softmax(mx.random.normal((n, n)), axis=-1)
    return {
        "mhc_static": lambda: [x, gate, gate[::-1] + 0.0, mix, weight],
        "mhc_layer": lambda: [x, gate, gate[::-1] + 0.0, mx.random.normal((n, n)), weight],
        "stream_aggregate_norm": lambda: [x, gate, weight],
        "stream_mix_add": lambda: [x, mx.random.normal((B, C)).astype(dtype), gate, mix],
        "mhc_dynamic": lambda: [x, *dynamic_parameters(n, C), weight],
    }[op]()


def dynamic_parameters(n: int, C: int) -> list[mx.array]:
    """phi, bias, alpha."""
    outs = 2 * n + ROW_FIRST.res_size(n)
    phi = mx.random.normal((outs, n * C)) * (n * C) ** -0.5
    return [phi, mx.random.normal((outs,)), mx.random.uniform(0.5, 1.5, (3,))]


def function(module, op: str, **options):
    """An op, or ``mhc_dynamic``: the dynamic layer of mHC.cu, whose sublayer is the RMSNorm."""
    if op != "mhc_dynamic":
        return lambda *a: getattr(module, op)(*a, **options)

    def layer(x, phi, bias, alpha, weight):
        u, h_post, h_res, x = module.mhc_pre(x, phi, bias, alpha, weight, ROW_FIRST, **options)
        return module.stream_mix_add(x, u, h_post, h_res, **options)

    return layer


def mandatory_bytes(op: str, direction: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> int:
    """The fewest bytes, in rows of C elements per token: (forward, backward)."""
    B, n, C = shape
    if op == "sinkhorn_knopp":  # logits, h_res float32; logits, dh_res float32, dlogits
        forward, backward = B * n * C * (dtype.size + 4), B * n * C * (2 * dtype.size + 4)
    else:
        rows = {
            "stream_mix_add": (2 * n + 1, 3 * n + 2),
            "stream_aggregate_norm": (n + 1, 2 * n + 1),
            "mhc_dynamic": (3 * n + 2, 6 * n + 3),
        }
        forward, backward = (r * B * C * dtype.size for r in rows.get(op, (2 * n, 3 * n)))
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[
        direction
    ]


def race(budget: float, *contestants: tuple) -> list[list[float]]:
    """Seconds per call in five rounds, for each (function, input sets). They run in turn, so that
    the clocks and the memory of one moment serve all alike."""

    def run(f, sets, calls):
        start = time.perf_counter()
        mx.eval([f(*sets[i % len(sets)]) for i in range(calls)])
        mx.synchronize()
        return (time.perf_counter() - start) / calls

    info = mx.device_info() if backend() else {}
    room = info.get("memory_size", info.get("total_memory", 64 << 30)) // 5  # for results
    plan = []
    for f, sets in contestants:
        results = f(*sets[0])
        results = results if isinstance(results, (list, tuple)) else [results]
        run(f, sets, len(sets))
        calls = min(400, int(budget / 5 / max(run(f, sets, len(sets)), 1e-6)))
        calls = min(max(len(sets), calls), room // max(1, sum(a.nbytes for a in results)))
        plan.append((f, sets, max(2, calls)))
    for _ in range(2):  # the first round at a size is for the allocator: often half as fast
        times = [[run(*entry)] for entry in plan]
    for _ in range(4):
        for one, entry in zip(times, plan, strict=True):
            one.append(run(*entry))
    return times


def directed(f, direction: str, arrays: int):
    """f, its gradients, or both, as one compiled function of the arrays and a cotangent."""
    if direction == "forward":
        return mx.compile(lambda *a: f(*a[:arrays]))

    def both(*a):
        outputs, gradients = mx.vjp(f, list(a[:arrays]), [a[arrays]])
        return gradients if direction == "backward" else outputs + gradients

    return mx.compile(both)


def worst_error(op: str, arrays: list[mx.array], cotangent: mx.array, **options) -> float:
    """Largest difference from the reference, relative to the largest value, over all results."""
    worst = 0.0
    results = []
    for f in (function(reference, op), function(ops, op, **options)):
        outputs, gradients = mx.vjp(f, arrays, [cotangent])
        results.append(outputs + gradients)
    for want, got in zip(*results, strict=True):
        want, got = want.astype(mx.float32), got.astype(mx.float32)
        worst = max(
            worst, (mx.abs(want - got).max() / mx.maximum(mx.abs(want).max(), 1e-30)).item()
        )
    return worst


class Bench:
    def __init__(self, budget: float, peak: float | None):
        self.budget, self.peak, self.copy_gbps = budget, peak, 0.0

    @staticmethod
    def sets(make) -> list[list[mx.array]]:
        """Input sets that together exceed any cache."""
        sets = [make()]
        size = sum(a.nbytes for a in sets[0])
        sets += [make() for _ in range(max(2, min(32, CACHE // size)) - 1)]
        mx.eval(sets)
        return sets

    def row(
        self, op: str, direction: str, shape, name: str, threads: int | None, baseline: bool = True
    ) -> dict:
        dtype, plain = DTYPES[name], function(reference, op)
        fused = function(ops, op, threads_per_group=threads)

        def inputs():
            arrays = make_inputs(op, shape, dtype)
            out_dtype = mx.float32 if op == "sinkhorn_knopp" else dtype
            return [*arrays, mx.random.normal(plain(*arrays).shape).astype(out_dtype)]

        size = mandatory_bytes(op, direction, shape, dtype)
        sets, half = self.sets(inputs), max(64, size // 2 // 4)  # float32 read, and written
        runners = [(directed(fused, direction, len(sets[0]) - 1), sets)]
        runners += [(mx.abs, self.sets(lambda: [mx.random.normal((half,))]))]
        if baseline and direction != "backward":
            runners += [(directed(plain, direction, len(sets[0]) - 1), sets)]
        times = race(self.budget, *runners)
        median, copy, *compiled = map(statistics.median, times)
        self.copy_gbps = max(self.copy_gbps, 8e-9 * half / copy)
        row = {"op": op, "direction": direction, "dtype": name, "shape": list(shape)}
        row |= {"us": median * 1e6, "spread": (max(times[0]) - min(times[0])) / median}
        row |= {"gbps": size / median / 1e9, "percent_of_copy": 100 * copy / median}
        if self.peak:
            row["percent_of_peak"] = row["gbps"] / self.peak * 100
        row["speedup_vs_compiled"] = compiled[0] / median if compiled else None
        return row | {"threads_per_group": threads}


def show(row: dict) -> str:
    shape = ", ".join(map(str, row["shape"]))
    text = f"{row['op']:22} {row['direction']:16} {row['dtype']:8} ({shape:>14})"
    text += f" | {row['us']:9.1f} us +-{row['spread']:4.0%}"
    text += f" | {row['gbps']:6.0f} GB/s | {row['percent_of_copy']:4.0f} % of copy"
    if "percent_of_peak" in row:
        text += f" | {row['percent_of_peak']:4.0f} % of peak"
    if row["speedup_vs_compiled"]:
        text += f" | {row['speedup_vs_compiled']:6.1f} x compiled reference"
    return text


def verify(cases, dtypes) -> list[dict]:
    """Parity with the reference on this machine's device, every op and dtype."""
    rows = []
    for op, shape in cases:
        B = min(shape[0], 512)
        for name in dtypes(op):
            arrays = make_inputs(op, (B, *shape[1:]), DTYPES[name])
            want = function(reference, op)(*arrays)
            error = worst_error(op, arrays, mx.random.normal(want.shape).astype(want.dtype))
            bound = {"float32": 3e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[name]
            rows.append(
                {
                    "op": op,
                    "dtype": name,
                    "shape": [B, *shape[1:]],
                    "error": error,
                    "ok": error < bound,
                }
            )
            if not rows[-1]["ok"]:
                sys.exit(f"parity fails: {op} {name} {shape}: error {error:.2e}, bound {bound:.1e}")
    return rows


def sweep(bench: Bench, op: str, shape, name: str) -> list[dict]:
    """Threads per group x vector width; marks the best and what the default picks."""
    rows, plain = [], ops.geometry.of_token
    for direction in ("forward", "backward"):
        copies = 1 if direction == "forward" else 2
        chosen = plain(shape[1], shape[2], DTYPES[name].size, copies, None, backend())
        for vec in (1, 2, 4, 8):
            for threads in (32, 64, 128, 160, 256, 512):
                if shape[2] % vec or vec * DTYPES[name].size > 16 or vec * shape[1] > 64:
                    continue
                passes = -(-shape[2] // (vec * threads))
                if threads > 32 and (threads - 32) * vec >= shape[2] or passes > 16:
                    continue

                def forced(n, C, size, copies, _, backend, vec=vec, threads=threads, passes=passes):
                    held = passes * copies * n * (max(4, vec * size) if copies == 1 else 4 * vec)
                    fits = n <= 8 and held <= ops.geometry.REGISTER_BYTES[backend, copies]
                    return ops.geometry.Geometry(vec, threads, passes, fits)

                ops.geometry.of_token = forced
                try:
                    row = bench.row(op, direction, shape, name, threads, baseline=False) | {
                        "vec": vec
                    }
                finally:
                    ops.geometry.of_token = plain
                row["default"] = (vec, threads) == (chosen.vec, chosen.threads)
                rows.append(row)
        best = min((r for r in rows if r["direction"] == direction), key=lambda r: r["us"])
        for r in rows:
            if r["direction"] == direction:
                mark = " <- best" * (r is best) + " <- default" * r["default"]
                print(
                    f"vec {r['vec']} threads {r['threads_per_group']:4} {show(r)}{mark}", flush=True
                )
    return rows


def plot(rows: list[dict], file: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.28 * len(rows) + 1.2))
    labels = [f"{r['op']} {r['direction']} {r['dtype']} {tuple(r['shape'])}" for r in rows]
    axes.barh(labels, [r["percent_of_copy"] for r in rows])
    axes.axvline(100, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("percent of copy bandwidth")
    figure.savefig(file, bbox_inches="tight", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--op", action="append", choices=sorted(PRESETS["seeds"]), help="repeatable; all by default"
    )
    parser.add_argument("--shape", action="append", metavar="B,n,C", help="repeatable")
    parser.add_argument(
        "--dtype", action="append", choices=sorted(DTYPES), help="repeatable; bfloat16 and float32"
    )
    parser.add_argument(
        "--direction", action="append", choices=DIRECTIONS, help="repeatable; all by default"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--sweep", action="store_true", help="threads per group x vector width")
    parser.add_argument("--threads", type=int, help="threads_per_group for every op")
    parser.add_argument("--verify", action="store_true", help="parity only")
    parser.add_argument("--no-baseline", action="store_true", help="no compiled reference")
    parser.add_argument("--processes", type=int, default=1, help="medians over this many processes")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib")
    parser.add_argument("--peak-gbps", type=float, help="adds percent of this peak")
    args = parser.parse_args()

    if args.processes > 1:
        repeat(args.processes, args.json)
        return
    mx.random.seed(0)
    table = PRESETS[args.preset] if args.preset else DEFAULT
    if args.shape:
        shapes = [tuple(int(v) for v in s.split(",")) for s in args.shape]
        square = [s for s in shapes if s[1] == s[2]]
        table = {op: square if op == "sinkhorn_knopp" else shapes for op in args.op or table}
    cases = [(op, shape) for op in table if not args.op or op in args.op for shape in table[op]]

    def dtypes(op: str) -> list[str]:
        if args.dtype or op == "sinkhorn_knopp":
            return args.dtype or ["float32"]
        alone = not args.preset and op in BFLOAT16_ALONE
        return ["bfloat16"] if alone else ["bfloat16", "float32"]

    info = mx.device_info() if backend() else {}
    device = info.get("device_name", "CPU")
    print(
        f"{device}, MLX {mx.__version__}, kernels: "
        f"{backend() or 'none here, so compiled against plain reference'}"
    )

    bench, rows = Bench(0.1 if args.quick else 0.5, args.peak_gbps), []
    verified = verify(cases, dtypes)
    print(
        f"parity: {len(verified)} cases, "
        f"largest relative error {max(r['error'] for r in verified):.1e}"
    )
    if not backend() and not args.verify:
        cpu_table(cases, bench)
        return
    done, total = 0, sum(len(dtypes(op)) for op, _ in cases) * len(args.direction or DIRECTIONS)
    for op, shape in [] if args.verify else cases:
        for name in dtypes(op):
            if args.sweep:
                rows += sweep(bench, op, shape, name)
                continue
            for direction in args.direction or DIRECTIONS:
                rows.append(
                    bench.row(op, direction, shape, name, args.threads, not args.no_baseline)
                )
                done += 1
                if sys.stderr.isatty():
                    print(f"\r{done}/{total}", end="\r", file=sys.stderr)
                print(show(rows[-1]), flush=True)
    if args.json:
        result = {
            "device": device,
            "mlx": mx.__version__,
            "date": datetime.date.today().isoformat(),
        }
        result |= {"command": shlex.join(["python", *sys.argv]), "copy_gbps": bench.copy_gbps}
        with open(args.json, "w") as f:
            json.dump(result | {"verified": verified, "rows": rows}, f, indent=1)
    if args.plot and rows:
        plot(rows, args.plot)


def repeat(processes: int, file: str | None) -> None:
    """Run this command in several processes and keep the median of each figure; the file is
    written after each. The compiled reference is timed in the first only; ``spread`` is between
    processes."""
    own = [a for i, a in enumerate(sys.argv) if not re.match("--(processes|json)", a)]
    own = [a for i, a in enumerate(own) if a not in (file, str(processes))]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(processes):
            command = [sys.executable, *own, "--json", f"{folder}/{k}.json"]
            subprocess.run(command + ["--no-baseline"] * (k > 0), check=True)
            with open(f"{folder}/{k}.json") as f:
                results.append(json.load(f))
            merged = merge(results) | {"command": shlex.join(["python", *sys.argv])}
            if file:
                with open(file, "w") as f:
                    json.dump(merged, f, indent=1)
    print(f"medians of {processes} processes", *map(show, merged["rows"]), sep="\n")


def merge(results: list[dict]) -> dict:
    """The first process's result with the medians of all."""
    merged = results[0] | {"processes": len(results), "rows": []}
    for rows in zip(*(r["rows"] for r in results), strict=True):
        keys = ("us", "gbps", "percent_of_copy")
        row = rows[0] | {k: statistics.median(r[k] for r in rows) for k in keys}
        if len(rows) > 1:
            row["spread"] = (max(r["us"] for r in rows) - min(r["us"] for r in rows)) / row["us"]
        if row["speedup_vs_compiled"]:
            row["speedup_vs_compiled"] *= rows[0]["us"] / row["us"]
        merged["rows"].append(row)
    return merged


def cpu_table(cases, bench: Bench) -> None:
    for op, (B, n, C) in cases:
        shape = (min(B, 256), n, C)
        arrays = make_inputs(op, shape, mx.float32)
        mx.eval(arrays)
        f = function(reference, op)
        times = race(bench.budget, (f, [arrays]), (mx.compile(f), [arrays]))
        plain, fast = map(statistics.median, times)
        print(
            f"{op:22} {shape} plain {plain * 1e6:9.1f} us, compiled {fast * 1e6:9.1f} us",
            flush=True,
        )


if __name__ == "__main__":
    main()
