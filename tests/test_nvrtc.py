"""The CUDA form of every body, compiled with MLX's own options and no GPU."""

import mlx.core as mx
import pytest
from cases import COVERING
from conftest import executor

from mhc_mlx import kernel, ops


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_compiles_without_spills(case, need):
    need("nvrtc")
    import nvrtc

    before = set(nvrtc.figures)
    given = [a for a in case.arrays() if a is not None]
    with executor("nvrtc"):
        full = iter(given)
        arrays = [
            None if case.identity and k == 3 else next(full)
            for k in range(len(given) + case.identity)
        ]
        op = getattr(ops, case.op)
        out = op(*arrays, *case.statics)
        present = [k for k, a in enumerate(arrays) if a is not None]

        def f(*a):
            whole = list(arrays)
            for k, v in zip(present, a, strict=True):
                whole[k] = v
            return op(*whole, *case.statics)

        mx.eval(mx.vjp(f, given, [mx.zeros(out.shape, out.dtype)]))
    for key in set(nvrtc.figures) - before:
        assert nvrtc.figures[key]["spills"] == 0, f"{key[0]}: {nvrtc.figures[key]}"
        assert nvrtc.figures[key]["shared"] <= 32 << 10, f"{key[0]}: {nvrtc.figures[key]}"


@pytest.mark.parametrize("n", [8, 48, 64])
def test_threadgroup_memory_at_most_threads(n, need):
    """At 1024 threads a threadgroup every body still fits Metal's 32 KiB."""
    need("nvrtc")
    import nvrtc

    before = set(nvrtc.figures)
    x, gate, mix = mx.zeros((2, n, 1024)), mx.zeros(n), mx.zeros((n, n))
    with executor("nvrtc"):
        mx.eval(
            mx.vjp(
                lambda *a: ops.mhc_layer(*a, threads_per_group=1024),
                [x, gate, gate, mix, mx.ones(1024)],
                [x],
            )
        )
    for key in set(nvrtc.figures) - before:
        assert nvrtc.figures[key]["shared"] <= 32 << 10, f"{key[0]}: {nvrtc.figures[key]}"


def test_a_mistake_is_caught(need, monkeypatch):
    need("nvrtc")
    import nvrtc

    case = next(c for c in COVERING if c.op == "stream_mix_add")
    seen = []

    def keep(name, inputs, outputs, groups, threads, template, verbose=False):
        seen.append(nvrtc.cuda_source(name, inputs, outputs, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    monkeypatch.setattr(kernel, "launch", keep)
    monkeypatch.setattr(kernel, "backend", lambda: "cuda")
    ops.stream_mix_add(*case.arrays())
    mistaken = seen[0].replace("static_cast<T>(acc", "statik_cast<T>(acc")
    assert "statik_cast" in nvrtc.compile_cuda("stream_mix_add", mistaken)[0]
