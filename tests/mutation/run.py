"""Says which mutants the tests catch.

    python tests/mutation/run.py bodies --workers 16 --part 1/4 --report report.json
    python tests/mutation/run.py planted                     the mistakes planted by hand
    python tests/mutation/run.py record --workers 16         once; again when tests have changed
    python tests/mutation/run.py run --seed 1 --count 300 --workers 16 --report report.json
    python tests/mutation/run.py run --again report.json     the survivors of a report once more
    python tests/mutation/run.py show --seed 1 --count 300   what would be drawn, and by which tests

`bodies` judges one mutant of each operator in each kernel text (sampler.of_kernels), of which
test_operators.py has a sample in CI: its bodies run on a few cases (bodies.py). It prints a table
of what each rung caught, and the survivors. It needs no `record`.

`record` runs the tests once and keeps which lines of Python each test runs, which variants of
bodies it launches and how long it takes, in .mutation/map.json.gz. `run` draws mutants of any file,
also of Python. After a kernel text's bodies have run, one pytest that stops at the first failure
runs the tests that run the mutant's line (or launch a body that its text is part of): cheapest
first, first one test of every function, as far as --budget seconds go (of those that were recorded,
and of compiling the changed body).

Each mutant is planted in a copy of the tree, a copy for each worker. A mutant that no test can see
is a survivor at once. One whose tests take too long is caught only if the same tests take a fifth
of that time without it. A test that failed runs again without the mutant: where it fails too, the
outcome is "unsure". Mutants in survivors.py are not run: "known". A run that was cut short goes on
where its report ends.

The report is JSON: outcome (caught, survived, timeout, unsure, known, gpu), who caught it, seconds,
how many tests ran of how many that could. "gpu": NVRTC takes the mutant, and only a GPU runs this
text (`run --gpu` there). Tests in mutation/, and those that need a GPU, are left out: see
choice.py.

It needs the tests' dependencies, no GPU and no network. A mutant takes about 7 seconds of one core,
a survivor up to a minute or two.
"""

import argparse
import dataclasses
import gzip
import json
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
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mutation.choice import LEFT_OUT, ONLY_GPU, SLOW, Map, backends, bodies_of, digests  # noqa: E402
from mutation.operators import ROOT, Mutant, mutants  # noqa: E402
from mutation.sampler import of_kernels, sample  # noqa: E402
from mutation.survivors import why  # noqa: E402

MAP = ROOT / ".mutation" / "map.json.gz"
COPIED = ("mhc_mlx", "kernels", "tests", "benchmarks", "examples", "benchmark.py")
COPIED += ("docs", "pyproject.toml", "README.md", "ONBOARDING.md", "LICENSE", ".ci", ".gitignore")
FACTOR = 5  # how much longer than without a mutant tests take before they count as hanging
BODIES = 300.0  # seconds for bodies.py, at most
WITHOUT_GPU = ["tests/proof/test_nvrtc.py::test_instructions_of_ptx"]  # can see some of that
STARTING = 8.0  # seconds for pytest to begin, at most
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rfE", "-W", "ignore"]


