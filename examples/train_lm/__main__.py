"""Train a byte-level transformer whose every sublayer sits in a hyper-connection.

By default it reads the source files of Python's standard library and trains a small one for two
minutes. It prints the loss in bits per byte, the mean cosine similarity between streams (1: the
streams are copies and the connection does nothing), and a sample. --connection compares variants;
all but static and plain make their coefficients per token:

    static     mHC with parameters for coefficients    mhc        arXiv 2512.24880
    mhc-lite   arXiv 2601.05732                        kronecker  KromHC
    identity   no mixing of streams                    hc         mixing without constraint
    plain      an ordinary residual, one stream

--checkpoint DIR --save-every N --resume stops and goes on bit for bit. --plot DIR draws what the
streams do at the end, and whenever the process gets SIGUSR1. More processes share the work:

    mlx.launch -n 2 --backend ring -- python -m examples.train_lm    # nccl on NVIDIA GPUs

A step takes batch x accumulate x processes sequences. Weights and the optimiser are float32;
with --dtype bfloat16 streams and products are bfloat16, and weights are rounded where they are
used; coefficients of connections are float32 in any case. Everything follows from the seed.

On an NVIDIA GPU with memory to spare MLX_MAX_MB_PER_BUFFER=2000 in the environment lets MLX's host
run further ahead: a step of 24 layers of dim 1024 takes 81 instead of 87 ms on an H100, and 35
instead of 28 GiB.
"""

import sys

from examples.train_lm.options import parse
from examples.train_lm.train import train

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a sample can be any bytes
    sys.exit(0 if train(parse(description=__doc__))["finite"] else 1)
