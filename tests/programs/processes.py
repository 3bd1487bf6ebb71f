"""Run a test file, or what launches it, as processes of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]


def run(command: list, log: Path) -> tuple[int, str]:
    """Return the code of a command, and what it printed, in a minute at most."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with open(log, "w") as f:
        process = subprocess.Popen(
            [*map(str, command)],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,  # stays open: at the end of its input mlx.launch spins
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


def free_port() -> int:
    """Find the first of two: mlx.launch gives the next to the second process."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()):
                return server.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no connections on this machine's own address: {error}")


def run_two(arguments: list, log: Path) -> str:
    """Return what two processes of Python print that share MLX's ring."""
    if not mx.distributed.is_available("ring"):
        pytest.skip("this build of MLX has no ring")
    launch = shutil.which("mlx.launch", path=sysconfig.get_path("scripts"))
    if launch is None:
        pytest.skip("mlx.launch is not among this Python's scripts")
    options = ["-n", 2, "--backend", "ring", "-p", free_port(), "--", sys.executable]
    _, printed = run([launch, *options, *arguments], log)
    if "[ring] Couldn't bind socket" in printed:
        pytest.skip("another program took the port: [ring] Couldn't bind socket")
    return printed
