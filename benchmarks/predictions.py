"""Tables of the model: its checks against what was measured, and what it says of Macs.

    python -m benchmarks.predictions --json benchmarks/results/model.json  # predicts; needs
                                                                    # NVRTC's wheels and clang-19
    python -m benchmarks.predictions --from benchmarks/results/model.json --markdown docs/model.md

The second writes the tables of docs/model.md between their marks, and needs no compiler.
"""

import datetime
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks import model, published
from benchmarks.rates import DEVICES, H100, H200, MACS, SOURCES, Rates
from mhc_mlx.commands import Output, check_strings, make_parser, read

COMMAND = "python -m benchmarks.predictions"
RESULTS = Path(__file__).parent / "results"
MARK = "<!-- {name}: written by `" + COMMAND + "` -->"
# The sites of DeepSeek V4.1-Flash, from one token on, and a sublayer of training.
CASES = [("single_pass", "forward", (T, 4, 5120), "bfloat16") for T in (1, 8, 64, 512, 2048, 8192)]
CASES += [("sublayer", "forward+backward", (2048, 4, 4096), "bfloat16")]
CASES += [("mhc_static", "forward+backward", (16384, 4, 1024), "bfloat16")]
SITES = 80  # of V4.1-Flash: what a token of decode adds up
NAMES = {"mhc_pre_norm": "mhc_pre, with norm"}


def row_of(found: model.Prediction) -> dict:
    """A prediction in JSON's types, to three digits."""
    numbers = {k: v for k, v in found._asdict().items() if k != "terms"}
    numbers |= {k: float(f"{v:.4g}") for k, v in numbers.items() if isinstance(v, float)}
    return numbers | {"terms": {k: round(v, 3) for k, v in found.terms.items()}}


def of_case(
    op: str, direction: str, shape, dtype: str, rates: Rates, threads: int | None = None
) -> Iterator[dict]:
    """Predict each launch of an op on a device."""
    about = {"op": op, "direction": direction, "shape": list(shape), "dtype": dtype}
    for call in model.launches_of(op, direction, shape, dtype, rates.backend, threads):
        yield about | row_of(model.predict(call, rates))


def said(devices, ops, shapes, directions, dtypes, threads: int | None) -> str:
    """The table of --model: of the usual cases, or of all combinations of what is named.

    The devices' launches can differ, so devices of one backend share a table.
    """
    cases = CASES
    if ops or shapes or directions or dtypes:
        sizes = [tuple(map(int, shape.split(","))) for shape in shapes or []]
        cases = list(
            itertools.product(
                ops or ["single_pass"],
                directions or ["forward"],
                sizes or [(1, 4, 5120), (2048, 4, 5120)],
                dtypes or ["bfloat16"],
            )
        )
    chips = [DEVICES[name] for name in devices or [rates.name for rates in MACS]]
    tables = []
    for backend in dict.fromkeys(rates.backend for rates in chips):
        of = [rates for rates in chips if rates.backend == backend]
        rows = [row for case in cases for rates in of for row in of_case(*case, rates, threads)]
        tables.append(macs(rows))
    return "A model: no time here was measured.\n\n" + "\n\n".join(tables)


def kept_rows(file: Path) -> Iterator[dict]:
    """Predict the rows of results/h100/rows.json, whose launches the ops give today."""
    launched: dict[tuple, list] = {}
    for row in json.loads(file.read_text())["kernels"]:
        key = (row["op"], tuple(row["shape"]))
        if key not in launched:
            case = (row["op"], "forward+backward", row["shape"], "bfloat16")
            launched[key] = model.launches_of(*case, "cuda")
        names = (row["kernel"], f"{row['kernel']}_norm")  # two bodies since then
        call = next(call for call in launched[key] if call.name in names)
        tokens, _, C = row["shape"]
        size = tokens * C * 2
        moved = {k: row[f"rows_{k}"] * size for k in ("read", "written")}
        yield checked(row, call, H100, row["us"], moved, row["floor"] * size)


def checked(row, call, rates: Rates, us: float, moved: dict, floor: float) -> dict:
    """Compare a prediction with what was measured; and the fewest bytes over bandwidth alone."""
    found = {"op": row["op"], "shape": row["shape"], "measured_us": us}
    found |= {f"measured_{k}": v for k, v in moved.items()} | row_of(model.predict(call, rates))
    return found | {"bytes_us": floor / rates.bandwidth * 1e6}


