"""The trainer resumes from checkpoints, and shares a step among processes and parts of a batch.

Everything runs on the CPU. Processes that are killed, or launched, run this file as a program.
"""

import csv
import io
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from examples.train_lm import train as program
from examples.train_lm.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from examples.train_lm.log import Log
from examples.train_lm.options import parse
from programs import processes, trainer
from programs.trainer import BOUND, EVERY, STEPS, command, rows, steps_kept, train

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """Train without interruption, and return the folder of the log and the checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with mx.stream(mx.cpu):
        train(corpus, folder)
    found = rows(folder / "log.csv")
    assert [int(r[0]) for r in found] == list(range(1, STEPS + 1))
    assert float(found[-1][1]) < float(found[0][1]) - 1, "nothing was learnt"
    assert [bool(r[-1]) for r in found] == [k % EVERY == 0 for k in range(1, STEPS + 1)]
    return folder


def same_checkpoint(a, b):
    """Assert that weights, both moments, position and random state are equal bit for bit."""
    (_, ours, about), (_, theirs, other) = map(load_checkpoint, (a, b))
    assert about == other and ours.keys() == theirs.keys()
    assert {"at.step", "at.position", "random.state", "optimizer.states.0.step"} <= ours.keys()
    assert {k.split(".")[0] for k in ours} == {"model", "optimizer", "at", "random"}
    assert [k for k in ours if not mx.array_equal(ours[k], theirs[k])] == []


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(when):
    """Make this process die at a moment: "step 7", or of a checkpoint "write 8" and the like."""
    what, _, number = when.partition(" ")
    number = int(number or 0)
    if what == "step":
        evaluate, count = mx.async_eval, 0

        def async_eval(*arrays):
            nonlocal count
            evaluate(*arrays)
            count += 1
            if count == number:
                die()  # the step has begun, and is not waited for

        mx.async_eval = async_eval
        return
    save, replace, unlink = mx.save_safetensors, os.replace, Path.unlink
    checkpoint = program.save_checkpoint

    def half(f, *args):
        written = io.BytesIO()
        save(written, *args)
        f.write(written.getvalue()[: len(written.getvalue()) // 2])
        f.flush()
        die()

    def save_checkpoint(folder, step, *args):
        if step == number:
            mx.save_safetensors = half if what == "write" else save
            os.replace = (lambda *_: die()) if what == "rename" else replace
            Path.unlink = (lambda *_, **__: die()) if what == "prune" else unlink
        return checkpoint(folder, step, *args)

    program.save_checkpoint = save_checkpoint


# By when it dies: the steps of the checkpoints then there, and whether a file is unfinished.
DEATHS = {
    "step 7": ([4], False),
    "write 8": ([4], True),
    "rename 8": ([4], True),
    "prune 12": ([12, 8, 4], False),
}


@pytest.mark.parametrize("when", DEATHS)
def test_killed_and_resumed(when, corpus, uninterrupted, tmp_path, capsys):
    """Losses, and the state at the end, are those of an uninterrupted run, bit for bit."""
    this = [sys.executable, __file__, when, *command(corpus, tmp_path)]
    code, printed = processes.run(this, tmp_path / "printed.txt")
    assert code == -signal.SIGKILL, printed
    saved, unfinished = DEATHS[when]
    assert steps_kept(tmp_path) == saved
    file = tmp_path / "checkpoints" / "unfinished"
    assert file.exists() == unfinished
    if when == "write 8":
        complete = list_checkpoints(uninterrupted / "checkpoints")[0].stat().st_size
        assert 0 < file.stat().st_size < complete
    before = rows(tmp_path / "log.csv")
    assert before == rows(uninterrupted / "log.csv")[: len(before)] and len(before) >= 5
    if saved[0] < STEPS:
        train(corpus, tmp_path, "--resume")
        assert f"resumed after step {saved[0]} from" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="0"):
            train(corpus, tmp_path, "--resume")
        assert "12 of 12 steps are done" in capsys.readouterr().out
    assert rows(tmp_path / "log.csv") == rows(uninterrupted / "log.csv")
    assert steps_kept(tmp_path)[:2] == [12, 8]
    same_checkpoint(tmp_path / "checkpoints", uninterrupted / "checkpoints")


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) * 2 // 3 :]
    elif how == "empty":
        data.clear()
    else:
        data[{"header": 20, "data": len(data) // 2, "last byte": -1}[how]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "data", "last byte"])
def test_damaged_checkpoint_is_skipped(how, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "checkpoints", folder)
    newest, previous = list_checkpoints(folder)
    assert load_checkpoint(folder)[0] == newest
    damage(newest, how)
    path, arrays, _ = load_checkpoint(folder)
    assert path == previous and arrays["at.step"].item() == 8
    assert f"warning: {newest} is damaged" in capsys.readouterr().out
    damage(previous, how)
    with pytest.raises(SystemExit, match="no checkpoint in .* is whole"):
        load_checkpoint(folder)


def test_resumes_from_the_previous_of_a_damaged_one(corpus, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    damage(list_checkpoints(tmp_path / "checkpoints")[0], "data")
    train(corpus, tmp_path, "--resume")
    out = capsys.readouterr().out
    assert "is damaged" in out and "resumed after step 8" in out
    assert rows(tmp_path / "log.csv") == rows(uninterrupted / "log.csv")
    assert steps_kept(tmp_path) == [12, 8]  # whole ones; the damaged one of step 12 is aside
    same_checkpoint(tmp_path / "checkpoints", uninterrupted / "checkpoints")
    assert len(list((tmp_path / "checkpoints").glob("step-00000012-*.damaged"))) == 1


def test_full_disk_leaves_the_last_checkpoint(corpus, uninterrupted, tmp_path, monkeypatch):
    save, size = program.save_checkpoint, list_checkpoints(uninterrupted / "checkpoints")[0].stat()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_checkpoint(folder, step, *args):
        limit = soft if step == EVERY else size.st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return save(folder, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(program, "save_checkpoint", save_checkpoint)
    with pytest.raises(
        SystemExit, match="cannot write .*File too large; the last one is .*-00000004"
    ):
        train(corpus, tmp_path)
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    (last,) = list_checkpoints(tmp_path / "checkpoints")
    assert left == {last.name, "lock"}, "an unfinished file is left"
    assert load_checkpoint(tmp_path / "checkpoints")[1]["at.step"].item() == EVERY
    monkeypatch.undo()
    train(corpus, tmp_path, "--resume")
    assert rows(tmp_path / "log.csv") == rows(uninterrupted / "log.csv")


def test_checkpoint_of_another_run_is_refused(corpus, uninterrupted, tmp_path):
    with pytest.raises(SystemExit, match=r"was made with dim 8, not 16"):
        train(corpus, uninterrupted, "--resume", "--dim", 16, "--log", tmp_path / "log.csv")
    other = tmp_path / "other"
    other.write_bytes(corpus.read_bytes()[::-1])
    with pytest.raises(SystemExit, match="was made with data "):
        train(other, uninterrupted, "--resume", "--log", tmp_path / "log.csv")
    with pytest.raises(SystemExit, match="was made with streams 4, not 2"):
        train(corpus, uninterrupted, "--resume", "--streams", 2, "--log", tmp_path / "log.csv")
    assert steps_kept(uninterrupted) == [12, 8]


def test_plain_goes_on_whatever_streams_says(corpus, tmp_path, capsys, uncompiled):
    """It has one stream in any case."""
    options = ["--connection", "plain", "--streams"]
    train(corpus, tmp_path, *options, 4)
    before = rows(tmp_path / "log.csv")
    os.remove(list_checkpoints(tmp_path / "checkpoints")[0])
    train(corpus, tmp_path, *options, 6, "--resume")
    assert "resumed after step 8" in capsys.readouterr().out
    assert rows(tmp_path / "log.csv") == before


def test_a_gated_run_goes_on(corpus, uninterrupted, tmp_path, capsys, uncompiled):
    """Bit for bit, and its products' weights are in the checkpoint; another connection's is not."""
    train(corpus, tmp_path, "--connection", "gated")
    before, (newest, _) = rows(tmp_path / "log.csv"), list_checkpoints(tmp_path / "checkpoints")
    names = {k for k in load_checkpoint(tmp_path / "checkpoints")[1] if "connections.1" in k}
    products = ("weight", "down.weight", "up.weight", "inject.weight")
    assert {f"model.blocks.0.connections.1.{k}" for k in products} < names
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "whole")
    os.remove(newest)
    train(corpus, tmp_path, "--connection", "gated", "--resume")
    assert "resumed after step 8" in capsys.readouterr().out
    assert rows(tmp_path / "log.csv") == before
    same_checkpoint(tmp_path / "checkpoints", tmp_path / "whole")
    with pytest.raises(SystemExit, match="was made with connection static, not gated"):
        train(
            *(corpus, uninterrupted, "--resume", "--connection", "gated"),
            *("--log", tmp_path / "other.csv"),
        )


def test_random_state_is_restored(corpus, tmp_path, capsys, monkeypatch, uncompiled):
    """The sample at the end is the same, though the resumed process drew other numbers before."""

    def sampled(folder, *more):
        train(corpus, folder, "--sample", 30, *more)
        return capsys.readouterr().out.rpartition("sample: ")[2]

    want, make = sampled(tmp_path / "whole"), program.make_model
    os.remove(list_checkpoints(tmp_path / "whole" / "checkpoints")[0])

    def make_model(args):
        model = make(args)
        mx.eval(model.parameters(), mx.random.normal((7,)))
        return model

    monkeypatch.setattr(program, "make_model", make_model)
    assert sampled(tmp_path / "other") != want  # the state matters
    assert sampled(tmp_path / "whole", "--resume") == want


def test_same_seed_same_run(corpus, uninterrupted, tmp_path):
    train(corpus, tmp_path / "same")
    assert rows(tmp_path / "same" / "log.csv") == rows(uninterrupted / "log.csv")
    train(corpus, tmp_path / "other", "--seed", 1)
    assert rows(tmp_path / "other" / "log.csv")[0] != rows(uninterrupted / "log.csv")[0]


def close(got, want):
    """Losses, gradient norms and validation of two logs agree to rounding."""
    got, want = ([[float(v or 0) for v in r] for r in found] for found in (got, want))
    assert len(got) == len(want) == STEPS
    pairs = [pair for g, w in zip(got, want, strict=True) for pair in zip(g, w, strict=True)]
    error = max(abs(a - b) / max(abs(b), 1) for a, b in pairs)
    assert error < BOUND, error
    print(f"largest relative error {error:.1e}")


def test_accumulation_is_a_larger_batch(corpus, uninterrupted, tmp_path, uncompiled):
    train(corpus, tmp_path, "--batch", 2, "--accumulate", 4)
    close(rows(tmp_path / "log.csv"), rows(uninterrupted / "log.csv"))


def test_two_processes_train_as_one(corpus, uninterrupted, tmp_path):
    """The log of each rank says so; then both go on from the checkpoint that the first wrote."""

    def run(*more):
        args = command(corpus, tmp_path, "--batch", 4, *more)
        printed = processes.run_two([__file__, "ranks", *args], tmp_path / "printed.txt")
        logs = [tmp_path / "log.csv", tmp_path / "log.rank1.csv"]
        assert all(log.exists() for log in logs), printed  # mlx.launch returns 0 whatever happens
        first, second = map(rows, logs)
        assert first == second and len(first) == STEPS, printed
        return first, printed

    log, printed = run()
    close(log, rows(uninterrupted / "log.csv"))
    assert [p.name for p in tmp_path.glob("wrote*")] == ["wrote 0"], "not rank 0 alone"
    assert steps_kept(tmp_path) == [12, 8]
    os.remove(list_checkpoints(tmp_path / "checkpoints")[0])
    again, printed = run("--resume")
    assert "resumed after step 8" in printed and again == log


def test_diverged_run_stops_and_keeps_its_checkpoint(corpus, tmp_path, capsys):
    result = train(corpus, tmp_path, "--lr", 1e30, "--save-every", 1)
    assert not result["finite"] and 1 < result["steps"] < STEPS
    assert f"in step {result['steps']}: stopped; the last checkpoint" in capsys.readouterr().out
    assert steps_kept(tmp_path)[0] == result["steps"] - 1
    ahead = train(corpus, tmp_path / "ahead", "--lr", 1e30, "--save-every", STEPS)
    assert ahead["losses"] == pytest.approx(result["losses"], nan_ok=True)  # and not one more
    assert steps_kept(tmp_path / "ahead") == []


def test_steps_read_at_once_took_as_long(uninterrupted):
    """Before a validation the host waits for the step that runs and the one before it."""
    with open(uninterrupted / "log.csv", newline="") as f:
        speeds = [float(r["tokens_per_second"]) for r in csv.DictReader(f)]
    assert all(speeds[k - 1] == speeds[k] for k in range(EVERY - 1, STEPS, EVERY))
    assert len(set(speeds)) > STEPS // EVERY


def test_out_of_time(corpus, tmp_path, monkeypatch):
    """The step that has begun meanwhile counts: it is in the log, tested and saved."""
    write, clock = Log.write, time.perf_counter

    def late(log, step, *row):
        write(log, step, *row)
        if step == 5:
            monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600)

    monkeypatch.setattr(Log, "write", late)
    result = train(corpus, tmp_path, "--seconds", 600, "--save-every", STEPS)
    found = rows(tmp_path / "log.csv")
    assert result["steps"] == len(found) == len(result["losses"]) == steps_kept(tmp_path)[0] < STEPS
    assert [bool(r[-1]) for r in found][-2:] == [False, True]


def test_folder_with_checkpoints_is_for_resuming(corpus, uninterrupted):

    def contents():
        names = sorted(p.name for p in uninterrupted.rglob("*"))
        return names, rows(uninterrupted / "log.csv")

    before = contents()
    with pytest.raises(SystemExit, match="--checkpoint .* or go with --resume, but .*checkpoints "):
        train(corpus, uninterrupted, "--steps", 4)
    assert contents() == before


def test_what_is_kept_of_a_folder(tmp_path):
    """It keeps the file just written, whatever others are called, and the newest other of ours."""
    foreign = tmp_path / "step-abc.safetensors"
    foreign.touch()
    for step in (100, 200, 3, 4):
        path = save_checkpoint(tmp_path, step, {"a": mx.array(step)}, {})
        assert path.exists()
    found = [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)]
    assert found == [200, 4] and foreign.exists()


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    moment, *options = sys.argv[1:]
    if moment == "ranks":
        writes = program.save_checkpoint

        def noted(folder, *args):
            (folder.parent / f"wrote {mx.distributed.init().rank()}").touch()
            return writes(folder, *args)

        program.save_checkpoint = noted
    else:
        arrange(moment)
    program.train(parse(options))
