"""The text that CUDA gets where it is another than Metal's, executed by the simulator."""

import functools

import mlx.core as mx
import pytest
from cases import DYNAMIC, OF_LOGITS, RINGED, SINGLE, UNUSUAL, Case
from proof import check, executor, results, set_tiling

from mhc_mlx import DEEPSEEK_V4, ops

CASES = [c for c in DYNAMIC + SINGLE + UNUSUAL if c.op in OF_LOGITS] + RINGED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, need):
    need("simulator, CUDA")
    given = [a for a in case.arrays() if a is not None]
    with executor("simulator, CUDA") as launched:
        check(case, results(getattr(ops, case.op), case, given))
    rings = [
        dict(template).get("RING_BYTES", 0)
        for _, name, template, _ in launched
        if name == "mhc_pre"
    ]
    assert case not in RINGED or min(rings) > 0


@pytest.mark.parametrize("threads", [32, 384, 512])
def test_threads_per_group(threads, need):
    """What mhc_pre_backward_coefficients keeps on chip does not grow with them."""
    need("simulator, CUDA")
    case = RINGED[0]
    with executor("simulator, CUDA"):
        op = functools.partial(getattr(ops, case.op), threads_per_group=threads)
        check(case, results(op, case, [a for a in case.arrays() if a is not None]))


@pytest.fixture
def long_rows():
    with set_tiling(long_row=1024):
        yield


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sixteen_slices(dtype, need, long_rows):
    """A token has the same bits in a large tile, a small one, and where it is swept."""
    need("simulator, CUDA")
    case = Case("mhc_pre", (9,), 4, 256, dtype, DEEPSEEK_V4, norm=False)
    x, *rest = given = [a for a in case.arrays() if a is not None]
    with executor("simulator, CUDA") as launched:
        check(case, results(ops.mhc_pre, case, given))
        made = [ops.mhc_pre(x[:k], *rest, None, DEEPSEEK_V4)[:3] for k in (9, 5, 2)]
        for few in made[1:]:
            for part, whole in zip(few, made[0], strict=True):
                assert mx.array_equal(part, whole[: len(part)])
    forms = {(name, *(dict(t).get(k) for k in ("SLICES", "TILES"))) for _, name, t, _ in launched}
    assert {("mhc_pre", 16, 2), ("mhc_pre", 16, 1), ("mhc_seam", 16, None)} <= forms
