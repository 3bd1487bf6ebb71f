"""Each operator makes the mistake of its name; a mutant of each kernel text is caught.

`python tests/mutation/run.py` judges the others.
"""

import math
import sys

import pytest

from mutation import bodies, choice, operators, run, sampler, survivors
from mutation.operators import ROOT, mutants, sources
from mutation.planted import PLANTED, planted

KERNEL = {  # operator: a text, and one of its mutants
    "drop_barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ";"),
    "move_bound": ("if (a < b) c();", "if (a <= b) c();"),
    "turn_comparison": ("if (a && b) c();", "if (a || b) c();"),
    "negate_condition": ("if constexpr (A || f(b)) c();", "if constexpr (!(A || f(b))) c();"),
    "drop_operand": ("s = a[i] * f<T>(b)[j] + c;", "s = a[i] + c;"),
    "turn_sum": ("s += a;", "s -= a;"),
    "turn_product": ("s = a / b;", "s = a * b;"),
    "swap_indices": ("s = a[i * N + j];", "s = a[j * N + i];"),
    "swap_arguments": ("f(a[i], b);", "f(b, a[i]);"),
    "drop_rounding": ("s = static_cast<float>(static_cast<T>(a));", "s = static_cast<float>((a));"),
    "drop_cast": ("s[i] = static_cast<T>(a);", "s[i] = (a);"),
    "narrow_product": ("p = x + size_t(t) * size_t(C);", "p = x + uint(t) * uint(C);"),
    "drop_reset": ("float s = 0.0f, t[2] = {};", "float s, t[2] = {};"),
    "less_precise": ("s = metal::precise::exp(a);", "s = metal::fast::exp(a);"),
    "wrong_stride": (
        "for (int i = 0; i < N; i += W) f(i);",
        "for (int i = 0; i < N; i += W + 1) f(i);",
    ),
    "drop_last_iteration": (
        "for (int i = 0; i < N; ++i) f(i);",
        "for (int i = 0; i < N - 1; ++i) f(i);",
    ),
    "drop_first_iteration": (
        "for (int i = a; i < N; ++i) f(i);",
        "for (int i = a + 1; i < N; ++i) f(i);",
    ),
    "change_constant": ("s = 2.0f * a;", "s = 3.0f * a;"),
    "negate_value": ("s = a ? b : -c;", "s = a ? b : c;"),
    "swap_extremes": ("s = metal::max(a, b);", "s = metal::min(a, b);"),
    "drop_statement": ("  s[i] = a;", ";"),
    "swap_branches": ("s = a ? b : c;", "s = a ? c : b;"),
}
PYTHON = {
    "drop_argument": ("f(a, b=c)", "f(a)"),
    "swap_arguments": ("a = f(b, c.d)", "a = f(c.d, b)"),
    "skip_call": ("a = b.astype(c)", "a = (b)"),
    "skip_statement": ("check(a, b)", "pass"),
    "turn_comparison": ("a = b not in c", "a = b in c"),
    "turn_arithmetic": ("a = b + c", "a = b - c"),
    "drop_operand": ("a = b and c", "a = ((c))"),
    "turn_condition": ("a = b and c", "a = b or c"),
    "drop_not": ("a = not b", "a = (b)"),
    "drop_minus": ("a = -b", "a = (b)"),
    "negate_condition": ("a = b if c else d", "a = b if (not (c)) else d"),
    "drop_raise": ("raise ValueError(f'{a}')", "pass"),
    "swap_results": ("def f():\n    return a, b", "return b, a"),
    "change_constant": ("def f(a=1.0): pass", "def f(a=1.5): pass"),
}


def lines(source: str, make, operator: str) -> list[str]:
    """What the lines of a text become by an operator."""
    found = operators.located("text", source, make(source))
    return [m.changed for m in found if m.operator == operator]


@pytest.mark.parametrize(
    "table, make", [(KERNEL, operators.of_kernel), (PYTHON, operators.of_python)]
)
def test_what_operators_make(table, make):
    for operator, (source, changed) in table.items():
        assert changed in lines(source, make, operator), operator


