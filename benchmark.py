"""Measure every op: `op direction dtype shape | us | GB/s | % of copy | x compiled reference`.

Bytes are the fewest that an op can move (inputs read once, outputs written once; coefficients and
parameters are noise), and the roof is `mx.abs` moving as many bytes, timed in turn with the op.
Parity with the reference is checked first: what fails is not timed. Input sets rotate, together
larger than the cache, so that caches do not flatter; one evaluation spans many calls, so the time
holds MLX's own work too. Backward is the gradients alone (no baseline: the reference cannot skip
its forward; nor an op whose forward saves for them), forward+backward output and gradients.

Other modes, alone or after the table with --all: --sizes, forward from 1 token to 65536 (for
--plot); --decode, a sublayer in a compiled stack at 1 to 16 tokens; --overhead, what MLX and Python
add to a layer's kernels. With --from FILE nothing runs: --compare, --plot and --predict read FILE.
"""

import argparse
import datetime
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile

import mlx.core as mx

from benchmarks import options
from benchmarks.ops import (
    DIRECTIONS,
    DTYPES,
    LARGE,
    OPS,
    TARGETS,
    dynamic,
    function,
    make_inputs,
    mandatory_bytes,
    random_like,
    several,
    single_pass,
    sublayer,
)
from benchmarks.parity import BOUNDS, Largest, needed_bytes, worst_error
from benchmarks.results import SECTIONS, check_result, compare, merge, plot, predict, show
from benchmarks.timing import (
    directed,
    dispatches,
    each,
    gpu_time,
    input_sets,
    launches,
    memory,
    race,
    room,
    spread,
)
from mhc_mlx import DEEPSEEK_V4, HyperConnection, MHCLayer, commands, launch, ops, reference

OTHERS = ("stream_aggregate_norm", "mhc_coefficients", "mhc_dynamic", "mhc_head", "mhc_seam")
OTHERS += ("single_pass",)
DEFAULT = {
    "mhc_static": [(16384, 4, 1024), (8192, 8, 1024), (64, 32, 1280)],
    "mhc_layer": [(320, 4, 1280)],
    "stream_mix_add": [(16384, 4, 1024)],
    "sinkhorn_knopp": [(65536, 4, 4)],
    **dict.fromkeys((*TARGETS, "mhc_pre_norm"), LARGE),
    **dict.fromkeys(OTHERS, [(16384, 4, 1024)]),
}
FLOAT32_TOO = ("mhc_static",)  # of the default list
BASELINE = ("mhc_static", "mhc_layer", "stream_mix_add", "sinkhorn_knopp")  # unless told otherwise
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
# Of --sizes: C by n, tokens, ops.
GRID = {4: (1024, 1280, 2560, 4096, 5120, 7168), 2: (1024, 4096), 8: (1024, 4096), 16: (1024, 4096)}
TOKENS = [4**k for k in range(9)]
GROWING = ("stream_mix_add_per_token", "mhc_pre", "sublayer")
STACKS = ("sublayer", "single_pass")
DECODE = [(T, 4, C) for C in (4096, 5120, 7168) for T in (1, 2, 4, 8, 16)]
LAYERS, PLAIN_LAYERS = 61, 8  # of a stack: of kernels, and of plain ops, slow to compile
OVERHEAD = [(1, 4, 4096), (16384, 4, 1024)]
REFERENCE_TOKENS = 256  # at most, of a shape, where there are no kernels and it runs on a CPU


