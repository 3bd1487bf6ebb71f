"""The benchmark checks every result of what it times."""

import functools
import math

import mlx.core as mx
import pytest
from proof import executor

import benchmark
from mhc_mlx import launch, ops, reference
from mhc_mlx.device_report import measure, parity, suite
from mhc_mlx.device_report.measure import Bench
from mhc_mlx.devices import APPLE
from programs import figures
from programs.figures import figure, shorten

uncompiled = figures.uncompiled


def error_of(op="stream_mix_add", shape=(5, 4, 8), dtype=mx.float32, **options) -> float:
    return parity.worst_error(op, shape, dtype, **options)


def test_ops_of_both_modules_agree(monkeypatch, uncompiled):
    """Every op takes its inputs, and a cotangent for each result; in chunks, and at once."""
    with executor("stand-in"):
        for op in suite.OPS:
            monkeypatch.setattr(parity, "CHUNK_BYTES", 1 << 40)
            assert error_of(op, (7, 4, 4)) < 3e-5
            monkeypatch.setattr(parity, "CHUNK_BYTES", 3 * parity.reference_bytes(op, 4, 4))
            assert parity.chunk(op, 4, 4) == 3
            assert error_of(op, (7, 4, 4)) < 3e-5


def test_parity_sees_every_result(monkeypatch, uncompiled):
    """It sees a wrong element of any output or gradient, at the first or last token, a NaN, another
    dtype or shape; also where the reference has the same NaN."""
    right = parity.directed
    monkeypatch.setattr(parity, "CHUNK_BYTES", 2 * parity.reference_bytes("mhc_pre", 2, 4))
    count = 4 + 4  # mhc_pre has so many outputs, and gradients

    def broken(index, change, ours=True, theirs=False):
        def directed(f, direction, arrays, compiled=True):
            def run(*a):
                results = list(right(f, direction, arrays, compiled)(*a))
                if ours if compiled else theirs:
                    results[index] = change(results[index])
                return results

            return run

        monkeypatch.setattr(parity, "directed", directed)
        return error_of("mhc_pre", (5, 2, 4))

    last = lambda a: a + mx.eye(a.shape[0], 1)[::-1].reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    for index in range(count):
        assert broken(index, last) > 1e-2, index
        assert broken(index, lambda a: a * float("nan")) == math.inf
        assert broken(index, lambda a: a.at[-1].add(float("inf"))) == math.inf
        for ours in (True, False):  # the reference has the NaN too
            assert broken(index, lambda a: a * float("nan"), ours, theirs=True) == math.inf
        assert broken(index, lambda a: a.astype(mx.bfloat16)) == math.inf
        assert broken(index, lambda a: a[None]) == math.inf
    assert broken(0, lambda a: a) < 3e-5
    for error, ok in ((2e-5, True), (4e-5, False), (math.inf, False), (math.nan, False)):
        row = parity.parity_row("mhc_pre", (5, 2, 4), "float32", True, 64, error)
        assert row["ok"] == ok and row["shape"] == [5, 2, 4] and row["threads_per_group"] == 64


def test_parity_without_gradients_has_none(uncompiled):
    gradient_off = lambda *a: ops.stream_mix_add(*a) + 0 * mx.stop_gradient(a[0])  # noqa: E731
    wrong = lambda *a: ops.stream_mix_add(mx.stop_gradient(a[0]), *a[1:])  # noqa: E731
    assert error_of(timed=gradient_off) < 3e-5
    assert error_of(timed=wrong, gradients=False) < 3e-5 < 0.1 < error_of(timed=wrong)


def peak(op, shape) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    error_of(op, shape)
    return mx.get_peak_memory() - before


def test_memory_of_parity(monkeypatch, uncompiled):
    """What a check says that it needs is enough, and chunks bound it where kernels are."""
    for op in suite.OPS:
        shape = (12, 8, 8 if op == "sinkhorn_knopp" else 64)
        assert peak(op, shape) < parity.needed_bytes(op, shape, mx.float32), op
    right = parity.directed

    def directed(f, direction, arrays, compiled=True):  # like kernels, it holds nothing but results
        if not compiled:
            return right(f, direction, arrays, compiled)
        return lambda *a: [mx.zeros_like(x) for x in (*suite.as_list(f(*a[:arrays])), *a[:arrays])]

    monkeypatch.setattr(parity, "directed", directed)
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    for op, tokens in (("mhc_coefficients", 24), ("stream_mix_add", 200)):
        plain = functools.partial(suite.function, reference)
        monkeypatch.setattr(parity, "function", lambda _, op, plain=plain: plain(op))
        monkeypatch.setattr(parity, "CHUNK_BYTES", 4 * parity.reference_bytes(op, 8, 64))
        needed = parity.needed_bytes(op, (tokens, 8, 64), mx.float32)
        assert peak(op, (tokens, 8, 64)) < needed
    assert needed < 100 * parity.reference_bytes(op, 8, 64)
    # (4096, 12, 1024) once took 34 GB.
    monkeypatch.setattr(parity, "CHUNK_BYTES", 1 << 30)
    most = max(parity.needed_bytes(op, (4096, 12, 1024), mx.bfloat16) for op in suite.OPS)
    assert most < 4 << 30


