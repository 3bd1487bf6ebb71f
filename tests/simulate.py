"""Debug a kernel without a GPU: simulate one call, forward and backward, kernel by kernel.

python tests/simulate.py mhc_static --tokens 1 --n 4 --C 8 --dtype bfloat16
python tests/simulate.py --case mhc_layer-5-n4        (the cases of tests/cases.py that match)

Each launch runs under every schedule of the simulator, and its results are compared with the
reference's maths for that kernel (standin.py). The command prints threads, template arguments, and
loads and stores of each buffer. For a broken rule it prints the schedule, line, thread and element;
for a wrong result it prints the first wrong element, and the thread and line that stored it.
--source prints the Metal source. --cuda runs the text that CUDA gets.
"""

import argparse
import sys

import mlx.core as mx
import numpy as np
from cases import CASES, CONVENTIONS, DTYPES, EXACT, FUSED, OPS, OUTPUT_ULPS, RINGED, ULP, Case
from ops.test_traffic import words
from proof import executor, simulator, standin
from proof.compare import doubles, results

from mhc_mlx import launch, ops


def first_wrong(record: simulator.Record, name: str, got: mx.array, want: mx.array) -> str | None:
    """Describe the first element that differs from want by more than rounding, or return None."""
    a, b = doubles(got), doubles(want)
    if name in simulator.SUMS:  # the stand-in returns only the sum of the rows
        a, b = a.sum(0), b.sum(0)
    ulp = next(ULP[k] for k, d in DTYPES.items() if d == got.dtype)
    terms = record.buffers["x"].array.size if name in (*simulator.SUMS, "dh_res", "dh_post") else 1
    relative = max(OUTPUT_ULPS * ulp * np.sqrt(max(terms, 1)), 2e-5)  # 2e-5 for sums over n * C
    bound = relative * np.abs(b).max(initial=0) + 1e-6
    wrong = ~(np.abs(a - b) <= bound)
    if not wrong.any():
        return None
    at = int(np.argmax(wrong))
    index = list(map(int, np.unravel_index(at, a.shape)))
    return (
        f"{name}{index} is {a.flat[at]}, must be {b.flat[at]} ({wrong.sum()} of {wrong.size} wrong)"
        f"\n    stored by {record.line(name, at)}, {simulator.SCHEDULES[0]}"
    )


def simulate(case: Case, source: bool, form: str = "simulator") -> bool:
    """Run every launch of a case, print what each does, and return whether all are right."""
    right = True

    def both(name, inputs, outputs, groups, threads, template, verbose=False):
        nonlocal right
        call = (name, inputs, outputs, groups, threads, template)
        want = standin.run(*call)
        mx.eval(want)
        options = ", ".join(f"{k}={v}" for k, v in template.items())
        print(f"  {name}.metal: {groups} threadgroups of {threads}; {options}")
        if source:
            print(simulator.generated(*call))
        try:
            with simulator.recording() as records:
                got = simulator.run(*call)
        except simulator.SimulationError as error:
            right = False
            print(f"    BROKEN RULE {error}")
            return want
        print(f"    {words(records[0])}")
        made = [k for k, v in outputs.items() if v is not None]
        for k, g, w in zip(made, got, want, strict=True):
            if found := first_wrong(records[0], k, g, w):
                right = False
                print(f"    WRONG {found}")
        return want

    print(case)
    with executor(form):
        launch.run = both
        results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])
    print(f"  {'right, under every schedule' if right else 'WRONG: see above'}")
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=FUSED, default="mhc_static")
    parser.add_argument("--case", help="part of the name of cases in tests/cases.py")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--C", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--convention", choices=CONVENTIONS | EXACT, default="ROW_FIRST")
    parser.add_argument("--per-token", action="store_true", help="h_post and h_res of each token")
    parser.add_argument("--source", action="store_true", help="print the Metal source")
    parser.add_argument("--cuda", action="store_true", help="the text that CUDA gets")
    args = parser.parse_args()
    cases = [c for c in CASES + RINGED if args.case and args.case in str(c)]
    if args.case and not cases:
        parser.error(f"no case has {args.case!r} in its name")
    if not cases:
        made = "convention" in OPS[args.op].statics
        convention = (CONVENTIONS | EXACT)[args.convention] if made else None
        shape = (args.n, args.C if OPS[args.op].rows else args.n)
        each = (args.per_token,) * 2
        cases = [Case(args.op, (args.tokens,), *shape, args.dtype, convention, per_token=each)]
    form = "simulator, CUDA" if args.cuda else "simulator"
    sys.exit(not all([simulate(c, args.source, form) for c in cases]))


if __name__ == "__main__":
    main()
