"""What all fused ops share: checks, gradients, transformations, and one dispatch.

Every op takes the positional arguments of its namesake in `reference` and four keywords:

    use_metal: Run the kernels where the default device has them (Metal or CUDA); otherwise, and on
        a CPU, the reference.
    threads_per_group: Threads in a threadgroup, a multiple of 32 from 32 to 1024; None picks.
    verbose: Print the generated kernel source (without a GPU: the Metal source).
    differentiable: False calls the kernel bare, which `mx.export_function` can record; it then has
        no gradient.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import mlx.core as mx

from .. import kernel, reference
from ..conventions import SINKHORN, Convention

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MAX_STREAMS = 64
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # that float32 holds without loss of digits


class Kernels(NamedTuple):
    """How kernels compute `reference.NAME(*arrays, *statics)`.

    shared_ndim: Per array, with how many axes it is shared by all tokens; None if it never is.
    forward: Of arrays, statics and options; the result, or a tuple of them.
    backward: Of arrays, the cotangent or a tuple of them, statics and options; a list of gradients.
    absent: What stands for an array that is None, made from the number of streams.
    missing: Of the number of streams and the statics: which result is None, or None.
    results: How many results there are with that one.
    saves: Whether forward, called with ``save=True``, appends arrays for ``backward(saved=...)``.
    """

    shared_ndim: tuple
    forward: Callable
    backward: Callable
    absent: Callable = lambda n: None
    missing: Callable = lambda n, *statics: None
    results: int = 1
    saves: bool = False


KERNELS: dict[str, Kernels] = {}


def fail(op: str, argument: str, must: str, got) -> str:
    return f"[{op}] {argument} must {must} but got {got}."


def check_type(op: str, **arrays: mx.array) -> None:
    for name, a in arrays.items():
        if not isinstance(a, mx.array):
            raise TypeError(fail(op, name, "be an mx.array", type(a).__name__))


def check_dtype(op: str, **arrays: mx.array) -> None:
    check_type(op, **arrays)
    for name, a in arrays.items():
        if a.dtype not in FLOATS:
            raise TypeError(fail(op, name, "be float32, float16 or bfloat16", a.dtype))


def check_array(op: str, name: str, a: mx.array, axes: str, sizes: tuple[int, ...], *lead) -> None:
    """Check dtype and shape: ``sizes``, also behind leading axes if such are given."""
    check_dtype(op, **{name: a})
    if tuple(a.shape) not in (sizes, *((*axis, *sizes) for axis in lead)):
        own = [f"{k}={size}" if k else str(size) for k, size in zip(axes, sizes, strict=True)]
        shapes = [[*map(str, axis), *own] for axis in ((), *lead)]
        must = " or ".join(f"[{', '.join(s)}]" for s in shapes)
        raise ValueError(fail(op, name, f"have shape {must}", list(a.shape)))


def check_streams(op: str, x: mx.array) -> tuple[tuple[int, ...], int, int]:
    """Leading axes, n and C of x."""
    check_dtype(op, x=x)
    if x.ndim < 2:
        raise ValueError(fail(op, "x", "have shape [..., n, C]", list(x.shape)))
    *lead, n, C = x.shape
    if not 1 <= n <= MAX_STREAMS or C < 1:
        must = f"have shape [..., n, C] with n from 1 to {MAX_STREAMS} and C at least 1"
        raise ValueError(fail(op, "x", must, list(x.shape)))
    return tuple(lead), n, C


def check_branch(op: str, x: mx.array, y: mx.array) -> None:
    """A sublayer's output, for streams that have been checked."""
    *lead, _, C = x.shape
    check_array(op, "y", y, (*("" for _ in lead), "C"), (*lead, C))
    if y.dtype != x.dtype:
        raise TypeError(fail(op, "y", f"have x's dtype {x.dtype}", y.dtype))


def check_number(
    op: str, name: str, number: float, least: float = -LARGEST, must: str = "be finite in float32"
) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(fail(op, name, "be a number", type(number).__name__))
    if not least <= number <= LARGEST:
        raise ValueError(fail(op, name, must, number))


def check_eps(op: str, eps: float, name: str = "eps") -> None:
    check_number(op, name, eps, SMALLEST, "be finite and above 0 in float32")


def check_convention(op: str, convention: Convention) -> None:
    if not isinstance(convention, Convention):
        raise TypeError(fail(op, "convention", "be a Convention", type(convention).__name__))


def check_half_steps(op: str, convention: Convention) -> None:
    check_convention(op, convention)
    if convention.start not in SINKHORN:
        must = f"have half-steps (start {', '.join(SINKHORN[:-1])} or {SINKHORN[-1]})"
        raise ValueError(fail(op, "convention", must, convention.name))


def check_bools(op: str, **values: bool) -> None:
    for name, value in values.items():
        if type(value) is not bool:
            raise TypeError(fail(op, name, "be a bool", type(value).__name__))


def check_threads(op: str, threads: int | None) -> None:
    name = "threads_per_group"
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(fail(op, name, "be None or an int", type(threads).__name__))
    if threads % 32 or not 32 <= threads <= 1024:
        raise ValueError(fail(op, name, "be a multiple of 32 from 32 to 1024", threads))


