"""A toy op by ONBOARDING's list "Add an op", in a copy of the tree: nothing but the places of that
list is touched, every check of an op passes, and each piece that is left out is named by one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BODY = """// stream_scale: out[j] = h[j] x[j].
//
// in   x [tokens, N, C] T; h [N] any float
// out  out [tokens, N, C] T
// owners  A threadgroup takes tokens in turn, a thread VEC neighbours of all streams.
// template  T, N, VEC, THREADS
// grid  any number of threadgroups
#include "common.h"
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const bool x_aligned = mhc::is_aligned<VEC>(x);
for (uint t = threadgroup_position_in_grid.x; t < uint(x_shape[0]); t += threadgroups_per_grid.x) {
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    for (int j = 0; j < N; ++j) {
      const size_t at = size_t(t) * size_t(N * C) + size_t(j * C + c);
      mhc::Pack<T, VEC> v = mhc::load<T, VEC>(x + at, x_aligned);
      const float scale = static_cast<float>(h[j]);
      UNROLL_FOR (int e = 0; e < VEC; ++e)
        mhc::set_element(v, e, static_cast<T>(scale * mhc::float_of(v, e)));
      mhc::store(out + at, v);
    }
  }
}
"""
BACKWARD = """// stream_scale_backward: dx[j] = h[j] dout[j] and dh[j] = sum_c dout[j] x[j].
//
// in   x [tokens, N, C] T; h [N] any float; dout [tokens, N, C] T
// out  dx [tokens, N, C] T; partial [threadgroups, N] float: dh's sum over these tokens
// owners  A threadgroup takes tokens in turn, a thread VEC neighbours of all streams.
// template  T, N, VEC, THREADS
// grid  any number of threadgroups
#include "common.h"
threadgroup float scratch[N * THREADS / 32];
const uint tid = thread_position_in_threadgroup.x;
const int C = x_shape[2];
const bool x_aligned = mhc::is_aligned<VEC>(x);
const bool dout_aligned = mhc::is_aligned<VEC>(dout);
float dh[N] = {};
for (uint t = threadgroup_position_in_grid.x; t < uint(x_shape[0]); t += threadgroups_per_grid.x) {
  for (int c = int(tid) * VEC; c < C; c += THREADS * VEC) {
    UNROLL_FOR (int j = 0; j < N; ++j) {
      const size_t at = size_t(t) * size_t(N * C) + size_t(j * C + c);
      const mhc::Pack<T, VEC> v = mhc::load<T, VEC>(x + at, x_aligned);
      mhc::Pack<T, VEC> d = mhc::load<T, VEC>(dout + at, dout_aligned);
      UNROLL_FOR (int e = 0; e < VEC; ++e) {
        dh[j] += mhc::float_of(d, e) * mhc::float_of(v, e);
        mhc::set_element(d, e, static_cast<T>(static_cast<float>(h[j]) * mhc::float_of(d, e)));
      }
      mhc::store(dx + at, d);
    }
  }
}
mhc::group_sum<N, THREADS>(dh, scratch, partial + size_t(threadgroup_position_in_grid.x) * N, tid);
"""
OP = '''"""A toy."""

from dataclasses import dataclass

import mlx.core as mx

from .. import launch, reference
from . import tiling
from .arrays import flat
from .autodiff import FusedOp, Options
from .checks import check_array, check_streams
from .sums import sum_partials


@dataclass(frozen=True)
class StreamScaleBody(launch.Body):
    name = "stream_scale"
    T: mx.Dtype
    N: int
    VEC: int
    THREADS: int


@dataclass(frozen=True)
class StreamScaleBackwardBody(StreamScaleBody):
    name = "stream_scale_backward"


@dataclass(frozen=True)
class StreamScale(FusedOp):
    name = "stream_scale"
    shared_ndim = (None, 1)

    def fallback(self, x, h):
        return reference.stream_scale(x, h)

    def launched(self, record, x, arrays, outputs, groups):
        _, n, C = x.shape
        threads = self.options.threads_per_group
        t = tiling.token_tiling(n, C, x.dtype.size, 1, threads, launch.backend())
        body = record(T=x.dtype, N=n, VEC=t.vec, THREADS=t.threads)
        return launch.launch(body, {"x": x, **arrays}, outputs, groups, self.options)

    def forward(self, x, h):
        groups, outputs = tiling.many_groups(flat(x, 3).shape[0]), {"out": (x.shape, x.dtype)}
        return self.launched(StreamScaleBody, flat(x, 3), {"h": h}, outputs, groups)["out"]

    def backward(self, arrays, cotangents, saved):
        (x, h), (dout,) = arrays, cotangents
        groups = tiling.backward_groups(flat(x, 3).shape[0], 256)
        outputs = {"dx": (x.shape, x.dtype), "partial": ((groups, h.size), mx.float32)}
        inputs = {"h": h, "dout": dout}
        made = self.launched(StreamScaleBackwardBody, flat(x, 3), inputs, outputs, groups)
        return made["dx"], sum_partials(made["partial"], self.options)


def stream_scale(
    x: mx.array,
    h: mx.array,
    *,
    use_metal: bool = True,
    threads_per_group: int | None = None,
    verbose: bool = False,
    differentiable: bool = True,
) -> mx.array:
    """``out[j] = h[j] x[j]``."""
    _, n, _ = check_streams("stream_scale", x)
    check_array("stream_scale", "h", h, "n", (n,))
    fused = StreamScale(Options(threads_per_group, verbose))
    return fused(x, h, use_metal=use_metal, differentiable=differentiable)
'''
REFERENCE = """

