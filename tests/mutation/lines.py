"""A pytest plugin: which lines of the package each test runs, which bodies it launches, how long.

`pytest -p mutation.lines` with MUTATION_RECORD, a folder, writes what this process saw
there. Programs that a test starts write what they see into the same folder:
children/sitecustomize.py, on PYTHONPATH, begins this in them.
"""

import atexit
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = tuple(f"{ROOT}{os.sep}{k}" for k in ("mhc_mlx", "benchmark", "examples"))
FORMS = ("simulator", "dialect", "nvrtc")


class Lines:
    """Lines of our files that run, into the set that is current."""

    def __init__(self):
        self.seen: set[tuple[str, int]] = set()
        self.known: dict = {}  # code's file: whether it is ours

    def ours(self, file: str) -> bool:
        if file not in self.known:
            self.known[file] = os.path.abspath(file).startswith(FOLDERS)
        return self.known[file]

    def start(self) -> None:
        if sys.version_info >= (3, 12):
            monitoring = sys.monitoring
            monitoring.use_tool_id(4, "mutation")
            monitoring.register_callback(4, monitoring.events.LINE, self.monitored)
            monitoring.set_events(4, monitoring.events.LINE)
        else:
            sys.settrace(self.called)
            threading.settrace(self.called)

    def switch(self, seen: set) -> set:
        """Makes another set current; returns the one before."""
        before, self.seen = self.seen, seen
        if sys.version_info >= (3, 12):
            sys.monitoring.restart_events()
        return before

    def monitored(self, code, line):
        if self.ours(code.co_filename):
            self.seen.add((code.co_filename, line))
        return sys.monitoring.DISABLE

    def called(self, frame, event, argument):
        return self.traced if self.ours(frame.f_code.co_filename) else None

    def traced(self, frame, event, argument):
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.traced


def by_file(seen: set) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file, line in sorted(seen):
        name = Path(os.path.abspath(file)).relative_to(ROOT).as_posix()
        found.setdefault(name, []).append(line)
    return found


def write(data: dict, kind: str) -> None:
    path = Path(os.environ["MUTATION_RECORD"], f"{kind}-{os.getpid()}-{time.time_ns()}.json")
    path.write_text(json.dumps(data))


def begin_child() -> None:
    """In a program that a test started."""
    lines, test = Lines(), os.environ.get("MUTATION_TEST", "")
    lines.start()
    atexit.register(lambda: write({"test": test, "lines": by_file(lines.seen)}, "child"))


class Recorder:
    """The hooks. A context is a test, or a fixture that several tests share."""

    def __init__(self):
        self.lines, self.launched = Lines(), set()
        self.contexts: dict[str, dict] = {}
        self.fixtures: dict[str, set[str]] = {}  # of a test
        self.open: list[float] = []  # seconds of shared fixtures within a context
        self.lines.start()

    def launches(self, form: str, run):
        def recorded(name, inputs, outputs, groups, threads, template, verbose=False):
            from proof import simulator

            kind = f"{form}, CUDA" if form == "simulator" and simulator._cuda else form
            self.launched.add((kind, name, str(sorted(map(str, template.items())))))
            return run(name, inputs, outputs, groups, threads, template, verbose)

        return recorded

    def within(self, context: str):
        """A hook wrapper's body: what runs inside belongs to the context."""
        lines, launched = self.lines.switch(set()), self.launched
        self.launched = set()
        self.open.append(0.0)
        start = time.perf_counter()
        result = yield
        seconds = time.perf_counter() - start
        inner = self.open.pop()
        if self.open:
            self.open[-1] += seconds
        one = self.contexts.setdefault(context, {"lines": set(), "launched": set(), "seconds": 0.0})
        one["seconds"] += seconds - inner
        one["launched"] |= self.launched
        one["lines"] |= self.lines.switch(lines)
        self.launched = launched
        return result


recorder = (
    Recorder() if __name__ == "mutation.lines" and "MUTATION_TEST" not in os.environ else None
)


def pytest_configure(config):
    from proof import missing

    for form in FORMS:
        if missing(form) is None:
            module = importlib.import_module(f"proof.{form}")
            module.run = recorder.launches(form, module.run)


def wrapper(f):
    import pytest

    return pytest.hookimpl(wrapper=True)(f)


@wrapper
def pytest_runtest_protocol(item, nextitem):
    os.environ["MUTATION_TEST"] = item.nodeid
    recorder.fixtures[item.nodeid] = set()
    return (yield from recorder.within(item.nodeid))


@wrapper
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.scope == "function" or not fixturedef.baseid:
        return (yield)
    return (yield from recorder.within(shared(fixturedef, request)))


def shared(fixturedef, request) -> str:
    return f"fixture {fixturedef.baseid} {fixturedef.argname} {request.param_index}"


def pytest_runtest_logreport(report):
    one = recorder.contexts.setdefault(
        report.nodeid, {"lines": set(), "launched": set(), "seconds": 0.0}
    )
    if report.outcome != "passed" or one.get("outcome") is None:
        one["outcome"] = (
            report.outcome if one.get("outcome") in (None, "passed") else one["outcome"]
        )


def pytest_runtest_teardown(item, nextitem):
    for defs in item._fixtureinfo.name2fixturedefs.values():
        for d in defs:
            if d.scope != "function" and d.baseid:
                recorder.fixtures[item.nodeid].add(f"fixture {d.baseid} {d.argname}")


def pytest_sessionfinish(session):
    contexts = {}
    for name, one in recorder.contexts.items():
        if name not in recorder.fixtures and not name.startswith("fixture "):
            continue  # a test of another process, of which this one has the report
        contexts[name] = {
            "lines": by_file(one["lines"]),
            "launched": sorted(one["launched"]),
            "seconds": round(one["seconds"], 3),
            "outcome": one.get("outcome"),
            "fixtures": sorted(recorder.fixtures.get(name, ())),
        }
    collection = by_file(recorder.lines.seen)
    write({"contexts": contexts, "collection": collection}, "tests")
