"""Classes of modules with the gradients that a package's classes lack.

Their methods have the code of the package's methods and other globals, in which the functions
without a gradient are replaced. So they follow the package's code, and models that are not patched
do not change.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx


def _constant(f: Callable) -> Callable:
    """Return f with results that pass no gradient to its arguments."""
    return functools.wraps(f)(lambda a, *args, **kw: mx.stop_gradient(f(a, *args, **kw)))


def straight_through(quantise: Callable) -> Callable:
    """Return quantise, the same bit for bit, with the gradient of the identity."""

    @functools.wraps(quantise)
    def f(x: mx.array, *args, **kwargs) -> mx.array:
        return mx.stop_gradient(quantise(x, *args, **kwargs)) + (x - mx.stop_gradient(x))

    return f


def with_gradient_of(f: Callable, differentiable: Callable) -> Callable:
    """Return f, the same bit for bit, with the gradient of a function that is equal but rounds."""

    @functools.wraps(f)
    def g(*args, **kwargs) -> mx.array:
        out = differentiable(*args, **kwargs)
        return mx.stop_gradient(f(*args, **kwargs)) + (out - mx.stop_gradient(out))

    return g


def _with_globals(f: types.FunctionType, names: dict) -> types.FunctionType:
    """Return a copy of f with these globals."""
    copy = types.FunctionType(f.__code__, names, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


def namespace(
    module: Any,
    *,
    constant: Iterable[str] = (),
    rounding: Iterable[str] = (),
    replaced: Mapping[str, Any] = types.MappingProxyType({}),
    functions: Iterable[str] = (),
) -> dict:
    """Return the globals of a package's module, with functions that have a gradient.

    Args:
        module: The module.
        constant: Functions of mx whose results pass no gradient.
        rounding: Functions of the module that round; they get the gradient of the identity.
        replaced: Other values by name.
        functions: Functions of the module that see these globals in place of the module's.
    """
    core = types.ModuleType(mx.__name__)
    vars(core).update(vars(mx))
    for name in constant:
        vars(core)[name] = _constant(getattr(mx, name))
    names = {**vars(module), "mx": core, **replaced}
    for name in functions:
        names[name] = _with_globals(getattr(module, name), names)
    for name in rounding:
        names[name] = straight_through(getattr(module, name))
    return names


def with_globals(cls: Any, names: dict, module: str, name: str) -> type:
    """Return a subclass of a package's class, of this name, whose methods have these globals.

    It lies in ``module``.
    """
    methods = {
        key: _with_globals(f, names)
        for key, f in vars(cls).items()
        if isinstance(f, types.FunctionType) and key != "__init__"
    }
    return type(name, (cls,), methods | {"__module__": module})


def differentiable(cls: Any, names: dict, module: str) -> type:
    """Return the subclass that `with_globals` makes, called Differentiable and the class's name."""
    return with_globals(cls, names, module, f"Differentiable{cls.__name__}")


def choosing(cls: Any, module: str) -> type:
    """Return a subclass of a package's class that only chooses: its result passes no gradient.

    It is called Differentiable and the name of the class, and lies in ``module``.
    """

    def __call__(self, *args, **kwargs):
        result = cls.__call__(self, *args, **kwargs)
        return None if result is None else mx.stop_gradient(result)

    methods = {"__call__": __call__, "__module__": module}
    return type(f"Differentiable{cls.__name__}", (cls,), methods)


def given_constant(cls: Any, argument: str, module: str) -> type:
    """Return a subclass of a package's class to whose argument of this name no gradient passes.

    A choice that one layer makes for the next is an output of a layer under grad_checkpoint, which
    hides that it passes no gradient. The class is called Differentiable and the name of the class,
    and lies in ``module``.
    """
    signature = inspect.signature(cls.__call__)

    def __call__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        if (a := bound.arguments.get(argument)) is not None:
            bound.arguments[argument] = mx.stop_gradient(a)
        return cls.__call__(*bound.args, **bound.kwargs)

    methods = {"__call__": __call__, "__module__": module}
    return type(f"Differentiable{cls.__name__}", (cls,), methods)