def stream_scale(x: mx.array, h: mx.array) -> mx.array:
    xf, h = _float(x, h)
    return (h[:, None] * xf).astype(x.dtype)
"""
ORACLE = """

def stream_scale(x, h):
    def backward(g):
        return h[:, None] * g, over_tokens((g * x).sum(-1), 1)

    return h[:, None] * x, backward
"""
ROW = """    "stream_scale": op(
        "x h", lambda n: (n, n, 2 * n, n), h=Array("n", uniform(0.2))
    ),
}
FUSED = """
END = "at its end"
PIECES = {  # file: what stands there, and what takes its place
    "kernels/stream_scale.metal": ("", BODY),
    "kernels/stream_scale_backward.metal": ("", BACKWARD),
    "mhc_mlx/ops/scale.py": ("", OP),
    "mhc_mlx/ops/__init__.py": (END, "\nfrom .scale import stream_scale\n"),
    "mhc_mlx/reference.py": (END, REFERENCE),
    "tests/cases.py": ("}\nFUSED = ", ROW),
    "tests/proof/oracle.py": (END, ORACLE),
    "mhc_mlx/__init__.py": (END, "\nfrom .ops import stream_scale\n"),
}
CHECKS = """# What has no test of each op by its name.
import pytest
from cases import CASES, STANDARD
from mutation import bodies, sampler
from ops import test_bodies, test_coverage
from ops.test_coverage import uncovered
from proof import error_table

import benchmark
from benchmarks import suite
from mhc_mlx import launch


def test_stream_scale_has_figures(capsys):
    rows = error_table.main(["--op", "stream_scale", "--quick"])
    assert rows and all(row.figures["output"][0] < 1 for row in rows)
    benchmark.main(["--verify", "--op", "stream_scale", "--shape", "3,4,8"])
    assert "parity: 1 cases" in capsys.readouterr().out
    assert suite.rows("stream_scale") == ((2, 0), (3, 0))


def test_stream_scale_has_mutants():
    assert len(sampler.of_kernels("/stream_scale_backward.metal")) > 5
    assert "stream_scale_backward" in {c[0] for c in bodies.launches(STANDARD[0], "metal")}


@pytest.mark.parametrize("place", [k for k, v in test_coverage.PLACES.items() if type(v) is dict])
def test_a_piece_of_stream_scale_is_missed(place, monkeypatch):
    monkeypatch.delitem(test_coverage.PLACES[place], "stream_scale")
    assert test_coverage.missing_pieces() == [f"stream_scale is not in {place}"]


@pytest.mark.parametrize("name", ["stream_scale", "stream_scale_backward"])
def test_a_body_of_stream_scale_is_missed(name, uncovered):
    cases = [case for case in CASES if case.op != "stream_scale"]
    assert name in uncovered(cases, test_coverage.BODIES)
    file = launch._FOLDERS[1] / f"{name}.metal"
    file.rename(file.with_suffix(".away"))
    try:
        with pytest.raises(AssertionError, match=name):
            test_bodies.test_each_body_has_one_record()
    finally:
        file.with_suffix(".away").rename(file)
"""
FILES = """tests/ops/test_toy.py tests/ops/test_bodies.py tests/ops/test_inputs.py
tests/ops/test_parity.py tests/ops/test_composition.py tests/ops/test_traffic.py
tests/proof/test_standin.py tests/proof/test_dialect.py""".split()


def grow(folder: Path) -> None:
    """Copy what tests need, and add the toy's pieces."""
    for name in ("kernels", "mhc_mlx", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("benchmark.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name, (before, after) in PIECES.items():
        path = folder / name
        text = path.read_text() if before else ""
        assert path.exists() == bool(before), name
        assert before in ("", END) or text.count(before) == 1, name
        path.write_text(text.replace(before, after) if before in text and before else text + after)
    (folder / FILES[0]).write_text(CHECKS)


def test_the_list_is_onboardings():
    section = (ROOT / "ONBOARDING.md").read_text().split("## Add an op\n")[1].split("\n## ")[0]
    places = re.findall(r"^\d\. .*?`([\w/.]+)`", section, re.M)
    assert len(places) == 6
    assert {next(p for p in places if name.startswith(p)) for name in PIECES} == {*places}


def test_a_toy_op(need, tmp_path):
    need("simulator")
    grow(tmp_path)
    paths = os.pathsep.join(map(str, (tmp_path, tmp_path / "tests")))
    command = [sys.executable, "-m", "pytest", "-q", "-rps", "-p", "no:cacheprovider", *FILES]
    command += ["-k", "stream_scale or test_which_arrays_all_tokens_may_share"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    for file in FILES:
        assert f"PASSED {file}" in run.stdout or "dialect" in file, file
    assert all("gpu" in s or "libclang" in s for s in re.findall("SKIPPED .*", run.stdout))
