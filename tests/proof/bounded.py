"""Arrays in float64, each element with a bound of the error that float32 may make.

The oracle's functions run on them unchanged (`evaluate`). An operation propagates the bounds of its
operands and adds 2^-24 of its result. A sum of m terms t adds 2^-24 sum(|t|) for each addition of
its longest chain; these are m, or m / lanes + 6 where a kernel shares a long sum among the lanes of
a simdgroup. So the bound of a sum grows with its terms, also where they cancel.
"""

import contextlib
import types

import numpy as np

from proof import oracle

U = 2.0**-24
PROJECTION = 2e-6  # error of a float32 projection by half-steps, relative to the largest element
PROJECTION_GRADIENT = 1e-5  # the same of the gradient of its logits
LONG = 64  # lanes share a sum of more terms


def additions(count: int, lanes: int) -> float:
    return count if count <= LONG else count / lanes + 6


class Bounded:
    """An array with values ``v`` and bounds ``e``.

    ``lanes`` is that of `additions`; ``ties`` counts the elements that `rounding` may round to
    either side.
    """

    __array_ufunc__ = None  # so that NumPy leaves operators to this class
    lanes, ties = 1, 0

    def __init__(self, v, e=None):
        self.v = np.asarray(v, np.float64)
        self.e = np.zeros(self.v.shape) if e is None else np.broadcast_to(e, self.v.shape)

    shape = property(lambda self: self.v.shape)
    ndim = property(lambda self: self.v.ndim)
    size = property(lambda self: self.v.size)
    T = property(lambda self: Bounded(self.v.T, self.e.T))

    def __len__(self):
        return len(self.v)

    def __iter__(self):
        return (self[k] for k in range(len(self)))

    def __getitem__(self, at):
        return Bounded(self.v[at], self.e[at])

    def __setitem__(self, at, a):
        a = bounded(a)
        self.e = np.array(self.e)
        self.v[at], self.e[at] = a.v, a.e

    def __neg__(self):
        return Bounded(-self.v, self.e)

    def __add__(self, other):
        return rounded_once(self.v + bounded(other).v, self.e + bounded(other).e)

    def __sub__(self, other):
        return rounded_once(self.v - bounded(other).v, self.e + bounded(other).e)

    def __rsub__(self, other):
        return bounded(other) - self

    def __mul__(self, other):
        b = bounded(other)
        e = np.abs(self.v) * b.e + self.e * np.abs(b.v) + self.e * b.e
        return rounded_once(self.v * b.v, e)

    def __truediv__(self, other):
        b = bounded(other)
        if (b.e >= np.abs(b.v)).any():
            raise ValueError("[bounded] a divisor must be off by less than itself.")
        v = self.v / b.v
        return rounded_once(v, (self.e + np.abs(v) * b.e) / (np.abs(b.v) - b.e))

    def __rtruediv__(self, other):
        return bounded(other) / self

    def __pow__(self, power):
        made = self
        for _ in range(power - 1):
            made = made * self
        return made

    def __matmul__(self, other):
        return product(self, bounded(other), np.matmul, self.shape[-1])

    def __rmatmul__(self, other):
        return bounded(other) @ self

    def __ge__(self, other):
        return self.v >= bounded(other).v

    __radd__, __rmul__ = __add__, __mul__

    def sum(self, axis=None, keepdims=False):
        v = self.v.sum(axis=axis, keepdims=keepdims)
        count = self.size // max(1, np.size(v))
        terms = np.abs(self.v).sum(axis=axis, keepdims=keepdims)
        e = self.e.sum(axis=axis, keepdims=keepdims)
        return Bounded(v, e + additions(count, self.lanes) * U * terms)

    def mean(self, axis=None, keepdims=False):
        total = self.sum(axis, keepdims)
        return total / (self.size // max(1, total.size))

    def max(self, axis=None, keepdims=False):
        """Return numbers without bounds: the oracle subtracts a maximum only where it cancels."""
        return self.v.max(axis=axis, keepdims=keepdims)

    def argmax(self, axis=None, keepdims=False):
        """Return the index of the largest value, which selects a shift; any shift is right."""
        return self.v.argmax(axis=axis, keepdims=keepdims)

    def prod(self, axis):
        factors = [self[(slice(None),) * axis + (k,)] for k in range(self.shape[axis])]
        made = Bounded(np.ones(self.shape[:axis] + self.shape[axis + 1 :]))
        for factor in factors:
            made = made * factor
        return made

    def reshape(self, *shape):
        return Bounded(self.v.reshape(*shape), np.reshape(self.e, self.v.reshape(*shape).shape))


def bounded(a) -> Bounded:
    return a if isinstance(a, Bounded) else Bounded(a)


def rounded_once(v, e) -> Bounded:
    return Bounded(v, e + U * np.abs(v))


def product(a: Bounded, b: Bounded, f, count: int) -> Bounded:
    """Return f(a, b) for an f that is linear in both and a sum of `count` products."""
    x, y = np.abs(a.v), np.abs(b.v)
    e = f(x, b.e) + f(a.e, y) + f(a.e, b.e)
    return Bounded(f(a.v, b.v), e + (additions(count, Bounded.lanes) + 1) * U * f(x, y))


def rounding(round_to):
    """Return the function that rounds arrays with bounds to a shorter dtype.

    Where the bound allows a result of either side, the new bound contains both.
    """

    def rounded(a):
        if not isinstance(a, Bounded):
            return round_to(a)
        v, low, high = round_to(a.v), round_to(a.v - a.e), round_to(a.v + a.e)
        Bounded.ties += int((high != low).sum())
        return Bounded(v, np.maximum(high - v, v - low))

    return rounded


def elementwise(f, slope):
    """Return f for arrays with bounds; |f'| is at most slope(v, f(v)) near v."""

    def g(a):
        if not isinstance(a, Bounded):
            return f(a)
        v = f(a.v)
        return Bounded(v, a.e * slope(a.v, v) + 4 * U * np.abs(v))

    return g


def moved(name: str):
    """Return a function of NumPy that only moves elements, for arrays with bounds."""
    f = getattr(np, name)

    def g(a, *rest, **options):
        if isinstance(a, (list, tuple)):
            if not any(isinstance(b, Bounded) for b in a):
                return f(a, *rest, **options)
            both = ([b.v for b in map(bounded, a)], [b.e for b in map(bounded, a)])
        elif isinstance(a, Bounded):
            both = (a.v, a.e)
        else:
            return f(a, *rest, **options)
        values, bounds = (f(part, *rest, **options) for part in both)
        if isinstance(values, list):
            return [Bounded(v, e) for v, e in zip(values, bounds, strict=True)]
        return Bounded(values, bounds)

    return g


def where(condition, a, b):
    if not isinstance(a, Bounded) and not isinstance(b, Bounded):
        return np.where(condition, a, b)
    a, b = bounded(a), bounded(b)
    return Bounded(np.where(condition, a.v, b.v), np.where(condition, a.e, b.e))


def einsum(subscripts, a, b):
    if not isinstance(a, Bounded) and not isinstance(b, Bounded):
        return np.einsum(subscripts, a, b)
    a, b = bounded(a), bounded(b)
    inputs, output = subscripts.split("->")
    sizes = {k: s for k, s in zip(reversed(inputs.split(",")[1]), reversed(b.shape), strict=False)}
    count = int(np.prod([size for k, size in sizes.items() if k not in output]))
    return product(a, b, lambda x, y: np.einsum(subscripts, x, y), count)


def array(a, *rest):
    if isinstance(a, list) and any(isinstance(b, Bounded) for b in a):
        return moved("stack")(a)
    return np.array(a, *rest)


def zeros_like(a):
    return Bounded(np.zeros(a.shape)) if isinstance(a, Bounded) else np.zeros_like(a)


class NumPy(types.SimpleNamespace):
    """The module `np` of the oracle: NumPy's functions, some of them for arrays with bounds."""

    def __getattr__(self, name):
        f = getattr(np, name)
        if not callable(f) or isinstance(f, type):
            return f

        def g(*given, **options):
            if any(isinstance(a, Bounded) for a in given):
                raise TypeError(f"[bounded] np.{name} must be written for arrays with bounds.")
            return f(*given, **options)

        return g


MOVES = ("swapaxes", "concatenate", "split", "repeat", "stack", "delete", "broadcast_to", "reshape")
numpy = NumPy(
    **{name: moved(name) for name in (*MOVES, "moveaxis", "take_along_axis")},
    exp=elementwise(np.exp, lambda v, f: f),
    log=elementwise(np.log, lambda v, f: 1 / np.abs(v)),
    sqrt=elementwise(np.sqrt, lambda v, f: 0.5 / f),
    abs=elementwise(np.abs, lambda v, f: 1.0),
    tanh=elementwise(np.tanh, lambda v, f: 1.0),
    where=where,
    einsum=einsum,
    array=array,
    zeros_like=zeros_like,
)


def sinkhorn_knopp(plain):
    """Return the projection with one bound for all half-steps.

    Half-steps make errors smaller, but a bound of absolute values for each of them would grow.
    """

    def projected(logits, convention):
        if not isinstance(logits, Bounded):
            return plain(logits, convention)
        h, back = plain(logits.v, convention)
        off = 4 * logits.e.max(axis=(-1, -2), keepdims=True, initial=0)

        def largest(a):
            return np.abs(a).max(axis=(-1, -2), keepdims=True, initial=0)

        def backward(g):
            g = bounded(g)
            d = back(g.v)
            e = PROJECTION_GRADIENT * largest(d) + 4 * largest(g.e)
            return Bounded(d, e + off * largest(g.v))

        return Bounded(h, PROJECTION * largest(h) + off * np.minimum(1, largest(h))), backward

    return projected


@contextlib.contextmanager
def evaluate(lanes: int, **replaced):
    """Let the oracle compute with bounds, with the `replaced` functions in place of its own."""
    names = {"np": numpy, "sinkhorn_knopp": sinkhorn_knopp(oracle.sinkhorn_knopp)} | replaced
    before = {name: getattr(oracle, name) for name in names}
    vars(oracle).update(names)
    Bounded.lanes, Bounded.ties = lanes, 0
    try:
        yield
    finally:
        vars(oracle).update(before)
        Bounded.lanes = 1
