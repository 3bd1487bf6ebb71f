"""One call of an op: its arrays, by the row of cases.py that says what the op takes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mhc_mlx import Convention

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
LAYOUTS = ("plain", "transposed", "strided", "broadcast")


def laid_out(a: mx.array, layout: str, offset: int = 0) -> mx.array:
    """The same values, but where broadcast repeats the first of an axis, in another order of memory
    or from an offset in elements."""
    if layout == "transposed" and a.ndim > 1:
        a = mx.contiguous(a.T).T
    elif layout == "strided" and a.ndim > 0:
        a = mx.stack([a, mx.full(a.shape, 7.0, a.dtype)], -1)
        mx.eval(a)
        a = a.flatten(-2)[..., ::2]
    elif layout == "broadcast" and a.ndim > 1 and a.size:
        a = mx.broadcast_to(a[:1], a.shape)
    elif offset:
        whole = mx.concatenate([mx.zeros(offset, a.dtype), a.flatten()])
        mx.eval(whole)
        a = whole[offset:].reshape(a.shape)
    return a


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
    per_token: tuple[bool, bool] = (False, False)  # h_post (or h_pre, where it is alone), h_res
    identity: bool = False  # h_res is None
    offset: int = 0  # elements between the buffer's start and the slice that is passed
    weights: str = "float32"  # dtype of coefficients and weights
    scale: float = 2.0  # of logits
    phi: str = "float32"  # dtype of phi
    norm: bool = True  # mhc_pre, mhc_seam, mhc_single_pass have a weight
    rounded: bool = False  # round_aggregate
    norm_eps: float = 1e-6
    parts: int = 3  # of alpha; 2 where no logit is of h_res
    write_back: bool = True  # stream_norm has y and h_post
    inject: bool = True  # stream_norm makes next_post
    layouts: tuple[tuple[str, int], ...] = ()  # per array, in turn: see laid_out

    def __str__(self) -> str:
        marks = [self.convention.name] if self.convention else []
        marks += (
            [f"iters={self.convention.iters}"]
            if self.convention and self.convention.iters != 20
            else []
        )
        first = "post" if "h_post" in self.row.arrays else "pre"
        marks += [n for n, flag in zip((first, "res"), self.per_token, strict=True) if flag]
        marks += ["identity"] * self.identity + [f"offset{self.offset}"] * bool(self.offset)
        marks += [self.weights] * (self.weights != "float32")
        marks += [f"phi-{self.phi}"] * (self.phi != "float32") + ["plain"] * (not self.norm)
        marks += ["rounded"] * self.rounded + ["parts2"] * (self.parts == 2)
        marks += [f"scale{self.scale:g}"] * (self.scale != 2.0)
        marks += ["alone"] * (not self.write_back) + ["no-inject"] * (not self.inject)
        marks += ["".join(f"{name[0]}{offset}" for name, offset in self.layouts)]
        marks = [mark for mark in marks if mark]
        lead = "x".join(map(str, self.lead)) or "one"
        return "-".join([self.op, lead, f"n{self.n}", f"C{self.C}", self.dtype, *marks])

    @property
    def row(self) -> "Op":
        """What tests know of the op."""
        import cases  # which imports this

        return cases.OPS[self.op]

    @property
    def tokens(self) -> int:
        return int(np.prod(self.lead, initial=1))

    @property
    def statics(self) -> tuple:
        """What a call has after its arrays."""
        return tuple(getattr(self, name) for name in self.row.statics)

    @property
    def absent(self) -> list[int]:
        """Which of the arrays are None."""
        gone = {name: self.identity for name in self.row.optional}
        given = {"weight": self.norm, "inject": self.inject}
        given |= dict.fromkeys(("y", "h_post"), self.write_back)
        gone |= {name: not here for name, here in given.items() if name in gone}
        return [k for k, name in enumerate(self.row.arrays) if gone.get(name)]

    def arrays(self, seed: int = 0) -> list[mx.array | None]:
        """The inputs, laid out in memory as the case says."""
        arrays, layouts = self.plain_arrays(seed), self.layouts or (("plain", 0),)
        turns = zip(arrays, itertools.cycle(layouts), strict=False)
        return [None if a is None else laid_out(a, *layout) for a, layout in turns]

    def plain_arrays(self, seed: int = 0) -> list[mx.array | None]:
        """Non-symmetric random inputs; each slice starts ``offset`` elements into its buffer."""
        row, rng = self.row, np.random.default_rng([seed, self.n, self.C, len(self.op)])
        drawn = {}
        for name, array in row.drawn.items():
            if not (name == "h_res" and self.identity):
                drawn[name] = self.drawn(array, rng)
        absent = self.absent
        return [None if k in absent else drawn[name] for k, name in enumerate(row.arrays)]

    def drawn(self, array: "Array", rng: np.random.Generator) -> mx.array:
        shape = array.shape(self.lead if array.per_token(self) else (), self.size)
        name, other = getattr(self, array.dtype, self.weights), array.dtype == "other_weights"
        if name == "mixed":  # neighbours among the arguments differ
            name = "float32" if other else "bfloat16"
        values = array.draw(self, rng, shape).astype(np.float32).ravel()
        a = mx.array(values).astype(DTYPES[name])
        if self.offset:
            a = mx.concatenate([mx.zeros(self.offset, a.dtype), a])
            mx.eval(a)
            a = a[self.offset :]
        return a.reshape(shape)

    def size(self, axis: str) -> int:
        """Of an axis that `Array` names."""
        if axis in ("R", "L"):
            return self.convention.res_size(self.n) + (2 * self.n if axis == "L" else 0)
        sizes = {"n": self.n, "C": self.C, "K": self.n * self.C, "parts": self.parts}
        return sizes.get(axis) or int(axis)

    def cotangent(self, like, seed: int = 1):
        """Of the output, or a tuple of the outputs of an op that has several."""
        if isinstance(like, tuple):
            return tuple(self.cotangent(a, seed + k) for k, a in enumerate(like))
        rng = np.random.default_rng([seed, self.n, self.C])
        return mx.array(rng.normal(size=like.shape).astype(np.float32)).astype(like.dtype)


# ---- arrays and rows

Draw = Callable[[Case, np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(scale: Callable[[Case], float] = lambda case: 1.0) -> Draw:
    return lambda case, rng, shape: scale(case) * rng.normal(size=shape)


def uniform(low: float, scale: Callable[[Case], float] = lambda case: 1.0) -> Draw:
    """From low to low + 1, times the scale."""
    return lambda case, rng, shape: scale(case) * rng.uniform(low, low + 1, shape)


def half(case: Case) -> float:
    """Of alpha and bias: logits alpha * l + bias have the scale where l has variance 1."""
    return case.scale / 2**0.5


def logits(otherwise: Draw) -> Draw:
    """Positive where the matrix is I + logits."""
    return lambda case, *how: (uniform(0.1) if case.convention.start == "additive" else otherwise)(
        case, *how
    )


def scaled(case: Case, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Scaled in float32."""
    return np.float32(case.scale) * rng.normal(size=shape).astype(np.float32)


