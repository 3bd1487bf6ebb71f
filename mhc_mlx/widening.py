"""`widen` puts hyper-connections around the residual branches of an existing transformer."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import ops
from .conventions import PAPER, Convention
from .layers import HyperConnection, check_options
from .ops.checks import FLOATS, check_sizes, fail
from .streams import expand_streams, reduce_streams

__all__ = ["WidenedBlock", "WidenedPipeline", "WidenedStack", "widen"]

Model = TypeVar("Model", bound=nn.Module | None)


class _Widened(nn.Module):
    """A subclass of this is the first base of the class that `widen` gives to a module.

    The second base is the class that the module had.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_widened, type(self).__bases__, *state


@functools.cache
def _widened(kind: type[_Widened], cls: type) -> Any:
    """Return the class of a widened module of class cls: it derives from kind, then from cls."""
    if issubclass(cls, kind):  # an earlier call of `widen` has widened some of its blocks
        return cls
    return type(f"Widened{cls.__name__}", (kind, cls), {})


def _new_widened(kind: type[_Widened], cls: type) -> _Widened:
    """Make an empty instance for pickle, which cannot find the classes of `_widened` by name."""
    widened = _widened(kind, cls)
    return widened.__new__(widened)


class WidenedBlock(_Widened):
    """This is a block after `widen`: the same module, called on streams ``[..., n, C]``.

    Attributes:
        connections: A `HyperConnection` for each of the block's branches.
        enters: n if the block first expands ``[..., C]`` to n streams, else None.
        leaves: How the block reduces its streams at its end, as in `reduce_streams`, or None.
        is_first, is_last: Whether the block was the first or the last of ``layers`` in `widen`.
    """

    connections: list[HyperConnection]
    enters: int | None
    leaves: str | None
    is_first: bool
    is_last: bool

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self.enters is not None:
            x = expand_streams(x, self.enters)
        branches = _branches(self, *args, **kwargs)
        for connection, branch in zip(self.connections, branches, strict=True):
            u, add_residual = connection(x)
            y = branch(u)
            if y.dtype != x.dtype:  # the streams go on in the dtype of x + y, as in the block
                dtype = mx.result_type(x, y)
                if dtype != x.dtype:
                    _, add_residual = connection(x.astype(dtype))
                y = y.astype(dtype)
            x = add_residual(y)
        return x if self.leaves is None else reduce_streams(x, self.leaves)


class WidenedStack(_Widened):
    """This is a module after `widen` that has a list with the first or the last widened block.

    A call raises ValueError if the list has lost a first or a last block since.

    Attributes:
        widened_firsts, widened_lasts: How many of its blocks were the first, and the last, of the
            ``layers`` of a call of `widen`. Each call that widens its blocks adds to them.
    """

    widened_firsts: int
    widened_lasts: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks = [b for b in _listed(self) if isinstance(b, WidenedBlock)]
        for end, count in (("first", self.widened_firsts), ("last", self.widened_lasts)):
            if sum(getattr(block, f"is_{end}") for block in blocks) < count:
                got = f"a list without the {end} of them, {_STREAMS}"
                raise ValueError(fail("widen", "model", "run all its widened blocks", got))
        return super().__call__(*args, **kwargs)


class WidenedPipeline(WidenedStack):
    """This is a `WidenedStack` with a method ``pipeline``, which splits blocks among processes."""

    def pipeline(self, group: mx.distributed.Group, *args: Any, **kwargs: Any) -> Any:
        """Split the blocks as before; raise ValueError if group has more than one process."""
        if group.size() > 1:
            got = f"a pipeline of {group.size()} processes, {_STREAMS}"
            raise ValueError(fail("widen", "model", "run in one process once widened", got))
        model: Any = super()
        return model.pipeline(group, *args, **kwargs)


_STREAMS = "between which streams would have to travel"
_LLAMA = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}  # children of a block
_ADDED = ("connections", "enters", "leaves", "is_first", "is_last")  # attributes of a WidenedBlock


def _listed(module: nn.Module) -> list[Any]:
    """Return the items of all lists that are attributes of a module."""
    return [item for value in module.values() if isinstance(value, list) for item in value]


