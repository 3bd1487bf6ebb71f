"""Conventions: how each variant of hyper-connections makes its coefficients from logits."""

import math
from dataclasses import dataclass, replace

__all__ = [
    "ADDITIVE",
    "AXES",
    "DEEPSEEK_V4",
    "HUNYUAN_V4",
    "HUNYUAN_V4_POST_EPS",
    "IDENTITY",
    "KRONECKER",
    "MHC_LITE",
    "PAPER",
    "ROW_FIRST",
    "SINKHORN",
    "STARTS",
    "START_CODES",
    "UNCONSTRAINED",
    "XING",
    "Convention",
]

# The starts before half-steps, with the values of START_EXP, ... in kernels/include/sinkhorn.h.
START_CODES = {"exp": 0, "softmax": 1, "additive": 2, "exp_plain": 3}
SINKHORN = tuple(START_CODES)
STARTS = (*SINKHORN, "unconstrained", "permutations", "kronecker", "identity")
AXES = ("rows", "columns")
# The smallest eps beside 0 (float32 sums lose a smaller one), and float32's largest power of two.
EPS_LEAST, NUMBER_MOST = 2.0**-100, 2.0**127
# The starts that take exp of logits and make half-steps: these may have a clamp. The widest one of
# exp_plain: exp(-64) = 2**-92.3, which some half-steps may make smaller, is far above 2**-126.
EXPONENTIAL = ("exp", "softmax", "exp_plain")
CLAMP_WIDTH = 64


def _check_int(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"[{op}] {name} must be an int but got {type(value).__name__}.")


