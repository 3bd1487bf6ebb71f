"""Trial calls of a block say how many branches it has, and which norms are at their inputs."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .ops.checks import FLOATS, fail

__all__ = ["branches_of", "check_arguments", "check_blocks", "errors", "name_of", "replace"]


def branches_of(block: Any, *args: Any, **kwargs: Any) -> list[Callable[[mx.array], mx.array]]:
    """Return the functions F of a block that computes ``for F in branches: x = x + F(x)``."""
    if hasattr(block, "residual_branches"):
        return block.residual_branches(*args, **kwargs)
    return [
        lambda u: block.self_attn(block.input_layernorm(u), *args, **kwargs),
        lambda u: block.mlp(block.post_attention_layernorm(u)),
    ]


def check_arguments(name, f, count, args, kwargs):
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


def _two_tokens(block: nn.Module, dim: int) -> mx.array:
    """Return x of a trial call ``[1, 2, dim]``, in the dtype of the block's parameters."""
    parameters: Any = tree_flatten(block.parameters())
    floats = (a.dtype for _, a in parameters if a.dtype in FLOATS)
    dtype = next(floats, mx.float32)
    return mx.random.normal((1, 2, dim), dtype=dtype, key=mx.random.key(0))


def errors(got: mx.array, want: mx.array) -> tuple[float, float, bool]:
    """Return the largest error, the largest value, and whether this is more than rounding."""
    got32, want32 = got.astype(mx.float32), want.astype(mx.float32)
    error: Any = mx.where(got32 == want32, 0, mx.abs(got32 - want32)).max().item()
    largest: Any = mx.abs(want32).max().item()
    return error, largest, not error <= 8 * mx.finfo(want.dtype).eps * largest  # or it is NaN


def _check_block(name, block, dim, args, kwargs):
    """Return the number of branches F of a block.

    Raises TypeError or ValueError unless the block computes x + F(x) for each, on two tokens.
    """
    x = _two_tokens(block, dim)

    def example() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return copy.deepcopy((args, kwargs))  # because a call fills the caches among them

    a, k = example()
    want = _run(name, "the call", block, x, *a, **k)
    a, k = example()
    branches, got = _run(name, "residual_branches", branches_of, block, *a, **k), x
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
    error, largest, differs = errors(got, want)
    if got.dtype != want.dtype or differs:
        raise ValueError(
            f"[widen] layers must compute x + F(x) for each branch F but got {name}, which does not"
            f" (largest error {error:.1e} of {largest:.1e}): give it a method residual_branches."
        )
    return len(branches)


def replace(block: nn.Module, modules: dict[str, Any]) -> None:
    """Put modules into a block by their names there."""
    block.update_modules(tree_unflatten([*modules.items()]))  # type: ignore[arg-type]


def _input_norms(name, block, count, dim, args, kwargs) -> list[str]:
    """Return the name of the `nn.RMSNorm` at the input of each of a block's branches.

    It is the one that the branch uses, and whose output, given to the branch without the norm,
    makes what the branch makes. Raises ValueError where a branch has none. The block is then as it
    was.
    """
    x = 3 * _two_tokens(block, dim)
    norms = {
        k: norm
        for k, norm in block.named_modules()
        if isinstance(norm, nn.RMSNorm) and norm.weight.shape == (dim,)
    }

    def run(number: int, u: mx.array, *removed: str) -> mx.array:
        """Return what a branch makes of u while the block is without these norms."""
        a, k = copy.deepcopy((args, kwargs))
        replace(block, {norm: nn.Identity() for norm in removed})
        try:
            branch = branches_of(block, *a, **k)[number]
            without = f" without {', '.join(removed)}" if removed else ""
            return _run(name, f"branch {number}{without}", branch, u)
        finally:
            replace(block, {norm: norms[norm] for norm in removed})

    def is_input(norm: str, number: int, *removed: str) -> bool:
        return not errors(run(number, norms[norm](x), *removed), wants[number])[2]

    wants = [run(number, x) for number in range(count)]
    found: list[str] = []
    for number, want in enumerate(wants):
        used = (k for k in norms if not mx.array_equal(run(number, x, k), want).item())
        norm = next((k for k in used if is_input(k, number, k)), None)
        if norm is None:
            must = f"have an nn.RMSNorm of {dim} channels at the input of each branch"
            got = f"branch {number} of {name}, whose norm connection='gated' cannot replace"
            raise ValueError(fail("widen", "layers", must, got))
        found.append(norm)
    for number, norm in enumerate(found):  # one branch may use the norm of another elsewhere
        if not is_input(norm, number, *dict.fromkeys(found)):
            must = "use each norm at the input of a branch there alone"
            raise ValueError(fail("widen", "layers", must, f"branch {number} of {name}"))
    return found


def check_blocks(layers, dim, args, kwargs, gated):
    """Return the number of branches of each block, or with gated the names of their norms.

    During the trial calls the blocks are in evaluation mode: dropout is off, and no module counts
    its calls.
    """
    modes = [(module, module.training) for block in layers for module in block.modules()]
    try:
        found = []
        for k, block in enumerate(layers):
            block.eval()
            count = _check_block(name_of(block, k), block, dim, args, kwargs)
            norms = (name_of(block, k), block, count, dim, args, kwargs)
            found.append(_input_norms(*norms) if gated else count)
        return found
    finally:
        for module, mode in modes:  # a module comes before its children, which train() sets too
            module.train(mode)


def name_of(block: nn.Module, k: int) -> str:
    return f"{type(block).__name__} at layers[{k}]"
