"""The simulator itself, on bodies of a few lines: what it computes and what it refuses."""

import hashlib
import os
import stat

import mlx.core as mx
import numpy as np
import pytest
import simulate
from cases import Case
from mutation.planted import PLANTED, planted

from mhc_mlx import launch
from proof import executor, simulator

X = mx.arange(64, dtype=mx.float32) - 20.5
TID = "const uint tid = thread_position_in_threadgroup.x;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


@pytest.fixture
def run(need, monkeypatch):
    """run(body, ...) simulates a body that is not in kernels/."""
    need("simulator")
    plain, headers = launch.text, launch.included_files("mhc_pre.metal", "metal")

    def run(body, inputs=None, size=64, dtype=mx.float32, threads=64, groups=1, **template):
        monkeypatch.setattr(launch, "text", lambda f: body if f == "toy.metal" else plain(f))
        monkeypatch.setattr(launch, "included_files", lambda f, backend: headers)
        launch._build.cache_clear()
        given, made = {"x": X} if inputs is None else inputs, {"out": ((size,), dtype)}
        with executor("simulator"):
            return simulator.run("toy", given, made, groups, threads, template | {"T": dtype})[0]

    yield run
    launch._build.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rounding_is_that_of_mlx(run, dtype):
    """To nearest, ties to even, over magnitudes, subnormals, infinities and ties."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    ties = (np.arange(1024, dtype=np.uint32) << 15) | 0x3F800000
    values = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    values = np.where(np.isnan(values), np.float32(np.inf), values)
    body = TID + "for (uint i = tid; i < uint(x_shape[0]); i += 64) out[i] = static_cast<T>(x[i]);"
    got = run(body, {"x": mx.array(values)}, values.size, dtype)
    assert mx.array_equal(got, mx.array(values).astype(dtype))


def test_simd_sum_is_the_xor_tree(run):
    values = np.random.default_rng(1).normal(size=64).astype(np.float32)
    tree = values.reshape(2, 32)
    for o in (1, 2, 4, 8, 16):
        tree = tree + tree[:, np.arange(32) ^ o]
    got = run(TID + "out[tid] = simd_sum(x[tid]);", {"x": mx.array(values)})
    assert np.array_equal(np.array(got), tree.ravel())


def test_threadgroups_and_shuffles(run):
    body = TID + "const uint g = threadgroup_position_in_grid.x;\nout[g * 64 + tid] = "
    body += "simd_shuffle(x[tid], ushort(31 - tid % 32)) + static_cast<float>(g);"
    reverse = np.array(X).reshape(2, 32)[:, ::-1].ravel()
    got = run(body, size=128, groups=2)
    assert np.array_equal(np.array(got), np.concatenate([reverse, reverse + 1]))


# a and b are 8 x 8, two elements of a row in each lane; Metal makes of d(2.0f) a diagonal matrix
MATRICES = """const uint row = tid / 16 % 2 * 4 + tid / 2 % 4;
const uint column = tid / 8 % 2 * 4 + tid % 2 * 2;
const uint at = tid / 32 * 64 + row * 8 + column;
simdgroup_float8x8 a, b, d(2.0f), nobody_wrote;
for (int e = 0; e < 2; ++e) {
  a.thread_elements()[e] = x[at + e];
  b.thread_elements()[e] = x[at + 128 + e];
}
"""
STORE = "const simdgroup_float8x8 made = d;\n"
STORE += "for (int e = 0; e < 2; ++e) out[at + e] = made.thread_elements()[e];\n"


def product(run, body: str) -> tuple[np.ndarray, ...]:
    """a, b and what the body leaves in d, of each of two simdgroups."""
    a, b = x = np.random.default_rng(2).normal(size=(2, 2, 8, 8)).astype(np.float32)
    out = run(TID + MATRICES + body + STORE, {"x": mx.array(x)}, size=128)
    return a, b, np.array(out).reshape(a.shape)


def test_simdgroup_matrices_multiply(run):
    """d = a b + 2 I, then d = b d + a, as a chain of fused multiply-adds in order of k."""

    def multiply_add(a, b, c):
        for k in range(8):
            c = (a[:, :, k, None].astype(np.float64) * b[:, k, None] + c).astype(np.float32)
        return c

    body = "simdgroup_multiply_accumulate(d, a, b, d);\n"
    a, b, got = product(run, body + "simdgroup_multiply_accumulate(d, b, d, a);\n")
    want = multiply_add(b, multiply_add(a, b, 2 * np.eye(8, dtype=np.float32)), a)
    assert np.array_equal(got, want)


def test_a_simdgroup_matrix_that_nobody_wrote(run):
    *_, got = product(run, "simdgroup_multiply_accumulate(d, nobody_wrote, b, d);\n")
    assert np.isnan(got).all()


READ_NEXT = "out[tid] = s[(tid + 33) % 64];"
REFUSED = {
    "a race on any schedule": (
        "threadgroup float s[64];\ns[tid] = x[tid];\n" + BARRIER + READ_NEXT + "s[tid] = 0.0f;",
        "race",
    ),
    "memory of the threadgroup before": (
        "threadgroup float s[64];\nif (threadgroup_position_in_grid.x == 0) s[tid] = x[tid];\n"
        + BARRIER
        + "out[threadgroup_position_in_grid.x * 64 + tid] = s[tid];",
        "thread 0 of threadgroup 1 reads s[0], which nobody wrote at toy.metal:5",
    ),
    "past the end": (
        "out[tid] = x[tid + 1];",
        "thread 63 of threadgroup 0 reads out of bounds: x[64]",
    ),
    "before the start": ("out[tid] = x[int(tid) - 1];", "reads out of bounds: x[-1]"),
    "an output never written": ("if (tid < 63) out[tid] = x[tid];", "nobody writes out[63]"),
    "an output written twice": ("out[tid / 2] = x[tid];", "which thread 0 of threadgroup 0 wrote"),
    "an output read first": (
        "out[tid] = out[tid] + x[tid];",
        "reads the output out[0], which nobody",
    ),
    "an input written": ("device float* p = (device float*)x;\np[tid] = 0.0f;", "the input x[0]"),
    "a register nobody wrote": (
        "float v;\nif (tid % 2 == 0) v = x[tid];\nout[tid] = v * 1.0e30f;",
        None,
    ),
    "misaligned": (
        "struct alignas(8) Two { float a, b; };\nout[tid] = ((const device Two*)(x + tid % 2))->a;",
        "misaligned",
    ),
    "lanes at different simd operations": (
        "if (tid % 2 == 0) out[tid] = simd_sum(x[tid]);\nelse out[tid] = simd_sum(x[tid]);",
        "lanes at different simd operations",
    ),
    "a matrix product that a lane skips": (
        "simdgroup_float8x8 d(0.0f);\nif (tid != 5) simdgroup_multiply_accumulate(d, d, d, d);\n"
        "out[tid] = d.thread_elements()[0];",
        "thread 0 is at the simd operation at toy.metal:3, thread 5 has returned",
    ),
    "lanes at different matrix products": (
        "simdgroup_float8x8 d(0.0f);\nif (tid == 5) simdgroup_multiply_accumulate(d, d, d, d);\n"
        "else simdgroup_multiply_accumulate(d, d, d, d);\nout[tid] = d.thread_elements()[0];",
        "lanes at different simd operations: thread 0 is at the simd operation at toy.metal:4, "
        "thread 5 is at the simd operation at toy.metal:3",
    ),
    "a third element of a matrix": (
        "simdgroup_float8x8 d(0.0f);\nout[tid] = d.thread_elements()[2 + tid / 64];",
        "toy.metal:3: thread 0 of threadgroup 0: index out of the bounds of an array",
    ),
    "a barrier that some skip": (
        "if (tid < 32) " + BARRIER + "out[tid] = x[tid];",
        "not all threads reach one barrier",
    ),
    "too much threadgroup memory": (
        "threadgroup float s[8193];\ns[tid] = x[tid];\nout[tid] = s[tid];",
        "32772 bytes of threadgroup memory with s: Metal has 32768",
    ),
    "signed overflow": (
        "int big = 2147483647;\nout[tid] = static_cast<float>(big + int(tid)) + x[tid];",
        "signed overflow",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(run, what):
    body, reason = REFUSED[what]
    groups = 2 if "before" in what and "threadgroup" in what else 1
    if reason is None:  # not an error of its own: a value that no comparison overlooks
        poisoned = np.array(run(TID + body))[1::2]
        assert (np.abs(poisoned) > 1e30).all()
        return
    with pytest.raises(simulator.SimulationError) as error:
        run(TID + body, size=64 * groups, groups=groups)
    assert reason in str(error.value)


def test_limits_of_a_launch(run):
    many = {f"a{k}": mx.zeros(8) for k in range(31)}
    with pytest.raises(simulator.SimulationError, match="32 buffers, Metal has 31"):
        run(TID + "out[tid] = 0.0f;", many)
    for threads in (1056, 48):
        with pytest.raises(simulator.SimulationError, match=f"1 groups of {threads} threads"):
            run(TID + "out[tid] = 0.0f;", threads=threads)


def test_others_cannot_plant_libraries(need, tmp_path, monkeypatch):
    """Libraries are loaded from a folder of this user alone, or not at all."""
    need("simulator")
    planted, source = tmp_path / "planted", "int one() { return 1; }"
    name = hashlib.sha256(source.encode()).hexdigest()[:24]

    def build():
        monkeypatch.setattr(simulator, "CACHE", planted)
        return simulator.build(source, ["-std=c++20", "-fPIC"], source)

    def refused(why):
        (planted / f"{name}.so").touch()
        with pytest.raises(RuntimeError, match=rf"planted must be a folder that .* got {why}"):
            build()

    assert build().exists() and stat.S_IMODE(planted.stat().st_mode) == 0o700
    for mode in (0o777, 0o775):
        planted.chmod(mode)
        refused(f"one with mode {mode:o}")
    planted.chmod(0o755)  # as it was made before
    build()
    with monkeypatch.context() as other:
        mine = os.getuid()
        other.setattr(os, "getuid", lambda: mine + 1)
        refused(f"one of user {mine}")
    planted.rename(tmp_path / "elsewhere")
    planted.symlink_to(tmp_path / "elsewhere")
    refused("a link")
    planted.unlink()
    planted.touch()
    with pytest.raises(RuntimeError, match="got no folder"):
        build()


def test_debugging_command(need, capsys):
    """tests/simulate.py names the first wrong element and the line that stored it."""
    need("simulator")
    case = Case("mhc_static", (5,), 4, 64)
    assert simulate.simulate(case, False)
    assert "right, under every schedule" in capsys.readouterr().out
    wrong, broken = [m for m in PLANTED if m.body == "mhc_fused_backward"][:2]
    with planted(wrong.file, wrong.edit):
        assert not simulate.simulate(case, False)
    out = capsys.readouterr().out
    assert "WRONG dx[0, 0, 0] is" in out and "stored by thread 0 of threadgroup 0 at packs.h" in out
    assert "from mhc_fused_backward.metal:" in out
    with planted(broken.file, broken.edit):
        assert not simulate.simulate(case, False)
    assert (
        "BROKEN RULE mhc_fused_backward.metal, lock-step: nobody writes dx["
        in capsys.readouterr().out
    )
