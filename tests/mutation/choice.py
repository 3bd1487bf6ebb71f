"""Which bodies and backends a mutant of a kernel text is in."""

import functools
import re
from pathlib import Path

from mhc_mlx import launch
from mutation.operators import ROOT, Mutant, without_comments

FIRST_ON_CUDA = "include/cuda/metal_words.h"
ONLY_GPU = re.compile(r"/cuda/(ptx|metal_words)\.h$")  # the simulator has its own in their place


def backends(file: str) -> tuple[str, ...]:
    """Those that a kernel text is for."""
    one = re.search("include/(metal|cuda)/", file)
    return (one.group(1),) if one else ("metal", "cuda")


@functools.cache
def definitions(header: str) -> tuple[tuple[int, int, str, str], ...]:
    """(start, end, name, text) of what a header defines."""
    code = without_comments(launch._read(header))
    found = []
    for piece in re.finditer(
        r"(?m)^(?:template|METAL_FUNC|inline|constexpr|struct|enum|#define)\b.*?"
        r"(?=^(?:template|METAL_FUNC|inline|constexpr|struct|enum|#define|#endif|#if|#else|\}  |})"
        r"|\Z)",
        code,
        re.S,
    ):
        head = re.sub(r"template <[^\n]*?>(?= |\n)|alignas\([^)]*\)+", "", piece.group())
        names = re.findall(r"\b(\w+)(?= ?[({=])", head)[:1] or re.findall(r"#define (\w+)", head)
        if head.startswith("enum"):
            names = re.findall(r"\b([A-Z]\w+)\b", head)
        defined = re.match(r"#define (\w+)", piece.group())
        for name in [defined.group(1)] if defined else names:
            found.append((piece.start(), piece.end(), name, piece.group()))
    return tuple(found)


@functools.cache
def headers_of(body: str) -> frozenset[str]:
    """All that a body includes, on Metal or CUDA, and what is before all on CUDA."""
    each = (launch.included_files(f"{body}.metal", backend) for backend in ("metal", "cuda"))
    return frozenset(name for names in each for name in names) | {FIRST_ON_CUDA}


@functools.cache
def reached(body: str) -> frozenset[str]:
    """The names in headers that a body uses, or what it uses does."""
    all_of = {}
    for header in headers_of(body):
        for _, _, name, text in definitions(header):
            all_of[name] = all_of.get(name, "") + text
    text = without_comments(launch._read(f"{body}.metal"))
    found, new = set(), set(re.findall(r"\w+", text)) & set(all_of)
    while new:
        name = new.pop()
        found.add(name)
        new |= (set(re.findall(r"\w+", all_of[name])) & set(all_of)) - found
    return frozenset(found)


def bodies_of(m: Mutant) -> set[str]:
    """The bodies whose programs a mutant of a kernel text changes."""
    bodies = {p.stem for p in (ROOT / "kernels").glob("*.metal")}
    if m.file.endswith(".metal"):
        return bodies & {Path(m.file).stem}
    header = next(h for b in bodies for h in headers_of(b) if m.file.endswith(f"/{h}"))
    bodies = {b for b in bodies if header in headers_of(b)}
    if header == FIRST_ON_CUDA:  # whose macros are in other texts
        return bodies
    names = {name for start, end, name, _ in definitions(header) if start <= m.start < end}
    return {b for b in bodies if not names or names & reached(b)}
