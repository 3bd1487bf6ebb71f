"""What commands share: their parsers, the JSON that they read and write, and the device's memory.

A command checks its files before it measures anything, and never loses what it has measured: if it
cannot write a report at the end, it prints the report.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

__all__ = [
    "Output",
    "check_strings",
    "is_stream",
    "make_parser",
    "memory",
    "open_to_append",
    "read",
    "text",
    "write_all",
]

_OPEN_FILE = re.compile(r"/dev/(fd/|std(in|out|err)$)|/proc/")  # such paths lead to open files


def make_parser(command: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Make a parser that takes no abbreviations, and whose help keeps the description's lines."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=command, description=description, allow_abbrev=False, formatter_class=kind, **options
    )


def memory() -> int:
    """Return the size of the default device's memory in bytes."""
    info: dict[str, Any] = mx.device_info() if mx.default_device().type == mx.gpu else {}
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return info.get("memory_size", info.get("total_memory", physical))


def _refuse(constant: str):
    raise ValueError(f"it holds {constant}, which is no number")


def read(
    option: str, file: str, what: str = "", check: Callable[[Any], object] = lambda data: None
) -> Any:
    """Return the data of a JSON file.

    Args:
        option: The option that names the file, such as --json, for messages.
        file: The path.
        what: What the file must be, for the message if check refuses the data.
        check: A function of the data that raises ValueError with the reason if it refuses them.

    Raises:
        ValueError: "{option} must be a file ... but ..." or "{option} must be {what} but ...".
    """
    if not os.path.isfile(file):
        raise ValueError(f"{option} must be a file but is {file or 'empty'}")
    try:
        with open(file, encoding="utf-8") as f:
            data = json.load(f, parse_constant=_refuse)
    except OSError as error:
        must = f"{option} must be a file that can be read"
        raise ValueError(f"{must} but is {file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} must be a file of JSON but is {file}: {error}") from None
    try:
        check(data)
    except ValueError as error:
        raise ValueError(f"{option} must be {what} but is {file}: {error}") from None
    return data


def check_strings(report: Any, *names: str) -> None:
    """Raise ValueError unless a report is an object with these strings, such as device and date."""
    if not isinstance(report, dict):
        raise ValueError(f"it holds {type(report).__name__}, not an object")
    for name in names:
        if not isinstance(report.get(name), str):
            raise ValueError(f"its {name} is {'no string' if name in report else 'missing'}")


def _finite(value):
    """Return the value with the names of non-finite floats in their place: JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _are_rows(value) -> bool:
    """Tell whether a value is a list of objects and not empty: the rows of a table."""
    return isinstance(value, list) and value != [] and all(isinstance(v, dict) for v in value)


def _lines(value, margin: str = "\n") -> str:
    """Return the JSON of a report, or of a part whose lines begin with ``margin``."""
    if _are_rows(value):
        entries = [json.dumps(row, allow_nan=False) for row in value]
    elif isinstance(value, dict) and (margin == "\n" or any(map(_are_rows, value.values()))):
        entries = [f"{json.dumps(k)}: {_lines(v, f'{margin} ')}" for k, v in value.items()]
    else:
        return json.dumps(value, allow_nan=False)
    left, right = "[]" if isinstance(value, list) else "{}"
    return left + ",".join(f"{margin} {entry}" for entry in entries) + margin + right


def text(report: dict[str, Any]) -> str:
    """Return the report as JSON.

    Each entry of the report has a line, and so has each row (an object in a list). Infinities and
    NaN become the strings "inf", "-inf" and "nan".
    """
    return _lines(_finite(report)) + "\n"


def _descriptor_of(path: Path) -> int | None:
    """Return 1 or 2 if a path leads to this process's standard output or error, else None."""
    for descriptor in (1, 2):
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except OSError:  # there is no such path, or the output is closed
            continue
    return None


def is_stream(path: Path) -> bool:
    """Tell whether a command must write to a path directly, and may not replace its file.

    So it is if the path leads to this process's output, to an open file, or to something that is
    neither a regular file nor a folder, such as a pipe.
    """
    if not path.exists():
        return False
    mode = path.stat().st_mode
    open_file = _descriptor_of(path) is not None or _OPEN_FILE.match(str(path)) is not None
    return open_file or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to a path, which may lead to this process's output.

    A missing file is created, at the target of the link if the path is a link. OSError is raised if
    another process creates it first.
    """
    output = _descriptor_of(path)
    if output is not None:
        return os.dup(output)  # a second opening of the file would have its own position
    if path.exists():
        return os.open(path, os.O_WRONLY | os.O_APPEND)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
    return os.open(os.path.realpath(path), flags, 0o666)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of data, for which os.write may need several calls."""
    while data:
        data = data[os.write(descriptor, data) :]


