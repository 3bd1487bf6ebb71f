"""examples/train_lm.py: what it resumes from, how processes and parts of a batch share a step.

Everything runs on the CPU. Processes that are killed, or launched, run this file as a program.
"""

import csv
import importlib
import io
import os
import resource
import runpy
import shutil
import signal
import sys
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from programs import processes, trainer
from programs.processes import free_port
from programs.trainer import EVERY, EXAMPLES, STEPS, command, rows, train

# isort: split
import train_lm
import training_step
from byte_lm import CONVENTIONS, ByteLM, Windows, loss_fn
from checkpoints import Log, list_checkpoints, load_checkpoint, save_checkpoint
from options import parse
from training_step import make_optimizer

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus

# Of a loss, relative: rounding of float32 sums in another order, which AdamW carries on for twelve
# steps. Seen: 1.3e-6.
BOUND = 1e-5


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The log and the checkpoints of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    train(corpus, folder)
    mx.set_default_device(device)
    found = rows(folder / "log.csv")
    assert [int(r[0]) for r in found] == list(range(1, STEPS + 1))
    assert float(found[-1][1]) < float(found[0][1]) - 1, "nothing was learnt"
    assert [bool(r[-1]) for r in found] == [k % EVERY == 0 for k in range(1, STEPS + 1)]
    return folder


def steps_kept(folder):
    found = list_checkpoints(folder / "checkpoints")
    return [int(p.name.split("-")[1]) for p in found]


