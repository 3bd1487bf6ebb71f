"""Manifold-constrained hyper-connections (arXiv 2512.24880) for MLX, fused and trainable."""

from .conventions import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, Convention
from .kernel import backend
from .layers import MHCLayer, expand_streams, merge_streams, reduce_streams, split_streams
from .ops import (
    mhc_layer,
    mhc_static,
    sinkhorn_knopp,
    stream_aggregate_norm,
    stream_mix_add,
    vmap,
)
from .reference import rms_norm, stream_aggregate, stream_distribute, stream_mix

__version__ = "0.1.0"
