"""benchmarks/experiment.py compares connections, and keeps what other programs wrote."""

import json
import math
import os

import mlx.core as mx
import pytest

from benchmarks import experiment
from programs import trainer
from programs.trainer import command, rows

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus


def test_widths_without_a_connection_that_cannot_be(monkeypatch, tmp_path):
    """There can be more streams than mhc-lite or kronecker can have, where nobody asks for them."""
    widths = {}
    monkeypatch.setattr(experiment, "run", lambda c, *rest: widths.update({c: rest[2]}))
    monkeypatch.setattr(experiment, "summarise", lambda out: None)
    sizes = ["--out", str(tmp_path), "--seeds", "0", "--dim", "8", "--depth", "1", "--heads", "2"]
    experiment.main([*sizes, "--streams", "8", "--connections", "mhc"])
    assert widths == {"mhc": 32}
    experiment.main([*sizes, "--connections", "mhc"])
    alone = widths.pop("mhc")
    experiment.main(sizes)
    assert widths.keys() == set(experiment.CONNECTIONS) and widths["mhc"] == alone > 32
    monkeypatch.setattr(experiment, "CONNECTIONS", ("plain", "kronecker", "mhc"))
    widths.clear()
    experiment.main([*sizes, "--streams", "6", "--connections", "mhc"])
    assert widths == {"mhc": 32}


def test_experiment(corpus, tmp_path, capsys, uncompiled):
    """Two connections train in two calls, as machines would share them."""
    options = command(corpus)
    for name in ("--connection", "--seconds", "--sample"):  # which are the program's to set
        del options[options.index(name) : options.index(name) + 2]
    for connection in ("plain", "identity"):
        run_options = ["--connections", connection, "--seeds", "0", "--steps", "3"]
        experiment.main(["--out", str(tmp_path), *options, *run_options])
    out = capsys.readouterr().out
    found = {
        r["connection"]: r for r in json.loads((tmp_path / "summary.json").read_text())["runs"]
    }
    assert found.keys() == {"plain", "identity"}
    sizes = [r["parameters"] for r in found.values()]
    assert found["plain"]["mlp"] > 32 and abs(sizes[0] / sizes[1] - 1) < 0.02, sizes
    for name, r in found.items():
        assert r["steps"] == len(rows(tmp_path / r["log"])) == 3 and r["forward_gain"] == 1
        assert f"| `{name}` | {r['parameters']:,} | {r['bits_per_byte']:.3f} |" in out
        assert r["device"] and r["mlx"] == mx.__version__ and r["date"] and r["command"]
        assert not {"losses", "report"} & r.keys()  # which the log and the run's own file have
    assert (tmp_path / "gains.png").stat().st_size > 1000


def record(connection, seed, **fields):
    """Return the record of a run, as experiment.py writes it."""
    found = {"connection": connection, "seed": seed, "parameters": 7, "steps": 3, "finite": True}
    found |= {"bits_per_byte": 2.0, "validation": 2.5, "similarity": None, "ms_per_step": 10.0}
    found |= {"peak_mib": 5.0, "report": None, "log": f"{connection}-seed{seed}.csv"}
    return found | {"device": "some GPU", "mlx": "1", "date": "2026-01-01"} | fields


