"""DeepSeek V4.1 of mlx-lm on these kernels: `patch`, `unpatch`, `check`; and V4's tensor names.

    model, tokenizer = mlx_lm.load(path)
    mhc_mlx.mlx_lm.patch(model)

    python -m mhc_mlx.mlx_lm --model PATH [--check | --bench]    on a model of yours
    python -m mhc_mlx.mlx_lm --random 256,4                      on a random one
    python -m mhc_mlx.mlx_lm --sites 4096,5120,7168              hyper-connections alone

A *site* is what stands between two sublayers: the coefficients that the streams x make, the
write-back of the sublayer's output y, and what the next sublayer reads, normalised:

    h_pre, h_post, h_res = mhc_coefficients(x, fn, base, scale)
    out[i] = sum_j h_res[i, j] x[j] + h_post[i] y;  u = norm(sum_i h_pre[i] out[i])

mlx-lm makes u when the next sublayer begins; here one op makes all of it when the last one ends.
Importing this raises ImportError without mlx-lm, or with a version whose code it does not know.
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
from .v4 import load_v4

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
    "load_v4",
    "patch",
    "unpatch",
]
