"""Reports and pictures of a model's streams: gains over depth, collapse, gates and gradients.

    report = stability_report(model, tokens)
    print(report)
    plot({"mhc": report}, "pictures")

The gains are those of arXiv 2512.24880, section 3.1. For a mixing matrix M, row = output, the
forward gain ``max_i |sum_j M[i, j]|`` is the factor by which M scales equal streams, and the
backward gain ``max_j |sum_i M[i, j]|`` is the same for gradients. Both are 1 where M is doubly
stochastic. The composite of connections 1 to k is the product of their matrices,
``h_res_k @ ... @ h_res_1``: it maps the streams before connection 1 to their part in the streams
after connection k.
"""

from .pictures import plot
from .report import ConnectionReport, StabilityReport, stability_report, stream_similarity

__all__ = ["ConnectionReport", "StabilityReport", "plot", "stability_report", "stream_similarity"]
