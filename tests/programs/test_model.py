"""The model counts what bodies do, obeys its own equation, and names its sources."""

import functools
import json
from dataclasses import fields, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cases import Case
from proof import executor, results, simulator

from benchmarks import listings, model, predictions, ptx, published, threadgroup, what_if
from benchmarks.rates import DEVICES, H100, MACS, SOURCES
from mhc_mlx import PAPER, launch, ops
from mhc_mlx.conventions import ROW_FIRST
from mhc_mlx.devices import APPLE

ROOT = Path(__file__).parents[2]
TEXT = """
.visible .entry looped(
	.param .u64 looped_param_0,
	.param .align 4 .b8 looped_param_1[40]
)
{
	.reg .pred %p<4>;
	.reg .f32 %f<4>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<8>;
	.shared .align 4 .b8 sums[128];
	ld.param.u64 %rd1, [looped_param_0];
	ld.param.u32 %r1, [looped_param_1+8];
	mov.u32 %r2, %tid.x;
	mul.wide.u32 %rd2, %r2, 4;
	add.s64 %rd3, %rd1, %rd2;
	setp.gt.u32 %p1, %r2, 31;
	@%p1 bra $L_end;
	mov.u32 %r3, 0;
$L_loop:
	ld.global.f32 %f1, [%rd3];
	add.f32 %f2, %f2, %f1;
	add.s64 %rd3, %rd3, 128;
	add.s32 %r3, %r3, 1;
	setp.lt.u32 %p2, %r3, %r1;
	@%p2 bra $L_loop;
	st.shared.f32 [sums], %f2;
$L_end:
	bar.sync 0;
	ret;
}
"""


def unit(op: str) -> ptx.Cost:
    kind, _ = model.kind_of(op)
    clocks = 0.0 if kind == "free" else 1.0
    return ptx.Cost(kind, "issue", clocks, clocks, {"barrier": 10.0}.get(kind, 4.0 * clocks))


def run_text(turns: int, latency: float) -> threadgroup.Work:
    shape = np.array([1, 1, turns, *[0] * 7], np.uint32)
    arguments = [threadgroup.buffer_of("x", 0, 1 << 20, 0x3F800000), shape]
    group = threadgroup.Threadgroup(
        ptx.parse(TEXT), arguments, 64, 0, 1, unit, lambda *_: (False, latency), most_steps=10_000
    )
    return group.run()


@pytest.mark.parametrize("turns", [1, 5])
def test_a_text_is_counted(turns):
    """One of two warps takes the loop; both meet at the barrier."""
    work = run_text(turns, 100.0)
    assert work.operations["ld.global.f32"] == turns
    assert work.operations["setp.gt.u32"] == 2 and work.operations["st.shared.f32"] == 1
    assert work.instructions["barrier"] == 2
    assert work.loads == {"x": 4 * turns} and work.touched == {"x": 4 * turns}  # of 32 bytes
    assert not work.stores


def test_a_chain_waits_for_what_it_needs():
    """Each turn waits for its own load, in turn; the next load only for its address."""
    one, two, far = run_text(1, 100.0), run_text(2, 100.0), run_text(2, 300.0)
    assert 100 < one.chain < 150
    assert one.chain + 90 < two.chain < one.chain + 130
    assert far.chain == pytest.approx(two.chain + 2 * 200)


def test_a_threadgroup_that_takes_too_long_is_stopped():
    with pytest.raises(threadgroup.Stopped):
        run_text(5000, 1.0)


COUNTED = [
    Case("stream_mix_add", (8,), 4, 256, "bfloat16", per_token=(True, True)),
    Case("stream_aggregate", (8,), 4, 128, "float32", per_token=(True, False)),
    Case("mhc_pre", (16,), 4, 64, "bfloat16", PAPER, norm=False),
    Case("mhc_seam", (4,), 4, 1280, "bfloat16", per_token=(True, True)),
    Case("mhc_layer", (6,), 2, 64, "float32", ROW_FIRST),
]
STREAMS = ("x", "y", "dout", "out", "dx", "dy", "u", "du", "dx_out", "s", "ds")


