"""Files that the programs write: never over what another wrote, nor in place of a link or device.

A new file is created where none is. What is no regular file (a FIFO, /dev/null, this process's
output) is written to as it is.
"""

import errno
import os
import stat
from pathlib import Path


def make_folder(option: str, folder: Path) -> None:
    """SystemExit where files cannot be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(folder, os.W_OK) else "it is not writable"
    except OSError as error:
        why = error.strerror
    if why:
        raise SystemExit(f"{option} needs a folder to write to but was given {folder}: {why}")


def output_of(path: Path) -> int | None:
    """The descriptor, 1 or 2, of this process's output where a path leads there."""
    for descriptor in (1, 2):
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except OSError:  # no such path, or the output is closed
            continue
    return None


def is_stream(path: Path) -> bool:
    """Whether a path leads to what is written to as it is: neither a regular file nor a folder."""
    if not path.exists():
        return False
    mode = path.stat().st_mode
    return output_of(path) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_new(option: str, path: Path, otherwise: str = "") -> None:
    """SystemExit where something is at a path already, but for what is written to as it is."""
    if path.is_dir():
        raise SystemExit(f"{option} must be a file but {path} is a folder")
    if path.exists() and not is_stream(path):
        raise SystemExit(f"{option} must be a new file{otherwise} but {path} exists")
    if os.path.islink(os.path.realpath(path)):
        raise SystemExit(f"{option} must be a file but {path} is a link that leads to itself")


def open_to_append(path: Path) -> int:
    """A descriptor. What it creates lies where a link points, and was not there before."""
    output = output_of(path)
    if output is not None:
        return os.dup(output)  # opened anew it would have a position of its own
    if path.exists():
        return os.open(path, os.O_WRONLY | os.O_APPEND)
    return os.open(
        os.path.realpath(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666
    )


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def write_new(path: Path, text: str) -> None:
    """Into a file that was not there. Where it cannot be, none is left, the text is printed, since
    it may have taken hours, and SystemExit says why."""
    new = not path.exists()
    try:
        if not new and not is_stream(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        descriptor = open_to_append(path)
        try:
            write_all(descriptor, text.encode())
            if new:
                os.fsync(descriptor)
        except OSError:
            if new:
                os.unlink(os.path.realpath(path))
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        print(text, flush=True)
        why = f"cannot write {path}: {error.strerror}: its text is printed instead"
        raise SystemExit(why) from error


def replace(path: Path, text: str) -> None:
    """In place of what an earlier run wrote there, whole or not at all; a link stays one."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    write_new(temporary, text)
    try:
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink()
        raise SystemExit(f"cannot write {path}: {error.strerror}") from error
