"""What tests of modules share: a small model, executors, and gradients by part."""

import contextlib
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from proof import executor

import mhc_mlx as m

N, C = 4, 16
DYNAMIC = [
    *(m.PAPER, m.ROW_FIRST, m.DEEPSEEK_V4, m.XING),
    *(m.MHC_LITE, m.KRONECKER, m.IDENTITY, m.HUNYUAN_V4, m.UNCONSTRAINED),
]
conventions = pytest.mark.parametrize("convention", DYNAMIC, ids=lambda c: c.name)

# Five deviations of what phi adds at the start: 0.02 alpha = 2e-4 to a logit, of which the steepest
# gate, h_post = 2 sigmoid, passes half.
NOISE = 5e-4


@contextlib.contextmanager
def running(where: str):
    """Kernels of this machine ("here"), or the stand-in; yields what was launched, if it counts."""
    mx.random.seed(0)
    with contextlib.nullcontext() if where == "here" else executor(where) as found:
        yield found


@pytest.fixture(params=["here", "stand-in"])
def launched(request):
    with running(request.param) as found:
        yield found
        assert found is None or found, "nothing was launched"


def shaken(module, scale=0.5):
    """The module with noise on every parameter: no start hides a mistake."""
    noise = partial(tree_map, lambda p: p + scale * mx.random.normal(p.shape, p.dtype))
    return module.update(noise(module.trainable_parameters()))


def exact(module):
    """The module with every phi at zero: its start without noise."""
    phis = [(k, p) for k, p in tree_flatten(module.parameters()) if k.endswith("phi")]
    return module.update(tree_unflatten([(k, mx.zeros_like(p)) for k, p in phis]))


def close(a, b, tolerance=1e-5):
    assert (a.dtype, a.shape) == (b.dtype, b.shape), (a.dtype, a.shape, b.dtype, b.shape)
    error, most = mx.abs(a - b).max().item(), mx.abs(b).max().item()
    assert error < tolerance * max(1, most), f"largest error {error}, largest value {most}"


class Tiny(nn.Module):
    """Streams in, blocks of MHCBlock, a learned read-out, logits."""

    def __init__(self, convention=m.PAPER, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(32, 2 * C)
        self.blocks = [
            m.MHCBlock(nn.Linear(2 * C, 2 * C), 2 * C, N, convention=convention, layer_idx=k)
            for k in range(depth)
        ]
        self.head = m.HyperHead(2 * C, N)

    def __call__(self, tokens, wrap=lambda block: block):
        x = m.expand_streams(self.embedding(tokens), N)
        for block in self.blocks:
            x = wrap(block)(x)
        return self.embedding.as_linear(self.head(x))


TOKENS = mx.array(np.random.default_rng(0).integers(0, 32, (4, 9)))


def loss_fn(model, tokens=TOKENS, **options):
    logits = model(tokens[:, :-1], **options).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


# Logits of h_res without those of its largest weights, whose gradients are differences of weights
# near 1: rounding.
SMALL = {"permutations": slice(1, None), "kronecker": slice(1, None, 2)}


def parts(gradients, convention):
    """Gradients of connections by name, in their parts pre, post and res."""
    for name, g in tree_flatten(gradients):
        if name.endswith(("phi", "bias", "alpha")) and "connection" in name:
            size = 1 if name.endswith("alpha") else N
            yield f"{name}.pre", g[:size]
            yield f"{name}.post", g[size : 2 * size]
            if convention.res_size(N):
                small = SMALL.get(convention.start, slice(None)) if size > 1 else slice(None)
                yield f"{name}.res", g[2 * size :][small]
        else:
            yield name, g


def hidden(connection, convention, normed):
    """Names of the gradients that the first connection lacks forever, because its streams are
    equal: of h_res, whose rows sum to one (exactly: the last of ROW_FIRST's and XING's truncated
    half-steps is over columns), and of h_pre, where a norm follows.
    """
    rows = convention not in (m.IDENTITY, m.HUNYUAN_V4, m.UNCONSTRAINED, m.ROW_FIRST, m.XING)
    return {
        f"{connection}.{parameter}.{part}"
        for parameter in ("phi", "bias", "alpha")
        for part in ["res"] * rows + ["pre"] * normed
    }


def silent(gradients, convention, first, normed=False):
    """Names of the gradients that are rounding noise: below 1e-9, and those of phi and bias also
    where they are as small as the same part's of connection ``first``, from which it is hidden.
    """
    sizes = {name: mx.abs(g).max().item() for name, g in parts(gradients, convention)}
    noisy = hidden(first, convention, normed)

    def noise(name):
        same = ".".join([first, *name.split(".")[-2:]])
        return 3 * sizes[same] if same in noisy and "alpha" not in same else 0

    return {name for name, size in sizes.items() if not size > max(1e-9, noise(name))}
