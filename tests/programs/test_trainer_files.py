"""The trainer writes over no file, resumes from its own files only, and shares no folder."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import pytest

from examples.train_lm import train as program
from examples.train_lm.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    lock_folder,
    save_checkpoint,
)
from examples.train_lm.log import Log
from examples.train_lm.options import parse
from examples.train_lm.train import PICTURES, Run
from programs import trainer
from programs.processes import ROOT
from programs.trainer import command, rows, train

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus


def contents_of(folder):
    """Say of each path below a folder what it is."""
    found = {}
    for p in sorted(folder.rglob("*")):
        found[str(p.relative_to(folder))] = (
            os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        )
    return found


def test_no_file_is_written_over(corpus, tmp_path, monkeypatch):
    """Neither the text is, under any of its names, nor another's file, nor one of the run's."""
    monkeypatch.setattr(program, "make_model", None)  # nothing is made before
    data, folder, linked, pictures = (
        tmp_path / name for name in ("text", "kept", "linked", "pictures")
    )
    shutil.copy(corpus, data)
    for path in (folder, linked, pictures):
        path.mkdir()
        (path / "lock").touch()
    (tmp_path / "link").symlink_to(data)
    os.link(data, tmp_path / "hard link")
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "link to notes").symlink_to("notes")
    (tmp_path / "nowhere").symlink_to("/dev/null")
    (pictures / "gains.png").write_text("kept")
    (linked / "unfinished").symlink_to(data)
    (tmp_path / "circle").symlink_to("circle")
    blocked = tmp_path / "blocked"
    (blocked / "unfinished").mkdir(parents=True)
    (blocked / "lock").touch()
    again = ["--checkpoint", folder, "--resume"]
    new, is_text = ["--plot", tmp_path / "new"], "--data must not be written to"
    checkpoint = "step-00000004-0123456789abcdef.safetensors"
    refused = [
        *(([*o, "--log", data], is_text) for o in ([], again)),
        *(([*o, "--log", tmp_path / "link"], is_text) for o in ([], again)),
        *(([*o, "--log", tmp_path / "hard link"], is_text) for o in ([], again)),
        (["--checkpoint", linked, "--resume"], is_text),
        (["--checkpoint", linked], "--checkpoint must be a folder without .* has unfinished"),
        (["--log", tmp_path / "notes"], "--log must be a new file.*notes exists"),
        (["--log", tmp_path / "link to notes"], "--log must be a new file.* exists"),
        (["--plot", pictures], "--plot: a picture must be a new file.*gains.png exists"),
        *(
            ([*again, "--log", folder / name], "--log must be a file of its own")
            for name in ("lock", "unfinished", checkpoint)
        ),
        ([*new, "--log", tmp_path / "new" / "loss.png"], "--log must be a file of its own"),
        ([*new, "--log", tmp_path / "nowhere"], "--plot needs a --log that can be read again"),
        (["--log", tmp_path / "circle"], "circle is a link that leads to itself"),
        (["--checkpoint", blocked, "--resume"], "unfinished, which is a folder"),
    ]
    (tmp_path / "new").mkdir()
    before = contents_of(tmp_path)
    for options, message in refused:
        with pytest.raises(SystemExit, match=message):
            train(data, None, *options)
        assert contents_of(tmp_path) == before, options


@pytest.fixture
def lines(tmp_path):
    """lines(steps) returns a log of these steps."""

    def lines(*steps):
        log = Log(tmp_path / "made.csv", 0)
        for step in steps:
            log.write(step, 2.5, 0.5, 1e-3, 1000, 10, None)
        log.close()
        text = (tmp_path / "made.csv").read_bytes()
        (tmp_path / "made.csv").unlink()
        return text

    return lines


def test_log_goes_on(tmp_path, lines):
    """Later steps, and half a line that a kill left, are cut off its file; nothing else is."""
    path, link = tmp_path / "log.csv", tmp_path / "link"
    link.symlink_to("log.csv")
    for before, after, left in (
        (lines(1, 2, 3), 3, lines(1, 2, 3)),
        (lines(1, 2, 3), 1, lines(1)),
        (lines(1, 2, 3) + b"4,2.5", 2, lines(1, 2)),
        (lines(1, 2, 3)[:-1], 3, None),  # the last line is not whole, so step 3 is not there
        (lines(3, 4, 5), 4, lines(3, 4)),  # a log that began later
        (lines(3, 4, 5), 2, lines()),
        (lines(), 7, lines()),
        (b"step,bits", 7, lines()),
        (b"", 7, lines()),
    ):
        path.write_bytes(before)
        path.chmod(0o640)
        inode = path.stat().st_ino
        if left is None:
            with pytest.raises(SystemExit, match=f"must be this run's log but {path} has steps"):
                Log(link, after, True)
            assert path.read_bytes() == before
            continue
        log = Log(link, after, True)
        assert path.read_bytes() == left
        log.write(after + 1, 2.5, 0.5, 1e-3, 1000, 10, None)
        log.close()
        assert path.read_bytes() == left + lines(after + 1).partition(b"\n")[2]
        assert link.is_symlink() and path.stat().st_ino == inode
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_only_the_runs_own_log_goes_on(corpus, tmp_path, lines):
    path = tmp_path / "log.csv"
    for before in (
        corpus.read_bytes(),
        b"not a line of a log",
        b"step,loss\r\n1,2\r\n",
        lines(1, 2, 3, 4, 5) + b"my notes",
        lines(1, 2, 3, 4, 5) + b"my notes\n",
        lines(1, 2, 4, 5, 6),
        lines(1, 2, 3),
        lines(6, 7),
        lines(1, 2, 3, 4, 5).replace(b"\r\n", b",7\r\n"),
        bytes(100),
    ):
        path.write_bytes(before)
        with pytest.raises(SystemExit, match=f"--log must be this run's log but {path} "):
            Log(path, 4, True)
        assert path.read_bytes() == before
    for new in (Log, lambda path, after: Log(path, after, False)):
        with pytest.raises(SystemExit, match=f"--log must be a new file.* but {path} exists"):
            new(path, 0)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["log.csv"]


def test_log_without_a_checkpoint_is_put_aside(tmp_path, lines, capsys):
    """A run that was killed before its first checkpoint begins anew; or it was another's log."""
    for name in ("log.csv", "log.csv.1"):
        (tmp_path / name).write_bytes(lines(1, 2, 3))
    Log(tmp_path / "log.csv", 0, True).close()
    assert f"renamed {tmp_path / 'log.csv.2'}" in capsys.readouterr().out
    for name in ("log.csv.1", "log.csv.2"):
        assert (tmp_path / name).read_bytes() == lines(1, 2, 3)
    assert (tmp_path / "log.csv").read_bytes() == lines()


