"""Whether an input may be loaded in packs is decided by that input: each is shifted alone.

A body asks `aligned` of several inputs; where the answer for one decides for another, both shifted
together do not show it. Each launch here runs once more for each of its inputs and shift, of one
element and of 8 bytes, with the same bits.
"""

import ctypes
import functools
import re

import numpy as np
import pytest
from cases import DEEPSEEK_V4, PAPER, Case
from proof import check, executor, results, simulator

from mhc_mlx import launch, ops
from mhc_mlx.launch import included_files

BACKENDS = ("metal", "cuda")
EACH = {"per_token": (True, True)}
# Per form: launches, and how many threads they have; between them they ask of every input.
CALLS = {
    "simulator": [
        (Case("mhc_static", (2,), 4, 8, "bfloat16"), None),
        (Case("mhc_static", (2,), 4, 8), None),
        (Case("stream_mix_add", (2,), 4, 8, "bfloat16", **EACH), None),
        (Case("stream_mix_add", (2,), 4, 8, "bfloat16", **EACH, weights="bfloat16"), None),
        (Case("stream_aggregate", (2,), 4, 8, "bfloat16"), None),
        (Case("gate_mix", (2,), 4, 8, "bfloat16"), None),
        (Case("gate_mix", (2,), 4, 8), None),
        (Case("stream_norm", (2,), 4, 8, "bfloat16"), None),
        (Case("stream_norm", (2,), 4, 8), None),
        (Case("mhc_pre", (7,), 4, 8, convention=PAPER), None),
        (Case("mhc_pre", (7,), 4, 8, "bfloat16", PAPER, weights="bfloat16"), None),
        (Case("mhc_pre", (7,), 4, 8, "bfloat16", PAPER, norm=False), None),
        (Case("mhc_pre", (3,), 4, 1280, "bfloat16", PAPER), 96),  # u is made twice
        (Case("mhc_pre", (3,), 12, 8, "float16", PAPER), None),
        (Case("mhc_single_pass", (2,), 4, 8, "bfloat16", DEEPSEEK_V4), None),  # partial logits
        (Case("mhc_seam", (2,), 4, 8, **EACH), None),
        (Case("mhc_seam", (2,), 4, 8, "bfloat16", **EACH), None),
    ],
    "simulator, CUDA": [
        (Case("mhc_pre", (7,), 4, 64, "bfloat16", PAPER), None),
        (Case("mhc_pre", (2,), 4, 8, convention=PAPER), None),
    ],
}


def function_arguments(text: str) -> list[str]:
    """What stands in the parentheses that text begins with, cut at its commas."""
    depth, arguments, begin = 0, [], 1
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 or (depth == 1 and character == ","):
            arguments.append(text[begin:i].strip())
            begin = i + 1
        if depth == 0:
            return arguments
    raise ValueError(text[:80])


def asked(body: str, backend: str) -> set[str]:
    """The inputs of which a body asks `is_aligned`, itself or through a function of its headers."""
    text = launch.text(f"{body}.metal")
    found = re.findall(r"\bis_aligned<[^;]*?>\((\w+)\)", text)
    for header in included_files(f"{body}.metal", backend):
        functions = re.split(r"\b(?:METAL_FUNC|inline)\b[^;{]*?(?=\b\w+\()", launch.text(header))
        for function in functions[1:]:
            name, rest = re.match(r"(\w+)(\(.*)", function, re.S).groups()
            names = [re.search(r"\w*$", a.strip()).group() for a in function_arguments(rest)]
            for parameter in re.findall(r"\bis_aligned<[^;]*?>\((\w+)\)", rest):
                for call in re.finditer(rf"\bmhc::{name}\b(?:<[^;()]*>)?(?=\()", text):
                    argument = function_arguments(text[call.end() :])[names.index(parameter)]
                    found.append(re.match(r"\w+", argument).group())
    return set(found)


def pairs(form: str) -> set[tuple[str, str]]:
    backend = "cuda" if form.endswith("CUDA") else "metal"
    bodies = sorted(p.stem for p in launch._FOLDERS[1].glob("*.metal"))
    return {(body, name) for body in bodies for name in asked(body, backend)}


def files(body: str, backend: str) -> tuple[str, ...]:
    """What a body includes; a backend's packs.h defines the same accesses for all bodies."""
    return tuple(f for f in included_files(f"{body}.metal", backend) if not f.endswith("packs.h"))


def run(form: str, calls) -> set:
    """The inputs that were shifted alone; raises where the results of a launch depend on it."""
    with executor(form), simulator.shifting() as shifted:
        for case, threads in calls:
            f = functools.partial(getattr(ops, case.op), threads_per_group=threads)
            check(case, results(f, case, [a for a in case.arrays() if a is not None]))
    return shifted


