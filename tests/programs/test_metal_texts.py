"""tests/metal_texts.py writes what Apple's compiler is to take, calls it, and reads its results."""

import json
import re
import stat
import sys
from pathlib import Path

import cases
import metal_texts
import mlx.core as mx
import pytest
from proof import simulator

from mhc_mlx.device_report import shapes
from mhc_mlx.device_report.shapes import Case
from mhc_mlx.device_report.variants import find_variants

CASES: list[Case] = [
    ("single_pass", "inference", (1, 4, 32), "bfloat16"),
    ("stream_aggregate", "forward+backward", (3, 4, 32), "float32"),
]


@pytest.fixture
def written(tmp_path) -> Path:
    assert metal_texts.write(tmp_path / "texts", find_variants(CASES, "metal")) == 4
    return tmp_path / "texts"


def test_the_texts_are_those_of_mlx(written):
    index = json.loads((written / "index.json").read_text())
    texts = {p.stem: p.read_text() for p in written.glob("*.metal")}
    assert index.keys() == texts.keys()
    assert {row["body"] for row in index.values()} == {
        *("mhc_pre_partial_logits", "mhc_seam", "stream_aggregate", "stream_aggregate_backward")
    }
    for variant in find_variants(CASES, "metal"):
        call = variant.launch
        arrays = {k: v and mx.zeros(*v) for k, v in call.inputs.items()}
        assert metal_texts.PREFIX + simulator.generated(call.name, arrays, *call[2:]) in (
            texts.values()
        )


def test_write_has_the_main_shapes_and_the_tests_cases(tmp_path, monkeypatch, capsys):
    few = [case for case in cases.CASES if case.op == "stream_mix_add"][:2]
    for name, value in {"CASES": few, "RINGED": [], "UNUSUAL": []}.items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(shapes, "variant_cases", lambda kernels: CASES[:1])
    metal_texts.main(["write", str(tmp_path)])
    index = json.loads((tmp_path / "index.json").read_text())
    bodies = {row["body"] for row in index.values()}
    assert bodies >= {"mhc_pre_partial_logits", "mhc_seam", "stream_mix_add", "mhc_fused_backward"}
    assert {row["direction"] for row in index.values()} >= {"inference", str(few[0])}
    assert f"{len(index)} texts of " in capsys.readouterr().out


def test_the_prefix_is_what_mlx_puts_before_a_text():
    """The header of the installed mlx, and each that it includes, is there; together they define
    what the texts take from MLX."""
    (first,) = re.findall('"(.*)"', metal_texts.PREFIX)
    seen, more = {}, [first]
    while more:
        name = more.pop()
        seen[name] = (metal_texts.INCLUDE / name).read_text()
        more += [k for k in re.findall('#include "(.*)"', seen[name]) if k not in seen]
    text = "".join(seen.values())
    for what in ("#include <metal_stdlib>", "#include <metal_math>", "using namespace metal;"):
        assert what in text
    assert "typedef bfloat bfloat16_t;" in text and "typedef half float16_t;" in text


XCRUN = """#!{python}
import pathlib, re, sys
arguments = sys.argv[1:]
assert arguments[:5] == ["-sdk", "macosx", "metal", "-x", "metal"], arguments
assert "-Werror" in arguments and "-isystem" in arguments
standard, text, result = arguments[5].removeprefix("-std=metal"), arguments[-3], arguments[-1]
if standard not in ("3.1", "4.0"):
    sys.exit("error: invalid value")
if standard == "4.0" and "stream_aggregate_backward" in text:
    sys.exit(text + ":7:1: error: no member named 'foo'")
name = pathlib.Path(text).stem
array = "  %a = alloca [4 x float], align 4\\n" * ("partial" in name)
more = "define internal fastcc void @_ZN3mhc4loadE() {{\\n}}\\n" * ("seam" in name)
entry = "define void @custom_kernel_" + name.split("-")[0] + "(ptr addrspace(1) %0) {{\\n"
pathlib.Path(result).write_text(entry + array + "  ret void\\n}}\\n" + more)
"""


@pytest.fixture
def xcrun(tmp_path, monkeypatch):
    tool = tmp_path / "bin/xcrun"
    tool.parent.mkdir()
    tool.write_text(XCRUN.format(python=sys.executable))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tool.parent))


def test_a_compiler_is_called_and_its_results_are_read(written, xcrun, capsys):
    folder = str(written)
    metal_texts.main(["compile", folder, "--standard", "3.1", "--if-known", "4.1"])
    told = capsys.readouterr().out
    assert "Metal 3.1: 4 of 4 texts compile" in told and "Metal 4.1: this compiler has it n" in told
    assert (written / "failed.txt").read_text() == ""
    with pytest.raises(SystemExit) as ended:
        metal_texts.main(["compile", folder, "--standard", "4.0", "--standard", "3.2"])
    first, second = str(ended.value.code).split("\n\n")
    assert re.match(r"4.0: stream_aggregate_backward-\w+.metal fails\n.*no member named 'f", first)
    assert second == "3.2: an empty kernel fails\nerror: invalid value"
    assert (written / "failed.txt").read_text() == ended.value.code
    with pytest.raises(SystemExit) as ended:
        metal_texts.main(["check", folder])
    lines = sorted(re.sub(r"-\w+", "", str(ended.value.code)).split("\n\n"))
    assert lines == [
        f"{version}/{what}"
        for version in ("3.1", "4.0")
        for what in (
            "mhc_pre_partial_logits.ll: array [4 x float]",
            "mhc_seam.ll: function load",
        )
    ]
    assert "3 of 7 kernels are one function without arrays" in capsys.readouterr().out


def test_wrong_commands_end_at_once(tmp_path, capsys):
    for argv, message in (
        (["compile", str(tmp_path)], "--standard must come with compile"),
        (["check", str(tmp_path), "--standard", "3.1"], "--standard must come with compile"),
        (["compile", str(tmp_path), "--standard", "3.1"], "must have the files that `write` makes"),
        (["check", str(tmp_path)], "must have .ll files but has none"),
    ):
        with pytest.raises(SystemExit) as ended:
            metal_texts.main(argv)
        assert ended.value.code == 2 and message in capsys.readouterr().err