def never(case: Case) -> bool:
    return False


def always(case: Case) -> bool:
    return True


class Array(NamedTuple):
    """An array of a call.

    axes: But for tokens: n, C, K (n * C), R (logits of h_res), L (2 n + R), parts (of alpha), or a
        number.
    draw: Makes its values.
    dtype: The field of Case that has its dtype; "other_weights" differs where weights are mixed.
    per_token: Whether the leading axes of a case come first.
    """

    axes: str
    draw: Draw
    dtype: str = "weights"
    per_token: Callable[[Case], bool] = never

    def shape(self, lead: tuple[int, ...], size: Callable[[str], int]) -> tuple[int, ...]:
        return (*lead, *map(size, self.axes.split()))


class Op(NamedTuple):
    """What tests know of an op.

    arrays: By name, in the order of a call.
    optional: Those of them that may be None.
    rows: Of n, the fewest rows of C elements per token: read and written forward, read and written
        backward. None of an op whose arrays have no such rows.
    statics: The fields of Case that follow the arrays in a call.
    drawn: Arrays in the order in which they are drawn, some of which it has not.
    """

    arrays: dict[str, Array]
    optional: tuple[str, ...]
    rows: Callable[[int], tuple[int, int, int, int]] | None
    statics: tuple[str, ...]
    drawn: dict[str, Array]

    @property
    def per_token(self) -> tuple[bool, bool]:
        """Which of `Case.per_token` say something of its arrays."""

        def forms(*flags):
            return [a.per_token(SimpleNamespace(per_token=flags)) for a in self.arrays.values()]

        shared = forms(False, False)
        return forms(True, False) != shared, forms(False, True) != shared