def test_what_is_asked():
    """Eleven bodies and more, of several inputs each, and through helpers."""
    metal, cuda = pairs("simulator"), pairs("simulator, CUDA")
    assert metal >= {
        *(("stream_mix_add", k) for k in ("x", "y", "h_post", "h_res")),
        *(("mhc_fused_backward", k) for k in ("x", "y", "dout", "weight")),
        *(("mhc_pre_backward_generic", k) for k in ("x", "phi", "du", "dx_out", "weight")),
    }
    assert cuda - metal == {("mhc_pre_backward_projection", "dp")}
    assert metal - cuda == set() and len({body for body, _ in metal}) >= 12


@pytest.mark.parametrize("form", CALLS)
def test_an_input_decides_for_itself_alone(form, need):
    """Every pair of a body and an input of which it asks was shifted, by an element and 8 bytes."""
    need(form)
    shifted = run(form, CALLS[form])
    must = pairs(form)
    if form != "simulator":  # the others have the same text
        own = {b for b, _ in must if len({files(b, k) for k in BACKENDS}) > 1}
        must = {pair for pair in must if pair[0] in own}
        assert {"mhc_pre", "mhc_pre_partial_logits", "mhc_pre_backward_projection"} <= own
    steps = {pair: {s for *p, s in shifted if tuple(p) == pair} for pair in must}
    assert all(8 in s and s & {2, 4} for s in steps.values()), steps


MISTAKES = [
    ("mhc_fused_backward", " && mhc::is_aligned<VEC>(dout)", "", CALLS["simulator"][0]),
    ("mhc_seam_backward", " && mhc::is_aligned<VEC>(du)", "", CALLS["simulator"][-1]),
    ("stream_mix_add", "+ c, y_aligned)", "+ c, x_aligned)", CALLS["simulator"][2]),
    ("gate_mix", " && mhc::is_aligned<VEC>(s)", "", CALLS["simulator"][5]),
    ("stream_norm_backward", " && mhc::is_aligned<VEC>(ds)", "", CALLS["simulator"][7]),
]


@pytest.mark.parametrize("body, old, new, call", MISTAKES, ids=lambda a: str(a)[:24])
def test_an_input_that_decides_for_another_is_caught(body, old, new, call, need, monkeypatch):
    need("simulator")
    text = launch.text

    def mistaken(file: str) -> str:
        if file != f"{body}.metal":
            return text(file)
        assert old in text(file)
        return text(file).replace(old, new, 1)

    monkeypatch.setattr(launch, "text", mistaken)
    launch._build.cache_clear()
    with pytest.raises(simulator.SimulationError, match="misaligned|differs"):
        run("simulator", [call])
    launch._build.cache_clear()


# ---- packs of inputs of fewer than 8 elements, which MLX puts in Metal's constant address space

SMALL = """
#undef ONE_ADDRESS_SPACE
#define constant volatile  // so a pointer to it has a type of its own
{packs}
template <typename T, int VEC> int different(const T* p) {{
  const auto in_device = mhc::load_aligned<VEC>(p);
  const auto in_constant = mhc::load_aligned<VEC>((const volatile T*)p);
  int count = 0;
  for (int e = 0; e < VEC; ++e) count += mhc::element(in_device, e) != mhc::element(in_constant, e);
  return count;
}}
extern "C" int floats(const float* p) {{
  return different<float, 1>(p) + different<float, 2>(p) + different<float, 4>(p);
}}
extern "C" int halves(const short* p) {{
  return different<short, 1>(p) + different<short, 2>(p) + different<short, 4>(p);
}}
"""


def different(packs: str) -> list[int]:
    """How many elements of packs of 1, 2 and 4 differ from those that lie in device memory."""
    source = '#include "body.hpp"' + SMALL.format(packs=re.sub(r"\b(device|thread)\b", "", packs))
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", f"-I{simulator.HERE}"]
    library = ctypes.CDLL(str(simulator.build(source, flags, source)), mode=ctypes.RTLD_LOCAL)
    arrays = np.arange(1, 9, dtype=np.float32), np.arange(1, 9, dtype=np.int16)
    calls = zip((library.floats, library.halves), arrays, strict=True)
    return [f(ctypes.c_void_p(a.ctypes.data)) for f, a in calls]


def test_packs_of_small_inputs(need):
    need("simulator")
    assert different(launch.text("include/metal/packs.h")) == [0, 0]


def test_another_element_of_a_small_input_is_seen(need):
    need("simulator")
    packs, loop = launch.text("include/metal/packs.h"), "++e) set_element(pack, e, T(p[e]))"
    assert packs.count(loop) == 1
    assert different(packs.replace(loop, loop.replace("p[e]", "p[0]"))) == [4, 4]
