"""Read each kernel's time, traffic, instructions and stalls on an NVIDIA GPU with Nsight Compute.

    python -m benchmarks.kernel_times --json benchmarks/results/h200/kernel_times.json

starts itself once more under `ncu --clock-control none`, with cold caches, as ncu does by default.
Each case runs twice and the second run counts. A row holds the launch too (body, template
arguments, shapes, threadgroups, threads), so that the model can say what it expects of just this
launch. Each has a process of its own, and --json is written after it. A case is begun only in
the first --seconds; the result names those left out, and the same command goes on with them where
--json is an earlier result.
"""

import argparse
import csv
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import mlx.core as mx

from mhc_mlx import launch, ops
from mhc_mlx.commands import Output, check_strings, make_parser, read
from mhc_mlx.device_report.measure import count_inputs
from mhc_mlx.device_report.suite import DTYPES, add_cotangents, function, make_inputs
from mhc_mlx.device_report.timing import directed

COMMAND = "python -m benchmarks.kernel_times"
KEPT = "mhc_pre_norm mhc_pre stream_mix_add_per_token stream_aggregate mhc_static mhc_seam".split()
BOTH = "forward+backward"
# (op, direction, shape, dtype): the rows of results/h100/rows.json, the sites of V4.1 from one
# token on, n = 8 and 16, float32, and small layers.
CASES = [(op, BOTH, (16384, 4, 4096), "bfloat16") for op in KEPT]
CASES += [("mhc_pre_norm", BOTH, (65536, 4, 1024), "bfloat16")]
CASES += [("single_pass", "forward", (T, 4, 4096), "bfloat16") for T in (1, 8, 64, 512, 2048)]
CASES += [
    (op, BOTH, (8192, 8, 1024), "bfloat16")
    for op in ("stream_mix_add_per_token", "mhc_pre", "mhc_static")
]
CASES += [("mhc_pre", "forward", (T, 8, 1024), "bfloat16") for T in (1, 512)]
CASES += [("single_pass", BOTH, (T, 4, 4096), "bfloat16") for T in (1, 64, 512, 2048)]
CASES += [
    ("mhc_static", BOTH, (16384, 4, 1024), "float32"),
    ("mhc_layer", BOTH, (320, 4, 1280), "bfloat16"),
]
CASES += [("sublayer", BOTH, (T, 4, 2048), "bfloat16") for T in (512, 8192)]
CASES += [("mhc_pre", BOTH, (2048, 4, 4096), "float32")]
CASES += [("sinkhorn_knopp", BOTH, (65536, 4, 4), "float32")]
CASES += [("stream_mix_add_per_token", BOTH, (4096, 16, 1024), "bfloat16")]
CASES += [
    ("single_pass", "forward", (T, 4, C), "bfloat16")
    for C in (5120, 7168)
    for T in (1, 8, 64, 512, 2048)
]

FIGURES = {  # the names of a row: ncu's metrics, in ncu's base units
    "ns": "gpu__time_duration.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "instructions": "smsp__inst_executed.sum",
    "tensor_instructions": "sm__inst_executed_pipe_tensor.sum",
    "cycles": "sm__cycles_elapsed.max",
    "resident_warps": "sm__warps_active.avg.per_cycle_active",
    "issued_per_cycle": "smsp__issue_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
}
STALL = r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active"
MARKER = "case_marker"


def about_launch(name, inputs, outputs, groups, threads, template) -> dict:
    """Describe a launch in JSON's types."""

    def dtype(value):
        return str(value).split(".")[-1] if isinstance(value, mx.Dtype) else value

    def specs(arrays) -> dict:
        return {k: a and [list(a[0]), dtype(a[1])] for k, a in arrays.items()}

    row = {"kernel": name, "groups": groups, "threads": threads}
    row |= {"template": {k: dtype(v) for k, v in template.items()}}
    return row | {"inputs": specs(inputs), "outputs": specs(outputs)}


