"""The machine that a report is of: device, memory, versions, and whether its power is limited."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from typing import Any

import mlx.core as mx

from .. import launch
from ..commands import memory


def printed(*command: str) -> str:
    """Return what a command prints; an empty text if it is not there, fails or takes 10 s."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout if run.returncode == 0 else ""


def battery(text: str) -> dict[str, Any]:
    """Return the source of power and the percent of the battery from ``pmset -g batt``.

    The battery's own number stays out of the report.
    """
    found: dict[str, Any] = {}
    if source := re.search(r"drawing from '(.+?)'", text):
        found["source"] = source.group(1)
    if percent := re.search(r"(\d+)%;", text):
        found["battery_percent"] = int(percent.group(1))
    return found


def limits(text: str) -> dict[str, int]:
    """Return the limits by heat from ``pmset -g therm``, such as CPU_Speed_Limit, in percent."""
    return {name: int(value) for name, value in re.findall(r"(\w+)\s*=\s*(\d+)", text)}


def power_modes(text: str) -> dict[str, int]:
    """Return lowpowermode and powermode from ``pmset -g``; 1 is low power, 2 is high."""
    return {k: int(v) for k, v in re.findall(r"(?m)^\s*(lowpowermode|powermode)\s+(\d)", text)}


def power() -> dict[str, Any]:
    """Return what the system says of its power and heat now; no entry is what it does not say."""
    if platform.system() == "Darwin":
        found = battery(printed("pmset", "-g", "batt")) | power_modes(printed("pmset", "-g"))
        return found | limits(printed("pmset", "-g", "therm"))
    names = ("clocks.sm", "power.draw", "temperature.gpu")
    query = printed("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    values = query.splitlines()[0].split(", ") if query.strip() else []
    return dict(zip(names, values, strict=False))


def version() -> str:
    """Return this package's version, or say that it is not installed."""
    try:
        return importlib.metadata.version("mhc-metal")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """Return the device, its memory and the versions; nothing that names its owner."""
    gpu = launch.backend() is not None
    info: dict[str, Any] = mx.device_info() if gpu else {}
    found: dict[str, Any] = {
        "device": info.get("device_name", "CPU"),
        "backend": launch.backend() or "none: the reference runs",
        "mhc_metal": version(),
        "mlx": mx.__version__,  # pyright: ignore[reportAttributeAccessIssue]
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "processor": printed("sysctl", "-n", "machdep.cpu.brand_string").strip()
        or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory() / 2**30, 1),
    }
    numbers = ("architecture", "max_recommended_working_set_size", "max_buffer_length")
    capability = ("compute_capability_major", "compute_capability_minor")
    return found | {k: info[k] for k in (*numbers, *capability) if k in info}
