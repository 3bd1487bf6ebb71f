"""A benchmark runs in several processes, whose medians are the result."""

import argparse
import os
import re
import subprocess
import sys
import tempfile

from benchmarks import options
from benchmarks.report import SECTIONS, check_result, merge, show
from mhc_mlx import commands, launch


def arguments(args: argparse.Namespace, argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of the first process, and of later ones, which do not time the
    reference."""
    ours = "--(processes|json|plot|compare)"
    pairs = zip(["", *argv], argv, strict=False)
    theirs = [a for last, a in pairs if not re.match(ours, a) and not re.fullmatch(ours, last)]
    sections = options.sections(args)
    times_reference = not args.sweep and ("rows" in sections or "sizes" in sections)
    skip = ["--no-baseline"] if times_reference and launch.backend() else []
    return theirs, theirs + skip


def repeat(program: str, args: argparse.Namespace, argv: list[str], result: dict) -> list[str]:
    """Run a program in several processes and fill result with the median of each figure; it is
    written after each. The compiled reference is timed in the first only; ``spread`` is between
    processes. Where CUDA_VISIBLE_DEVICES names several GPUs, so many run at once, one on each.

    Returns:
        What went wrong.
    """
    ours = {k: result[k] for k in ("command", "date", "mlx")}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    results, wrong, running = [], [], []
    first, later = arguments(args, argv)
    with tempfile.TemporaryDirectory() as folder:

        def finish():
            k, process = running.pop(0)
            if status := process.wait():
                wrong.append(f"process {k} ended with status {status}")
            try:
                name = f"the result of process {k}"
                results.append(commands.read(name, f"{folder}/{k}.json", "JSON", check_result))
            except ValueError as error:
                wrong.append(str(error))
                return
            result.update(merge(results) | ours)
            args.output.update(result)

        for k in range(args.processes):
            if len(running) == len(devices):
                finish()
            command = [sys.executable, program, *(later if k else first)]
            device = {"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if any(devices) else {}
            command += ["--json", f"{folder}/{k}.json"]
            running.append((k, subprocess.Popen(command, env=os.environ | device)))
        while running:
            finish()
    print(f"medians of {len(results)} processes")
    for row in (row for section in SECTIONS for row in result.get(section, [])):
        print(show(row))
    return wrong
