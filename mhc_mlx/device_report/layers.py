"""Stacks of sublayers, as in decoding, and calls of layers are timed beside single ops."""

import statistics

import mlx.core as mx

from .. import DEEPSEEK_V4, HyperConnection, MHCLayer, ops, reference
from .suite import DTYPES, OPS, case_row, function, make_array, sublayer
from .timing import call_times, dispatches, gpu_time, launches, race, spread

LAYERS, PLAIN_LAYERS = 61, 8  # a stack has so many; plain ops are slow to compile


def quiet_parameters(x: mx.array) -> list[mx.array]:
    """Return parameters of a sublayer that adds little: else a stack without norms would
    overflow."""
    T, n, C = x.shape
    names = ("phi", "bias", "alpha")
    phi, bias, alpha = (make_array(OPS["sublayer"], k, (T, n, C), x.dtype) for k in names)
    gate = (mx.arange(bias.size) >= n) & (mx.arange(bias.size) < 2 * n)
    return [phi, mx.where(gate, -4.0, bias), alpha]


def stack(op: str, module):
    """Return a function of x and of three parameters for each sublayer, which runs the sublayers,
    F = identity, one after another."""
    options = {"differentiable": False} if module is ops else {}

    def run(x, *parameters):
        u = x[:, 0]
        for i in range(0, len(parameters), 3):
            if op == "sublayer":
                x = sublayer(module, x, *parameters[i : i + 3], **options)
            else:
                run_op = function(module, "single_pass", **options)
                x, u, _ = run_op(x, u, *parameters[i : i + 3], None)
        return x

    return run


def decode(budget: float, op: str, shape, name: str = "bfloat16") -> dict:
    """Time a sublayer in a compiled stack of LAYERS with their own parameters, evaluated once per
    step as a decoder does, beside plain ops compiled, in a stack of PLAIN_LAYERS because their
    compilation is slow."""
    x = mx.random.normal(shape).astype(DTYPES[name])
    parameters = [a for _ in range(LAYERS) for a in quiet_parameters(x)]
    few = parameters[: 3 * PLAIN_LAYERS]
    mx.eval(x, parameters)
    fused, plain = (mx.compile(stack(op, module)) for module in (ops, reference))
    times = [t / LAYERS for t in call_times(budget, lambda: fused(x, *parameters))]
    slow = [t / PLAIN_LAYERS for t in call_times(budget, lambda: plain(x, *few))]
    us, plain_us = (1e6 * statistics.median(t) for t in (times, slow))
    row = case_row(f"decode {op}", "forward", shape, name) | {"us": us, "spread": spread(times)}
    row |= {"gpu_us": 1e6 * gpu_time(lambda: fused(x, *few), 6) / PLAIN_LAYERS}
    row |= {"plain_us": plain_us, "speedup_vs_compiled": plain_us / us}
    counts = [dispatches(mx.compile(stack(op, m))(x, *few[:3])) for m in (ops, reference)]
    row |= {"dispatches": counts[0].total(), "kernels": counts[0]["CustomKernel"]}
    row |= {"plain_dispatches": counts[1].total()}
    return row | {"layers": LAYERS, "plain_layers": PLAIN_LAYERS, "threads_per_group": None}


def layers(n: int, C: int) -> dict:
    """Return by name what --overhead calls, and the module that has its options."""
    connection, layer = HyperConnection(C, n, convention=DEEPSEEK_V4), MHCLayer(n, C)

    def connected(x):
        u, add_residual = connection(x)
        return add_residual(u)

    return {"MHCLayer": (layer, layer), "HyperConnection": (connected, connection)}


def overhead(budget: float, shape, name: str = "bfloat16") -> list[dict]:
    """Time a call of each layer, forward. us: compiled and evaluated alone; eager_us: the same,
    eager; many_us: compiled, an evaluation of many calls; gpu_us: the GPU alone, as `gpu_time`
    says; python_us, python_eager_us: building the graph."""
    rows, x = [], mx.random.normal(shape).astype(DTYPES[name])
    for op, (layer, _) in layers(*shape[1:]).items():
        mx.eval(x)
        compiled = mx.compile(layer)
        calls = {"us": compiled, "eager_us": layer}
        times = {k: call_times(budget, lambda f=f: f(x)) for k, f in calls.items()}
        for k, f in calls.items():
            times[f"python_{k}"] = call_times(budget / 10, lambda f=f: f(x), evaluate=False)
        times["many_us"] = race(budget, (compiled, [[x]]))[0]
        times["gpu_us"] = [gpu_time(lambda f=compiled: f(x))]
        row = case_row(op, "forward", shape, name)
        row |= {k: 1e6 * statistics.median(t) for k, t in times.items()}
        row |= {"spread": spread(times["us"]), "speedup_vs_compiled": None}
        with launches() as launched:
            mx.eval(layer(x))
        rows.append(row | {"launches": launched, "threads_per_group": None})
    return rows