@functools.cache
def simulated(case: Case, backend: str) -> list[tuple]:
    """What the simulator records of each launch for a backend, with the launch."""
    given = [a for a in case.arrays() if a is not None]
    launches = []
    form = "simulator, CUDA" if backend == "cuda" else "simulator"
    with executor(form), simulator.recording() as records, pytest.MonkeyPatch.context() as m:
        simulate = launch.run

        def spying(name, inputs, outputs, groups, threads, template, verbose=False):
            specs = {k: None if a is None else (a.shape, a.dtype) for k, a in inputs.items()}
            launches.append(launch.Launch(name, specs, outputs, groups, threads, template))
            return simulate(name, inputs, outputs, groups, threads, template, verbose)

        m.setattr(launch, "run", spying)
        results(getattr(ops, case.op), case, given)
    assert [record.name for record in records] == [call.name for call in launches]
    return list(zip(records, launches, strict=True))


@pytest.mark.parametrize("case", COUNTED, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "metal"])
def test_bytes_are_those_that_the_simulator_counts(case, backend, need):
    """Of streams: each body loads and stores all that the simulator sees it touch, and no more."""
    need("simulator")
    need({"cuda": "nvrtc", "metal": "optimiser"}[backend])
    rates = H100 if backend == "cuda" else MACS[0]
    for record, call in simulated(case, backend):
        counted = model.counts(call, rates)
        found = model.predict(call, rates, counted)
        specs = {**call.inputs, **call.outputs}
        read = written = 0
        for name, watched in record.buffers.items():
            if name not in STREAMS or not watched.array.size:
                continue
            size = model.size_of(specs[name])
            loads, stores = int(watched.loads.any()), int(watched.stores.any())
            assert bool(counted.loads.get(name)) == bool(loads), (record.name, name)
            assert bool(counted.stores.get(name)) == bool(stores), (record.name, name)
            if loads:
                assert counted.touched[name] * call.groups >= size
            if stores:
                assert counted.stores[name] * call.groups >= size * int(watched.stores.max())
            read, written = read + loads * size, written + stores * size
        assert read <= found.dram_read and written <= found.dram_written
        rest = sum(model.size_of(v) for k, v in specs.items() if v and k not in STREAMS)
        assert found.dram_read <= read + rest + 512 and found.dram_written <= written + rest + 512


@pytest.fixture(scope="module")
def seam():
    """A launch with what it counts on a Mac."""
    if reason := listings.missing("metal"):
        pytest.skip(f"optimiser: {reason}")
    shape = (512, 4, 1024)
    call = model.launches_of("mhc_seam", "forward", shape, "bfloat16", "metal")[0]
    return call, model.counts(call, MACS[2])


def test_the_largest_term_binds_and_is_the_time(seam):
    for rates in MACS:
        found = model.predict(seam[0], rates, seam[1])
        largest = max(v for k, v in found.terms.items() if k != "launch")
        assert found.us == pytest.approx(found.terms["launch"] + largest)
        assert found.terms[found.binds] == max(found.terms.values())


@pytest.mark.parametrize("field", ["read", "write", "l2", "last", "clock", "cores"])
def test_a_faster_device_is_not_slower(seam, field):
    rates, before = MACS[2], model.predict(seam[0], MACS[2], seam[1])
    for factor in (2, 8):
        more = replace(rates, **{field: getattr(rates, field) * factor})
        after = model.predict(seam[0], more, seam[1])
        assert after.us <= before.us
        before = after
    slow = replace(rates, read=rates.read / 50, write=rates.write / 50)
    assert model.predict(seam[0], slow, seam[1]).binds == "DRAM"
    late = replace(rates, launch=1.0)
    assert model.predict(seam[0], late, seam[1]).binds == "launch"


def test_more_tokens_take_longer(need):
    need("nvrtc")
    times = []
    for tokens in (64, 1024, 16384):
        calls = model.launches_of(
            "stream_aggregate", "forward", (tokens, 4, 256), "float32", "cuda"
        )
        times.append(model.predict(calls[0], H100).us)
    assert times == sorted(times)


