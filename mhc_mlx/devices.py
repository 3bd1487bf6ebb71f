"""What is known of the GPUs that run kernels, and the numbers by which launches are cut for each.

`launch.device` finds the record of the GPU at hand; the functions of ops/tiling.py get it. A number
without another source was measured on one H100 in bfloat16; (65536, 4, 1024) means tokens, streams
and channels. No Apple GPU was at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Device:
    """A GPU. A record equals only itself: so caches find it by its identity, which costs nothing.

    Sizes are in bytes, registers have 32 bits; None is unknown. The defaults of the numbers that
    cut launches are an H100's.
    """

    name: str
    backend: str  # "metal" or "cuda"
    cores: int | None = None  # multiprocessors of an NVIDIA GPU
    bandwidth: float | None = None  # of DRAM, nominal, bytes a second
    registers_per_thread: int  # of which a body can have no more
    registers_per_core: int
    threads_per_core: int | None = None  # resident, if registers reach
    threadgroup_memory: int = 32 << 10  # of a threadgroup
    threadgroup_memory_per_core: int | None = None
    # Of a threadgroup with a ring of asynchronous copies; 0 where the backend has none.
    ring_memory: int = 0

    # ---- a threadgroup
    # Registers in which a thread keeps parts of a token: of x, and of x and dout. These two count
    # as floats, or with backward_packed as they lie in memory.
    forward_register_bytes: int = 256
    backward_register_bytes: int = 512
    backward_packed: bool = False
    backward_vec: int = 8  # most neighbours of a stream that a thread of a layer's gradient takes
    seam_backward_bytes: int = 16  # of a load of `mhc_seam_backward`
    forward_threads: int = 256  # most of a layer and of stream_mix_add
    # Most threads of `mhc_fused_backward` and `mhc_seam_backward` where they keep no token.
    uncached_backward_threads: int = 256
    # Most threads of `mhc_pre_backward_coefficients_norm`, and what each keeps of x: at
    # (65536, 4, 1024) 408 us with 128 bytes, 460 us with 64.
    coefficient_gradient_threads: int = 512
    coefficient_gradient_x_bytes: int = 128
    # Half-steps whose divisors `mhc_pre_backward_coefficients` stores, 128 bytes a simdgroup each.
    stored_half_steps: int = 40
    u_floats_per_lane: int = 64  # of u, that a lane of `mhc_pre` keeps for its norm
    # Whether `mhc_pre_backward_projection` also takes float32 and float16, where u has no norm, as
    # products of matrices are float32; else these take `mhc_pre_backward_generic`.
    float_products: bool = False

    # ---- a grid
    forward_groups: int = 4096  # fills any GPU; fewer threadgroups than tokens share coefficients
    many_groups: int = 1 << 16  # for a threadgroup that loads little before its first token
    filling_groups: int = 264  # two for each multiprocessor
    one_thread_rows: int = 0  # up to here one thread adds the rows of a column in `sum_partials`
    phi_gradient_groups: int = 528  # of `mhc_pre_backward_phi`, four for each multiprocessor
    # What an H100 holds at 128 registers. A threadgroup, or a simdgroup, leaves a row of sums.
    backward_threads: int = 132 * 512
    coefficient_gradient_simdgroups: int = 132 * 16
    projection_gradient_simdgroups: int = 132 * 16

    # ---- tokens
    # Up to here `mhc_pre` takes tiles of 8 tokens: at (2048, 4, 4096) they take 60 us, of 16 43 us.
    few_tokens: int = 1024
    # Up to here `mhc_pre_backward_generic` takes tiles of 2 tokens, otherwise of 4.
    few_backward_tokens: int = 1024
    # Up to these many threadgroups share a token's phi product: write-back and read then take
    # 4.0 us with `mhc_pre_partial_logits`, 8.2 us with `mhc_pre`.
    partial_logits_tokens: int = 16
    # Up to here every threadgroup of `mhc_layer` projects H_res itself.
    one_launch_tokens: int = 1024
    # From here a threadgroup of `stream_norm` takes two tokens, which share loads of inject: then
    # they are enough for four threadgroups on each multiprocessor of an H100.
    norm_tile_tokens: int = 2 * 132 * 4
    # From this n * C on 16 slices share a row: at (2048, 4, 4096) they take 35 us, 8 slices 43 us.
    long_row: int = 1 << 14


# ---- NVIDIA

# Of compute capability 9.0; NVIDIA's data sheets of H100 SXM and H200.
H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    backend="cuda",
    cores=132,
    bandwidth=3.35e12,
    registers_per_thread=255,
    registers_per_core=1 << 16,
    threads_per_core=2048,
    threadgroup_memory_per_core=228 << 10,
    ring_memory=227 << 10,
)
H200 = replace(H100, name="NVIDIA H200", bandwidth=4.8e12)


def _nvidia(name: str, capability: tuple[int, int]) -> Device:
    """The record of another NVIDIA GPU: as an H100, but for what its compute capability says."""
    ring = 163 if capability in ((8, 0), (8, 7)) else 227 if capability[0] in (9, 10) else 99
    return replace(
        H100,
        name=name,
        cores=None,
        bandwidth=None,
        threads_per_core=None,
        threadgroup_memory_per_core=(ring + 1) << 10,
        ring_memory=ring << 10,
    )


# ---- Apple

# Of each number that is not an H100's: what clang-19 says with and without it, in bfloat16, or the
# model (docs/model.md, benchmarks/what_if.py), in us on an M4 Max if no other is named.
APPLE = Device(
    name="Apple GPU",
    backend="metal",
    # https://github.com/philipturner/metal-benchmarks, for M1 and M2; later GPUs share one memory
    # among registers, threadgroups and cache, whose size is not published.
    registers_per_thread=128,
    registers_per_core=(208 << 10) // 4,
    threads_per_core=3072,
    threadgroup_memory_per_core=60 << 10,
    # clang-19: with 256 packed bytes `mhc_fused_backward` with a norm spills 113 registers at
    # (2048, 4, 4096); with 128 it has 111 and spills none.
    backward_register_bytes=128,
    backward_packed=True,
    # clang-19: with 8 neighbours `mhc_fused_backward` needs more than 128 registers, and spills.
    backward_vec=4,
    # model: `mhc_seam_backward` at (2048, 2, 2048) takes 249 us; with 16 bytes 402, and spills.
    seam_backward_bytes=8,
    # clang-19: at C = 5120 three passes of 256 threads keep more than 128 registers hold. A core of
    # M1 or M2 has 384 threads at 128 registers.
    forward_threads=320,
    # clang-19: at (2048, 4, 4096) 512 threads keep x and spill 14 registers; 256 have 111.
    coefficient_gradient_threads=256,
    # clang-19: 128 would keep x up to C = 4096 at n = 4, but spill 17 to 24 of 128 registers.
    coefficient_gradient_x_bytes=64,
    # model: the rest is computed again. 20 take 10 KiB of a threadgroup of 128, of which the memory
    # of a core holds five, more than its registers.
    stored_half_steps=20,
    # clang-19: with 64 `mhc_pre` with a norm spills 26 registers at (2048, 4, 4096); with 32 it has
    # 114.
    u_floats_per_lane=32,
    # model: `mhc_pre` without a norm, both directions, at (2048, 4, 4096) takes 1888 us in float32
    # and 1744 in float16, by `mhc_pre_backward_generic` 2255 and 2162. With a norm it would take 35
    # and 6 % more, as latency binds `mhc_pre_backward_coefficients_norm`.
    float_products=True,
    # model: in `mhc_pre` up to 8 tiles of 8 tokens leave most cores idle; runs of a phi product do
    # not. They gain up to 64 tokens on a Max, up to 128 on an Ultra.
    partial_logits_tokens=64,
    # model: with 8 threads a column, 13 rows of dphi at C = 5120 take 15,360 threadgroups and
    # latency binds; with one they take an eighth, and DRAM binds.
    one_thread_rows=16,
    # model: latency binds `mhc_seam_backward`. At more than 104 registers a core of M1 or M2 has
    # 384 threads: one threadgroup of 256, or three of 128.
    uncached_backward_threads=128,
)
# GPU cores with which a chip is sold, and nominal GB/s of each: Apple's technical specifications.
# MLX tells the name, but not how many cores there are.
APPLE_CHIPS = {
    "Apple M1": {7: 68, 8: 68},
    "Apple M1 Pro": {14: 200, 16: 200},
    "Apple M1 Max": {24: 400, 32: 400},
    "Apple M1 Ultra": {48: 800, 64: 800},
    "Apple M2": {8: 100, 10: 100},
    "Apple M2 Pro": {16: 200, 19: 200},
    "Apple M2 Max": {30: 400, 38: 400},
    "Apple M2 Ultra": {60: 800, 76: 800},
    "Apple M3": {8: 100, 10: 100},
    "Apple M3 Pro": {14: 150, 18: 150},
    "Apple M3 Max": {30: 300, 40: 400},
    "Apple M3 Ultra": {60: 819, 80: 819},
    "Apple M4": {8: 120, 10: 120},
    "Apple M4 Pro": {16: 273, 20: 273},
    "Apple M4 Max": {32: 410, 40: 546},
    "Apple M5": {8: 153, 10: 153},
    "Apple M5 Pro": {16: 307, 20: 307},
    "Apple M5 Max": {32: 460, 40: 614},
}


def apple(chip: str, cores: int | None = None) -> Device:
    """The record of a Mac's chip, by MLX's name for it; with so many cores, if they are known."""
    rates = APPLE_CHIPS.get(chip, {})
    known = {rates[cores]} if cores in rates else set(rates.values())
    return replace(
        APPLE,
        name=chip,
        cores=cores,
        bandwidth=known.pop() * 1e9 if len(known) == 1 else None,
    )


def find(backend: str, info: Mapping[str, Any]) -> Device:
    """The record for a backend and what `mx.device_info` says of its GPU. Where it says nothing of
    one, that is an H100, or any Apple GPU: so they are where kernels run without a GPU."""
    name = info.get("device_name", "")
    if backend == "metal":
        return apple(name) if name in APPLE_CHIPS else APPLE
    if "compute_capability_major" not in info:
        return H100
    known = {device.name: device for device in (H100, H200)}
    capability = (info["compute_capability_major"], info.get("compute_capability_minor", 0))
    return known.get(name) or _nvidia(name, capability)
