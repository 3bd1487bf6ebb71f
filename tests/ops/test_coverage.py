"""Every body is launched by a case of cases.py: a new body without a row there fails."""

from pathlib import Path

import mlx.core as mx
import pytest
from cases import COVERING, DYNAMIC, SINGLE
from proof import results

from mhc_mlx import launch, ops

BODIES = {p.stem for p in (Path(__file__).parents[2] / "kernels").glob("*.metal")}


@pytest.fixture
def uncovered(monkeypatch):
    """uncovered(cases, bodies): those that no case launches; a launch here only returns zeros."""
    launched = set()

    def record(name, inputs, outputs, *_):
        launched.add(name)
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    def uncovered(cases, bodies):
        launched.clear()
        for case in cases:
            results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])
        return bodies - launched

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    return uncovered


def test_every_body_has_a_case(uncovered):
    assert BODIES, "no kernels/*.metal"
    assert uncovered(COVERING + DYNAMIC + SINGLE, BODIES) == set(), (
        "bodies without a case in tests/cases.py"
    )


def test_a_body_without_a_case_is_named(uncovered):
    few_streams = [case for case in COVERING + DYNAMIC + SINGLE if case.n <= 8]
    assert uncovered(few_streams, BODIES | {"made_up"}) == {"made_up", "mhc_fused_backward_wide"}
