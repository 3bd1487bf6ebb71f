"""These ops are timed, with these inputs; each can move so few bytes."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from .. import DEEPSEEK_V4, ROW_FIRST, ops, reference
from ..ops.autodiff import FUSED_OPS

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DIRECTIONS = ("forward", "backward", "forward+backward")


def uniform(low: float, high: float) -> Callable:
    return lambda shape: mx.random.uniform(low, high, shape)


def rows_of_phi(shape: tuple[int, int]) -> mx.array:
    return mx.random.normal(shape) * shape[1] ** -0.5


# The axes of arrays, and what draws them: B tokens, n, C, K = n * C, L logits, P parts of alpha.
ARRAYS = {
    "x": ("B n C", mx.random.normal),
    "logits": ("B n C", mx.random.normal),
    "gate_logits": ("B n C", mx.random.normal),
    "s": ("B n C", mx.random.normal),
    "y": ("B C", mx.random.normal),
    "weight": ("C", uniform(0.5, 1.5)),
    "h_res": ("n n", lambda shape: mx.softmax(mx.random.normal(shape), axis=-1)),
    "H_res": ("n n", mx.random.normal),
    "phi": ("L K", rows_of_phi),
    "inject": ("n K", rows_of_phi),
    "bias": ("L", mx.random.normal),
    "alpha": ("P", uniform(0.5, 1.5)),
}


def axes(name: str, shared_ndim: int | None) -> str:
    """Return the axes of an array, by its name or by how many it has where all tokens share it."""
    if name in ARRAYS:
        return ARRAYS[name][0]
    return "B n" if shared_ndim is None else " ".join("n" * shared_ndim)


def sublayer(module, *arrays, **options):
    """Run a dynamic sublayer with F = identity."""
    u, h_post, h_res, x = module.mhc_pre(*arrays, None, DEEPSEEK_V4, **options)
    return module.stream_mix_add(x, u, h_post, h_res, **options)


def dynamic_layer(module, *arrays, **options):
    """Run the dynamic layer of mHC.cu, whose F is the RMSNorm."""
    u, h_post, h_res, x = module.mhc_pre(*arrays, ROW_FIRST, **options)
    return module.stream_mix_add(x, u, h_post, h_res, **options)


def norm(module, x, weight, y=None, h_post=None, inject=None, **options):
    """Run stream_norm; return what there is."""
    made = module.stream_norm(x, weight, y, h_post, inject, **options)
    return tuple(a for a in made if a is not None)


class Op(NamedTuple):
    """An op says what is timed under its name.

    arrays: The axes of the arrays of a call, by name, in order; the first is x.
    drawn: The names in the order in which they are drawn, of which a call need not take all.
    statics: The arguments that follow the arrays in a call.
    call: A function of a module, the arrays and options, or the name of an op.
    saves: Whether its forward saves for its gradients, which then cannot run alone.
    rows: The fewest rows of C elements per token that move forward and backward: (a, b) is
        a * n + b. Without it they are counted from what the call takes and returns.
    head: Whether phi makes the logits of h_pre alone.
    """

    arrays: dict[str, str]
    drawn: tuple[str, ...]
    statics: tuple
    call: Callable | str
    saves: bool
    rows: tuple | None = None
    head: bool = False


def fused(call: str, arrays: str = "", drawn: str = "", per_token=False, statics=(), **more) -> Op:
    """Return what is timed of an op: all its arrays, or those that are named."""
    op, names = FUSED_OPS[call], list(inspect.signature(getattr(ops, call)).parameters)
    of_name = {k: axes(k, ndim) for k, ndim in zip(names, op.shared_ndim, strict=False)}
    of_name = {k: of_name[k] for k in arrays.split() or of_name}
    if per_token:
        of_name = {k: f"B {v}" if k.startswith("h_") else v for k, v in of_name.items()}
    order = tuple(drawn.split()) or tuple(of_name)
    return Op(of_name, order, statics, call, op.saves, **more)


def composed(call: Callable, arrays: str) -> Op:
    """Return what is timed of a layer that several ops make up."""
    names = tuple(arrays.split())
    return Op({k: axes(k, None) for k in names}, names, (), call, True, ((3, 2), (6, 3)))


def normed(names: str, rows: tuple) -> Op:
    """Return what is timed of stream_norm, by the names of its arrays."""
    of_name = {"x": "B n C", "weight": "n C", "y": "B C", "h_post": "B n", "inject": "n K"}
    of_name = {k: of_name[k] for k in names.split()}
    return Op(of_name, tuple(of_name), (), norm, True, rows)


V4, SINGLE_PASS = (DEEPSEEK_V4,), (DEEPSEEK_V4, 1e-6, 1e-6, True)
SPECIAL = {  # unlike the defaults, or several under names of their own
    "mhc_layer": fused("mhc_layer", drawn="x H_pre H_post h_res H_res weight"),
    "stream_mix_add": fused("stream_mix_add", drawn="x y h_pre h_post h_res"),
    "stream_mix_add_per_token": fused("stream_mix_add", per_token=True),
    "stream_aggregate": fused("stream_aggregate", per_token=True),
    "mhc_coefficients": fused("mhc_coefficients", statics=V4),
    "mhc_pre": fused("mhc_pre", "x phi bias alpha", statics=(None, *V4)),
    "mhc_pre_norm": fused("mhc_pre", statics=V4),
    "mhc_head": fused("mhc_head", statics=V4, head=True),
    "sublayer": composed(sublayer, "x phi bias alpha"),
    "mhc_seam": fused(
        "mhc_seam", drawn="x y h_post h_res h_pre weight", per_token=True, statics=(1e-6, True)
    ),
    "single_pass": fused("mhc_single_pass", statics=SINGLE_PASS, rows=((3, 2), (4, 3))),
    "mhc_dynamic": composed(dynamic_layer, "x phi bias alpha weight"),
    # The sums over tokens for the gradients of weight and inject read out and ds once more.
    "stream_norm": normed("x weight", ((2, 0), (6, 0))),
    "stream_norm_write_back": normed("x weight y h_post inject", ((3, 1), (6, 2))),
}
TIMED = {op.call for op in SPECIAL.values()}
OPS = {k: fused(k) for k in FUSED_OPS if k not in TIMED and k not in SPECIAL} | SPECIAL

TARGETS = ("stream_mix_add_per_token", "stream_aggregate", "mhc_pre", "sublayer")
LARGE = [(65536, 4, 1024), (16384, 4, 4096)]


def shape_of(op: Op, name: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
    B, n, C = shape
    sizes = {"B": B, "n": n, "C": C, "K": n * C, "P": 1 if op.head else 3}
    sizes["L"] = n if op.head else 2 * n + n * n
    return tuple(sizes[axis] for axis in (op.arrays.get(name) or axes(name, None)).split())


def make_array(op: Op, name: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> mx.array:
    """Draw one array; streams and y have that dtype."""
    draw = ARRAYS[name][1] if name in ARRAYS else uniform(0.1, 1.0)
    a = draw(shape_of(op, name, shape))
    return a.astype(dtype) if name in ("x", "y", "logits", "gate_logits", "s") else a


def make_inputs(op: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> list[mx.array]:
    """Make random arrays for one call."""
    found = {name: make_array(OPS[op], name, shape, dtype) for name in OPS[op].drawn}
    return [found[name] for name in OPS[op].arrays]


def function(module, op: str, **options):
    """Return an op of ops or of reference as a function of its arrays."""
    call, statics = OPS[op].call, OPS[op].statics
    if callable(call):
        return lambda *arrays: call(module, *arrays, *statics, **options)
    return lambda *arrays: getattr(module, call)(*arrays, *statics, **options)


def as_list(results) -> list[mx.array]:
    return list(results) if isinstance(results, (list, tuple)) else [results]


def add_cotangents(op: str, direction: str, arrays: list[mx.array]) -> list[mx.array]:
    """Return the arrays and, for gradients, a random cotangent of each result of a call."""
    if direction == "forward":
        return arrays
    results = as_list(function(reference, op)(*arrays))
    return arrays + [mx.random.normal(a.shape).astype(a.dtype) for a in results]


def case_row(op: str, direction: str, shape: tuple[int, int, int], name: str) -> dict:
    """Begin a result's row with what was measured."""
    return {"op": op, "direction": direction, "dtype": name, "shape": list(shape)}


