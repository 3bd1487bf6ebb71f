"""What an optimising LLVM makes of the Metal text that MLX generates, without a GPU.

apt-get install clang-19

Apple's compiler is a fork of LLVM, and only Macs have it. The exact text of a launch is compiled
here by clang-19 at -O2 for two targets. spir64 keeps LLVM's IR, with the default inliner: what lies
in memory there, or is narrow, was not mended by any pass. amdgcn (gfx1100, 32 lanes) allocates
registers, of which Apple's GPUs have 128 a thread. `python tests/proof/optimiser --help` prints
`Figures` of the variants that a name matches.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from proof.optimiser.llvm import available
from proof.optimiser.measure import (
    NARROWEST,
    REGISTERS,
    Figures,
    Variant,
    aligned_instructions,
    all_figures,
    figures,
    variant,
)

__all__ = ["EXCEPTIONS", "Exempt", "Fault", "Figures", "Variant", "all_figures", "available"]
__all__ += ["aligned_instructions", "faults", "figures", "unused", "variant"]


class Fault(NamedTuple):
    kind: str  # "array", "function", "spill", "narrow" or "split"
    words: str


class Exempt(NamedTuple):
    """A fault that stands, of the variants of a body whose template has these words."""

    body: str
    template: str  # words that the template has, as "N=16"; "" for all
    kind: str
    reason: str
    cost: str

    def covers(self, variant: Variant, fault: Fault) -> bool:
        words = set(variant.template.split(", "))
        alike = self.body == variant.body and self.kind == fault.kind
        return alike and set(self.template.split()) <= words


EXCEPTIONS: tuple[Exempt, ...] = ()


def each(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def faults(variant: Variant, figures: Figures) -> list[Fault]:
    """Return what is wrong, exceptions left out."""
    found = all_faults(variant, figures)
    return [f for f in found if not any(e.covers(variant, f) for e in EXCEPTIONS)]


def unused(figures: dict[Variant, Figures]) -> list[Exempt]:
    """Return the exceptions that cover nothing."""
    found = [(v, fault) for v, f in figures.items() for fault in all_faults(v, f)]
    return [e for e in EXCEPTIONS if not any(e.covers(*one) for one in found)]


def all_faults(variant: Variant, figures: Figures) -> list[Fault]:
    """Return what is wrong, exceptions or not."""
    found = []
    if figures.arrays or figures.array_bytes:
        words = f"{len(figures.arrays)} private arrays lie in memory: {each(figures.arrays)}"
        found.append(Fault("array", f"{words}; {figures.array_bytes} bytes of scratch"))
    if figures.functions:
        found.append(Fault("function", f"not inlined: {each(figures.functions)}"))
    if variant.main and (figures.spills or figures.scratch_bytes > figures.array_bytes):
        words = f"{figures.spills} registers spilled and {figures.scratch_bytes} bytes of scratch"
        found.append(Fault("spill", f"{words} at {REGISTERS} registers"))
    if figures.narrow:
        words = f"below {NARROWEST} bytes where all is aligned: {', '.join(figures.narrow)}"
        found.append(Fault("narrow", words))
    if figures.split:
        found.append(Fault("split", "; ".join(figures.split)))
    return found
