"""A user's program: test_types.py lets mypy and pyright read it against the installed wheel."""
# pyright: strict, reportMissingTypeStubs=false

import mlx.core as mx
from mlx.nn.layers.base import Module  # mypy --strict does not see that mlx.nn exports it
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm

import mhc_mlx as mhc
from mhc_mlx.diagnostics import StabilityReport, stability_report


def report(model: Module, tokens: mx.array) -> StabilityReport:
    convention = mhc.Convention("SHORT", first="columns", iters=4, eps=1e-6)
    connection = mhc.HyperConnection(64, 4, convention=convention, threads_per_group=None)
    layer = mhc.MHCLayer(4, 64, sinkhorn_iters=20, eps=1e-6)
    block = mhc.MHCBlock(Linear(64, 64), 64, norm=RMSNorm(64), layer_idx=1)
    x: mx.array = mhc.expand_streams(tokens, connection.num_streams)
    connection = mhc.load(connection, {"fn": x}, "", source=None, leave=("layer.",))
    u, add_residual = connection(x)
    x = block(layer(add_residual(u * 2), Linear(64, 64)), mask=None)
    u, h_post, h_res, x = mhc.mhc_pre(x, connection.phi, connection.bias, connection.alpha)
    x = mhc.stream_mix_add(x, u, h_post, h_res, use_metal=False)
    h: mx.array = mhc.vmap(mhc.reduce_streams)(x) + mhc.HyperHead(64)(x)
    gated = mhc.GatedResidual(64, 4, rank=8, eps=1e-6)
    u, h_post, x = gated.read(x)
    h = h + mhc.GatedHead(64, 4)(x, gated(x)[0] + u, h_post)
    wide: Module = mhc.widen(model, 4, convention=mhc.PAPER, reduce="sum", dynamic=False)
    return stability_report(wide, (h,), before=None)