@functools.cache
def rows(op: str) -> tuple:
    """Return the fewest rows of C elements per token that move forward and backward, a and b of
    a * n + b: each array of a call, of its results and of their cotangents and gradients once."""
    if (designed := OPS[op].rows) is not None:
        return designed
    shape = (5, 2, 3)  # sizes that differ; nothing is evaluated
    arrays = [mx.zeros(shape_of(OPS[op], name, shape)) for name in OPS[op].arrays]
    results = [a for a in as_list(function(reference, op)(*arrays)) if a is not None]

    def count(*lists):
        shapes = [a.shape for arrays in lists for a in arrays]
        return shapes.count(shape), shapes.count((shape[0], shape[2]))

    written = [a for a in results if all(a is not b for b in arrays)]  # not x passed through
    return count(arrays, written), count(arrays, results, arrays)


def mandatory_bytes(op: str, direction: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> int:
    """Return the fewest bytes that an op can move."""
    B, n, C = shape
    if op == "sinkhorn_knopp":  # logits, h_res float32; logits, dh_res float32, dlogits
        forward, backward = B * n * C * (dtype.size + 4), B * n * C * (2 * dtype.size + 4)
    else:
        forward, backward = ((a * n + b) * B * C * dtype.size for a, b in rows(op))
    return {"forward": forward, "backward": backward}.get(direction, forward + backward)
