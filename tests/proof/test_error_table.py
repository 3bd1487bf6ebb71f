"""error_table.py's figures: finite, within the bound of the tests, and not all zero."""

import mlx.core as mx
import pytest
from cases import CONVENTIONS, DTYPES, EXACT, OUTPUT_ULPS, Case

from mhc_mlx import PAPER
from proof import error_table, missing
from proof.compare import case_output, several

STATIC = ("sinkhorn_knopp", "stream_aggregate_norm", "mhc_static", "mhc_layer")  # left, for time
OPS = [name for name in error_table.FUSED if name not in STATIC]


def test_quick_table(capsys):
    rows = error_table.main(["--quick", "--op", *OPS, "--markdown"])
    rungs = {rung for rung in error_table.RUNGS if rung == "reference" or not missing(rung)}
    expected = {(op, dtype, rung) for op in OPS for dtype in DTYPES for rung in rungs}
    assert {(row.case.op, row.case.dtype, row.rung) for row in rows} == expected
    for row in rows:
        largest, percentile = row.figures["output"]
        assert 0 < percentile <= largest <= OUTPUT_ULPS
        assert 0 < row.figures["gradient"][1] <= row.figures["gradient"][0] < float("inf")
        # an output in 16 bits is rounded once, and its float32 error is next to nothing
        outputs = case_output(row.case, [a for a in row.case.arrays() if a is not None])
        floats = mx.float32 in [a.dtype for a in several(outputs)]  # some or all of them
        assert row.case.dtype == "float32" or floats or largest < 0.51
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(OPS) * len(DTYPES)
    assert len({line.count("|") for line in lines}) == 1


def test_variants():
    """Each op of the per-token kind in every form that its kernels tell apart."""
    of = {op: error_table.cases([op], ["float32"]) for op in OPS}
    for op in ("mhc_coefficients", "mhc_pre"):
        names = {case.convention.name for case in of[op]}
        assert names == {*CONVENTIONS, *EXACT} - {"ADDITIVE"}
    assert {case.norm for case in of["mhc_pre"]} == {True, False}
    assert {case.per_token for case in of["stream_mix_add"]} == {(False, False), (True, True)}
    assert {case.per_token[0] for case in of["stream_aggregate"]} == {True, False}
    assert {case.norm for case in of["mhc_seam"]} == {True, False}


def test_a_wrong_result_shows(monkeypatch):
    """A reference that is off by a thousandth is off by thousands of units."""
    right = error_table.reference.stream_mix_add
    monkeypatch.setattr(error_table.reference, "stream_mix_add", lambda *a: 1.001 * right(*a))
    row = error_table.measure(Case("stream_mix_add", (3, 4), 2, 31), "reference")
    assert row.figures["output"][0] == pytest.approx(0.001 * 2**23, rel=0.1)


def test_each_output_is_measured_in_its_own_dtype(monkeypatch):
    """Where h_post is off by a thousandth: it is float32 whatever the streams, and u is right."""
    right = error_table.reference.mhc_pre

    def wrong(*arrays):
        u, h_post, *rest = right(*arrays)
        return u, 1.001 * h_post, *rest

    monkeypatch.setattr(error_table.reference, "mhc_pre", wrong)
    case = Case("mhc_pre", (3, 4), 2, 31, "bfloat16", PAPER)
    row = error_table.measure(case, "reference")
    assert row.figures["output"][0] == pytest.approx(0.001 * 2**23, rel=0.1)
