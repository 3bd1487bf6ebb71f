"""Runs a test file, or what launches it, as processes of their own."""

import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command: list, log: Path) -> tuple[int, str]:
    """The return code of a command, and what it printed, in a minute at most."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with open(log, "w") as f:
        process = subprocess.Popen(
            [*map(str, command)],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,  # open: at the end of its input mlx.launch spins
            stdout=f,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode, log.read_text()