def _branches(block: Any, *args: Any, **kwargs: Any) -> list[Callable[[mx.array], mx.array]]:
    """Return the functions F of a block that computes ``for F in branches: x = x + F(x)``."""
    if hasattr(block, "residual_branches"):
        return block.residual_branches(*args, **kwargs)
    return [
        lambda u: block.self_attn(block.input_layernorm(u), *args, **kwargs),
        lambda u: block.mlp(block.post_attention_layernorm(u)),
    ]


def _names_after_x(f: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(f).parameters)[1:]


def _check_form(name: str, block: nn.Module) -> None:
    """Raise TypeError or ValueError unless a block has one of the two forms of `widen`."""
    if not isinstance(block, nn.Module) or not callable(block):
        raise TypeError(fail("widen", "layers", "be modules that can be called", name))
    if isinstance(block, WidenedBlock):
        raise ValueError(fail("widen", "layers", "be distinct and not yet widened", name))
    for added in _ADDED:
        if hasattr(block, added):
            must = f"have no attribute {added}, which widen adds,"
            raise ValueError(fail("widen", "layers", must, name))
    if hasattr(block, "residual_branches"):
        if not callable(block.residual_branches):
            raise TypeError(fail("widen", "layers", "have residual_branches as a method", name))
        return
    parts = {k for k, v in block.items() if isinstance(v, (dict, list, mx.array))}
    if parts != _LLAMA:
        must = f"have a method residual_branches or the children {sorted(_LLAMA)} alone"
        raise TypeError(fail("widen", "layers", must, f"{name} with {sorted(parts)}"))
    attention: Any = block.self_attn
    block_takes, attention_takes = _names_after_x(block), _names_after_x(attention)
    if block_takes != attention_takes[: len(block_takes)]:
        must = "have a method residual_branches or take what self_attn takes after x"
        got = f"{name} with {block_takes}, where self_attn takes {attention_takes}"
        raise TypeError(fail("widen", "layers", must, got))


