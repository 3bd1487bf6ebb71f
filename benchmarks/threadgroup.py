"""Run one threadgroup of a kernel's PTX on the CPU and count what it does: work, bytes and time.

The threads run in lock step, as on a GPU: of those that stand at different instructions the first
ones go on. Every element of device memory is 1, unless the caller gives an array; a body's control
flow depends on shapes and positions. What is wanted is no result but counts: instructions of a
warp by kind, 32-byte sectors of each buffer, and how long a threadgroup takes that is alone: an
instruction of a warp waits for its operands, and within a basic block, where the compiler orders
instructions, not for others before it.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks import arithmetic
from benchmarks.ptx import FLOATS, SECTOR, TYPES, WARP, Cost, Instruction, Program


@dataclass
class Buffer:
    """An array in device memory; the elements are ones unless data has them."""

    name: str
    base: int
    bytes: int
    fill: int  # four bytes
    data: np.ndarray | None = None


@dataclass
class Work:
    """What one threadgroup does."""

    steps: int = 0
    instructions: dict = field(default_factory=Counter)  # of warps, by kind, in machine code
    clocks: dict = field(default_factory=Counter)  # of units, by kind
    operations: Counter = field(default_factory=Counter)  # by PTX word
    loads: Counter = field(default_factory=Counter)  # sectors by buffer that no L1 had
    stores: Counter = field(default_factory=Counter)
    touched: Counter = field(default_factory=Counter)  # sectors by buffer, each once
    again: Counter = field(default_factory=Counter)  # (buffer, log2 of the bytes since): sectors
    chain: float = 0.0  # clocks of a threadgroup that is alone


class Stopped(Exception):
    """A threadgroup took more steps than allowed."""


class Threadgroup:
    """Runs one threadgroup. `latency(first, distance)` are the clocks of a load of a sector."""

    def __init__(
        self,
        program: Program,
        arguments: list[Buffer | np.ndarray],
        threads: int,
        group: int,
        groups: int,
        cost: Callable[[str], Cost],
        load_latency: Callable[[str, bool, int], tuple[bool, float]],
        issue: float = 1.0,
        most_steps: int = 400_000,
    ):
        self.program, self.threads, self.cost = program, threads, cost
        self.latency, self.issue, self.most_steps = load_latency, issue, most_steps
        self.warps = threads // WARP
        lanes = np.arange(threads, dtype=np.uint32)
        one = lambda v: np.full(threads, v, np.uint32)  # noqa: E731
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": lanes,
            "%tid.y": one(0),
            "%tid.z": one(0),
            "%ctaid.x": one(group),
            "%ntid.x": one(threads),
            "%nctaid.x": one(groups),
            "%laneid": lanes % WARP,
        }
        self.buffers = [a for a in arguments if isinstance(a, Buffer)]
        self.parameters: dict[str, np.ndarray] = {}
        for (name, _), a in zip(program.parameters, arguments, strict=True):
            value = np.array([a.base], np.uint64) if isinstance(a, Buffer) else a
            self.parameters[name] = value
        self.places = list(self.parameters)  # a parameter's address says which it is
        self.work = Work()
        self.ready: dict[str, np.ndarray] = {}
        zero = np.zeros(self.warps)
        self.base, self.end, self.fence = zero.copy(), zero.copy(), zero.copy()
        self.issued = zero.copy()
        self.used: dict[str, np.ndarray] = {}  # clocks of each pipe in this block
        # Asynchronous copies: when all of the open group arrive, and of each closed group.
        self.arriving: np.ndarray | None = None
        self.arrivals: list[np.ndarray] = []
        self.last: dict[int, int] = {}  # of each sector, the bytes touched when it last was
        self.clock_bytes = 0

    # ---- operands

    def value(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """The operand as numbers of a type."""
        found = self.registers.get(operand)
        if found is not None:
            if found.dtype == dtype or found.dtype == bool:
                return found
            if found.dtype.itemsize == dtype.itemsize:
                return found.view(dtype)
            return found.astype(dtype)
        if operand.startswith(("0f", "0F")):
            return (
                np.array([int(operand[2:], 16)], np.uint32).view("f4").astype(dtype)
                if dtype.kind == "f"
                else np.array([int(operand[2:], 16)], np.uint32).view(dtype)
            )
        if operand.startswith(("0d", "0D")):
            return np.array([int(operand[2:], 16)], np.uint64).view("f8").astype(dtype)
        if re.fullmatch(r"-?\d+|-?0x[0-9a-fA-F]+", operand):
            number = (
                int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
                if dtype.kind != "f"
                else float(int(operand, 0))
            )
            return (
                np.array([number]).astype(dtype)
                if dtype.kind == "f"
                else np.array([number], np.dtype(f"u{dtype.itemsize}")).view(dtype)
            )
        if operand in self.program.shared:
            return np.array([self.program.shared[operand]]).astype(dtype)
        if operand in self.parameters:
            return np.array([(1 + self.places.index(operand)) << 12]).astype(dtype)
        width = self.width(operand)
        if width is not None:  # never written: undefined
            return np.zeros(self.threads, width).astype(dtype)
        return np.zeros(1, dtype)

    def width(self, register: str) -> np.dtype | None:
        return self.program.widths.get(re.sub(r"\d+$", "", register))

    def write(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if register in ("_", "%_"):
            return
        width = self.width(register)
        if width is None:
            return
        if value.dtype != width:
            if (
                value.dtype.kind == "b"
                or value.dtype.itemsize != width.itemsize
                or width.kind == "b"
            ):
                value = value.astype(width)
            else:
                value = value.view(width)
        if value.shape[0] != self.threads:
            value = np.broadcast_to(value, self.threads)
        old = self.registers.get(register)
        if mask is not None and old is not None:
            value = np.where(mask, value, old)
        self.registers[register] = np.ascontiguousarray(value)

    # ---- memory

    def addresses(self, operand: str) -> np.ndarray:
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert match, operand
        base = self.value(match[1], np.dtype("u8")).astype(np.int64)
        return np.broadcast_to(base + int(match[2] or "0", 0), self.threads)

    def touch(self, addresses, size: int, mask, load: bool) -> np.ndarray:
        """Count sectors; return for each warp the clocks until a load has all."""
        lanes = np.flatnonzero(mask) if mask is not None else np.arange(self.threads)
        first = addresses[lanes] // SECTOR
        last = (addresses[lanes] + size - 1) // SECTOR
        warp = (lanes // WARP).astype(np.int64) << 50
        keys = np.unique(
            np.concatenate([first + warp, last + warp]) if (first != last).any() else first + warp
        )
        waits, work = np.zeros(self.warps), self.work
        for key in keys.tolist():
            w, sector = key >> 50, key & ((1 << 50) - 1)
            name = self.buffers[(sector * SECTOR >> 40) - 1].name
            before = self.last.get(sector)
            if before is None:
                self.clock_bytes += SECTOR
                work.touched[name] += 1
            distance = self.clock_bytes - before if before is not None else 0
            self.last[sector] = self.clock_bytes
            if not load:
                work.stores[name] += 1
                continue
            hit, wait = self.latency(name, before is None, distance)
            if not hit:
                work.loads[name] += 1
                if before is not None:
                    work.again[name, max(0, distance).bit_length()] += 1
            if wait > waits[w]:
                waits[w] = wait
        return waits

    def loaded(self, addresses, dtype: np.dtype, offset: int) -> np.ndarray:
        index = int(addresses[0] >> 40) - 1
        buffer = self.buffers[index] if 0 <= index < len(self.buffers) else self.buffers[0]
        if buffer.data is not None:
            at = np.clip((addresses + offset - buffer.base) // 4, 0, buffer.data.size - 1)
            return (
                buffer.data[at].astype(np.uint32).astype(dtype)
                if dtype.itemsize != 4
                else buffer.data[at].view(dtype)
            )
        pattern = np.array([buffer.fill] * 2, np.uint32)
        return (
            pattern.view(np.uint8)[: dtype.itemsize].copy().view(dtype)
            if dtype.itemsize <= 8
            else np.zeros(1, dtype)
        )

    # ---- running

    def run(self) -> Work:
        program = self.program
        pending: list[tuple[int, np.ndarray | None]] = [(0, None)]
        waiting: list[tuple[int, np.ndarray | None]] = []
        everyone = np.ones(self.threads, bool)
        while pending or waiting:
            if not pending:  # all that are left wait at a barrier
                masks = [everyone if m is None else m for _, m in waiting]
                active = np.logical_or.reduce(masks).reshape(self.warps, WARP).any(1)
                self.close_block(active)
                latest = self.base[active].max() + self.cost("bar.sync").latency
                self.base[active] = latest
                pending, waiting = [(pc + 1, m) for pc, m in waiting], []
                continue
            if len(pending) > 1:
                pending.sort(key=lambda c: c[0])
                while len(pending) > 1 and pending[0][0] == pending[1][0]:
                    (pc, a), (_, b) = pending.pop(0), pending.pop(0)
                    both = None if a is None or b is None else a | b
                    pending.insert(0, (pc, None if both is None or both.all() else both))
            pc, mask = pending.pop(0)
            limit = pending[0][0] if pending else 1 << 60
            while True:
                if pc >= limit or pc >= len(program.instructions):
                    if pc < len(program.instructions):
                        pending.append((pc, mask))
                    break
                self.work.steps += 1
                if self.work.steps > self.most_steps:
                    raise Stopped
                at = program.instructions[pc]
                active = None if mask is None else mask.reshape(self.warps, WARP).any(1)
                if at.new_block:
                    self.close_block(active)
                word = at.op.split(".")[0]
                if word == "bra":
                    self.account(at, active, None)
                    target = program.labels[at.sources[-1]]
                    if at.predicate is None:
                        pc = target
                        if pending:
                            pending.append((pc, mask))
                            break
                        continue
                    taken = self.value(at.predicate, np.dtype("?"))
                    taken = np.broadcast_to(~taken if at.negated else taken, self.threads)
                    if mask is not None:
                        go, stay = taken & mask, mask & ~taken
                    else:
                        go, stay = taken, ~taken
                    if not stay.any():
                        pc = target
                    elif not go.any():
                        pc += 1
                    else:
                        pending += [(target, go.copy()), (pc + 1, stay.copy())]
                        break
                    if pending:
                        pending.append((pc, mask))
                        break
                    continue
                if word in ("ret", "exit"):
                    if at.predicate is None:
                        break
                if at.op.startswith("bar.sync") or at.op.startswith("barrier.sync"):
                    self.account(at, active, None)
                    waiting.append((pc, mask))
                    break
                self.execute(at, mask, active)
                pc += 1
        self.close_block(None)
        self.work.chain = float(
            max(self.base.max(), max((r.max() for r in self.ready.values()), default=0))
        )
        return self.work

    def close_block(self, active) -> None:
        end = np.maximum(self.end, self.base + self.issued)
        for used in self.used.values():
            end = np.maximum(end, self.base + used)
        if active is None:
            self.base, self.end = end, end.copy()
            self.issued[:] = 0
            self.fence[:] = 0
            self.used.clear()
        else:
            self.base[active] = end[active]
            self.end[active] = end[active]
            for clocks in (self.issued, self.fence, *self.used.values()):
                clocks[active] = 0

    def account(self, at: Instruction, active, extra: np.ndarray | None, ordered: str = "") -> None:
        """Count an instruction and say when it issues and when its result is there."""
        cost = self.cost(at.op)
        warps = self.warps if active is None else int(active.sum())
        work = self.work
        work.operations[at.op] += warps
        if cost.number:
            work.instructions[cost.kind] += warps * cost.number
        if cost.clocks:
            work.clocks[cost.kind] += warps * cost.clocks
        busy = self.issued
        used = self.used.get(cost.pipe)
        if used is not None:
            busy = np.maximum(busy, used)
        issue = self.base + busy
        for operand in [*at.sources, *([at.predicate] if at.predicate else [])]:
            for name in re.findall(r"%\w+", operand) if operand[0] in "{[" else (operand,):
                ready = self.ready.get(name)
                if ready is not None:
                    issue = np.maximum(issue, ready)
        if ordered == "load":
            issue = np.maximum(issue, self.fence)
        elif ordered == "store":
            self.fence = (
                np.maximum(self.fence, issue)
                if active is None
                else np.where(active, np.maximum(self.fence, issue), self.fence)
            )
        done = issue + cost.latency + (0 if extra is None else extra)
        count, held = cost.number * self.issue, cost.clocks * self.issue
        if used is None:
            used = np.zeros(self.warps)
        if active is None:
            self.end = np.maximum(self.end, issue)
            self.issued = self.issued + count
            self.used[cost.pipe] = used + held
        else:
            self.end = np.where(active, np.maximum(self.end, issue), self.end)
            self.issued = np.where(active, self.issued + count, self.issued)
            self.used[cost.pipe] = np.where(active, used + held, used)
        for name in at.target:
            old = self.ready.get(name)
            self.ready[name] = (
                done if active is None or old is None else np.where(active, done, old)
            )

    def execute(self, at: Instruction, mask, active) -> None:
        parts = at.op.split(".")
        word, kind = parts[0], parts[-1]
        if at.predicate is not None:
            taken = np.broadcast_to(self.value(at.predicate, np.dtype("?")), self.threads)
            taken = ~taken if at.negated else taken
            mask = taken if mask is None else mask & taken
            if not mask.any():
                self.account(at, active, None)
                return
        if word in ("ld", "ldu") and "param" not in parts[:2]:
            self.load(at, parts, mask, active)
            return
        if word == "ld":
            self.load_parameter(at, mask)
            return
        if word == "st":
            size = TYPES[kind].itemsize * next(
                (int(p[1]) for p in parts if re.fullmatch(r"v\d", p)), 1
            )
            if "global" in parts:
                self.touch(self.addresses(at.sources[0]), size, mask, False)
            self.account(at, active, None, "store" if "global" in parts else "")
            return
        if word == "cp" and "async" in parts and "shared" in parts:
            size = int(at.sources[2])
            waits = self.touch(self.addresses(at.sources[1]), size, mask, True)
            self.account(at, active, None)
            arrives = self.base + self.issued + waits
            before = arrives if self.arriving is None else self.arriving
            self.arriving = np.maximum(before, arrives)
            return
        if word == "cp":
            self.copies(at, parts)
            self.account(at, active, None)
            return
        self.account(at, active, None)
        if not at.target:
            return
        for name, value in zip(at.target, self.compute(at, parts, word, kind), strict=False):
            self.write(name, value, mask)

    def copies(self, at: Instruction, parts: list[str]) -> None:
        """Of asynchronous copies: close a group of them, or wait for all but the last few."""
        closed = self.arrivals
        if "commit_group" in parts:
            closed.append(self.base.copy() if self.arriving is None else self.arriving)
            self.arriving = None
        elif "wait_group" in parts:
            left = int(at.sources[0])
            for arrives in closed[: max(0, len(closed) - left)]:
                self.end = np.maximum(self.end, arrives)
                self.base = np.maximum(self.base, arrives - self.issued)
            del closed[: max(0, len(closed) - left)]

    def load(self, at: Instruction, parts: list[str], mask, active) -> None:
        dtype = TYPES[parts[-1]]
        size = dtype.itemsize * len(at.target)
        if "global" in parts or "const" in parts:
            addresses = self.addresses(at.sources[0])
            known = self.buffers[max(0, int(addresses[0] >> 40) - 1)].data is not None
            waits = np.zeros(self.warps) if known else self.touch(addresses, size, mask, True)
            self.account(at, active, waits, "load")
            for k, name in enumerate(at.target):
                self.write(name, self.loaded(addresses, dtype, k * dtype.itemsize), mask)
            return
        self.account(at, active, None)
        pattern = np.array([0x3F800000] * 2, np.uint32).view(np.uint8)[: dtype.itemsize]
        if dtype.itemsize == 2:
            pattern = np.array([0x3F80], np.uint16).view(np.uint8)
        for name in at.target:
            self.write(name, pattern.copy().view(dtype), mask)

    def load_parameter(self, at: Instruction, mask) -> None:
        match = re.fullmatch(r"\[\s*([^\s+\]]+)(?:\+(\d+))?\s*\]", at.sources[0])
        assert match, at.text
        offset, name = int(match[2] or 0), match[1]
        if name not in self.parameters:
            address = int(self.value(name, np.dtype("u8"))[0])
            name, offset = self.places[(address >> 12) - 1], offset + (address & 0xFFF)
        value = self.parameters[name]
        for k, name in enumerate(at.target):
            index = offset // value.dtype.itemsize + k
            self.write(name, value[index : index + 1], mask)

    def compute(self, at: Instruction, parts, word: str, kind: str) -> list[np.ndarray]:
        take, s = self.value, at.sources
        if word == "mov":
            if s[0].startswith("{"):
                names = re.findall(r"%?\w+", s[0])
                low = take(names[0], self.width(names[0]) or np.dtype("u2"))
                pieces = np.stack(
                    [np.broadcast_to(take(n, low.dtype), self.threads) for n in names], 1
                )
                return [np.ascontiguousarray(pieces).view(TYPES[f"u{kind[1:]}"])[:, 0]]
            if len(at.target) > 1:
                value = np.broadcast_to(take(s[0], TYPES[kind]), self.threads)
                narrow = self.width(next(t for t in at.target if t != "_")) or np.dtype("u2")
                pieces = np.ascontiguousarray(value).view(narrow).reshape(self.threads, -1)
                return [np.ascontiguousarray(pieces[:, k]) for k in range(len(at.target))]
            return [take(s[0], TYPES[kind] if kind in TYPES else np.dtype("?"))]
        if word in ("cvta", "ldmatrix", "movmatrix"):
            if word == "cvta":
                return [take(s[0], np.dtype("u8"))]
            return [np.array([0x3F803F80], np.uint32)] * len(at.target)
        if word in ("mma", "simd_multiply", "simdgroup"):
            return [np.array([1.0], np.float32)] * len(at.target)
        if word in ("shfl", "simd_sum", "simd_max"):
            width = self.width(at.target[0]) or np.dtype("u4")
            return [take(s[0], width)]
        if word == "cvt":
            return [arithmetic.convert(parts, take(s[0], TYPES[kind]), kind)]
        if word == "setp":
            return [arithmetic.compare(parts[1], *(take(v, TYPES[kind]) for v in s[:2]))]
        if word == "selp":
            choose = np.broadcast_to(take(s[2], np.dtype("?")), self.threads)
            return [np.where(choose, take(s[0], TYPES[kind]), take(s[1], TYPES[kind]))]
        if kind == "pred":
            values = [take(v, np.dtype("?")) for v in s]
            f = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(word)
            return [f(*values)] if f else [np.logical_not(values[0])]
        if kind in FLOATS:
            return [arithmetic.floats(word, [take(v, TYPES[kind]) for v in s])]
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            return [take(s[0], TYPES.get(kind, np.dtype("u4")))]
        return [arithmetic.integers(take, parts, word, TYPES[kind], s)]


def buffer_of(name: str, index: int, bytes_: int, fill: int, data=None) -> Buffer:
    """The buffer of that place among all: its address says which it is."""
    return Buffer(name, (index + 1) << 40, bytes_, fill, data)