def test_log_to_what_is_no_file(corpus, tmp_path, capfd, monkeypatch):
    """It is written to as it is, and stays what it is."""
    fifo, full, output = (tmp_path / name for name in ("fifo", "full", "output"))
    os.mkfifo(fifo)
    full.symlink_to("/dev/full")  # links, so that a fault replaces no device of this machine
    output.symlink_to("/dev/stdout")
    text = []
    reader = threading.Thread(target=lambda: text.append(fifo.read_bytes()), daemon=True)
    reader.start()
    logs = [Log(p, n, n > 0) for p in (fifo, output) for n in (0, 4)]
    for log in logs:
        log.write(5, *range(6))
        log.close()
    reader.join(10)
    os.write(1, b"what is printed later")  # where the output is a file, after the lines
    assert text[0] + b"what is printed later" == capfd.readouterr().out.encode()
    assert text[0].count(b"step,bits_per_byte") == text[0].count(b"5,0,1,2,3,4,5\r\n") == 2
    assert stat.S_ISFIFO(fifo.stat().st_mode) and output.is_symlink()
    monkeypatch.setattr(program, "follow", None)  # nothing is trained
    with pytest.raises(SystemExit, match=f"cannot write the log {full}: No space left"):
        train(corpus, None, "--log", full)
    assert full.is_symlink()


