"""Mutants: every small mistake that the operators below can make in a file, each a replaced span.

`mutants(path)` gives those of a kernel text (kernels/*.metal, *.h) or of a Python module. One is a
span of the file, what stands there instead, and the name of its operator; `Mutant.apply` makes the
mutated text. Comments, docstrings, annotations and static assertions have none.
"""

import ast
import bisect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("mhc_mlx/**/*.py", "kernels/*.metal", "kernels/**/*.h")
SOURCES += ("benchmark.py", "benchmarks/*.py", "examples/**/*.py")


@dataclass(frozen=True)
class Mutant:
    """The text from start to end of a file becomes ``new``."""

    file: str  # from the root, with slashes
    start: int
    end: int
    new: str
    operator: str
    line: int  # where the span starts
    text: str  # the line as it is, without indentation
    changed: str  # what it becomes
    nth: int = 0  # of the mutants of this file that are alike in all four

    def apply(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operator}: {self.text} -> {self.changed}"

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What a report knows it by: other lines may come and go."""
        return self.file, self.text, self.operator, self.changed, self.nth


def sources(root: Path = ROOT) -> list[Path]:
    """The files that mutants are drawn from."""
    found = {p for pattern in SOURCES for p in root.glob(pattern)}
    return sorted(p for p in found if p.stat().st_size)


def mutants(path: Path, root: Path = ROOT) -> list[Mutant]:
    """All of a file, in the order of their places."""
    source, name = path.read_text(), path.relative_to(root).as_posix()
    make = of_python if path.suffix == ".py" else of_kernel
    return located(name, source, make(source))


def located(name: str, source: str, spans) -> list[Mutant]:
    """Mutants of (start, end, new, operator)."""
    starts, found = line_starts(source), {}
    for start, end, new, operator in spans:
        if source[start:end] == new:
            continue
        line = bisect.bisect(starts, start)
        first, last = starts[line - 1], source.find("\n", end)
        last = len(source) if last < 0 else last
        text = " ".join(source[first:last].split())
        changed = " ".join((source[first:start] + new + source[end:last]).split())
        found.setdefault(
            (start, end, new),
            Mutant(name, start, end, new, operator, line, text, changed),
        )
    alike: Counter = Counter()
    each = []
    for m in sorted(found.values(), key=lambda m: (m.start, m.end, m.operator, m.new)):
        each.append(replace(m, nth=alike[m.key]))
        alike[m.key] += 1
    return each


def line_starts(source: str) -> list[int]:
    return [0, *(found.end() for found in re.finditer("\n", source))]


# --- kernel texts ---------------------------------------------------------------------------------

SUBSCRIPTED = r"([\w.]+(?:\[[^\]]*\])*)"
CALLED = r"[A-Za-z_][\w:.]*(?:<[^;<>]*>)?(?:\[[^;=]*\]|\([^;=]*\))*"
DECLARED = r"(return|break|continue|using|const|constexpr|threadgroup|float|int|uint)\b"


def without_comments(source: str) -> str:
    """The text with comments, includes and strings blanked; every character keeps its place."""

    def blank(found):
        return re.sub(r"[^\n]", " ", found.group())

    return re.sub(r'//.*|(?m:^[ \t]*#(?!define).*)|"(?:\\.|[^"\\])*"|/\*.*?\*/', blank, source)


def closing(code: str, at: int) -> int:
    """After the bracket that closes the one at ``at``."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i + 1
    return len(code)


def operand_end(code: str, at: int) -> int | None:
    """After the operand that begins at ``at``: a name or number with its calls and subscripts, or
    a parenthesis."""
    head = re.compile(r"[-!~*&]?(?:[A-Za-z_][\w:]*|\d[\w.]*)").match(code, at)
    if head:
        at = head.end()
    elif at < len(code) and code[at] == "(":
        at = closing(code, at)
    else:
        return None
    while at < len(code):
        arguments = re.compile(r"<[^<>;={}&|]*(?:<[^<>;={}&|]*>)?[^<>;={}&|]*>(?=\()").match(
            code, at
        )
        member = re.compile(r"(?:\.|->)[A-Za-z_]\w*").match(code, at)
        if arguments:
            at = arguments.end()
        elif member:
            at = member.end()
        elif code[at] in "([":
            at = closing(code, at)
        else:
            break
    return at


