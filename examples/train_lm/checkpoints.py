"""Checkpoints are written whole or not at all, and are checked before a run goes on from one."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def is_checkpoint(path: Path) -> bool:
    """Tell by the name: files with other names are not ours."""
    return re.fullmatch(r"step-\d+-[0-9a-f]{16}\.safetensors", path.name) is not None


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """List those of a folder, the newest first."""
    found = [p for p in folder.glob("step-*.safetensors") if is_checkpoint(p)]
    return sorted(found, key=lambda p: (step_of(p), p.name), reverse=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other trainers out of a folder of checkpoints.

    The system takes the lock back when this process ends, however it ends; the file stays. Where
    the filesystem has no locks, a warning says so, and nothing keeps a second trainer out.
    """
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise SystemExit(f"--checkpoint: cannot lock {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SystemExit(
                f"--checkpoint must be a folder of one trainer but another writes to {folder}: "
                f"it holds {path}"
            ) from error
        except OSError as error:
            print(
                f"warning: {path} cannot be locked ({error.strerror}): "
                f"see that no other trainer writes to {folder}"
            )
        yield
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, step: int, arrays: dict, about: dict) -> Path:
    """Write arrays, and what they are about, to ``step-STEP-DIGEST.safetensors``; keep two.

    The digest of the file is in its name, so that one rename puts both there: a file under its name
    is whole, or has been damaged since, and then its digest says so. Files that are about another
    run are neither counted nor removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "unfinished"
    try:
        if os.path.lexists(temporary):  # a killed run left it
            temporary.unlink()
        with open(temporary, "xb") as f:  # x does not write through a link
            mx.save_safetensors(f, arrays, {"about": json.dumps(about)})
            f.flush()
            os.fsync(f.fileno())
        path = folder / f"step-{step:08}-{_digest(temporary)}.safetensors"
        os.replace(temporary, path)
        entry = os.open(folder, os.O_RDONLY)
        os.fsync(entry)  # for the new name
        os.close(entry)
    except OSError as error:
        if not temporary.is_dir():
            temporary.unlink(missing_ok=True)
        left = list_checkpoints(folder)
        last = f"the last one is {left[0]}" if left else "there is none before it"
        raise SystemExit(f"cannot write a checkpoint to {folder}: {error}; {last}") from error
    about = json.loads(json.dumps(about))
    others = [p for p in list_checkpoints(folder) if p != path and _about(p) == about]
    for old in others[1:]:
        old.unlink()
    return path


def _read(path: Path) -> tuple[dict, dict]:
    """Return the arrays, which are read when they are used, and what they are about; ValueError
    says why they cannot be read."""
    if not path.is_file():
        raise ValueError("it is no file")
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        about = json.loads(metadata["about"])
    except KeyError as error:
        raise ValueError("it does not say what it is about") from error
    except (RuntimeError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"it must say by name what it is about but has {about!r}")
    return arrays, about


def _about(path: Path) -> dict | None:
    try:
        return _read(path)[1]
    except ValueError:
        return None


def difference(arrays: dict[str, mx.array], expected: dict[str, mx.array]) -> str | None:
    """Say how arrays differ from those expected in names, shapes or dtypes; None if they do not."""
    for what, names in (
        ("lacks", expected.keys() - arrays.keys()),
        ("has an unknown", arrays.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{what} {min(names)}{more}"
    for name, want in expected.items():
        got = arrays[name]
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            found = f"{list(got.shape)} {got.dtype}, not {list(want.shape)} {want.dtype}"
            return f"has {name} as {found}"
    return None


def load_checkpoint(
    folder: Path, fault: Callable[[Path, dict, dict], str | None] = lambda *_: None
) -> tuple[Path, dict, dict] | None:
    """Return path, arrays and what they are about of the newest usable checkpoint, or None.

    ``fault`` says of one that is whole what else keeps it from use, if anything does. Unusable
    files that are newer are renamed, so that they do not count among the two kept. SystemExit
    where none is usable; then nothing is changed.
    """
    found, reasons = list_checkpoints(folder), []
    for k, path in enumerate(found):
        try:
            if path.is_file() and _digest(path) != path.stem.rpartition("-")[2]:
                raise ValueError("its SHA-256 is not the one in its name")
            arrays, about = _read(path)
            why = fault(path, arrays, about)
            if why is None:
                mx.eval(arrays)
                for unusable in filter(Path.is_file, found[:k]):
                    unusable.rename(unusable.with_suffix(".damaged"))
                return path, arrays, about
        except (OSError, ValueError) as error:
            why = f"is damaged ({error})"
        reasons.append(f"{path} {why}")
        print(f"warning: {reasons[-1]}: skipped")
    if found:
        raise SystemExit(
            f"no checkpoint in {folder} is whole: remove them to start anew; {reasons[0]}"
        )
    return None
