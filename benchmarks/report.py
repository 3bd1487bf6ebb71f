"""A result, which --json keeps, is shown, checked, merged, compared, and drawn."""

import statistics

from mhc_mlx.commands import check_strings
from mhc_mlx.device_report.suite import DIRECTIONS, DTYPES

SECTIONS = ("rows", "sizes", "decode", "overhead", "reference")  # the last is of CPUs


def show(row: dict) -> str:
    shape = ", ".join(map(str, row["shape"]))
    text = f"{row['op']:24} {row['direction']:16} {row['dtype']:8} ({shape:>14})"
    text += f" | {row['us']:9.1f} us +-{row['spread']:4.0%}"
    if "gbps" in row:
        text += f" | {row['gbps']:6.0f} GB/s | {row['percent_of_copy']:4.0f} % of copy"
    if "percent_of_peak" in row:
        text += f" | {row['percent_of_peak']:4.0f} % of peak"
    others = {"eager_us": "eager", "many_us": "of many", "gpu_us": "GPU alone"}
    others |= {"plain_us": "plain", "python_us": "Python", "python_eager_us": "Python eager"}
    for key in [k for k in others if k in row]:
        text += f" | {others[key]} {row[key]:.1f}"
    if row["speedup_vs_compiled"]:
        text += f" | {row['speedup_vs_compiled']:6.1f} x compiled reference"
    if "dispatches" in row:
        text += f" | {row['dispatches']} dispatches, {row['kernels']} of them kernels"
        text += f" (plain {row['plain_dispatches']}); per sublayer of stacks of {row['layers']}"
        text += f", plain {row['plain_layers']}"
    for launch in row.get("launches", []):
        text += f"\n    {launch['kernel']}: source {launch['source_bytes']} bytes, "
        text += f"{launch['template_arguments']} template arguments"
    return text


def _number(value, least: float = 0.0) -> bool:
    return type(value) in (int, float) and least <= value < 1e300


def _check_row(section: str, row) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"its {section} has {row!r}, which is no row")
    shape, threads = row.get("shape"), row.get("threads_per_group", "")
    right = {
        "op": isinstance(row.get("op"), str),
        "direction": row.get("direction") in DIRECTIONS,
        "dtype": isinstance(row.get("dtype"), str) and row["dtype"] in DTYPES,
        "shape": isinstance(shape, list)
        and [type(k) is int and k > 0 for k in shape] == [True] * 3,
        "us": _number(row.get("us"), 1e-9),
        "spread": _number(row.get("spread")),
        "threads_per_group": threads is None or type(threads) is int,
        "vec": row.get("vec") is None or type(row["vec"]) is int,
        "speedup_vs_compiled": row.get("speedup_vs_compiled", "") is None
        or _number(row.get("speedup_vs_compiled"), 1e-9),
    }
    if section in ("rows", "sizes"):
        right |= {k: _number(row.get(k), 1e-9) for k in ("gbps", "percent_of_copy")}
    for key, fits in right.items():
        if not fits:
            got = f"is {row[key]!r}" if key in row else "is missing"
            raise ValueError(f"{key} {got} in a row of its {section}")


def check_result(result) -> None:
    """Raise ValueError that says why this is no result that --json writes."""
    check_strings(result, "device", "mlx", "date", "command")
    for key in ("verified", *SECTIONS):
        if not isinstance(result.get(key, [] if key in SECTIONS[1:] else None), list):
            raise ValueError(f"its {key} is {'no list' if key in result else 'missing'}")
    found = set()
    for section in SECTIONS:
        for row in result.get(section, []):
            _check_row(section, row)
            if label(section, row) in found:
                raise ValueError(f"it has {label(section, row)} twice")
            found.add(label(section, row))


def check_figures(result) -> None:
    check_result(result)
    if not any(result.get(section) for section in SECTIONS):
        raise ValueError("it has no figures")


def label(section: str, row: dict) -> str:
    keys = ("op", "direction", "dtype", "shape", "threads_per_group", "vec")
    named = [str(row[k]) for k in keys if row.get(k) is not None]
    return " ".join([*named, f"({section})" if section != "rows" else ""]).strip()


def _worst(results: list[dict]) -> list[dict]:
    """Return the parity of each case in the process where its error was largest, or not finite."""
    worst: dict[str, dict] = {}
    for row in (row for result in results for row in result["verified"]):
        key = label("verified", row)
        if key not in worst or _error(row) > _error(worst[key]):
            worst[key] = row
    return list(worst.values())


