"""The benchmark times calls, and counts their bytes and dispatches."""

import types
from collections import Counter

import mlx.core as mx
import pytest
from cases import OPS
from proof import executor, tracing

import benchmark
from mhc_mlx import launch, ops
from mhc_mlx.device_report import layers, measure, suite, timing
from mhc_mlx.device_report.measure import Bench
from programs.figures import shorten

ROWS = {  # forward, backward at n = 4
    "mhc_static": (8, 12),
    "mhc_layer": (8, 12),
    "stream_mix_add": (9, 14),
    "stream_mix_add_per_token": (9, 14),
    "stream_aggregate": (5, 9),
    "stream_aggregate_norm": (5, 9),
    "mhc_coefficients": (4, 8),
    "mhc_pre": (5, 13),
    "mhc_pre_norm": (5, 13),
    "mhc_head": (5, 9),
    "sublayer": (14, 27),
    "mhc_dynamic": (14, 27),
    "mhc_seam": (10, 15),
    "single_pass": (14, 19),
    "stream_norm": (8, 24),
    "stream_norm_write_back": (13, 26),
    "gate_mix": (9, 17),
}


def test_mandatory_bytes():
    rows, shape = 16384 * 1024 * 2, (16384, 4, 1024)  # one row of C per token in bfloat16
    designed = {k: OPS[op.call].rows for k, op in suite.OPS.items() if op.call in OPS}
    designed = {k: rows(4) for k, rows in designed.items() if rows}
    designed = {k: (sum(rows[:2]), sum(rows[2:])) for k, rows in designed.items()}
    assert designed | ROWS == ROWS | designed
    assert {*designed, *ROWS} == suite.OPS.keys() - {"sinkhorn_knopp"}
    for op, (forward, backward) in (designed | ROWS).items():
        got = [suite.mandatory_bytes(op, d, shape, mx.bfloat16) for d in suite.DIRECTIONS]
        assert got == [forward * rows, backward * rows, (forward + backward) * rows]
    assert suite.mandatory_bytes("mhc_pre", "backward", (7, 8, 24), mx.float32) == 25 * 7 * 24 * 4
    for dtype, sizes in ((mx.float32, (8, 12, 20)), (mx.bfloat16, (6, 8, 14))):
        matrices = [("sinkhorn_knopp", d, (10, 4, 4), dtype) for d in suite.DIRECTIONS]
        assert [suite.mandatory_bytes(*m) for m in matrices] == [160 * size for size in sizes]


def test_inputs_of_every_op():
    """They have tokens, n and C that differ; gates of a stack write back next to nothing."""
    for op in suite.OPS:
        shape = (3, 2, 2 if op == "sinkhorn_knopp" else 8)
        results = suite.as_list(suite.function(ops, op)(*suite.make_inputs(op, shape, mx.float16)))
        assert all(mx.isfinite(a.astype(mx.float32)).all() for a in results if a is not None)
    phi, bias, alpha = layers.quiet_parameters(mx.zeros((3, 2, 8)))
    assert (phi.shape, bias.shape, alpha.shape) == ((8, 16), (8,), (3,))
    assert [k for k, b in enumerate(bias.tolist()) if b == -4.0] == [
        2,
        3,
    ]  # these are the gates of h_post


def test_once_launches_what_it_names_twice(monkeypatch):
    argv = ["--once", "--op", "mhc_seam", "--shape", "5,4,64", "--dtype", "float32"]
    calls, directed = [], measure.directed

    def ready(*options):
        run = directed(*options)

        def checked(*arrays):  # or the profiler would also see how inputs are drawn
            assert not launch.primitives(*arrays)
            return run(*arrays)

        return checked

    with executor("stand-in"), monkeypatch.context() as patch:
        patch.setattr(measure, "directed", ready)
        run = launch.run

        def counted(name, *arguments, **options):
            calls.append(name)
            return run(name, *arguments, **options)

        patch.setattr(launch, "run", counted)
        patch.setattr(mx, "compile", lambda f: f)
        patch.setattr(measure, "race", None)  # nothing is timed
        benchmark.main(argv)
    assert Counter(calls) == {"mhc_seam": 2, "mhc_seam_backward": 2, "sum_partials": 2}


def test_counter_of_dispatches():
    x = mx.ones((4, 6))
    mx.eval(x)
    halves = mx.split(mx.exp(x), 2, axis=1)
    results = [halves[0].T.sum(0), halves[1][None] * 2.0, x]
    assert timing.dispatches(results) == Counter(Exp=1, Sum=1, Multiply=1)
    assert timing.dispatches(mx.compile(lambda x: mx.exp(x) * x)(x)).total() == 1


