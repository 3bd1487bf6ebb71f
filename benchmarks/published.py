"""Times of memory-bound Metal kernels that others published, and kernels of the same kind to model.

The texts are not the published ones. They read and write as much, in the same shape of launch: a
threadgroup adds a row, or a slice of one long row, with four elements of a thread at a time.
"""

from typing import NamedTuple

import mlx.core as mx

from benchmarks import listings, model, rates
from mhc_mlx.launch import Launch

M4_PRO = rates.apple(
    "M4 Pro",
    20,
    1.578e9,
    273e9,
    1 << 20,
    24 << 20,
    {"cores": "m4", "bandwidth": "m4", "clock": "m4_clock"},
    rates.OLDER,
)
DUCKDB = "https://github.com/singhpratech/duckdbgpumetaldbram/pull/2"
PYTORCH = "https://github.com/pytorch/pytorch/pull/182255"


class Published(NamedTuple):
    """A time: rows of elements that a launch adds up, on a chip. `aside` was not looked at until
    the model was fixed."""

    what: str
    url: str
    chip: str
    rows: int
    elements: int
    dtype: str
    us: float
    aside: bool = False


# PyTorch's page names no chip where it was read; its author's other pages of those weeks say M4 Pro
# (https://github.com/pytorch/pytorch/pull/181503). Kernel times of the first three; the others are
# calls in a row with one synchronisation.
TIMES = [
    Published("sum of int64", DUCKDB, "M4 Max", 256, 10_000_000 // 256, "int64", 356),
    Published("sum of int64", DUCKDB, "M4 Max", 256, 50_000_000 // 256, "int64", 988, True),
    Published("sum of int64", DUCKDB, "M4 Max", 256, 200_000_000 // 256, "int64", 3990),
    Published("reduction of rows", PYTORCH, "M4 Pro", 16384, 4096, "float32", 1242.8),
    Published("reduction of rows", PYTORCH, "M4 Pro", 16384, 4096, "bfloat16", 818.3),
    Published("reduction of rows", PYTORCH, "M4 Pro", 8192, 4096, "float32", 734.4, True),
    Published("reduction of rows", PYTORCH, "M4 Pro", 8192, 4096, "bfloat16", 465.2),
    Published("reduction of all", PYTORCH, "M4 Pro", 1024, 65536, "float32", 1309.4),
    Published("reduction of all", PYTORCH, "M4 Pro", 1024, 65536, "bfloat16", 727.9, True),
]
CHIPS = {"M4 Max": rates.DEVICES["M4 Max"], "M4 Pro": M4_PRO}
TYPES = {"int64": "long", "float32": "float", "bfloat16": "bfloat"}
THREADS = 256
TEXT = """#include "{here}/metal_words.hpp"
__kernel __attribute__((reqd_work_group_size({threads}, 1, 1)))
void entry(uint groups, __global char* a0, __global char* a1, __local char* __restrict l0) {{
  struct alignas(4 * sizeof({type})) Pack {{ {type} v[4]; }};
  const device {type}* x = (const device {type}*)a0 + (ulong)GROUP * {elements}u;
  threadgroup float* sums = (threadgroup float*)l0;
  float sum = 0.0f;
  for (uint i = 4 * POSITION; i < {elements}u; i += 4 * {threads}) {{
    Pack pack = *(const device Pack*)(x + i);
    for (uint e = 0; e < 4; ++e) sum += static_cast<float>(pack.v[e]);
  }}
  sum = simd_sum(sum);
  if ((POSITION & 31) == 0) sums[POSITION / 32] = sum;
  BARRIER;
  if (POSITION < 32) {{
    sum = simd_sum(POSITION < {threads} / 32 ? sums[POSITION] : 0.0f);
    if (POSITION == 0) ((device float*)a1)[GROUP] = sum;
  }}
}}
"""


def predict(time: Published) -> model.Prediction:
    """Say how long the model thinks that a published kernel takes."""
    text = TEXT.format(
        here=listings.HERE, threads=THREADS, type=TYPES[time.dtype], elements=time.elements
    )
    listing = listings.of_text(text, ("groups", "x", "out", "threadgroup0"), 4 * THREADS // 32)
    dtype = {"int64": mx.int64, "float32": mx.float32, "bfloat16": mx.bfloat16}[time.dtype]
    call = Launch(
        "row_sum",
        {"x": ((time.rows, time.elements), dtype)},
        {"out": ((time.rows,), mx.float32)},
        time.rows,
        THREADS,
        {},
    )
    chip = CHIPS[time.chip]
    return model.predict(call, chip, model.counts(call, chip, listing))


def bytes_alone(time: Published) -> float:
    """Microseconds that the bytes take at the nominal bandwidth."""
    size = {"int64": 8, "float32": 4, "bfloat16": 2}[time.dtype]
    return time.rows * time.elements * size / CHIPS[time.chip].bandwidth * 1e6