class _Mapping(NamedTuple):
    """Whether ops that are called now run by the reference, because `vmap` maps them.

    traced: In a function that MLX traces.
    rule: In what an op's own rule for vmap calls: so an outer `vmap` traces it.
    """

    traced: bool
    rule: bool


_UNMAPPED = _Mapping(traced=False, rule=False)
_mapping: ContextVar[_Mapping] = ContextVar("mapping", default=_UNMAPPED)


@contextlib.contextmanager
def _mapped(traced: bool, rule: bool):
    token = _mapping.set(_Mapping(traced, rule))
    try:
        yield
    finally:
        _mapping.reset(token)


class _Fused(NamedTuple):
    forward: Callable  # the kernels bare
    op: Callable  # differentiable


def _several(arrays) -> tuple | list:
    return arrays if isinstance(arrays, (tuple, list)) else (arrays,)


def _fuse(
    plain: Callable,
    forward: Callable,
    saving: Callable,
    backward: Callable,
    shared_ndim: tuple,
    results: Callable,
    place: kernel.Place,
) -> _Fused:
    """Tie kernels to the function of arrays that they compute.

    Args:
        plain: By the reference.
        forward: By kernels.
        saving: By kernels, with what the gradient reuses as further results.
        backward: Of lists of the arrays, the cotangents and what was saved; a gradient per array,
            in its dtype.
        shared_ndim: Per array, with how many axes it is shared by all tokens; None if it never is.
        results: Of the first array, how many results there are.
        place: Where forward runs, and with it all its derivatives.

    MLX 0.32 goes through what a custom_function computes where it maps it or takes its jvp, and has
    neither of a custom kernel. So `vmap` traces the reference, and kernels get arrays that no jvp
    goes through: the rules here give the derivative. mx.compile drops stop_gradient.
    """

    count = len(shared_ndim)

    def parts(inputs):
        """The arrays, the cotangents, and what was saved."""
        given = count + results(inputs[0])
        return list(inputs[:count]), list(inputs[count:given]), list(inputs[given:])

    def plain_gradient(*inputs):
        return tuple(mx.vjp(plain, list(inputs[:count]), list(inputs[count:]))[1])

    def fold(inputs, axes, of_gradient):
        """The inputs with the mapped axis as one more axis of tokens; None where it is not one,
        because an array per token is not mapped, a shared one is, or a gradient sums over tokens.
        """
        ndims = (*shared_ndim, *(None for _ in inputs[count:]))
        for a, axis, ndim in zip(inputs, axes, ndims, strict=True):
            per_token = ndim is None or a.ndim - (axis is not None) > ndim
            if per_token != (axis is not None) or (of_gradient and not per_token):
                return None
        return [a if i is None else mx.moveaxis(a, i, 0) for a, i in zip(inputs, axes, strict=True)]

    def shown(made, x):
        """The results among those and what was saved."""
        made = _several(made)[: results(x)]
        return made if len(made) > 1 else made[0]

    def rule(f):
        """f, run at the forward's place; ops in it run by kernels unless an outer `vmap` traces."""

        @functools.wraps(f)
        def placed(*args):
            inside = _mapping.get().rule
            with kernel.at(place), _mapped(inside, inside):
                return f(*args)

        return placed

    def dense(primals, tangents):
        """The tangents, with zeros for None."""
        pairs = zip(primals, tangents, strict=True)
        return [mx.zeros_like(a) if t is None else t for a, t in pairs]

    @mx.custom_function
    def op(*primals):
        return (plain if _mapping.get().traced else saving)(*map(mx.stop_gradient, primals))

    @mx.custom_function
    def gradient(*inputs):
        with kernel.at(place):
            inputs = [mx.stop_gradient(a) for a in inputs]
            if _mapping.get().traced:
                return plain_gradient(*inputs)
            arrays, cotangents, saved = parts(inputs)
            if saving is not forward and not saved:  # under vmap, whose trace is the reference's
                saved = list(_several(saving(*arrays)))[len(cotangents) :]
            return tuple(backward(arrays, cotangents, saved))

    @op.vjp
    def _(primals, cotangents, outputs):
        primals, outputs = _several(primals), _several(outputs)
        end = results(primals[0])
        return gradient(*primals, *_several(cotangents)[:end], *outputs[end:])

    @gradient.vjp
    def _(inputs, cotangents, _):
        with kernel.at(place):
            arrays, given, saved = parts(inputs)
            made = mx.vjp(plain_gradient, arrays + given, list(_several(cotangents)))[1]
            return (*made, *map(mx.zeros_like, saved))

    @op.jvp
    def _(primals, tangents):
        with kernel.at(place):
            primals = list(_several(primals))
            made = mx.jvp(plain, primals, dense(primals, _several(tangents)))[1]
            if _mapping.get().traced or saving is forward:
                return tuple(made) if len(made) > 1 else made[0]
            saved = _several(saving(*primals))[len(made) :]  # `gradient` has no derivative by them
            return (*made, *map(mx.zeros_like, saved))

    @gradient.jvp
    def _(inputs, tangents):
        with kernel.at(place):
            end = count + results(inputs[0])
            primals, zeros = list(inputs[:end]), [mx.zeros_like(a) for a in inputs[:count]]

            def pulled(*cotangents):  # linear, so its vjp is the jvp: scatter has none in MLX 0.32
                return tuple(mx.vjp(plain_gradient, primals, list(cotangents))[1])

            return tuple(mx.vjp(pulled, zeros, dense(primals, tangents[:end]))[1])

    @op.vmap
    @rule
    def _(inputs, axes):
        inputs, axes = _several(inputs), _several(axes)
        folded = fold(inputs, axes, of_gradient=False)
        if folded:
            made = shown(op(*folded), folded[0])
        else:
            made = mx.vmap(plain, in_axes=tuple(axes))(*inputs)
        return made, (0,) * len(made) if isinstance(made, (tuple, list)) else 0

    @gradient.vmap
    @rule
    def _(inputs, axes):
        folded = fold(inputs, axes, of_gradient=True)
        mapped = mx.vmap(plain_gradient, in_axes=tuple(axes))
        made = gradient(*folded) if folded else mapped(*inputs)
        return tuple(made), (0,) * len(made)

    return _Fused(forward, lambda *arrays: shown(op(*arrays), arrays[0]))