def profiled_rows(file: Path) -> Iterator[dict]:
    """Predict every kernel of a result of benchmarks.kernel_times, of just the same launch."""
    for row in json.loads(file.read_text())["kernels"]:
        call = model.from_row(row)
        arrays = {**call.inputs, **call.outputs}.values()
        floor = sum(model.size_of(spec) for spec in arrays if spec)
        moved = {"read": row["dram_read"], "written": row["dram_written"]}
        found = checked(row, call, H200, row["ns"] / 1e3, moved, floor)
        found |= {"direction": row["direction"], "dtype": row["dtype"]}
        found |= {"measured_instructions": row.get("instructions")}
        stalls = {k[6:]: v for k, v in row.items() if k.startswith("stall_") and v}
        stalls.pop("selected", None)
        yield found | {"stalls": dict(sorted(stalls.items(), key=lambda s: -s[1])[:2])}


def published_rows() -> Iterator[dict]:
    for time in published.TIMES:
        found = row_of(published.predict(time))
        yield time._asdict() | {
            "predicted_us": found["us"],
            "binds": found["binds"],
            "bytes_us": published.bytes_alone(time),
        }


PARTS = ("h100", "h200", "published", "predictions")


def rows_of(part: str) -> Iterator[dict]:
    """The rows of a part of the report."""
    if part == "h100":
        yield from kept_rows(RESULTS / "h100/rows.json")
    elif part == "h200":
        yield from profiled_rows(RESULTS / "h200/kernel_times.json")
    elif part == "published":
        yield from published_rows()
    else:
        for rates in MACS:
            for case in CASES:
                yield from of_case(*case, rates)


def collect(output: Output, report: dict, parts: list[str]) -> None:
    """Fill parts of the report, which is written after each row."""
    for part in parts:
        report[part] = []
        if part == "h200":
            measured = json.loads((RESULTS / "h200/kernel_times.json").read_text())
            report["left_out"] = measured["left_out"]
        for row in rows_of(part):
            report[part].append(row)
            output.update(report)


def check(report) -> None:
    check_strings(report, "mlx", "date", "command")
    if not isinstance(report.get("predictions"), list):
        raise ValueError("its predictions are missing")


# ---- Markdown


def errors(rows: list[dict], measured: str, predicted: str = "us") -> list[float]:
    return [row[predicted] / row[measured] - 1 for row in rows]


def summary(rows: list[dict], measured: str, predicted: str) -> str:
    """The median error of the model and of bytes over bandwidth, and how many miss by 25 %."""
    ours, alone = errors(rows, measured, predicted), errors(rows, measured, "bytes_us")
    median, other = (100 * statistics.median(map(abs, e)) for e in (ours, alone))
    far = sum(abs(e) > 0.25 for e in ours)
    return (
        f"{len(rows)} rows: median error {median:.0f} %, of bytes over nominal bandwidth alone "
        f"{other:.0f} %; {far} of the model's are off by more than 25 %."
    )