def operand_start(code: str, at: int) -> int | None:
    """Where the operand begins that ends before ``at``."""
    end = at
    while at > 0 and code[at - 1] in ")]":
        depth, i = 0, at - 1
        while i >= 0:
            depth += (code[i] in ")]") - (code[i] in "([")
            if depth == 0:
                break
            i -= 1
        at = i
        name = re.search(r"[\w:.]*(?:<[\w:, ]*>)?$", code[:at])
        at -= len(name.group())
    if at == end:
        name = re.search(r"[\w:.]+$", code[:at])
        at = at - len(name.group()) if name else at
    return at if at < end else None


def of_kernel(source: str) -> Iterator[tuple]:
    code = without_comments(source)
    for pattern in (
        r"static_assert\([^;]*;",
        r"\btemplate <[^\n]*?>(?= (?:METAL_FUNC|inline|struct|constexpr))",
    ):
        code = re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found.group()), code)
    for make in KERNEL_OPERATORS:
        operator = make.__name__
        for start, end, new in make(code):
            yield start, end, new, operator


def replaced(pattern: str, code: str, new) -> Iterator[tuple[int, int, str]]:
    """The first group, or all, of each match replaced: by a text, or a function of the match."""
    for found in re.finditer(pattern, code):
        group = 1 if found.re.groups else 0
        text = new if isinstance(new, str) else new(found)
        if text is not None:
            yield found.start(group), found.end(group), text


def drop_barrier(code):
    barrier = "threadgroup_barrier|simdgroup_barrier|simdgroup_sync|commit_copies|__syncwarp"
    barrier += "|__syncthreads|wait_for_copies<[^;]*>"
    yield from replaced(rf"\b((?:{barrier})\([^;\n]*\));", code, "")


def move_bound(code):
    """Of a comparison: < and <=, > and >=."""
    other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
    yield from replaced(r" (<=?|>=?) (?!\{)", code, lambda found: other[found.group(1)])


def turn_comparison(code):
    other = {"==": "!=", "!=": "==", "&&": "||", "||": "&&"}
    yield from replaced(r" (==|!=|&&|\|\|) ", code, lambda found: other[found.group(1)])


def negate_condition(code):
    for found in re.finditer(r"\bif (?:constexpr )?(\()", code):
        end = closing(code, found.start(1))
        yield found.start(1), end, f"(!{code[found.start(1) : end]})"


def drop_operand(code):
    """A factor, a term, or one side of a condition."""
    for found in re.finditer(r" ([*+/%-]|&&|\|\|) (?=[\w(!-])", code):
        end, sign = operand_end(code, found.end()), found.group(1)
        while end and sign in "+-" and re.match(r" [*/%] [\w(]", code[end : end + 4]):
            end = operand_end(code, end + 3)  # all of a term
        before = code[: found.start()]
        if end and re.search(r"[\w)\]]$", before) and not re.search(r"\breturn$|=$", before):
            yield found.start(), end, ""
        start = operand_start(code, found.start())
        if start is None or sign not in ("*", "+", "&&", "||"):
            continue
        if sign != "+" or not re.match(r"[a-z_]+\b(?!\()", code[start:]):  # often a pointer
            yield start, found.end(), ""


def turn_sum(code):
    """+ and -, and the product that fma adds."""
    other = {"+": "-", "-": "+", "+=": "-=", "-=": "+="}
    yield from replaced(r" (\+=?|-=?) ", code, lambda found: other[found.group(1)])
    yield from replaced(r"\bfma(\()(?=\w)", code, "(-")


def turn_product(code):
    other = {"/": "*", "%": "/", "*=": "="}
    yield from replaced(r"(?<=[\w)\]]) (/|%|\*=) ", code, lambda found: other[found.group(1)])


def swap_indices(code):
    """Two subscripts, or the index and the offset of ``i * N + j``."""
    for found in re.finditer(r"(?<=[\w\]])\[", code):
        middle = closing(code, found.start())
        if code[middle : middle + 1] == "[":
            end = closing(code, middle)
            yield found.start(), end, code[middle:end] + code[found.start() : middle]
    for found in re.finditer(r"(\w+) \* ([\w:]+(?:\(\w+\))?) \+ (\w+)(?![\w(\[.])", code):
        i, size, j = found.groups()
        yield *found.span(), f"{j} * {size} + {i}"


def swap_arguments(code):
    """The first two of a call, where both are names or subscripts."""
    call = rf"\b(?!fma|max|min)\w+(?:<[\w:, ]*>)?\({SUBSCRIPTED}, {SUBSCRIPTED}(?=[,)])"
    for found in re.finditer(call, code):
        a, b = found.groups()
        yield found.start(1), found.end(2), f"{b}, {a}"


