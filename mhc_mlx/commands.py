"""What commands that measure share: JSON that they read and write, and the device's memory. A file
is checked before anything is measured, and what was measured is never lost: where it cannot be
written at the end, it is printed."""

import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable

import mlx.core as mx

_DESCRIPTOR = re.compile(r"/dev/(fd/|std(in|out|err)$)|/proc/")  # never replaced: written through


def memory() -> int:
    """Bytes that the default device has."""
    info = mx.device_info() if mx.default_device().type == mx.gpu else {}
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return info.get("memory_size", info.get("total_memory", physical))


def _refuse(constant: str):
    raise ValueError(f"it holds {constant}, which is no number")


def read(file: str):
    """What the JSON file holds.

    Raises:
        ValueError: "must be a file ... but ...", for the command to put an option's name before.
    """
    if not os.path.isfile(file):
        raise ValueError(f"must be a file but is {file or 'empty'}")
    try:
        with open(file, encoding="utf-8") as f:
            return json.load(f, parse_constant=_refuse)
    except OSError as error:
        raise ValueError(f"must be a file that can be read but is {file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be a file of JSON but is {file}: {error}") from None


def read_checked(file: str, what: str, check: Callable) -> dict:
    """What the file holds, if check, which raises ValueError with the reason, lets it pass.

    Raises:
        ValueError: As `read` does, and "must be {what} but is ...".
    """
    data = read(file)
    try:
        check(data)
    except ValueError as error:
        raise ValueError(f"must be {what} but is {file}: {error}") from None
    return data


def _finite(value):
    """The value with non-finite floats, which JSON cannot hold, as their names."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def text(report: dict) -> str:
    """The report as JSON; infinities and NaN are the strings "inf", "-inf", "nan"."""
    return json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"


class Output:
    """Where a command writes its report: a file that is new, empty, or an earlier report, which is
    replaced as a whole and stays a link if it is one; or a pipe or a character device, which is
    written through at the end.

    Args:
        file: Its path, or None: nothing is written.
        what: What an existing file must be.
        check: Raises ValueError with the reason for data that no such command wrote.

    Raises:
        ValueError: "must be ... but ...": it cannot be written.
    """

    def __init__(self, file: str | None, what: str, check: Callable):
        self.file, self.failed = file, False
        if file is None:
            return
        self.target = os.path.realpath(file)
        folder, name = os.path.split(self.target)
        if not file or os.path.isdir(file):
            raise ValueError(f"must be a file but is {f'the folder {file}' if file else 'empty'}")
        if not os.path.isdir(folder):
            raise ValueError(f"must be in a folder that exists but is {file}")
        self.aside = os.path.join(folder, f".{name}.{os.getpid()}")
        try:
            kind = os.stat(file).st_mode if os.path.lexists(file) else stat.S_IFREG
        except FileNotFoundError:
            kind = stat.S_IFREG  # a link to a file that is not there yet
        except OSError as error:
            raise ValueError(f"must be a file that can be written but is {file}: {error}") from None
        self.through = not stat.S_ISREG(kind) or bool(_DESCRIPTOR.match(file))
        if self.through and not (stat.S_ISREG(kind) or stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
            raise ValueError(f"must be a file, a pipe or a character device but is {file}")
        if not self.through and os.path.exists(file) and os.path.getsize(file):
            read_checked(file, f"a new file or {what}", check)
        try:
            self._try(stat.S_ISCHR(kind))
        except OSError as error:
            raise ValueError(f"must be a file that can be written but is {file}: {error}") from None

    def _try(self, device: bool) -> None:
        """Write nothing, or to a device a space, which JSON may begin with."""
        if device:
            with open(self.file, "w") as f:
                f.write(" ")
        elif not self.through:
            if os.path.exists(self.target):
                with open(self.target, "r+"):
                    pass
            with open(self.aside, "x"):
                pass
            os.remove(self.aside)

    def _write(self, report: dict) -> None:
        if self.through:
            with open(self.file, "a") as f:
                f.write(text(report))
            return
        try:
            with open(self.aside, "w") as f:
                f.write(text(report))
            if os.path.exists(self.target):
                shutil.copymode(self.target, self.aside)
            os.replace(self.aside, self.target)
        except OSError:
            if os.path.exists(self.aside):
                os.remove(self.aside)
            raise

    def update(self, report: dict) -> None:
        """Write a report that is not complete yet; a failure is told once, and `finish` tries
        again."""
        if self.file is None or self.through:
            return
        try:
            self._write(report)
        except OSError as error:
            if not self.failed:
                print(f"--json {self.file} cannot be written now: {error}", file=sys.stderr)
            self.failed = True

    def finish(self, report: dict) -> str | None:
        """Write the report, or else print it; why it could not be written."""
        if self.file is None:
            return None
        try:
            self._write(report)
        except OSError as error:
            print(text(report), flush=True)
            return f"--json {self.file} cannot be written: {error}: its JSON is printed instead"
        return None
