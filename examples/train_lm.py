"""Train a small byte-level transformer whose every sublayer sits in a hyper-connection.

By default it reads the source files of Python's standard library and trains for two minutes. It
prints the loss in bits per byte, the mean cosine similarity between streams (1: the streams are
copies and the connection does nothing), and a sample. --connection compares variants; all but
static and plain make their coefficients per token:

    static     mHC with parameters for coefficients    mhc        arXiv 2512.24880
    mhc-lite   arXiv 2601.05732                        kronecker  KromHC
    identity   no mixing of streams                    hc         mixing without constraint
    plain      an ordinary residual, one stream
"""

import argparse
import csv
import math
import statistics
import sysconfig
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from tqdm import tqdm

from mhc_mlx import (
    IDENTITY,
    KRONECKER,
    MHC_LITE,
    PAPER,
    ROW_FIRST,
    UNCONSTRAINED,
    MHCLayer,
    backend,
    expand_streams,
    reduce_streams,
)

CONVENTIONS = {"static": ROW_FIRST, "mhc": PAPER, "mhc-lite": MHC_LITE, "kronecker": KRONECKER}
CONVENTIONS |= {"identity": IDENTITY, "hc": UNCONSTRAINED}


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def __call__(self, u: mx.array) -> mx.array:
        B, L, dim = u.shape
        heads = self.qkv(u).reshape(B, L, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        q, k = (
            mx.fast.rope(a, a.shape[-1], traditional=False, base=1e4, scale=1.0, offset=0)
            for a in heads[:2]
        )
        scale = (dim // self.heads) ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, heads[2], scale=scale, mask="causal")
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, L, dim))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = (
            nn.Linear(dim, 4 * dim, bias=False),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def __call__(self, u: mx.array) -> mx.array:
        return self.down(nn.gelu_approx(self.up(u)))


class Residual(nn.Module):
    """An ordinary pre-norm residual, on one stream."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim)

    def __call__(self, x: mx.array, sublayer: nn.Module) -> mx.array:
        return x + sublayer(self.norm(x[..., 0, :]))[..., None, :]


class ByteLM(nn.Module):
    """n streams of ``dim`` channels through ``2 * depth`` sublayers, each in its connection."""

    def __init__(
        self, dim: int, depth: int, heads: int, streams: int, connection: str, use_metal: bool
    ):
        super().__init__()
        options = {"dynamic": connection != "static", "use_metal": use_metal}
        self.streams = streams
        self.embedding = nn.Embedding(256, dim)
        self.sublayers = [
            layer for _ in range(depth) for layer in (Attention(dim, heads), MLP(dim))
        ]
        self.connections = [
            Residual(dim)
            if connection == "plain"
            else MHCLayer(streams, dim, convention=CONVENTIONS[connection], layer_idx=k, **options)
            for k in range(2 * depth)
        ]
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)

    def __call__(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Logits, and the streams before they are reduced."""
        x = expand_streams(self.embedding(tokens), self.streams)
        for connection, sublayer in zip(self.connections, self.sublayers, strict=True):
            x = connection(x, sublayer)
        return self.head(self.norm(reduce_streams(x))), x


def stream_similarity(x: mx.array) -> mx.array:
    """Mean cosine similarity between two different streams of a token."""
    x = x.astype(mx.float32)
    x = x * mx.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)
    n = x.shape[-2]
    return ((x.sum(-2) ** 2).sum(-1).mean() - n) / max(n * (n - 1), 1)


def read_corpus(file: str | None, limit: int = 16 << 20) -> mx.array:
    """The bytes of a file, or of the standard library's own sources."""
    if file:
        data = Path(file).read_bytes()
    else:
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
        data = b""
        for path in paths:
            if len(data) < limit:
                data += path.read_bytes()
    if len(data) < 10_000:
        raise SystemExit(
            f"{file or 'the standard library'} must hold at least 10,000 bytes but has {len(data)}"
        )
    return mx.array(memoryview(data))