@pytest.mark.parametrize("argv", ["", "--verify"])
def test_parity_is_of_what_is_timed(argv, monkeypatch, uncompiled):
    """It has the threads, dtype, tokens and directions of what is timed."""
    shorten(monkeypatch)
    launched, timed_rows = [], []
    monkeypatch.setattr(measure, "race", None)
    with executor("stand-in"), monkeypatch.context() as patch:
        run = launch.run

        def seen(name, inputs, outputs, groups, threads, *options):
            x = inputs["x"]
            launched.append((name, x.dtype, x.size, threads))
            return run(name, inputs, outputs, groups, threads, *options)

        def row(self, *case, **options):
            timed_rows.append(case)
            return figure()

        patch.setattr(launch, "run", seen)
        patch.setattr(Bench, "row", row)
        command = "--op stream_aggregate --shape 700,2,64 --dtype float16 --threads 96"
        command += " --direction forward"
        benchmark.main([*command.split(), *argv.split()])
    assert launched == [("stream_aggregate", mx.float16, 700 * 2 * 64, 96)]
    case = ("stream_aggregate", "forward", (700, 2, 64), "float16", 96, False)
    assert timed_rows == ([] if argv else [case])


def test_a_sweep_verifies_each_variant(monkeypatch, capsys):
    shorten(monkeypatch)
    checked, timings = [], iter(range(100, 0, -1))

    def error(op, shape, dtype, gradients, threads_per_group):
        forced = ops.tiling.token_tiling(2, 512, 4, 1, None, APPLE)
        checked.append((gradients, forced.vec, forced.threads, threads_per_group))
        return 1.0 if threads_per_group == 64 else 0.0

    def row(self, op, direction, shape, name, threads, baseline):
        assert threads != 64 and not baseline
        fields = {"us": float(next(timings)), "threads_per_group": threads}
        return figure(op=op, direction=direction, **fields)

    monkeypatch.setattr(parity, "worst_error", error)
    monkeypatch.setattr(Bench, "row", row)
    usual = ops.tiling.token_tiling
    monkeypatch.setattr(ops.tiling, "token_tiling", usual)  # is put back whatever the sweep leaves
    command = "--sweep --op stream_mix_add --shape 3,2,512 --dtype float32"
    with executor("stand-in"), pytest.raises(SystemExit, match="parity fails"):
        benchmark.main(command.split())
    assert ops.tiling.token_tiling is usual  # or what is called next runs with the last one tried
    assert len(checked) > 10 and {gradients for gradients, *_ in checked} == {True, False}
    assert all(threads == forced for _, _, forced, threads in checked)
    out = capsys.readouterr().out
    assert out.count("<- best") == 2 and out.count("<- default") >= 1
    lines = [line for line in out.splitlines() if line.startswith("vec")]
    for best, worse in zip(
        lines, lines[1:], strict=False
    ):  # each line is faster than the one before
        last = "backward" in best or "backward" in worse and "forward" in best
        assert ("<- best" in best) == (last and "forward" in best)
    assert "<- best" in lines[-1]


def test_a_sweep_of_gate_mix_has_threads_alone(monkeypatch, capsys):
    """Its loads are always of 16 bytes: each line is another number of threads, and it launches
    with that number; the default is its own."""
    shorten(monkeypatch)
    asked: list = []

    def row(self, op, direction, shape, name, threads, baseline):
        asked.append(threads)
        return figure(op=op, direction=direction, us=float(len(asked)), threads_per_group=threads)

    monkeypatch.setattr(Bench, "row", row)
    with executor("stand-in") as launched:
        benchmark.main("--sweep --op gate_mix --shape 2,4,2560 --dtype bfloat16".split())
    assert asked == [None, 32, 64, 128, 160, 256, 320, 512] * 2
    of = {(body, dict(template)["THREADS"]) for _, body, template, _ in launched}
    assert {threads for body, threads in of if body == "gate_mix"} == {*asked[1:8]}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vec")]
    defaults = [line for line in lines if "<- default" in line]
    assert len(lines) == 16 and all(
        line.startswith("vec None threads its own") for line in defaults
    )
    assert len(defaults) == 2


def test_parity_of_layers_and_stacks(monkeypatch, uncompiled):
    """--overhead checks its layers, --decode the ops that have no gradient, as they are timed."""
    shorten(monkeypatch)
    with executor("stand-in") as launched:
        cases = {}
        for section in ("overhead", "decode"):
            launched.clear()
            rows = parity.verify(section, "sublayer", (2, 2, 8), "bfloat16", ["forward"], None)
            assert all(row["ok"] and row["direction"] == "forward" for row in rows)
            assert launched and not [v for v in launched if "backward" in v[1]]
            cases[section] = [row["op"] for row in rows]
        assert cases == {"overhead": ["MHCLayer", "HyperConnection"], "decode": ["sublayer"]}
        options_used, usual = [], parity.worst_error
        record = lambda *a, **options: options_used.append(options) or usual(*a, **options)  # noqa: E731
        monkeypatch.setattr(parity, "worst_error", record)
        parity.verify("decode", "single_pass", (2, 2, 8), "float32", ["forward"], None)
        assert options_used == [{"differentiable": False}]
        plain = ops.stream_mix_add
        wrong = lambda *a, use_metal=True, **o: plain(*a, **o) * (1 + use_metal)  # noqa: E731
        monkeypatch.setattr(ops, "stream_mix_add", wrong)
        rows = parity.verify("overhead", "sublayer", (2, 2, 8), "bfloat16", ["forward"], None)
        assert {row["op"]: row["ok"] for row in rows} == {
            "MHCLayer": True,
            "HyperConnection": False,
        }