def table(heads: list[str], rows: list[list]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def shape_of(row: dict) -> str:
    return "(" + ", ".join(map(str, row["shape"])) + ")"


def percent(value: float) -> str:
    return f"{100 * value:+.0f} %"


def nvidia(rows: list[dict]) -> str:
    """The check against ncu."""
    lines = []
    for row in rows:
        off = row["us"] / row["measured_us"] - 1
        stalls = ", ".join(f"{k} {v:.1f}" for k, v in row.get("stalls", {}).items())
        read, written = (row[f"measured_{k}"] for k in ("read", "written"))
        dram = (row["dram_read"] + row["dram_written"]) / max(1, read + written) - 1
        lines.append(
            [
                f"`{row['kernel']}`",
                NAMES.get(row["op"], row["op"]),
                shape_of(row),
                f"{row['measured_us']:.1f}",
                f"{row['us']:.1f}",
                f"**{percent(off)}**" if abs(off) > 0.25 else percent(off),
                percent(row["bytes_us"] / row["measured_us"] - 1),
                row["binds"],
                percent(dram),
                *([stalls] if "stalls" in row else []),
            ]
        )
    heads = ["kernel", "op", "(tokens, n, C)", "`ncu`, us", "model, us", "error", "bytes alone"]
    heads += ["binds", "DRAM bytes, error"]
    heads += ["longest stalls"] if rows and "stalls" in rows[0] else []
    return summary(rows, "measured_us", "us") + "\n\n" + table(heads, lines)


def unmeasured(cases: list[list]) -> str:
    """Say which cases the run under ncu left out."""
    if not cases:
        return ""
    named = [f"{op} {direction} {tuple(shape)} {dtype}" for op, direction, shape, dtype in cases]
    return "\n\nNot measured yet, so that the model is not checked there: " + "; ".join(named) + "."


def macs(rows: list[dict]) -> str:
    """Each kernel on each Mac, with what binds it; a line with the sum below each case."""
    chips = list(dict.fromkeys(row["device"] for row in rows))
    cases: dict[tuple, dict] = {}
    for row in rows:
        case = cases.setdefault((row["op"], row["direction"], shape_of(row)), {})
        case.setdefault(row["device"], []).append(row)
    lines = []
    for (op, direction, shape), of in cases.items():
        first = of[chips[0]]
        for k, row in enumerate(first):
            cells = []
            for chip in chips:
                found = of[chip][k]
                cells.append(f"{found['us']:.1f} {found['binds']}")
            spilled = f", {row['spilled']} spilled" if row["spilled"] else ""
            launch = f"{row['groups']} x {row['resident']}, {row['registers']}{spilled}"
            lines.append([f"{op} {direction} {shape}", f"`{row['kernel']}`", launch, *cells])
        total = [f"**{sum(r['us'] for r in of[chip]):.0f}**" for chip in chips]
        lines.append([f"{op} {direction} {shape}", f"**all {len(first)} launches**", "", *total])
        if op == "single_pass" and shape.startswith("(1,"):
            total = [f"{SITES * sum(r['us'] for r in of[c]) / 1e3:.2f} ms" for c in chips]
            lines.append([f"{SITES} sites of a token", "", "", *total])
    heads = ["case", "kernel", "threadgroups x resident on a core, registers"]
    return table(heads + [f"{chip}, us" for chip in chips], lines)


def others(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        off = row["predicted_us"] / row["us"] - 1
        cells = [
            f"[{row['what']}]({row['url']})",
            row["chip"],
            f"({row['rows']}, {row['elements']})",
        ]
        cells += [row["dtype"], f"{row['us']:.0f}", f"{row['predicted_us']:.0f}", percent(off)]
        cells += [percent(row["bytes_us"] / row["us"] - 1), row["binds"]]
        lines.append([*cells, "aside" if row["aside"] else ""])
    heads = ["what", "chip", "(rows, elements)", "dtype", "published, us", "model, us", "error"]
    heads += ["bytes alone", "binds", "kept aside"]
    aside = [row for row in rows if row["aside"]]
    return (
        summary(rows, "us", "predicted_us")
        + f" Of those kept aside: {summary(aside, 'us', 'predicted_us')}\n\n"
        + table(heads, lines)
    )


def sources() -> str:
    """Every rate of every device with its source."""
    lines = []
    for rates in DEVICES.values():
        for name, source in rates.sources.items():
            value = getattr(rates, name)
            shown = "see `benchmarks/rates.py`" if name == "units" else f"{value:.4g}"
            older = "of an older GPU" if name in rates.assumed else ""
            lines.append([rates.name, f"`{name}`", shown, f"[{source}]({SOURCES[source]})", older])
    return table(["device", "rate", "value", "source", "assumed"], lines)


def sections(report: dict) -> dict[str, str]:
    found = {"h100": nvidia(report["h100"])} if report.get("h100") else {}
    if report.get("h200"):
        found["h200"] = nvidia(report["h200"]) + unmeasured(report.get("left_out", []))
    if report.get("published"):
        found["published"] = others(report["published"])
    return found | {"macs": macs(report["predictions"]), "sources": sources()}


def write(page: str, report: dict) -> str:
    """The page with its tables in place of what stands between their marks."""
    for name, content in sections(report).items():
        begin, end = MARK.format(name=name), f"<!-- end of {name} -->"
        if begin not in page:
            continue
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page = re.sub(
            pattern, lambda _, c=content, b=begin, e=end: f"{b}\n{c}\n{e}", page, flags=re.S
        )
    return page


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(COMMAND, __doc__)
    parser.add_argument("--json", metavar="FILE", help="new, or an earlier result")
    parser.add_argument("--part", action="append", choices=PARTS, help="of an earlier --json")
    parser.add_argument("--from", dest="source", metavar="FILE", help="predict nothing, read this")
    parser.add_argument("--markdown", metavar="FILE", help="the page whose tables are written")
    args = parser.parse_args(argv)
    try:
        output = Output("--json", args.json, f"a result of {COMMAND}", check)
        earlier = f"a result of {COMMAND}"
        if args.part and not args.json:
            raise ValueError("--part must come with --json")
        before = read("--json", args.json, earlier, check) if args.part else {}
        report = read("--from", args.source, earlier, check) if args.source else None
        page = Path(args.markdown).read_text() if args.markdown else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if report is None:
        report = {
            "device": "none: a model",
            "mlx": version("mlx"),
            "date": datetime.date.today().isoformat(),
        }
        report |= {"command": COMMAND} | {part: before.get(part, []) for part in PARTS}
        collect(output, report, args.part or list(PARTS))
        if reason := output.finish(report):
            sys.exit(reason)
    if page is None:
        print("\n\n".join(sections(report).values()))
    else:
        Path(args.markdown).write_text(write(page, report))


if __name__ == "__main__":
    main()
