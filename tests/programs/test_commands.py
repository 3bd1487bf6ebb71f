"""What commands do with their options and files: benchmark.py, and `python -m mhc_mlx.mlx_lm`."""

import json
import math
import os
import types

import mlx.core as mx
import pytest

import benchmark
from benchmarks import options as benchmark_options
from benchmarks.results import check_figures, check_result
from mhc_mlx import launch
from mhc_mlx.commands import Output
from programs.test_benchmark import RESULT, figure


def anything(data) -> None:
    """A check of JSON that lets all pass."""


def refused(main, argv, capsys) -> str:
    """What a command says that ends before it measures: one line after its usage."""
    with pytest.raises(SystemExit) as found:
        main(argv)
    assert found.value.code == 2, argv
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err[captured.err.index("error: ") + 7 :].strip()


@pytest.fixture
def gpu(monkeypatch):
    """Options are checked as if there were kernels; nothing may run."""
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    monkeypatch.setattr(benchmark, "measure", None)
    monkeypatch.setattr(benchmark, "repeat", None)


# ---- what is written


def test_output_replaces_a_file_and_nothing_else(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to("a.json")
    output = Output(str(link), "a report", anything)
    assert not file.exists(), "an output is checked without leaving a file"
    output.update({"k": 1})
    assert json.loads(file.read_text()) == {"k": 1} and link.is_symlink()
    os.chmod(file, 0o640)
    assert output.finish({"k": [math.inf, math.nan, -math.inf, 2.5]}) is None
    assert json.loads(file.read_text())["k"] == ["inf", "nan", "-inf", 2.5]
    assert file.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link.json"]
    Output(str(file), "a report", anything)
    (tmp_path / "empty.json").touch()
    Output(str(tmp_path / "empty.json"), "a report", anything)
    late = Output(str(tmp_path / "late.json"), "a report", anything)
    (tmp_path / "late.json").mkdir()  # while something is measured
    late.update({"k": 1})
    assert "late.json cannot be written: " in late.finish({"k": 1})
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["a.json", "empty.json", "late.json", "link.json"], "a half-written file is left"


def test_output_refuses(tmp_path):
    (tmp_path / "text").write_text("a letter")
    (tmp_path / "other.json").write_text("[3]")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "astray").symlink_to("nowhere/a.json")
    os.mkfifo(tmp_path / "pipe")

    def check(data):
        raise ValueError("it is another's")

    bad = {
        "": "must be a file but is empty",
        str(tmp_path): "must be a file but is the folder",
        f"{tmp_path}/nowhere/a.json": "must be in a folder that exists but is",
        f"{tmp_path}/astray": "must be in a folder that exists but is",
        f"{tmp_path}/loop": "must be a file that can be written but is",
        f"{tmp_path}/text": "must be a file of JSON but is",
        f"{tmp_path}/other.json": "must be a new file or a report but is .*: it is another's",
        f"{tmp_path}/text/a.json": "must be in a folder that exists but is",
        f"{tmp_path}/{'a' * 300}": "must be a file that can be written but is",
    }
    if os.path.exists("/dev/full"):
        bad["/dev/full"] = "must be a file that can be written but is /dev/full: .*No space"
    for file, message in bad.items():
        with pytest.raises(ValueError, match=message):
            Output(file, "a report", check)
    assert (tmp_path / "text").read_text() == "a letter"
    assert (tmp_path / "other.json").read_text() == "[3]"
    Output(str(tmp_path / "pipe"), "a report", check)  # is written through


def test_a_character_device_stays_one():
    output = Output("/dev/null", "a report", anything)
    output.update({"k": 1})
    assert output.finish({"k": 1}) is None and not os.path.isfile("/dev/null")


