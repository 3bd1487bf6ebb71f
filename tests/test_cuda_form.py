"""The text that CUDA gets where it is another than Metal's, executed by the simulator."""

import pytest
from cases import DYNAMIC, PROJECTED, RINGED, SINGLE
from conftest import executor
from test_parity import check, results

from mhc_mlx import ops

CASES = [c for c in DYNAMIC + SINGLE if c.op in (*PROJECTED, "mhc_single_pass")] + RINGED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, need):
    need("simulator, CUDA")
    given = [a for a in case.arrays() if a is not None]
    with executor("simulator, CUDA") as launched:
        check(case, results(getattr(ops, case.op), case, given))
    rings = [
        dict(template).get("RING", 0) for _, name, template, _ in launched if name == "mhc_pre"
    ]
    assert case not in RINGED or min(rings) > 0