@dataclass(frozen=True)
class Convention:
    """A convention has the projection of logits to the mixing matrix, and the gates' constants.

    After the starts ``"exp"``, ``"exp_plain"``, ``"softmax"`` and ``"additive"`` the projection
    makes half-steps ``P / (P.sum(axis) + eps)`` that alternate between rows and columns, 2 * iters
    in all. The first of them may belong to the start. ``"exp"`` makes two on the logits,
    ``l -= logsumexp(l, axis)``, without eps; with eps = 0 this is the same map and finite at any
    logits. ``"exp_plain"`` has eps in every sum from the first on; with eps = 0 it is the same as
    ``"exp"``. ``"softmax"`` is itself the first half-step, along rows; with eps = 0 it is the same
    as ``"exp"``. The other starts are projections without half-steps. An option that the start or
    the gates do not use must keep its default.

    Args:
        name: The name of the convention in messages.
        start: With half-steps, P from the logits l: ``"exp"``: P = exp(l); ``"exp_plain"``:
            P = exp(l - max(l, axis)), where the axis is that of the first half-step (of equal
            logits the first has the gradient of the maximum); ``"softmax"``:
            P = softmax(l, rows) + eps; ``"additive"``: P = I + l. Without half-steps:
            ``"unconstrained"``: h_res = I + l; ``"permutations"``, n <= 5: the sum of the n!
            permutation matrices, in lexicographic order, weighted by softmax(l); ``"kronecker"``, n
            a power of two: the Kronecker product of ``[[p, 1 - p], [1 - p, p]]`` with
            p = softmax(pair)[0] for each pair of logits, the first pair outermost; ``"identity"``:
            h_res = I, without logits.
        first: Axis of the first half-step, ``"rows"`` or ``"columns"``.
        iters: Sinkhorn-Knopp iterations T, at least 1. A model is defined with its T: the result is
            not that of the converged iteration.
        eps: Added to each sum: 0, or at least 2**-100.
        transposed: Whether h_res is the transpose of P. ``sinkhorn_knopp`` and ``project`` return
            h_res, row = output, in either case. It must be False for ``"kronecker"`` and
            ``"identity"``, whose matrices are symmetric.
        sigmoid: Whether h_pre = sigmoid(H_pre) + pre_eps and
            h_post = post_scale * sigmoid(H_post) + post_eps; otherwise h_pre = H_pre and
            h_post = H_post.
        pre_eps, post_scale, post_eps: The constants of these gates, at least 0.
        clamp: The numbers (low, high) between which l is clipped before the exp of a start with
            half-steps. A logit that is not strictly between them has gradient 0, as in `mx.clip`.
            None clips nothing. ``"exp_plain"`` must have one, with high - low at most 64: float32
            loses exp of less, which half-steps with eps would bring up again.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is none of its values, out of its range, or must keep its default.
    """

    name: str
    start: str = "exp"
    first: str = "rows"
    iters: int = 20
    eps: float = 0.0
    transposed: bool = False
    sigmoid: bool = True
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"[Convention] start must be one of {STARTS} but got {self.start!r}.")
        if self.first not in AXES:
            raise ValueError(f"[Convention] first must be one of {AXES} but got {self.first!r}.")
        if self.start == "softmax" and self.first != "rows":
            must = "be 'rows' with start 'softmax'"
            raise ValueError(f"[Convention] first must {must} but got 'columns'.")
        for name, kind in (("name", str), ("transposed", bool), ("sigmoid", bool)):
            if not isinstance(value := getattr(self, name), kind):
                must, got = kind.__name__, type(value).__name__
                raise TypeError(f"[Convention] {name} must be a {must} but got {got}.")
        _check_int("Convention", "iters", self.iters)
        if self.iters < 1:
            raise ValueError(f"[Convention] iters must be at least 1 but got {self.iters}.")
        for name in ("eps", "pre_eps", "post_scale", "post_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                got = type(value).__name__
                raise TypeError(f"[Convention] {name} must be a number but got {got}.")
            if not 0 <= value <= NUMBER_MOST:
                must = "be finite and at least 0 in float32"
                raise ValueError(f"[Convention] {name} must {must} but got {value}.")
        if 0 < self.eps < EPS_LEAST:
            must = "be 0 or at least 2**-100 = 8e-31"
            raise ValueError(f"[Convention] eps must {must} but got {self.eps}.")
        self._check_clamp()
        self._refuse_unused()

    def _check_clamp(self) -> None:
        """Raise TypeError or ValueError unless clamp is None or fits the start."""
        must, most = "be None or two numbers (low, high)", math.inf
        if self.start == "exp_plain":
            must, most = "be two numbers (low, high) with start 'exp_plain'", CLAMP_WIDTH
        if self.clamp is None:
            if self.start == "exp_plain":
                raise ValueError(f"[Convention] clamp must {must} but got None.")
            return
        if not isinstance(self.clamp, tuple) or any(
            isinstance(v, bool) or not isinstance(v, (int, float)) for v in self.clamp
        ):
            raise TypeError(f"[Convention] clamp must {must} but got {self.clamp!r}.")
        if len(self.clamp) != 2:
            raise ValueError(f"[Convention] clamp must {must} but got {self.clamp!r}.")
        low, high = self.clamp
        if not -NUMBER_MOST <= low < high <= NUMBER_MOST or not high - low <= most:
            must = f"be finite in float32, with low < high{' <= low + 64' * (most < math.inf)},"
            raise ValueError(f"[Convention] clamp must {must} but got {self.clamp!r}.")

    def _refuse_unused(self) -> None:
        """Raise ValueError for an option that nothing uses and that differs from its default."""
        unused: dict[str, str] = {}
        if self.start not in SINKHORN:
            unused |= dict.fromkeys(("first", "iters", "eps"), f"start {self.start!r}")
        if self.start not in EXPONENTIAL:
            unused["clamp"] = f"start {self.start!r}"
        if self.start in ("kronecker", "identity"):
            unused["transposed"] = f"start {self.start!r}, which is symmetric"
        if not self.sigmoid:
            unused |= dict.fromkeys(("pre_eps", "post_scale", "post_eps"), "sigmoid=False")
        for name, where in unused.items():
            default, value = type(self).__dataclass_fields__[name].default, getattr(self, name)
            if value != default:
                must = f"be {default!r} with {where}"
                raise ValueError(f"[Convention] {name} must {must} but got {value!r}.")

    @property
    def in_logs(self) -> bool:
        """Tell whether the first two half-steps are ``l -= logsumexp(l)``, on the logits."""
        return self.start == "exp" or (self.start in EXPONENTIAL and self.eps == 0)

    def in_range(self, n: int) -> bool:
        """Tell whether float32 holds all elements of P, in each half-step, that matter for h_res.

        In the mean of many half-steps one multiplies an element by at most n - 1: the worst matrix
        has n - 1 rows that need the same column, and one row that needs all others. Float32 loses
        elements below 2**-126. If all half-steps together multiply by at most 2**107, those
        elements stay below 2**-19 in h_res. After ``"exp_plain"`` the elements of a column may all
        be small and grow together, by 1 / eps in a half-step; CLAMP_WIDTH keeps all of them at
        2**-93 or more, far above 2**-126.
        """
        least = 0 if self.start == "exp_plain" and self.in_logs else 2.0**-40
        # a gradient squares sums of this size
        if self.start in ("softmax", "exp_plain") and self.eps < least:
            return False
        log2_growth = (2 * self.iters - 2) * math.log2(max(n - 1, 1))
        return self.start == "additive" or log2_growth <= 107

    def check_streams(self, op: str, n: int) -> None:
        """Raise TypeError unless n is an int, and ValueError unless the projection exists for n.

        Messages begin with ``op``.
        """
        _check_int(op, "n", n)
        if n < 1:
            raise ValueError(f"[{op}] n must be at least 1 but got {n}.")
        if self.start == "permutations" and n > 5:
            must = f"be at most 5 with {self.name}, which weighs n! permutations,"
            got = f"{n}: KRONECKER is doubly stochastic for any power of two"
            raise ValueError(f"[{op}] n must {must} but got {got}.")
        if self.start == "kronecker" and n & (n - 1):
            raise ValueError(f"[{op}] n must be a power of two with {self.name} but got {n}.")

    def res_size(self, n: int) -> int:
        """Return R, the number of logits of the mixing matrix of n streams.

        It raises TypeError and ValueError as `check_streams` does.
        """
        self.check_streams("res_size", n)
        if self.start == "permutations":
            return math.factorial(n)
        if self.start == "kronecker":
            return 2 * (n.bit_length() - 1)
        return 0 if self.start == "identity" else n * n


PAPER = Convention("PAPER", first="columns")  # arXiv 2512.24880, eq. 8-9
ROW_FIRST = Convention("ROW_FIRST")  # mHC.cu, mhc-mlx, SuperFused
ADDITIVE = Convention("ADDITIVE", start="additive", eps=1e-8, sigmoid=False)  # static layers alone
DEEPSEEK_V4 = Convention("DEEPSEEK_V4", start="softmax", eps=1e-6, transposed=True, pre_eps=1e-6)
MHC_LITE = Convention("MHC_LITE", start="permutations")  # arXiv 2601.05732, flash-mHC
KRONECKER = Convention("KRONECKER", start="kronecker")  # KromHC
# iHC: h_res is the identity, so that phi and bias have 2 n rows and alpha two entries.
IDENTITY = Convention("IDENTITY", start="identity", pre_eps=1e-6)
# Hunyuan V4 (Hy4), which is iHC. pre_eps is the model's hc_eps and post_scale its hc_magnitude, so
# another checkpoint may need replace(HUNYUAN_V4, ...). mlx-vlm 0.7.10 has h_post = hc_magnitude *
# sigmoid(H_post); transformers adds hc_eps to it, which HUNYUAN_V4_POST_EPS does.
HUNYUAN_V4 = Convention("HUNYUAN_V4", start="identity", pre_eps=1e-6, post_scale=2.0)
HUNYUAN_V4_POST_EPS = replace(HUNYUAN_V4, name="HUNYUAN_V4_POST_EPS", post_eps=1e-6)
# Xing 4 (mlx-vlm 0.7.10's xing4_0). clamp, iters and eps are the model's mhc_h_res_clamp_min and
# _max, hc_sinkhorn_iters and hc_eps. The convention is the maths of the coefficients from float32
# logits; where the model rounds is not part of it. In 16 bits its own code rounds x * r and phi to
# x's dtype before the product, the product (the logits before alpha) and then h_pre, h_post and
# h_res, and it adds the write-back and the read in x's dtype. An adapter that must match those bits
# does this outside; one that need not passes phi as it is to `mhc_pre`, which is more exact.
XING = Convention("XING", start="exp_plain", eps=1e-6, clamp=(-30.0, 30.0))
# mHC without its projection, for ablations. The tanh form of arXiv 2409.19606 is another one.
UNCONSTRAINED = Convention("UNCONSTRAINED", start="unconstrained")
