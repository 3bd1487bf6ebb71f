"""The second stage of every sum over tokens."""

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from .. import launch
from . import tiling


@dataclass(frozen=True)
class SumPartialsBody(launch.Body):
    name = "sum_partials"
    THREADS: ClassVar[int] = 256  # pyright: ignore[reportIncompatibleVariableOverride]
    T: mx.Dtype
    N: int
    GATES: bool
    THREADS_PER_COLUMN: int


def sum_partials(
    partial: mx.array,
    options: launch.Options,
    *,
    shape: tuple[int, ...] = (),
    H_pre: mx.array | None = None,
    H_post: mx.array | None = None,
    params: mx.array | None = None,
) -> mx.array:
    """The sum of the rows of partial, in a fixed order, as an array of that shape.

    With logits of gates the columns that hold gradients of h_pre and h_post become theirs.
    """
    rows, columns = partial.shape
    shape = shape or (columns,)
    if rows == 1 and H_pre is None:
        return partial.reshape(shape)
    threads = tiling.threads_per_column(rows, columns, launch.device())
    body = SumPartialsBody(
        T=mx.float32,
        N=0 if H_pre is None else H_pre.shape[0],
        GATES=H_pre is not None,
        THREADS_PER_COLUMN=threads,
    )
    return launch.launch(
        body,
        {"partial": partial, "H_pre": H_pre, "H_post": H_post, "params": params},
        {"out": (shape, mx.float32)},
        math.ceil(columns * threads / body.THREADS),
        options,
    )["out"]
