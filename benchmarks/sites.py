"""Write the tables of sites of models: times, dispatches, rows of C and memory, patched and not.

The figures are of files that `python -m mhc_mlx.models --sites ... --json FILE` wrote.
"""

import re
from pathlib import Path
from typing import Any

from mhc_mlx.commands import check_strings, make_parser, read

COMMAND = "python -m benchmarks.sites"
MARK = "<!-- {name}: written by `" + COMMAND + "` -->"
MODELS = {
    "lm_deepseek_v41": "V4.1, mlx-lm",
    "vlm_deepseek_v41": "V4.1",
    "vlm_deepseek_v4": "V4, GLM-5.3",
    "vlm_hy_v4": "Hy4",
    "vlm_xing4_0": "Xing 4",
    "vlm_qwen4_exp": "Qwen 3.8",
}


def check(report: Any) -> None:
    """Raise ValueError with the reason if this is no report of sites."""
    check_strings(report, "device", "mlx", "date", "command")
    parts = report.get("per sublayer")
    if not isinstance(parts, list) or not parts:
        raise ValueError("it has no sites")
    for part in parts:
        for key in ("family", "d", "times", "graph", "Metal's form", "rows of C", "peak bytes"):
            if key not in part:
                raise ValueError(f"its sites lack {key!r}")
        if part["family"] not in MODELS:
            raise ValueError(f"its family is {part['family']!r}")


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _package(part: dict) -> str:
    return next(k for k in part["errors"] if k != "patched")


def _name(part: dict) -> str:
    bits = f", {part['bits']} bits" if "bits" in part else ""
    return MODELS[part["family"]] + bits


def _times(parts: list[dict]) -> list[str]:
    lines = _table(
        *("model", "C", "tokens", "patched", "not compiled", "stock", "stock, compiled"),
        *("dispatches: patched, stock, compiled", "on Metal"),
    )
    for part in parts:
        package = _package(part)
        names = "patched", package, f"{package}, compiled"
        for t in part["times"]:
            ours, theirs, compiled = (t[k] for k in names)
            eager = t.get("patched, not compiled")
            graph, metal = (part[k][str(t["tokens"])] for k in ("graph", "Metal's form"))
            here = [graph[k]["dispatches"] for k in names]
            there = [metal[k] if k in metal else "-" for k in names]
            times = [f"{v * 1e6:.0f} us, {v / ours:.1f} x" for v in (theirs, compiled)]
            lines.append(
                _line(
                    *(_name(part), part["d"], t["tokens"], f"{ours * 1e6:.0f} us"),
                    *("-" if eager is None else f"{eager * 1e6:.0f} us", *times),
                    *(", ".join(map(str, counts)) for counts in (here, there)),
                )
            )
    return lines


def _memory(parts: list[dict]) -> list[str]:
    lines = _table(
        *("model", "C", "rows of C: patched, stock, compiled", "compiled / patched"),
        *("tokens", "stock, compiled / patched: time", "most MiB: patched, stock, compiled"),
        "error: patched, stock",
    )
    for part in parts:
        package, rows, peaks = _package(part), part["rows of C"], part["peak bytes"]
        names = "patched", package, f"{package}, compiled"
        moved = [rows[k] for k in ("patched", f"{package}, by op", f"{package}, compiled")]
        t = next(t for t in part["times"] if t["tokens"] == peaks["tokens"])
        errors = ", ".join(f"{float(part['errors'][k]):.2f}" for k in names[:2])
        lines.append(
            _line(
                *(_name(part), part["d"], ", ".join(f"{k:g}" for k in moved)),
                f"{moved[2] / moved[0]:.1f} x",
                *(t["tokens"], f"{t[names[2]] / t['patched']:.1f} x"),
                *(", ".join(f"{peaks[k] / 2**20:.0f}" for k in names), errors),
            )
        )
    return lines


def tables(reports: list[dict]) -> str:
    """Return the tables in Markdown, with what was measured where."""
    parts = [part for report in reports for part in report["per sublayer"] if part["ok"]]
    places = dict.fromkeys(
        f"{r['device']}, MLX {r['mlx']}"
        + "".join(f", {k} {r[k]}" for k in ("mlx-lm", "mlx-vlm") if k in r)
        + f", {r['date']}"
        for r in reports
    )
    kinds = ", ".join(dict.fromkeys(part["dtype"] for part in parts))
    return "\n".join(
        [
            f"{'; '.join(places)}; {kinds}; random weights, errors in units in the last place.",
            "",
            *_times(parts),
            "",
            *_memory(parts),
        ]
    )


def write(page: str, text: str, name: str = "sites") -> str:
    """Return the page with the tables in place of what stands between their marks.

    Raises:
        ValueError: The page has no such marks.
    """
    begin, end = MARK.format(name=name), f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if not pattern.search(page):
        raise ValueError(f"--markdown must be a page with {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(COMMAND, __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="reports of sites")
    parser.add_argument("--markdown", metavar="PAGE", help="the page whose tables are written")
    args = parser.parse_args(argv)
    try:
        reports = [read("FILE", file, "a report of sites", check) for file in args.files]
        text = tables(reports)
        if args.markdown is None:
            print(text)
            return
        page = Path(args.markdown)
        page.write_text(write(page.read_text(), text))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
