"""Nsight Compute's figures are read and joined with what was launched."""

import json

import mlx.core as mx
import pytest

from benchmarks import kernel_times

CASES = kernel_times.CASES
NAMES = {"ns": "gpu__time_duration.sum", "stall_barrier": "smsp__barrier.ratio"}
HEADS = '"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","smsp__barrier.ratio"'


def page(*kernels: tuple) -> str:
    lines = ["==PROF== Connected", HEADS, '"","","","","ns","inst"']
    for k, (name, groups, threads, ns) in enumerate(kernels):
        lines.append(f'"{k}","{name}","({threads}, 1, 1)","({groups}, 1, 1)","{ns}","n/a"')
    return "\n".join(lines)


def launched(name: str, groups: int, threads: int, kind: int) -> dict:
    specs = {"x": ((2, 4), mx.bfloat16), "y": None}
    row = kernel_times.about_launch(
        name, specs, {"out": ((2, 4), mx.float32)}, groups, threads, {"T": mx.bfloat16, "N": kind}
    )
    assert json.loads(json.dumps(row)) == row
    return row


def mark(run: int) -> tuple:
    return f"custom_kernel_{kernel_times.MARKER}", run, 1, 900


def test_second_run_counts_and_longest_name_wins():
    rows = [launched("mhc_pre", 8, 64, 1), launched("mhc_pre_backward_phi", 8, 64, 2)]
    rows += [launched("mhc_pre", 8, 64, 3)]
    kernels = [
        *(mark(1), ("custom_kernel_mhc_pre_ab", 8, 64, 1), mark(2)),
        ("custom_kernel_mhc_pre_backward_phi_ab", 8, 64, "2,000"),
        ("custom_kernel_mhc_pre_ab", 8, 64, 3000),
        ("custom_kernel_mhc_pre_cd", 8, 64, 4000),
    ]
    found = list(
        kernel_times.joined(CASES, kernel_times.profiled(page(*kernels), NAMES), [rows, rows])
    )
    assert [(r["template"]["N"], r["ns"]) for r in found] == [(2, 2000), (1, 3000), (3, 4000)]
    assert found[0]["op"] == kernel_times.CASES[0][0] and found[0]["stall_barrier"] is None
    assert found[0]["inputs"] == {"x": [[2, 4], "bfloat16"], "y": None}


@pytest.mark.parametrize("groups, threads", [(8, 32), (9, 64)])
def test_a_kernel_that_nothing_launched_is_refused(groups, threads):
    rows = [launched("mhc_pre", 8, 64, 1)]
    text = page(mark(2), ("custom_kernel_mhc_pre", groups, threads, 1))
    with pytest.raises(ValueError, match="no launch of .* is the kernel"):
        list(kernel_times.joined(CASES, kernel_times.profiled(text, NAMES), [rows, rows]))


def test_a_result_is_continued():
    left = [list(case) for case in json.loads(json.dumps(CASES[3:5]))]
    assert kernel_times.remaining({"left_out": left}) == CASES[3:5]
    assert kernel_times.remaining(None) == CASES
    assert len(set(CASES)) == len(CASES)


def test_a_case_that_fails_loses_no_other(monkeypatch, tmp_path):
    def measure(cases, names, folder):
        if cases == [CASES[2]]:
            raise OSError("ncu was killed")
        return [{"op": case[0]} for case in cases]

    monkeypatch.setattr(kernel_times.launch, "backend", lambda: "cuda")
    monkeypatch.setattr(kernel_times.shutil, "which", lambda name: name)
    monkeypatch.setattr(kernel_times, "metrics", lambda: NAMES)
    head = {"device": "a GPU", "mlx": "0", "date": "today", "command": "ncu"}
    monkeypatch.setattr(kernel_times, "heading", lambda names: head)
    monkeypatch.setattr(kernel_times, "measure", measure)
    file = tmp_path / "times.json"
    with pytest.raises(OSError, match="killed"):
        kernel_times.main(["--json", str(file)])
    report = json.loads(file.read_text())
    assert [row["op"] for row in report["kernels"]] == [case[0] for case in CASES[:2]]
    assert kernel_times.remaining(report) == CASES[2:]
    monkeypatch.setattr(kernel_times, "measure", lambda cases, *_: [{"op": cases[0][0]}])
    kernel_times.main(["--json", str(file)])
    report = json.loads(file.read_text())
    assert [row["op"] for row in report["kernels"]] == [case[0] for case in CASES]
    assert report["left_out"] == []


def test_it_needs_an_nvidia_gpu(capsys, monkeypatch):
    monkeypatch.setattr(kernel_times.launch, "backend", lambda: None)
    with pytest.raises(SystemExit):
        kernel_times.main([])
    assert "must run on an NVIDIA GPU" in capsys.readouterr().err
