"""Check the Metal source that MLX generates for a launch as Apple's compiler would, without a GPU.

pip install libclang
"""

import functools
import re
from pathlib import Path

import mlx.core as mx

from proof import simulator

STUB = Path(__file__).parent / "metal.hpp"
FLAGS = ["-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-cl-no-stdinc"]
FLAGS += ["-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"]
FLAGS += ["-include", str(STUB), "-Wfloat-conversion", "-Wimplicit-float-conversion"]
# The first warning comes from the macro `constant`, the second from the references of `parse`.
FLAGS += ["-Wno-duplicate-decl-specifier", "-Wno-null-dereference"]
SPACES = {"__global_device": "device", "__global_host": "constant", "__local": "threadgroup"}
NO_SPACE = (0, 5)  # clang's numbers of no address space, and of generic, OpenCL's default
POINTERS = ("POINTER", "LVALUEREFERENCE", "RVALUEREFERENCE")
TYPED = ("PARM_DECL", "VAR_DECL", "FIELD_DECL", "CSTYLE_CAST_EXPR", "CXX_STATIC_CAST_EXPR")
ABSENT = {"LAMBDA_EXPR": "a lambda", "GOTO_STMT": "goto", "ASM_STMT": "inline assembly"}
ATTRIBUTES = """dispatch_quadgroups_per_threadgroup dispatch_simdgroups_per_threadgroup
    dispatch_threads_per_threadgroup grid_origin grid_size quadgroup_index_in_threadgroup
    quadgroups_per_threadgroup simdgroup_index_in_threadgroup simdgroups_per_threadgroup
    thread_execution_width thread_index_in_quadgroup thread_index_in_simdgroup
    thread_index_in_threadgroup thread_position_in_grid thread_position_in_threadgroup
    threadgroup_position_in_grid threadgroups_per_grid threads_per_grid threads_per_simdgroup
    threads_per_threadgroup""".split()


@functools.cache
def _index():
    """Return libclang's Index, or None if libclang is missing."""
    try:
        from clang import cindex
    except ImportError:
        return None
    try:
        return cindex.Index.create()
    except cindex.LibclangError:
        return None


def available() -> bool:
    return _index() is not None


def parse(source: str):
    """Return clang's tree of generated source, after replacing what only Apple's clang accepts.

    Attributes are removed, and the kernel's threadgroup variables become references. The numbers of
    the lines do not change.
    """

    def references(found) -> str:
        kind, names = found.groups()
        each = [
            f"threadgroup {kind} (&{name}){sizes} = *(threadgroup {kind} (*){sizes})nullptr;"
            for name, sizes in re.findall(r"(\w+)((?:\[[^\]]*\])*)", names)
        ]
        return " ".join(each) + "\n" * found.group().count("\n")

    source = re.sub(r" ?\[\[[^\]]*\]\]", "", source)
    source = re.sub(r"(?m)^threadgroup ([\w:]+(?:<[^;=]*?>)?) ([^;=]*);", references, source)
    lines = source.split("\n")
    for _ in range(20):
        unit = _index().parse("launch.metal", FLAGS, [("launch.metal", "\n".join(lines))])
        alike = next(filter(_alike, unit.diagnostics), None)
        if alike is None:
            break
        for operand in sorted(alike.ranges, key=lambda r: (-r.end.line, -r.end.column)):
            for place, text in ((operand.end, ")"), (operand.start, "of_checker::value(")):
                line, at = lines[place.line - 1], place.column - 1
                lines[place.line - 1] = line[:at] + text + line[at:]
    return unit


def _alike(diagnostic) -> bool:
    """Tell whether a diagnostic refuses `a ? object : value` of one struct.

    Metal accepts this (complex64 in MLX's steel/gemm/loader.h). In OpenCL the type of the object
    has an address space, so clang sees two types.
    """
    pair = re.match(r"incompatible operand types \('(.*)' and '(.*)'\)", diagnostic.spelling)
    return bool(pair) and len({re.sub("__private |const ", "", t) for t in pair.groups()}) == 1


def _compiler(unit):
    """Yield (line, message) of each error and warning of clang."""
    for d in unit.diagnostics:
        notes = [n.spelling for n in d.children if "in instantiation" not in n.spelling]
        message = re.sub("__private ?", "", "; ".join([d.spelling, *notes[:1]]))
        for word, space in SPACES.items():
            message = message.replace(word, space)
        here = d.location.file and d.location.file.name == "launch.metal"
        yield (d.location.line if here else 0), message


def _text_lint(source: str):
    """Yield (line, message) of faults that a parser does not see."""
    constants = set(re.findall(r"(?:typename|int|bool) (\w+)[,>]", source))
    for number, line in enumerate(source.split("\n"), 1):
        if not line.isascii():
            yield number, "not ASCII, which MLX refuses"
        if re.match(r"\s*#\s*(if|elif)", line) and constants & set(re.findall(r"\w+", line)):
            yield number, "the preprocessor does not know template arguments: write if constexpr"


