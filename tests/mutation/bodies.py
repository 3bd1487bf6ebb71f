"""Runs bodies as they stand in this tree on a few cases each, and exits 1 where a rung objects.

    python tests/mutation/bodies.py list launches.json        what each case launches
    python tests/mutation/bodies.py run launches.json metal,cuda mhc_pre mhc_seam
    python tests/mutation/bodies.py run launches.json nvrtc mhc_pre        compile alone

The cases of test_traffic.py, whose loads and stores are pinned, and those of cases.py: those
that show most pairs of template arguments of the bodies, for the least compiling, then those on
which planted.py has mistakes in the bodies. The rungs are the simulator's rules, parity and traffic
on Metal's and CUDA's text, then the dialect and NVRTC, then the optimiser where planted.py has a
mistake that it must catch: there it has nothing against the bodies as they are.
"""

import functools
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, from a checkout
sys.path.insert(0, str(Path(__file__).parents[2]))  # mhc_mlx

import cases  # noqa: E402
import mlx.core as mx  # noqa: E402
from ops.test_traffic import PINNED, words  # noqa: E402
from proof import check, executor, executors, missing, simulator  # noqa: E402

from mhc_mlx import launch  # noqa: E402
from mutation.planted import PLANTED, run  # noqa: E402

FORMS = {"metal": "simulator", "cuda": "simulator, CUDA"}
MOST, ALIKE = 24, 2  # cases in all; of the dialect and of NVRTC, variants of a body
CORNER = 64  # what a corner of a body is worth, in pairs
COMPILE = 3.0  # seconds for a variant; running a case takes about one
PINNED_CASES = {str(case): tuple(lines) for case, *lines in PINNED}


def every_case() -> dict[str, cases.Case]:
    lists = [cases.CASES, cases.RINGED]
    lists += [[c for c, *_ in PINNED], [m.case for m in PLANTED]]
    return {str(c): c for one in lists for c in one if c.tokens}


