"""The trainer and experiments write files that were not there before, and streams as they are."""

import os
from pathlib import Path

from mhc_mlx.commands import is_stream


def make_folder(option: str, folder: Path) -> None:
    """Make a folder; SystemExit says why files cannot be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(folder, os.W_OK) else "it is not writable"
    except OSError as error:
        why = error.strerror
    if why:
        raise SystemExit(f"{option} needs a folder to write to but was given {folder}: {why}")


def check_new(option: str, path: Path, otherwise: str = "") -> None:
    """Raise SystemExit where something is at a path already, unless it is a stream."""
    if path.is_dir():
        raise SystemExit(f"{option} must be a file but {path} is a folder")
    if path.exists() and not is_stream(path):
        raise SystemExit(f"{option} must be a new file{otherwise} but {path} exists")
    if os.path.islink(os.path.realpath(path)):
        raise SystemExit(f"{option} must be a file but {path} is a link that leads to itself")
