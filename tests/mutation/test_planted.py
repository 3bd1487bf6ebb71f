"""The proof can fail: each mistake planted by hand in a body is caught by the rungs that must.

`python tests/mutation/run.py planted` prints the table: mistake, body, rungs that caught it.

dialect: clang with Metal's address spaces, and the lint. nvrtc: NVIDIA's compiler.
optimiser: LLVM's, for what lies in memory, spills or is narrow.
rules: the simulator's (bounds, races, unwritten memory, divergence, limits).
parity: results against the float64 oracle. traffic: loads and stores per buffer.
"""

import functools

import pytest
from cases import Case

from mhc_mlx import launch
from mutation.bodies import (
    executed,
    launches,
    optimised,
    refused_by_dialect,
    refused_by_nvrtc,
    refused_by_optimiser,
)
from mutation.choice import backends
from mutation.planted import PLANTED, Mistake, planted

RUNGS = ("dialect", "nvrtc", "optimiser", "rules", "parity", "traffic")
SLOW = {"nvrtc", "optimiser"}  # asked only where they must object
executed_as_it_is = functools.cache(executed)


def objections(case: Case, body: str, mistake: Mistake | None = None, rungs=RUNGS) -> dict:
    """What each rung says of the body, with the mistake or as it is; "" is dropped. Those in SLOW
    compile only what ``rungs`` names."""
    backend = backends(mistake.file)[0] if mistake else "metal"
    says, normal = executed_as_it_is(case, backend)
    calls = {str(c[5]): c for c in launches(case, backend) if c[0] == body}.values()
    with planted(mistake.file if mistake else "", mistake and mistake.edit):
        if mistake:
            says, moved = executed(case, backend)
            says = says | {"traffic": "; ".join(set(moved) - set(normal))}
        says |= {"dialect": "; ".join(filter(None, map(refused_by_dialect, calls)))}
        for rung, refused in (("nvrtc", refused_by_nvrtc), ("optimiser", refused_by_optimiser)):
            says |= {rung: "; ".join(filter(None, map(refused, calls if rung in rungs else [])))}
    return {rung: message for rung, message in says.items() if message}


@pytest.fixture
def need_all(need):
    for rung in ("simulator", "dialect", "nvrtc", "optimiser"):
        need(rung)


@pytest.mark.parametrize("mistake", PLANTED, ids=str)
def test_caught(mistake, need_all):
    alone = set(mistake.caught) == {"optimiser"}  # then the slow ones must be silent, too
    rungs = tuple(r for r in RUNGS if r not in SLOW or r in mistake.caught or alone)
    says = objections(mistake.case, mistake.body, mistake, rungs)
    assert set(says) == set(mistake.caught), says
    for rung, reason in mistake.caught.items():
        assert reason in says[rung], says[rung]


def test_packed_streams_take_fewer_registers(need):
    """What stay_packed does of n = 4, besides the array that is there without it."""
    need("optimiser")
    (mistake,) = (m for m in PLANTED if m.what == "packs that need not stay packed")

    def registers(edit=None) -> int:
        with planted(mistake.file if edit else "", edit):
            calls = [c for c in launches(mistake.case, "metal") if c[0] == mistake.body]
            return max(optimised(c)[1].registers for c in calls)

    assert registers(mistake.edit) > registers()


CALLS = sorted({(m.case, m.body) for m in PLANTED}, key=str)


@pytest.mark.parametrize("case, body", CALLS, ids=str)
def test_nothing_to_catch(case, body, need_all):
    """The same rungs on the bodies as they are; a slow one where it must catch a mistake in this
    one."""
    caught = {rung for m in PLANTED if (m.case, m.body) == (case, body) for rung in m.caught}
    assert objections(case, body, rungs=tuple(caught)) == {}


def test_enough():
    """Every rung is the only one to catch some; a body without any has its mutants by operators."""
    assert {m.body for m in PLANTED} <= {f.stem for f in launch._FOLDERS[1].glob("*.metal")}
    assert {r for m in PLANTED if len(m.caught) == 1 for r in m.caught} == set(RUNGS)
