"""Inputs per op, shapes with their reasons, tolerances: the only test file with numbers."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, Convention

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CONVENTIONS = {c.name: c for c in (PAPER, ROW_FIRST, ADDITIVE, DEEPSEEK_V4)}
STREAMS = (1, 2, 3, 4, 8, 12, 16, 32, 64)
# smallest, one pack, prime and ragged, small, ragged above a simdgroup, and three model widths
CHANNELS = (1, 8, 31, 64, 129, 1280, 1920, 4096)
ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
OUTPUT_ULPS = 8  # of the largest value of the token or matrix: a sum may cancel to anything
GRADIENT = 4e-6  # times sqrt(tokens) times the largest gradient, in float32
REFERENCE = 3  # times that for the reference: MLX's plain sums over a row are less exact
HALF_GRADIENT_ULPS = 1  # more, where the gradient itself is float16 or bfloat16
MAX_VARIANTS = 150


@dataclass(frozen=True)
class Case:
    """One call: op, tokens (leading axes), n, C, dtype of the streams, and what is special."""

    op: str
    lead: tuple[int, ...]
    n: int
    C: int
    dtype: str = "float32"
    convention: Convention | None = None
    eps: float = 1e-5
    per_token: tuple[bool, bool] = (False, False)  # h_post, h_res
    identity: bool = False  # h_res is None
    offset: int = 0  # elements between the buffer's start and the slice that is passed
    weights: str = "float32"  # dtype of coefficients and weights
    scale: float = 2.0  # of logits

    def __str__(self) -> str:
        marks = [self.convention.name] if self.convention else []
        marks += (
            [f"iters={self.convention.iters}"]
            if self.convention and self.convention.iters != 20
            else []
        )
        marks += [n for n, flag in zip(("post", "res"), self.per_token, strict=True) if flag]
        marks += ["identity"] * self.identity + [f"offset{self.offset}"] * bool(self.offset)
        marks += [self.weights] * (self.weights != "float32")
        lead = "x".join(map(str, self.lead)) or "one"
        return "-".join([self.op, lead, f"n{self.n}", f"C{self.C}", self.dtype, *marks])

    @property
    def tokens(self) -> int:
        return int(np.prod(self.lead, initial=1))

    @property
    def statics(self) -> tuple:
        if self.op in ("sinkhorn_knopp", "mhc_layer"):
            return (
                (self.convention,) if self.op == "sinkhorn_knopp" else (self.convention, self.eps)
            )
        return (self.eps,) if self.op != "stream_mix_add" else ()

    def arrays(self, seed: int = 0) -> list[mx.array | None]:
        """Non-symmetric random inputs; each slice starts ``offset`` elements into its buffer."""
        rng = np.random.default_rng([seed, self.n, self.C, len(self.op)])

        def array(shape, dtype, low=None):
            values = rng.normal(size=shape) if low is None else rng.uniform(low, low + 1, shape)
            a = mx.array(values.astype(np.float32).ravel()).astype(DTYPES[dtype])
            if self.offset:
                a = mx.concatenate([mx.zeros(self.offset, a.dtype), a])
                mx.eval(a)
                a = a[self.offset :]
            return a.reshape(shape)

        def logits(shape):
            if self.convention.start == "additive":
                return array(shape, self.weights, 0.1)
            return (self.scale * array(shape, "float32")).astype(DTYPES[self.weights])

        n, C, lead, w = self.n, self.C, self.lead, self.weights
        if self.op == "sinkhorn_knopp":
            return [logits((*lead, n, n))]
        x, weight = array((*lead, n, C), self.dtype), array((C,), w, 0.5)
        post = array((*lead, n) if self.per_token[0] else (n,), w, 0.2)
        res = None if self.identity else array((*lead, n, n) if self.per_token[1] else (n, n), w)
        if self.op == "stream_mix_add":
            return [x, array((*lead, C), self.dtype), post, res]
        pre = array((n,), w, 0.2)
        if self.op == "stream_aggregate_norm":
            return [x, pre, weight]
        return [x, pre, post, logits((n, n)) if self.op == "mhc_layer" else res, weight]

    def cotangent(self, like: mx.array, seed: int = 1) -> mx.array:
        rng = np.random.default_rng([seed, self.n, self.C])
        return mx.array(rng.normal(size=like.shape).astype(np.float32)).astype(like.dtype)


def covering() -> list[Case]:
    """Every n and C with every dtype, each op and convention, in at most MAX_VARIANTS kernels."""
    cases, conventions = [], list(CONVENTIONS.values())
    layers = ["mhc_layer", "mhc_static", "mhc_layer", "stream_aggregate_norm", "mhc_layer"]
    k = 0
    for i, n in enumerate(STREAMS):
        for j, dtype in enumerate(DTYPES):
            C = CHANNELS[(i + 3 * j) % len(CHANNELS)]
            lead = (2,) if n >= 32 or C >= 1920 else (2, 3) if k % 3 else (5,)
            eps = 0.5 if 1 in (n, C) else 1e-5  # scale-free: without eps h_pre has no gradient
            weights = dtype if n in (2, 16) else "float32"
            special = {"offset": k % 4 and 1, "weights": weights}
            op = layers[k % len(layers)]
            convention = conventions[(i if n > 8 else k // 2) % 4] if op == "mhc_layer" else None
            cases.append(Case(op, lead, n, C, dtype, convention, eps, **special))
            per_token = ((False, False), (True, True), (True, False), (False, True))[(i + j) % 4]
            cases.append(Case("stream_mix_add", lead, n, C, dtype, per_token=per_token, **special))
            k += 1
    for n, names in ((3, "A"), (4, "PRAD")):
        for name in names:
            convention = next(c for c in conventions if c.name.startswith(name))
            cases.append(Case("sinkhorn_knopp", (101,), n, n, convention=convention))
    few = replace(PAPER, iters=1)
    return cases + [
        Case(
            "sinkhorn_knopp", (2, 3), 4, 4, "float16", few, weights="float16"
        ),  # both steps in logs
        Case(
            "sinkhorn_knopp", (), 4, 4, convention=replace(ROW_FIRST, iters=300), scale=10.0
        ),  # in segments
        Case(
            "mhc_static", (), 4, 8, "bfloat16", identity=True
        ),  # the smallest of DESIGN: one token
        Case("stream_mix_add", (), 4, 8, "bfloat16", identity=True),
        Case("mhc_static", (0,), 4, 8),  # no tokens
        Case("stream_mix_add", (2, 0), 4, 8),
        Case("mhc_layer", (0,), 4, 8, convention=ROW_FIRST),
    ]


COVERING = covering()
