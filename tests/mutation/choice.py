"""Which tests can see a mutant: from what `run.py record` saw, and from the text around it."""

import ast
import functools
import gzip
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mhc_mlx import launch
from mutation.operators import ROOT, Mutant, sources, without_comments

# Seconds to compile a changed variant, by what launches it.
COMPILE = {"simulator": 3.0, "simulator, CUDA": 4.0, "dialect": 0.4, "nvrtc": 1.2}
FORMS = {"metal": ("simulator", "dialect"), "cuda": ("simulator, CUDA", "nvrtc")}
FIRST_ON_CUDA = "include/cuda/metal_words.h"
ONLY_GPU = re.compile(r"/cuda/(ptx|metal_words)\.h$")  # the simulator has its own in their place
# They quote bodies' texts, need a GPU, or compile every case before their first.
SLOW = "tests/proof/test_nvrtc.py::test_compiles_without_spills"
LEFT_OUT = re.compile(rf"tests/(mutation/|ops/test_gpu|proof/test_freeze)|{SLOW}")


@dataclass
class Test:
    name: str
    seconds: float
    fixtures: dict[str, float] = field(default_factory=dict)  # those it shares, and their seconds
    launched: set = field(default_factory=set)  # (form, body, template)

    @property
    def function(self) -> str:
        return self.name.partition("[")[0]


def digests() -> dict[str, str]:
    """Of the Python sources, whose lines a map knows by their numbers."""
    each = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in sources()}
    return {k: hashlib.sha256(v).hexdigest() for k, v in each.items() if k.endswith(".py")}


class Map:
    """What each test runs: lines of Python, variants of bodies."""

    def __init__(self, path: Path):
        data = json.loads(gzip.decompress(path.read_bytes()))
        new, old = digests(), data.get("sources", {})
        changed = sorted(k for k in new if new[k] != old.get(k))
        if changed:
            raise SystemExit(f"{path} is of other text of {', '.join(changed)}: record it again")
        self.at_import = {f: set(lines) for f, lines in data["collection"].items()}
        self.tests: dict[str, Test] = {}
        self.covers: dict[tuple[str, int], set[str]] = {}
        for name, one in data["tests"].items():
            if one["outcome"] != "passed" or LEFT_OUT.match(name):
                continue
            launched = set(map(tuple, one["launched"]))
            self.tests[name] = Test(name, one["seconds"], one["fixtures"], launched)
            for file, lines in one["lines"].items():
                for line in lines:
                    self.covers.setdefault((file, line), set()).add(name)

    def of_lines(self, file: str, first: int, last: int) -> set[str]:
        return set().union(*(self.covers.get((file, k), ()) for k in range(first, last + 1)))

    def of_mutant(self, m: Mutant) -> tuple[set[str], dict[str, float]]:
        """The tests that can see it, and what each costs more than when it was recorded."""
        if not m.file.endswith(".py"):
            return self.of_kernel(m)
        found = self.of_lines(m.file, m.line, m.line) or self.of_lines(m.file, *m.lines)
        if self.at_import.get(m.file, set()) & set(range(m.lines[0], m.lines[1] + 1)):
            found |= self.of_definition(m)
        return found, {}

    def of_definition(self, m: Mutant) -> set[str]:
        """Of what runs when a module is imported: who uses the names that it defines."""
        found, names = set(), set()
        for node in ast.walk(tree(m.file)):
            if not isinstance(node, ast.stmt) or not node.lineno <= m.line <= node.end_lineno:
                continue
            if isinstance(node, ast.FunctionDef) and m.line < node.body[0].lineno:
                found |= self.of_lines(m.file, node.body[0].lineno, node.end_lineno)
            elif isinstance(node, ast.FunctionDef):
                return found  # within a body, which runs at import: rare
            elif isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        word = re.compile(rf"\b({'|'.join(map(re.escape, names)) or '$.'})\b")
        for path in sources():
            if path.suffix == ".py":
                file = path.relative_to(ROOT).as_posix()
                for k, line in enumerate(path.read_text().split("\n"), 1):
                    if word.search(line):
                        found |= self.of_lines(file, k, k)
        for path in ROOT.glob("tests/**/test_*.py"):
            if word.search(path.read_text()):
                file = path.relative_to(ROOT).as_posix() + "::"
                found |= {name for name in self.tests if name.startswith(file)}
        return found or {
            name for (f, _), names in self.covers.items() if f == m.file for name in names
        }

    def of_kernel(self, m: Mutant) -> tuple[set[str], dict[str, float]]:
        bodies = bodies_of(m)
        forms = {form for k in backends(m.file) for form in FORMS[k]}
        more = {}
        for test in self.tests.values():
            variants = [v for v in test.launched if v[1] in bodies and v[0] in forms]
            if variants:
                more[test.name] = sum(COMPILE[v[0]] for v in variants)
        return set(more), more

    def ordered(self, names: set[str], more: dict[str, float]) -> list[tuple[str, float]]:
        """Cheapest first: first one test of each function, then the others."""
        each = []
        for name in names:
            test = self.tests[name]
            shared = sum(test.fixtures.values())
            each.append((test.seconds + shared + more.get(name, 0.0), name))
        seen, first, rest = set(), [], []
        for seconds, name in sorted(each):
            function = self.tests[name].function
            (rest if function in seen else first).append((name, seconds))
            seen.add(function)
        return first + rest


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


# --- kernels --------------------------------------------------------------------------------------


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
        r"(?m)^(?:template|inline|constexpr|struct|enum|#define)\b.*?(?=^(?:template|inline|constexpr"
        r"|struct|enum|#define|#endif|#if|#else|\}  |})|\Z)",
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