def test_what_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    """The folder goes away while something is measured: a line at once, JSON at the end, and an
    exit code; and an exception keeps what was measured."""
    folder = tmp_path / "gone"
    argv = ["--verify", "--op", "stream_aggregate", "--op", "mhc_head", "--shape", "2,2,2"]
    calls = []

    def error(*case, **options):
        calls.append(case)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        monkeypatch.setattr(benchmark, "worst_error", lambda *case, **options: 0.25e-9)
        return 0.5e-9

    monkeypatch.setattr(benchmark, "worst_error", error)
    folder.mkdir()
    with pytest.raises(SystemExit, match="cannot be written: .*its JSON is printed instead"):
        benchmark.main([*argv, "--json", str(folder / "a.json")])
    printed = capsys.readouterr()
    assert printed.err.count("cannot be written now") == 1
    result = json.loads(printed.out[printed.out.index("{\n") :])
    assert [row["error"] for row in result["verified"]] == [0.25e-9, 0.5e-9] or [
        row["error"] for row in result["verified"]
    ] == [0.5e-9, 0.25e-9]

    def broken(*case, **options):
        raise KeyboardInterrupt

    def once(*case, **options):
        monkeypatch.setattr(benchmark, "worst_error", broken)
        return 0.5e-9

    monkeypatch.setattr(benchmark, "worst_error", once)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*argv, "--json", str(tmp_path / "b.json")])
    assert len(json.loads((tmp_path / "b.json").read_text())["verified"]) == 1


# ---- what is read


def without(key):
    return {k: v for k, v in RESULT.items() if k != key}


ROW = figure()
BAD_RESULTS = [
    ("{", "must be a file of JSON"),
    ("", "must be a file of JSON"),
    ("[" * 100_000, "must be a file of JSON"),
    (b"\xff\xfe{}", "must be a file of JSON"),
    ('{"device": NaN}', "it holds NaN, which is no number"),
    ([], "it holds list, not an object"),
    (None, "it holds NoneType"),
    ({}, "its device is missing"),
    (RESULT | {"device": 3}, "its device is no string"),
    (without("rows"), "its rows is missing"),
    (without("verified"), "its verified is missing"),
    (RESULT | {"rows": {}}, "its rows is no list"),
    (RESULT | {"decode": None}, "its decode is no list"),
    (RESULT, "it has no figures"),
    (RESULT | {"rows": [3]}, "its rows has 3, which is no row"),
    (RESULT | {"rows": [ROW, ROW]}, "twice"),
    (RESULT | {"rows": [{k: v for k, v in ROW.items() if k != "us"}]}, "us is missing in a row"),
    *(
        (RESULT | {"rows": [ROW | {key: value}]}, f"{key} is {value!r} in a row of its rows")
        for key, values in {
            "us": ["3", None, 0, -1.0, True, [1.0]],
            "spread": [-0.1, None],
            "percent_of_copy": [None, "a", 0],
            "gbps": [-1],
            "op": [3, None],
            "direction": ["up", []],
            "dtype": ["float64", []],
            "shape": [[1, 2], [1, 2, 0], "1,2,3", [1.0, 2, 3], [True, 2, 3]],
            "threads_per_group": ["64"],
            "speedup_vs_compiled": ["fast", 0],
            "vec": ["4"],
        }.items()
        for value in values
    ),
]


def test_malformed_results(tmp_path, capsys, gpu):
    """Of --compare and --from, and of what --json would replace: before anything runs."""
    good = tmp_path / "good.json"
    good.write_text(json.dumps(RESULT | {"rows": [ROW]}))
    for k, (data, message) in enumerate(BAD_RESULTS):
        file = tmp_path / f"{k}.json"
        text = data if isinstance(data, (str, bytes)) else json.dumps(data)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        commands_with_file = [
            ["--quick", "--compare", str(file)],
            ["--from", str(file), "--compare", str(good)],
            ["--from", str(good), "--compare", str(file)],
            ["--from", str(file), "--predict"],
            ["--from", str(file), "--plot", str(tmp_path / "a.png")],
        ]
        if data != "" and data is not RESULT:  # an empty file and one without figures are replaced
            commands_with_file.append(["--quick", "--json", str(file)])
        for argv in commands_with_file:
            error = refused(benchmark.main, argv, capsys)
            assert message in error, (argv, data, error)
            assert "\n" not in error
        assert file.read_bytes() == (text if isinstance(text, bytes) else text.encode())
    for data in (RESULT | {"rows": [ROW]}, RESULT | {"decode": [ROW | {"spread": 0}]}):
        check_figures(data)
    check_result(RESULT)