def vmap(f: Callable, in_axes=0, out_axes=0) -> Callable:
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


@functools.cache
def _fused(
    name: str, present: tuple[bool, ...], statics: tuple, options: tuple, place: kernel.Place | None
) -> _Fused:
    """The kernels of `reference.<name>`, as functions of the arrays that are present."""
    kernels = KERNELS[name]

    def whole(arrays):
        rest, absent = iter(arrays), kernels.absent(arrays[0].shape[-2])
        return [next(rest) if here else absent for here in present]

    def some(values):
        return [v for v, here in zip(values, present, strict=True) if here]

    def plain(*arrays):
        rest = iter(arrays)
        arrays = [next(rest) if here else None for here in present]
        results = getattr(reference, name)(*arrays, *statics)
        return tuple(r for r in results if r is not None) if isinstance(results, tuple) else results

    def forward(*arrays, **save):
        return kernels.forward(*whole(arrays), *statics, *options, **save)

    def backward(arrays, cotangents, saved):
        cotangents = cotangents if len(cotangents) > 1 else cotangents[0]
        kept = {"saved": saved} if kernels.saves else {}
        return some(kernels.backward(*whole(arrays), cotangents, *statics, *options, **kept))

    def results(x):
        return kernels.results - (kernels.missing(x.shape[-2], *statics) is not None)

    saving = functools.partial(forward, save=True) if kernels.saves else forward
    shared_ndim = tuple(some(kernels.shared_ndim))
    return _fuse(plain, forward, saving, backward, shared_ndim, results, place)


@functools.cache
def constants(*values: float) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def identity(n: int) -> mx.array:  # like the constants of no stream, for any thread
    return mx.array([[float(i == j) for j in range(n)] for i in range(n)])


def flat(a: mx.array, ndim: int) -> mx.array:  # all leading axes as one
    return a if a.ndim == ndim else a.reshape(-1, *a.shape[a.ndim - ndim + 1 :])


def unflat(a: mx.array, shape: tuple[int, ...]) -> mx.array:
    return a if a.shape == shape else a.reshape(shape)


def fused_op(check: Callable) -> Callable:
    """The public op of ``check``, which validates its arguments and returns (arrays, statics)."""
    name = check.__name__

    @functools.wraps(check)
    def op(
        *args,
        use_metal: bool = True,
        threads_per_group: int | None = None,
        verbose: bool = False,
        differentiable: bool = True,
        **kwargs,
    ):
        arrays, statics = check(*args, **kwargs)
        check_bools(name, use_metal=use_metal, verbose=verbose, differentiable=differentiable)
        check_threads(name, threads_per_group)
        place = kernel.place() if use_metal and arrays[0].size > 0 else None
        present = tuple(a is not None for a in arrays)
        given = [a for a in arrays if a is not None]
        options = (threads_per_group, verbose)
        if place:
            fused = _fused(name, present, statics, options, place)
            results = (fused.op if differentiable else fused.forward)(*given)
            missing = KERNELS[name].missing(arrays[0].shape[-2], *statics)
            if missing is None:
                return results
            return (*results[:missing], None, *results[missing:])
        if use_metal and verbose:
            fused = _fused(name, present, statics, options, None)
            print(kernel.metal_source(fused.forward, *given))
        return getattr(reference, name)(*arrays, *statics)

    own, shared = inspect.signature(check), inspect.signature(op, follow_wrapped=False)
    keywords = [p for p in shared.parameters.values() if p.kind is p.KEYWORD_ONLY]
    op.__signature__ = own.replace(parameters=[*own.parameters.values(), *keywords])
    op.__doc__ = getattr(reference, name).__doc__
    return op
