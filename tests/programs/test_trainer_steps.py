"""A step of the trainer is AdamW of the clipped mean, and its figures are of all of it."""

import csv
import signal
import sysconfig
from contextlib import ExitStack
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from examples.train_lm import train as program
from examples.train_lm import training_step
from examples.train_lm.byte_lm import CONNECTIONS, ByteLM, Windows, loss_fn
from examples.train_lm.checkpoints import load_checkpoint
from examples.train_lm.log import Log
from examples.train_lm.options import parse
from examples.train_lm.training_step import make_optimizer
from programs import trainer
from programs.trainer import BOUND, EVERY, STEPS, command, rows, steps_kept, train

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus


def test_accumulation_holds_one_part_at_a_time(corpus, uncompiled):
    sizes = ["--depth", 2, "--context", 64, "--steps", 2, "--validation-batch", 1]
    before = mx.get_active_memory() / 2**20  # tests before it hold this
    at_once, parts = (
        train(corpus, None, *sizes, "--batch", batch, "--accumulate", 16 // batch)["peak_mib"]
        for batch in (16, 4)
    )
    assert parts - before < 0.5 * (at_once - before)


def test_recomputation_changes_memory_alone(corpus, uncompiled):
    options = ["--depth", 12, "--context", 128, "--steps", 2, "--validation-batch", 1]
    plain, again = (train(corpus, None, *options, *o) for o in ([], ["--recompute"]))
    assert again["losses"] == pytest.approx(plain["losses"], rel=BOUND)
    assert again["peak_mib"] < 0.8 * plain["peak_mib"]


def test_a_run_has_diverged_where_its_validation_has(corpus, tmp_path, monkeypatch):
    """The loss of a step is taken before its update."""
    monkeypatch.setattr(program, "loss_fn", lambda *_: [mx.array(float("nan"))])
    result = train(corpus, tmp_path, "--connection", "plain", "--save-every", 1)
    assert not result["finite"] and result["steps"] == EVERY
    assert steps_kept(tmp_path) == [EVERY - 1, EVERY - 2]


def test_a_step_lasts_from_the_end_of_the_one_before(corpus, monkeypatch):
    """The host waits for a step's loss; what it does between steps is no step's time."""
    seconds = [3, 1, 4, 6, 2, 7, 5, 9, 8, 1, 12, 4]
    now, left = [0.0], iter(seconds)

    class Loss:
        def item(self):
            now[0] += next(left)
            return 2.0

    zero = mx.array(0.0)
    monkeypatch.setattr(program, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(program, "make_step", lambda *_: lambda *_: (Loss(), zero, zero, zero))
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    run = program.Run(parse(command(corpus, None, "--connection", "plain")), ExitStack())
    found = []
    for step in run.steps():
        found.append(step.seconds)
        now[0] += 1000  # a validation may take so long
    both = [(seconds[k] + seconds[k + 1]) / 2 for k in range(EVERY - 2, STEPS, EVERY)]
    want = [[*seconds[k : k + EVERY - 2], *[both.pop(0)] * 2] for k in range(0, STEPS, EVERY)]
    assert found == sum(want, [])


def test_pictures_on_a_signal_and_at_the_end(corpus, tmp_path, monkeypatch):
    drawn, draw, write = [], program.plot, Log.write

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

    before, read_corpus = signal.getsignal(signal.SIGUSR1), program.read_corpus
    monkeypatch.setattr(program, "read_corpus", read)
    monkeypatch.setattr(program, "plot", plot)
    monkeypatch.setattr(Log, "write", signalled)
    report = train(corpus, None, "--plot", tmp_path)["report"]
    signal.signal(signal.SIGUSR1, before)
    assert drawn == [[1], [5], [STEPS]]
    assert {p.name for p in tmp_path.glob("*.png")} == {
        *("gains.png", "streams.png", "h_res.png", "gates.png", "loss.png")
    }
    assert [c.name for c in report.connections] == [f"blocks.0.connections.{k}" for k in (0, 1)]
    assert all(c.h_pre_moved > 1e-3 and min(c.gradient_norms) > 0 for c in report.connections)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_every_connection_trains_in_bfloat16_as_in_float32(
    connection, corpus, tmp_path, uncompiled
):
    """Losses agree to the rounding of bfloat16; weights and moments are in float32."""
    options = ["--connection", connection, "--steps", 8, "--warmup", 2]
    single = train(corpus, None, *options, "--dtype", "float32")
    half = train(corpus, tmp_path, *options, "--dtype", "bfloat16")
    arrays = load_checkpoint(tmp_path / "checkpoints")[1]
    dtypes = {
        v.dtype for k, v in arrays.items() if k.startswith("model.") or k[-2:] in (".m", ".v")
    }
    assert dtypes == {mx.float32}
    assert single["losses"][-1] < single["losses"][0] - 0.5
    assert half["losses"] == pytest.approx(single["losses"], abs=0.05)
    assert half["losses"] != single["losses"]
    model = program.make_model(parse(command(corpus, None, *options, "--dtype", "bfloat16")))
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


@pytest.mark.parametrize("connection", ["mhc", "gated"])
def test_every_step_is_adamw_of_the_clipped_mean_at_two_rates(
    connection, corpus, tmp_path, uncompiled
):
    """NumPy finds the parameters and moments after five steps in float64, from MLX's gradient of
    the batch: rates, warm-up, cosine, decay of all parameters, clipping, accumulation, text."""

    def is_gate(name):
        matrices = {"phi", "down", "up", "inject"}
        return "connections" in name and not matrices & {*name.split("connections")[1].split(".")}

    lr, gates, clip, warmup, steps, share = 0.02, 4.0, 0.3, 2, 5, 6
    options = ["--connection", connection, "--batch", 2, "--accumulate", 3, "--steps", steps]
    options += ["--lr", lr, "--gates-rate", gates, "--clip", clip, "--warmup", warmup, "--seed", 5]
    result = train(corpus, tmp_path, *options, "--save-every", steps)
    got = load_checkpoint(tmp_path / "checkpoints")[1]

    mx.random.seed(5)
    model = program.make_model(parse(command(corpus, None, *options)))
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
            of = lr * rate * (gates if is_gate(k) else 1)
            weights[k] = (1 - of * 0.01) * weights[k] - of * first[k] / (np.sqrt(second[k]) + 1e-6)
    assert clipped == steps and any("connections" in k for k in weights)
    assert result["losses"] == pytest.approx(losses, rel=BOUND)
    for k, want in weights.items():
        moved = np.abs(want - start[k]).max()
        error = np.abs(np.array(got[f"model.{k}"]) - want).max()
        # Adam divides gradients by their size: those near its eps of 1e-6 keep fewer digits.
        assert moved > 0.01 and error < 1e-3 * moved, f"{k}: {error} of {moved}"
        which = 0 if is_gate(k) else 1
        for name, moments in (("m", first), ("v", second)):
            moment = np.array(got[f"optimizer.states.{which}.{k}.{name}"])
            assert np.abs(moment - moments[k]).max() < 1e-4 * np.abs(moments[k]).max(), (k, name)


def test_trains_on_the_text_but_its_tail(tmp_path, monkeypatch, uncompiled):
    """The last 32nd is for validation, and for that alone."""
    path, seen = tmp_path / "text", {"trained": [], "tested": []}
    path.write_bytes(b"ab" * 31 * 512 + b"yz" * 512)
    for module, name in ((training_step, "trained"), (program, "tested")):

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
    """It counts those of each part and of each process."""
    args = parse(command(corpus, None, "--batch", 4, "--accumulate", 3, "--log", tmp_path / "log"))
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 5)
    monkeypatch.setattr(mx.distributed, "init", lambda: group)
    run = program.Run(args, ExitStack())
    run.steps = lambda: iter([program.Step(1, 0.5, False, 2.0, 0.5, 1.0)])
    log = Log(tmp_path / "log", 0)
    program.follow(run, log)
    log.close()
    with open(tmp_path / "log", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["step"] == "1" and row["tokens_per_second"] == str(4 * 3 * 5 * 16 * 2)
    assert (row["bits_per_byte"], row["similarity"], row["gradient_norm"]) == ("2.0", "0.5", "1.0")


def test_figures_are_of_the_last_100_steps(capsys):
    """But times are a median of all steps."""
    run = SimpleNamespace(model=SimpleNamespace(streams=4), size=7, saved=0, say=print)
    seconds = [9.0] * 40 + [0.002] * 70 + [0.001] * 40
    done = [
        program.Step(k + 1, seconds[k], k == 149, 8.0 - k / 50, k / 150, 1.0) for k in range(150)
    ]
    result = program.summarise(run, done, 4.5, 12.0)
    assert result["bits_per_byte"] == pytest.approx(8 - 99.5 / 50)
    assert result["similarity"] == pytest.approx(99.5 / 150)
    assert result["ms_per_step"] == pytest.approx(2) and result["losses"] == [s.bits for s in done]
    assert result["finite"] and result["steps"] == 150 and result["validation"] == 4.5
    out = capsys.readouterr().out
    assert "bits per byte 6.010, similarity between streams 0.663 (mean of the last 100" in out
    assert "150 steps in 12 s, 2.0 ms per step" in out and "validation 4.500 bits" in out


def test_the_seed_decides_weights_and_order(corpus):
    def begun(*more):
        run = program.Run(parse(command(corpus, None, *more)), ExitStack())
        weights = dict(tree_flatten(run.model.parameters()))
        return run.windows.starts(0, 50).tolist(), weights["head.weight"], run.held_out

    order, weights, held_out = begun("--seed", 7)
    same, different = begun("--seed", 7), begun("--seed", 8)
    assert order == same[0] != different[0]
    assert mx.array_equal(weights, same[1]) and not mx.array_equal(weights, different[1])
    assert mx.array_equal(held_out, same[2]) and mx.array_equal(held_out, different[2])
    # The windows of a text are always the same, so that any two validations can be compared.
    text = corpus.read_bytes()
    tail = np.frombuffer(text[-(len(text) // 32) :], np.uint8)
    starts = np.array(Windows(len(tail), 16, 0).starts(0, 4))
    assert (np.array(held_out) == tail[starts[:, None] + np.arange(17)]).all()


def test_a_sample_goes_on_after_its_last_byte(monkeypatch):
    """It draws from sharpened logits of the last place; the model sees so many bytes."""
    seen, logits_seen, draw = [], [], mx.random.categorical

    def model(tokens):
        (found,) = tokens.tolist()
        seen.append(bytes(found))
        after = 100.0 * (mx.arange(256) == tokens[..., None] + 1)
        return after.astype(mx.bfloat16), None

    monkeypatch.setattr(mx.random, "categorical", lambda a: logits_seen.append(a) or draw(a))
    assert program.sample(model, b"abc", 4, 3) == "abcdefg"
    assert seen == [b"abc", b"bcd", b"cde", b"def"]
    for k, logits in enumerate(logits_seen):
        assert (logits.shape, logits.dtype) == ((256,), mx.float32)
        assert logits[ord("d") + k].item() == pytest.approx(100 / 0.7)


def test_the_default_text_is_the_standard_library(tmp_path, monkeypatch):
    """It has Python's files alone, in a fixed order, without what was installed, up to a limit."""
    for name in ("b.py", "a/c.py", "site-packages/d.py", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.stem * 6000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert program.read_corpus(None) == b"c" * 6000 + b"b" * 6000
    with pytest.raises(SystemExit, match="standard library must .* 10,000 bytes but has 6000"):
        program.read_corpus(None, limit=6000)


def test_rate_warms_up_and_falls_as_a_cosine():
    adam = make_optimizer(0.5, steps=100, warmup=10).optimizers[1]

    def rate(step):
        return adam._schedulers["learning_rate"](mx.array(step, mx.uint64)).item()

    assert [rate(k) for k in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])
    assert [rate(k) for k in (55, 100, 200)] == pytest.approx([0.275, 0.05, 0.05])