class Output:
    """This is the file to which a command writes its report.

    The file must be new, empty or an earlier report. Each writing replaces all of it at once; if
    the path is a link, its target is replaced. A stream (see `is_stream`) gets the report at the
    end.

    Args:
        option: The option that names the file, such as --json, for messages.
        file: The path; with None nothing is written.
        what: What an existing file must be, for messages.
        check: A function of an existing report that raises ValueError with the reason if this
            command cannot have written it.
        reader: A function with the arguments of `read` that calls check for an existing file.

    Raises:
        ValueError: "{option} must be ... but ...", if the file cannot be written.
    """

    option: str
    file: Any  # a str, or None
    failed: bool
    target: str
    unfinished: str
    stream: bool

    def __init__(
        self,
        option: str,
        file: str | None,
        what: str,
        check: Callable[[Any], object],
        reader: Callable[..., object] = read,
    ):
        self.option, self.file, self.failed = option, file, False
        if file is None:
            return
        self.target = os.path.realpath(file)
        folder, name = os.path.split(self.target)
        if not file or os.path.isdir(file):
            got = f"the folder {file}" if file else "empty"
            raise ValueError(f"{option} must be a file but is {got}")
        if not os.path.isdir(folder):
            raise ValueError(f"{option} must be in a folder that exists but is {file}")
        self.unfinished = os.path.join(folder, f".{name}.{os.getpid()}")
        try:
            if os.path.islink(self.target):
                raise OSError("it is a link that leads to itself")
            self.stream = is_stream(Path(file))
            if not self.stream and os.path.exists(file) and os.path.getsize(file):
                reader(option, file, f"a new file or {what}", check)
            self._try()
        except OSError as error:
            must = f"{option} must be a file that can be written"
            raise ValueError(f"{must} but is {file}: {error}") from None

    def _try(self) -> None:
        """Raise OSError or ValueError if the file cannot be written, and leave it as it is.

        A character device gets a space, with which JSON may begin.
        """
        if not self.stream:
            if os.path.exists(self.target):
                with open(self.target, "r+"):
                    pass
            with open(self.unfinished, "x"):
                pass
            os.remove(self.unfinished)
            return
        mode = os.stat(self.file).st_mode
        if stat.S_ISCHR(mode):
            with open(self.file, "w") as f:
                f.write(" ")
        elif not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            must = f"{self.option} must be a file, a pipe or a character device"
            raise ValueError(f"{must} but is {self.file}")

    def _write(self, report: dict[str, Any]) -> None:
        """Write the report to the stream, or to a second file that then replaces the first."""
        if self.stream:
            descriptor = open_to_append(Path(self.file))
            try:
                write_all(descriptor, text(report).encode())
            finally:
                os.close(descriptor)
            return
        try:
            with open(self.unfinished, "w") as f:
                f.write(text(report))
            if os.path.exists(self.target):
                shutil.copymode(self.target, self.unfinished)
            os.replace(self.unfinished, self.target)
        except OSError:
            if os.path.exists(self.unfinished):
                os.remove(self.unfinished)
            raise

    def update(self, report: dict[str, Any]) -> None:
        """Write a report that is not complete yet. The first failure is printed."""
        if self.file is None or self.stream:
            return
        try:
            self._write(report)
        except OSError as error:
            if not self.failed:
                print(f"{self.option} {self.file} cannot be written now: {error}", file=sys.stderr)
            self.failed = True

    def finish(self, report: dict[str, Any]) -> str | None:
        """Write the report; if that fails, print it and return the reason."""
        if self.file is None:
            return None
        try:
            self._write(report)
        except OSError as error:
            print(text(report), flush=True)
            why = f"cannot be written: {error}: its JSON is printed instead"
            return f"{self.option} {self.file} {why}"
        return None

    @contextlib.contextmanager
    def finishing(
        self, report: dict[str, Any], measured: Callable[[], object]
    ) -> Iterator[list[str]]:
        """Write the report at the end, or at an exception if ``measured()`` is true by then.

        Yields:
            A list for messages of what went wrong; a failure to write is added to it.
        """
        wrong: list[str] = []
        try:
            yield wrong
        except BaseException:
            if measured() and (reason := self.finish(report)):
                print(reason, file=sys.stderr)
            raise
        if reason := self.finish(report):
            wrong.append(reason)
