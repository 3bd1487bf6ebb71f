"""error_table.py's figures: finite, within the bound of the tests, and not all zero."""

import error_table
import pytest
from cases import DTYPES, OUTPUT_ULPS, Case
from conftest import missing


def test_quick_table(capsys):
    rows = error_table.main(["--quick", "--op", "stream_mix_add", "--markdown"])
    rungs = {rung for rung in error_table.RUNGS if rung == "reference" or not missing(rung)}
    assert {(row.case.dtype, row.rung) for row in rows} == {(d, r) for d in DTYPES for r in rungs}
    for row in rows:
        largest, percentile = row.figures["output"]
        assert 0 < percentile <= largest <= OUTPUT_ULPS
        assert 0 < row.figures["gradient"][1] <= row.figures["gradient"][0] < float("inf")
        # an output in 16 bits is rounded once, and its float32 error is next to nothing
        assert row.case.dtype == "float32" or largest < 0.51
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(DTYPES) and len({line.count("|") for line in lines}) == 1


def test_a_wrong_result_shows(monkeypatch):
    """A reference that is off by a thousandth is off by thousands of units."""
    right = error_table.reference.stream_mix_add
    monkeypatch.setattr(error_table.reference, "stream_mix_add", lambda *a: 1.001 * right(*a))
    row = error_table.measure(Case("stream_mix_add", (3, 4), 2, 31), "reference")
    assert row.figures["output"][0] == pytest.approx(0.001 * 2**23, rel=0.1)
