"""Which mutants are judged: a draw of any file's lines, or the fixed set of the kernels."""

import random

from mutation.operators import ROOT, Mutant, mutants, parses, sources

ELSEWHERE = ("narrow_product",)  # only rows beyond 2**31 elements show it: ops/test_limits.py


def sample(seed: int, count: int, only: str = "") -> list[Mutant]:
    """Lines uniformly among those that have any, of files whose name has ``only`` in it, then one
    mutant of each."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for path in sources():
        if only in path.relative_to(ROOT).as_posix():
            for m in mutants(path):
                lines.setdefault((m.file, m.line), []).append(m)
    places, rng, drawn = sorted(lines), random.Random(seed), []
    rng.shuffle(places)
    for place in places:
        m = rng.choice(lines[place])
        if len(drawn) < count and parses(m):
            drawn.append(m)
    return drawn


def of_kernels(only: str = "") -> list[Mutant]:
    """One mutant of each operator in each kernel text, the same ones in every run. New names in a
    text change none of them; a file may have another name, too."""
    found: dict[tuple[str, str], list[Mutant]] = {}
    for path in sources():
        if path.suffix != ".py" and only in path.as_posix():
            for m in mutants(path):
                found.setdefault((m.file, m.operator), []).append(m)
    fixed = {k: random.Random(k[1]).choice(v) for k, v in found.items() if k[1] not in ELSEWHERE}
    return sorted(fixed.values(), key=lambda m: (m.file, m.start, m.operator))
