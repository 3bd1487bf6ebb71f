"""Report how this device runs the kernels: for an issue, from a Mac above all.

It needs mlx and this package alone. It compiles every variant of the kernels that the main shapes
launch, and says which fail, with the compiler's message; on Metal it asks MLX for more threads than
there can be, and MLX's refusal names how many fit (nothing is launched then). It compares every op,
outputs and gradients, with the reference, and times ops and rows of sublayers at one token beside
plain MLX compiled. On a CPU, where no kernels run, it goes the same way with tiny shapes by the
reference.

The report is written after each row, so that a stop at any moment (Ctrl-C, SIGTERM, kill -9, a
crash) loses at most the row that runs, whose name is in the file. At the end it prints a summary:
paste it into an issue, and attach the file. Neither has your name or your machine's.
"""

import argparse
import datetime
import math
import shlex
import shutil
import signal
import sys
import time
from typing import Any

from ..commands import Output, check_strings, make_parser, read
from .machine import machine, power
from .parts import PARTS, Job, jobs_of
from .summary import summary

COMMAND = "python -m mhc_mlx.device_report"
FORMAT = 1
# No row of a part starts later than at this share of the time, so that later parts have theirs.
SHARES = {"variants": 0.4, "parity": 0.6, "times": 0.8, "decode": 0.9}


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


def check_report(report: Any) -> None:
    """Raise ValueError unless this command has written the report."""
    check_strings(report, "command", "date")
    if not report["command"].startswith(COMMAND):
        raise ValueError(f"its command is {report['command']}")
    if report.get("format") != FORMAT:
        raise ValueError(f"its format is {report.get('format')}, and this version reads {FORMAT}")
    try:
        summary(report)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is damaged: {error!r}") from None


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options; open the output, or read the report of --from."""
    parser = make_parser(COMMAND, __doc__)
    add = parser.add_argument
    add("--json", metavar="FILE", help="the report: new, or an earlier one (mhc-report.json)")
    add(
        "--only",
        metavar="PART",
        action="append",
        choices=PARTS,
        help=f"repeatable: {', '.join(PARTS)}",
    )
    add("--minutes", type=float, help="no row starts after nearly so long (5)")
    add("--from", dest="source", metavar="FILE", help="run nothing: print the summary of this file")
    args = parser.parse_args(argv)
    try:
        if args.source is not None:
            for name in ("json", "only", "minutes"):
                if getattr(args, name) is not None:
                    raise ValueError(f"--{name} does nothing with --from")
            args.report = read("--from", args.source, f"a report of {COMMAND}", check_report)
            return args
        args.minutes = 5.0 if args.minutes is None else args.minutes
        if not 0 < args.minutes < math.inf:
            raise ValueError(f"--minutes must be positive and finite but is {args.minutes}")
        for part in args.only or []:
            if args.only.count(part) > 1:
                raise ValueError(f"--only {part} must be given once but is given twice")
        args.json = "mhc-report.json" if args.json is None else args.json
        args.output = Output("--json", args.json, f"a report of {COMMAND}", check_report)
    except ValueError as error:
        parser.error(str(error))
    return args


class Progress:
    """A line on standard error that tells how far the report is; nothing where no one watches."""

    def __init__(self, total: int):
        self.done, self.total, self.shown = 0, total, sys.stderr.isatty()

    def show(self, name: str) -> None:
        if not self.shown:
            return
        filled = 20 * self.done // max(1, self.total)
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {self.done}/{self.total} {name}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:{width}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print(f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r", end="", file=sys.stderr)


def run_job(job: Job) -> dict[str, Any]:
    """Return a job's row; what MLX refuses is in it as ``error``, and the report goes on."""
    try:
        return job.row | job.run()
    except (RuntimeError, ValueError, MemoryError) as error:
        return job.row | {"ok": False, "error": str(error) or type(error).__name__}


def fill(report: dict[str, Any], jobs: dict[str, list[Job]], args: argparse.Namespace) -> None:
    """Run the jobs until the time of each part is up; write the report before each."""
    start, progress = time.monotonic(), Progress(sum(map(len, jobs.values())))
    try:
        for part in jobs:
            for job in jobs[part]:
                if time.monotonic() - start > 60 * args.minutes * SHARES[part]:
                    break
                report["running"] = f"{part}: {job.name}"
                progress.show(report["running"])
                args.output.update(report)
                report[part].append(run_job(job))
                report["missing"][part].remove(job.name)
                progress.done += 1
    finally:
        progress.clear()
    report["running"] = None


def stop(number: int, _frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


def measure(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Fill the report; a signal ends it early, and its name is then in the report."""
    signals = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, stop) for number in signals}
    parts = [part for part in PARTS if part in (args.only or PARTS)]
    try:
        report |= {"missing": {part: ["its rows were not listed yet"] for part in parts}}
        report |= {part: [] for part in parts}
        args.output.update(report)
        jobs = {part: jobs_of(part) for part in parts}
        report["missing"] = {part: [job.name for job in jobs[part]] for part in parts}
        fill(report, jobs, args)
        report["finished"] = True
    except Stopped as error:
        report["stopped"] = str(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    report["power"]["after"] = power()


def main(argv: list[str] | None = None) -> None:
    """Run the command. Its status is 1 if something fails, and after a signal 128 + its number."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.source is not None:
        print(*summary(args.report), sep="\n")
        return
    report: dict[str, Any] = {"command": shlex.join([*COMMAND.split(), *argv]), "format": FORMAT}
    report |= {"date": datetime.date.today().isoformat(), "machine": machine()}
    report |= {"power": {"before": power()}, "finished": False, "stopped": None, "running": None}
    measure(report, args)
    unwritten = args.output.finish(report)
    print(*summary(report), sep="\n", flush=True)
    if unwritten:
        print(unwritten, file=sys.stderr)
    elif not args.output.stream:
        print(f"Paste these lines into an issue, and attach {args.json}.")
    if report["stopped"]:
        sys.exit(128 + signal.Signals[report["stopped"]])
    rows = [row for part in PARTS for row in report.get(part, [])]
    sys.exit(bool(unwritten) or any(row.get("ok") is False for row in rows))


if __name__ == "__main__":
    main()
