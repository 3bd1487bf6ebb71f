"""Figures of a variant: what LLVM makes of its text."""

import functools
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mhc_mlx.launch import Launch
from proof import simulator
from proof.optimiser import llvm, opencl

REGISTERS = 128  # of a thread on Apple's GPUs, where 384 threads share a core
KINDS = ("load", "store")
NARROWEST = 8  # bytes that a load or store of a stream must move
# Rows of C channels.
STREAMS = frozenset("x y out s u dout dx_out ds du dread dx dy gate_logits dgate_logits".split())
CACHE = Path(tempfile.gettempdir(), simulator.CACHE.name.replace("simulator", "optimiser"))


class Variant(NamedTuple):
    """A text that MLX generates, and where it comes from."""

    body: str
    template: str  # in words
    source: str
    threads: int
    pack_bytes: int  # of a stream; 16 where a body has no VEC, but runs; 0 without streams
    origin: str = ""  # the first case that launches it
    main: bool = False  # of a shape that models have

    def __str__(self) -> str:
        return f"{self.body} ({self.origin})"


@dataclass(frozen=True)
class Figures:
    """What LLVM makes of a variant. Counts of instructions are of the text, not of a run."""

    registers: int  # a lane's, where 256 may be had
    spills: int  # registers that lie in memory where REGISTERS may be had
    scratch_bytes: int  # of a thread where REGISTERS may be had: spills, and arrays
    array_bytes: int  # of scratch where 256 may be had and none is spilled, so of arrays
    arrays: tuple[str, ...]  # types of private arrays in memory, of functions too (spir64)
    functions: tuple[str, ...]  # that are not inlined (spir64)
    loads: dict[str, int]  # of device memory by bytes moved at once, as "load x 16" (spir64)
    stores: dict[str, int]
    narrow: tuple[str, ...]  # accesses of streams below NARROWEST bytes where all is aligned
    split: tuple[str, ...]  # streams whose packs LLVM made fewer where they may not be aligned
    instructions: dict[str, int]  # by kind, see llvm.KINDS (amdgcn)
    by_depth: tuple[dict[str, int], ...]  # the same outside loops, in loops, in loops in those, ...
    code_bytes: int  # (amdgcn)

    @property
    def alu(self) -> int:
        """Instructions that compute, but products of matrices and what is transcendental."""
        return sum(self.instructions.get(kind, 0) for kind in ("fma", "other_alu"))


def variant(launch: Launch, origin: str = "", main: bool = False) -> Variant:
    """Return the variant of a launch, whose arrays may be shapes with dtypes, as `record` gives."""
    given = {k: mx.zeros(*a) if isinstance(a, tuple) else a for k, a in launch.inputs.items()}
    source = simulator.generated(launch.name, given, *launch[2:])
    template = dict(launch.template)
    pack = template["VEC"] * template["T"].size if "VEC" in template else 16
    pack = pack if {"x", "s"} & launch.inputs.keys() else 0
    words = ", ".join(f"{k}={str(v).removeprefix('mlx.core.')}" for k, v in template.items())
    return Variant(launch.name, words, source, launch.threads, pack, origin, main)


made: dict[Variant, Figures] = {}  # of this process


def figures(variant: Variant) -> Figures:
    """Compile a variant; equal texts are compiled once on this machine."""
    if variant not in made:
        made[variant] = kept_figures(variant)
    return made[variant]