def test_numbers_without_end(tmp_path, capsys, gpu):
    file = tmp_path / "a.json"
    for number in ("1e999", "-1e999", "9" * 400, "9" * 5000):
        file.write_text(json.dumps(RESULT | {"rows": [ROW | {"us": 7654321}]}))
        file.write_text(file.read_text().replace("7654321", number))
        refused(benchmark.main, ["--compare", str(file)], capsys)


# ---- options of benchmark.py


REFUSED = {
    "--process 2": "unrecognized arguments: --process 2",  # its children would take it too
    "--processes 0": "--processes must be at least 1 but is 0",
    "--processes -3": "--processes must be at least 1 but is -3",
    "--threads 0": "--threads must be a multiple of 32 from 32 to 1024 but is 0",
    "--threads -32": "but is -32",
    "--threads 33": "but is 33",
    "--threads 2048": "but is 2048",
    "--verify --threads 0": "but is 0",
    "--peak-gbps 0": "--peak-gbps must be positive and finite but is 0.0",
    "--peak-gbps nan": "but is nan",
    "--peak-gbps -1": "but is -1.0",
    "--op mhc_pre --op mhc_pre": "--op mhc_pre must be given once",
    "--shape 1,2,3 --shape 1,2,3": "--shape 1,2,3 must be given once",
    "--dtype float32 --dtype float32": "--dtype float32 must be given once",
    "--op sinkhorn_knopp --shape 1,2,3": "--shape must be B,n,n for sinkhorn_knopp but is 1,2,3",
    "--op sinkhorn_knopp --shape 1,2,3 --verify": "must be B,n,n for sinkhorn_knopp",
    "--op sinkhorn_knopp --op mhc_pre --shape 1,2,3": "must be B,n,n for sinkhorn_knopp",
    "--op mhc_head --preset seeds": "--op mhc_head does nothing with --preset seeds",
    "--op mhc_head --decode": "--op mhc_head does nothing with --decode",
    "--op sinkhorn_knopp --sizes": "--op sinkhorn_knopp does nothing with --sizes",
    "--op mhc_pre --direction backward": "--direction must be forward+backward for an op whose",
    "--preset seeds --shape 1,2,3": "--preset does nothing with --shape",
    "--sweep": "--sweep must come with --op",
    "--shape 9999999,64,64": "--shape must have fewer than 2**31 elements",
    "--shape 1,65,8": "--shape must have n at most 64",
    "--op mhc_pre --shape 60000,4,4096": "GiB for mhc_pre in bfloat16, and this device has 4.0 GiB",
    "--from a.json": "--from must come with --compare, --plot or --predict",
    "--predict --compare a.json": "--predict must come with --from",
    "--predict --plot a.png": "--predict must come with --from",
    "--compare nowhere.json": "--compare must be a file but is nowhere.json",
    "--from nowhere.json --predict": "--from must be a file but is nowhere.json",
    "--json nowhere/a.json": "--json must be in a folder that exists but is nowhere/a.json",
    "--json=": "--json must be a file but is empty",
    "--compare=": "--compare must be a file but is empty",
    "--from= --predict": "--from must be a file but is empty",
    "--plot=": "--plot must be a .png, .pdf or .svg but is empty",
    "--plot a.xyz": "--plot must be a .png, .pdf or .svg but is a.xyz",
    "--plot nowhere/a.png": "--plot must be in a folder that exists but is nowhere/a.png",
    "--compare .": "--compare must be a file but is .",
    "--decode --plot a.png": "--plot does nothing with --decode",
    "--decode --shape 1,2,3": "--shape does nothing with --decode",
    "--decode --direction forward": "--direction does nothing with --decode",
    "--sizes --decode --threads 64": "--threads does nothing with --decode",
    "--overhead --op mhc_pre": "--op does nothing with --overhead",
    "--overhead --baseline": "--baseline does nothing with --overhead",
    "--decode --no-baseline": "--baseline does nothing with --decode",
    "--all --shape 1,2,3": "--shape does nothing with --sizes",
    "--all --sizes": "--sizes does nothing with --all",
    "--sizes --preset seeds": "--preset does nothing with --sizes",
    "--sizes --shape 1,2,3": "--shape does nothing with --sizes",
    **{
        f"--{a} {b}": f"{b.partition('=')[0].replace('no-', '')} does nothing with --{a.split()[0]}"
        for a, others in {
            "once": "--quick --json=a --processes=2 --plot=a.png --compare=a --baseline --all "
            "--no-baseline --decode --sizes --overhead --peak-gbps=3",
            "verify": "--quick --processes=2 --plot=a.png --compare=a --baseline --peak-gbps=3",
            "sweep --op mhc_pre": "--direction=forward --threads=64 --baseline --all --decode",
            "from a.json": "--op=mhc_pre --quick --all --json=a --threads=64 --direction=forward",
            "predict": "--op=mhc_pre --quick --all --json=a --processes=1 --dtype=float32",
        }.items()
        for b in others.split()
    },
    "--verify --once": "--once does nothing with --verify",
    "--verify --sweep --op mhc_pre": "--sweep does nothing with --verify",
    "--once --sweep --op mhc_pre": "--sweep does nothing with --once",
    "--from a.json --verify --predict": "does nothing with",
}