def test_many_turns_are_scaled(need, monkeypatch):
    """A threadgroup of many turns counts the same, be it run to the end or scaled from fewer."""
    need("nvrtc")
    call = model.launches_of("mhc_pre_norm", "forward+backward", (8448, 4, 64), "bfloat16", "cuda")[
        1
    ]
    assert call.name == "mhc_pre_backward_coefficients_norm"
    monkeypatch.setattr(model, "STEPS", 400_000)
    whole = model.counts(call, H100)
    monkeypatch.setattr(model, "STEPS", 8_000)
    scaled = model.counts(call, H100)
    assert scaled.chain == pytest.approx(whole.chain, rel=0.1)
    total = sum(whole.instructions.values())
    assert sum(scaled.instructions.values()) == pytest.approx(total, rel=0.05)
    assert scaled.stores["dp"] == pytest.approx(whole.stores["dp"], rel=0.05)


def test_other_numbers_cut_other_launches():
    """They hold inside, and the old ones again outside."""
    case = ("mhc_pre", "forward", (80, 4, 256), "bfloat16", "metal")
    usual, before = model.launches_of(*case), APPLE.partial_logits_tokens
    with what_if.numbers({"partial_logits_tokens": before + 24}):
        other = model.launches_of(*case)
    assert usual[0].name == "mhc_pre" and other[0].name == "mhc_pre_partial_logits"
    assert APPLE.partial_logits_tokens == before and model.launches_of(*case) == usual
    with pytest.raises(ValueError, match="--set must name a number of a tiling but is TOKENS"):
        with what_if.numbers({"TOKENS": 3}):
            pass


def test_a_comparison_says_what_it_gains(capsys, need):
    need("optimiser")
    command = "--device|M4 Max|--op|mhc_pre|--shape|80,4,256|--set|partial_logits_tokens=80"
    what_if.main(command.split("|"))
    printed = capsys.readouterr().out
    assert "in use   mhc_pre " in printed and "changed  mhc_pre_partial_logits" in printed
    assert "% by the model on M4 Max" in printed


def test_a_row_of_ncu_is_the_launch_again():
    path = ROOT / "benchmarks/results/h200/kernel_times.json"
    row = json.loads(path.read_text())["kernels"][0]
    call = model.from_row(row)
    assert call.name == row["kernel"] and call.template["T"] == mx.bfloat16
    assert call.inputs["x"] == ((16384, 4, 4096), mx.bfloat16)


@pytest.mark.parametrize("rates", DEVICES.values(), ids=DEVICES.keys())
def test_every_rate_has_a_source(rates):
    own = {"name", "backend", "sources", "assumed"}
    assert set(rates.sources) == {f.name for f in fields(rates)} - own
    assert set(rates.sources.values()) <= set(SOURCES)
    assert set(rates.assumed) <= set(rates.sources)
    assert all(url.startswith("https://") for url in SOURCES.values())
    assert {model.kind_of(op)[0] for op in ("add.f32", "add.s64", "bar.sync")} <= set(rates.units)


def test_published_times():
    assert len(published.TIMES) >= 6 and sum(t.aside for t in published.TIMES) == 3
    for time in published.TIMES:
        assert time.chip in published.CHIPS and time.url.startswith("https://") and time.us > 0


def test_the_page_has_the_tables_of_the_result():
    page = (ROOT / "docs/model.md").read_text()
    report = json.loads((ROOT / "benchmarks/results/model.json").read_text())
    assert predictions.write(page, report) == page
    for name in predictions.sections(report):
        assert predictions.MARK.format(name=name) in page, name


def test_the_checks_hold():
    """On NVIDIA GPUs the median error is at most 25 %, and less than that of bytes alone."""
    report = json.loads((ROOT / "benchmarks/results/model.json").read_text())
    for name in ("h100", "h200"):
        rows = report[name]
        ours, alone = (
            np.median(np.abs(predictions.errors(rows, "measured_us", key)))
            for key in ("us", "bytes_us")
        )
        assert ours <= 0.25 and ours < alone, (name, ours, alone)
