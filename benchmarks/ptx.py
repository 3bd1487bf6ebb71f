"""Read the text of a kernel in PTX: its parameters, shared arrays, labels and instructions."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WARP = 32
SECTOR = 32  # bytes, in which caches fetch
INTEGERS = {
    f"{s}{b}": np.dtype(f"{'i' if s == 's' else 'u'}{b // 8}")
    for s in "sub"
    for b in (8, 16, 32, 64)
}
FLOATS = {"f32": np.dtype("f4"), "f64": np.dtype("f8")}
TYPES = (
    INTEGERS | FLOATS | {"f16": np.dtype("u2"), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u4")}
)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Cost(NamedTuple):
    """What an instruction of a warp costs: its kind and pipe, how many of them it becomes in
    machine code, clocks for which it holds its pipe, clocks until its result is there."""

    kind: str
    pipe: str
    number: float
    clocks: float
    latency: float


class Instruction(NamedTuple):
    op: str
    target: list[str]
    sources: list[str]
    predicate: str | None
    negated: bool
    new_block: bool
    text: str


@dataclass
class Program:
    """A kernel in PTX: its parameters in order (name, bytes), shared arrays and instructions."""

    parameters: list[tuple[str, int]]
    shared: dict[str, int]
    shared_bytes: int
    instructions: list[Instruction]
    labels: dict[str, int]
    widths: dict[str, np.dtype]


def parse(text: str) -> Program:
    """Read the only kernel of a PTX module."""
    entry = text[text.index(".entry") :]
    head, _, rest = entry.partition("\n{")
    size = {"u64": 8, "u32": 4, "b64": 8, "b32": 4, "f32": 4}
    parameters = [
        (name, int(count) if count else size[kind])
        for kind, name, count in re.findall(
            r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr[^,\n]*?)? ?(\w+)(?:\[(\d+)\])?[,\n)]", head
        )
    ]
    shared, used = {}, 0
    for align, name, count in re.findall(r"\.shared \.align (\d+) \.b8 (\S+?)\[(\d*)\];", text):
        used = -(-used // int(align)) * int(align)
        shared[name] = used
        used += int(count or 0)
    kinds = {
        "pred": "?",
        "b16": "u2",
        "b32": "u4",
        "b64": "u8",
        "f32": "f4",
        "f64": "f8",
        "s32": "u4",
        "u32": "u4",
        "u64": "u8",
        "s16": "u2",
        "s64": "u8",
    }
    widths = {
        prefix: np.dtype(kinds[kind])
        for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%\w*?[a-zA-Z])(?:<\d+>)?;", rest)
    }
    instructions, labels, new = [], {}, True
    body = re.sub(r"//[^\n]*", "", rest)
    body = re.sub(r"(?m)^\s*\.(?:reg|shared|local|loc|pragma|file|section)\b[^\n]*", "", body)
    for line in re.split(r"[;\n]", body):
        line = line.strip().lstrip("{").strip()
        if line.startswith("}") or not line:
            continue
        if re.fullmatch(r"\$\w+:", line):
            labels[line[:-1]] = len(instructions)
            new = True
            continue
        match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line, re.S)
        if not match or line.startswith("."):
            continue
        operands = OPERAND.findall(
            match[4].rstrip("}").strip() if match[4].count("}") > match[4].count("{") else match[4]
        )
        op = match[3]
        no_target = op.split(".")[0] in ("st", "bar", "bra", "cp", "ret", "red", "membar", "fence")
        if op.startswith("setp") and "|" in operands[0]:
            operands[0:1] = operands[0].split("|")[:1]
        target = [] if no_target or not operands else re.findall(r"[^{},\s]+", operands[0])
        instructions.append(
            Instruction(
                op,
                target,
                operands if no_target else operands[1:],
                match[2],
                match[1] == "!",
                new,
                line,
            )
        )
        new = op.startswith(("bra", "ret", "bar"))
    return Program(parameters, shared, used, instructions, labels, widths)