def test_options_that_do_nothing_are_refused(tmp_path, capsys, gpu, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "memory", lambda: 4 << 30)
    for command, message in REFUSED.items():
        error = refused(benchmark.main, command.split(), capsys)
        assert message in error, (command, error)
        assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_options_that_go_together(gpu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "memory", lambda: 1 << 36)
    monkeypatch.setattr(benchmark, "room", lambda: 16 << 30)
    for command in (
        *("", "--all --processes 3 --json a.json", "--quick --no-baseline", "--verify --decode"),
        *("--preset seeds --op mhc_dynamic --quick --no-baseline --direction forward",),
        *("--decode --quick", "--sizes --quick --op mhc_pre --plot a.png", "--overhead --quick"),
        *("--once --op mhc_pre --shape 16384,4,4096", "--sweep --op mhc_static --json a.json"),
        *("--all --no-baseline --plot a.svg", "--threads 64 --verify", "--verify --json a.json"),
        *("--op sinkhorn_knopp --shape 5,4,4", "--shape 5,4,8 --direction backward", "--predict"),
    ):
        args = benchmark.parse(command.split())
        assert all(args.chosen.values()), command
    monkeypatch.setattr(benchmark, "memory", lambda: 80 << 30)
    sizes = benchmark.parse(["--sizes"]).chosen["sizes"]
    assert ("sublayer", (65536, 4, 7168), "bfloat16") in sizes
    assert not list(tmp_path.iterdir())


def test_without_kernels(capsys, monkeypatch):
    """What a CPU cannot measure is an error; parity and plain against compiled run."""
    monkeypatch.setattr(benchmark, "measure", None)
    for command in (
        *("--decode", "--sizes", "--overhead", "--all", "--threads 64", "--baseline"),
        *("--once --op mhc_pre", "--sweep --op mhc_pre", "--peak-gbps 3", "--verify --decode"),
    ):
        error = refused(benchmark.main, command.split(), capsys)
        assert "needs kernels, by Metal or CUDA, and this machine has none" in error, command
    args = benchmark.parse(["--op", "mhc_head", "--shape", "4096,12,1024", "--verify"])
    assert args.chosen == {"rows": [("mhc_head", (256, 12, 1024), "bfloat16")]}


