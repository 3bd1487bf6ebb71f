"""Draws mutants with a seed: lines uniformly among those that have any, then one mutant of each.

python tests/mutation/sampler.py --seed 1 --count 20
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutation.operators import ROOT, Mutant, mutants, parses, sources  # noqa: E402


def by_line(only: str = "") -> dict[tuple[str, int], list[Mutant]]:
    """All mutants of files whose name has ``only`` in it, by line, in order."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for path in sources():
        if only in path.relative_to(ROOT).as_posix():
            for m in mutants(path):
                lines.setdefault((m.file, m.line), []).append(m)
    return lines


def sample(seed: int, count: int, only: str = "", known=frozenset()) -> list[Mutant]:
    """``count`` mutants of different lines; without those whose keys are ``known``."""
    lines = by_line(only)
    places, draw = sorted(lines), random.Random(seed)
    draw.shuffle(places)
    found = []
    for place in places:
        mutant = draw.choice(lines[place])
        if mutant.key not in known and parses(mutant):
            found.append(mutant)
        if len(found) == count:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--only", default="", help="part of the names of files")
    args = parser.parse_args()
    lines = by_line(args.only)
    print(f"{sum(map(len, lines.values()))} mutants in {len(lines)} lines")
    for mutant in sample(args.seed, args.count, args.only):
        print(mutant)


if __name__ == "__main__":
    main()