def _error(row: dict) -> float:
    return float(row["error"])  # JSON has "inf" for an infinite one


def merge(results: list[dict]) -> dict:
    """Return the first process's result with the medians of all, the best copy, the worst
    parity."""
    merged = results[0] | {"processes": len(results), "verified": _worst(results)}
    merged["copy_gbps"] = max(result["copy_gbps"] for result in results)
    figures = ("gbps", "percent_of_copy", "percent_of_peak")
    for section in [s for s in SECTIONS if s in results[0]]:
        found: dict[str, list[dict]] = {}
        for row in (row for result in results for row in result[section]):
            found.setdefault(label(section, row), []).append(row)
        merged[section] = []
        for rows in found.values():
            times = [k for k in rows[0] if k.endswith("us") or k in figures]
            row = rows[0] | {k: statistics.median(r[k] for r in rows) for k in times}
            if len(rows) > 1:
                most, least = (f(r["us"] for r in rows) for f in (max, min))
                row["spread"] = (most - least) / row["us"]
            if row["speedup_vs_compiled"]:
                slow = row.get("plain_us", rows[0]["speedup_vs_compiled"] * rows[0]["us"])
                row["speedup_vs_compiled"] = slow / row["us"]
            merged[section].append(row)
    return merged


def compare(before: dict, after: dict) -> list[str]:
    """Return the change of each figure, and say which figures one of both lacks."""
    old, new = (
        {label(s, r): r["us"] for s in SECTIONS for r in result.get(s, [])}
        for result in (before, after)
    )
    lines = [
        f"{key:66} {old[key]:9.1f} -> {us:9.1f} us {100 * (us / old[key] - 1):+7.1f} %"
        for key, us in new.items()
        if key in old
    ]
    lines += [f"{key:66} not there before" for key in new if key not in old]
    return lines + [f"{key:66} only before" for key in old if key not in new]


def plot(result: dict, file: str) -> None:
    """Draw percent of copy: over size if there are such rows, and otherwise a bar for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = result.get("sizes", [])
    if sizes:
        figure = plot_sizes(plt, sizes, result["device"])
    else:
        rows = result["rows"]
        figure, axes = plt.subplots(figsize=(8, 0.28 * len(rows) + 1.2))
        labels = [f"{r['op']} {r['direction']} {r['dtype']} {tuple(r['shape'])}" for r in rows]
        axes.barh(labels, [r["percent_of_copy"] for r in rows])
        axes.axvline(100, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("percent of copy bandwidth")
    figure.savefig(file, bbox_inches="tight", dpi=120)
    plt.close(figure)


def plot_sizes(plt, rows: list[dict], device: str):
    """Draw a panel for each op and n, and in it a line for each C."""
    panels = list(dict.fromkeys((r["op"], r["direction"]) for r in rows))
    streams, widths = (sorted({r["shape"][i] for r in rows}) for i in (1, 2))
    size = (2.6 * len(streams) + 1.4, 2.3 * len(panels) + 0.9)
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(len(panels), len(streams), figsize=size, **options)
    lines = {}
    for (op, direction), across in zip(panels, grid, strict=True):
        for n, axes in zip(streams, across, strict=True):
            axes.axhline(100, color="black", linewidth=0.8)
            for i, C in enumerate(widths):
                key = (op, direction, n, C)
                line = [r for r in rows if (r["op"], r["direction"], *r["shape"][1:]) == key]
                points = sorted((r["shape"][0], r["percent_of_copy"]) for r in line)
                style = {"color": plt.cm.viridis(i / len(widths)), "marker": ".", "linewidth": 1.2}
                if points:
                    (lines[C],) = axes.plot(*zip(*points, strict=True), **style)
            axes.set_title(f"{op}, n = {n}", fontsize=8)
            axes.set_xscale("log", base=4)
            ticks = [4**k for k in range(0, 9, 2)]
            axes.set_xticks(ticks, map(str, ticks), fontsize=8)
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(0)
    figure.supxlabel("tokens")
    figure.supylabel("% of copy")
    figure.legend([lines[C] for C in widths], [f"C = {C}" for C in widths], loc="outside right")
    figure.suptitle(f"{device}, {rows[0]['dtype']}, {' and '.join({d for _, d in panels})}")
    return figure
