"""What an op lacks of ONBOARDING's "Add an op" is named: a body without a case, an op without its
row, its equations or its name."""

import inspect

import cases
import mlx.core as mx
import pytest
from proof import oracle, results

import mhc_mlx
from mhc_mlx import launch, ops, reference
from mhc_mlx.ops.autodiff import FUSED_OPS

BODIES = {p.stem for p in launch._FOLDERS[1].glob("*.metal")}
WITHOUT_KERNELS = (
    "gated_residual",
    "gates",
    "project",
    "rms_norm",
    "stream_distribute",
    "stream_mix",
)
PLACES = {  # where each op is: its name is there
    "tests/cases.py": cases.OPS,
    "a list of tests/cases.py": {case.op for case in cases.CASES},
    "tests/proof/oracle.py": vars(oracle),
    "mhc_mlx/reference.py": vars(reference),
    "a FusedOp of mhc_mlx/ops/": FUSED_OPS,
    "mhc_mlx/ops/__init__.py": vars(ops),
    "mhc_mlx/__init__.py": vars(mhc_mlx),
}


def missing_pieces() -> list[str]:
    public = {k for k, f in vars(reference).items() if inspect.isfunction(f) and k[0] != "_"}
    names = ({*FUSED_OPS} | {*cases.OPS} | public) - {*WITHOUT_KERNELS}
    return [
        f"{op} is not in {place}"
        for op in sorted(names)
        for place, known in PLACES.items()
        if op not in known
    ]


def test_every_op_is_complete():
    assert missing_pieces() == []


@pytest.mark.parametrize("place", [p for p in PLACES if isinstance(PLACES[p], dict)])
def test_a_missing_piece_is_named(place, monkeypatch):
    monkeypatch.delitem(PLACES[place], "stream_aggregate")
    assert missing_pieces() == [f"stream_aggregate is not in {place}"]


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
    assert uncovered(cases.CASES, BODIES) == set(), "bodies without a case in tests/cases.py"


def test_a_body_without_a_case_is_named(uncovered):
    few_streams = [case for case in cases.CASES if case.n <= 8]
    assert uncovered(few_streams, BODIES | {"made_up"}) == {"made_up", "mhc_fused_backward_wide"}
