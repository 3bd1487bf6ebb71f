"""Says which mutants the tests catch.

    python tests/mutation/run.py bodies --workers 16 --part 1/4 --report report.json
    python tests/mutation/run.py planted                     the mistakes planted by hand
    python tests/mutation/run.py run --only ops/tiling.py --tests tests/ops/test_tiling.py
    python tests/mutation/run.py show --seed 1 --count 300   what `run` would draw

`bodies` judges one mutant of each operator in each kernel text (sampler.of_kernels), of which
test_operators.py has a sample in CI: its bodies run on a few cases (bodies.py). It prints a table
of what each rung caught, and the survivors. Without clang-19 those survive that only the optimiser
rung catches.

`run` draws mutants of any file, also of Python. After a kernel text's bodies have run, one pytest
runs the tests that --tests names, and stops at the first failure.

Each mutant is planted in a copy of the tree, a copy for each worker. A test that takes five times
as long as without the mutant has caught it. A test that failed runs again without the mutant: where
it fails too, the outcome is "unsure". Mutants in survivors.py are not run: "known". A run that was
cut short, by --seconds or killed, goes on where its report ends; parts may share a report.

The report is JSON: outcome (caught, survived, timeout, unsure, known, gpu), who caught it, seconds.
"gpu": NVRTC takes the mutant, and only a GPU runs this text (`run --gpu` there).

It needs the tests' dependencies, no GPU and no network. A kernel's mutant takes about 7 seconds of
one core, a survivor up to a minute or two.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mutation.choice import ONLY_GPU, backends, bodies_of  # noqa: E402
from mutation.operators import ROOT, Mutant  # noqa: E402
from mutation.sampler import of_kernels, sample  # noqa: E402
from mutation.survivors import why  # noqa: E402

COPIED = ("mhc_mlx", "kernels", "tests", "benchmarks", "examples", "benchmark.py")
COPIED += ("docs", "pyproject.toml", "README.md", "ONBOARDING.md", "LICENSE", ".ci", ".gitignore")
FACTOR = 5  # how much longer than without a mutant tests take before they count as hanging
BODIES = 300.0  # seconds for bodies.py, at most
WITHOUT_GPU = ["tests/proof/test_nvrtc.py::test_instructions_of_ptx"]  # can see some of that
# by the ends of files' names: tests of what no body executes without a GPU
BESIDES = {"/metal/packs.h": ["tests/ops/test_alignment.py::test_packs_of_small_inputs"]}
STARTING = 8.0  # seconds for pytest to begin, at most
LONGEST = 7200.0  # seconds for tests without a mutant, at most
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rfE", "-W", "ignore"]


def copy_tree(to: Path) -> Path:
    """What tests need of the checkout."""
    ignored = shutil.ignore_patterns("__pycache__")
    to.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, to / name)
    return to


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }


def command(arguments: list, tree: Path, env: dict, seconds: float) -> tuple[int | None, str]:
    """The exit code, None where it took too long, and what was printed."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tree,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:  # what the tests started may still run
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        out.seek(0)
        return code, out.read().decode(errors="replace")


@dataclasses.dataclass
class Result:
    mutant: str
    key: tuple
    outcome: str
    test: str = ""
    seconds: float = 0.0