@pytest.mark.parametrize("op, launched", [("sublayer", 3), ("single_pass", 2)])
def test_dispatches_and_sources_of_a_sublayer(op, launched):
    """At one token the kernels of the graph are those launched, and nothing else is."""
    arrays, counts = suite.make_inputs(op, (1, 4, 64), mx.bfloat16), []

    def traced(*arrays):
        call = mx.compile(suite.function(ops, op, differentiable=False))
        counts.append(timing.dispatches(out := call(*arrays)))
        return out

    tracing.metal_source(traced, *arrays)  # kernels built before are counted too
    with timing.launches() as seen:
        tracing.metal_source(traced, *arrays)
    assert counts[1]["CustomKernel"] == counts[1].total() == len(seen) == launched
    for row in seen:
        files = (f"{row['kernel']}.metal", "include/common.h")
        assert row["source_bytes"] >= sum(len(launch.text(file)) for file in files)
        assert row["template_arguments"] > 3
    assert launch._build.cache_info().currsize == 0  # no spy stays


class Clock:
    """The time of this perf_counter passes only in calls of what is timed."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "array_limit", lambda: 1 << 30)

    def op(self, seconds):
        """Return an op whose calls take these seconds in turn, the last of them from then on."""
        calls, left = [], list(seconds)

        def run(*arrays):
            calls.append(arrays)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return mx.zeros(1)

        return run, calls


def test_race(monkeypatch):
    """Five rounds run in turn, after warm-up; every input set, in rotation."""
    clock, sets = Clock(monkeypatch), [[k] for k in range(3)]
    warm, round_of = 1 + 3 + 3, 5  # it calls once, the sets, and the sets timed; then rounds of 5
    seconds = [100.0] * 4 + [0.75] * 3
    for k in (50.0, 4.0, 1.0, 3.0, 2.0, 7.0):  # the first is for the allocator
        seconds += [k - 1] * 4 + [k + 4]
    slow, calls = clock.op(seconds)
    fast, fast_calls = clock.op([0.5])
    order = []
    times, more = timing.race(
        20.0,
        ((lambda *a: order.append("slow") or slow(*a)), sets),
        ((lambda *a: order.append("fast") or fast(*a)), sets[:1]),
    )
    assert times == pytest.approx([4.0, 1.0, 3.0, 2.0, 7.0]) and more == [0.5] * 5
    assert len(calls) == warm + 6 * round_of and len(fast_calls) == 3 + 6 * 8
    assert [a for (a,) in calls[warm:]] == [0, 1, 2, 0, 1] * 6
    turns = [one for one, last in zip(order, [None, *order], strict=False) if one != last]
    assert turns == ["slow", "fast"] * 7  # once to warm up, and in six rounds
    clock.now, few = 0.0, clock.op([1e3])  # too slow for its sets: each of them runs all the same
    timing.race(1.0, (few[0], sets))
    assert [a for (a,) in few[1]][-3:] == [0, 1, 2]


def test_call_times_and_spread(monkeypatch):
    clock = Clock(monkeypatch)
    call, calls = clock.op([50.0, 50.0, 1.0, *range(1, 6)])
    assert timing.call_times(5.0, call) == [1, 2, 3, 4, 5]
    assert len(calls) == 2 + 1 + 5  # calls warm up, count, and are timed
    assert timing.spread([4.0, 2.0, 3.0, 9.0, 1.0]) == pytest.approx((6.5 - 1) / 3)


def test_input_sets(monkeypatch):
    arrays = []

    def make(size=1000):
        arrays.append(mx.ones(size))
        return [arrays[-1]]

    for cache, count in ((1, 2), (9000, 3), (12000, 3), (12001, 4), (1 << 30, timing.MOST_SETS)):
        monkeypatch.setattr(timing, "CACHE", cache)
        arrays.clear()
        sets = timing.input_sets(make)
        assert len(sets) == count and [s[0] is a for s, a in zip(sets, arrays, strict=True)]
        assert len({id(s[0]) for s in sets}) == count
    assert timing.CACHE >= 1 << 28 or cache == 1 << 30


def test_both_are_compiled(monkeypatch):
    """The op and the baseline are; without kernels the first of two runs of the reference is."""
    compiled, raced = [], []

    def compile(f):
        compiled.append(lambda *a: f(*a))
        return compiled[-1]

    def race(budget, *contestants):
        raced.extend(f for f, _ in contestants if f is not mx.abs)
        return [[1.0]] * len(contestants)

    monkeypatch.setattr(mx, "compile", compile)
    monkeypatch.setattr(measure, "race", race)
    for direction in suite.DIRECTIONS:
        Bench(1.0, None).row("mhc_static", direction, (2, 2, 2), "float32", None)
        assert len(raced) == (1 if direction == "backward" else 2)
        assert all(f in compiled for f in raced)
        raced.clear()
        Bench(1.0, None).reference_row("mhc_static", direction, (2, 2, 2), "float32")
        assert [f in compiled for f in raced] == [True, False]
        raced.clear()


def rows_of_fake(monkeypatch, times, direction="forward", **options):
    """Return a row, and what was raced, where op, copy and reference take these times."""
    raced = []

    def race(budget, *contestants):
        raced.extend(contestants)
        return [list(t) for t in times]

    monkeypatch.setattr(measure, "race", race)
    monkeypatch.setattr(measure, "input_sets", lambda make: [make(), make()])
    bench = Bench(1.0, options.pop("peak", None))
    row = bench.row("stream_mix_add", direction, (6, 4, 8), "bfloat16", 64, **options)
    return bench, row, raced


def test_a_row(monkeypatch):
    op, copy, plain = (
        1e-6 * mx.array([[5, 1, 3, 2, 9], [4, 1, 1.5, 1, 6], [12, 1, 6, 5, 30]])
    ).tolist()
    bench, row, raced = rows_of_fake(monkeypatch, [op, copy, plain], peak=2.0)
    size = 9 * 6 * 8 * 2  # rows of C, in bytes
    want = {"us": 3.0, "spread": 8 / 3, "gbps": size / 3e3, "percent_of_copy": 50.0}
    want |= {"percent_of_peak": 100 * size / 3e3 / 2, "speedup_vs_compiled": 2.0}
    assert {k: row[k] for k in want} == pytest.approx(want)
    assert (row["op"], row["direction"], row["dtype"]) == ("stream_mix_add", "forward", "bfloat16")
    assert row["shape"] == [6, 4, 8] and row["threads_per_group"] == 64
    ours, theirs, reference = raced
    (a,) = theirs[1][0]
    assert theirs[0] is mx.abs and a.dtype == mx.float32 and 2 * a.nbytes == size
    assert bench.copy_gbps == pytest.approx(2 * a.nbytes / 1.5e3)  # read, and written
    assert ours[1] is reference[1] and len(ours[1]) == 2
    assert [(a.shape, a.dtype) for a in ours[1][0]][:2] == [
        ((6, 4, 8), mx.bfloat16),
        ((6, 8), mx.bfloat16),
    ]


def test_what_races(monkeypatch):
    """The op with its kernels and threads races the reference without any, in each direction."""
    for direction, results in (("forward", 1), ("backward", 4), ("forward+backward", 5)):
        with executor("stand-in"), monkeypatch.context() as patch:
            launches, run = [], launch.run

            def seen(*a, launches=launches, run=run):
                launches.append((a[0], a[4]))
                return run(*a)

            patch.setattr(launch, "run", seen)
            times = [[1.0]] * (2 if direction == "backward" else 3)
            _, row, raced = rows_of_fake(patch, times, direction)
            counts = []
            for f, sets in (raced[0], *raced[2:]):
                launches.clear()
                outputs = f(*sets[0])
                mx.eval(outputs)
                assert len(suite.as_list(outputs)) == results
                counts.append({name for name, _ in launches})
                assert {threads for name, threads in launches if "sum" not in name} <= {64}
        assert counts[0] and counts[1:] == [set()] * (len(raced) - 2)
        assert row["direction"] == direction
        assert (row["speedup_vs_compiled"] is None) == (direction == "backward")


def test_decode_and_its_stacks(monkeypatch):
    """Times are of a sublayer: of one stack by kernels, of a shorter one without."""
    shorten(monkeypatch)
    stacks = []

    def call_times(budget, f):
        stacks.append(timing.dispatches(f()))
        return [[3e-6, 6e-6, 30e-6], [2e-6, 8e-6, 10e-6]][len(stacks) - 1]

    monkeypatch.setattr(layers, "call_times", call_times)
    monkeypatch.setattr(layers, "gpu_time", lambda f, calls: 5e-6)
    with executor("stand-in"):
        row = layers.decode(1.0, "sublayer", (2, 2, 8))
    assert row["us"] == pytest.approx(2.0) and row["plain_us"] == pytest.approx(4.0)
    assert row["speedup_vs_compiled"] == pytest.approx(2.0)
    assert row["gpu_us"] == pytest.approx(2.5)
    assert stacks[0]["CustomKernel"] == stacks[1]["CustomKernel"] == 0  # the stand-in has none
    assert stacks[1].total() > stacks[0].total() / 3