def kept_figures(variant: Variant) -> Figures:
    """Figures from the cache, or made and kept there."""
    simulator.check_private(CACHE)
    key = [variant.source, str(variant.threads), str(variant.pack_bytes), tool()]
    kept = CACHE / f"{hashlib.sha256(''.join(key).encode()).hexdigest()[:24]}.json"
    if not kept.exists():
        made = compile_variant(variant)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as f:
            json.dump(asdict(made), f)
        Path(f.name).replace(kept)
    found = json.loads(kept.read_text())
    return Figures(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


@functools.cache
def tool() -> str:
    """Everything that figures depend on, but the variant."""
    files = (__file__, llvm.__file__, opencl.__file__, llvm.HEADER)
    return llvm.version() + "".join(Path(f).read_text() for f in files)


def compile_variant(variant: Variant) -> Figures:
    program = opencl.program(variant.source, variant.threads)
    ir = llvm.compiled(program, llvm.SPIR64)
    assembly = llvm.compiled(program, llvm.AMDGCN)
    free = limited = llvm.assembly_figures(assembly)
    if free["registers"] > REGISTERS or free["scratch_bytes"]:
        limited = llvm.assembly_figures(llvm.compiled(program, llvm.AMDGCN, REGISTERS))
    depths, accesses = llvm.instructions(assembly), llvm.accesses(ir)
    widths = {kind: Counter(a.words for a in accesses if a.kind == kind) for kind in KINDS}
    streams = aligned = []
    if variant.pack_bytes >= NARROWEST:
        streams = of_streams(accesses, llvm.entry_of(ir)[0])
        program = opencl.program(variant.source, variant.threads, aligned=True)
        ir_aligned = llvm.compiled(program, llvm.SPIR64)
        aligned = of_streams(llvm.accesses(ir_aligned), llvm.entry_of(ir_aligned)[0])
    return Figures(
        registers=free["registers"],
        spills=limited["spills"],
        scratch_bytes=limited["scratch_bytes"],
        array_bytes=0 if free["spills"] else free["scratch_bytes"],
        arrays=tuple(llvm.arrays(ir)),
        functions=tuple(llvm.functions(ir)),
        loads=dict(sorted(widths["load"].items())),
        stores=dict(sorted(widths["store"].items())),
        narrow=narrow(aligned),
        split=split(aligned, streams),
        instructions=dict(sum(depths, Counter())),
        by_depth=tuple(map(dict, depths)),
        code_bytes=free["code_bytes"],
    )


def aligned_instructions(variant: Variant) -> list[Counter[str]]:
    """Return instructions by kind and depth of loops where all is aligned: what models run.

    `Figures` counts those for unaligned arrays too.
    """
    program = opencl.program(variant.source, variant.threads, aligned=True)
    return llvm.instructions(llvm.compiled(program, llvm.AMDGCN))


def of_streams(accesses: Iterable[llvm.Access], buffers: Iterable[str]) -> list[llvm.Access]:
    """Return the accesses of streams, and those of which nobody knows the buffer."""
    known = set(buffers)
    return [a for a in accesses if STREAMS & set(a.buffers) or not set(a.buffers) <= known]


def narrow(aligned: list[llvm.Access]) -> tuple[str, ...]:
    """Name accesses of streams below NARROWEST bytes, in the program where all is aligned."""
    found = Counter(a.words for a in aligned if a.bytes < NARROWEST)
    return tuple(f"{count} x {words}" for words, count in sorted(found.items()))


def split(aligned: list[llvm.Access], text: list[llvm.Access]) -> tuple[str, ...]:
    """Name streams of which packs move less in the text than in the program where all is aligned.

    LLVM merges equal loads of both branches of `if (aligned)`, and leaves the narrow ones.
    """
    moved: tuple[Counter, Counter] = Counter(), Counter()
    for total, accesses in zip(moved, (aligned, text), strict=True):
        for a in accesses:
            total[a.kind, "|".join(a.buffers)] += a.bytes if a.bytes >= NARROWEST else 0
    return tuple(
        f"{kind} {buffers}: packs of {moved[1][kind, buffers]} bytes in all, where aligned {count}"
        for (kind, buffers), count in sorted(moved[0].items())
        if moved[1][kind, buffers] < count
    )


def all_figures(variants: Iterable[Variant], workers: int = 1) -> dict[Variant, Figures]:
    variants = list(variants)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(variants, pool.map(figures, variants), strict=True))
