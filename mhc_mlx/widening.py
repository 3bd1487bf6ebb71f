"""`widen` puts hyper-connections around the residual branches of an existing transformer."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeVar

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .block_trials import branches_of, check_arguments, check_blocks, errors, name_of, replace
from .conventions import PAPER, Convention
from .gated import GatedResidual
from .layers import HyperConnection, check_options
from .ops.checks import check_sizes, fail
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
        connections: A `HyperConnection` or `GatedResidual` for each of the block's branches.
        enters: n if the block first expands ``[..., C]`` to n streams, else None.
        leaves: How the block reduces its streams at its end, as in `reduce_streams`, or None.
        is_first, is_last: Whether the block was the first or the last of ``layers`` in `widen`.
    """

    connections: list[HyperConnection] | list[GatedResidual]
    enters: int | None
    leaves: str | None
    is_first: bool
    is_last: bool

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self.enters is not None:
            x = expand_streams(x, self.enters)
        branches = branches_of(self, *args, **kwargs)
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


def _check_connection(
    connection: str, num_streams: int, convention: Convention, options: dict[str, Any]
) -> None:
    """Raise TypeError or ValueError unless the options are those of the connection."""
    if not isinstance(connection, str) or connection not in ("hyper", "gated"):
        must = "be 'hyper' or 'gated'"
        raise ValueError(fail("widen", "connection", must, repr(connection)))
    if connection == "hyper":
        check_options("widen", options, "layer_idx", "convention")
        return
    if convention is not PAPER:
        must = "be left out with connection='gated'"
        raise ValueError(fail("widen", "convention", must, convention.name))
    check_options("widen", {k: v for k, v in options.items() if k != "rank"}, of=GatedResidual)
    GatedResidual(1, num_streams, **options)  # which raises for a wrong value


def _hyper_connections(counts, sizes, options) -> list[list[HyperConnection]]:
    index = iter(range(sum(counts)))
    return [
        [HyperConnection(*sizes, layer_idx=next(index), **options) for _ in range(count)]
        for count in counts
    ]


def _gated_connections(blocks, names, sizes, options) -> list[list[GatedResidual]]:
    """Return connections that compute what the norms of these names do, and take the norms away.

    With up and inject at 0 all gates are 1/2 and h_post is 1, so 1 + weight is twice the norm's.
    """
    dim, num_streams = sizes
    x = mx.random.normal((2, dim), key=mx.random.key(0))

    def connect(block: nn.Module, k: int, norm: Any) -> GatedResidual:
        connection: Any = GatedResidual(*sizes, eps=norm.eps, **options)
        connection.weight = mx.zeros(sizes[::-1]) + (2 * norm.weight.astype(mx.float32) - 1)
        for product in (connection.up, connection.inject):
            product.weight = mx.zeros_like(product.weight)
        u, _ = connection(expand_streams(x, num_streams))
        if errors(u, norm(x))[2]:
            must, got = "have norms x * rsqrt(mean(x**2) + eps) * weight", name_of(block, k)
            raise ValueError(fail("widen", "layers", must, f"{type(norm).__name__} of {got}"))
        return connection

    connections = []
    for k, (block, block_names) in enumerate(zip(blocks, names, strict=True)):
        norms = dict(block.named_modules())
        connections.append([connect(block, k, norms[name]) for name in block_names])
    for block, block_names in zip(blocks, names, strict=True):
        replace(block, {name: nn.Identity() for name in block_names})
    return connections


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
    connection: str = "hyper",
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

    With ``connection="gated"`` the connections are `GatedResidual`, which normalise what they read.
    Each takes the place of the `nn.RMSNorm` at the input of its branch: 1 + weight is twice the
    norm's weight, eps is the norm's, and up and inject start at 0, so that all gates are 1/2 and
    h_post is 1. The block then has an `nn.Identity` by the norm's name. `widen` finds the norm by
    calls of the block, and raises ValueError where a branch has none.

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
        connection: ``"hyper"`` for `HyperConnection`, ``"gated"`` for `GatedResidual`.
        convention: How coefficients are made from logits. `GatedResidual` has none.
        layers: The blocks in the order in which they run; None takes ``model.layers``.
        dim: C; None takes the size of the weight of ``input_layernorm`` in the first block.
        reduce: How the last block reduces the streams, as in `reduce_streams`: ``"mean"``,
            ``"first"`` or, in a model that normalises afterwards, ``"sum"``.
        example: The arguments after x with which the check calls a block: a tuple of positional
            arguments, or a dict of arguments by name. Blocks of gpt_oss need ``(None, None)``, for
            mask and cache.
        options: Further keywords of `HyperConnection`: dynamic, sinkhorn_iters, ... Or of
            `GatedResidual`: rank, use_metal, threads_per_group, differentiable.

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
    _check_connection(connection, num_streams, convention, options)
    if not isinstance(reduce, str) or reduce not in ("mean", "sum", "first"):
        raise ValueError(f"[widen] reduce must be 'mean', 'sum' or 'first' but got {reduce!r}.")
    if not isinstance(example, (tuple, dict)):
        must = "be a tuple of arguments or a dict of them by name"
        raise TypeError(fail("widen", "example", must, type(example).__name__))
    _check_one_process(model, blocks)
    for k, block in enumerate(blocks):
        _check_form(name_of(block, k), block)
        if sum(b is block for b in blocks) > 1:
            name = name_of(block, k)
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
        check_arguments(name_of(block, k), block, 1, args, kwargs)
        if hasattr(block, "residual_branches"):
            name = f"residual_branches of {name_of(block, k)}"
            check_arguments(name, block.residual_branches, 0, args, kwargs)
    gated = connection == "gated"
    found = check_blocks(blocks, dim, args, kwargs, gated)
    sizes = (dim, num_streams)
    if gated:
        connections: list[Any] = _gated_connections(blocks, found, sizes, options)
    else:
        options |= {"convention": convention}
        connections = _hyper_connections(found, sizes, options)
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
