"""`python -m mhc_mlx.models` checks its options, and times sites and models."""

import json
import math
import sys
import types

import mlx.core as mx
import pytest

from programs.figures import refused

REPORT = {"command": "python -m mhc_mlx.models --sites 64", "device": "d", "mlx": "1", "date": "d"}
REPORT |= {"mlx-lm": "1", "backend": "b"}


@pytest.fixture
def command(monkeypatch):
    """Return the module of the command, in which nothing may run."""
    mlx_lm = pytest.importorskip("mlx_lm")
    from mhc_mlx.models import __main__ as command

    for name in ("bench", "bench_sites", "check", "patch", "_random_model"):
        monkeypatch.setattr(command, name, None)
    monkeypatch.setattr(mlx_lm, "load", None)
    return command


def test_options_of_the_models_command(tmp_path, capsys, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "memory", lambda: 4 << 30)
    files = {
        **{"bad.json": "{", "other.json": json.dumps(REPORT | {"command": "python b.py"})},
        **{"list.json": "[]", "letter": "a letter", "lacks.json": json.dumps({"command": "x"})},
        **{"nan.json": '{"command": NaN}', "good.json": json.dumps(REPORT)},
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name, text in {"llama": '{"model_type": "llama"}', "list": "[]", "bad": "{"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "hollow").mkdir()
    for options, message in {
        "--sites=": "--sites must be positive numbers with commas between but is ''",
        "--random=": "--random must be positive numbers with commas between but is ''",
        "--model=": "--model must be a folder or a name but is empty",
        "--sites 64 --tokens=": "--tokens must be positive numbers",
        "--sites 64,64": "--sites must be numbers that differ but is '64,64'",
        "--sites 64 --tokens 8,8": "--tokens must be numbers that differ but is '8,8'",
        "--sites 64 --tokens 99999999999": "--tokens must fit in the device's memory but 9999999",
        "--sites 64 --tokens " + "9" * 5000: "--tokens must be positive numbers",
        "--sites 64,99999999": "--tokens must fit in the device's memory but 2048 of d = 99999999",
        "--random 64 --tokens 9999999": "--tokens must fit in the device's memory",
        "--model letter": "--model must be a folder or a name but is letter",
        "--model ./nowhere": "--model must be a folder that exists but is ./nowhere",
        "--model hollow": "--model must be a model's folder: its config.json must be a file but",
        "--model bad": "--model must be a model's folder: its config.json must be a file of JSON",
        "--model list": "but list is None",
        "--model llama": "but llama is llama",
        "--sites 64 --chain 2": "--chain must be one number of at least 3 but is '2'",
        "--sites 64 --chain 3,4": "--chain must be one number of at least 3 but is '3,4'",
        "--random 64 --chain 3": "--chain goes with --sites alone",
        "--sites 64 --kind deepseek_v41": "--kind goes with --random alone",
        "--random 64 --kind hy_v4": "--kind must be one of deepseek_v41 but is 'hy_v4'",
        "--random 48": "--random must have D a multiple of 32 but has 48",
        "--sites 64 --no-verify": "they go not with --sites",
        "--tokens 8": "one of the arguments --model --random --sites is required",
        "--model good --random 64": "--random: not allowed with argument --model",
        "--random 64 --sites 64": "--sites: not allowed with argument --random",
        "--random 64 --check --bench": "--bench: not allowed with argument --check",
        "--sites 64 --json=": "--json must be a file but is empty",
        "--sites 64 --json .": "--json must be a file but is the folder .",
        "--sites 64 --json nowhere/a": "--json must be in a folder that exists but is nowhere/a",
        "--sites 64 --json letter": "--json must be a file of JSON but is letter",
        "--sites 64 --json bad.json": "--json must be a file of JSON but is bad.json",
        "--sites 64 --json nan.json": "it holds NaN, which is no number",
        "--sites 64 --json list.json": "it holds list, not an object",
        "--sites 64 --json lacks.json": "its device is missing",
        "--sites 64 --json other.json": "its command is python b.py",
    }.items():
        error = refused(command.main, options.split(), capsys)
        assert message in error and "\n" not in error, (options, error)
    assert all((tmp_path / name).read_text() == text for name, text in files.items())

    def load(path):
        raise FileNotFoundError("no such repository")

    monkeypatch.setattr(sys.modules["mlx_lm"], "load", load)
    error = refused(command.main, ["--model", "some/name"], capsys)
    assert error == "--model must be what mlx-lm loads but is some/name: no such repository"


def test_parts_are_written_as_they_are_measured(tmp_path, command, monkeypatch, capsys):
    """What failed parity fails the command; an exception loses no part before it."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps(REPORT))

    def bench_sites(d, tokens, family, count, bits):
        assert (family, count) == ("lm_deepseek_v41", None)
        if d == 96:
            raise KeyboardInterrupt
        if d == 64:  # the part before is there: a kill loses nothing
            assert len(json.loads(file.read_text())["per sublayer"]) == 1
        return {"d": d, "tokens": tokens, "ok": d != 64, "times": []}

    monkeypatch.setattr(command, "bench_sites", bench_sites)
    argv = ["--sites", "32,64", "--tokens", "3", "--json", str(file)]
    with pytest.raises(SystemExit, match="^parity fails: d = 64$"):
        command.main(argv)
    written = json.loads(file.read_text())
    parts = [(part["d"], part["tokens"]) for part in written["per sublayer"]]
    assert parts == [(32, [3]), (64, [3])]
    assert written["command"] == f"python -m mhc_mlx.models {' '.join(argv)}"
    with pytest.raises(KeyboardInterrupt):
        command.main(["--sites", "32,96", "--json", str(file)])
    assert [part["d"] for part in json.loads(file.read_text())["per sublayer"]] == [32]
    before = file.read_text()
    with pytest.raises(KeyboardInterrupt):
        command.main(["--sites", "96,32", "--json", str(file)])
    assert file.read_text() == before, "a report without a measurement replaces one with some"
    report = command.main(["--sites", "32,128"])
    assert [part["d"] for part in report["per sublayer"]] == [32, 128]
    assert report["per sublayer"][0]["tokens"] == (1, 8, 512, 2048)

    patched, model = [], object()
    monkeypatch.setattr(command, "_random_model", lambda of, kind, d, layers: (d, layers, model))
    monkeypatch.setattr(
        command, "patch", lambda *given, **options: patched.append((given, options))
    )
    monkeypatch.setattr(
        command, "check", lambda model, p, times: {"check of": model, "times": times}
    )
    monkeypatch.setattr(command, "bench", lambda model, lengths: {"bench of": model, "l": lengths})
    report = command.main(["--random", "64"])
    of_patch = {"verify": True, "rounding": "stock"}
    assert patched.pop() == (((64, 3, model),), of_patch)
    assert report["check"] == {"check of": (64, 3, model), "times": (1, 512)}
    assert report["bench"] == {"bench of": (64, 3, model), "l": (512, 2048)}
    options = ["--bench", "--no-verify", "--rounding", "once", "--tokens", "7"]
    report = command.main(["--random", "64,2", *options])
    of_patch = {"verify": False, "rounding": "once"}
    assert patched.pop() == (((64, 2, model),), of_patch) and "check" not in report
    assert report["bench"]["l"] == (7,)
    report = command.main(["--random", "64,2", "--check", "--tokens", "7"])
    assert report["check"]["times"] == (7,) and "bench" not in report


@pytest.fixture
def times(monkeypatch):
    pytest.importorskip("mlx_lm")
    from mhc_mlx.models import times

    times.named("test", "lm_deepseek_v41")  # its package compiles functions when it is imported
    monkeypatch.setattr(mx, "compile", lambda f: f)
    times._compiled_stock.cache_clear()
    yield times
    times._compiled_stock.cache_clear()


def clocked(times, monkeypatch):
    """Return a list whose first number is the time."""
    now = [0.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(times, "time", fake)
    return now


def test_seconds(times, monkeypatch):
    """The median leaves out the two calls of warm-up; what is fast is called more often."""
    now = clocked(times, monkeypatch)
    rounds = ([100.0, 100.0, 9.0, 8.0, 2.0, 3.0, 4.0], 4.0, 7), ([2e-3], 2e-3, 27)
    for durations, want, count in rounds:
        calls = []

        def run(durations=durations, calls=calls):
            calls.append(1)
            now[0] += durations[min(len(calls), len(durations)) - 1]
            return mx.zeros(1)

        assert times._seconds(run) == pytest.approx(want) and abs(len(calls) - count) <= 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_times_of_sites(dtype, times, monkeypatch):
    """Each chain runs every site once, by its own function, of as many tokens; a time is per
    site."""
    from mhc_mlx.models import run
    from mhc_mlx.models.families import lm_deepseek_v41 as family

    sites, seen, chains = times.random_sites(32, 5, family.FAMILY), [], []
    for module, name in ((run, "single_pass"), (family, "stock_site")):
        usual = getattr(module, name)

        def counted(*given, name=name, usual=usual):
            x = given[-3]
            seen.append((name, x.shape, x.dtype))
            return usual(*given)

        monkeypatch.setattr(module, name, counted)

    def seconds(run):
        seen.clear()
        out, *_ = run()
        mx.eval(out)
        assert (out.shape, out.dtype) == seen[0][1:]
        chains.append(list(seen))
        return 10.0 * len(chains)

    monkeypatch.setattr(times, "_seconds", seconds)
    found = times.site_times([*sites[:4], sites[4]._replace(norm=None)], dtype, 3)
    assert found == {"tokens": 3, "patched": 2.5, "mlx-lm": 5.0, "mlx-lm, compiled": 7.5}
    shape = ((1, 3, 4, 32), dtype)
    assert chains == [[("single_pass", *shape)] * 4, *[[("stock_site", *shape)] * 4] * 2]
    assert times.site_times(sites[4:], mx.float32, 1)["tokens"] == 1  # one, as of a single layer
    line = {"tokens": 2, "patched": 1e-6, "mlx-lm": 2e-6, "mlx-lm, compiled": 3e-6}
    line = times.time_line(line, "mlx-lm")
    assert line == "    2 tokens: 1 us per sublayer, mlx-lm 2 us (2.0 x), compiled 3 us (3.0 x)"


def test_sites_that_fail_are_not_timed(times, monkeypatch):
    """This holds at any number of tokens that is timed, and for infinite errors of both."""
    monkeypatch.setattr(times, "_peak", lambda run: 1 << 20)
    timed = []
    monkeypatch.setattr(times, "_seconds", lambda run: timed.append(1) or 1e-6)
    from mhc_mlx.models import exact

    right = times.site_errors
    report = times.bench_sites(32, (1, 6), count=3)
    assert report["ok"] and len(report["times"]) == 2 and len(timed) == 6
    for wrong in (1, 6):
        for errors in ((5.0, 2.5), (math.inf, math.inf)):

            def failing(site, options, x, y, repeats=1, wrong=wrong, errors=errors):
                tokens = x.shape[1] * repeats
                if tokens == wrong:
                    return [exact.Errors(u=e) for e in errors]
                return right(site, options, x, y, repeats)

            monkeypatch.setattr(times, "site_errors", failing)
            report = times.bench_sites(32, (1, 6), count=3)
            assert not report["ok"] and report["times"] == [] and len(timed) == 6


def test_bench_times_both_models(times, monkeypatch, capsys):
    """It counts tokens a second of the patched model, then of mlx-lm's: prompts of each length go
    through an empty cache, and only the tokens after the warm-up count."""
    from models.tiny_deepseek import tiny

    from mhc_mlx import models as adapter
    from mhc_mlx.models.families import lm_deepseek_v41 as family

    model, now, prompts = tiny(layers=2), clocked(times, monkeypatch), []
    adapter.patch(model, verify=False)
    kinds = lambda: isinstance(model.layers[0], family.SinglePassLayer)  # noqa: E731
    usual = type(model).__call__

    def call(self, tokens, cache):
        offset = max(c.offset for c in cache if hasattr(c, "offset"))
        prompts.append((kinds(), tokens.shape, offset))
        return usual(self, tokens, cache)

    def seconds(run):
        mx.eval(run())
        return 0.5 if kinds() else 2.0

    def generate_step(prompt, generated_by, max_tokens):
        assert generated_by is model and prompt.shape == (4,)
        for k in range(max_tokens):  # the first tokens are slow
            now[0] += (100.0 if k < 4 else 0.25) * (1 if kinds() else 2)
            yield k, None

    monkeypatch.setattr(type(model), "__call__", call)
    monkeypatch.setattr(times, "_seconds", seconds)
    monkeypatch.setattr(family, "generate_step", generate_step)
    report = times.bench(model, (4, 6), steps=8)
    assert report["patched"] == {"prefill": {"4": 8.0, "6": 12.0}, "decode": 4.0}
    assert report["mlx-lm"] == {"prefill": {"4": 2.0, "6": 3.0}, "decode": 2.0}
    assert prompts == [(kind, (1, n), 0) for kind in (True, False) for n in (4, 6)]
    assert kinds(), "the model is left patched"
    assert "prefill 6: 12 tokens/s, mlx-lm 3 (4.00 x)" in (printed := capsys.readouterr().out)
    assert "decode: 4.0 tokens/s, mlx-lm 2.0 (2.00 x)" in printed
