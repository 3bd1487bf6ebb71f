"""examples/experiment.py and overhead.py: what they compare, and what their tables say."""

import json

import mlx.core as mx
import pytest
import trainer  # which finds examples/
from trainer import command, rows

# isort: split
import experiment
import overhead

on_the_cpu, uncompiled, corpus = trainer.on_the_cpu, trainer.uncompiled, trainer.corpus


def test_widths_without_a_connection_that_cannot_be(monkeypatch, tmp_path):
    """More streams than mhc-lite or kronecker can have, where they are not asked for."""
    made = {}
    monkeypatch.setattr(
        experiment, "run", lambda c, seed, command, width, out: made.update({c: width})
    )
    monkeypatch.setattr(experiment, "summarise", lambda out: None)
    sizes = ["--out", str(tmp_path), "--seeds", "0", "--dim", "8", "--depth", "1", "--heads", "2"]
    experiment.main([*sizes, "--streams", "8", "--connections", "mhc"])
    assert made == {"mhc": 32}
    experiment.main([*sizes, "--connections", "mhc"])
    alone = made.pop("mhc")
    experiment.main(sizes)
    assert made.keys() == set(experiment.CONNECTIONS) and made["mhc"] == alone > 32
    monkeypatch.setattr(experiment, "CONNECTIONS", ("plain", "kronecker", "mhc"))
    made.clear()
    experiment.main([*sizes, "--streams", "6", "--connections", "mhc"])
    assert made == {"mhc": 32}


def test_experiment(corpus, tmp_path, capsys, uncompiled):
    """Two connections in two calls, as machines would share them."""
    options = command(corpus)
    for name in ("--connection", "--seconds", "--sample"):  # which are the program's to set
        del options[options.index(name) : options.index(name) + 2]
    for connection in ("plain", "identity"):
        own = ["--connections", connection, "--seeds", "0", "--steps", "3"]
        experiment.main(["--out", str(tmp_path), *options, *own])
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
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_overhead(tmp_path, capsys, uncompiled):
    file = tmp_path / "overhead.json"
    sizes = ["--dims", "8", "--depth", "1", "--tokens", "32", "--context", "16", "--copy-mib", "1"]
    overhead.main([*sizes, "--dtype", "float32", "--steps", "1", "--json", str(file)])
    record = json.loads(file.read_text())
    (result,) = record["results"]
    # 41 rows of 8 float32 for 32 tokens in 2 sublayers
    floor = 41 * 2 * 8 * 32 * 4 / record["copy_gb_s"] / 1e6
    assert result["floor_ms"] == pytest.approx(floor)
    added_fused = result["fused"]["added_ms"]
    for kind in ("fused", "reference"):
        added = result[kind]["ms"] - result["plain"]["ms"]
        assert result[kind]["added_ms"] == pytest.approx(added)
        assert result[kind]["x_floor"] == pytest.approx(added / floor)
    assert (
        result["fused"]["losses"] == result["reference"]["losses"][: len(result["fused"]["losses"])]
    )
    out = capsys.readouterr().out
    assert "both the reference on the CPU" in out and "| 8 | fused |" in out
    assert "dim 8: the losses of 4 steps" in out and "by at most 0.0e+00 bits" in out
    apart = json.loads(file.read_text())
    apart["results"][0]["reference"]["losses"][1] += 0.25
    (tmp_path / "apart.json").write_text(json.dumps(apart))
    overhead.main(["--from", str(tmp_path / "apart.json")])
    assert "by at most 2.5e-01 bits per byte" in capsys.readouterr().out
    table = next(line for line in out.splitlines() if line.startswith("| 8 | fused |"))
    overhead.main(["--from", str(file)])
    assert table in capsys.readouterr().out
    overhead.main(["--from", str(file), "--copy-gb-s", str(record["copy_gb_s"] / 2)])
    halved = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 | fused |")
    )
    assert halved.split("|")[7].strip() == f"{added_fused / floor / 2:.2f}"


def test_overhead_in_any_order(capsys, uncompiled):
    sizes = ["--dims", "8", "--depth", "1", "--tokens", "32", "--context", "16", "--copy-mib", "1"]
    overhead.main([*sizes, "--dtype", "float32", "--steps", "1", "--kinds", "fused", "plain"])
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 |")]
    assert [line.split("|")[2].strip() for line in found] == ["plain", "fused"]
    assert " ms |" in found[1]


@pytest.mark.parametrize(
    "options",
    [
        *(["--steps", "0"], ["--context", "0"], ["--copy-mib", "0"], ["--tokens", "0"]),
        *(["--depth", "0"], ["--dims", "0"], ["--dims", "7"], ["--dims", "200"]),
        *(["--curves", "-1"], ["--context", str(2**20)]),
        *(["--copy-gb-s", "0", "--from", "FILE"], ["--copy-gb-s", "nan", "--from", "FILE"]),
        *(["--copy-gb-s", "0"], ["--from", "missing"], ["--from", "FILE"], ["--from", "."]),
        *(["--json", "missing/overhead.json"], ["--json", "."]),
    ],
    ids=lambda o: " ".join(o),
)
def test_bad_options_of_overhead_are_named(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overhead, "copy_bandwidth", None)  # nothing is measured before
    (tmp_path / "FILE").write_text('{"copy_gb_s": 1, "results": []}')  # no device
    with pytest.raises(SystemExit):
        overhead.main(options)
    found = capsys.readouterr().err.rpartition("error:")[2]
    assert found.strip().startswith(options[0]) and options[1] in found
