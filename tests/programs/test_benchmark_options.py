"""benchmark.py refuses options that do nothing, and files that it did not write."""

import json
import types

import mlx.core as mx
import pytest

import benchmark
from benchmarks import cases, processes
from benchmarks import options as benchmark_options
from benchmarks.report import check_figures, check_result
from mhc_mlx import launch
from mhc_mlx.device_report import measure
from programs.figures import RESULT, figure, refused


@pytest.fixture
def gpu(monkeypatch):
    """Options are checked as if there were kernels; nothing may run."""
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    monkeypatch.setattr(benchmark, "measure", None)
    monkeypatch.setattr(benchmark, "repeat", None)


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
    """--compare, --from and --json, which would replace them, refuse them before anything runs."""
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
            ["--from", str(file), "--plot", str(tmp_path / "a.png")],
        ]
        if (
            data != "" and data is not RESULT
        ):  # --json replaces an empty file, and one without figures
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
    "--from a.json": "--from must come with --compare or --plot",
    "--device H100": "invalid choice: 'H100'",
    "--device M2": "invalid choice: 'M2'",
    "--compare nowhere.json": "--compare must be a file but is nowhere.json",
    "--from nowhere.json --compare nowhere.json": "--from must be a file but is nowhere.json",
    "--json nowhere/a.json": "--json must be in a folder that exists but is nowhere/a.json",
    "--json=": "--json must be a file but is empty",
    "--compare=": "--compare must be a file but is empty",
    "--from= --plot a.png": "--from must be a file but is empty",
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
            "model": "--quick --all --json=a --processes=1 --compare=a --plot=a.png",
        }.items()
        for b in others.split()
    },
    "--verify --once": "--once does nothing with --verify",
    "--verify --sweep --op mhc_pre": "--sweep does nothing with --verify",
    "--once --sweep --op mhc_pre": "--sweep does nothing with --once",
    "--from a.json --verify --model": "does nothing with",
}


def test_options_that_do_nothing_are_refused(tmp_path, capsys, gpu, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cases, "memory", lambda: 4 << 30)
    for command, message in REFUSED.items():
        error = refused(benchmark.main, command.split(), capsys)
        assert message in error, (command, error)
        assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_options_that_go_together(gpu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cases, "memory", lambda: 1 << 36)
    monkeypatch.setattr(cases, "array_limit", lambda: 16 << 30)
    monkeypatch.setattr(benchmark_options.listings, "missing", lambda backend: None)
    for command in (
        *("", "--all --processes 3 --json a.json", "--quick --no-baseline", "--verify --decode"),
        *("--preset seeds --op mhc_dynamic --quick --no-baseline --direction forward",),
        *("--decode --quick", "--sizes --quick --op mhc_pre --plot a.png", "--overhead --quick"),
        *("--once --op mhc_pre --shape 16384,4,4096", "--sweep --op mhc_static --json a.json"),
        *("--all --no-baseline --plot a.svg", "--threads 64 --verify", "--verify --json a.json"),
        *("--op sinkhorn_knopp --shape 5,4,4", "--shape 5,4,8 --direction backward", "--model"),
    ):
        args = benchmark.parse(command.split())
        assert all(args.chosen.values()), command
    monkeypatch.setattr(cases, "memory", lambda: 80 << 30)
    sizes = benchmark.parse(["--sizes"]).chosen["sizes"]
    assert ("sublayer", (65536, 4, 7168), "bfloat16") in sizes
    monkeypatch.setattr(benchmark_options.listings, "missing", lambda backend: f"no {backend}")
    with pytest.raises(SystemExit):
        benchmark.parse(["--model", "--device", "NVIDIA H200"])
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
    monkeypatch.setattr(measure, "race", lambda *_: [[2e-6, 4e-6, 3e-6], [6e-6, 9e-6, 6e-6]])
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
    assert "--plot must be a new file or a .png picture" in error and text.read_text() == "a letter"
    (tmp_path / "decode.json").write_text(json.dumps(RESULT | {"decode": [ROW]}))
    argv = ["--from", str(tmp_path / "decode.json"), "--plot", str(tmp_path / "a.png")]
    assert "--from must have rows or sizes for --plot" in refused(benchmark.main, argv, capsys)
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

    monkeypatch.setattr(processes, "subprocess", types.SimpleNamespace(Popen=Process))
    argv = ["--processes", "3", "--op", "mhc_head", "--json", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit, match="process 1 ended with status 1\nthe result of process 1"):
        benchmark.main(argv)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["processes"] == 2 and len(result["rows"]) == 1
    assert result["command"] == f"python benchmark.py {' '.join(argv)}"
