"""Print the errors of the reference, the simulator and this machine's GPU, by the float64 oracle.

    python tests/proof/error_table.py [--op OP ...] [--dtype DTYPE ...] [--quick] [--markdown]

A cell has the largest error and the 99.9th percentile of the errors, as "largest / percentile".
Errors are in units in the last place of the array's dtype: of the largest value of a token or
matrix for outputs, and of the largest value of the array for gradients. test_parity bounds the same
errors. Parameters, coefficients and their gradients are float32.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, from a checkout
sys.path.insert(0, str(Path(__file__).parents[2]))  # mhc_mlx

from cases import DTYPES, FUSED, OPS, PROJECTED, Case
from tqdm import tqdm

from mhc_mlx import DEEPSEEK_V4, PAPER, ROW_FIRST, XING, launch, ops, reference
from mhc_mlx.conventions import (
    HUNYUAN_V4,
    HUNYUAN_V4_POST_EPS,
    IDENTITY,
    KRONECKER,
    MHC_LITE,
    UNCONSTRAINED,
)
from proof import errors, executor, missing, results

RUNGS = ("reference", "simulator", "gpu")
QUANTITIES = ("output", "gradient")
TOKENS = 12  # 12 tokens in two axes give enough values for a percentile, and sums that round
# (n, C) of cases.STREAMS and cases.CHANNELS, and the conventions of coefficients per token.
SHAPES = {
    # sums have few terms; C is prime, so loads are single
    (2, 31): (ROW_FIRST, IDENTITY, HUNYUAN_V4),
    # the n of all published models; C of a model
    (4, 1280): (PAPER, DEEPSEEK_V4, MHC_LITE, XING),
    # the most streams that registers hold; C = 4 * 32 + 1
    (8, 129): (KRONECKER, UNCONSTRAINED, HUNYUAN_V4_POST_EPS),
    # bodies for many streams, which read x twice
    (16, 64): (PAPER,),
}


@dataclass(frozen=True)
class Row:
    """A case on a rung, with (largest error, 99.9th percentile) of outputs and of gradients."""

    case: Case
    rung: str
    figures: dict[str, tuple[float, float]]


def cases(names=FUSED, dtypes=tuple(DTYPES), quick=False) -> list[Case]:
    return [
        case
        for op in names
        for dtype in dtypes
        for n, C in list(SHAPES)[: 1 if quick else None]
        for case in variants(Case(op, (TOKENS // 4, 4), n, C, dtype))
    ]


def variants(case: Case) -> list[Case]:
    """Return the case with each convention, shared and per-token coefficients, and norm or none."""
    row = OPS[case.op]
    if not row.rows:  # the op has no C, and only the dtype of its logits
        logits = {"C": case.n, "dtype": "float32", "weights": case.dtype}
        return [replace(case, convention=c, **logits) for c in (ROW_FIRST, XING)]
    each = replace(case, per_token=row.per_token)
    if "convention" not in row.statics:
        if "weight" in row.optional:
            return [replace(each, norm=norm) for norm in (True, False)]
        return list(dict.fromkeys([case, each]))
    if case.op in PROJECTED and row.arrays["phi"].axes == "L K":
        norms = (True, "weight" not in row.optional, True, True)
        pairs = zip(SHAPES[case.n, case.C], norms, strict=False)
        made = [replace(case, convention=c, norm=norm) for c, norm in pairs]
        return [replace(c, parts=2) if c.convention.name.startswith("HUNYUAN") else c for c in made]
    return [replace(case, convention=ROW_FIRST if case.op == "mhc_layer" else DEEPSEEK_V4)]


def measure(case: Case, rung: str) -> Row:
    given = [a for a in case.arrays() if a is not None]
    module = reference if rung == "reference" else ops
    with contextlib.nullcontext() if rung == "reference" else executor(rung):
        found = errors(case, results(getattr(module, case.op), case, given))
    outputs, gradients = found[: -len(given)], found[-len(given) :]
    if case.op == "mhc_pre":
        outputs.pop()  # x itself
    figures = {}
    for quantity, of in zip(QUANTITIES, (outputs, gradients), strict=True):
        ulps = np.concatenate([e.ulps.ravel() for e in of])
        figures[quantity] = (float(ulps.max()), float(np.quantile(ulps, 0.999)))
    return Row(case, rung, figures)


def dtype_of(case: Case) -> str:
    return case.dtype if OPS[case.op].rows else case.weights


def table(rows: list[Row], by_shape: bool) -> list[list[str]]:
    """Return lines of cells, the header first: a line per op and dtype, or per case."""
    rungs = [r for r in RUNGS if any(row.rung == r for row in rows)]
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        C = str(row.case.C) if OPS[row.case.op].rows else ""
        shape = (str(row.case.n), C, "-".join(str(row.case).split("-")[5:])) if by_shape else ()
        lines.setdefault((row.case.op, dtype_of(row.case), *shape), []).append(row)
    header = ["op", "dtype", *(("n", "C", "variant") if by_shape else ())]
    cells = [header + [f"{rung} {q}" for q in QUANTITIES for rung in rungs]]
    for key, of in lines.items():
        line = list(key)
        for quantity in QUANTITIES:
            for rung in rungs:
                figures = [row.figures[quantity] for row in of if row.rung == rung]
                largest, percentile = (max(column) for column in zip(*figures, strict=True))
                line.append(f"{largest:.2f} / {percentile:.2f}")
        cells.append(line)
    return cells


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", nargs="+", choices=FUSED, default=FUSED)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument("--markdown", action="store_true", help="worst of each op, for README.md")
    options = parser.parse_args(arguments)
    absent = {rung: missing(rung) for rung in RUNGS[1:]}
    rungs = [rung for rung in RUNGS if not absent.get(rung)]
    work = [(c, r) for c in cases(options.op, options.dtype, options.quick) for r in rungs]
    rows = [measure(*w) for w in tqdm(work, unit="case", disable=not sys.stderr.isatty())]
    cells = table(rows, by_shape=not options.markdown)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if options.markdown:
        cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(padded)} |" if options.markdown else "  ".join(padded).rstrip())
    said = [f"{rung}: {reason}" for rung, reason in absent.items() if reason]
    said.append(f"kernels on this machine: {launch.backend() or 'none'}, MLX {mx.__version__}")
    print("\n" + "; ".join(said), file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
