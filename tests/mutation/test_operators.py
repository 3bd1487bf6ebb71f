"""Each operator makes the mistake of its name, and some fixed mutants are caught; CI runs no more.

`python tests/mutation/run.py` draws others and runs the tests on them.
"""

import re

import pytest
from cases import Case
from proof import check, executor, results

from mhc_mlx import launch, ops
from mutation import choice, operators, run, sampler, survivors
from mutation.operators import ROOT, mutants, sources

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


CASE = Case("stream_aggregate", (3,), 4, 64)
BODIES = [
    ("drop_barrier", "barrier", "race|nobody wrote"),
    ("drop_operand", "const auto row", "output|gradient|twice"),
    ("turn_sum", "acc[e] +=", "output 0"),
    ("wrong_stride", "int j = 0", "output 0"),
    ("narrow_product", "*(device", None),
    ("drop_last_iteration", "uint t =", "nobody w|output 0"),
]


@pytest.mark.parametrize("operator, word, reason", BODIES)
def test_a_bodys_mutant_is_caught(operator, word, reason, need, monkeypatch):
    need("simulator")
    from proof import simulator

    m = one_of("kernels/stream_aggregate.metal", operator, word)
    plain, path = launch._read, "stream_aggregate.metal"
    monkeypatch.setattr(launch, "_read", lambda f: m.apply(plain(f)) if f == path else plain(f))
    for f in (launch.text, launch._build):
        f.cache_clear()
    try:
        with executor("simulator"):
            check(CASE, results(ops.stream_aggregate, CASE, CASE.arrays()))
        said = None
    except (simulator.SimulationError, AssertionError) as error:
        said = str(error)
    finally:
        monkeypatch.undo()
        for f in (launch.text, launch._build):
            f.cache_clear()
    assert said is None if reason is None else said and re.search(reason, said), said


class Named:
    """A map that knows the tests of two files."""

    def __init__(self, *tests):
        self.tests = tests

    def of_mutant(self, m):
        return set(self.tests), {}

    def ordered(self, names, more):
        return [(name, 1.0) for name in self.tests]


def test_pythons_mutants_are_caught(tmp_path):
    known = Named("tests/models/test_layers.py::test_streams_in_and_out")
    worker = run.Worker(tmp_path / "tree", known, 60)
    for operator, word, outcome in (
        ("drop_raise", "must be 'mean', 'sum' or 'first'", "survived"),  # by this test
        ("turn_comparison", 'if how == "first"', "caught"),
        ("change_constant", "xf.mean(-2)", "caught"),
    ):
        result = worker.judge(one_of("mhc_mlx/streams.py", operator, word))
        assert result.outcome == outcome, result
        assert result.test.startswith(known.tests[0]) == (outcome == "caught"), result
    source = (ROOT / "mhc_mlx/streams.py").read_text()
    assert (tmp_path / "tree/mhc_mlx/streams.py").read_text() == source


def test_survivors_are_mutants_of_our_files():
    for key in survivors.EQUIVALENT:
        assert key in {m.key for m in mutants(ROOT / key[0])}, f"{key}: this line has gone"


def test_which_bodies_a_headers_mutant_is_in():
    def bodies(file, text):
        m = next(m for m in mutants(ROOT / "kernels" / file) if text in m.text)
        return choice.bodies_of(m)

    assert bodies("stream_mix_add.metal", "") == {"stream_mix_add"}
    assert bodies("include/sinkhorn_backward.h", "half_step(p, k") >= {"sinkhorn_knopp_backward"}
    assert "stream_mix_add" not in bodies("include/sinkhorn_backward.h", "half_step(p, k")
