"""The exact Metal text of every body, parsed with Metal's address spaces and no GPU."""

import functools
import re
from pathlib import Path

import mlx.core as mx
import pytest
from cases import CASES

from mhc_mlx import ops
from proof import executor, results, tracing


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_metal(case, need):
    need("dialect")
    with executor("dialect"):
        results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])


@functools.cache
def source(dtype: mx.Dtype) -> str:
    """mhc_fused with gates in the constant address space, x and weight in device."""
    x, gate, mix, weight = mx.zeros((3, 4, 16), dtype), mx.zeros(4), mx.zeros((4, 4)), mx.ones(16)
    forward = functools.partial(ops.mhc_static, verbose=True, differentiable=False)
    return tracing.metal_source(forward, x, gate, gate, mix, weight)


BODY = "const uint tid = thread_position_in_threadgroup.x;"  # its first statement
# The first function of include/common.h that is no template.
HEADER = "METAL_FUNC float sigmoid(float v) {"
LOAD = "mhc::load_floats<VEC>(w, mhc::at(weight, c), weight_aligned);"
STORE = "static_cast<T>(MIX ?"
SPACE = "needs an address space"
MATRIX = BODY + " simdgroup_float8x8 m(0.0f); const simdgroup_float8x8 k = m; "
MULTIPLY = MATRIX + "simdgroup_multiply_accumulate"
# what is put in place of what, in the body for which dtype, and what is said of it
MISTAKES = {
    "threadgroup for thread": (LOAD, LOAD.replace("(w,", "(pre,"), "no matching function"),
    "device for thread": (BODY, BODY + " thread const T* q = x;", "'const device bfloat16_t *'"),
    "constant for device": (BODY, BODY + " const device float* q = H_pre;", "'const constant"),
    "threadgroup in a helper": (HEADER, HEADER + " threadgroup float s[4];", "address space"),
    "cast across spaces": (BODY, BODY + " auto q = (thread T*)out;", "C-style cast"),
    "parameter": (HEADER, "inline float f(const float* p) { return *p; } " + HEADER, SPACE),
    "template parameter": (
        HEADER,
        "template <typename T> inline T f(T& p) { return p; } " + HEADER,
        SPACE,
    ),
    "array parameter": (HEADER, "inline float f(float p[4]) { return p[0]; } " + HEADER, SPACE),
    "result": (
        HEADER,
        "template <typename T> inline const T* f(const device T* p); " + HEADER,
        SPACE,
    ),
    "variable": (BODY, BODY + " const T* q = nullptr;", SPACE),
    "cast": (BODY, BODY + " auto q = (T*)nullptr;", SPACE),
    "write to an input": (BODY, BODY + " x[0] = x[1];", "no viable overloaded '='"),
    "write to a constant": (BODY, BODY + " H_pre[0] = 0.0f;", "is not assignable"),
    "float to bfloat": (STORE, "(MIX ?", "('bfloat' vs. 'float')"),
    "zero to bfloat": (BODY, BODY + " T zero = 0.0f;", "no viable conversion"),
    "half to bfloat": (BODY, BODY + " half h = 1.0h; T b = h;", "no viable conversion"),
    "float to half": (BODY, BODY + " half h = H_pre[0];", "loses floating-point precision"),
    "float to int": (BODY, BODY + " int i = H_pre[0];", "into integer"),
    "int to float": (BODY, BODY + " float f = x_shape[0];", "may lose precision"),
    "double literal": (
        "float squares[1] = {};",
        "float squares[1] = {0.0};",
        "double precision constant",
    ),
    "double": (BODY, BODY + " double d = 1.0f;", "use of type 'double'"),
    "float of a helper to bfloat": (
        "const float f = mhc::float_of(v, e + q);",
        "const T f = mhc::float_of(v, e + q);",
        "no viable conversion",
    ),
    "invented name": (BODY, BODY + " metal::exact::exp(1.0f);", "no member named 'exact' in"),
    "overload that Metal lacks": (BODY, BODY + ' simd_sum("x");', "no matching function"),
    "device for a matrix": (BODY, MULTIPLY + "(m, H_res, m, m);", "no matching function"),
    "float for a matrix": (BODY, MULTIPLY + "(m, m, m, 0.0f);", "no matching function"),
    "zero to a matrix": (BODY, BODY + " simdgroup_float8x8 z = 0.0f;", "no viable conversion"),
    "product in a constant": (BODY, MULTIPLY + "(k, m, m, m);", "no matching function"),
    "product in threadgroup": (
        BODY,
        BODY + "\nthreadgroup simdgroup_float8x8 s[1];\n simdgroup_multiply_accumulate(s[0], s[0], "
        "s[0], s[0]);",
        "no matching function",
    ),
    "word that a matrix lacks": (BODY, MATRIX + "m.load(x);", "no member named 'load'"),
    "element of a constant": (BODY, MATRIX + "k.thread_elements()[0] = 0.0f;", "not assignable"),
    "swizzle of a matrix": (BODY, MATRIX + "m.thread_elements().x = 0.0f;", "member reference"),
    "reference to an element": (
        BODY,
        MATRIX + "thread float& e = m.thread_elements()[0];",
        "cannot bind to vector element",
    ),
    "matrix parameter": (
        HEADER,
        "inline void f(simdgroup_float8x8& m) { m.thread_elements()[0] = 0.0f; } " + HEADER,
        SPACE,
    ),
    "matrix in a struct": (
        HEADER,
        "struct Tile { simdgroup_float8x8 m[4]; }; " + HEADER,
        "a matrix in a struct",
    ),
    "member function": (
        HEADER,
        "struct S { float v; inline float f() const { return v; } }; " + HEADER,
        "a member function whose object",
    ),
    "early return": (BODY, BODY + " if (tid > 64) return;", "an early return"),
    "lambda": (BODY, BODY + " auto f = [](float v) { return v; };", "a lambda"),
    "goto": (BODY, BODY + " goto end; end:;", "goto"),
    "assembly": (BODY, BODY + ' asm volatile("");', "inline assembly"),
    "recursion": (HEADER, HEADER + " if (v > 9.0f) return sigmoid(9.0f);", "may call itself"),
    "mutual recursion": (
        HEADER,
        "inline float f(float); inline float g(float v) { return f(v); } "
        "inline float f(float v) { return g(v); } " + HEADER,
        "f may call itself",
    ),
    "new": (BODY, BODY + " auto q = new float[4];", "'default new' is not supported"),
    "pointer to a function": (BODY, BODY + " auto q = &mhc::sigmoid;", "function"),
    "std": (BODY, BODY + " int m = std::max(1, 2);", "undeclared identifier 'std'"),
    "CUDA word": (HEADER, "__device__ " + HEADER, "unknown type name '__device__'"),
    "preprocessor": (BODY, "\n#if N > 4\n#endif\n" + BODY, "if constexpr"),
    "not ASCII": (BODY, BODY + " // \u00b5s", "not ASCII"),
    "0-d input": ("const constant float* H_pre [[", "const constant float& H_pre [[", "is 0-d"),
    "attribute": (BODY, BODY + " uint grid_size = 1;", "MLX pass grid_size"),
    "attribute within a word": (BODY, BODY + " uint my_grid_size_2 = 1;", "MLX pass grid_size"),
    "shape of an input": (BODY, BODY + " uint max_shape = 1;", "MLX pass x_shape"),
    "argument not asked for": (
        "uint3 threadgroups_per_grid [[",
        "uint3 grid_size [[grid_size]],\n  uint3 threadgroups_per_grid [[",
        "some longer word for grid_size",
    ),
    "wrong for one dtype": (BODY, BODY + " T::none();", "no member named 'none' in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake, need):
    need("dialect")
    from proof import dialect

    old, new, reason = MISTAKES[mistake]
    assert source(mx.bfloat16).count(old) == 1
    found = dialect.refusals(source(mx.bfloat16).replace(old, new))
    assert any(reason in f for f in found), found


def test_an_implicit_float_to_half_is_refused(need):
    """What every body puts into a pack before it stores it, where T is half."""
    need("dialect")
    from proof import dialect

    found = dialect.refusals(source(mx.float16).replace(STORE, "(MIX ?"))
    assert len(found) == 1 and "('half' vs. 'float')" in found[0], found


def test_simdgroup_matrices_are_accepted(need):
    need("dialect")
    from proof import dialect

    helper = """template <int K>
inline void accumulate(thread simdgroup_float8x8& d, const thread simdgroup_float8x8 (&a)[K]) {
  for (int k = 0; k < K; ++k) simdgroup_multiply_accumulate(d, a[k], a[K - 1 - k], d);
}
"""
    use = """ simdgroup_float8x8 a[2], d(0.0f);
  for (int k = 0; k < 2; ++k) a[k] = simdgroup_float8x8(0.0f);
  a[0].thread_elements()[1] = static_cast<float>(x[tid]);
  mhc::accumulate(d, a);
  const simdgroup_float8x8 made = d;
  thread auto& elements = d.thread_elements();
  elements[0] += made.thread_elements()[1];
"""
    text = source(mx.bfloat16).replace(HEADER, helper + HEADER).replace(BODY, BODY + use)
    assert dialect.refusals(text) == []


def test_text_without_fence_is_the_same(need):
    need("dialect")
    from proof import dialect

    text = re.findall(r"```\n(.*?)```", source(mx.float16), re.S)[-1]
    assert dialect.refusals(text) == []
    assert dialect.refusals(text.replace(STORE, "(MIX ?"))


def test_stub_names_are_in_the_kernels_of_mlx(need):
    """What metal.hpp declares is in the file of MLX's kernels that it names beside it."""
    need("dialect")
    from proof import dialect

    folder = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
    if not folder.is_dir():
        pytest.skip("this MLX has no Metal headers")
    lines = dialect.STUB.read_text().split("\n")

    def names(cursor, space=""):
        for c in cursor.get_children():
            if c.kind.name in ("NAMESPACE", "ENUM_DECL") and c.spelling != "of_checker":
                yield from names(c, f"{c.spelling}::")
            if c.kind.name.endswith("_DECL"):
                yield space + c.spelling, lines[c.location.line - 1].split("  // ")[-1]

    found = dict(names(dialect.parse("").cursor))
    assert {"bfloat", "mem_flags::mem_threadgroup", "precise::exp"} <= set(found)
    for name, file in found.items():
        assert re.search(rf"\b{name}\b", (folder / file).read_text()), f"{name} is not in {file}"