def copy_tree(to: Path) -> Path:
    """What tests need of the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", ".mutation")
    to.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, to / name)
    return to


def environment(tree: Path, **more: str) -> dict[str, str]:
    paths = [tree, tree / "tests", tree / "tests/mutation/children"]
    found = {k: v for k, v in os.environ.items() if not k.startswith("MUTATION_")}
    found |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return found | more


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


# --- record ---------------------------------------------------------------------------------------


def record(workers: int, only: str, out: Path) -> None:
    """Run test files, each in a process, and keep what their tests saw."""
    files = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("tests/**/test_*.py"))]
    files = [f for f in files if not LEFT_OUT.match(f) and re.search(only, f)]
    with tempfile.TemporaryDirectory() as folder:
        tree, seen = copy_tree(Path(folder, "tree")), Path(folder, "seen")
        seen.mkdir()

        def go(name: str, *chosen: str) -> None:
            (seen / name).mkdir()
            env = environment(tree, MUTATION_RECORD=str(seen / name))
            start = time.perf_counter()
            options = ["-p", "mutation.lines", "--deselect", SLOW]
            code, text = command([*PYTEST, *options, *chosen], tree, env, 7200)
            last = [k for k in text.split("\n") if re.search("passed|failed|error", k)][-1:]
            print(f"{name}: {code}, {time.perf_counter() - start:.0f} s, {last}", flush=True)
            merge(seen, out, bool(only))

        if workers > 1:
            go("all", "-n", str(workers), "--dist", "worksteal", *files)
        else:
            for file in files:
                go(file.replace("/", "."), file)


lock = threading.Lock()


def merge(seen: Path, out: Path, keep: bool) -> None:
    """All that was recorded so far, in one file: its tests take the place of those before, which
    are kept if they were recorded of the same sources."""
    with lock:
        old = json.loads(gzip.decompress(out.read_bytes())) if keep and out.exists() else {}
        old = old if old.get("sources") == digests() else {}
        tests, collection, contexts, children = {}, {}, {}, []
        for path in seen.glob("*/*.json"):
            data = json.loads(path.read_text())
            if "contexts" in data:
                contexts |= {k: (v, path.parent.name) for k, v in data["contexts"].items()}
                for file, lines in data["collection"].items():
                    collection.setdefault(file, set()).update(lines)
            else:
                children.append(data)
        fixtures = {k: v for k, (v, _) in contexts.items() if k.startswith("fixture ")}
        for name, (one, _) in contexts.items():
            if name.startswith("fixture "):
                continue
            lines = {f: set(k) for f, k in one["lines"].items()}
            launched, shared = set(map(tuple, one["launched"])), {}
            for key in one["fixtures"]:
                for full in (k for k in fixtures if k.rpartition(" ")[0] == key):
                    shared[full] = fixtures[full]["seconds"]
                    launched |= set(map(tuple, fixtures[full]["launched"]))
                    for f, k in fixtures[full]["lines"].items():
                        lines.setdefault(f, set()).update(k)
            tests[name] = {
                "seconds": one["seconds"],
                "outcome": one["outcome"],
                "fixtures": shared,
                "lines": lines,
                "launched": sorted(launched),
            }
        for child in children:
            if child["test"] in tests:
                for file, k in child["lines"].items():
                    tests[child["test"]]["lines"].setdefault(file, set()).update(k)
        for one in tests.values():
            one["lines"] = {f: sorted(k) for f, k in one["lines"].items()}
        for file, k in old.get("collection", {}).items():
            collection.setdefault(file, set()).update(k)
        data = {
            "sources": digests(),
            "tests": old.get("tests", {}) | tests,
            "collection": {f: sorted(k) for f, k in collection.items()},
        }
        out.parent.mkdir(exist_ok=True, parents=True)
        part = out.with_suffix(".part")
        part.write_bytes(gzip.compress(json.dumps(data).encode(), 4))
        os.replace(part, out)


def each(items: list, workers: int, f, make=None) -> None:
    """f(item), or f(item, made) with what ``make`` made for the thread, in threads."""
    todo = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def work(k: int) -> None:
        made = [make(k)] if make else []
        while True:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            f(item, *made)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(min(workers, len(items)))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


# --- run ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    mutant: str
    key: tuple
    outcome: str
    test: str = ""
    seconds: float = 0.0
    ran: int = 0
    could: int = 0


class Worker:
    """A copy of the tree in which mutants are planted, one at a time."""

    def __init__(
        self, folder: Path, known: Map | None, budget: float, gpu: bool = False, launches: str = ""
    ):
        self.tree, self.known, self.budget, self.gpu = copy_tree(folder), known, budget, gpu
        self.launches = launches
        self.clock = int(time.time())

    def write(self, file: str, text: str) -> None:
        path = self.tree / file
        path.write_text(text)
        self.clock += 2  # or Python takes what it compiled before for this text
        os.utime(path, (self.clock, self.clock))

    def judge(self, m: Mutant) -> Result:
        start = time.perf_counter()
        source = (ROOT / m.file).read_text()
        result = Result(str(m), m.key, "survived")
        kernel = not m.file.endswith(".py")
        only_gpu = bool(ONLY_GPU.search(m.file))
        tests = self.known.ordered(*self.known.of_mutant(m)) if self.known else []
        chosen, total = [], 0.0
        for name, seconds in tests:
            if not chosen or total + seconds <= self.budget:
                chosen.append(name)
                total += seconds
        if only_gpu:
            chosen, total = WITHOUT_GPU, 10.0
            if self.gpu:
                chosen, total = [*WITHOUT_GPU, "tests/ops/test_gpu.py"], 610.0
        result.could, result.ran = len(tests), len(chosen)
        if not tests and not kernel:
            return result
        self.write(m.file, m.apply(source))
        try:
            if kernel:
                result.outcome, result.test = self.of_bodies(m)
            if chosen and result.outcome == "survived":
                limit = FACTOR * (total + STARTING)
                code, text = self.pytest(chosen, limit)
                if code is None:
                    result.outcome, result.test = self.hangs(m, source, chosen, limit)
                elif code not in (0, 5):  # 5: it has no tests
                    result.test = first_failure(text, code)
                    result.outcome = "caught" if self.right(m, source, chosen, text) else "unsure"
        finally:
            self.write(m.file, source)
        if only_gpu and not self.gpu and result.outcome == "survived":
            result.outcome = "gpu"
        result.seconds = round(time.perf_counter() - start, 2)
        return result

    def pytest(self, names: list[str], limit: float) -> tuple[int | None, str]:
        start = time.perf_counter()
        code, text = self.started(names, limit)
        if code == 4:  # a test has another name now: all of its function instead
            functions = list(dict.fromkeys(n.partition("[")[0] for n in names))
            code, text = self.started(functions, max(limit - (time.perf_counter() - start), 60))
        return code, text

    def started(self, names: list[str], limit: float) -> tuple[int | None, str]:
        path = self.tree / "tests.json"
        path.write_text(
            json.dumps([*PYTEST[2:], "-x", f"--basetemp={self.tree}/temporary", *names])
        )
        text = "import json, sys, pytest; sys.exit(pytest.main(json.load(open('tests.json'))))"
        return command(["-c", text], self.tree, environment(self.tree), limit)

    def right(self, m: Mutant, source: str, names: list[str], text: str) -> bool:
        """Whether the test that failed, or all where none is named, passes without the mutant."""
        self.write(m.file, source)
        failed = re.findall(r"(?m)^(?:FAILED|ERROR) (.*)$", text)
        named = [n for n in names if any(f == n or f.startswith(f"{n} - ") for f in failed)]
        return self.pytest(named or names, 600)[0] in (0, 5)

    def hangs(self, m: Mutant, source: str, names: list[str], limit: float) -> tuple[str, str]:
        """Whether the tests that took too long are fast without the mutant."""
        self.write(m.file, source)
        start = time.perf_counter()
        self.pytest(names, limit)
        fast = FACTOR * (time.perf_counter() - start) <= limit
        return ("timeout" if fast else "survived"), f"more than {limit:.0f} s"

    def of_bodies(self, m: Mutant) -> tuple[str, str]:
        """What the simulator, parity, pinned traffic, the dialect and NVRTC say of the bodies."""
        forms = "nvrtc" if ONLY_GPU.search(m.file) else ",".join(backends(m.file))
        program = ["tests/mutation/bodies.py", "run", self.launches, forms, *sorted(bodies_of(m))]

        def go() -> tuple[int | None, str]:
            return command(program, self.tree, environment(self.tree), BODIES)

        code, text = go()
        if code is None:
            self.write(m.file, (ROOT / m.file).read_text())
            start = time.perf_counter()
            go()
            seconds = time.perf_counter() - start
            self.write(m.file, m.apply((ROOT / m.file).read_text()))
            slow = FACTOR * seconds <= BODIES
            return (
                "timeout" if slow else "survived"
            ), f"more than {BODIES:.0f} s, not {seconds:.0f}"
        return ("caught" if code else "survived"), (text.strip().split("\n") or [""])[-1][:300]


def first_failure(text: str, code: int) -> str:
    found = re.search(r"(?m)^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", text)
    if found:
        return f"{found.group(1)}: {(found.group(2) or '')[:160]}"
    lines = [line for line in text.split("\n") if line.strip()]
    return f"pytest ended with {code}: {lines[-1][:200] if lines else 'nothing'}"


def run(chosen: list[Mutant], workers: int, report: Path | None, *judges) -> None:
    """Judge mutants, by a `Worker` of ``judges`` in each thread."""
    results = [r for r in earlier(report) if r.key in {m.key for m in chosen}]
    chosen = [m for m in chosen if m.key not in {r.key for r in results}]

    def one(m: Mutant, worker: Worker) -> None:
        known = why(m)
        result = Result(str(m), m.key, "known", known) if known else worker.judge(m)
        with lock:
            results.append(result)
            print(f"{result.outcome} {result.seconds:.0f} s, {result.ran} of {result.could}: {m}")
            print(f"    {result.test}", flush=True)
            if report:
                data = json.dumps([dataclasses.asdict(r) for r in results], indent=1)
                part = report.with_name(report.name + ".part")
                part.write_text(data)
                os.replace(part, report)

    with tempfile.TemporaryDirectory() as folder:
        launches = f"{folder}/launches.json"
        if any(not m.file.endswith(".py") for m in chosen):
            listing = ["tests/mutation/bodies.py", "list", launches]
            code, text = command(listing, ROOT, environment(ROOT), 600)
            if code:
                raise SystemExit(text)
        judges = (*judges, launches)
        each(chosen, workers, one, lambda k: Worker(Path(folder, f"{k}"), *judges))
    seconds = sum(r.seconds for r in results) / max(len(results), 1)
    print(f"\n{table(results)}\n\n{seconds:.1f} s each")
    for r in sorted(results, key=lambda r: r.mutant):
        if r.outcome in ("survived", "unsure", "gpu"):
            print(f"{r.outcome}, {r.ran} of {r.could} tests: {r.mutant}")


def table(results: list[Result]) -> str:
    """Per file how many mutants each rung caught, and the other outcomes."""
    counts: dict[str, Counter] = {}
    for r in results:
        rung = re.search("does not compile|rules|parity|traffic|dialect|nvrtc", r.test)
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


def again(report: Path) -> list[Mutant]:
    """The survivors of a report."""
    keys = {r.key for r in earlier(report) if r.outcome in ("survived", "unsure")}
    files = sorted({k[0] for k in keys})
    found = {m.key: m for f in files for m in mutants(ROOT / f) if m.key in keys}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("bodies", "planted", "record", "run", "show"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--map", type=Path, default=MAP, help="where record keeps what it saw")
    parser.add_argument("--only", default="", help="part of files' names (record: of test files)")
    parser.add_argument("--part", default="1/1", help="of bodies: I/N, every Nth from the Ith")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for a mutant")
    parser.add_argument("--gpu", action="store_true", help="test_gpu.py on what only a GPU runs")
    parser.add_argument("--report", type=Path, help="JSON of every mutant's outcome")
    parser.add_argument("--again", type=Path, help="a report whose survivors are run")
    args = parser.parse_args()
    if args.command == "record":
        return record(args.workers, args.only, args.map)
    if args.command == "planted":
        return planted()
    known = None
    if args.command == "bodies":
        first, count = map(int, args.part.split("/"))
        chosen = of_kernels(args.only)[first - 1 :: count]
    elif args.map.exists():
        known, chosen = Map(args.map), sample(args.seed, args.count, args.only)
    else:
        parser.error(f"{args.map} must exist: record it first")
    chosen = again(args.again) if args.again else chosen
    if args.command == "show":
        for m in chosen:
            tests = known.ordered(*known.of_mutant(m))
            print(f"{m}\n    {len(tests)} tests: {', '.join(n for n, _ in tests[:4])}")
        return
    run(chosen, args.workers, args.report, known, args.budget, args.gpu)


if __name__ == "__main__":
    main()