def run_cases(cases: list[tuple], file: str) -> None:
    """Run every case twice, each time after a marker whose threadgroups number the runs from 1, and
    write what was launched; the profiler watches."""
    launched: list[list[dict]] = []
    usual, seen = launch.run, []

    def spying(name, inputs, outputs, groups, threads, template, verbose=False):
        specs = {k: None if a is None else (a.shape, a.dtype) for k, a in inputs.items()}
        seen.append(about_launch(name, specs, outputs, groups, threads, template))
        return usual(name, inputs, outputs, groups, threads, template, verbose)

    make: Any = mx.fast.cuda_kernel
    mark = make(
        name=MARKER, input_names=["a"], output_names=["b"], source="if (!blockIdx.x) b[0] = a[0];"
    )
    one = mx.ones((1,))
    launch.run = spying
    for op, direction, shape, name in cases:
        mx.random.seed(0)
        options = {"differentiable": False} if direction == "forward" else {}
        inputs = make_inputs(op, shape, DTYPES[name])
        arrays = add_cotangents(op, direction, inputs)
        mx.eval(arrays)
        f = directed(
            function(ops, op, **options), direction, count_inputs(op, shape, DTYPES[name]), False
        )
        for _ in range(2):
            seen.clear()
            groups = len(launched) + 1
            places = {"grid": (groups, 1, 1), "threadgroup": (1, 1, 1)}
            mx.eval(mark(inputs=[one], output_shapes=[(1,)], output_dtypes=[one.dtype], **places))
            mx.synchronize()
            mx.eval(f(*arrays))
            mx.synchronize()
            launched.append(list(seen))
        Path(file).write_text(json.dumps(launched))
        del inputs, arrays
        mx.clear_cache()


def metrics() -> dict[str, str]:
    """Return the metrics to ask for, of those that this GPU has, by their names in a row."""
    found = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True)
    known = set(re.findall(r"(?m)^(\w+__\w+)", found.stdout))
    if "gpu__time_duration" not in known:
        raise ValueError(f"ncu does not name its metrics: {found.stdout[-500:]}{found.stderr}")
    asked = {k: m for k, m in FIGURES.items() if m.split(".")[0] in known or "launch__" in m}
    for name in sorted(known):
        stall = re.fullmatch(STALL, name)
        if stall and not stall[1].endswith("not_issued"):
            asked[f"stall_{stall[1]}"] = f"{name}.ratio"
    return asked