def test_a_product_that_fma_adds():
    made = lines("s = metal::fma(a[i], b, s);", operators.of_kernel, "turn_sum")
    assert made == ["s = metal::fma(-a[i], b, s);"]


def test_every_operator_has_a_place_in_our_files():
    words = {m.operator for p in sources() for m in mutants(p)}
    assert words <= {*KERNEL, *PYTHON} and len(words) > 25


def test_what_has_no_mutants():
    quiet = '"""Doc 1."""\nimport a\n\n\ndef f(a: int | None, b: list[1]) -> 2:\n    "Doc 2."\n'
    assert list(operators.of_python(quiet + "    return a\n")) == []
    assert list(operators.of_kernel("// a + 1\nstatic_assert(N + 1 < 2);\n#include <b>\n")) == []


def test_constants_options_and_flags():
    source = "f(a=True, how='sum', text='two words')\nb = 3"
    assert set(lines(source, operators.of_python, "change_constant")) == {
        "f(a=False, how='sum', text='two words')",
        "f(a=True, how='sum_', text='two words')",
        "b = 4",
    }


def test_a_sample_is_a_seeds_and_of_different_lines():
    first, again, other = (sampler.sample(seed, 40, "mhc_mlx/ops") for seed in (7, 7, 8))
    assert first == again != other
    assert len({(m.file, m.line) for m in first}) == 40
    for m in first:
        source = (ROOT / m.file).read_text()
        assert m.apply(source) != source
        assert m.text.startswith(" ".join(source.split("\n")[m.line - 1].split()))


def one_of(file: str, operator: str, word: str) -> operators.Mutant:
    """A mutant of a line that has the word in it."""
    return next(m for m in mutants(ROOT / file) if m.operator == operator and word in m.text)


SAMPLE = {  # text: the operator of its mutant
    "include/coefficient_gradient.h": "drop_operand",
    "include/coefficients.h": "swap_indices",
    "include/common.h": "move_bound",
    "include/cuda/matrices.h": "turn_sum",
    "include/cuda/phi_gradient_matrices.h": "drop_first_iteration",
    "include/cuda/phi_product_ring.h": "drop_last_iteration",
    "include/metal/matrices.h": "turn_product",
    "include/metal/phi_gradient_matrices.h": "drop_reset",
    "include/phi_gradient.h": "wrong_stride",
    "include/phi_product.h": "drop_first_iteration",
    "include/read_tile.h": "drop_last_iteration",
    "include/seam_channel.h": "drop_reset",
    "include/sinkhorn.h": "swap_arguments",
    "include/sinkhorn_backward.h": "drop_statement",
    "include/stream_dots.h": "turn_sum",
    "include/streams.h": "drop_statement",
    "mhc_fused.metal": "drop_barrier",
    "mhc_fused_backward.metal": "drop_operand",
    "mhc_fused_backward_wide.metal": "drop_barrier",
    "mhc_pre.metal": "drop_operand",
    "mhc_pre_backward_coefficients.metal": "negate_condition",
    "mhc_pre_backward_coefficients_norm.metal": "drop_operand",
    "mhc_pre_backward_generic.metal": "swap_indices",
    "mhc_pre_backward_phi.metal": "drop_operand",
    "mhc_pre_backward_projection.metal": "turn_product",
    "mhc_pre_partial_logits.metal": "negate_condition",
    "mhc_seam.metal": "swap_indices",
    "mhc_seam_backward.metal": "turn_sum",
    "mixing_matrix.metal": "turn_product",
    "mixing_matrix_backward.metal": "swap_branches",
    "sinkhorn_knopp.metal": "wrong_stride",
    "sinkhorn_knopp_backward.metal": "drop_statement",
    "stream_aggregate.metal": "drop_reset",
    "stream_aggregate_backward.metal": "turn_sum",
    "stream_mix_add.metal": "swap_indices",
    "sum_partials.metal": "drop_last_iteration",
}


