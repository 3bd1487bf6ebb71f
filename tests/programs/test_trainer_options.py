"""The trainer refuses bad options before it begins; its command has help and an exit code."""

import ast
import importlib.util
import io
import runpy
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from examples.train_lm import train as program
from examples.train_lm.options import parse
from programs import processes, trainer
from programs.trainer import command, train

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus


def test_a_terminal_that_cannot_show_a_sample(corpus, tmp_path, monkeypatch, uncompiled):
    """It does not keep the run from its pictures."""
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    options = command(corpus, None, "--connection", "plain", "--steps", 1, "--plot", tmp_path)
    monkeypatch.setattr(sys, "argv", ["examples.train_lm", *options, "--sample", "50"])
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("examples.train_lm", run_name="__main__")
    terminal.seek(0)
    assert "\\ufffd" in terminal.read() and (tmp_path / "loss.png").exists()


def test_text_too_short_for_its_context_is_an_error(corpus):
    with pytest.raises(SystemExit, match="--context 8192 is too long for a text of 27"):
        train(corpus, None, "--context", 8192)


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
    """It is refused before anything is allocated."""
    for name in ("--batch", "--context", "--dim", "--depth", "--mlp"):
        with pytest.raises(SystemExit):
            parse([name, str(2**60)])
        assert f"{name}" in (found := capsys.readouterr().err) and "GiB but the device has" in found
    monkeypatch.setattr(program, "make_model", None)
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
    monkeypatch.setattr(program, "make_model", None)  # nothing is made before
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


WORDS = {  # help must say what each option takes
    "examples.train_lm": "--data FILE, --log FILE, --plot DIR, --checkpoint DIR, --mlp WIDTH, "
    "--validate-every STEPS, --save-every STEPS, --sample BYTES",
    "benchmarks.experiment": "--out DIR",
    "benchmarks.overhead": "--json FILE, --from FILE, --curves STEPS, --copy-gb-s GB/S",
}


@pytest.mark.parametrize("name", WORDS)
def test_runs_from_any_folder(name, tmp_path, monkeypatch):
    """It runs where the checkout is on Python's path; help has the examples as they are typed, and
    says what each option takes."""
    monkeypatch.chdir(tmp_path)
    code, printed = processes.run([sys.executable, "-m", name, "--help"], tmp_path / "printed.txt")
    assert code == 0 and printed.startswith(f"usage: python -m {name} "), printed
    main = importlib.util.find_spec(f"{name}.__main__" if name == "examples.train_lm" else name)
    doc = ast.get_docstring(ast.parse(Path(main.origin).read_text()), clean=False)
    assert doc.strip() in printed
    for words in WORDS[name].split(", "):
        assert f"  {words}" in printed, words


@pytest.mark.parametrize("lr, code", [("0.01", 0), ("1e30", 1)])
def test_exit_code_of_a_run(lr, code, corpus, monkeypatch, uncompiled):
    args = command(corpus, None, "--steps", 3, "--warmup", 0, "--lr", lr)
    monkeypatch.setattr(sys, "argv", ["examples.train_lm", *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("examples.train_lm", run_name="__main__")
    assert stopped.value.code == code
