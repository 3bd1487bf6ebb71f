"""Gradients that mlx-lm's own functions lack: classes of modules that have them.

Their methods are mlx-lm's, run with other globals: the code stays mlx-lm's, and no other model sees
this.
"""

import functools
import types
from collections.abc import Callable

import mlx.core as mx

from .sites import stock


def _constant(f: Callable) -> Callable:
    """f, whose results have no gradient."""
    return functools.wraps(f)(lambda a, *args, **kw: mx.stop_gradient(f(a, *args, **kw)))


def _straight_through(quantise: Callable) -> Callable:
    """quantise, bit for bit, with the gradient of the identity."""

    @functools.wraps(quantise)
    def f(x: mx.array, *args, **kwargs) -> mx.array:
        return mx.stop_gradient(quantise(x, *args, **kwargs)) + (x - mx.stop_gradient(x))

    return f


def _with_names(f: types.FunctionType, names: dict) -> types.FunctionType:
    made = types.FunctionType(f.__code__, names, f.__name__, f.__defaults__, f.__closure__)
    made.__kwdefaults__ = f.__kwdefaults__
    return made


def _differentiable_names() -> dict:
    core = types.ModuleType(mx.__name__)
    vars(core).update(vars(mx))
    vars(core)["argpartition"] = _constant(
        mx.argpartition
    )  # indices of experts and of compressed keys
    names = {**vars(stock), "mx": core, "_sinkhorn_kernel": None}  # it has no vjp
    names["_sinkhorn"] = _with_names(stock._sinkhorn, names)
    for name in ("_fake_quant_fp8", "_fake_quant_fp4"):
        names[name] = _straight_through(names[name])
    return names


_NAMES = _differentiable_names()


def _differentiable(cls: type) -> type:
    methods = {
        name: _with_names(f, _NAMES)
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
