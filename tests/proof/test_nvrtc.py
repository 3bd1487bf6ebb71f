"""The CUDA form of every body, compiled with MLX's own options and no GPU."""

import re
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import pytest
from cases import CASES, COVERING, Case

from mhc_mlx import PAPER, launch, ops
from mhc_mlx.conventions import IDENTITY, MHC_LITE
from mhc_mlx.devices import APPLE, H100
from proof import executor, results


@pytest.fixture(scope="module")
def variants() -> list[list]:
    """What each case compiles; compiled together, on all cores."""
    from proof import nvrtc

    each = []
    for case in CASES:
        with executor("nvrtc"), nvrtc.collecting() as keys:
            results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])
        each.append(keys)
    nvrtc.compile_all([key for keys in each for key in keys])
    return each


@pytest.mark.parametrize("k", range(len(CASES)), ids=[str(c) for c in CASES])
def test_compiles_without_spills(k, need, request):
    need("nvrtc")
    from proof import nvrtc

    for key in request.getfixturevalue("variants")[k]:
        assert nvrtc.figures[key]["spills"] == 0, f"{key[0]}: {nvrtc.figures[key]}"
        assert nvrtc.figures[key]["shared"] <= 32 << 10, f"{key[0]}: {nvrtc.figures[key]}"
        assert nvrtc.figures[key]["shared"] + nvrtc.rings[key] <= 99 << 10, key[0]  # of sm_86


@pytest.mark.parametrize(
    "n, C, dtype, threads, ring",
    [
        (4, 1024, mx.bfloat16, None, 64 << 10),
        (4, 1024, mx.float32, None, 80 << 10),
        (4, 1024, mx.bfloat16, 512, 128 << 10),
        (4, 1024, mx.bfloat16, 1024, 0),  # more than a threadgroup may have
        (4, 4096, mx.bfloat16, None, 128 << 10),  # 16 slices
        (4, 1001, mx.bfloat16, None, 0),  # n C is no multiple of 32
        (2, 1024, mx.bfloat16, None, 0),  # 8 outputs
        (8, 1024, mx.bfloat16, None, 0),  # x is swept again
    ],
)
def test_ring_of_products(n, C, dtype, threads, ring, need, monkeypatch):
    need("nvrtc")
    from proof import nvrtc

    monkeypatch.setattr(nvrtc, "rings", {})
    outs = 2 * n + n * n
    with executor("nvrtc"), nvrtc.collecting():
        ops.mhc_pre(
            *(mx.zeros((4096, n, C), dtype), mx.zeros((outs, n * C)), mx.zeros(outs), mx.ones(3)),
            *(None, PAPER),
            threads_per_group=threads,
        )
    assert max(nvrtc.rings.values()) == ring


@pytest.mark.parametrize("capability, ring", [((8, 0), 128), ((8, 6), 64), ((12, 0), 64)])
def test_a_ring_fits_its_device(capability, ring, need, monkeypatch):
    """Long rows have 512 threads where their ring fits, else 256."""
    need("nvrtc")
    info = dict(
        zip(("compute_capability_major", "compute_capability_minor"), capability, strict=True)
    )
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    launch._cuda_device.cache_clear()
    device = launch.device()
    launch._cuda_device.cache_clear()
    shape = (4, 4096, mx.bfloat16)
    g = ops.tiling.logits_tiling(*shape, 24, 4096, None, device)
    size = ops.tiling.ring_bytes(g, *shape, mx.float32, 24, device)
    assert (g.threads, g.slices, size) == (4 * ring, ring // 8, ring << 10)
    assert size < device.ring_memory


def test_rings_of_many_threads_fit_their_device():
    """Beside the 24 KiB of mhc_pre_backward_projection's own."""
    ring = ops.tiling.projection_gradient_ring_bytes
    found = (APPLE, replace(H100, ring_memory=99 << 10), H100)
    assert [ring(32, 128, 6, device) >> 10 for device in found] == [0, 24, 24]
    assert [ring(32, 512, 6, device) >> 10 for device in found] == [0, 0, 96]
    assert ring(16, 128, 6, H100) == 0


def test_a_ring_raises_the_limit_of_its_kernel(monkeypatch):
    """MLX does from 48,000 bytes on; without, a large ring and arrays exceed 48 KiB."""
    asked = []
    monkeypatch.setattr(
        mx.fast, "cuda_kernel", lambda **given: asked.append(given["shared_memory"])
    )
    launch._build.cache_clear()
    for ring in (0, 32 << 10, 40 << 10, 80 << 10):
        launch._build("cuda", "mhc_pre", (), (), (), (), 256, ring)
    launch._build.cache_clear()
    assert asked == [0, 32 << 10, 48 << 10, 80 << 10]


# What ptx.h has functions of; the simulator has its own in their place.
INSTRUCTIONS = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32",
    "cvt.rn.bf16x2.f32",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
    "movmatrix.sync.aligned.m8n8.trans.b16",
    "cp.async.cg.shared.global",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "prefetch.global.L2",
}


def test_instructions_of_ptx(need):
    """Each is in the PTX of a body that uses it, without a GPU; and dp lies in threadgroup memory
    in an odd number of eights a token, so that ldmatrix has no bank conflicts."""
    need("nvrtc")
    from proof import nvrtc

    wanted = {"mhc_head": "mhc_pre", "mhc_pre": "mhc_pre_backward_projection"}
    sources: dict[str, list[str]] = {}
    for case in (
        Case("mhc_head", (17,), 1, 32, "float32", IDENTITY),
        Case("mhc_pre", (70,), 3, 64, "bfloat16", PAPER),  # 15 outputs: two eights
        Case("mhc_pre", (70,), 4, 64, "bfloat16", PAPER),  # 24: three
        Case("mhc_pre", (70,), 4, 64, "bfloat16", MHC_LITE),  # 32: four, and no ring
    ):
        with executor("nvrtc"), nvrtc.collecting() as keys:
            results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])
        body = wanted[case.op]
        sources.setdefault(body, []).extend(source for name, source in keys if name == body)
    found = Counter()
    for body, each in sources.items():
        error, _, ptx = nvrtc.compile_program(body, tuple(each), "compute_90a")
        assert not error, error[:2000]
        found.update({name: ptx.count(f"{name} ") + ptx.count(f"{name};") for name in INSTRUCTIONS})
        rows = [int(size) / (3 * 64 * 16) for size in re.findall(r"staged\[(\d+)\];", ptx)]
        assert rows == ([3, 3, 5] if body == "mhc_pre_backward_projection" else [])
    assert not [name for name in INSTRUCTIONS if not found[name]]
    named = re.findall(r'asm(?: volatile)?\("([\w.:]+)', launch.text("include/cuda/ptx.h"))
    assert sorted(named) == sorted(INSTRUCTIONS)


def test_a_mistake_is_caught(need, monkeypatch):
    need("nvrtc")
    from proof import nvrtc

    case = next(c for c in COVERING if c.op == "stream_mix_add")
    seen = []

    def keep(name, inputs, outputs, groups, threads, template, verbose=False):
        seen.append(nvrtc.cuda_source(name, inputs, outputs, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    monkeypatch.setattr(launch, "run", keep)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    ops.stream_mix_add(*case.arrays())
    mistaken = seen[0].replace("static_cast<T>(acc", "statik_cast<T>(acc")
    assert "statik_cast" in nvrtc.compile_cuda("stream_mix_add", mistaken)[0]
