"""Manifold-constrained hyper-connections (arXiv 2512.24880) for MLX, fused and trainable."""

from .conventions import (
    ADDITIVE,
    DEEPSEEK_V4,
    HUNYUAN_V4,
    HUNYUAN_V4_POST_EPS,
    IDENTITY,
    KRONECKER,
    MHC_LITE,
    PAPER,
    ROW_FIRST,
    UNCONSTRAINED,
    XING,
    Convention,
)
from .gated import GatedHead, GatedResidual
from .launch import backend
from .layers import HyperConnection, HyperHead, MHCBlock, MHCLayer, MHCLiteBlock
from .loading import load
from .ops import (
    gate_mix,
    mhc_coefficients,
    mhc_head,
    mhc_layer,
    mhc_pre,
    mhc_seam,
    mhc_single_pass,
    mhc_static,
    rms_norm,
    sinkhorn_knopp,
    stream_aggregate,
    stream_aggregate_norm,
    stream_distribute,
    stream_mix,
    stream_mix_add,
    stream_norm,
    vmap,
)
from .streams import expand_streams, merge_streams, reduce_streams, split_streams
from .widening import widen

__all__ = [
    "ADDITIVE",
    "DEEPSEEK_V4",
    "HUNYUAN_V4",
    "HUNYUAN_V4_POST_EPS",
    "IDENTITY",
    "KRONECKER",
    "MHC_LITE",
    "PAPER",
    "ROW_FIRST",
    "UNCONSTRAINED",
    "XING",
    "Convention",
    "GatedHead",
    "GatedResidual",
    "HyperConnection",
    "HyperHead",
    "MHCBlock",
    "MHCLayer",
    "MHCLiteBlock",
    "backend",
    "expand_streams",
    "gate_mix",
    "load",
    "merge_streams",
    "mhc_coefficients",
    "mhc_head",
    "mhc_layer",
    "mhc_pre",
    "mhc_seam",
    "mhc_single_pass",
    "mhc_static",
    "reduce_streams",
    "rms_norm",
    "sinkhorn_knopp",
    "split_streams",
    "stream_aggregate",
    "stream_aggregate_norm",
    "stream_distribute",
    "stream_mix",
    "stream_mix_add",
    "stream_norm",
    "vmap",
    "widen",
]

__version__ = "0.1.0"