def test_a_run_without_kernels(tmp_path, monkeypatch, capsys):
    """Its times are kept, and compared."""
    monkeypatch.setattr(mx, "compile", lambda f: f)
    monkeypatch.setattr(benchmark, "race", lambda *_: [[2e-6, 4e-6, 3e-6], [6e-6, 9e-6, 6e-6]])
    file = tmp_path / "a.json"
    argv = ["--op", "stream_aggregate", "--shape", "300,2,4", "--dtype", "float16"]
    argv += ["--direction", "forward", "--direction", "backward", "--json", str(file)]
    benchmark.main(argv)
    benchmark.main([*argv, "--compare", str(file)])
    assert capsys.readouterr().out.count("3.0 ->       3.0 us") == 2
    result = json.loads(file.read_text())
    assert [row["direction"] for row in result["reference"]] == ["forward", "backward"]
    for row in result["reference"]:
        assert (row["us"], row["plain_us"]) == pytest.approx((3.0, 6.0))
        assert row["shape"] == [256, 2, 4] and row["dtype"] == "float16"


def test_plots_replace_pictures_only(tmp_path, capsys, gpu, monkeypatch):
    pytest.importorskip("matplotlib")
    good, text = tmp_path / "good.json", tmp_path / "letter.png"
    good.write_text(json.dumps(RESULT | {"rows": [ROW]}))
    text.write_text("a letter")
    error = refused(benchmark.main, ["--from", str(good), "--plot", str(text)], capsys)
    assert "--plot must be new or a .png picture" in error and text.read_text() == "a letter"
    (tmp_path / "decode.json").write_text(json.dumps(RESULT | {"decode": [ROW]}))
    argv = ["--from", str(tmp_path / "decode.json"), "--plot", str(tmp_path / "a.png")]
    assert "--from must have rows or sizes for --plot" in refused(benchmark.main, argv, capsys)
    argv = ["--from", str(tmp_path / "decode.json"), "--predict"]
    assert "--from must have rows for --predict" in refused(benchmark.main, argv, capsys)
    same = str(tmp_path / "same.png")
    argv = ["--quick", "--json", same, "--plot", same]
    assert "--plot must be a file of its own" in refused(benchmark.main, argv, capsys)
    for _ in range(2):
        benchmark.main(["--from", str(good), "--plot", str(tmp_path / "a.svg")])
    find_spec = lambda name: None  # noqa: E731
    monkeypatch.setattr(benchmark_options.importlib.util, "find_spec", find_spec)
    argv = ["--quick", "--plot", str(tmp_path / "b.png")]
    assert "--plot must have matplotlib" in refused(benchmark.main, argv, capsys)


def test_a_process_that_leaves_nothing(tmp_path, monkeypatch):
    """The others' figures are kept, and the command fails."""

    class Process:
        def __init__(self, command, env):
            file = command[command.index("--json") + 1]
            if "/1.json" not in file:
                with open(file, "w") as f:
                    json.dump(RESULT | {"rows": [figure()]}, f)
            self.status = int("/1.json" in file)

        def wait(self):
            return self.status

    monkeypatch.setattr(benchmark, "subprocess", types.SimpleNamespace(Popen=Process))
    argv = ["--processes", "3", "--op", "mhc_head", "--json", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit, match="process 1 ended with status 1\nthe result of process 1"):
        benchmark.main(argv)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["processes"] == 2 and len(result["rows"]) == 1
    assert result["command"] == f"python benchmark.py {' '.join(argv)}"


# ---- python -m mhc_mlx.mlx_lm


REPORT = {"command": "python -m mhc_mlx.mlx_lm --sites 64", "device": "d", "mlx": "1", "date": "d"}
REPORT |= {"mlx-lm": "1", "backend": "b"}


@pytest.fixture
def command(monkeypatch):
    """The module of the command, in which nothing may run."""
    pytest.importorskip("mlx_lm")
    from mhc_mlx.mlx_lm import __main__ as command

    for name in ("bench", "bench_sites", "check", "patch", "_random_model"):
        monkeypatch.setattr(command, name, None)
    monkeypatch.setattr(command.mlx_lm, "load", None)
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

    monkeypatch.setattr(command.mlx_lm, "load", load)
    error = refused(command.main, ["--model", "some/name"], capsys)
    assert error == "--model must be what mlx_lm.load takes but is some/name: no such repository"


