"""The ops: every name of `reference`, fused where the default device has kernels.

A room is a family of ops and reads from top to bottom: check, tile, launch, gradient, public
function. A room imports only rooms above it, and the ground: `checks` of arguments, `tiling` of
launches, `autodiff`, `arrays` and `sums`.

    sinkhorn      from logits to mixing matrices
    streams       read, mix and write back with ready coefficients
    static        the self-contained layer
    coefficients, coefficient_gradient
                  what the next two share: coefficients that each token makes for itself
    pre           these coefficients, and the read
    seam          write-back and next read
    gated         Qwen's gated residual: the norm of each stream, and the read by gates

Every fused op takes the positional arguments of its namesake in `reference` and four keywords:

    use_metal: Run the kernels where the default device has them (Metal or CUDA); otherwise, and on
        a CPU, the reference runs.
    threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
    verbose: Print the source of the kernels, without a GPU the Metal source.
    differentiable: False calls the kernels bare, which `mx.export_function` can record; there is
        then no gradient.
"""

from . import autodiff, tiling
from .autodiff import vmap
from .checks import MAX_STREAMS, check_convention, check_eps, check_threads
from .gated import gate_mix, stream_norm
from .pre import mhc_coefficients, mhc_head, mhc_pre
from .seam import mhc_seam, mhc_single_pass
from .sinkhorn import project, sinkhorn_knopp
from .static import gates, mhc_layer, mhc_static, stream_aggregate_norm
from .streams import rms_norm, stream_aggregate, stream_distribute, stream_mix, stream_mix_add

__all__ = [
    "MAX_STREAMS",
    "autodiff",
    "check_convention",
    "check_eps",
    "check_threads",
    "gate_mix",
    "gates",
    "mhc_coefficients",
    "mhc_head",
    "mhc_layer",
    "mhc_pre",
    "mhc_seam",
    "mhc_single_pass",
    "mhc_static",
    "project",
    "rms_norm",
    "sinkhorn_knopp",
    "stream_aggregate",
    "stream_aggregate_norm",
    "stream_distribute",
    "stream_mix",
    "stream_mix_add",
    "stream_norm",
    "tiling",
    "vmap",
]