class Worker:
    """A copy of the tree in which mutants are planted, one at a time."""

    def __init__(self, folder: Path, tests: list[str], gpu: bool = False, launches: str = ""):
        self.tree, self.tests, self.gpu, self.launches = copy_tree(folder), tests, gpu, launches
        self.clock = int(time.time())

    def write(self, file: str, text: str) -> None:
        path = self.tree / file
        path.write_text(text)
        self.clock += 2  # or Python takes what it compiled before for this text
        os.utime(path, (self.clock, self.clock))

    def judge(self, m: Mutant) -> Result:
        tests, only_gpu = tuple(self.tests), bool(ONLY_GPU.search(m.file))
        tests += tuple(t for end, names in BESIDES.items() if m.file.endswith(end) for t in names)
        if only_gpu:
            tests = (*WITHOUT_GPU, *["tests/ops/test_gpu.py"] * self.gpu)
        limit = FACTOR * (self.seconds_without_mutant(tests) + STARTING)
        start, source = time.perf_counter(), (ROOT / m.file).read_text()
        result = Result(str(m), m.key, "survived")
        self.write(m.file, m.apply(source))
        try:
            if not m.file.endswith(".py"):
                result.outcome, result.test = self.of_bodies(m)
            if result.outcome == "survived" and tests:
                result.outcome, result.test = self.of_tests(m, source, tests, limit)
        finally:
            self.write(m.file, source)
        if only_gpu and not self.gpu and result.outcome == "survived":
            result.outcome = "gpu"
        result.seconds = round(time.perf_counter() - start, 2)
        return result

    def pytest(self, names: tuple[str, ...], limit: float) -> tuple[int | None, str]:
        arguments = [*PYTEST, "-x", f"--basetemp={self.tree}/temporary", *names]
        return command(arguments, self.tree, environment(self.tree), limit)

    @functools.cache  # noqa: B019 (a worker lives as long as the program)
    def seconds_without_mutant(self, tests: tuple[str, ...]) -> float:
        start = time.perf_counter()
        if tests:
            self.pytest(tests, LONGEST)
        return time.perf_counter() - start

    def of_tests(self, m: Mutant, source: str, tests: tuple, limit: float) -> tuple[str, str]:
        """What the tests say of the mutant, and those that failed without it."""
        code, text = self.pytest(tests, limit)
        if code in (0, None):
            return "survived" if code == 0 else "timeout", f"{limit:.0f} s" * (code is None)
        self.write(m.file, source)
        failed = tuple(re.findall(r"(?m)^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text))
        right = self.pytest(failed or tests, LONGEST)[0] == 0
        return "caught" if right else "unsure", first_failure(text, code)

    def of_bodies(self, m: Mutant) -> tuple[str, str]:
        """What the simulator, parity, pinned traffic and the compilers say of the bodies."""
        forms = "nvrtc" if ONLY_GPU.search(m.file) else ",".join(backends(m.file))
        program = ["tests/mutation/bodies.py", "run", self.launches, forms, *sorted(bodies_of(m))]
        code, text = command(program, self.tree, environment(self.tree), BODIES)
        if code is None:
            self.write(m.file, (ROOT / m.file).read_text())
            start = time.perf_counter()
            command(program, self.tree, environment(self.tree), BODIES)
            seconds = time.perf_counter() - start
            self.write(m.file, m.apply((ROOT / m.file).read_text()))
            outcome = "timeout" if FACTOR * seconds <= BODIES else "survived"
            return outcome, f"more than {BODIES:.0f} s, not {seconds:.0f}"
        return ("caught" if code else "survived"), (text.strip().split("\n") or [""])[-1][:300]


def first_failure(text: str, code: int) -> str:
    found = re.search(r"(?m)^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", text)
    if found:
        return f"{found.group(1)}: {(found.group(2) or '')[:160]}"
    lines = [line for line in text.split("\n") if line.strip()]
    return f"pytest ended with {code}: {lines[-1][:200] if lines else 'nothing'}"


def longest_first(m: Mutant) -> int:
    """A mutant in more bodies runs more cases if it survives."""
    return 0 if m.file.endswith(".py") else -len(bodies_of(m))


def run(
    chosen: list[Mutant], workers: int, report: Path | None, seconds: float, *judges
) -> list[Mutant]:
    """Judge mutants, by a `Worker` of ``judges`` in each thread; return those that did not start
    in this time. The report keeps what else it has."""
    before, keys, start = earlier(report), {m.key for m in chosen}, time.monotonic()
    results = [r for r in before if r.key in keys]
    others = [r for r in before if r.key not in keys]
    chosen = [m for m in chosen if m.key not in {r.key for r in results}]
    chosen.sort(key=longest_first)
    idle, lock, left = queue.SimpleQueue(), threading.Lock(), []

    def one(m: Mutant) -> None:
        if time.monotonic() - start > seconds:
            left.append(m)
            return
        known, worker = why(m), idle.get()
        try:
            result = Result(str(m), m.key, "known", known) if known else worker.judge(m)
        finally:
            idle.put(worker)
        with lock:
            results.append(result)
            print(f"{result.outcome} {result.seconds:.0f} s: {m}\n    {result.test}", flush=True)
            if report:
                part = report.with_name(report.name + ".part")
                rows = [dataclasses.asdict(r) for r in others + results]
                part.write_text(json.dumps(rows, indent=1))
                os.replace(part, report)

    with tempfile.TemporaryDirectory() as folder:
        launches = f"{folder}/launches.json"
        if any(not m.file.endswith(".py") for m in chosen):
            listing = ["tests/mutation/bodies.py", "list", launches]
            code, text = command(listing, ROOT, environment(ROOT), 600)
            if code:
                raise SystemExit(text)
        for k in range(workers):
            idle.put(Worker(Path(folder, f"{k}"), *judges, launches))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, chosen))
    each = sum(r.seconds for r in results) / max(len(results), 1)
    print(f"\n{table(results)}\n\n{each:.1f} s each")
    for r in sorted(results, key=lambda r: r.mutant):
        if r.outcome in ("survived", "unsure", "gpu"):
            print(f"{r.outcome}: {r.mutant}")
    return left


