"""A report in some twenty lines, to paste into an issue."""

from typing import Any

FIRST = 3  # so many failures of a part are printed

Rows = list[dict[str, Any]]


def shape_text(row: dict[str, Any]) -> str:
    return ",".join(map(str, row["shape"]))


def failures(rows: Rows, what: str) -> list[str]:
    """Return a line for each of the first rows that failed, and the number of the others."""
    failed = [row for row in rows if row.get("ok") is False or "error" in row]
    lines = []
    for row in failed[:FIRST]:
        name = row.get("body") or f"{row['op']} {row['direction']}"
        why = row.get("error") or f"error {row['largest_error']}, bound {row['bound']}"
        first = next((k for k in why.splitlines() if "error:" in k), why.splitlines()[0])
        lines.append(f"  {what} FAILS: {name} {row['dtype']} {shape_text(row)}: {first[:160]}")
    if len(failed) > FIRST:
        lines.append(f"  and {len(failed) - FIRST} more")
    return lines


def counts(rows: Rows, missing: int) -> str:
    """Return how many rows are right, wrong, left out and missing, in words."""
    wrong = sum(row.get("ok") is False or "error" in row for row in rows)
    out = sum("why" in row for row in rows)
    parts = [f"{len(rows) - wrong - out} right", f"{wrong} fail"]
    parts += [f"{out} not run"] * bool(out) + [f"{missing} not reached"] * bool(missing)
    return ", ".join(parts)


def variant_lines(rows: Rows, missing: int) -> list[str]:
    lines = [f"variants of kernels compiled: {counts(rows, missing)}"]
    lines += failures(rows, "compile")
    limited = [row for row in rows if row.get("most_threads", 1024) < 1024]
    if any("most_threads" in row for row in rows):
        text = f"  fewer than 1024 threads fit: {len(limited)} variants"
        least: dict[str, int] = {}
        for row in limited:
            least[row["body"]] = min(row["most_threads"], least.get(row["body"], 1024))
        tight = sorted(least.items(), key=lambda entry: entry[1])[:6]
        lines.append(text + (": " + ", ".join(f"{k} {v}" for k, v in tight) if tight else ""))
    return lines


def parity_lines(rows: Rows, missing: int) -> list[str]:
    lines = [f"parity with the reference, both directions: {counts(rows, missing)}"]
    for name in ("bfloat16", "float16", "float32"):
        errors = [r["largest_error"] for r in rows if r["dtype"] == name and "largest_error" in r]
        finite = [e for e in errors if isinstance(e, float)]
        if finite:
            lines.append(f"  {name}: largest relative error {max(finite):.1e} of {len(errors)}")
    return lines + failures(rows, "parity")


def time_lines(rows: Rows, missing: int, what: str = "a call") -> list[str]:
    """Return a line for each op and direction: us and the gain over compiled plain MLX by shape."""
    lines = [f"us of {what} (gain over compiled plain MLX): {counts(rows, missing)}"]
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.get("us") is not None:
            gain = row["speedup_vs_compiled"]
            text = f"{shape_text(row)}: {row['us']:.0f}" + (f" ({gain:.1f} x)" if gain else "")
            groups.setdefault(f"{row['op']} {row['direction']}", []).append(text)
    lines += [f"  {name} {'; '.join(texts)}" for name, texts in groups.items()]
    return lines + failures(rows, "time")


def decode_lines(rows: Rows, missing: int) -> list[str]:
    return time_lines(rows, missing, "a sublayer in a row of them")


LINES = {"variants": variant_lines, "parity": parity_lines, "times": time_lines}
LINES["decode"] = decode_lines


def summary(report: dict[str, Any]) -> list[str]:
    """Return the lines; those of an unfinished report say what is missing."""
    about, power = report["machine"], report["power"]
    versions = f"mhc-metal {about['mhc_metal']}, MLX {about['mlx']}, Python {about['python']}"
    lines = [
        f"{about['device']}, {about['memory_gib']} GiB, {about['system']}, {about['processor']}",
        f"{versions}, kernels: {about['backend']}, {report['date']}",
    ]
    states = {when: ", ".join(f"{k} {v}" for k, v in power[when].items()) for when in power}
    told = [f"{when} {state}" for when, state in states.items() if state]
    lines.append(f"power: {'; '.join(told) or 'the system does not say'}")
    reasons = [row["why"] for part in LINES for row in report.get(part, []) if "why" in row]
    lines += [f"not run: {why}" for why in dict.fromkeys(reasons)][:FIRST]
    if not report["finished"]:
        running = f" while this ran: {report['running']}" if report["running"] else ""
        lines.append(f"NOT FINISHED: {report['stopped'] or 'it ended'}{running}")
    for part, make in LINES.items():
        if part in report:
            lines += make(report[part], len(report["missing"].get(part, [])))
    return lines
