"""What an optimising LLVM makes of the Metal text that MLX generates, without a GPU.

apt-get install clang-19

Apple's compiler is a fork of LLVM, and only Macs have it. The exact text of a launch is compiled
here by clang-19 at -O2 for two targets. spir64 keeps LLVM's IR, with the default inliner: what lies
in memory there, or is narrow, was not mended by any pass. amdgcn (gfx1100, 32 lanes) allocates
registers, of which Apple's GPUs have 128 a thread. `python tests/proof/optimiser --help` prints
`Figures` of the variants that a name matches.

    with launch.record() as launches:
        ops.stream_mix_add(x, y, h_post, h_res)
    for one in map(optimiser.variant, launches):
        print(one.body, optimiser.figures(one).registers, optimiser.aligned_instructions(one))
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
    size: int  # how many arrays, functions, registers or buffers


class Exempt(NamedTuple):
    """A fault that stands, of the variants of a body whose template has these words."""

    body: str
    template: str  # words that the template has, as "N=16"; "" for all
    kind: str
    most: int  # of the size of a fault
    reason: str  # and what it costs

    def covers(self, variant: Variant, fault: Fault) -> bool:
        alike = self.body == variant.body and self.kind == fault.kind
        words = set(variant.template.split(", "))
        return alike and set(self.template.split()) <= words and fault.size <= self.most


LONG_LINE = (
    "A lane holds a line of the matrix. Loops over it are unrolled by 16 at most, as longer bodies "
    "may crash Apple's back end; so a line of 32 or 64 is indexed at run time and lies in memory, "
    "up to 900 bytes a thread. Models have 4 streams."
)
ONE_CHANNEL = (
    "n > 8: a lane has one channel of a tile of 32, in which threads exchange streams. Loads of a "
    "simdgroup are contiguous, but of 16-bit streams eight times as many as with packs."
)
MANY_STREAMS = (
    "n = 8 or 16: the packs and sums of all streams of a token are more than 128 registers hold. "
    "What is spilled costs a store and a load. Models have 4 streams."
)
SPILLED = {  # of n = 8 and of n = 16, at most so many registers
    "mhc_fused": (219, 39),
    "mhc_fused_backward": (245, 0),
    "mhc_pre": (5, 18),
    "mhc_pre_backward_generic": (95, 0),
    "mhc_seam": (239, 111),
    "mhc_seam_backward": (144, 0),
    "stream_mix_add": (39, 7),
    "stream_norm": (9, 68),
    "stream_norm_backward": (7, 17),
}
STREAMS_IN_TURN = (
    "n > 8: the loop over streams is not unrolled whole, so that a sum for each stream is indexed "
    "at run time and lies in memory, 4 n bytes a thread."
)
ONE_HALF = "n = 8: of 16 packs LLVM loads one by words, as it does where x is not aligned."
SEAM_SUMS = (
    "n = 4: a thread has the 24 sums of a token's coefficients beside its channels. It spills in "
    "the loop over channels: at most 12 stores and loads for 16 channels of four streams."
)
FLOAT32_TILE = (
    "float32: a lane's tile of x, du and dx beside its parts of phi and dphi; 2 words each token."
)
PACKS_TOGETHER = (
    "LLVM makes vectors of packs before it takes the array apart. amdgcn has no scratch."
)
LONG_ROW = (
    "n = 4, C = 7168, one token: its coefficients are made beside three passes of channels, and 13 "
    "registers are stored and loaded once."
)
TWO_STREAMS = (
    "n = 2, C = 4096: a thread keeps more channels of x than of four streams, beside sums of u; 10 "
    "registers are stored and loaded once a token. Models have 4 streams."
)
TWO_FLOATS = (
    "n = 16, float32: a pack is two floats, which LLVM loads one by one. A simdgroup's loads are "
    "contiguous, but twice as many."
)
ONE_ELEMENT = "A row has one channel, so that there is nothing to load together."
LEFT_FOR_THE_BACK_END = (
    "float16: LLVM leaves arrays of 5 floats to the back end. That of amdgcn has them in registers."
)
EXCEPTIONS = (
    *(
        Exempt("mhc_pre_backward_generic", f"N={n} T=float16", "array", 4, LEFT_FOR_THE_BACK_END)
        for n in (2, 4, 8)
    ),
    Exempt("mhc_seam", "N=4 PASSES=3 FROM_PARTIAL_LOGITS=True", "spill", 13, LONG_ROW),
    Exempt("mhc_pre_backward_coefficients_norm", "N=2", "spill", 10, TWO_STREAMS),
    Exempt("mhc_pre_backward_coefficients", "N=16 T=float32", "narrow", 2, TWO_FLOATS),
    Exempt("mhc_pre_backward_projection", "N=1", "narrow", 2, ONE_ELEMENT),
    Exempt("mhc_seam_backward", "N=4", "spill", 12, SEAM_SUMS),
    Exempt("mhc_pre_backward_projection", "N=4 T=float32", "spill", 2, FLOAT32_TILE),
    Exempt("mhc_fused_backward", "N=4 T=float16", "array", 1, PACKS_TOGETHER),
    Exempt("mhc_fused_backward", "N=2 T=float16", "array", 2, PACKS_TOGETHER),
    Exempt("mhc_fused_backward", "N=2 T=float32", "array", 1, PACKS_TOGETHER),
    *(
        Exempt(body, f"N={n}", "spill", most, MANY_STREAMS)
        for body, registers in SPILLED.items()
        for n, most in zip((8, 16), registers, strict=True)
        if most
    ),
    *(
        Exempt(body, f"N={n}", "array", most, STREAMS_IN_TURN)
        for body, most in (("mhc_pre_backward_generic", 2), ("stream_aggregate_backward", 1))
        for n in (12, 16, 32)
    ),
    Exempt("mhc_pre_backward_generic", "N=33", "array", 1, STREAMS_IN_TURN),
    Exempt("mhc_fused", "N=8 T=float32", "split", 1, ONE_HALF),
    *(
        Exempt(body, f"N={n}", "array", 7, LONG_LINE)
        for body in ("sinkhorn_knopp", "sinkhorn_knopp_backward")
        for n in (32, 33, 64)
    ),
    Exempt("mhc_fused_backward_wide", "", "narrow", 5, ONE_CHANNEL),
)


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
    found, f = [], figures
    if f.arrays or f.array_bytes:
        words = f"{len(f.arrays)} private arrays lie in memory: {each(f.arrays)}"
        words = f"{words}; {f.array_bytes} bytes of scratch"
        found.append(Fault("array", words, max(len(f.arrays), 1)))
    if f.functions:
        words = f"not inlined: {each(f.functions)}"
        found.append(Fault("function", words, len(f.functions)))
    may_not_spill = variant.main or not variant.pack_bytes  # without streams no row is ragged
    if may_not_spill and (f.spills or f.scratch_bytes > f.array_bytes):
        words = f"{f.spills} registers spilled and {f.scratch_bytes} bytes of scratch"
        found.append(Fault("spill", f"{words} at {REGISTERS} registers", f.spills))
    if f.narrow:
        words = f"below {NARROWEST} bytes where all is aligned: {', '.join(f.narrow)}"
        found.append(Fault("narrow", words, len(f.narrow)))
    if f.split:
        found.append(Fault("split", "; ".join(f.split), len(f.split)))
    return found
