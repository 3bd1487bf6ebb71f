"""Models of other packages on these kernels: `patch`, `unpatch`, `check` and `bench`; and
`save_adapters` and `load_adapters`, for what was trained in patched and in widened models.

    model, tokenizer = mlx_lm.load(path)    # or mlx_vlm.load
    mhc_mlx.models.patch(model)

    python -m mhc_mlx.models --model PATH [--check | --bench]    on a model of yours
    python -m mhc_mlx.models --random 256,4                      on a random model
    python -m mhc_mlx.models --sites 4096,5120,7168              on hyper-connections alone

`families.ROWS` lists the models, their packages and versions. A family is imported when a model of
it is patched; this module needs neither mlx-lm nor mlx-vlm.

There are three kinds of sites. Where a sublayer reads with the coefficients of its own streams
(DeepSeek V4), `mhc_pre` makes what it reads, and `stream_mix_add` writes its output back. In lagged
models (DeepSeek V4.1) a site is all that stands between two sublayers, and one op computes it when
a sublayer ends:

    h_pre, h_post, h_res = mhc_coefficients(x, fn, base, scale)
    out[i] = sum_j h_res[i, j] x[j] + h_post[i] y;  u = norm(sum_i h_pre[i] out[i])

A gated residual (qwen4_exp) is no mHC; between its two ops the linear layers of its module run:

    out, s, next_post = stream_norm(x, weight, y, h_post, inject)
    u = gate_mix(up(silu(down(s) / n)), s)
"""

from ..adapters import load_adapters, save_adapters
from .check import check
from .families import ROWS, family_of, titles
from .family import Family, Options, Settings, Site
from .patching import patch, unpatch
from .times import bench, bench_sites

__all__ = [
    "ROWS",
    "Family",
    "Options",
    "Settings",
    "Site",
    "bench",
    "bench_sites",
    "check",
    "family_of",
    "load_adapters",
    "patch",
    "save_adapters",
    "titles",
    "unpatch",
]