def drop_rounding(code):
    """static_cast<float>(static_cast<T>(v)) rounds v to T."""
    for found in re.finditer(r"static_cast<\w+>\((static_cast<\w+>)\(", code):
        yield *found.span(1), ""


def drop_cast(code):
    """Of a term or factor in the streams' type, or of what is stored in it."""
    yield from replaced(r"\b(static_cast<[A-Z]\w*>)\(", code, "")
    yield from replaced(r" [*+-]=? (static_cast<float>)\(\w+(?:\[\w+\])?\.v\[", code, "")


def narrow_product(code):
    """32 bits where a line multiplies in 64."""
    for found in re.finditer(r"[^\n]*\bsize_t\([^\n]*", code):
        yield *found.span(), re.sub(r"\bsize_t\(", "uint(", found.group())


def drop_reset(code):
    """An accumulator's start, where it is declared or set again."""
    yield from replaced(r"\b\w+(?:\[[^;=]*\])?( = (?:0\.0f|0|0u|\{\}))(?=[,;])", code, "")
    yield from replaced(r"(?m)(?:^[ \t]*|[;{)] )(\w+(?:\[[^;=]*\])? = (?:0\.0f|0|0u));", code, "")


def less_precise(code):
    yield from replaced(r"\b(precise)::", code, "fast")


def loop_headers(code) -> Iterator[tuple[int, int]]:
    for found in re.finditer(r"\b(?:UNROLL_FOR|UNROLL_16_FOR|for) (\()", code):
        yield found.start(1), closing(code, found.start(1))


def wrong_stride(code):
    """One more a step."""
    for start, end in loop_headers(code):
        header = code[start:end]
        step = re.search(r"(?:\+\+|--)(\w+)\)$", header)
        if step:
            sign = "+" if "++" in step.group() else "-"
            yield start + step.start(), end - 1, f"{step.group(1)} {sign}= 2"
        elif re.search(r"[+-]= [^;]*\)$", header):
            yield end - 1, end - 1, " + 1"


def drop_last_iteration(code):
    for start, end in loop_headers(code):
        for found in re.finditer(r" (<=?|>=?) ([^;&|?]+?)(?=;| &&)", code[start:end]):
            sign = "-" if found.group(1)[0] == "<" else "+"
            yield start + found.end(), start + found.end(), f" {sign} 1"


def drop_first_iteration(code):
    for start, end in loop_headers(code):
        found = re.match(r"\([\w ]+ \w+ = ([^;,]+)(?=;)", code[start:end])
        if found:
            yield start + found.end(), start + found.end(), " + 1"


def change_constant(code):
    """A number is another, a flag the opposite."""

    def other(found):
        word = found.group(1)
        if word in ("true", "false"):
            return "false" if word == "true" else "true"
        if re.fullmatch(r"\d+u?", word):
            return str(int(word.rstrip("u")) + 1) + "u" * word.endswith("u")
        if re.fullmatch(r"\d+\.\d*(?:e-?\d+)?f", word):
            value = float(word[:-1])
            return "1.0f" if value == 0 else f"{value * 1.5!r}f"
        return None

    yield from replaced(r"(?<![\w.])(\d[\w.]*(?:(?<=e)-\d+f)?|true|false)\b(?![\w.(])", code, other)


def negate_value(code):
    """A minus sign dropped."""
    yield from replaced(r"(?<=[(,=?:] )(-)(?=[\w(])|(?<=[(\[])(-)(?=[A-Za-z(])", code, "")


def swap_extremes(code):
    other = {"min": "max", "max": "min"}
    yield from replaced(r"\b(min|max)\(", code, lambda found: other[found.group(1)])


def drop_statement(code):
    """A line that is one assignment or call."""
    statement = rf"(?m)^[ \t]*({CALLED}(?: [-+*/]?= [^;{{]*)?);[ \t]*$"
    for found in re.finditer(statement, code):
        text, before = found.group(1), code[: found.start()].rstrip()
        continued = re.search("[-+*/%&|?<=,(]$", before)
        if re.search("[=(]", text) and not re.match(DECLARED, text) and not continued:
            yield *found.span(1), ""


def swap_branches(code):
    """Of a ? b : c."""
    for found in re.finditer(r" \? ([^?:;,()]+) : ([^?:;,()]+)(?=[;,)\]])", code):
        yield found.start(1), found.end(2), f"{found.group(2)} : {found.group(1)}"