def launches(case: cases.Case, form: str) -> list[tuple]:
    """The arguments of each launch, computed by nobody."""
    found = []

    def recorded(name, inputs, outputs, groups, threads, template, verbose=False):
        found.append((name, inputs, outputs, groups, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    with executor("nvrtc"):
        launch.run = recorded
        launch.backend = lambda: form
        with executors.set_tiling(**executors.FEW_GROUPS):
            run(case)
    return found


def listed() -> dict:
    """By form and case, each variant that is launched: the body and its template."""
    return {
        form: {
            name: sorted({(c[0], json.dumps(c[5], default=str)) for c in launches(case, form)})
            for name, case in every_case().items()
        }
        for form in FORMS
    }


def kinds(case: cases.Case) -> list[tuple[str, object]]:
    """What differs in a case beside templates: how many tokens, of what alignment, what weights."""
    return [
        ("tokens", min(case.tokens.bit_length(), 7)),
        ("offset", bool(case.offset)),
        ("weights", case.weights),
        ("ragged", case.C % 8 > 0),
    ]


def corners(case: cases.Case) -> list[tuple[str, bool]]:
    """What only few cases of a body have, and part of its text is for."""
    return [
        ("halves", case.n > 32),  # a line in two simdgroups
        ("stages", case.tokens > 64 and case.n > 3),  # all of a stage of tokens and many outputs
        ("alone", case.op == "mhc_head" and case.n == 17),  # a logit in the last block
    ]


def pinned(form: str, name: str) -> tuple[str, ...]:
    """What a case must move, if that is pinned: it is for Metal's text."""
    return PINNED_CASES.get(name, ()) if form == "metal" else ()


def chosen(known: dict, forms: list[str], bodies: set[str]) -> list[tuple[str, str]]:
    """(form, case): first what shows most that is new of the bodies for the compiling it takes. New
    is each pair of what launches differ in. Then the cases of mistakes planted by hand."""
    shows, cost, each = {}, {}, every_case()
    for form in forms:
        for name, variants in known[form].items():
            of_bodies = [(body, json.loads(t)) for body, t in variants if body in bodies]
            if not of_bodies or name not in each:
                continue
            case, pairs = each[name], set()
            for body, template in of_bodies:
                options = [*((k, str(v)) for k, v in template.items()), ("form", form)]
                pairs |= {(body, *p) for p in combinations(options + kinds(case), 2)}
            corner = [(k, n) for k, true in corners(case) if true for n in range(CORNER)]
            shows[form, name] = pairs | {(b, c) for b, _ in of_bodies for c in corner}
            cost[form, name] = 1 + COMPILE * len(of_bodies) + len(variants) / 4
    found, seen = [], set()
    while shows and len(found) < MOST:
        best = max(
            shows,
            key=lambda k: len(shows[k] - seen) / cost[k] * (1.5 if pinned(*k) else 1),
        )
        seen |= shows.pop(best)
        found.append(best)
    planted_on = [str(m.case) for m in PLANTED if m.body in bodies]
    return list(dict.fromkeys(found + [(forms[0], name) for name in planted_on]))


def executed(case: cases.Case, form: str) -> tuple[dict[str, str], list[str]]:
    """What the simulator's rules and parity say against a case, and its traffic in words."""
    few_groups, says = getattr(case, "few_groups", True), {}
    with executor(FORMS[form], few_groups), simulator.recording() as records:
        try:
            got = run(case)
            mx.eval(got)
            check(case, got)
        except simulator.SimulationError as error:
            says = {"rules": str(error)}
        except AssertionError as error:
            says = {"parity": str(error)}
    return says, [words(r) for r in records] if "rules" not in says else []


def objection(form: str, case: cases.Case) -> str:
    """Of the simulator, parity or pinned traffic; "" where there is none."""
    says, moved = executed(case, form)
    want = pinned(form, str(case))
    if want and moved and moved != list(want):
        says |= {"traffic": next((a for a in moved if a not in want), "launches")}
    return "; ".join(f"{rung}: {said}" for rung, said in says.items())


def refused_by_dialect(call: tuple) -> str:
    """What clang and the lint say against Metal's text of a launch."""
    from proof import dialect

    with executor("dialect"):
        return "; ".join(dialect.refusals(simulator.generated(*call[:6])))


@functools.cache
def refused_source(body: str, source: str) -> str:
    from proof import nvrtc

    error, figures = nvrtc.compile_cuda(body, source)
    if figures and figures["shared"] > 32 << 10:
        error = f"{figures['shared']} bytes of shared memory"
    return error or ("spills" if figures["spills"] else "")


def refused_by_nvrtc(call: tuple) -> str:
    from proof import nvrtc

    return refused_source(call[0], nvrtc.cuda_source(*call[:3], *call[4:6]))


def optimised(call: tuple) -> tuple:
    """Metal's text of a launch as a variant of a main shape, and what LLVM makes of it."""
    from proof import optimiser

    variant = optimiser.variant(launch.Launch(*call), main=True)
    return variant, optimiser.figures(variant)


def refused_by_optimiser(call: tuple) -> str:
    """The faults of Metal's text of a launch, as if its shape were a main one."""
    from proof import optimiser

    found = optimiser.faults(*optimised(call))
    return "; ".join(f"{fault.kind}: {fault.words}" for fault in found)


COMPILERS = {"metal": ("dialect", refused_by_dialect), "cuda": ("nvrtc", refused_by_nvrtc)}


def refused(form: str, case: cases.Case, bodies: set[str], done: Counter) -> str:
    """What a compiler says against what a case launches of the bodies."""
    rung, judge = COMPILERS[form]
    for call in launches(case, form) if missing(rung) is None else ():
        done[form, call[0]] += call[0] in bodies
        if call[0] in bodies and done[form, call[0]] <= ALIKE and (said := judge(call)):
            return f"{rung}: {said}"
    return ""


def refused_by_llvm(bodies: set[str]) -> str:
    """What the optimiser says against the bodies, on the cases of mistakes that it must catch."""
    asked = dict.fromkeys((m.case, m.body) for m in PLANTED if "optimiser" in m.caught)
    for case, body in asked if missing("optimiser") is None else ():
        for call in launches(case, "metal") if body in bodies else ():
            if call[0] == body and (said := refused_by_optimiser(call)):
                return f"{case}, metal: optimiser: {said}"
    return ""


def main() -> None:
    command, path, *rest = sys.argv[1:]
    if command == "list":
        Path(path).write_text(json.dumps(listed()))
        return
    forms, bodies, each = rest[0].split(","), set(rest[1:]), every_case()
    executed = [form for form in forms if form in FORMS]  # of "nvrtc" nothing is
    known = json.loads(Path(path).read_text())
    picked = chosen(known, executed or ["cuda"], bodies)
    for form, name in picked if executed else ():
        if found := objection(form, each[name]):
            sys.exit(f"{name}, {form}: {found}".replace("\n", " ")[:400])
    done: Counter = Counter()
    for form, name in picked if executed else picked[:6]:
        if found := refused(form, each[name], bodies, done):
            sys.exit(f"{name}, {form}: {found}".replace("\n", " ")[:400])
    if "metal" in executed and (found := refused_by_llvm(bodies)):
        sys.exit(found.replace("\n", " ")[:400])


if __name__ == "__main__":
    main()