class Bench:
    def __init__(self, budget: float, peak: float | None):
        self.budget, self.peak, self.copy_gbps = budget, peak, 0.0

    def row(
        self, op: str, direction: str, shape, name: str, threads: int | None, baseline: bool = True
    ) -> dict:
        dtype, plain = DTYPES[name], function(reference, op)
        fused = function(ops, op, threads_per_group=threads)
        if mx.get_cache_memory() > room():
            mx.clear_cache()
        arrays = len(make_inputs(op, (1, *shape[1:]), dtype))

        def inputs():
            given = make_inputs(op, shape, dtype)
            cotangents = random_like(several(plain(*given))) if direction != "forward" else []
            return given + cotangents

        size = mandatory_bytes(op, direction, shape, dtype)
        sets, half = input_sets(inputs), max(64, size // 2 // 4)  # float32 read, and written
        runners = [(directed(fused, direction, arrays), sets)]
        runners += [(mx.abs, input_sets(lambda: [mx.random.normal((half,))]))]
        if baseline and direction != "backward":
            runners += [(directed(plain, direction, arrays), sets)]
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


def reference_row(bench: Bench, op: str, direction: str, shape, name: str) -> dict:
    """Where there are no kernels: the reference compiled, and plain."""
    plain, dtype = function(reference, op), DTYPES[name]
    arrays = len(make_inputs(op, (1, *shape[1:]), dtype))

    def inputs():
        given = make_inputs(op, shape, dtype)
        return given + (random_like(several(plain(*given))) if direction != "forward" else [])

    sets = input_sets(inputs)
    runners = [(directed(plain, direction, arrays, compiled=c), sets) for c in (True, False)]
    times = race(bench.budget, *runners)
    compiled, slow = map(statistics.median, times)
    row = {"op": op, "direction": direction, "dtype": name, "shape": list(shape)}
    row |= {"us": compiled * 1e6, "spread": (max(times[0]) - min(times[0])) / compiled}
    row |= {"plain_us": slow * 1e6, "speedup_vs_compiled": None}
    return row | {"threads_per_group": None}


def parity_row(op: str, shape, name: str, gradients: bool, threads: int | None, error: float):
    """A case's parity; what fails is printed."""
    row = {"op": op, "direction": "forward+backward" if gradients else "forward"}
    row |= {"dtype": name, "shape": list(shape), "threads_per_group": threads}
    bound = BOUNDS[DTYPES[name]]
    row |= {"error": error, "ok": error < bound}
    if not row["ok"]:
        print(f"parity FAILS: {op} {name} {tuple(shape)}: {error:.2e}, {bound:.1e}")
    return row


def verify(section: str, op: str, shape, name: str, directions, threads: int | None) -> list[dict]:
    """Parity with the reference, on this machine's device, of what a section times of a case: the
    same function with the same options, of the same arrays' shapes and dtype."""
    if mx.get_cache_memory() > room():
        mx.clear_cache()
    if section == "overhead":
        cases = [(kind, layer_error(kind, shape, name)) for kind in layers(*shape[1:])]
        return [parity_row(kind, shape, name, False, None, error) for kind, error in cases]
    gradients = any(direction != "forward" for direction in directions)
    used = {"differentiable": False} if section == "decode" else {"threads_per_group": threads}
    error = worst_error(op, shape, DTYPES[name], gradients, **used)
    return [parity_row(op, shape, name, gradients, threads, error)]


def once(op: str, shape, name: str, directions: list[str], threads: int | None) -> None:
    """Twice, the second time compiled and allocated, for a profiler that counts each launch."""
    f = function(ops, op, threads_per_group=threads)
    given = make_inputs(op, shape, DTYPES[name])
    cotangents = random_like(several(function(reference, op)(*given)))
    mx.eval(given, cotangents)
    for direction in directions:
        run = directed(f, direction, len(given))
        for _ in range(2):
            mx.eval(run(*given, *cotangents))


def sweep(bench: Bench, op: str, shape, name: str, verified: list[dict]) -> list[dict]:
    """Threads per group x vector width, or threads alone of an op that has another rule for its
    loads; marks the best and what the default picks. Each is timed if its parity is right."""
    rows, usual = [], ops.tiling.token_tiling
    for direction in ("forward", "forward+backward" if OPS[op].saves else "backward"):
        candidates = [(None, threads, None) for threads in (None, 64, 128, 256, 512)]
        if (op, direction) not in THREADS_ALONE and not OPS[op].saves:
            copies = 1 if direction == "forward" else 2
            size, backend = DTYPES[name].size, launch.backend()
            chosen = usual(shape[1], shape[2], size, copies, None, backend)
            candidates = list(geometries(*shape[1:], size, copies, backend, chosen))
        for vec, threads, forced in candidates:
            ops.tiling.token_tiling = (lambda *_, forced=forced, **__: forced) if forced else usual
            try:
                verified += verify("rows", op, shape, name, [direction], threads)
                if not verified[-1]["ok"]:
                    continue
                row = bench.row(op, direction, shape, name, threads, baseline=False)
            finally:
                ops.tiling.token_tiling = usual
            picked = (vec, threads) == (chosen.vec, chosen.threads) if vec else threads is None
            rows.append(row | {"vec": vec, "default": picked})
        timed = [r for r in rows if r["direction"] == direction]
        for r in timed:
            best = r is min(timed, key=lambda r: r["us"])
            mark = " <- best" * best + " <- default" * r["default"]
            threads = r["threads_per_group"] or "its own"
            print(f"vec {r['vec']} threads {threads:>7} {show(r)}{mark}", flush=True)
    return rows


# Of a sweep: whose loads are not `tiling.token_tiling`'s.
THREADS_ALONE = [("sinkhorn_knopp", d) for d in DIRECTIONS] + [("mhc_seam", "backward")]


def geometries(n: int, C: int, size: int, copies: int, backend: str, chosen):
    """Vector width, threads and `TokenTiling` of what a sweep tries."""
    for vec in (1, 2, 4, 8):
        for threads in (32, 64, 128, 160, 256, 512):
            if C % vec or vec * size > 16 or vec * n > 64:
                continue
            passes = -(-C // (vec * threads))
            if threads > 32 and (threads - 32) * vec >= C or passes > 16:
                continue
            held = passes * copies * n * (max(4, vec * size) if copies == 1 else 4 * vec)
            cached = n <= 8 and held <= ops.tiling.REGISTER_BYTES[backend, copies]
            forced = {"vec": vec, "threads": threads, "passes": passes, "cached": cached}
            yield vec, threads, chosen._replace(**forced)


def quiet_parameters(x: mx.array) -> list[mx.array]:
    """Parameters of a sublayer that adds little, or a deep stack without norms would overflow."""
    n, (phi, bias, alpha) = x.shape[1], dynamic(x)
    gate = (mx.arange(bias.size) >= n) & (mx.arange(bias.size) < 2 * n)
    return [phi, mx.where(gate, -4.0, bias), alpha]


def stack(op: str, module):
    """Sublayers, F = identity, one after another: a function of x and of three parameters each."""
    options = {"differentiable": False} if module is ops else {}

    def run(x, *parameters):
        u = x[:, 0]
        for i in range(0, len(parameters), 3):
            if op == "sublayer":
                x = sublayer(module, x, *parameters[i : i + 3], **options)
            else:
                x, u, _ = single_pass(module, x, u, *parameters[i : i + 3], None, **options)
        return x

    return run


def decode(bench: Bench, op: str, shape, name: str = "bfloat16") -> dict:
    """Time per sublayer of a compiled stack of LAYERS with their own parameters, evaluated once per
    step as a decoder does, beside plain ops compiled, in a stack of PLAIN_LAYERS because their
    compilation is slow."""
    x = mx.random.normal(shape).astype(DTYPES[name])
    parameters = [a for _ in range(LAYERS) for a in quiet_parameters(x)]
    few = parameters[: 3 * PLAIN_LAYERS]
    mx.eval(x, parameters)
    fused, plain = (mx.compile(stack(op, module)) for module in (ops, reference))
    times = [t / LAYERS for t in each(bench.budget, lambda: fused(x, *parameters))]
    slow = [t / PLAIN_LAYERS for t in each(bench.budget, lambda: plain(x, *few))]
    us, plain_us = (1e6 * statistics.median(t) for t in (times, slow))
    row = {"op": f"decode {op}", "direction": "forward", "dtype": name, "shape": list(shape)}
    row |= {"us": us, "spread": spread(times)}
    row |= {"gpu_us": 1e6 * gpu_time(lambda: fused(x, *few), 6) / PLAIN_LAYERS}
    row |= {"plain_us": plain_us, "speedup_vs_compiled": plain_us / us}
    counts = [dispatches(mx.compile(stack(op, m))(x, *few[:3])) for m in (ops, reference)]
    row |= {"dispatches": counts[0].total(), "kernels": counts[0]["CustomKernel"]}
    row |= {"plain_dispatches": counts[1].total()}
    return row | {"layers": LAYERS, "plain_layers": PLAIN_LAYERS, "threads_per_group": None}


def layers(n: int, C: int) -> dict:
    """Of --overhead: what is called by name, and the module that has its options."""
    connection, layer = HyperConnection(C, n, convention=DEEPSEEK_V4), MHCLayer(n, C)

    def connected(x):
        u, add_residual = connection(x)
        return add_residual(u)

    return {"MHCLayer": (layer, layer), "HyperConnection": (connected, connection)}


def layer_error(kind: str, shape, name: str) -> float:
    call, module = layers(*shape[1:])[kind]
    x, largest = mx.random.normal(shape).astype(DTYPES[name]), Largest()
    got = mx.compile(call)(x)
    mx.eval(got)
    module.use_metal = False
    largest.add(call(x), got)
    return largest.relative()


def overhead(bench: Bench, shape, name: str = "bfloat16") -> list[dict]:
    """A call of a layer, forward. us: compiled and evaluated alone; eager_us: the same, eager;
    many_us: compiled, an evaluation of many calls; gpu_us: the GPU alone, as `gpu_time` says;
    python_us, python_eager_us: building the graph."""
    rows, x = [], mx.random.normal(shape).astype(DTYPES[name])
    for op, (layer, _) in layers(*shape[1:]).items():
        mx.eval(x)
        compiled = mx.compile(layer)
        calls = {"us": compiled, "eager_us": layer}
        times = {k: each(bench.budget, lambda f=f: f(x)) for k, f in calls.items()}
        for k, f in calls.items():
            times[f"python_{k}"] = each(bench.budget / 10, lambda f=f: f(x), evaluate=False)
        times["many_us"] = race(bench.budget, (compiled, [[x]]))[0]
        times["gpu_us"] = [gpu_time(lambda f=compiled: f(x))]
        row = {"op": op, "direction": "forward", "dtype": name, "shape": list(shape)}
        row |= {k: 1e6 * statistics.median(t) for k, t in times.items()}
        row |= {"spread": spread(times["us"]), "speedup_vs_compiled": None}
        with launches() as seen:
            mx.eval(layer(x))
        rows.append(row | {"launches": seen, "threads_per_group": None})
    return rows


# ---- the command


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked, with what to measure as chosen, and files read and opened."""
    parser = options.parser(__doc__, PRESETS)
    args = parser.parse_args(argv)
    try:
        options.check_values(args)
        options.check_combination(args)
        reads = args.source is not None or args.predict
        args.chosen = {} if reads else cases(args)
        options.check_files(args)
    except ValueError as error:
        parser.error(str(error))
    args.processes = args.processes or 1
    return args


def cases(args: argparse.Namespace) -> dict[str, list[tuple]]:
    """By section of the result: (op, shape, dtype) of what to measure.

    Raises:
        ValueError: An op, a shape or a direction that is named gives nothing to measure.
    """
    sections, named = options.sections(args), args.op or []
    chosen = {section: CASES[section](args) for section in sections}
    for section, those in chosen.items():
        for op in named:
            if op not in [case[0] for case in those]:
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


def fitting(those: list[tuple], refuse: bool, gradients: bool) -> list[tuple]:
    """Those cases that fit in memory, of a CPU with fewer tokens; others are named, or refused."""
    cut = (lambda B: B) if launch.backend() else (lambda B: min(B, REFERENCE_TOKENS))
    those = list(dict.fromkeys((op, (cut(s[0]), *s[1:]), name) for op, s, name in those))
    needed = {(op, s, name): needed_bytes(op, s, DTYPES[name], gradients) for op, s, name in those}
    for (op, shape, name), size in needed.items():
        if size > memory():
            text = f"{','.join(map(str, shape))} needs {size / 2**30:.1f} GiB for {op} in {name}, "
            text += f"and this device has {memory() / 2**30:.1f} GiB"
            if refuse:
                raise ValueError(f"--shape {text}")
            print(f"left out: {text}")
    return [case for case in those if needed[case] <= memory()]


def table_cases(args: argparse.Namespace) -> list[tuple]:
    table = PRESETS[args.preset] if args.preset else DEFAULT
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
        if math.prod(s) < 2**31 and mandatory_bytes(op, "forward", s, DTYPES[name]) < room()
    ]


def decode_cases(args: argparse.Namespace) -> list[tuple]:
    stacks = [op for op in STACKS if not args.op or op in args.op]
    return [(op, s, name) for op in stacks for s in DECODE for name in args.dtype or ["bfloat16"]]


def overhead_cases(args: argparse.Namespace) -> list[tuple]:
    return [("sublayer", shape, name) for shape in OVERHEAD for name in args.dtype or ["bfloat16"]]


CASES = {"rows": table_cases, "sizes": sizes_cases, "decode": decode_cases}
CASES |= {"overhead": overhead_cases}


def directions(args: argparse.Namespace, section: str) -> list[str]:
    """What is timed of each op that can."""
    few = section != "rows" or not (launch.backend() or args.verify)
    return args.direction or (["forward"] if few else list(DIRECTIONS))


def measure(args: argparse.Namespace, result: dict) -> None:
    """Fills result, which is written after each figure."""
    mx.random.seed(0)
    chosen, bench = args.chosen, Bench(0.1 if args.quick else 0.5, args.peak_gbps)
    info = mx.device_info() if launch.backend() else {}
    kernels = launch.backend() or "none here, so compiled against plain reference"
    result |= {"device": info.get("device_name", "CPU")} | result
    print(f"{result['device']}, MLX {mx.__version__}, kernels: {kernels}")
    if not launch.backend():
        print(f"on a CPU, of each shape at most {REFERENCE_TOKENS} tokens")
    result |= {section: [] for section in chosen if launch.backend()}
    if args.once:
        for op, shape, name in chosen["rows"]:
            once(op, shape, name, args.direction or ["forward+backward"], args.threads)
        return
    failed = set()
    for section in chosen if not args.sweep else []:
        for case in chosen[section]:
            rows = verify(section, *case, directions(args, section), args.threads)
            result["verified"] += rows
            if not all(row["ok"] for row in rows):
                failed.add((section, *case))
            args.output.update(result)
    if not args.sweep:
        worst = max(r["error"] for r in result["verified"])
        print(f"parity: {len(result['verified'])} cases, largest relative error {worst:.1e}")
    if args.verify:
        return

    def rows_of(section, op, shape, name):
        if not launch.backend():
            for direction in directions(args, section):
                yield reference_row(bench, op, direction, shape, name)
        elif section == "decode":
            yield decode(bench, op, shape, name)
        elif section == "overhead":
            yield from overhead(bench, shape, name)
        elif args.sweep:
            yield from sweep(bench, op, shape, name, result["verified"])
        else:
            baseline = args.baseline
            if baseline is None:
                baseline = section == "rows" and op in BASELINE
            for direction in directions(args, section):
                if direction != "backward" or not OPS[op].saves:
                    yield bench.row(op, direction, shape, name, args.threads, baseline)

    done, total = 0, sum(map(len, chosen.values()))
    for section in chosen:
        kept = result.setdefault(section if launch.backend() else "reference", [])
        for case in chosen[section]:
            if (section, *case) in failed:
                continue
            for row in rows_of(section, *case):
                kept.append(row)
                result["copy_gbps"] = bench.copy_gbps
                if not args.sweep:
                    print(show(row), flush=True)
                args.output.update(result)
            done += 1
            if sys.stderr.isatty():
                print(f"\r{done}/{total}", end="\r", file=sys.stderr)


def empty_result(argv: list[str]) -> dict:
    result = {"mlx": mx.__version__, "date": datetime.date.today().isoformat()}
    result |= {"command": shlex.join(["python", "benchmark.py", *argv])}
    return result | {"copy_gbps": 0.0, "verified": [], "rows": []}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    wrong = []
    if args.source is not None or args.predict:
        result = args.result or {}
    else:
        result = empty_result(argv)
        try:
            if args.processes > 1:
                wrong += repeat(args, argv, result)
            else:
                measure(args, result)
        except BaseException:
            if result["verified"] and (lost := args.output.finish(result)):
                print(lost, file=sys.stderr)
            raise
        lost = args.output.finish(result)
        failed = [r for r in result["verified"] if not r["ok"]]
        wrong += [lost] * bool(lost) + [f"parity fails: {failed}"] * bool(failed)
    if args.predict:
        print(predict(result))
    if args.before:
        print(*compare(args.before, result), sep="\n")
    if args.plot and options.plotted(result):
        plot(result, args.plot)
    if wrong:
        sys.exit("\n".join(wrong))


def repeat(args: argparse.Namespace, argv: list[str], result: dict) -> list[str]:
    """Run this command in several processes and fill result with the median of each figure; it is
    written after each. The compiled reference is timed in the first only; ``spread`` is between
    processes. Where CUDA_VISIBLE_DEVICES names several GPUs, so many run at once, one on each.

    Returns:
        What went wrong.
    """
    mine, this = "--(processes|json|plot|compare)", dict(result)
    pairs = zip(["", *argv], argv, strict=False)
    others = [a for last, a in pairs if not re.match(mine, a) and not re.fullmatch(mine, last)]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    results, wrong, running = [], [], []
    sections = options.sections(args)
    times_reference = not args.sweep and ("rows" in sections or "sizes" in sections)
    again = ["--no-baseline"] if times_reference and launch.backend() else []
    with tempfile.TemporaryDirectory() as folder:

        def finish():
            k, process = running.pop(0)
            if status := process.wait():
                wrong.append(f"process {k} ended with status {status}")
            try:
                results.append(commands.read_checked(f"{folder}/{k}.json", "JSON", check_result))
            except ValueError as error:
                wrong.append(f"the result of process {k} {error}")
                return
            result.update(merge(results) | {k: this[k] for k in ("command", "date", "mlx")})
            args.output.update(result)

        for k in range(args.processes):
            if len(running) == len(devices):
                finish()
            command = [sys.executable, os.path.abspath(__file__), *others]
            command += ["--json", f"{folder}/{k}.json", *again * (k > 0)]
            device = {"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if any(devices) else {}
            running.append((k, subprocess.Popen(command, env=os.environ | device)))
        while running:
            finish()
    print(f"medians of {len(results)} processes")
    for row in (row for section in SECTIONS for row in result.get(section, [])):
        print(show(row))
    return wrong


if __name__ == "__main__":
    main()