KERNEL_OPERATORS = (
    *(drop_barrier, move_bound, turn_comparison, negate_condition, drop_operand, turn_sum),
    *(turn_product, swap_indices, swap_arguments, drop_rounding, drop_cast, narrow_product),
    *(drop_reset, less_precise, wrong_stride, drop_last_iteration, drop_first_iteration),
    *(change_constant, negate_value, swap_extremes, drop_statement, swap_branches),
)


# --- Python ---------------------------------------------------------------------------------------

COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
COMPARISONS |= {ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in")}
COMPARISONS |= {ast.NotIn: (r"not\s+in", "in"), ast.Is: ("is", "is not")}
COMPARISONS |= {ast.IsNot: (r"is\s+not", "is")}
BINARY = {ast.Add: (r"\+", "-"), ast.Sub: ("-", "+"), ast.Mult: (r"\*", "/"), ast.Div: ("/", "*")}
BINARY |= {ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: (r"\*\*", "*")}
BINARY |= {ast.BitOr: (r"\|", "&"), ast.BitAnd: ("&", "|")}
OPTION = re.compile(r"[A-Za-z][\w-]*")


class Python(ast.NodeVisitor):
    """Collects (start, end, new, operator) of a module."""

    def __init__(self, source: str):
        self.source, self.found, self.parents = source, [], []
        # of each line where its UTF-8 bytes are characters
        self.starts, self.lines = line_starts(source), source.split("\n")
        tree = ast.parse(source)
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        self.imported = {a.asname or a.name for n in imports for a in n.names}
        self.visit(tree)

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def text(self, node) -> str:
        return self.source[slice(*self.span(node))]

    def add(self, operator: str, start: int, end: int, new: str) -> None:
        self.found.append((start, end, new, operator))

    def replace(self, operator: str, node, new: str) -> None:
        self.add(operator, *self.span(node), new)

    def between(self, operator: str, left, right, token: str, new: str) -> None:
        """The token between two expressions becomes another."""
        start, end = self.span(left)[1], self.span(right)[0]
        code = re.sub(r"#.*", lambda found: " " * len(found.group()), self.source[start:end])
        found = re.search(token, code)
        if found:
            self.add(operator, start + found.start(), start + found.end(), new)

    def visit(self, node) -> None:
        if isinstance(node, ast.If) and "__name__" in self.text(node.test):
            return
        self.parents.append(node)
        getattr(self, f"visit_{type(node).__name__}", self.generic_visit)(node)
        self.parents.pop()

    def visit_all(self, *nodes) -> None:
        for node in nodes:
            for one in node if isinstance(node, list) else [node]:
                if one is not None:
                    self.visit(one)

    # What is no code that runs: annotations and docstrings.

    def visit_FunctionDef(self, node) -> None:
        self.visit_all(node.decorator_list, node.args.defaults, node.args.kw_defaults)
        self.visit_all(without_docstring(node.body))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node) -> None:
        self.visit_all(node.decorator_list, without_docstring(node.body))

    def visit_Module(self, node) -> None:
        self.visit_all(without_docstring(node.body))

    def visit_AnnAssign(self, node) -> None:
        self.visit_all(node.value)

    def visit_Import(self, node) -> None:
        pass

    visit_ImportFrom = visit_Import

    # What runs.

    def visit_Call(self, node) -> None:
        self.skip_call(node)
        self.change_arguments(node)

    def skip_call(self, node) -> None:
        arguments = [*node.args, *node.keywords]
        receiver = node.func.value if isinstance(node.func, ast.Attribute) else None
        if receiver is not None and self.text(receiver) not in self.imported:
            self.replace("skip_call", node, f"({self.text(receiver)})")
        elif len(arguments) == 1 and node.args and not isinstance(node.args[0], ast.Starred):
            if not isinstance(node.args[0], ast.GeneratorExp):
                self.replace("skip_call", node, f"({self.text(node.args[0])})")

    def change_arguments(self, node) -> None:
        arguments = [*node.args, *node.keywords]
        for k, one in enumerate(arguments):
            last = k == len(node.args) - 1
            if not (isinstance(one, ast.keyword) or last) or isinstance(one, ast.Starred):
                continue
            if one in node.keywords and one.arg in ("help", "description"):
                continue
            start, end = self.span(one)
            if len(arguments) > 1 and k:
                self.add("drop_argument", self.span(arguments[k - 1])[1], end, "")
            elif len(arguments) > 1:
                self.add("drop_argument", start, self.span(arguments[1])[0], "")
            elif isinstance(one, ast.keyword):
                self.add("drop_argument", start, end, "")
        if len(node.args) >= 2 and not re.search(r"\b(eval|max|min|gcd)$", self.text(node.func)):
            a, b = node.args[:2]
            plain = (ast.Name, ast.Attribute, ast.Subscript)
            if isinstance(a, plain) and isinstance(b, plain):
                both = f"{self.text(b)}, {self.text(a)}"
                self.add("swap_arguments", self.span(a)[0], self.span(b)[1], both)
        self.generic_visit(node)

    def visit_Expr(self, node) -> None:
        call = node.value
        if isinstance(call, ast.Call):
            self.replace("skip_statement", node, "pass")
            self.change_arguments(call)  # its value is not used: the call itself has one mutant
        else:
            self.generic_visit(node)

    def visit_AugAssign(self, node) -> None:
        self.replace("skip_statement", node, "pass")
        if type(node.op) in BINARY:
            token, new = BINARY[type(node.op)]
            self.between("turn_arithmetic", node.target, node.value, f"{token}=", f"{new}=")
        self.generic_visit(node)

    def visit_Assign(self, node) -> None:
        known = isinstance(node.targets[0], ast.Attribute | ast.Subscript)
        if known and len(node.targets) == 1:  # of a name there would be a NameError
            self.replace("skip_statement", node, "pass")
        self.generic_visit(node)

    def visit_Compare(self, node) -> None:
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            token, new = COMPARISONS[type(op)]
            self.between("turn_comparison", left, right, token, new)
        self.generic_visit(node)

    def visit_BinOp(self, node) -> None:
        if type(node.op) in BINARY:
            token, new = BINARY[type(node.op)]
            self.between("turn_arithmetic", node.left, node.right, token, new)
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            self.replace("drop_operand", node, f"({self.text(node.left)})")
            if isinstance(node.op, ast.Add | ast.Mult):
                self.replace("drop_operand", node, f"({self.text(node.right)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node) -> None:
        other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("turn_condition", left, right, rf"\b{other[0]}\b", other[1])
        for k in range(len(node.values)):
            rest = [self.text(v) for i, v in enumerate(node.values) if i != k]
            joined = f" {other[0]} ".join(f"({v})" for v in rest)
            self.replace("drop_operand", node, f"({joined})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node) -> None:
        if isinstance(node.op, ast.Not):
            self.replace("drop_not", node, f"({self.text(node.operand)})")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.replace("drop_minus", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def negate(self, test) -> None:
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self.replace("negate_condition", test, f"(not ({self.text(test)}))")

    def visit_If(self, node) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_If

    def visit_comprehension(self, node) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_Raise(self, node) -> None:
        self.replace("drop_raise", node, "pass")  # its message is not judged here
        if node.exc is not None and isinstance(node.exc, ast.Call):
            self.visit_all(node.exc.args)

    def visit_Return(self, node) -> None:
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1:
            a, b = node.value.elts[:2]
            both = f"{self.text(b)}, {self.text(a)}"
            self.add("swap_results", self.span(a)[0], self.span(b)[1], both)
        self.generic_visit(node)

    def visit_JoinedStr(self, node) -> None:
        pass  # words for a reader; Python 3.11 has no places in them

    def is_seed(self, call) -> bool:
        """Any seed is as good as another."""
        return isinstance(call, ast.Call) and bool(
            re.search(r"random\.(seed|key|default_rng)$", self.text(call.func))
        )

    def visit_Constant(self, node) -> None:
        value, parent = node.value, self.parents[-2]
        if isinstance(value, bool):
            self.replace("change_constant", node, str(not value))
        elif isinstance(value, int) and not self.is_seed(parent):
            self.replace("change_constant", node, str(value + 1))
        elif isinstance(value, float):
            new = 1.0 if value == 0 else value * 1.5
            self.replace("change_constant", node, repr(new))
        elif isinstance(value, str) and OPTION.fullmatch(value):
            option = (ast.Compare, ast.keyword, ast.FunctionDef)
            if isinstance(parent, option) and getattr(parent, "arg", "") != "help":
                self.replace("change_constant", node, repr(value + "_"))


def without_docstring(body: list) -> list:
    first = body[0] if body else None
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if text else body


def of_python(source: str) -> Iterator[tuple]:
    yield from Python(source).found


def parses(mutant: Mutant, root: Path = ROOT) -> bool:
    """Whether a mutated module is Python: an operator looks at a span alone."""
    if not mutant.file.endswith(".py"):
        return True
    try:
        ast.parse(mutant.apply((root / mutant.file).read_text()))
    except SyntaxError:
        return False
    return True
