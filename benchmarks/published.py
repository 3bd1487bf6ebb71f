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
TEXT = """
__kernel __attribute__((reqd_work_group_size({threads}, 1, 1)))
void entry(uint groups, __global char* x, __global char* out, __local char* __restrict of_sums) {{
  using of_optimiser::position;
  struct alignas(4 * sizeof({type})) Pack {{ {type} v[4]; }};
  const device {type}* row = (const device {type}*)x + (ulong)of_optimiser::group() * {elements}u;
  threadgroup float (&sums)[{threads} / 32] = *(threadgroup float (*)[{threads} / 32])of_sums;
  float sum = 0.0f;
  for (uint i = 4 * position(); i < {elements}u; i += 4 * {threads}) {{
    Pack pack = *(const device Pack*)(row + i);
    for (uint e = 0; e < 4; ++e) sum += static_cast<float>(pack.v[e]);
  }}
  sum = simd_sum(sum);
  if ((position() & 31) == 0) sums[position() / 32] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (position() < 32) {{
    sum = simd_sum(position() < {threads} / 32 ? sums[position()] : 0.0f);
    if (position() == 0) ((device float*)out)[of_optimiser::group()] = sum;
  }}
}}
"""


def predict(time: Published) -> model.Prediction:
    """Say how long the model thinks that a published kernel takes."""
    text = TEXT.format(threads=THREADS, type=TYPES[time.dtype], elements=time.elements)
    listing = listings.of_text(text)
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
