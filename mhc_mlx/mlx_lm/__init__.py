"""Run mlx-lm's DeepSeek V4.1 on these kernels: `patch`, `unpatch`, `check`.

    model, tokenizer = mlx_lm.load(path)
    mhc_mlx.mlx_lm.patch(model)

    python -m mhc_mlx.mlx_lm --model PATH [--check | --bench]    on a model of yours
    python -m mhc_mlx.mlx_lm --random 256,4                      on a random model
    python -m mhc_mlx.mlx_lm --sites 4096,5120,7168              on hyper-connections alone

A *site* is all that stands between two sublayers: the coefficients of the streams x, the write-back
of a sublayer's output y, and the normalised read u for the next sublayer:

    h_pre, h_post, h_res = mhc_coefficients(x, fn, base, scale)
    out[i] = sum_j h_res[i, j] x[j] + h_post[i] y;  u = norm(sum_i h_pre[i] out[i])

mlx-lm computes u when the next sublayer begins. Here one op computes the site when a sublayer ends.
The import raises ImportError if mlx-lm is missing or has a version that this code does not support.
"""

import importlib.util

if importlib.util.find_spec("mlx_lm") is None:
    raise ImportError("[mhc_mlx.mlx_lm] needs mlx-lm: pip install 'mhc-metal[mlx-lm]'.")

from .check import check
from .gradients import (
    DifferentiableAttention,
    DifferentiableHyperConnection,
    DifferentiableIndexer,
    DifferentiableRouter,
)
from .layers import SinglePassLayer
from .patch import patch, unpatch
from .sites import SinglePassConnection
from .times import bench, bench_sites

__all__ = [
    "DifferentiableAttention",
    "DifferentiableHyperConnection",
    "DifferentiableIndexer",
    "DifferentiableRouter",
    "SinglePassConnection",
    "SinglePassLayer",
    "bench",
    "bench_sites",
    "check",
    "patch",
    "unpatch",
]
