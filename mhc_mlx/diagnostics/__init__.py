"""What the streams of a model do: gains over depth, collapse, gates, gradients; and pictures of it.

    report = stability_report(model, tokens)
    print(report)
    plot({"mhc": report}, "pictures")

Gains are arXiv 2512.24880's (section 3.1): of a mixing matrix M, row = output, the forward gain is
``max_i |sum_j M[i, j]|``, what it makes of streams that are equal, and the backward gain
``max_j |sum_i M[i, j]|``, the same of gradients. Both are 1 where M is doubly stochastic. The
composite of connections 1 to k is the product of their matrices, ``h_res_k @ ... @ h_res_1``: what
a stream's part in x becomes over depth.
"""

from .pictures import plot
from .report import ConnectionReport, StabilityReport, stability_report, stream_similarity

__all__ = ["ConnectionReport", "StabilityReport", "plot", "stability_report", "stream_similarity"]