def test_log_on_a_full_disk(tmp_path, lines):
    """The line that did not fit is cut off by the run that goes on."""
    path = tmp_path / "log.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Log(path, 0)
    log.write(1, 2.5, 0.5, 1e-3, 1000, 10, None)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 8, hard))
        with pytest.raises(SystemExit, match=f"cannot write the log {path}: File too large"):
            log.write(2, 2.5, 0.5, 1e-3, 1000, 10, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert len(path.read_bytes()) == len(lines(1)) + 8
    Log(path, 1, True).close()
    assert path.read_bytes() == lines(1)


@pytest.fixture(scope="module")
def two_steps(corpus, tmp_path_factory):
    """Return the folder of a run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("two_steps")
    mx.disable_compile()
    with mx.stream(mx.cpu):
        train(corpus, folder, "--steps", 2, "--save-every", 1)
    mx.enable_compile()
    return folder


def foreign(arrays, about):
    """Yield what else a file may hold: arrays, what it says of itself, its step; and the fault."""
    weight, moment = "model.head.weight", "optimizer.states.1.head.weight.m"
    says = {"about": json.dumps(about)}
    yield arrays, {}, 2, "does not say what it is about"
    yield arrays, {"about": "{"}, 2, "cannot be read"
    yield arrays, {"about": "[" * 100_000}, 2, "cannot be read"
    yield arrays, {"about": "[1]"}, 2, "must say by name what it is about"
    lacking = {k: v for k, v in about.items() if k != "seed"}
    yield arrays, {"about": json.dumps(lacking)}, 2, "does not say its seed"
    for name in (weight, moment, "at.step", "random.state"):
        yield {k: v for k, v in arrays.items() if k != name}, says, 2, f"lacks {name}"
    yield {"at.step": arrays["at.step"]}, says, 2, "lacks at.position and "
    yield arrays | {"model.more": mx.zeros(3)}, says, 2, "has an unknown model.more"
    for name in (weight, moment):
        of = arrays[name]
        yield arrays | {name: of.T}, says, 2, f"has {name} as [8, 256]"
        yield arrays | {name: of.astype(mx.bfloat16)}, says, 2, f"has {name} as [256, 8] mlx.core.b"
    yield arrays, says, 3, "is of another step"


def test_foreign_checkpoints_are_named_and_the_one_before_used(corpus, two_steps, tmp_path, capsys):
    """Where there is none before, it is an error, and nothing is changed."""
    _, arrays, about = load_checkpoint(two_steps / "checkpoints")
    args = parse(command(corpus, tmp_path, "--resume"))
    folder = tmp_path / "checkpoints"
    path, fresh = folder / "unnamed", None
    cases = [*foreign(arrays, about), (None, b"not safetensors", 2, "cannot be read")]
    for contents, says, step, fault in [*cases, (None, None, 2, "it is no file")]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if says is None:
            path.mkdir()
            digest = 16 * "0"
        else:
            if contents is None:
                path.write_bytes(says)
            else:
                with open(path, "wb") as f:
                    mx.save_safetensors(f, contents, says)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        newest = path.rename(folder / f"step-{step:08}-{digest}.safetensors")
        before = contents_of(folder)
        with ExitStack() as at_end:
            run = Run(args, at_end)
            fresh = fresh or {k: v + 0 for k, v in run.everything().items()}
            with pytest.raises(SystemExit) as stopped:
                run.begin()
            assert fault in str(stopped.value) and str(newest) in str(stopped.value)
            assert contents_of(folder) == before | {"lock": b""}
            assert all(mx.array_equal(v, fresh[k]) for k, v in run.everything().items())
            capsys.readouterr()
            shutil.copy(list_checkpoints(two_steps / "checkpoints")[1], folder)
            run.begin()
            assert run.step == 1
        out = capsys.readouterr().out
        assert fault in out and "resumed after step 1" in out
        assert newest.exists() == (says is None), "it counts among those kept"


def test_only_checkpoints_of_the_run_are_removed(tmp_path):
    def save(step, about):
        return save_checkpoint(tmp_path, step, {"a": mx.array(step)}, {"about": about})

    others = save(3, "another"), save(7, "another")
    (tmp_path / "step-00000006-0123456789abcdef.safetensors").mkdir()
    for step in (4, 5, 8):
        save(step, "this")
    left = [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)]
    assert left == [8, 7, 6, 5, 3] and all(p.exists() for p in others)
    assert list_checkpoints(tmp_path)[0].name.startswith("step-00000008")
    for step in (99999999, 100000000):
        (tmp_path / f"step-{step}-0123456789abcdef.safetensors").touch()
    assert "100000000" in list_checkpoints(tmp_path)[0].name  # by number


def test_a_checkpoint_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    """File, name and folder are synced in this order, and the file is whole."""
    done, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        done.append((found.st_ino, found.st_size if stat.S_ISREG(found.st_mode) else "folder"))
        sync(descriptor)

    def renamed(source, target):
        replace(source, target)
        done.append(Path(target).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    path = save_checkpoint(tmp_path, 3, {"a": mx.zeros(100)}, {})
    found = path.stat()
    assert done == [(found.st_ino, found.st_size), path.name, (tmp_path.stat().st_ino, "folder")]
    assert found.st_size > 400


def test_the_log_is_synced_before_a_checkpoint(corpus, tmp_path, monkeypatch, uncompiled):
    """So after a power failure it has the steps before the one that a run goes on from."""
    done, sync = [], os.fsync

    def fsync(descriptor):
        done.append((os.fstat(descriptor).st_ino, len(rows(tmp_path / "log.csv"))))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train(corpus, tmp_path, "--connection", "plain", "--steps", 1)
    assert len(done) == 3 and done[0] == ((tmp_path / "log.csv").stat().st_ino, 1)


def test_an_unfinished_link_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "unfinished").symlink_to(tmp_path / "mine")
    path = save_checkpoint(tmp_path / "checkpoints", 3, {"a": mx.zeros(1)}, {})
    assert (tmp_path / "mine").read_text() == "kept" and not path.is_symlink()
    (tmp_path / "checkpoints" / "unfinished").mkdir()
    with pytest.raises(SystemExit, match="cannot write a checkpoint .* the last one is "):
        save_checkpoint(tmp_path / "checkpoints", 4, {"a": mx.zeros(1)}, {})


def test_a_file_that_comes_between_is_not_written_over(tmp_path, monkeypatch):
    """It comes after the look whether one is there, and before the file is created."""
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "unfinished").symlink_to("mine")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(SystemExit, match="cannot write a checkpoint .*File exists"):
        save_checkpoint(tmp_path, 3, {"a": mx.zeros(1)}, {})
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(SystemExit, match="cannot write the log .*mine: File exists"):
        Log(tmp_path / "mine", 0)
    assert (tmp_path / "mine").read_text() == "kept"


LOCK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from examples.train_lm.checkpoints import lock_folder
with lock_folder(Path(sys.argv[2])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_trainer_in_a_folder(corpus, two_steps, tmp_path, monkeypatch, capsys, uncompiled):
    """It locks the folder until it ends, or is killed."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps / "checkpoints", folder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", LOCK, ROOT, folder], **pipes)
    try:
        assert other.stdout.readline() == b"locked\n"
        before = contents_of(tmp_path)
        for more in ([], ["--resume"]):
            with pytest.raises(SystemExit, match=f"one trainer but another writes to {folder}"):
                train(corpus, tmp_path, *more)
        assert contents_of(tmp_path) == before
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    train(corpus, tmp_path, "--resume", "--steps", 3)
    capsys.readouterr()

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with lock_folder(folder), monkeypatch.context() as patch:
        with pytest.raises(SystemExit, match="another writes to"):
            train(corpus, tmp_path, "--resume", "--steps", 4)
        patch.setattr(fcntl, "flock", flock)  # as of a filesystem that has none
        train(corpus, tmp_path, "--resume", "--steps", 4)
        assert "lock cannot be locked (No locks available)" in capsys.readouterr().out
    assert len(rows(tmp_path / "log.csv")) == 2
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(SystemExit, match=f"cannot lock {folder / 'lock'}"):
        train(corpus, tmp_path, "--resume", "--steps", 5)
    assert not (tmp_path / "made").exists()


def test_pictures_that_cannot_be_drawn_are_an_error(corpus, tmp_path, monkeypatch, uncompiled):
    def plot(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(program, "plot", plot)
    with pytest.raises(SystemExit, match="cannot draw into --plot .*No space left"):
        train(corpus, None, "--plot", tmp_path, "--connection", "plain", "--steps", 1)
    assert set(os.listdir(tmp_path)) == {"log.csv"}
    (tmp_path / "log.csv").unlink()
    for name in PICTURES:
        (tmp_path / name).write_text("kept")
        with pytest.raises(
            SystemExit, match=f"--plot: a picture must be a new file.*{name} exists"
        ):
            train(corpus, None, "--plot", tmp_path)
        (tmp_path / name).unlink()
