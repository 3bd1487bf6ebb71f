"""Fused ops as MLX's transformations need them: kernels, with the reference's derivatives.

MLX 0.32 goes through what a custom_function computes where it maps it or takes its jvp, and a
custom kernel has neither vmap nor jvp. So `vmap` traces the reference, and kernels get arrays that
no jvp goes through: the rules here give the derivative. mx.compile drops stop_gradient.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from .. import launch
from ..launch import Options
from .arrays import identity
from .checks import check_bools, check_threads

FUSED_OPS: dict[str, type["FusedOp"]] = {}  # by the names of their public functions


@dataclass(frozen=True)
class FusedOp:
    """A function of `reference` and the kernels that compute it: one instance for static arguments.

    A subclass, a frozen dataclass of the static arguments, gives the class variables and methods;
    the methods have the types that are here:

    name: That of the public function.
    shared_ndim: Per array, with how many axes it is shared by all tokens; None if it never is.
    num_results: How many results there are, those that may be None included.
    h_res_index: Which array is the h_res that may be None; the kernels then get the identity.
    saves: Whether `forward` takes ``save``, and returns its results and the arrays that `backward`
        reuses.
    """

    options: Options

    name: ClassVar[str]
    shared_ndim: ClassVar[tuple[int | None, ...]]
    num_results: ClassVar[int] = 1
    h_res_index: ClassVar[int | None] = None
    saves: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            FUSED_OPS[cls.name] = cls

    def fallback(self, *arrays: Any, **options: Any) -> Any:
        """The result, or the tuple of results, by the reference; an array may be None."""
        raise NotImplementedError

    def forward(self, *arrays: Any, **options: Any) -> Any:
        """The same by kernels."""
        raise NotImplementedError

    def backward(self, arrays: Any, cotangents: Any, saved: Any) -> Any:
        """By kernels the gradient of each array, None where it is None, in any dtype."""
        raise NotImplementedError

    def absent_result(self, n: int) -> int | None:
        """Which result of n streams is None."""
        return None

    def __call__(
        self, x: mx.array, *others: mx.array | None, use_metal: bool, differentiable: bool
    ) -> Any:
        """The results, by kernels where the default device has them."""
        op, verbose = self.name, self.options.verbose
        check_bools(op, use_metal=use_metal, verbose=verbose, differentiable=differentiable)
        check_threads(op, self.options.threads_per_group)
        arrays = (x, *others)
        present = tuple([a is not None for a in arrays])
        place = launch.place() if use_metal and x.size > 0 else None
        inputs = [a for a in arrays if a is not None]
        if place is None:
            if use_metal and verbose:
                anywhere = launch.Place("metal", mx.default_device())
                functions = _Functions(self, present, anywhere)
                print(launch.metal_source(functions.forward, *inputs))
            return self.fallback(*arrays)
        functions = _functions(self, present, place)
        results = (functions if differentiable else functions.forward)(*inputs)
        absent = self.absent_result(x.shape[-2])
        return results if absent is None else (*results[:absent], None, *results[absent:])


class _Mapping(NamedTuple):
    """Whether ops that are called now run by the reference, because `vmap` maps them.

    traced: The reference runs now, since MLX traces the function that calls the op.
    rule: What `traced` is while an op's own rule for vmap runs: true where an outer `vmap` traces.
    """

    traced: bool
    rule: bool


_UNMAPPED = _Mapping(traced=False, rule=False)
_mapping: ContextVar[_Mapping] = ContextVar("mapping", default=_UNMAPPED)


@contextlib.contextmanager
def _mapped(traced: bool, rule: bool) -> Iterator[None]:
    token = _mapping.set(_Mapping(traced, rule))
    try:
        yield
    finally:
        _mapping.reset(token)


def vmap(f: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """`mx.vmap` for functions that call these ops on a GPU.

    MLX 0.32 maps what a custom_function computes even where it has a rule of its own, and cannot
    map a custom kernel. So this traces f with the reference, which the ops' rules then replace by
    kernels over one more axis of tokens where that is the same, and leave where it is not.
    """

    def traced(*args):
        with _mapped(True, True):
            return f(*args)

    mapped = mx.vmap(traced, in_axes, out_axes)

    def run(*args):
        # after f MLX calls the rules, and traces again what is inside mx.checkpoint
        with _mapped(True, _mapping.get().traced):
            return mapped(*args)

    return run


def _several(arrays: Any) -> tuple | list:
    return arrays if isinstance(arrays, (tuple, list)) else (arrays,)


def _without_none(outputs: Any) -> Any:
    """An array, or the arrays among several."""
    return tuple(a for a in outputs if a is not None) if isinstance(outputs, tuple) else outputs


def _one_or_several(arrays: Sequence) -> Any:
    return arrays if len(arrays) > 1 else arrays[0]


def _tangents(primals: Sequence, tangents: Sequence) -> list[mx.array]:
    """The tangents, with zeros for None."""
    pairs = zip(primals, tangents, strict=True)
    return [mx.zeros_like(a) if t is None else t for a, t in pairs]


class _Functions:
    """An op's kernels and reference as functions of the arrays that are present.

    All run at the place where the op was called: a gradient runs where its forward ran. MLX knows
    two custom_functions, ``saving``, which gives the results and what is saved, and ``gradient``,
    of the arrays, the cotangents and what was saved. Their rules:

        saving      vjp: `gradient`                    jvp: the reference's
        gradient    vjp: of the reference's gradient    jvp: of the reference's gradient
        vmap of both: themselves over one more axis of tokens where that is the same, otherwise
            the reference
    """

    def __init__(self, op: FusedOp, present: tuple[bool, ...], place: launch.Place):
        self.op, self.present, self.place = op, present, place
        self.count = sum(present)
        self.shared_ndim = self._present_only(op.shared_ndim)
        self.saving = mx.custom_function(self._saving)
        self.saving.vjp(self._saving_vjp)
        self.saving.jvp(self._saving_jvp)
        self.saving.vmap(self._saving_vmap)
        self.gradient = mx.custom_function(self._gradient)
        self.gradient.vjp(self._gradient_vjp)
        self.gradient.jvp(self._gradient_jvp)
        self.gradient.vmap(self._gradient_vmap)

    def __call__(self, *inputs):
        """The results, differentiable."""
        return self._results(self.saving(*inputs), inputs[0])

    # ---- the op's methods, of arrays that are present

    def _arguments(self, inputs: Sequence) -> list:
        """The op's arrays, with None for those that are absent."""
        remaining = iter(inputs)
        return [next(remaining) if here else None for here in self.present]

    def _present_only(self, values: Sequence) -> tuple:
        return tuple(v for v, here in zip(values, self.present, strict=True) if here)

    def _kernel_arguments(self, inputs: Sequence) -> tuple:
        """The op's arrays, h_res always an array."""
        arrays, k = self._arguments(inputs), self.op.h_res_index
        if k is not None and arrays[k] is None:
            arrays[k] = identity(arrays[0].shape[-2])
        return tuple(arrays)

    def _num_results(self, x: mx.array) -> int:
        return self.op.num_results - (self.op.absent_result(x.shape[-2]) is not None)

    def _results(self, outputs, x: mx.array):
        """The results among those and what was saved."""
        return _one_or_several(_several(outputs)[: self._num_results(x)])

    def fallback(self, *inputs):
        return _without_none(self.op.fallback(*self._arguments(inputs)))

    def forward(self, *inputs, save: bool = False):
        """The kernels bare: the results, and if asked for what is saved."""
        arrays = self._kernel_arguments(inputs)
        if not self.op.saves:
            return _without_none(self.op.forward(*arrays))
        results, saved = self.op.forward(*arrays, save=save)
        return _without_none((*_several(results), *saved) if save else results)

    def _backward(self, arrays: Sequence, cotangents: Sequence, saved: Sequence) -> tuple:
        absent = self.op.absent_result(arrays[0].shape[-2])
        if absent is not None:
            cotangents = [*cotangents[:absent], None, *cotangents[absent:]]
        inputs = self._kernel_arguments(arrays)
        gradients = self.op.backward(inputs, tuple(cotangents), tuple(saved))
        pairs = zip(self._present_only(gradients), arrays, strict=True)
        return tuple(gradient.astype(a.dtype) for gradient, a in pairs)

    # ---- saving

    def _saving(self, *primals):
        inputs = map(mx.stop_gradient, primals)
        if _mapping.get().traced:
            return self.fallback(*inputs)
        return self.forward(*inputs, save=True)

    def _saving_vjp(self, primals, cotangents, outputs):
        primals, outputs = _several(primals), _several(outputs)
        end = self._num_results(primals[0])
        return self.gradient(*primals, *_several(cotangents)[:end], *outputs[end:])

    def _saving_jvp(self, primals, tangents):
        with launch.at(self.place):
            primals = list(_several(primals))
            results = mx.jvp(self.fallback, primals, _tangents(primals, _several(tangents)))[1]
            if _mapping.get().traced or not self.op.saves:
                return _one_or_several(tuple(results))
            saved = self._saved(primals)  # `gradient` has no derivative by these
            return (*results, *map(mx.zeros_like, saved))

    def _saving_vmap(self, inputs, axes):
        inputs, axes = _several(inputs), _several(axes)
        with self._in_rule():
            folded = self._folded(inputs, axes, of_gradient=False)
            if folded:
                results = self(*folded)
            else:
                results = mx.vmap(self.fallback, in_axes=tuple(axes))(*inputs)
        return results, (0,) * len(results) if isinstance(results, (tuple, list)) else 0

    # ---- its gradient

    def _parts(self, inputs: Sequence) -> tuple[list, list, list]:
        """The arrays, the cotangents, and what was saved."""
        end = self.count + self._num_results(inputs[0])
        return list(inputs[: self.count]), list(inputs[self.count : end]), list(inputs[end:])

    def _saved(self, arrays: Sequence) -> list:
        return list(_several(self.forward(*arrays, save=True)))[self._num_results(arrays[0]) :]

    def _fallback_gradient(self, *inputs):
        arrays, cotangents, _ = self._parts(inputs)
        return tuple(mx.vjp(self.fallback, arrays, cotangents)[1])

    def _gradient(self, *inputs):
        with launch.at(self.place):
            inputs = [mx.stop_gradient(a) for a in inputs]
            if _mapping.get().traced:
                return self._fallback_gradient(*inputs)
            arrays, cotangents, saved = self._parts(inputs)
            if self.op.saves and not saved:  # under vmap, whose trace is the reference's
                saved = self._saved(arrays)
            return self._backward(arrays, cotangents, saved)

    def _gradient_vjp(self, inputs, cotangents, _):
        with launch.at(self.place):
            arrays, first, saved = self._parts(inputs)
            second = mx.vjp(self._fallback_gradient, arrays + first, list(_several(cotangents)))[1]
            return (*second, *map(mx.zeros_like, saved))

    def _gradient_jvp(self, inputs, tangents):
        with launch.at(self.place):
            arrays, cotangents, _ = self._parts(inputs)
            primals, zeros = arrays + cotangents, [mx.zeros_like(a) for a in arrays]

            def pulled(*cotangents):  # linear, so its vjp is the jvp: scatter has none in MLX 0.32
                return tuple(mx.vjp(self._fallback_gradient, primals, list(cotangents))[1])

            return tuple(mx.vjp(pulled, zeros, _tangents(primals, tangents[: len(primals)]))[1])

    def _gradient_vmap(self, inputs, axes):
        with self._in_rule():
            folded = self._folded(inputs, axes, of_gradient=True)
            mapped = mx.vmap(self._fallback_gradient, in_axes=tuple(axes))
            gradients: Any = self.gradient(*folded) if folded else mapped(*inputs)
        return tuple(gradients), (0,) * len(gradients)

    # ---- vmap

    @contextlib.contextmanager
    def _in_rule(self) -> Iterator[None]:
        """A rule runs at the op's place; ops in it run by kernels unless an outer `vmap` traces."""
        inside = _mapping.get().rule
        with launch.at(self.place), _mapped(inside, inside):
            yield

    def _folded(self, inputs: Sequence, axes: Sequence, of_gradient: bool) -> list | None:
        """The inputs with the mapped axis as one more axis of tokens. None where it cannot be one:
        an array per token is not mapped, a shared one is, or a gradient sums over tokens.
        """
        ndims = (*self.shared_ndim, *(None for _ in inputs[self.count :]))
        for a, axis, ndim in zip(inputs, axes, ndims, strict=True):
            per_token = ndim is None or a.ndim - (axis is not None) > ndim
            if per_token != (axis is not None) or (of_gradient and not per_token):
                return None
        return [a if i is None else mx.moveaxis(a, i, 0) for a, i in zip(inputs, axes, strict=True)]


_functions = functools.cache(_Functions)