def _check_arguments(
    name: str, f: Callable[..., Any], count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise TypeError unless f takes the example after ``count`` positional arguments."""
    try:
        inspect.signature(f).bind(*(None for _ in range(count)), *args, **kwargs)
    except TypeError as error:
        must = f"be the arguments of {name} after x, a tuple or a dict by name,"
        got = f"{kwargs or args} ({error})"
        raise TypeError(fail("widen", "example", must, got)) from None


def _run(name: str, what: str, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the evaluated result of f; ValueError says what of the block ``name`` raised."""
    try:
        result = f(*args, **kwargs)
        if isinstance(result, mx.array):
            mx.eval(result)
        return result
    except Exception as error:
        raise ValueError(
            f"[widen] layers must run on two tokens with example but {what} of {name} raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_block(
    name: str, block: Any, dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """Return the number of branches F of a block.

    Raises TypeError or ValueError unless the block computes x + F(x) for each, on two tokens.
    """
    parameters: Any = tree_flatten(block.parameters())
    floats = (a.dtype for _, a in parameters if a.dtype in FLOATS)
    dtype = next(floats, mx.float32)
    x = mx.random.normal((1, 2, dim), dtype=dtype, key=mx.random.key(0))

    def example() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return copy.deepcopy((args, kwargs))  # because a call fills the caches among them

    a, k = example()
    want = _run(name, "the call", block, x, *a, **k)
    a, k = example()
    branches, got = _run(name, "residual_branches", _branches, block, *a, **k), x
    for number, branch in enumerate(branches):
        y = _run(name, f"branch {number}", branch, got)
        if not isinstance(y, mx.array) or y.shape != x.shape:
            must = f"have branches that return an array of the shape of x, {list(x.shape)},"
            what = list(y.shape) if isinstance(y, mx.array) else type(y).__name__
            raise TypeError(fail("widen", "layers", must, f"{what} from branch {number} of {name}"))
        got = got + y
    if not isinstance(want, mx.array) or want.shape != x.shape or want.dtype not in FLOATS:
        must = "return x + F(x) for each branch F, an array of floats of the shape of x,"
        what = [*want.shape, want.dtype] if isinstance(want, mx.array) else type(want).__name__
        raise TypeError(fail("widen", "layers", must, f"{what} from {name}"))
    got32, want32 = got.astype(mx.float32), want.astype(mx.float32)
    error: Any = mx.where(got32 == want32, 0, mx.abs(got32 - want32)).max().item()
    largest: Any = mx.abs(want32).max().item()
    if got.dtype != want.dtype or not error <= 8 * mx.finfo(dtype).eps * largest:  # or it is NaN
        raise ValueError(
            f"[widen] layers must compute x + F(x) for each branch F but got {name}, which does not"
            f" (largest error {error:.1e} of {largest:.1e}): give it a method residual_branches."
        )
    return len(branches)


def _check_blocks(
    layers: Sequence[nn.Module], dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[int]:
    """Return the number of branches of each block, by trial calls.

    During these the blocks are in evaluation mode: dropout is off, and no module counts its calls.
    """
    modes = [(module, module.training) for block in layers for module in block.modules()]
    try:
        counts = []
        for k, block in enumerate(layers):
            block.eval()
            counts.append(_check_block(_name(block, k), block, dim, args, kwargs))
        return counts
    finally:
        for module, mode in modes:  # a module comes before its children, which train() sets too
            module.train(mode)


def _name(block: nn.Module, k: int) -> str:
    return f"{type(block).__name__} at layers[{k}]"


def _check_one_process(model: nn.Module | None, layers: Sequence[nn.Module | None]) -> None:
    """Raise ValueError if the model is a stage of a pipeline; other stages would not be widened."""
    modules = [] if model is None else model.modules()
    size = max((getattr(module, "pipeline_size", 1) for module in modules), default=1)
    if any(block is None for block in layers):
        raise ValueError(fail("widen", "layers", "be in this process, all of them,", "None"))
    if size > 1:
        got = f"a stage of a pipeline, {_STREAMS}"
        raise ValueError(fail("widen", "model", "run in one process", got))


def widen(
    model: Model,
    num_streams: int = 4,
    *,
    convention: Convention = PAPER,
    layers: Sequence[nn.Module] | None = None,
    dim: int | None = None,
    reduce: str = "mean",
    example: tuple[Any, ...] | dict[str, Any] = (),
    **options: Any,
) -> Model:
    """Put a hyper-connection around every residual branch of a transformer, in place.

    For each branch F of a block, ``x = x + F(x)`` becomes ``u, add_residual = connection(x);
    x = add_residual(F(u))`` with a `HyperConnection`. The first block expands ``[..., C]`` to n
    equal streams and the last one reduces them, so the code of the model needs no change. At the
    start its outputs do not change either, up to rounding, the noise of phi (an error of 1e-4 after
    12 branches) and, with one stream, an h_pre of 0.9.

    Blocks keep their parameters, names and attributes, so that weights, adapters, quantization and
    caches work as before. They gain ``connections.0``, ``connections.1``, ..., which are trainable
    even in a frozen model: to train the connections alone, call ``model.freeze()`` first. Where F
    returns another dtype than that of the streams, these go on in the dtype of x + F(x), as x does
    in the block.

    A block is a module whose call computes ``for F in branches: x = x + F(x)``. It has one of two
    forms. Either it has a method ``residual_branches(*args, **kwargs)``, which takes the arguments
    of the call after x and returns the list of functions F. Or it is like the block of llama in
    mlx-lm: it calls ``self_attn`` with these arguments on the output of ``input_layernorm``, then
    ``mlp`` on that of ``post_attention_layernorm``, and has no other children or arrays. `widen`
    checks this by calls of each block on two tokens, in evaluation mode, before it changes any.

    All blocks must run in one process, because a pipeline of mlx-lm passes ``[..., C]`` between
    processes and would lose the streams. `widen` raises ValueError for a stage of a pipeline, and a
    widened model raises ValueError if it is to become one.

    Args:
        model: The transformer, or None if ``layers`` are given.
        num_streams: n, 1 to 64.
        convention: How coefficients are made from logits.
        layers: The blocks in the order in which they run; None takes ``model.layers``.
        dim: C; None takes the size of the weight of ``input_layernorm`` in the first block.
        reduce: How the last block reduces the streams, as in `reduce_streams`: ``"mean"``,
            ``"first"`` or, in a model that normalises afterwards, ``"sum"``.
        example: The arguments after x with which the check calls a block: a tuple of positional
            arguments, or a dict of arguments by name. Blocks of gpt_oss need ``(None, None)``, for
            mask and cache.
        options: Further keywords of `HyperConnection`: dynamic, sinkhorn_iters, ...

    Returns:
        The model.

    Raises:
        TypeError: A block has neither of the two forms, does not take the example, or an argument
            has another type.
        ValueError: A block is widened already, occurs twice, does not run, or is not the sum of its
            branches; or the model is a stage of a pipeline; or an argument is out of its range.
    """
    if model is not None and not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(fail("widen", "model", "be an mlx.nn.Module", got))
    if layers is None and not hasattr(model, "layers"):
        got = type(model).__name__
        raise TypeError(f"[widen] model must have layers, or layers be given, but got {got}.")
    network: Any = model  # which may be None
    blocks: Any = network.layers if layers is None else layers
    if not isinstance(blocks, (list, tuple)):
        raise TypeError(fail("widen", "layers", "be a list of blocks", type(blocks).__name__))
    if not blocks:
        raise ValueError("[widen] layers must have at least one block but got none.")
    check_sizes("widen", num_streams=(num_streams, ops.MAX_STREAMS))
    ops.check_convention("widen", convention)
    convention.check_streams("widen", num_streams)
    check_options("widen", options, "layer_idx", "convention")
    if not isinstance(reduce, str) or reduce not in ("mean", "sum", "first"):
        raise ValueError(f"[widen] reduce must be 'mean', 'sum' or 'first' but got {reduce!r}.")
    if not isinstance(example, (tuple, dict)):
        must = "be a tuple of arguments or a dict of them by name"
        raise TypeError(fail("widen", "example", must, type(example).__name__))
    _check_one_process(model, blocks)
    for k, block in enumerate(blocks):
        _check_form(_name(block, k), block)
        if sum(b is block for b in blocks) > 1:
            name = _name(block, k)
            raise ValueError(fail("widen", "layers", "be distinct and not yet widened", name))
    if dim is None:
        weight = getattr(getattr(blocks[0], "input_layernorm", None), "weight", None)
        if weight is None:
            must = "be the channels of layers with no weight of an input_layernorm"
            raise ValueError(fail("widen", "dim", must, "None"))
        dim = int(weight.shape[-1])
    check_sizes("widen", dim=(dim, math.inf))
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    for k, block in enumerate(blocks):
        _check_arguments(_name(block, k), block, 1, args, kwargs)
        if hasattr(block, "residual_branches"):
            name = f"residual_branches of {_name(block, k)}"
            _check_arguments(name, block.residual_branches, 0, args, kwargs)
    counts = _check_blocks(blocks, dim, args, kwargs)
    options, index = options | {"convention": convention}, iter(range(sum(counts)))
    connections = [
        [HyperConnection(dim, num_streams, layer_idx=next(index), **options) for _ in range(count)]
        for count in counts
    ]
    for block, block_connections in zip(blocks, connections, strict=True):
        block.connections = block_connections
        block.enters = num_streams if block is blocks[0] else None
        block.leaves = reduce if block is blocks[-1] else None
        block.is_first, block.is_last = block is blocks[0], block is blocks[-1]
        block.__class__ = _widened(WidenedBlock, type(block))
    modules: list[Any] = [] if network is None else network.modules()
    for module in modules:
        listed = _listed(module)
        has_first, has_last = (any(b is end for b in listed) for end in (blocks[0], blocks[-1]))
        if (has_first or has_last) and callable(module):
            kind = WidenedPipeline if hasattr(module, "pipeline") else WidenedStack
            widened: Any = module
            widened.widened_firsts = getattr(module, "widened_firsts", 0) + has_first
            widened.widened_lasts = getattr(module, "widened_lasts", 0) + has_last
            module.__class__ = _widened(kind, type(module))
    return model
