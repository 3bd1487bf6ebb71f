"""These ops are timed, with these inputs; each can move so few bytes."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mhc_mlx import DEEPSEEK_V4, ROW_FIRST, reference

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DIRECTIONS = ("forward", "backward", "forward+backward")


def uniform(*shape: int, low: float = 0.1, high: float = 1.0) -> mx.array:
    return mx.random.uniform(low, high, shape)


def matrices(*shape: int) -> mx.array:
    return mx.softmax(mx.random.normal(shape), axis=-1)


def weight(x: mx.array) -> mx.array:
    return uniform(x.shape[-1], low=0.5, high=1.5)


def logits(x: mx.array) -> mx.array:
    return mx.random.normal((x.shape[1], x.shape[1]))


def branch(x: mx.array) -> mx.array:
    """Make an array such as y, which has one row of C elements for each token."""
    return mx.random.normal((x.shape[0], x.shape[2])).astype(x.dtype)


def phi_parameters(x: mx.array, parts: int = 3) -> list[mx.array]:
    """Make phi, bias and alpha, which give each token coefficients; one part is the head's."""
    _, n, C = x.shape
    num_logits = 2 * n + n * n if parts == 3 else n
    phi = mx.random.normal((num_logits, n * C)) * (n * C) ** -0.5
    return [phi, mx.random.normal((num_logits,)), uniform(parts, low=0.5, high=1.5)]


def static_coefficients(x: mx.array) -> list[mx.array]:
    """Make h_pre, h_post and h_res, which all tokens share."""
    n = x.shape[1]
    return [uniform(n), uniform(n), matrices(n, n)]


def sublayer(module, *arrays, **options):
    """Run a dynamic sublayer with F = identity."""
    u, h_post, h_res, x = module.mhc_pre(*arrays, None, DEEPSEEK_V4, **options)
    return module.stream_mix_add(x, u, h_post, h_res, **options)


def dynamic_layer(module, *arrays, **options):
    """Run the dynamic layer of mHC.cu, whose F is the RMSNorm."""
    u, h_post, h_res, x = module.mhc_pre(*arrays, ROW_FIRST, **options)
    return module.stream_mix_add(x, u, h_post, h_res, **options)


def single_pass(module, x, y, *parameters, **options):
    """Run a sublayer of DeepSeek V4.1 but for its F."""
    return module.mhc_single_pass(x, y, *parameters, DEEPSEEK_V4, 1e-6, 1e-6, True, **options)


class Op(NamedTuple):
    """An op says what is timed under its name.

    inputs: A function of x, which returns x and the other arrays of a call.
    forward, backward: The fewest rows of C elements per token that move: (a, b) is a * n + b.
        None stands for an op whose tokens have no such rows.
    statics: The arguments that follow the arrays in a call.
    call: A function of a module, the arrays and options, or another op's name.
    saves: Whether its forward saves for its gradients, which then cannot run alone.
    """

    inputs: Callable
    forward: tuple[int, int] | None = None
    backward: tuple[int, int] | None = None
    statics: tuple = ()
    call: Callable | str | None = None
    saves: bool = False


def mix_inputs(x: mx.array) -> list[mx.array]:
    return [x, branch(x), uniform(*x.shape[:2]), matrices(*x.shape[:2], x.shape[1])]


def seam_inputs(x: mx.array) -> list[mx.array]:
    x, y, h_post, h_res = mix_inputs(x)
    return [x, y, uniform(*x.shape[:2]), h_post, h_res, weight(x)]


def single_pass_inputs(x: mx.array) -> list[mx.array]:
    return [x, branch(x), *phi_parameters(x), weight(x)]


V4 = (DEEPSEEK_V4,)
OPS = {
    "sinkhorn_knopp": Op(lambda logits: [logits]),
    "mhc_static": Op(lambda x: [x, *static_coefficients(x), weight(x)], (2, 0), (3, 0)),
    "mhc_layer": Op(
        lambda x: [x, *static_coefficients(x)[:2], logits(x), weight(x)], (2, 0), (3, 0)
    ),
    "stream_mix_add": Op(lambda x: [x, branch(x), *static_coefficients(x)[1:]], (2, 1), (3, 2)),
    "stream_mix_add_per_token": Op(mix_inputs, (2, 1), (3, 2), call="stream_mix_add"),
    "stream_aggregate": Op(lambda x: [x, uniform(*x.shape[:2])], (1, 1), (2, 1)),  # per token
    "stream_aggregate_norm": Op(lambda x: [x, uniform(x.shape[1]), weight(x)], (1, 1), (2, 1)),
    "mhc_coefficients": Op(lambda x: [x, *phi_parameters(x)], (1, 0), (2, 0), V4, saves=True),
    "mhc_pre": Op(lambda x: [x, *phi_parameters(x)], (1, 1), (3, 1), (None, *V4), saves=True),
    "mhc_pre_norm": Op(
        lambda x: [x, *phi_parameters(x), weight(x)], (1, 1), (3, 1), V4, call="mhc_pre", saves=True
    ),
    "mhc_head": Op(lambda x: [x, *phi_parameters(x, 1)], (1, 1), (2, 1), V4, saves=True),
    "sublayer": Op(lambda x: [x, *phi_parameters(x)], (3, 2), (6, 3), call=sublayer, saves=True),
    "mhc_seam": Op(seam_inputs, (2, 2), (3, 3), (1e-6, True)),
    "single_pass": Op(single_pass_inputs, (3, 2), (4, 3), call=single_pass, saves=True),
    "mhc_dynamic": Op(
        lambda x: [x, *phi_parameters(x), weight(x)], (3, 2), (6, 3), call=dynamic_layer, saves=True
    ),
}

TARGETS = ("stream_mix_add_per_token", "stream_aggregate", "mhc_pre", "sublayer")
LARGE = [(65536, 4, 1024), (16384, 4, 4096)]


def make_inputs(op: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> list[mx.array]:
    """Make random arrays for one call."""
    return OPS[op].inputs(mx.random.normal(shape).astype(dtype))


def function(module, op: str, **options):
    """Return an op of ops or of reference as a function of its arrays."""
    call, statics = OPS[op].call, OPS[op].statics
    if callable(call):
        return lambda *arrays: call(module, *arrays, *statics, **options)
    return lambda *arrays: getattr(module, call or op)(*arrays, *statics, **options)


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


def mandatory_bytes(op: str, direction: str, shape: tuple[int, int, int], dtype: mx.Dtype) -> int:
    """Return the fewest bytes that an op can move."""
    B, n, C = shape
    if op == "sinkhorn_knopp":  # logits, h_res float32; logits, dh_res float32, dlogits
        forward, backward = B * n * C * (dtype.size + 4), B * n * C * (2 * dtype.size + 4)
    else:
        rows = OPS[op].forward, OPS[op].backward
        forward, backward = ((a * n + b) * B * C * dtype.size for a, b in rows)
    return {"forward": forward, "backward": backward}.get(direction, forward + backward)
