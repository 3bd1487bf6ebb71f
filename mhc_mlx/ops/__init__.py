"""The ops: every name of `reference`, fused where the default device has kernels."""

from . import dispatch, geometry
from .dispatch import MAX_STREAMS, check_convention, check_eps, check_threads, vmap
from .dynamic import mhc_coefficients, mhc_head, mhc_pre, stream_aggregate
from .plain import gates, project, rms_norm, stream_distribute, stream_mix
from .single_pass import mhc_seam, mhc_single_pass
from .static import mhc_layer, mhc_static, sinkhorn_knopp, stream_aggregate_norm, stream_mix_add