def _declarations(cursor):
    """Yield the declarations of the source, also those in namespaces."""
    for c in cursor.get_children():
        if c.location.file and c.location.file.name == "launch.metal":
            yield from _declarations(c) if c.kind.name == "NAMESPACE" else (c,)


def _lacks_space(c) -> bool:
    """Tell whether c is or returns a pointer or reference without a written address space."""
    kind = c.type.kind.name
    if c.kind.name == "PARM_DECL" and kind.endswith("ARRAY"):  # whose pointer OpenCL makes private
        return not {t.spelling for t in c.get_tokens()} & {"thread", *SPACES.values()}
    if c.kind.name in ("FUNCTION_DECL", "FUNCTION_TEMPLATE", "CXX_METHOD"):
        kind, pointer = c.result_type.kind.name, c.result_type
    elif c.kind.name in TYPED:
        pointer = c.type
    else:
        return False
    return kind in POINTERS and pointer.get_pointee().get_address_space() in NO_SPACE


def _after_parameters(method) -> list[str]:
    """Return the words between a member function's parameters and its body."""
    words = [t.spelling for t in method.get_tokens()]
    words = words[: words.index("{")] if "{" in words else words
    return words[len(words) - words[::-1].index(")") :]


def _tree_lint(declarations: list, source: str):
    """Yield (line, message) of what clang accepts, but Metal, MLX or CUDA does not."""
    kernel_name = re.search(r"\[\[kernel\]\] void (\w+)", source).group(1)
    inputs = re.findall(r"const (?:device|constant) \w+[*&] (\w+) \[\[buffer", source)
    taken = ATTRIBUTES + [f"{k}_{word}" for k in inputs for word in ("shape", "strides", "ndim")]
    for top in declarations:
        cursors, in_kernel = list(top.walk_preorder()), top.spelling == kernel_name
        used = {c.spelling for c in cursors if c.kind.name == "DECL_REF_EXPR"}
        for c in cursors:
            kind, line, word = c.kind.name, c.location.line, c.spelling
            parameter = in_kernel and kind == "PARM_DECL"
            if parameter and c.type.kind.name == "LVALUEREFERENCE":
                yield line, f"{word} is 0-d, and a pointer on CUDA: give it shape (1,)"
            elif _lacks_space(c):
                yield line, "a pointer or reference needs an address space"
            if kind in ABSENT:
                yield line, f"{ABSENT[kind]} is outside what Metal and CUDA share"
            if kind == "FIELD_DECL" and "simdgroup_float8x8" in c.type.spelling:
                yield line, "a matrix in a struct, whose constructor MSL 4.1 may lack"
            if kind == "CXX_METHOD" and "thread" not in _after_parameters(c):
                yield line, "a member function whose object has no address space: write thread"
            if in_kernel and kind == "RETURN_STMT":
                yield line, "an early return: barriers and simd operations need every thread"
            if parameter and word in taken and word not in used:
                yield line, f"MLX took some longer word for {word}, and passes it"
            if in_kernel and c.kind.is_declaration() and not parameter:
                for attribute in (t for t in taken if t in word):
                    yield line, f"{word} makes MLX pass {attribute}: name it otherwise"


def _recursion(declarations: list, source: str):
    """Yield (line, message) of functions that may call themselves.

    A call whose template arguments are computed calls another instance, and does not count.
    """
    lines, first, calls = source.split("\n"), {}, {}
    for f in declarations:
        if f.kind.name in ("FUNCTION_DECL", "FUNCTION_TEMPLATE"):
            start, end = f.extent.start, f.extent.end
            text = lines[start.line - 1 : end.line]
            text[-1] = text[-1][: end.column - 1]
            text[0] = text[0][start.column - 1 :]
            body = "\n".join(text).partition("{")[2]
            found = re.findall(r"\b(\w+)\s*(<[^;{}()]*>)?\s*\(", body)
            called = {g for g, arguments in found if not re.search("[-+*/]", arguments)}
            calls[f.spelling] = calls.get(f.spelling, set()) | called
            first.setdefault(f.spelling, f.extent.start.line)
    for k in calls:
        for f in calls:
            calls[f] |= calls[k] if k in calls[f] else set()
    yield from ((first[f], f"{f} may call itself") for f in calls if f in calls[f])


def refusals(source: str) -> list[str]:
    """Return why Metal, MLX or CUDA would refuse generated Metal source, with the lines."""
    source = [source, *re.findall(r"```\n(.*?)```", source, re.S)][-1]
    unit = parse(source)
    declarations = list(_declarations(unit.cursor))
    found = {*_compiler(unit), *_text_lint(source)}
    found |= {*_tree_lint(declarations, source), *_recursion(declarations, source)}
    lines = ["", *source.split("\n")]
    return [f"line {n}: {message}: {lines[n].strip()}" for n, message in sorted(found)]


_checked: set[str] = set()


def run(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """Check the source of a launch in place of `launch.run`, and return zeros."""
    source = simulator.generated(name, inputs, outputs, groups, threads, template)
    if source not in _checked:
        found = refusals(source)
        assert not found, f"{name}.metal is not Metal:\n" + "\n".join(found)
        _checked.add(source)
    return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]