def profiled(text: str, names: dict[str, str]) -> list[dict]:
    """The kernels of ncu's page of raw figures, in order: name, threadgroups, threads, figures."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))[1:]  # the first line after the heads has the units

    def number(text: str) -> float | None:
        try:
            return float(text.replace(",", ""))
        except ValueError:  # ncu has "n/a"
            return None

    found = []
    for row in rows:
        sizes = [int(re.findall(r"\d+", row[k])[0]) for k in ("Grid Size", "Block Size")]
        figures = {k: number(row[m]) for k, m in names.items() if row.get(m)}
        found.append(
            {"name": row["Kernel Name"], "groups": sizes[0], "threads": sizes[1]} | figures
        )
    return found


def joined(cases: list[tuple], kernels: list[dict], launched: list[list[dict]]) -> Iterator[dict]:
    """Give each kernel of the second run of each case what was launched.

    Raises:
        ValueError: A kernel has no launch of its body, threadgroups and threads.
    """
    remaining: list[dict] = []
    about, counts = {}, False
    for kernel in kernels:
        if MARKER in kernel["name"]:
            run = kernel["groups"] - 1
            remaining = list(launched[run]) if run < len(launched) else []
            about = dict(zip(("op", "direction", "shape", "dtype"), cases[run // 2], strict=True))
            counts = run % 2 == 1 and run < len(launched)
            continue
        if not counts:
            continue
        fits = [
            k
            for k, row in enumerate(remaining)
            if f"custom_kernel_{row['kernel']}" in kernel["name"]
            and (row["groups"], row["threads"]) == (kernel["groups"], kernel["threads"])
        ]
        if not fits:
            raise ValueError(f"no launch of {about} is the kernel {kernel}")
        # a body's name may begin another's
        best = max(fits, key=lambda k: (len(remaining[k]["kernel"]), -k))
        figures = {k: v for k, v in kernel.items() if k != "name"}
        yield about | remaining.pop(best) | figures


def check(report) -> None:
    check_strings(report, "device", "mlx", "date", "command")
    if not isinstance(report.get("kernels"), list):
        raise ValueError("its kernels are missing")


def measure(cases: list[tuple], names: dict[str, str], folder: Path) -> list[dict]:
    """Run cases under ncu, which leaves its page in folder, and return their kernels."""
    log, file = folder / "ncu.csv", folder / "launched.json"
    command = ["ncu", "--clock-control", "none", "-k", "regex:custom_kernel", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--metrics", ",".join(names.values())]
    child = [sys.executable, "-m", "benchmarks.kernel_times", "--launched", str(file)]
    child += ["--cases", ",".join(str(CASES.index(case)) for case in cases)]
    subprocess.run([*command, *child], check=True)
    launched = json.loads(file.read_text())
    return list(joined(cases, profiled(log.read_text(), names), launched))


def heading(names: dict[str, str]) -> dict:
    """Return what a report says beside its kernels."""
    version = subprocess.run(["ncu", "--version"], capture_output=True, text=True).stdout
    report = {"device": mx.device_info()["device_name"], "mlx": version_of("mlx")}
    report |= {"date": datetime.date.today().isoformat()}
    report |= {"command": f"ncu --clock-control none -k regex:custom_kernel {COMMAND}"}
    return report | {"ncu": version.strip().splitlines()[-1], "metrics": names}


def reports(earlier: dict | None, names: dict[str, str], seconds: float, folder: Path):
    """Yield the report after each case, which ncu runs in a process of its own: what was measured
    is not lost if the next one fails."""
    kernels, left = list(earlier["kernels"]) if earlier else [], list(remaining(earlier))
    head, began = heading(names), time.perf_counter()
    yield head | {"left_out": [list(case) for case in left], "kernels": kernels}
    while left and time.perf_counter() - began <= seconds:
        case = left.pop(0)
        kernels += measure([case], names, folder)
        print(f"{time.perf_counter() - began:5.0f} s: {case}", flush=True)
        yield head | {"left_out": [list(case) for case in left], "kernels": kernels}


def remaining(earlier: dict | None) -> list[tuple]:
    """The cases to run: all, or those that an earlier result left out."""
    if earlier is None:
        return CASES
    left = [
        (op, direction, tuple(shape), name) for op, direction, shape, name in earlier["left_out"]
    ]
    return [case for case in CASES if case in left]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(COMMAND, __doc__)
    parser.add_argument("--json", metavar="FILE", help="new, or an earlier result")
    parser.add_argument("--seconds", type=float, default=200, help="no case begins later")
    parser.add_argument("--raw", metavar="FOLDER", help="keep ncu's page and the launches there")
    parser.add_argument("--cases", help=argparse.SUPPRESS)  # of the profiled process
    parser.add_argument("--launched", help=argparse.SUPPRESS)  # what the profiled process writes
    args = parser.parse_args(argv)
    if launch.backend() != "cuda":
        parser.error("it must run on an NVIDIA GPU, with MLX for CUDA")
    if args.launched:
        run_cases([CASES[int(k)] for k in args.cases.split(",")], args.launched)
        return
    if shutil.which("ncu") is None:
        parser.error("it must have ncu, NVIDIA's Nsight Compute, on the path")
    try:
        output = Output("--json", args.json, f"a result of {COMMAND}", check)
        earlier = None
        if args.json and Path(args.json).exists() and Path(args.json).stat().st_size:
            earlier = read("--json", args.json, f"a result of {COMMAND}", check)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(args.raw or folder)
        raw.mkdir(parents=True, exist_ok=True)
        report = {}
        for report in reports(earlier, metrics(), args.seconds, raw):
            output.update(report)
    print(f"{len(report['kernels'])} kernels; left out: {report['left_out']}")
    if reason := output.finish(report):
        sys.exit(reason)


if __name__ == "__main__":
    main()
