"""`ByteLM` is a byte-level language model whose sublayers sit in hyper-connections; `Windows` says
which parts of a text a step reads."""

import argparse
import functools
import math
import random
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import mhc_mlx as m
from mhc_mlx.diagnostics import stream_similarity

CONVENTIONS = {"static": m.ROW_FIRST, "mhc": m.PAPER, "mhc-lite": m.MHC_LITE}
CONVENTIONS |= {"kronecker": m.KRONECKER, "identity": m.IDENTITY, "hc": m.UNCONSTRAINED}
CONNECTIONS = (*CONVENTIONS, "gated", "plain")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class Linear(nn.Linear):
    """Its weights are float32, and are rounded to the dtype of what they multiply."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def __call__(self, u: mx.array) -> mx.array:
        return u @ self.weight.astype(u.dtype).T


class Embedding(nn.Embedding):
    """It is a product, because a gather's gradient adds with atomics on GPUs, in no fixed order."""

    def __call__(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        chosen = tokens[..., None] == mx.arange(self.weight.shape[0])
        return chosen.astype(dtype) @ self.weight.astype(dtype)


class RMSNorm(nn.RMSNorm):
    def __call__(self, u: mx.array) -> mx.array:
        return mx.fast.rms_norm(u, self.weight.astype(u.dtype), self.eps)


class Attention(nn.Module):
    """This is causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = Linear(dim, 3 * dim), Linear(dim, dim)

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
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = Linear(dim, hidden), Linear(hidden, dim)

    def __call__(self, u: mx.array) -> mx.array:
        return self.down(nn.gelu_approx(self.up(u)))


class Residual(nn.Module):
    """This is an ordinary pre-norm residual, on one stream."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)

    def __call__(self, x: mx.array, sublayer: nn.Module) -> mx.array:
        return x + sublayer(self.norm(x[..., 0, :]))[..., None, :]


class Gated(m.GatedResidual):
    """This is Qwen's gated residual, which is the sublayer's norm too, with half of Qwen's rank.

    So the model is about as large as with other connections.
    """

    def __init__(self, dim: int, streams: int, **options):
        super().__init__(dim, streams, max(1, streams * dim // 64), **options)
        self.down, up = Linear(streams * dim, self.rank), Linear(self.rank, streams * dim)
        up.weight = self.up.weight  # which starts small
        self.up = up

    def __call__(self, x: mx.array, sublayer: nn.Module) -> mx.array:
        u, add_residual = super().__call__(x)
        return add_residual(sublayer(u))


class Block(nn.Module):
    """Attention and MLP sit in a connection each."""

    def __init__(self, dim: int, heads: int, hidden: int, connections: list[nn.Module]):
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads), MLP(dim, hidden)
        self.connections = connections

    def __call__(self, x: mx.array) -> mx.array:
        x = self.connections[0](x, self.attention)
        return self.connections[1](x, self.mlp)


class ByteLM(nn.Module):
    """n streams of ``dim`` channels go through ``depth`` blocks, ``2 * depth`` sublayers."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        streams: int,
        connection: str,
        use_metal: bool,
        hidden: int | None = None,
        dtype: mx.Dtype = mx.float32,
        recompute: bool = False,
    ):
        super().__init__()
        self.streams, self.dtype, self.recompute = streams, dtype, recompute
        options = {"use_metal": use_metal}

        def connect(k: int) -> nn.Module:
            if connection == "plain":
                return Residual(dim)
            if connection == "gated":
                return Gated(dim, streams, **options)
            made = {"convention": CONVENTIONS[connection], "dynamic": connection != "static"}
            return m.MHCLayer(streams, dim, layer_idx=k, **made, **options)

        self.embedding = Embedding(256, dim)
        self.blocks = [
            Block(dim, heads, hidden or 4 * dim, [connect(2 * k), connect(2 * k + 1)])
            for k in range(depth)
        ]
        self.norm = RMSNorm(dim)
        self.head = Linear(dim, 256)

    def __call__(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Return the logits, and the streams before they are reduced."""
        x = m.expand_streams(self.embedding(tokens, self.dtype), self.streams)
        for block in self.blocks:
            # mx.checkpoint keeps a block's input and computes its output again for the gradient.
            x = (nn.utils.checkpoint(block) if self.recompute else block)(x)
        return self.head(self.norm(m.reduce_streams(x))), x


def loss_fn(model: ByteLM, batch: mx.array) -> tuple[mx.array, mx.array]:
    """Return bits per byte, and the similarity between streams (0 where there is one)."""
    logits, x = model(batch[:, :-1])
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch[:, 1:])
    similarity = stream_similarity(x) if model.streams > 1 else mx.array(0.0)
    return losses.mean() / math.log(2), similarity


def make_model(args: argparse.Namespace) -> ByteLM:
    streams = 1 if args.connection == "plain" else args.streams
    sizes = (args.dim, args.depth, args.heads, streams)
    options = {"hidden": args.mlp, "dtype": DTYPES[args.dtype], "recompute": args.recompute}
    return ByteLM(*sizes, args.connection, not args.no_metal, **options)


def sample(model: ByteLM, prompt: bytes, length: int, context: int) -> str:
    tokens = list(prompt)
    for _ in range(length):
        logits, _ = model(mx.array([tokens[-context:]]))
        tokens.append(mx.random.categorical(logits[0, -1].astype(mx.float32) / 0.7).item())
    return bytes(tokens).decode(errors="replace")


def read_corpus(file: str | None, limit: int = 16 << 20) -> bytes:
    """Read a file, or the source files of the standard library."""
    if file is not None:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise SystemExit(
                f"--data must be a file that can be read but is {file}: {error.strerror}"
            ) from error
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
    return data


class Windows:
    """Sequences start side by side, shuffled and shifted anew in each epoch.

    Sequence k of a run depends on the seed and k alone, so that a position, the number of sequences
    taken, is all that a checkpoint must hold, and any number of processes can share them.
    """

    def __init__(self, size: int, context: int, seed: int):
        self.context, self.seed = context, seed
        self.count = (size - context - 1) // context
        self.order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[int, list[int]]:
        rng = random.Random(f"{self.seed} {epoch}")
        return rng.randrange(self.context), rng.sample(range(self.count), self.count)

    def starts(self, position: int, count: int) -> mx.array:
        found = []
        for k in range(position, position + count):
            epoch, index = divmod(k, self.count)
            shift, order = self.order(epoch)
            found.append(shift + self.context * order[index])
        return mx.array(found)
