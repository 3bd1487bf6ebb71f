"""The proof can fail: planted mistakes in the real bodies, each caught by the rungs that must.

`PYTHONPATH=tests python -m mutation.test_mutation` prints the table: mistake, body, and the rungs
that caught it.

dialect: clang with Metal's address spaces, and the lint. nvrtc: NVIDIA's compiler.
rules: the simulator's (bounds, races, unwritten memory, divergence, limits).
parity: results against the float64 oracle. traffic: loads and stores per buffer.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from cases import Case
from ops.test_traffic import words
from proof import check, executor, missing, results, simulator

from mhc_mlx import launch, ops
from mutation.mistakes import MANY, SHARED, Mistake
from mutation.mistakes_per_token import PER_TOKEN
from mutation.mistakes_pre import Threads
from mutation.mistakes_pre_backward import ONE_CHUNK
from mutation.mistakes_seam import SEAMS

RUNGS = ("dialect", "nvrtc", "rules", "parity", "traffic")
MISTAKES = SHARED + PER_TOKEN + SEAMS


@contextlib.contextmanager
def planted(mistake: Mistake | None):
    """The bodies with the mistake in one of them."""
    plain = launch.text

    def text(file: str) -> str:
        same = mistake is None or file != mistake.file
        return plain(file) if same else mistake.edited(plain(file))

    launch.text = text
    launch._build.cache_clear()
    try:
        yield
    finally:
        launch.text = plain
        launch._build.cache_clear()


def run(case: Case):
    options = {"threads_per_group": case.threads} if isinstance(case, Threads) else {}
    f = functools.partial(getattr(ops, case.op), **options)
    usual = ops.tiling.phi_gradient_tiling
    if case is ONE_CHUNK:
        ops.tiling.phi_gradient_tiling = lambda *shape: usual(*shape)._replace(chunks=1)
    try:
        return results(f, case, [a for a in case.arrays() if a is not None])
    finally:
        ops.tiling.phi_gradient_tiling = usual


METAL, CUDA = "simulator", "simulator, CUDA"


@functools.cache
def launches(case: Case, body: str, form: str) -> list[tuple]:
    """What the case launches of the body, a call for each variant."""
    calls = {}
    with executor("stand-in"):
        stand_in = launch.run
        if form == CUDA:
            launch.backend = lambda: "cuda"

        def keep(*call):
            if call[0] == body:
                calls[str(call[5])] = call
            return stand_in(*call)

        launch.run = keep
        run(case)
    return list(calls.values())


@functools.cache
def compiled_by_nvrtc(body: str, source: str) -> str:
    from proof import nvrtc

    error, figures = nvrtc.compile_cuda(body, source)
    if figures and figures["shared"] > 32 << 10:
        error = f"{figures['shared']} bytes of shared memory"
    return error or ("spills" if figures["spills"] else "")


@functools.cache
def traffic(case: Case, form: str) -> list[str]:
    with executor(form, few_groups=case is not MANY), simulator.recording() as records:
        run(case)
    return [words(r) for r in records]


def caught(
    case: Case, body: str, mistake: Mistake | None = None, rungs: tuple[str, ...] = RUNGS
) -> dict[str, str]:
    """What each rung says of the body, with the mistake or as it is; "" is dropped. NVRTC is slow:
    without it in ``rungs`` nothing is compiled."""
    from proof import dialect, nvrtc

    form = CUDA if mistake and "/cuda/" in mistake.file else METAL
    says, normal = dict.fromkeys(RUNGS, ""), traffic(case, form)
    calls = launches(case, body, form)
    with planted(mistake), ThreadPoolExecutor(1) as pool:
        compiles = calls if "nvrtc" in rungs else []
        cuda = [(c[0], nvrtc.cuda_source(*c[:3], c[4], c[5])) for c in compiles]
        compiled = pool.map(lambda one: compiled_by_nvrtc(*one), cuda)  # while the others run
        for call in calls:
            says["dialect"] += "; ".join(dialect.refusals(simulator.generated(*call[:6])))
        try:
            with executor(form, few_groups=case is not MANY):
                with simulator.recording() as records:
                    got = run(case)
            moved = [words(r) for r in records]
            says["traffic"] = "; ".join(set(moved) - set(normal))
            mx.eval(got)
            check(case, got)
        except simulator.SimulationError as error:
            says["rules"] = str(error)
        except AssertionError as error:
            says["parity"] = str(error)
        says["nvrtc"] = "".join(compiled)
    return {rung: message for rung, message in says.items() if message}


def unavailable() -> str | None:
    return next((f"{r}: {m}" for r in ("simulator", "dialect", "nvrtc") if (m := missing(r))), None)


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_caught(mistake, need):
    for rung in ("simulator", "dialect", "nvrtc"):
        need(rung)
    rungs = tuple(r for r in RUNGS if r != "nvrtc" or r in mistake.caught)
    says = caught(mistake.case, mistake.body, mistake, rungs)
    assert set(says) == set(mistake.caught), says
    for rung, reason in mistake.caught.items():
        assert reason in says[rung], says[rung]


@pytest.mark.parametrize(
    "case, body", sorted({(m.case, m.body) for m in MISTAKES}, key=str), ids=str
)
def test_nothing_to_catch(case, body, need):
    """The same rungs on the bodies as they are."""
    for rung in ("simulator", "dialect", "nvrtc"):
        need(rung)
    assert caught(case, body) == {}


def test_enough():
    """Every body has mistakes, and every rung is the only one to catch some."""
    assert len(MISTAKES) >= 40
    bodies = {f.stem for f in launch._FOLDERS[1].glob("*.metal")}
    assert {m.body for m in MISTAKES} == bodies
    assert {r for m in MISTAKES if len(m.caught) == 1 for r in m.caught} == set(RUNGS)


def main() -> None:
    if reason := unavailable():
        raise SystemExit(f"needs every rung, but {reason}")
    print(f"| mistake | body | {' | '.join(RUNGS)} |\n|---|---|{'---|' * len(RUNGS)}")
    for m in MISTAKES:
        says = caught(m.case, m.body, m)
        marks = " | ".join("caught" if r in says else "" for r in RUNGS)
        file = m.body if m.file == f"{m.body}.metal" else f"{m.body} ({m.file})"
        print(f"| {m.what} | {file} | {marks} |", flush=True)


if __name__ == "__main__":
    main()
