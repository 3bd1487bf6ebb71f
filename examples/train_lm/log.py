"""The log of a run has a line for each step, and goes on with the run."""

import contextlib
import csv
import io
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from examples.train_lm.files import check_new
from mhc_mlx.commands import is_stream, open_to_append, write_all


class Log:
    """A CSV file gets a line for each step as soon as the next one has begun."""

    FIELDS = ("step", "bits_per_byte", "similarity", "gradient_norm", "tokens_per_second")
    FIELDS += ("peak_mib", "validation")
    NUMBER = staticmethod(re.compile(r"[1-9][0-9]{0,17}").fullmatch)
    PART = staticmethod(
        re.compile(r"([0-9][-+.,0-9a-z]*\r?)?").fullmatch
    )  # this is how a line may begin

    def __init__(self, path: Path, after: int, resumed: bool = False):
        """Go on after step ``after``; the file may be there only where the run is resumed.

        Then lines of later steps, which are done again, are cut off. A log without a checkpoint
        (``after`` is 0) is renamed: nobody knows of which run it is.
        """
        self.path, self.regular = path, not is_stream(path)
        if not (resumed or after):
            check_new("--log", path, ", or go with --resume,")
        with self._reported():
            if self.regular:
                path = Path(os.path.realpath(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    self._cut(path, after)
            self._file = open_to_append(path)
        if not self.regular or path.stat().st_size == 0:
            self.write(*self.FIELDS)

    def _cut(self, path: Path, after: int) -> None:
        """Cut off the lines after step ``after``, and half a line that a kill has left."""
        *lines, tail = path.read_bytes().split(b"\n")
        header, *rows = [line.decode("latin-1").strip().split(",") for line in lines] or [None]
        steps = [int(r[0]) for r in rows if len(r) == len(self.FIELDS) and self.NUMBER(r[0])]
        first, last = (steps[0], steps[-1]) if steps else (after + 1, after)
        why, names = None, ",".join(self.FIELDS)
        if header is None and not names.startswith(tail.decode("latin-1").strip()):
            why = f"does not begin with {names}"
        elif header and (tuple(header) != self.FIELDS or not self.PART(tail.decode("latin-1"))):
            why = f"does not hold {names} alone"
        elif len(steps) < len(rows) or steps != list(range(first, first + len(steps))):
            why = "has not one line for each step"
        elif not first - 1 <= after <= last:
            why = f"has steps {first} to {last} and the run goes on after {after}"
        if why:
            raise SystemExit(f"--log must be this run's log but {path} {why}: name another file")
        if steps and not after:
            free = (path.with_name(f"{path.name}.{k}") for k in itertools.count(1))
            aside = next(p for p in free if not os.path.lexists(p))
            path.rename(aside)
            print(f"warning: there is no checkpoint for the log {path}: renamed {aside}")
            return
        with open(path, "r+b") as f:
            f.truncate(sum(len(line) + 1 for line in lines[: 1 + after - first + 1]))

    def write(self, *row) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerow(row)
        with self._reported():
            write_all(self._file, text.getvalue().encode())

    def sync(self) -> None:
        """Sync before a checkpoint: a log that lacks steps before it could not go on."""
        if self.regular:
            with self._reported():
                os.fsync(self._file)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SystemExit(f"cannot write the log {self.path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._file)