@pytest.mark.parametrize("file, operator", SAMPLE.items())
def test_a_mutant_is_caught(file, operator, need):
    """A few of the fixed set, by the simulator on one case; `run.py bodies` judges all."""
    need("simulator")
    m = next(m for m in sampler.of_kernels(f"/{file}") if m.operator == operator)
    case = next(mistake.case for mistake in PLANTED if mistake.file == file)
    with planted(file, m.apply):
        assert bodies.objection(choice.backends(file)[0], case), f"{m} is not caught"


def test_every_body_has_mutants_in_the_fixed_set():
    """Also one that nobody named in SAMPLE: `run.py bodies` judges them."""
    fixed = {m.file for m in sampler.of_kernels()}
    assert {f"kernels/{p.name}" for p in sources() if p.suffix == ".metal"} <= fixed


def test_pythons_mutants_are_caught(tmp_path):
    test = "tests/models/test_layers.py::test_streams_in_and_out"
    worker = run.Worker(tmp_path / "tree", [test])
    for operator, word, outcome in (
        ("drop_raise", "must be 'mean', 'sum' or 'first'", "survived"),  # by this test
        ("turn_comparison", 'if how == "first"', "caught"),
        ("change_constant", "xf.mean(-2)", "caught"),
    ):
        result = worker.judge(one_of("mhc_mlx/streams.py", operator, word))
        assert result.outcome == outcome, result
        assert result.test.startswith(test) == (outcome == "caught"), result
    source = (ROOT / "mhc_mlx/streams.py").read_text()
    assert (tmp_path / "tree/mhc_mlx/streams.py").read_text() == source


def test_a_run_goes_on_where_its_report_ends(tmp_path, monkeypatch, capsys):
    """A run that time cuts short; the report keeps what another part has judged."""
    chosen, judged = sampler.sample(1, 5, "mhc_mlx/streams.py"), []

    class Worker:
        def __init__(self, folder, *judges):
            pass

        def judge(self, m):
            judged.append(m)
            return run.Result(str(m), m.key, "caught", "parity", 1.0)

    monkeypatch.setattr(run, "Worker", Worker)
    report = tmp_path / "report.json"

    def keys():
        return sorted(r.key for r in run.earlier(report))

    assert run.run(chosen[:2], 1, report, math.inf) == [] and judged == chosen[:2]
    assert run.run(chosen[2:], 2, report, -1.0) == chosen[2:]
    assert "caught 1 s: " in capsys.readouterr().out and keys() == sorted(m.key for m in judged)
    assert run.run(chosen, 2, report, math.inf) == [] and len(judged) == 5
    assert keys() == sorted(m.key for m in chosen)
    options = "run --only mhc_mlx/streams.py --count 2 --tests a_test --seconds=-1"
    monkeypatch.setattr(sys, "argv", ["run.py", *options.split()])
    with pytest.raises(SystemExit, match="2 of 2 are left: the same command goes on with them"):
        run.main()
    assert len(judged) == 5


@pytest.mark.parametrize("file", survivors.EQUIVALENT)
def test_survivors_are_mutants_of_our_files(file):
    found = [m for p in sources() if p.as_posix().endswith(f"/{file}") for m in mutants(p)]
    for row in survivors.EQUIVALENT[file]:
        assert any(survivors.makes(m, *row) for m in found), f"{row}: no such mutant"


def test_which_bodies_a_headers_mutant_is_in():
    def bodies(file, text):
        m = next(m for m in mutants(ROOT / "kernels" / file) if text in m.text)
        return choice.bodies_of(m)

    assert bodies("stream_mix_add.metal", "") == {"stream_mix_add"}
    assert bodies("include/sinkhorn_backward.h", "half_step(p, k") >= {"sinkhorn_knopp_backward"}
    assert "stream_mix_add" not in bodies("include/sinkhorn_backward.h", "half_step(p, k")
