"""Classes of modules with the gradients that mlx-lm's classes lack.

Their methods have the code of mlx-lm's methods and other globals, in which the functions without a
gradient are replaced. So they follow mlx-lm's code, and models that are not patched do not change.
"""

import functools
import types
from collections.abc import Callable

import mlx.core as mx

from .sites import stock


def _constant(f: Callable) -> Callable:
    """Return f with results that pass no gradient to its arguments."""
    return functools.wraps(f)(lambda a, *args, **kw: mx.stop_gradient(f(a, *args, **kw)))


def _straight_through(quantise: Callable) -> Callable:
    """Return quantise, the same bit for bit, with the gradient of the identity."""

    @functools.wraps(quantise)
    def f(x: mx.array, *args, **kwargs) -> mx.array:
        return mx.stop_gradient(quantise(x, *args, **kwargs)) + (x - mx.stop_gradient(x))

    return f


def _with_globals(f: types.FunctionType, names: dict) -> types.FunctionType:
    """Return a copy of f with these globals."""
    copy = types.FunctionType(f.__code__, names, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


def _differentiable_globals() -> dict:
    """Return the globals of mlx-lm's module, with functions that have a gradient."""
    core = types.ModuleType(mx.__name__)
    vars(core).update(vars(mx))
    # argpartition picks indices of experts and of compressed keys.
    vars(core)["argpartition"] = _constant(mx.argpartition)
    names = {**vars(stock), "mx": core, "_sinkhorn_kernel": None}  # mlx-lm's kernel has no vjp
    names["_sinkhorn"] = _with_globals(stock._sinkhorn, names)
    for name in ("_fake_quant_fp8", "_fake_quant_fp4"):
        names[name] = _straight_through(names[name])
    return names


_GLOBALS = _differentiable_globals()


def _differentiable(cls: type) -> type:
    """Return a subclass of an mlx-lm class whose methods have the globals with gradients."""
    methods = {
        name: _with_globals(f, _GLOBALS)
        for name, f in vars(cls).items()
        if isinstance(f, types.FunctionType) and name != "__init__"
    }
    return type(f"Differentiable{cls.__name__}", (cls,), methods | {"__module__": __name__})


DifferentiableRouter: type = _differentiable(stock.Router)
DifferentiableIndexer: type = _differentiable(stock.Indexer)
DifferentiableAttention: type = _differentiable(stock.Attention)
DifferentiableHyperConnection: type = _differentiable(stock.HyperConnection)

TRAINED = {
    stock.Router: DifferentiableRouter,
    stock.Indexer: DifferentiableIndexer,
    stock.Attention: DifferentiableAttention,
    stock.HyperConnection: DifferentiableHyperConnection,
}