def test_parts_are_written_as_they_are_measured(tmp_path, command, monkeypatch, capsys):
    """What failed parity fails the command; an exception loses no part before it."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps(REPORT))

    def bench_sites(d, tokens):
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
    assert [(part["d"], part["tokens"]) for part in written["per sublayer"]] == [
        (32, [3]),
        (64, [3]),
    ]
    assert written["command"] == f"python -m mhc_mlx.mlx_lm {' '.join(argv)}"
    with pytest.raises(KeyboardInterrupt):
        command.main(["--sites", "32,96", "--json", str(file)])
    assert [part["d"] for part in json.loads(file.read_text())["per sublayer"]] == [32]
    kept = file.read_text()
    with pytest.raises(KeyboardInterrupt):
        command.main(["--sites", "96,32", "--json", str(file)])
    assert file.read_text() == kept, "a report without a measurement replaces one with some"
    report = command.main(["--sites", "32,128"])
    assert [part["d"] for part in report["per sublayer"]] == [32, 128]
    assert report["per sublayer"][0]["tokens"] == (1, 8, 512, 2048)

    patched, model = [], object()
    monkeypatch.setattr(command, "_random_model", lambda d, layers: (d, layers, model))
    monkeypatch.setattr(command, "patch", lambda model, verify: patched.append((model, verify)))
    monkeypatch.setattr(command, "check", lambda model, times: {"check of": model, "times": times})
    monkeypatch.setattr(command, "bench", lambda model, lengths: {"bench of": model, "l": lengths})
    report = command.main(["--random", "64"])
    assert patched.pop() == ((64, 3, model), True)
    assert report["check"] == {"check of": (64, 3, model), "times": (1, 512)}
    assert report["bench"] == {"bench of": (64, 3, model), "l": (512, 2048)}
    report = command.main(["--random", "64,2", "--bench", "--no-verify", "--tokens", "7"])
    assert patched.pop() == ((64, 2, model), False) and "check" not in report
    assert report["bench"]["l"] == (7,)
    report = command.main(["--random", "64,2", "--check", "--tokens", "7"])
    assert report["check"]["times"] == (7,) and "bench" not in report


@pytest.fixture
def times(monkeypatch):
    pytest.importorskip("mlx_lm")
    from mhc_mlx.mlx_lm import times

    monkeypatch.setattr(mx, "compile", lambda f: f)
    times._compiled_stock.cache_clear()
    yield times
    times._compiled_stock.cache_clear()


def clocked(times, monkeypatch):
    """A list whose first number is the time."""
    now = [0.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(times, "time", fake)
    return now


def test_seconds(times, monkeypatch):
    """The median, without the two calls of warm-up; more calls of what is fast."""
    now = clocked(times, monkeypatch)
    for taken, want, count in (([9.0, 9.0, 3.0, 1.0, 2.0, 5.0, 7.0], 3.0, 7), ([2e-3], 2e-3, 27)):
        calls = []

        def run(taken=taken, calls=calls):
            calls.append(1)
            now[0] += taken[min(len(calls), len(taken)) - 1]
            return mx.zeros(1)

        assert times._seconds(run) == pytest.approx(want) and abs(len(calls) - count) <= 1


def test_times_of_sites(times, monkeypatch):
    """Each chain runs every site once, by its own function, of as many tokens; a time is per
    site."""
    from mhc_mlx.mlx_lm import SinglePassConnection

    sites, seen, chains = times.random_sites(32, 5), [], []
    for name in ("run_site", "stock_site"):
        usual = getattr(times, name)

        def counted(hc, x, y, norm, name=name, usual=usual):
            assert name == "run_site" or not isinstance(hc, SinglePassConnection)
            seen.append((name, x.shape, x.dtype))
            return usual(hc, x, y, norm)

        monkeypatch.setattr(times, name, counted)

    def seconds(run):
        seen.clear()
        mx.eval(run())
        chains.append(list(seen))
        return 10.0 * len(chains)

    monkeypatch.setattr(times, "_seconds", seconds)
    found = times.site_times([*sites[:4], sites[4]._replace(norm=None)], mx.float16, 3)
    assert found == {"tokens": 3, "patched": 2.5, "mlx-lm": 5.0, "mlx-lm, compiled": 7.5}
    shape = ((1, 3, 4, 32), mx.float16)
    assert chains == [[("run_site", *shape)] * 4, *[[("stock_site", *shape)] * 4] * 2]
    line = times.time_line({"tokens": 3, "patched": 1.0, "mlx-lm": 4.0, "mlx-lm, compiled": 2.0})
    assert "1000000 us per sublayer, mlx-lm 4000000 us (4.0 x), compiled 2000000 us (2.0 x)" in line


def test_sites_that_fail_are_not_timed(times, monkeypatch):
    """At any number of tokens that is timed, with infinite errors of both too."""
    monkeypatch.setattr(times, "SITES", 2)
    monkeypatch.setattr(times, "_peak", lambda run: 1 << 20)
    timed = []
    monkeypatch.setattr(times, "_seconds", lambda run: timed.append(1) or 1e-6)
    right = times.site_errors
    report = times.bench_sites(32, (1, 6))
    assert report["ok"] and len(report["times"]) == 2 and len(timed) == 6
    for wrong in (1, 6):
        for errors in ((5.0, 2.5), (math.inf, math.inf)):

            def failing(site, x, y, repeats=1, wrong=wrong, errors=errors):
                tokens = x.shape[1] * repeats
                return errors if tokens == wrong else right(site, x, y, repeats)

            monkeypatch.setattr(times, "site_errors", failing)
            report = times.bench_sites(32, (1, 6))
            assert not report["ok"] and report["times"] == [] and len(timed) == 6


def test_bench_times_both_models(times, monkeypatch, capsys):
    """Tokens a second of the patched model, then of mlx-lm's: prompts of each length through an
    empty cache, and only the tokens after the warm-up."""
    from models.tiny_deepseek import tiny

    from mhc_mlx import mlx_lm as adapter

    model, now, prompts = tiny(layers=2), clocked(times, monkeypatch), []
    adapter.patch(model, verify=False)
    kinds = lambda: isinstance(model.layers[0], adapter.SinglePassLayer)  # noqa: E731
    usual = type(model).__call__

    def call(self, tokens, cache):
        prompts.append(
            (kinds(), tokens.shape, max(c.offset for c in cache if hasattr(c, "offset")))
        )
        return usual(self, tokens, cache)

    def seconds(run):
        run()
        return 0.5 if kinds() else 2.0

    def generate_step(prompt, given, max_tokens):
        assert given is model and prompt.shape == (4,)
        for k in range(max_tokens):  # the first tokens are slow
            now[0] += (100.0 if k < 4 else 0.25) * (1 if kinds() else 2)
            yield k, None

    monkeypatch.setattr(type(model), "__call__", call)
    monkeypatch.setattr(times, "_seconds", seconds)
    monkeypatch.setattr(times, "generate_step", generate_step)
    report = times.bench(model, (4, 6), steps=8)
    assert report["patched"] == {"prefill": {"4": 8.0, "6": 12.0}, "decode": 4.0}
    assert report["mlx-lm"] == {"prefill": {"4": 2.0, "6": 3.0}, "decode": 2.0}
    assert prompts == [(kind, (1, n), 0) for kind in (True, False) for n in (4, 6)]
    assert kinds(), "the model is left patched"
    assert "prefill 6: 12 tokens/s, mlx-lm 3 (4.00 x)" in (printed := capsys.readouterr().out)
    assert "decode: 4.0 tokens/s, mlx-lm 2.0 (2.00 x)" in printed