def cells(text, name):
    """Return the row of a connection."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_means_are_over_runs_that_did_not_diverge(monkeypatch):
    """Bits are means, gains and times medians."""
    gains = {0: 1.0, 1: 2.0, 2: 9.0, 3: math.nan}
    monkeypatch.setattr(experiment, "gains", lambda run, way: gains[run["seed"]])
    values = [(1.0, 2.0, 10.0), (2.0, 2.5, 20.0), (6.0, 9.0, 60.0)]
    hc = [
        record("hc", k, bits_per_byte=b, validation=v, ms_per_step=ms, similarity=b / 10)
        for k, (b, v, ms) in enumerate(values)
    ]
    gone = {"finite": False, "bits_per_byte": math.nan, "validation": None, "similarity": 0.9}
    hc.append(record("hc", 3, **gone, ms_per_step=9e9, peak_mib=8.0))
    plain = [record("plain", 0, ms_per_step=5.0), record("plain", 3, finite=False, ms_per_step=9e9)]
    text = experiment.table({"plain": plain, "hc": hc, "mhc": hc[3:]})
    want = ["`hc` (1 of 4 diverged)", "7", "3.000 (1.000 to 6.000)", "4.500 (2.000 to 9.000)"]
    want += ["0.300 (0.100 to 0.600)", "2 (at most 9)", "2 (at most 9)", "20.0", "4.00", "8"]
    assert cells(text, "hc") == want
    assert cells(text, "plain")[7:9] == ["5.0", "1.00"]
    assert cells(text, "mhc") == ["`mhc` (1 of 1 diverged)", "7", *[""] * 7, "8"]


def test_files_of_a_diverged_run_are_json(tmp_path, monkeypatch):
    """NaN and infinity, which JSON has not, are null there."""
    figures = record("hc", 0, finite=False, bits_per_byte=math.nan, validation=math.inf, losses=[])
    monkeypatch.setattr(experiment, "train", lambda *_, **__: dict(figures))
    monkeypatch.setattr(experiment, "gains", lambda *_: math.inf)
    monkeypatch.setattr(experiment, "plot", lambda *_, **__: [])
    (tmp_path / "hc-seed0.csv").touch()
    experiment.run("hc", 0, [], 8, tmp_path)
    experiment.summarise(tmp_path)
    for name in ("hc-seed0.json", "summary.json"):
        found = json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        found = found.get("runs", [found])[0]
        assert found["bits_per_byte"] is None and found["validation"] is None
    assert found["forward_gain"] is None and found["steps"] == 3


def test_runs_are_not_written_over(corpus, tmp_path, monkeypatch):
    """Nor is what is not of this program; all is looked at before the first run."""
    monkeypatch.setattr(experiment, "train", None)
    sizes = ["--dim", "8", "--depth", "1", "--heads", "2", "--data", str(corpus)]
    names = ["mhc-seed1.json", "plain-seed1.csv", "summary.json", "gains.png", "loss.png"]
    for k, name in enumerate(names):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(SystemExit, match=f"--out: .* must be a new file.*{name}"):
            experiment.main(["--out", str(folder), *sizes, "--connections", "plain", "mhc"])
        assert os.listdir(folder) == [name] and (folder / name).read_text() == "{}"
    with pytest.raises(SystemExit, match="summary.json must be .* an earlier one .* has no runs"):
        experiment.main(["--out", str(tmp_path / "2"), "--summary"])


def test_options_of_experiment_that_do_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "run", None)
    cases = {f"{o} 1": f"{o} is this program's to set" for o in ("--seed", "--mlp", "--sample")}
    cases |= {f"{o} x": f"{o} is this program's" for o in ("--log", "--plot", "--checkpoint")}
    cases |= {
        "--resume": "--resume is this program's",
        "--seconds 9": "--seconds is this program's",
    }
    cases |= {"--connection mhc": "--connection is this program's"}
    cases |= {"--seeds 1 1": "--seeds must differ", "--connections mhc mhc": "--connections must d"}
    cases |= {"--connections none": "invalid choice: 'none'", "--seeds -1": "--seed must be from 0"}
    cases |= {"--summary --seeds 1": "it must go without --seeds", "--out=": "--out must be a path"}
    cases |= {"--summary --dim 8": "it must go without --dim 8", "--sum": "unrecognized arguments"}
    cases |= {
        "--save-every 5": "--save-every needs --checkpoint",
        "--dim 0": "--dim must be positi",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit):
            experiment.main(["--out", str(tmp_path / "new"), *options.split()])
        assert message in capsys.readouterr().err.rpartition("error:")[2], options
    assert not list(tmp_path.glob("new/*"))


def test_no_metal_is_for_connections_with_kernels(tmp_path):
    names = experiment.equal_widths(["--dim", "8", "--heads", "2", "--no-metal"], ["plain", "mhc"])
    assert names["plain"] > names["mhc"] == 32
    for connection in ("plain", "mhc"):
        command = experiment.command_of(connection, 3, ["--no-metal"], 40, tmp_path)
        args = experiment.options.parse(command)
        assert args.no_metal == (connection == "mhc")
        assert (args.seed, args.mlp, args.sample, args.seconds) == (3, 40, 0, 1e9)
        assert args.log == str(tmp_path / f"{connection}-seed3.csv")


def test_malformed_runs_are_one_error(tmp_path, capsys):
    path = tmp_path / "plain-seed0.json"
    (tmp_path / "plain-seed0.csv").write_text("step,bits_per_byte\n1,2\n")
    good = record("plain", 0)
    for text in (
        *("", "{", "[]", "7", "null", "{}", "[" * 100_000),
        *(json.dumps({k: v for k, v in good.items() if k != name}) for name in good),
        *(json.dumps(good | {k: []}) for k in good),
        json.dumps(good | {"report": {"connections": [{}], "loss": 1}}),
        json.dumps(good | {"report": {"connections": [], "loss": 1}}),  # which has no gains
        json.dumps(good | {"report": {}}),
        json.dumps(good | {"log": "missing.csv"}),
        json.dumps(good | {"seed": 1}),  # a copy would count twice
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=f"{path} must be a run's record but is not"):
            experiment.main(["--out", str(tmp_path), "--summary"])
    path.write_text(json.dumps(good))
    (tmp_path / "plain-seed0.csv").write_text("no log\n")
    with pytest.raises(SystemExit, match="cannot draw the logs"):
        experiment.main(["--out", str(tmp_path), "--summary"])
    path.unlink()
    with pytest.raises(SystemExit, match="has none"):
        experiment.main(["--out", str(tmp_path), "--summary"])


def test_defaults_of_the_trainer_and_of_benchmarks():
    """This is what a run without options does."""
    from benchmarks import cases, options

    want = {"seconds": 120, "steps": 10000, "connection": "static", "streams": 4, "dim": 64}
    want |= {"depth": 2, "heads": 4, "context": 64, "batch": 8, "accumulate": 1, "lr": 3e-3}
    want |= {"gates_rate": 10, "warmup": 300, "clip": 1.0, "dtype": "float32", "seed": 0}
    want |= {"validate_every": 250, "sample": 200, "save_every": 500}
    want |= dict.fromkeys(("recompute", "no_metal", "resume"), False)
    want |= dict.fromkeys(("data", "mlp", "validation_batch", "log", "plot", "checkpoint"))
    assert vars(experiment.options.trainer_parser().parse_args([])) == want
    flags = ("sizes", "decode", "overhead", "all", "sweep", "verify", "once", "quick", "model")
    valued = ("op", "shape", "dtype", "direction", "preset", "threads", "baseline", "processes")
    valued += ("json", "plot", "compare", "source", "peak_gbps", "device")
    found = vars(options.parser("", cases.PRESETS).parse_args([]))
    assert found == dict.fromkeys(flags, False) | dict.fromkeys(valued)
