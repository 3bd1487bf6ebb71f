"""Published rates of GPUs, each with its source; the model fits none of them.

Latencies and clocks of instructions are in clocks of a core, per instruction of 32 threads. What is
not published of a newer Apple GPU is that of the M1 and M2, and its record says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

SOURCES = {
    "h100": "https://www.nvidia.com/en-us/data-center/h100/",
    "h200": "https://www.nvidia.com/en-us/data-center/h200/",
    "hopper": "https://developer.nvidia.com/blog/nvidia-hopper-architecture-in-depth/",
    "ampere": "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/"
    "nvidia-ampere-architecture-whitepaper.pdf",
    "throughput": "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions",
    "azure": "https://github.com/samuel-bohman/AI-benchmarking-guide/tree/main/Azure_Results",
    "mt4g": "https://github.com/caps-tum/mt4g",
    "volta": "https://arxiv.org/abs/1804.06826",
    "graph": "https://github.com/ahrefs/ocannl/issues/488",
    "metal": "https://github.com/philipturner/metal-benchmarks",
    "g13": "https://github.com/ferasboulala/G13",
    "dispatch": "https://github.com/ml-explore/mlx/issues/4521",
    "m2": "https://www.imore.com/apple/apple-m2-pro-and-m2-max-chips-everything-you-need-to-know",
    "m3": "https://techpowerup.com/news-tags/Mac%20Studio",
    "m4": "https://gamebastion.com/n/apple-s-m4-max-is-the-first-non-ultra/474547",
    "m5": "https://www.notebookcheck.net/"
    "Apple-M5-Max-40-Core-GPU-Benchmarks-and-Specs.1245824.0.html",
    "m3_clock": "https://hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-40-core-m3-max",
    "m4_clock": "https://eclecticlight.co/2025/01/22/"
    "m4-pro-full-on-when-cpu-and-gpu-draw-over-50-w-and-how-low-power-mode-changes-that/",
    "mlx_copy": "https://github.com/ml-explore/mlx/pull/2151",
}


@dataclass(frozen=True)
class Unit:
    """What an instruction of 32 threads costs: it holds a pipe of one of the core's schedulers for
    some clocks, and its result is there after the latency. `count` is how many instructions of the
    machine one word of PTX becomes."""

    pipe: str
    clocks: float
    latency: float
    count: float = 1.0


@dataclass(frozen=True)
class Rates:
    """What the model knows of a GPU: bytes a second, bytes, clocks, and seconds of a launch."""

    name: str
    backend: str
    cores: int
    clock: float  # of a core, Hz
    bandwidth: float  # of DRAM, nominal
    read: float  # from DRAM
    write: float  # to DRAM
    l2: float  # bytes a clock of a core
    l2_bytes: int
    last: float  # bytes a second of the last cache before DRAM; of L2 where there is no other
    last_bytes: int
    l1_bytes: int  # of a core
    l1_latency: float
    l2_latency: float
    dram_latency: float
    schedulers: int
    registers: int  # of 32 bits, of a core
    threads: int
    groups: int
    threadgroup_memory: int
    launch: float  # seconds
    units: Mapping[str, Unit]
    sources: Mapping[str, str]  # of each field, a key of SOURCES
    assumed: tuple[str, ...] = ()  # fields that are those of an older GPU


HOPPER_UNITS = {
    # 128 float32 operations a clock of a core, 64 of integers, 16 of special functions, shuffles 32
    "float": Unit("float", 1, 4),
    "integer": Unit("integer", 2, 4),
    "multiply": Unit("float", 2, 4),
    "wide": Unit("integer", 2, 6, 2),  # 64 bits, in two instructions
    "convert": Unit("integer", 2, 6),
    "special": Unit("special", 8, 20),
    "divide": Unit("float", 8, 40, 8),  # the exact forms are short programs
    "integer_divide": Unit("integer", 40, 100, 20),
    "shuffle": Unit("memory", 4, 23),
    "shared": Unit("memory", 4, 29.9),  # 128 bytes a clock of a core: for each 4 bytes of a lane
    "global": Unit("memory", 4, 0),
    "matrix": Unit(
        "matrix", 4, 18
    ),  # 1024 float32 multiply-adds in TF32, 4 clocks of a tensor core
    "barrier": Unit("issue", 1, 20),
    "branch": Unit("issue", 1, 0),
    "free": Unit("issue", 0, 0, 0),
}
H100 = Rates(
    name="NVIDIA H100 80GB HBM3",
    backend="cuda",
    cores=132,
    clock=1.83e9,
    bandwidth=3.35e12,
    read=3.18e12,
    write=2.665e12,
    l2=5120 / 132,
    l2_bytes=50 << 20,
    last=5120 * 1.83e9,
    last_bytes=50 << 20,
    l1_bytes=238848,
    l1_latency=38,
    l2_latency=219,
    dram_latency=834,
    schedulers=4,
    registers=65536,
    threads=2048,
    groups=32,
    threadgroup_memory=228 << 10,
    launch=0.58e-6,
    units=HOPPER_UNITS,
    sources={
        "cores": "h100",
        "clock": "hopper",
        "bandwidth": "h100",
        "read": "azure",
        "write": "azure",
        "l2": "ampere",
        "l2_bytes": "mt4g",
        "last": "ampere",
        "last_bytes": "mt4g",
        "l1_bytes": "mt4g",
        "l1_latency": "mt4g",
        "l2_latency": "mt4g",
        "dram_latency": "mt4g",
        "schedulers": "hopper",
        "registers": "mt4g",
        "threads": "mt4g",
        "groups": "mt4g",
        "threadgroup_memory": "mt4g",
        "launch": "graph",
        "units": "throughput",
    },
)
# Dot reads 4.48 TB/s; copy, which reads as much as it writes, moves 4.01: so 3.63 are written.
H200 = replace(
    H100,
    name="NVIDIA H200",
    bandwidth=4.8e12,
    read=4.48e12,
    write=3.629e12,
    sources={**H100.sources, "cores": "h200", "bandwidth": "h200"},
)

APPLE_UNITS = {
    # Each of a core's four ALUs takes 32 threads; the figures are those of metal-benchmarks.
    "float": Unit("alu", 1, 6),
    "integer": Unit("alu", 1, 6),
    "multiply": Unit("alu", 4, 6),
    "wide": Unit("alu", 4.68, 10),
    "convert": Unit("alu", 4, 5),
    "special": Unit("alu", 4, 6),
    "divide": Unit("alu", 10.46, 25),
    "integer_divide": Unit("alu", 60, 120, 20),
    "shuffle": Unit("alu", 2, 5.4),
    "sum": Unit("alu", 14.54, 27),
    "shared": Unit("memory", 8, 91),  # 64 bytes a clock of a core; 70 ns at 1.296 GHz
    "global": Unit("memory", 8, 0),
    "matrix": Unit("alu", 20, 36),  # 101.7 multiply-adds a clock of a core, of 512 of a product
    "barrier": Unit("alu", 1, 91),
    "branch": Unit("alu", 1, 0),
    "free": Unit("alu", 0, 0, 0),
}
_APPLE = {
    "cores": "metal",
    "clock": "metal",
    "l2": "metal",
    "l2_bytes": "metal",
    "last": "metal",
    "last_bytes": "metal",
    "l1_bytes": "metal",
    "l1_latency": "g13",
    "l2_latency": "g13",
    "dram_latency": "g13",
    "schedulers": "metal",
    "registers": "metal",
    "threads": "metal",
    "groups": "metal",
    "threadgroup_memory": "metal",
    "launch": "dispatch",
    "units": "metal",
}


def apple(
    name: str, cores: int, clock: float, bandwidth: float, l2: int, last: int, sources, assumed
) -> Rates:
    """A GPU of Apple: as the M1 and M2, but for what is published of it.

    DRAM: MLX's elementwise kernels move 465 GB/s of the 546 of an M4 Max, 85 %. The last cache has
    1.9 times the bandwidth of DRAM: metal-benchmarks has 15.4 to 19.8 bytes a clock beside 7.7 to
    9.9.
    """
    return Rates(
        name=name,
        backend="metal",
        cores=cores,
        clock=clock,
        bandwidth=bandwidth,
        read=bandwidth * 465 / 546,
        write=bandwidth * 465 / 546,
        l2=32,
        l2_bytes=l2,
        last=2 * bandwidth,
        last_bytes=last,
        l1_bytes=8 << 10,
        l1_latency=47e-9 * 1.296e9,
        l2_latency=100e-9 * 1.296e9,
        dram_latency=350e-9 * clock,
        schedulers=4,
        registers=(208 << 10) // 4,
        threads=3072,
        groups=24,
        threadgroup_memory=60 << 10,
        launch=7.7e-3 / 3200,
        units=APPLE_UNITS,
        sources={**_APPLE, "read": "mlx_copy", "write": "mlx_copy", **sources},
        assumed=assumed,
    )


LATENCIES = ("l1_latency", "l2_latency", "dram_latency")  # of an M1 Max
OLDER = (
    *LATENCIES,
    "l2",
    "l2_bytes",
    "last",
    "last_bytes",
    "l1_bytes",
    "registers",
    "threads",
    "units",
)
MACS = (
    apple(
        "M2 Max",
        38,
        1.398e9,
        400e9,
        1 << 20,
        48 << 20,
        {"bandwidth": "m2"},
        LATENCIES,
    ),
    apple(
        "M3 Ultra",
        80,
        1.398e9,
        819e9,
        2 << 20,
        96 << 20,
        {"cores": "m3", "bandwidth": "m3", "clock": "m3_clock"},
        OLDER,
    ),
    apple(
        "M4 Max",
        40,
        1.578e9,
        546e9,
        1 << 20,
        48 << 20,
        {"cores": "m4", "bandwidth": "m4", "clock": "m4_clock"},
        OLDER,
    ),
    apple(
        "M5 Max",
        40,
        1.578e9,
        614e9,
        1 << 20,
        48 << 20,
        {"cores": "m5", "bandwidth": "m5", "clock": "m4_clock"},
        ("clock", *OLDER),
    ),
)
DEVICES = {rates.name: rates for rates in (H100, H200, *MACS)}