def table(results: list[Result]) -> str:
    """Per file how many mutants each rung caught, and the other outcomes."""
    counts: dict[str, Counter] = {}
    for r in results:
        rung = re.search("does not compile|rules|parity|traffic|dialect|nvrtc|optimiser", r.test)
        word = rung.group() if r.outcome == "caught" and rung else r.outcome
        counts.setdefault(r.key[0], Counter())[word] += 1
    counts["all"] = sum(counts.values(), Counter())
    words = [word for word, _ in counts["all"].most_common()]
    lines = [["mutants in", *words], ["---"] * (len(words) + 1)]
    lines += [[file, *(str(c[word] or "") for word in words)] for file, c in counts.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def planted() -> None:
    """Who catches what of the mistakes that are planted by hand."""
    from mutation.test_planted import PLANTED, RUNGS, objections

    print(f"| mistake | body | {' | '.join(RUNGS)} |\n|---|---|{'---|' * len(RUNGS)}")
    for m in PLANTED:
        says = objections(m.case, m.body, m)
        marks = " | ".join("caught" if r in says else "" for r in RUNGS)
        file = m.body if m.file == f"{m.body}.metal" else f"{m.body} ({m.file})"
        print(f"| {m.what} | {file} | {marks} |", flush=True)


def earlier(report: Path | None) -> list[Result]:
    """What a run that was cut short has in its report."""
    if report is None or not report.exists():
        return []
    return [Result(**r | {"key": tuple(r["key"])}) for r in json.loads(report.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("bodies", "planted", "run", "show"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="part of files' names")
    parser.add_argument("--part", default="1/1", help="of bodies: I/N, every Nth from the Ith")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--tests", nargs="+", default=[], help="of run: files or names of tests")
    parser.add_argument("--gpu", action="store_true", help="test_gpu.py on what only a GPU runs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no mutant starts later")
    parser.add_argument("--report", type=Path, help="JSON of every mutant's outcome")
    args = parser.parse_args()
    if args.command == "planted":
        return planted()
    if args.command == "bodies":
        first, count = map(int, args.part.split("/"))
        chosen = of_kernels(args.only)[first - 1 :: count]
    else:
        chosen = sample(args.seed, args.count, args.only)
    if args.command == "show":
        return print(*chosen, sep="\n")
    if not args.tests and any(m.file.endswith(".py") for m in chosen):
        parser.error("--tests must name tests of the Python that --only names")
    left = run(chosen, args.workers, args.report, args.seconds, args.tests, args.gpu)
    if left:
        sys.exit(f"{len(left)} of {len(chosen)} are left: the same command goes on with them")


if __name__ == "__main__":
    main()