def same_checkpoint(a, b):
    """Bit for bit: weights, both moments, position, random state."""
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
    checkpoint = train_lm.save_checkpoint

    def half(f, *args):
        made = io.BytesIO()
        save(made, *args)
        f.write(made.getvalue()[: len(made.getvalue()) // 2])
        f.flush()
        die()

    def save_checkpoint(folder, step, *args):
        if step == number:
            mx.save_safetensors = half if what == "write" else save
            os.replace = (lambda *_: die()) if what == "rename" else replace
            Path.unlink = (lambda *_, **__: die()) if what == "prune" else unlink
        return checkpoint(folder, step, *args)

    train_lm.save_checkpoint = save_checkpoint


def start(when, args, folder, launch=()):
    """A process of this file; its return code and what it wrote."""
    folder.mkdir(exist_ok=True)
    command = [*(launch or [sys.executable]), __file__, when, *args]
    return processes.run(command, folder / "printed.txt")


# When it dies, the steps of the checkpoints then there, and whether a file is unfinished.
DEATHS = {
    "step 7": ([4], False),
    "write 8": ([4], True),
    "rename 8": ([4], True),
    "prune 12": ([12, 8, 4], False),
}


@pytest.mark.parametrize("when", DEATHS)
def test_killed_and_resumed(when, corpus, whole, tmp_path, capsys):
    """The losses, and the state at the end, of a run that nobody interrupted, bit for bit."""
    code, printed = start(when, command(corpus, tmp_path), tmp_path)
    assert code == -signal.SIGKILL, printed
    kept, unfinished = DEATHS[when]
    assert steps_kept(tmp_path) == kept
    file = tmp_path / "checkpoints" / "unfinished"
    assert file.exists() == unfinished
    if when == "write 8":
        complete = list_checkpoints(whole / "checkpoints")[0].stat().st_size
        assert 0 < file.stat().st_size < complete
    before = rows(tmp_path / "log.csv")
    assert before == rows(whole / "log.csv")[: len(before)] and len(before) >= 5
    if kept[0] < STEPS:
        train(corpus, tmp_path, "--resume")
        assert f"resumed after step {kept[0]} from" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="0"):
            train(corpus, tmp_path, "--resume")
        assert "12 of 12 steps are done" in capsys.readouterr().out
    assert rows(tmp_path / "log.csv") == rows(whole / "log.csv")
    assert steps_kept(tmp_path)[:2] == [12, 8]
    same_checkpoint(tmp_path / "checkpoints", whole / "checkpoints")


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
def test_damaged_checkpoint_is_skipped(how, whole, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder)
    newest, previous = list_checkpoints(folder)
    assert load_checkpoint(folder)[0] == newest
    damage(newest, how)
    path, arrays, _ = load_checkpoint(folder)
    assert path == previous and arrays["at.step"].item() == 8
    assert f"warning: {newest} is damaged" in capsys.readouterr().out
    damage(previous, how)
    with pytest.raises(SystemExit, match="no checkpoint in .* is whole"):
        load_checkpoint(folder)


def test_resumes_from_the_previous_of_a_damaged_one(corpus, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(list_checkpoints(tmp_path / "checkpoints")[0], "data")
    train(corpus, tmp_path, "--resume")
    out = capsys.readouterr().out
    assert "is damaged" in out and "resumed after step 8" in out
    assert rows(tmp_path / "log.csv") == rows(whole / "log.csv")
    assert steps_kept(tmp_path) == [12, 8]  # whole ones; the damaged one of step 12 is aside
    same_checkpoint(tmp_path / "checkpoints", whole / "checkpoints")
    assert len(list((tmp_path / "checkpoints").glob("step-00000012-*.damaged"))) == 1


def test_full_disk_leaves_the_last_checkpoint(corpus, whole, tmp_path, monkeypatch):
    save, size = train_lm.save_checkpoint, list_checkpoints(whole / "checkpoints")[0].stat()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_checkpoint(folder, step, *args):
        limit = soft if step == EVERY else size.st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return save(folder, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(train_lm, "save_checkpoint", save_checkpoint)
    with pytest.raises(
        SystemExit, match="cannot write .*File too large; the last one is .*-00000004"
    ):
        train(corpus, tmp_path)
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    (kept,) = list_checkpoints(tmp_path / "checkpoints")
    assert left == {kept.name, "lock"}, "an unfinished file is left"
    assert load_checkpoint(tmp_path / "checkpoints")[1]["at.step"].item() == EVERY
    monkeypatch.undo()
    train(corpus, tmp_path, "--resume")
    assert rows(tmp_path / "log.csv") == rows(whole / "log.csv")


def test_checkpoint_of_another_run_is_refused(corpus, whole, tmp_path):
    with pytest.raises(SystemExit, match=r"was made with dim 8, not 16"):
        train(corpus, whole, "--resume", "--dim", 16, "--log", tmp_path / "log.csv")
    other = tmp_path / "other"
    other.write_bytes(corpus.read_bytes()[::-1])
    with pytest.raises(SystemExit, match="was made with data "):
        train(other, whole, "--resume", "--log", tmp_path / "log.csv")
    with pytest.raises(SystemExit, match="was made with streams 4, not 2"):
        train(corpus, whole, "--resume", "--streams", 2, "--log", tmp_path / "log.csv")
    assert steps_kept(whole) == [12, 8]


def test_plain_goes_on_whatever_streams_says(corpus, tmp_path, capsys, uncompiled):
    """It has one in any case."""
    own = ["--connection", "plain", "--streams"]
    train(corpus, tmp_path, *own, 4)
    before = rows(tmp_path / "log.csv")
    os.remove(list_checkpoints(tmp_path / "checkpoints")[0])
    train(corpus, tmp_path, *own, 6, "--resume")
    assert "resumed after step 8" in capsys.readouterr().out
    assert rows(tmp_path / "log.csv") == before


def test_random_state_is_restored(corpus, tmp_path, capsys, monkeypatch, uncompiled):
    """The sample at the end, though the resumed process has drawn other numbers before."""

    def sampled(folder, *more):
        train(corpus, folder, "--sample", 30, *more)
        return capsys.readouterr().out.rpartition("sample: ")[2]

    want, make = sampled(tmp_path / "whole"), train_lm.make_model
    os.remove(list_checkpoints(tmp_path / "whole" / "checkpoints")[0])

    def make_model(args):
        model = make(args)
        mx.eval(model.parameters(), mx.random.normal((7,)))
        return model

    monkeypatch.setattr(train_lm, "make_model", make_model)
    assert sampled(tmp_path / "other") != want  # the state matters
    assert sampled(tmp_path / "whole", "--resume") == want


def test_same_seed_same_run(corpus, whole, tmp_path):
    train(corpus, tmp_path / "same")
    assert rows(tmp_path / "same" / "log.csv") == rows(whole / "log.csv")
    train(corpus, tmp_path / "other", "--seed", 1)
    assert rows(tmp_path / "other" / "log.csv")[0] != rows(whole / "log.csv")[0]


def close(got, want):
    """Losses, gradient norms and validation of two logs agree to rounding."""
    got, want = ([[float(v or 0) for v in r] for r in found] for found in (got, want))
    assert len(got) == len(want) == STEPS
    pairs = [pair for g, w in zip(got, want, strict=True) for pair in zip(g, w, strict=True)]
    error = max(abs(a - b) / max(abs(b), 1) for a, b in pairs)
    assert error < BOUND, error
    print(f"largest relative error {error:.1e}")


def test_accumulation_is_a_larger_batch(corpus, whole, tmp_path, uncompiled):
    train(corpus, tmp_path, "--batch", 2, "--accumulate", 4)
    close(rows(tmp_path / "log.csv"), rows(whole / "log.csv"))


def test_accumulation_holds_one_part_at_a_time(corpus, uncompiled):
    sizes = ["--depth", 2, "--context", 64, "--steps", 2, "--validation-batch", 1]
    held = mx.get_active_memory() / 2**20  # by tests before it
    whole, parts = (
        train(corpus, None, *sizes, "--batch", batch, "--accumulate", 16 // batch)["peak_mib"]
        for batch in (16, 4)
    )
    assert parts - held < 0.5 * (whole - held)


def test_recomputation_changes_memory_alone(corpus, uncompiled):
    options = ["--depth", 12, "--context", 128, "--steps", 2, "--validation-batch", 1]
    plain, again = (train(corpus, None, *options, *o) for o in ([], ["--recompute"]))
    assert again["losses"] == pytest.approx(plain["losses"], rel=BOUND)
    assert again["peak_mib"] < 0.8 * plain["peak_mib"]


def test_two_processes_train_as_one(corpus, whole, tmp_path):
    """From each rank's own log; then both go on from the checkpoint that the first wrote."""
    if not mx.distributed.is_available("ring"):
        pytest.skip("this build of MLX has no ring")
    launch = shutil.which("mlx.launch", path=sysconfig.get_path("scripts"))
    if launch is None:
        pytest.skip("mlx.launch is not among this Python's scripts")

    def run(*more):
        launcher = [launch, "-n", 2, "--backend", "ring", "-p", free_port(), "--", sys.executable]
        args = command(corpus, tmp_path, "--batch", 4, *more)
        _, printed = start("ranks", args, tmp_path, launcher)
        if "[ring] Couldn't bind socket" in printed:
            pytest.skip("another program took the port: [ring] Couldn't bind socket")
        logs = [tmp_path / "log.csv", tmp_path / "log.rank1.csv"]
        assert all(log.exists() for log in logs), printed  # mlx.launch returns 0 whatever happens
        first, second = map(rows, logs)
        assert first == second and len(first) == STEPS, printed
        return first, printed

    log, printed = run()
    close(log, rows(whole / "log.csv"))
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


def test_a_terminal_that_cannot_show_a_sample(corpus, tmp_path, monkeypatch, uncompiled):
    """The run goes on to its pictures."""
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    options = command(corpus, None, "--connection", "plain", "--steps", 1, "--plot", tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *options, "--sample", "50"])
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "train_lm.py"), run_name="__main__")
    shown.seek(0)
    assert "\\ufffd" in shown.read() and (tmp_path / "loss.png").exists()


def test_a_run_has_diverged_where_its_validation_has(corpus, tmp_path, monkeypatch):
    """The loss of a step is taken before its update."""
    monkeypatch.setattr(train_lm, "loss_fn", lambda *_: [mx.array(float("nan"))])
    result = train(corpus, tmp_path, "--connection", "plain", "--save-every", 1)
    assert not result["finite"] and result["steps"] == EVERY
    assert steps_kept(tmp_path) == [EVERY - 1, EVERY - 2]


def test_steps_read_at_once_took_as_long(whole):
    """Before a validation the host waits for the step that runs and the one before it."""
    with open(whole / "log.csv", newline="") as f:
        speeds = [float(r["tokens_per_second"]) for r in csv.DictReader(f)]
    assert all(speeds[k - 1] == speeds[k] for k in range(EVERY - 1, STEPS, EVERY))
    assert len(set(speeds)) > STEPS // EVERY


def test_a_step_lasts_from_the_end_of_the_one_before(corpus, monkeypatch):
    """The host waits for a step's loss; what it does between steps is no step's time."""
    seconds = [3, 1, 4, 6, 2, 7, 5, 9, 8, 1, 12, 4]
    now, left = [0.0], iter(seconds)

    class Loss:
        def item(self):
            now[0] += next(left)
            return 2.0

    zero = mx.array(0.0)
    monkeypatch.setattr(train_lm, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_lm, "make_step", lambda *_: lambda *_: (Loss(), zero, zero, zero))
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    run = train_lm.Run(parse(command(corpus, None, "--connection", "plain")), ExitStack())
    found = []
    for step in run.steps():
        found.append(step.seconds)
        now[0] += 1000  # as a validation
    both = [(seconds[k] + seconds[k + 1]) / 2 for k in range(EVERY - 2, STEPS, EVERY)]
    want = [[*seconds[k : k + EVERY - 2], *[both.pop(0)] * 2] for k in range(0, STEPS, EVERY)]
    assert found == sum(want, [])


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


def test_pictures_on_a_signal_and_at_the_end(corpus, tmp_path, monkeypatch):
    drawn, draw, write = [], train_lm.plot, Log.write

    def plot(reports, folder, logs):
        drawn.append([len(rows(log)) for log in logs.values()])
        return draw(reports, folder, logs=logs) if len(drawn) == 3 else []

    def signalled(log, step, *row):
        write(log, step, *row)
        if step == 5:
            signal.raise_signal(signal.SIGUSR1)

    def read(*args):
        signal.raise_signal(signal.SIGUSR1)  # without a handler it ends the process
        return read_corpus(*args)

    before, read_corpus = signal.getsignal(signal.SIGUSR1), train_lm.read_corpus
    monkeypatch.setattr(train_lm, "read_corpus", read)
    monkeypatch.setattr(train_lm, "plot", plot)
    monkeypatch.setattr(Log, "write", signalled)
    report = train(corpus, None, "--plot", tmp_path)["report"]
    signal.signal(signal.SIGUSR1, before)
    assert drawn == [[1], [5], [STEPS]]
    assert {p.name for p in tmp_path.glob("*.png")} == {
        *("gains.png", "streams.png", "h_res.png", "gates.png", "loss.png")
    }
    assert [c.name for c in report.connections] == [f"blocks.0.connections.{k}" for k in (0, 1)]
    assert all(c.h_pre_moved > 1e-3 and min(c.gradient_norms) > 0 for c in report.connections)


@pytest.mark.parametrize("connection", [*CONVENTIONS, "plain"])
def test_every_connection_trains_in_bfloat16_as_in_float32(
    connection, corpus, tmp_path, uncompiled
):
    """To the rounding of bfloat16, with weights and moments in float32."""
    own = ["--connection", connection, "--steps", 8, "--warmup", 2]
    single = train(corpus, None, *own, "--dtype", "float32")
    half = train(corpus, tmp_path, *own, "--dtype", "bfloat16")
    kept = load_checkpoint(tmp_path / "checkpoints")[1]
    dtypes = {v.dtype for k, v in kept.items() if k.startswith("model.") or k[-2:] in (".m", ".v")}
    assert dtypes == {mx.float32}
    assert single["losses"][-1] < single["losses"][0] - 0.5
    assert half["losses"] == pytest.approx(single["losses"], abs=0.05)
    assert half["losses"] != single["losses"]
    model = train_lm.make_model(parse(command(corpus, None, *own, "--dtype", "bfloat16")))
    assert {v.dtype for _, v in tree_flatten(model.parameters())} == {mx.float32}
    assert [a.dtype for a in model(mx.zeros((1, 4), mx.int32))] == [mx.bfloat16] * 2


def test_windows_are_all_taken_once_in_an_epoch():
    windows = Windows(1000, 16, seed=3)
    first, second = (windows.starts(k * windows.count, windows.count).tolist() for k in (0, 1))
    assert windows.count == 61 and first != second
    for found in (first, second):
        assert sorted(k // 16 for k in found) == list(range(61))
        assert len({k % 16 for k in found}) == 1 and max(found) + 17 <= 1000
    assert windows.starts(50, 20).tolist() == [*first[50:], *second[:9]]
    assert Windows(1000, 16, seed=4).starts(0, 61).tolist() != first


def test_text_too_short_for_its_context_is_an_error(corpus):
    with pytest.raises(SystemExit, match="--context 8192 is too long for a text of 27"):
        train(corpus, None, "--context", 8192)


def test_every_step_is_adamw_of_the_clipped_mean_at_two_rates(corpus, tmp_path, uncompiled):
    """The parameters and moments after five steps, by NumPy in float64 from MLX's gradient of the
    whole batch: rates, warm-up, cosine, decay of all parameters, clipping, accumulation, text."""
    lr, gates, clip, warmup, steps, share = 0.02, 4.0, 0.3, 2, 5, 6
    options = ["--connection", "mhc", "--batch", 2, "--accumulate", 3, "--steps", steps]
    options += ["--lr", lr, "--gates-rate", gates, "--clip", clip, "--warmup", warmup, "--seed", 5]
    result = train(corpus, tmp_path, *options, "--save-every", steps)
    got = load_checkpoint(tmp_path / "checkpoints")[1]

    mx.random.seed(5)
    model = train_lm.make_model(parse(command(corpus, None, *options)))
    text = np.frombuffer(corpus.read_bytes(), np.uint8)
    text = text[: -max(len(text) // 32, 33)]
    windows, backward = Windows(len(text), 16, 5), nn.value_and_grad(model, loss_fn)
    weights = {k: np.array(v, np.float64) for k, v in tree_flatten(model.parameters())}
    start = dict(weights)
    first, second = ({k: np.zeros_like(v) for k, v in weights.items()} for _ in range(2))
    clipped, losses = 0, []
    for step in range(steps):
        model.update(tree_unflatten([(k, mx.array(v, mx.float32)) for k, v in weights.items()]))
        starts = np.array(windows.starts(share * step, share))
        batch = mx.array(text[starts[:, None] + np.arange(17)].astype(np.int32))
        (loss, _), gradients = backward(model, batch)
        losses.append(loss.item())
        gradients = {k: np.array(v, np.float64) for k, v in tree_flatten(gradients)}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        clipped += norm > clip
        rate = step / warmup
        if step >= warmup:
            rate = 0.55 + 0.45 * np.cos(np.pi * (step - warmup) / (steps - warmup))
        for k, g in gradients.items():
            g = g * min(1, clip / norm)
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.999 * second[k] + 0.001 * g**2
            of = lr * rate * (gates if "connections" in k and not k.endswith("phi") else 1)
            weights[k] = (1 - of * 0.01) * weights[k] - of * first[k] / (np.sqrt(second[k]) + 1e-6)
    assert clipped == steps and any("connections" in k for k in weights)
    assert result["losses"] == pytest.approx(losses, rel=BOUND)
    for k, want in weights.items():
        moved = np.abs(want - start[k]).max()
        error = np.abs(np.array(got[f"model.{k}"]) - want).max()
        # Adam divides gradients by their size: those near its eps of 1e-6 keep fewer digits.
        assert moved > 0.01 and error < 1e-3 * moved, f"{k}: {error} of {moved}"
        which = 0 if "connections" in k and not k.endswith("phi") else 1
        for name, moments in (("m", first), ("v", second)):
            moment = np.array(got[f"optimizer.states.{which}.{k}.{name}"])
            assert np.abs(moment - moments[k]).max() < 1e-4 * np.abs(moments[k]).max(), (k, name)


def test_trains_on_the_text_but_its_tail(tmp_path, monkeypatch, uncompiled):
    """The last 32nd is for validation, and for that alone."""
    path, seen = tmp_path / "text", {"trained": [], "tested": []}
    path.write_bytes(b"ab" * 31 * 512 + b"yz" * 512)
    for module, name in ((training_step, "trained"), (train_lm, "tested")):

        def noted(model, batch, name=name, loss=module.loss_fn):
            seen[name].append(batch)
            return loss(model, batch)

        monkeypatch.setattr(module, "loss_fn", noted)
    options = ["--connection", "plain", "--steps", 8, "--batch", 60, "--validation-batch", 50]
    train(path, None, *options)  # as many sequences as half of an epoch; nearly all of the tail
    found = {k: set(mx.concatenate(v).flatten().tolist()) for k, v in seen.items()}
    assert found == {"trained": set(b"ab"), "tested": set(b"yz")}
    assert {b.shape for b in seen["trained"]} == {(60, 17)}
    assert {b.shape for b in seen["tested"]} == {(50, 17)}


def test_losses_are_bits_per_byte():
    model = ByteLM(8, 1, 2, 1, "plain", use_metal=True)
    model.head.weight = mx.zeros((256, 8))
    loss, similarity = loss_fn(model, mx.arange(34).reshape(2, 17))
    assert loss.item() == pytest.approx(8, rel=1e-6) and similarity.item() == 0
    # The first 16 bytes foretell the last 16: of them the loss is the mean.
    weight, batch = mx.random.normal((256, 8)), mx.array([list(range(17))])
    model.head.weight = weight
    logits = np.array(model(batch[:, :-1])[0], np.float64)[0]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = -np.log2(chances[np.arange(16), np.arange(1, 17)]).mean()
    assert loss_fn(model, batch)[0].item() == pytest.approx(want, rel=1e-5)


def test_speed_counts_all_sequences_of_a_step(corpus, tmp_path, monkeypatch, uncompiled):
    """Those of each part and of each process."""
    args = parse(command(corpus, None, "--batch", 4, "--accumulate", 3, "--log", tmp_path / "log"))
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 5)
    monkeypatch.setattr(mx.distributed, "init", lambda: group)
    run = train_lm.Run(args, ExitStack())
    run.steps = lambda: iter([train_lm.Step(1, 0.5, False, 2.0, 0.5, 1.0)])
    log = Log(tmp_path / "log", 0)
    train_lm.follow(run, log)
    log.close()
    with open(tmp_path / "log", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["step"] == "1" and row["tokens_per_second"] == str(4 * 3 * 5 * 16 * 2)
    assert (row["bits_per_byte"], row["similarity"], row["gradient_norm"]) == ("2.0", "0.5", "1.0")


def test_figures_are_of_the_last_100_steps(capsys):
    """But times are a median of all."""
    run = SimpleNamespace(model=SimpleNamespace(streams=4), size=7, saved=0, say=print)
    seconds = [9.0] * 40 + [0.002] * 70 + [0.001] * 40
    done = [
        train_lm.Step(k + 1, seconds[k], k == 149, 8.0 - k / 50, k / 150, 1.0) for k in range(150)
    ]
    result = train_lm.summarise(run, done, 4.5, 12.0)
    assert result["bits_per_byte"] == pytest.approx(8 - 99.5 / 50)
    assert result["similarity"] == pytest.approx(99.5 / 150)
    assert result["ms_per_step"] == pytest.approx(2) and result["losses"] == [s.bits for s in done]
    assert result["finite"] and result["steps"] == 150 and result["validation"] == 4.5
    out = capsys.readouterr().out
    assert "bits per byte 6.010, similarity between streams 0.663 (mean of the last 100" in out
    assert "150 steps in 12 s, 2.0 ms per step" in out and "validation 4.500 bits" in out


def test_the_seed_decides_weights_and_order(corpus):
    def begun(*more):
        run = train_lm.Run(parse(command(corpus, None, *more)), ExitStack())
        weights = dict(tree_flatten(run.model.parameters()))
        return run.windows.starts(0, 50).tolist(), weights["head.weight"], run.held_out

    order, weights, held_out = begun("--seed", 7)
    same, different = begun("--seed", 7), begun("--seed", 8)
    assert order == same[0] != different[0]
    assert mx.array_equal(weights, same[1]) and not mx.array_equal(weights, different[1])
    assert mx.array_equal(held_out, same[2]) and mx.array_equal(held_out, different[2])
    # Always the same windows of a text, so that validations of any two versions can be compared.
    text = corpus.read_bytes()
    tail = np.frombuffer(text[-(len(text) // 32) :], np.uint8)
    starts = np.array(Windows(len(tail), 16, 0).starts(0, 4))
    assert (np.array(held_out) == tail[starts[:, None] + np.arange(17)]).all()


def test_a_sample_goes_on_after_its_last_byte(monkeypatch):
    """From the logits of the last place, sharpened, by as many bytes as the model may see."""
    seen, given, draw = [], [], mx.random.categorical

    def model(tokens):
        (found,) = tokens.tolist()
        seen.append(bytes(found))
        after = 100.0 * (mx.arange(256) == tokens[..., None] + 1)
        return after.astype(mx.bfloat16), None

    monkeypatch.setattr(mx.random, "categorical", lambda a: given.append(a) or draw(a))
    assert train_lm.sample(model, b"abc", 4, 3) == "abcdefg"
    assert seen == [b"abc", b"bcd", b"cde", b"def"]
    for k, logits in enumerate(given):
        assert (logits.shape, logits.dtype) == ((256,), mx.float32)
        assert logits[ord("d") + k].item() == pytest.approx(100 / 0.7)


def test_the_default_text_is_the_standard_library(tmp_path, monkeypatch):
    """Of Python alone, in a fixed order, without what was installed; whole files up to a limit."""
    for name in ("b.py", "a/c.py", "site-packages/d.py", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.stem * 6000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert train_lm.read_corpus(None) == b"c" * 6000 + b"b" * 6000
    with pytest.raises(SystemExit, match="standard library must .* 10,000 bytes but has 6000"):
        train_lm.read_corpus(None, limit=6000)


def test_rate_warms_up_and_falls_as_a_cosine():
    adam = make_optimizer(0.5, steps=100, warmup=10).optimizers[1]

    def rate(step):
        return adam._schedulers["learning_rate"](mx.array(step, mx.uint64)).item()

    assert [rate(k) for k in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])
    assert [rate(k) for k in (55, 100, 200)] == pytest.approx([0.275, 0.05, 0.05])


@pytest.mark.parametrize(
    "options",
    [
        *(["--dim", "0"], ["--heads", "3"], ["--accumulate", "-1"], ["--resume"]),
        *(["--seed", "-1"], ["--seed", str(2**64)], ["--mlp", "0"], ["--mlp", "-8"]),
        *(["--lr", "nan"], ["--lr", "inf"], ["--lr", "-1"], ["--clip", "nan"]),
        *(["--seconds", "nan"], ["--seconds", "-1"], ["--gates-rate", "nan"], ["--warmup", "-1"]),
        *(["--sample", "-1"], ["--streams", "65"]),
        *(["--streams", "6", "--connection", "mhc-lite"],),
        *(["--streams", "6", "--connection", "kronecker"],),
        *(["--data", ""], ["--log", ""], ["--plot", ""], ["--checkpoint", ""]),
        *(["--steps", "99999999999"], ["--warmup", "99999999999"], ["--validation-batch", "0"]),
        *(["--save-every", "500"], ["--no-metal", "--connection", "plain"]),
        *(["--chec", "somewhere"],),  # an abbreviation is none
    ],
    ids=lambda o: " ".join(o),
)
def test_bad_options_are_named(options, capsys):
    with pytest.raises(SystemExit):
        parse(options)
    found = capsys.readouterr().err.rpartition("error:")[2]
    assert options[0] in found and all(v in found for v in options[1:2] if v != "--connection")


def test_more_than_the_device_or_the_text_has_is_refused(corpus, capsys, monkeypatch):
    """Before anything is made of it."""
    for name in ("--batch", "--context", "--dim", "--depth", "--mlp"):
        with pytest.raises(SystemExit):
            parse([name, str(2**60)])
        assert f"{name}" in (found := capsys.readouterr().err) and "GiB but the device has" in found
    monkeypatch.setattr(train_lm, "make_model", None)
    for name, number in (("batch", 5000), ("accumulate", 10**12), ("validation-batch", 100)):
        with pytest.raises(SystemExit, match=f"--{name} .*must be at most the .* but is"):
            train(corpus, None, f"--{name}", number)


def test_options_at_their_bounds():
    args = parse(["--seed", str(2**64 - 1), "--seconds", "inf", "--streams", "64"])
    mx.random.seed(args.seed)
    for connection, streams in (("mhc-lite", 5), ("kronecker", 8), ("plain", 6)):
        parse(["--connection", connection, "--streams", str(streams)])


@pytest.mark.parametrize("option", ["--data", "--checkpoint", "--log", "--plot"])
def test_unusable_files_are_noticed_at_the_start(option, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm, "make_model", None)  # nothing is made before
    (tmp_path / "file").write_text("kept")
    paths = {
        "--data": [tmp_path, tmp_path / "missing"],
        "--log": [tmp_path, tmp_path / "file" / "log.csv"],
    }
    for path in paths.get(option, [tmp_path / "file", tmp_path / "file" / "under"]):
        with pytest.raises(SystemExit, match=f"{option} .* {tmp_path}"):
            train(corpus, None, option, path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_folder_with_checkpoints_is_for_resuming(corpus, whole):
    before = sorted(p.name for p in whole.rglob("*")), rows(whole / "log.csv")
    with pytest.raises(SystemExit, match="--checkpoint .* or go with --resume, but .*checkpoints "):
        train(corpus, whole, "--steps", 4)
    assert (sorted(p.name for p in whole.rglob("*")), rows(whole / "log.csv")) == before


def test_what_is_kept_of_a_folder(tmp_path):
    """The file just written, whatever the others are called, and the newest other of ours."""
    foreign = tmp_path / "step-abc.safetensors"
    foreign.touch()
    for step in (100, 200, 3, 4):
        path = save_checkpoint(tmp_path, step, {"a": mx.array(step)}, {})
        assert path.exists()
    found = [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)]
    assert found == [200, 4] and foreign.exists()


WORDS = {  # what options are given, which their help must say
    "train_lm": "--data FILE, --log FILE, --plot DIR, --checkpoint DIR, --mlp WIDTH, "
    "--validate-every STEPS, --save-every STEPS, --sample BYTES",
    "experiment": "--out DIR",
    "overhead": "--json FILE, --from FILE, --curves STEPS, --copy-gb-s GB/S",
}


@pytest.mark.parametrize("name", WORDS)
def test_runs_from_any_folder(name, tmp_path, monkeypatch):
    """And its help has the examples as they are typed, and says what options are given."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, EXAMPLES / f"{name}.py", "--help"]
    code, printed = processes.run(command, tmp_path / "printed.txt")
    assert code == 0 and printed.startswith(f"usage: {name}.py"), printed
    assert importlib.import_module(name).__doc__.strip() in printed
    for words in WORDS[name].split(", "):
        assert f"  {words}" in printed, words


@pytest.mark.parametrize("lr, code", [("0.01", 0), ("1e30", 1)])
def test_exit_code_of_a_run(lr, code, corpus, monkeypatch, uncompiled):
    args = command(corpus, None, "--steps", 3, "--warmup", 0, "--lr", lr)
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "train_lm.py"), run_name="__main__")
    assert stopped.value.code == code


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    moment, *rest = sys.argv[1:]
    if moment == "ranks":
        writes = train_lm.save_checkpoint

        def noted(folder, *args):
            (folder.parent / f"wrote {mx.distributed.init().rank()}").touch()
            return writes(folder, *args)

        train_lm.save_checkpoint = noted
    else:
        arrange(moment)
    train_lm.train(parse(rest))
