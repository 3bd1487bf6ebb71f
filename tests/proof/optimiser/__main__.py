"""Print what an optimising LLVM makes of the kernels' Metal text; needs clang-19 and no GPU.

    python tests/proof/optimiser                       the sample of CI
    python tests/proof/optimiser mhc_pre float32       variants whose body, case or template match
    python tests/proof/optimiser --all --workers 8 --json figures.json

A line has registers; spills and bytes of scratch at 128 registers; private arrays in memory and
functions that are not inlined; device loads and stores, and the narrowest bytes; instructions by
kind; bytes of code, of which Apple's instruction cache holds 12 KB. Faults follow. It exits 1 if
there are any.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import mlx.core as mx  # noqa: E402

from proof import optimiser  # noqa: E402
from proof.optimiser import variants  # noqa: E402

COLUMNS = "registers spills scratch arrays calls loads stores fma alu exp matrix shuffles barriers"
COLUMNS = [*COLUMNS.split(), "branches", "code"]


def row(f: optimiser.Figures) -> list[int]:
    kinds = ("fma", "other_alu", "transcendental", "products", "shuffles", "barriers", "branches")
    counts = {k: f.instructions.get(k, 0) for k in kinds}
    counts["shuffles"] += f.instructions.get("simd_sums", 0)
    first = [f.registers, f.spills, f.scratch_bytes, len(f.arrays), len(f.functions)]
    first += [sum(f.loads.values()), sum(f.stores.values())]
    return first + [*counts.values(), f.code_bytes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of body, case or template")
    parser.add_argument("--all", action="store_true", help="every case and every main shape")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    args = parser.parse_args()
    if not optimiser.available():
        parser.error("clang-19 is not installed: apt-get install clang-19")
    mx.set_default_device(mx.cpu)
    each = variants.variants(*(variants.all_cases() if args.all else variants.sample()))
    chosen = dict.fromkeys(
        v
        for case, launched in each.items()
        for v in launched
        if all(name in f"{v.body}, {case}, {v.template}" for name in args.names)
    )
    figures, faulty = optimiser.all_figures(chosen, args.workers), 0
    print(" ".join(f"{c:>9}" for c in COLUMNS))
    for v, f in figures.items():
        print(" ".join(f"{c:>9}" for c in row(f)), v, f"[{v.template}]")
        wrong = optimiser.faults(v, f)
        faulty += bool(wrong)
        for fault in wrong:
            print(f"    {fault.kind}: {fault.words}")
    print(f"{len(figures)} variants, {faulty} with faults")
    if args.all and not args.names:
        for unused in optimiser.unused(figures):
            print(f"EXCEPTIONS: nothing needs {unused}")
            faulty += 1
    if args.json:
        rows = [
            {"body": v.body, "origin": v.origin, "template": v.template, "threads": v.threads}
            | {"main": v.main, "faults": optimiser.faults(v, f)}
            | asdict(f)
            for v, f in figures.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(faulty > 0)


if __name__ == "__main__":
    main()