def sample(model: ByteLM, prompt: bytes, length: int, context: int) -> str:
    tokens = list(prompt)
    for _ in range(length):
        logits, _ = model(mx.array([tokens[-context:]]))
        tokens.append(mx.random.categorical(logits[0, -1].astype(mx.float32) / 0.7).item())
    return bytes(tokens).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="FILE", help="text to train on")
    parser.add_argument("--seconds", type=float, default=120, help="stop after this long")
    parser.add_argument("--steps", type=int, default=10_000, help="or after so many steps")
    parser.add_argument("--connection", choices=[*CONVENTIONS, "plain"], default="static")
    parser.add_argument("--streams", type=int, default=4, help="of every connection but plain")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2, help="blocks of attention and MLP")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-metal", action="store_true", help="the reference instead of the kernels"
    )
    parser.add_argument("--log", metavar="FILE", help="write step, loss and similarity as CSV")
    args = parser.parse_args()

    mx.random.seed(args.seed)
    data = read_corpus(args.data)
    streams = 1 if args.connection == "plain" else args.streams
    sizes = (args.dim, args.depth, args.heads, streams)
    model = ByteLM(*sizes, args.connection, not args.no_metal)

    def adam(lr):
        # A long warm-up and an eps: without them Adam turns the rounding noise of parameters that
        # have no gradient yet into full steps.
        warmup = optim.linear_schedule(0, lr, 300)
        schedule = optim.join_schedules([warmup, lambda _: mx.array(lr)], [300])
        return optim.AdamW(schedule, eps=1e-6, weight_decay=0.01)

    # Gates and mixing logits move by whole units where weights, phi among them, move by hundredths.
    optimizer = optim.MultiOptimizer(
        [adam(10 * args.lr), adam(args.lr)],
        [lambda name, _: "connections" in name and not name.endswith("phi")],
    )
    mx.eval(model.parameters())
    size = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
    kernels = backend() if backend() and not args.no_metal else "none"
    print(f"{size:,} parameters, {data.size:,} bytes of text, kernels: {kernels}")

    def loss_fn(model, batch):
        logits, x = model(batch[:, :-1])
        loss = nn.losses.cross_entropy(logits.astype(mx.float32), batch[:, 1:], reduction="mean")
        return loss / math.log(2), stream_similarity(x)

    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step():
        starts = mx.random.randint(0, data.size - args.context - 1, (args.batch, 1))
        batch = data[starts + mx.arange(args.context + 1)].astype(mx.int32)
        (loss, similarity), gradients = nn.value_and_grad(model, loss_fn)(model, batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss, similarity

    history, seconds, start = [], [], time.perf_counter()
    with tqdm(total=args.steps, unit="step", mininterval=1.0) as progress:
        while len(history) < args.steps and time.perf_counter() - start < args.seconds:
            began = time.perf_counter()
            values = step()
            mx.eval(values, state)
            seconds.append(time.perf_counter() - began)
            history.append(tuple(v.item() for v in values))
            progress.update()
            progress.set_postfix(
                bits_per_byte=f"{history[-1][0]:.3f}",
                similarity=f"{history[-1][1]:.3f}",
                refresh=False,
            )
    if args.log:
        with open(args.log, "w", newline="") as f:
            csv.writer(f).writerows(
                [("step", "bits_per_byte", "similarity"), *((k, *h) for k, h in enumerate(history))]
            )
    last = history[-100:]
    bits, similarity = (sum(h[k] for h in last) / len(last) for k in range(2))
    print(
        f"{len(history)} steps in {time.perf_counter() - start:.0f} s, "
        f"{1e3 * statistics.median(seconds):.1f} ms per step, "
        f"peak memory {mx.get_peak_memory() / 2**20:.0f} MiB"
    )
    print(
        f"bits per byte {bits:.3f}, similarity between streams {similarity:.3f} "
        f"(mean of the last {len(last)} steps)"
    )
    print("sample:", sample(model, b"def ", 200, args.context))


if __name__ == "__main__":
    main()
