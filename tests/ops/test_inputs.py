"""Bad input: one clear error each, at the call."""

import dataclasses
import inspect
import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import CASES, FUSED, OF_LOGITS, OPS, Case

import mhc_mlx as m
from mhc_mlx import ops
from mhc_mlx.ops.autodiff import FUSED_OPS

x, y, gate, mix = mx.zeros((2, 4, 8)), mx.zeros((2, 8)), mx.zeros(4), mx.zeros((4, 4))


def zeros(*shape):
    return mx.zeros(shape)


RIGHT_ARGUMENTS = {  # of functions and modules, by their names, where a row says nothing of them
    **{"x": x, "y": y, "u": y, "weight": mx.ones(8), "logits": mx.zeros((4, 4)), "dim": 8},
    **{"h_pre": gate, "h_post": gate, "h_res": mix, "H_pre": gate, "H_post": gate, "H_res": mix},
    **{"phi": mx.zeros((24, 32)), "bias": mx.zeros(24), "alpha": mx.zeros(3)},
    **{"gate_logits": x, "s": x},
}
OF_HEAD = {"phi": zeros(4, 32), "bias": gate, "alpha": zeros(1)}
BAD_VALUES = [  # what is called, what it says, and the wrong arguments
    ("mhc_static", r"h_pre must have shape \[n=4\] but got \[3\]", {"h_pre": zeros(3)}),
    ("mhc_static", r"h_post must have shape \[n=4\]", {"h_post": zeros(2, 4)}),
    ("mhc_static", r"h_res must have shape \[n=4, n=4\]", {"h_res": zeros(4, 3)}),
    ("mhc_static", r"weight must have shape \[C=8\] but got \[9\]", {"weight": zeros(9)}),
    ("mhc_static", r"x must have shape \[\.\.\., n, C\]", {"x": zeros(8)}),
    ("mhc_static", ".*n from 1 to 64", {"x": zeros(2, 0, 8)}),
    ("mhc_static", ".*n from 1 to 64", {"x": zeros(2, 65, 8)}),
    ("mhc_static", ".*C at least 1", {"x": zeros(2, 4, 0)}),
    ("mhc_static", "eps must be finite and above 0", {"eps": 0.0}),
    ("mhc_static", "eps must be finite", {"eps": float("nan")}),
    ("mhc_static", ".*multiple of 32 from 32 to 1024", {"threads_per_group": 48}),
    ("stream_mix_add", "y must have shape", {"y": y[:, :7]}),
    ("stream_mix_add", r"h_post must have shape \[n=4\] or \[2, n=4\]", {"h_post": zeros(3, 4)}),
    (
        *("stream_mix_add", r".*or \[2, n=4, n=4\] but got \[1, 4, 4\]"),
        {"h_res": zeros(1, 4, 4)},
    ),
    ("sinkhorn_knopp", r"logits must have shape \[\.\.\., n, n\]", {"logits": zeros(4, 3)}),
    ("sinkhorn_knopp", ".*n from 1 to 64", {"logits": zeros(65, 65)}),
    ("sinkhorn_knopp", "logits must have shape", {"logits": gate}),
    ("stream_aggregate_norm", "h_pre must have shape", {"h_pre": zeros(5)}),
    (
        *("mhc_pre", r"phi must have shape \[\(2n\+R\)=24, \(n\*C\)=32\] but got \[24, 31\]"),
        {"phi": zeros(24, 31)},
    ),
    ("mhc_coefficients", r".*\(2n\+R\)=24, .* but got \[23, 32\]", {"phi": zeros(23, 32)}),
    ("mhc_pre", r"bias must have shape \[\(2n\+R\)=24\] but got \[23\]", {"bias": zeros(23)}),
    ("mhc_pre", r"alpha must have shape \[parts=3\] but got \[2\]", {"alpha": zeros(2)}),
    ("mhc_coefficients", r"alpha must have shape \[parts=3\] but got \[\]", {"alpha": zeros()}),
    ("mhc_pre", r"phi must have shape \[\(2n\+R\)=15, \(n\*C\)=24\]", {"x": zeros(2, 3, 8)}),
    ("mhc_coefficients", r"phi must have shape .*\(n\*C\)=36", {"x": zeros(2, 4, 9)}),
    ("mhc_pre", r"x must have shape \[\.\.\., n, C\]", {"x": zeros(8)}),
    ("mhc_pre", ".*n from 1 to 64", {"x": zeros(2, 65, 8)}),
    ("mhc_pre", r"phi must have shape \[\(2n\+R\)=8,", {"convention": m.IDENTITY}),
    (
        "mhc_pre",
        "convention must have gates of logits but got ADDITIVE",
        {"convention": m.ADDITIVE},
    ),
    ("mhc_coefficients", ".*gates of logits but got ADDITIVE", {"convention": m.ADDITIVE}),
    ("mhc_pre", r"weight must have shape \[C=8\] but got \[9\]", {"weight": zeros(9)}),
    ("mhc_pre", r"weight must have shape \[C=8\] but got \[1, 8\]", {"weight": zeros(1, 8)}),
    ("mhc_seam", r"y must have shape \[2, C=8\] but got \[2, 7\]", {"y": zeros(2, 7)}),
    (
        *("mhc_seam", r"h_pre must have shape \[n=4\] or \[2, n=4\] but got \[1, 4\]"),
        {"h_pre": zeros(1, 4)},
    ),
    ("mhc_seam", "h_post must", {"h_post": zeros(5)}),
    ("mhc_seam", "h_res must have", {"h_res": gate}),
    ("mhc_seam", "weight must have", {"weight": gate}),
    *(
        (
            "sinkhorn_knopp",
            rf"convention must have half-steps .* but got {c.name}",
            {"convention": c},
        )
        for c in (m.MHC_LITE, m.KRONECKER, m.IDENTITY, m.UNCONSTRAINED)
    ),
    ("mhc_layer", "convention must have half-steps", {"convention": m.KRONECKER}),
    ("stream_mix", "h_res must have shape", {"h_res": zeros(5, 5)}),
    (
        *("stream_distribute", r"h_post must have shape \[n=4\] or \[2, n=4\] but got \[5, 4\]"),
        {"h_post": zeros(5, 4)},
    ),
    ("stream_distribute", r"y must have shape \[..., C\]", {"y": mx.array(1.0)}),
    ("rms_norm", r"weight must have shape \[C=8\]", {"weight": mx.ones(1)}),
    ("rms_norm", "eps must be finite", {"eps": -1.0}),
    (
        "HyperConnection",
        "init_scale must be finite in float32 but got nan",
        {"init_scale": math.nan},
    ),
    ("mhc_single_pass", "phi must have shape", {"phi": zeros(23, 32)}),
    ("mhc_single_pass", "y must have shape", {"y": x}),
    ("mhc_single_pass", r"weight must have shape \[C=8\]", {"weight": gate}),
    (
        *("mhc_head", r"phi must have shape \[n=4, \(n\*C\)=32\] but got \[24"),
        OF_HEAD | {"phi": zeros(24, 32)},
    ),
    ("mhc_head", r"bias must have shape \[n=4\] but got \[5\]", OF_HEAD | {"bias": zeros(5)}),
    ("mhc_head", r"alpha must have shape \[parts=1\] but got \[3\]", OF_HEAD | {"alpha": zeros(3)}),
    (
        *("stream_aggregate", r"h_pre must have shape \[n=4\] or \[2, n=4\] but got \[5\]"),
        {"h_pre": zeros(5)},
    ),
    ("stream_aggregate", r"h_pre must have .* but got \[3, 4\]", {"h_pre": zeros(3, 4)}),
    ("gate_mix", r"s must have shape \[\.\.\., n, C\] but got \[8\]", {"s": zeros(8)}),
    ("gate_mix", ".*n from 1 to 64", {"s": zeros(2, 65, 8)}),
    (
        *("gate_mix", r"gate_logits must have shape \[2, n=4, C=8\] but got \[2, 8, 4\]"),
        {"gate_logits": zeros(2, 8, 4)},
    ),
    ("Convention", "iters must be at least 1", {"name": "X", "iters": 0}),
    ("Convention", "eps must be finite and at least 0", {"name": "X", "eps": -1e-6}),
    ("Convention", "start must be one of", {"name": "X", "start": "relu"}),
    ("Convention", "first must be one of", {"name": "X", "first": "rank"}),
    ("Convention", "first must be 'rows'", {"name": "X", "start": "softmax", "first": "columns"}),
    ("MHCLayer", "n must be from 1 to 64", {"n": 0, "C": 8}),
    ("MHCLayer", "n must be from 1 to 64", {"n": 65, "C": 8}),
    ("MHCLayer", ".*iters must be at least 1", {"n": 4, "C": 8, "sinkhorn_iters": 0}),
    ("MHCLayer", "eps must be finite and above 0", {"n": 4, "C": 8, "eps": 0.0}),
    ("MHCLayer", ".*multiple of 32", {"n": 4, "C": 8, "threads_per_group": 33}),
    ("split_streams", r"h must have shape \[\.\.\., 4\*C\]", {"h": zeros(2, 9), "n": 4}),
    ("reduce_streams", "how must be 'mean', 'sum' or 'first'", {"how": "max"}),
    ("expand_streams", "n must be at least 1", {"h": x, "n": 0}),
    ("merge_streams", r"x must have shape \[\.\.\., n, C\]", {"x": gate}),
]
BAD_TYPES = [
    ("mhc_static", "eps must be a number", {"eps": "1"}),
    ("mhc_static", "threads_per_group must be None or an int", {"threads_per_group": 64.0}),
    ("mhc_layer", "convention must be a Convention but got str", {"convention": "PAPER"}),
    ("stream_mix_add", "y must have x's dtype", {"y": y.astype(mx.float16)}),
    ("mhc_seam", "y must have x's dtype", {"y": y.astype(mx.float16)}),
    ("stream_mix", "x must be an mx.array", {"x": [1]}),
    ("rms_norm", "u must be float32", {"u": y.astype(mx.int32)}),
    ("HyperConnection", "layer_idx must be an int but got float", {"layer_idx": 1.5}),
    ("HyperHead", "init_scale must be a number but got bool", {"init_scale": True}),
    ("Convention", "iters must be an int", {"name": "X", "iters": 2.0}),
    ("Convention", "eps must be a number but got NoneType", {"name": "X", "eps": None}),
    ("Convention", "pre_eps must be a number but got bool", {"name": "X", "pre_eps": True}),
    ("MHCLayer", "C must be an int", {"n": 4, "C": 8.0}),
    ("expand_streams", "n must be an int", {"h": x, "n": 2.0}),
    ("split_streams", "h must be an mx.array", {"h": [1.0], "n": 1}),
    ("split_streams", "n must be an int", {"h": x, "n": True}),
    ("merge_streams", "x must be an mx.array", {"x": [1.0]}),
    ("reduce_streams", "x must be an mx.array", {"x": None}),
    (  # whose mean would lose its half
        *("reduce_streams", "x must be float32, float16 or bfloat16 but got mlx.core.int32"),
        {"x": mx.array([[1, 2], [2, 3]])},
    ),
    ("widen", "model must have layers, .* got NoneType", {"model": None}),
]
BAD = [(ValueError, *row) for row in BAD_VALUES] + [(TypeError, *row) for row in BAD_TYPES]


@pytest.mark.parametrize("kind, name, message, wrong", BAD)
def test_bad_input(kind, name, message, wrong):
    f = getattr(m, name)
    right = {
        k: RIGHT_ARGUMENTS[k] for k in inspect.signature(f).parameters.keys() & RIGHT_ARGUMENTS
    }
    with pytest.raises(kind, match=rf"^\[{name}\] {message}"):
        f(**right | wrong)


@pytest.mark.parametrize("bad, n", [(zeros(2, 4, 9), 4), (zeros(2, 4, 7), 4), (x, 3)])
def test_streams_of_another_shape(bad, n):
    message = rf"x must have shape \[..., n={n}, C=8\] but got \[{str(bad.shape)[1:-1]}\]"
    for module in (m.MHCLayer(n, 8), m.HyperConnection(8, n).coefficients, m.HyperHead(8, n)):
        name = type(getattr(module, "__self__", module)).__name__
        with pytest.raises(ValueError, match=rf"\[{name}\] {message}"):
            module(bad)
    with pytest.raises(TypeError, match=r"\[HyperConnection\] x must be an mx.array"):
        m.HyperConnection(8)([bad])


# ---- every argument of every module, wrong once

NAN, ARRAY = float("nan"), mx.array(4)
INT = ("4", 4.0, True, 0, -1, None, np.int64(4), np.float32(4), ARRAY, [4])
NUMBER = ("1", True, None, NAN, float("inf"), 1e300, 10**400, 1j, np.float32(1), ARRAY, [1.0])
BOOL = (1, 0, None, "False", 1.0, np.True_, mx.array(True))
CONVENTION = ("PAPER", None, m.Convention, {})
WRONG = {
    "dim": INT,
    "num_streams": (*INT, 65),
    "layer_idx": (1.5, True, None, "0", np.int64(1), ARRAY),
    "dynamic": BOOL,
    "convention": (*CONVENTION, m.ADDITIVE),
    "sinkhorn_iters": [bad for bad in INT if bad is not None],
    "init_scale": NUMBER,
    "norm_eps": (*NUMBER, 0.0, -1e-6, 1e-60),
    "use_metal": BOOL,
    "threads_per_group": (33, 0, -32, 2048, 64.0, True, "64", np.int64(64), ARRAY),
    "differentiable": BOOL,
}
LAYER = {k: v for k, v in WRONG.items() if k not in ("dim", "num_streams", "convention")}
LAYER |= {"n": WRONG["num_streams"], "C": INT, "eps": WRONG["norm_eps"], "convention": CONVENTION}
HEAD = {k: v for k, v in WRONG.items() if k not in ("layer_idx", "dynamic", "sinkhorn_iters")}
GATED = {k: v for k, v in HEAD.items() if k not in ("convention", "init_scale", "norm_eps")}
GATED |= {"rank": [bad for bad in INT if bad is not None], "eps": WRONG["norm_eps"]}
FUNCTION = (3, "tanh", nn.Tanh, ARRAY)
BLOCK = WRONG | {"layer": (None, *FUNCTION), "norm": FUNCTION}
LITE = {k: v for k, v in BLOCK.items() if k != "convention"} | {"subtract_input": BOOL}


class Residual(nn.Module):
    def residual_branches(self, scale=1):
        return [lambda h: scale * mx.tanh(h)]

    def __call__(self, h, scale=1):
        return h + scale * mx.tanh(h)


WIDEN = {k: v for k, v in WRONG.items() if k != "layer_idx"}
WIDEN |= {"model": (3, "model", mx.tanh), "reduce": ("max", None, 1, ["mean"])}
WIDEN |= {"layers": (3, "abc", Residual(), [], [None], [mx.tanh], [Residual, 3], (nn.Module(),))}
WIDEN |= {"connection": ("mhc", None, 3, ["gated"], True)}
WIDEN |= {"example": (None, 3, [1], "ab", (1, 2), {"x": 1, "scales": 2}), "dim": WRONG["dim"]}
RIGHT = {
    m.HyperConnection: {"dim": 8},
    m.MHCLayer: {"n": 4, "C": 8},
    m.HyperHead: {"dim": 8},
    m.GatedResidual: {"dim": 8},
    m.GatedHead: {"dim": 8},
    m.MHCBlock: {"layer": mx.tanh, "dim": 8},
    m.MHCLiteBlock: {"layer": mx.tanh, "dim": 8},
    m.widen: {"model": nn.Module(), "dim": 8},
}
TABLES = dict(zip(RIGHT, (WRONG, LAYER, HEAD, GATED, GATED, BLOCK, LITE, WIDEN), strict=True))


def refused(op, make, given, argument):
    """What it says, which must be ours: the op, or the connection in it, and the argument."""
    with pytest.raises((TypeError, ValueError)) as error:
        make(**given)
    said = str(error.value)
    ours = rf"\[({op}|HyperConnection)\] ({argument}|n) must .* but "
    assert re.match(ours, said), f"{op}, {argument} = {given.get(argument)!r}: {said}"


def test_every_argument_of_every_module():
    """Wrong once in each way, the others right; and names that nobody has."""
    for make, table in TABLES.items():
        op, block = make.__name__, Residual()
        right = RIGHT[make] | ({"layers": [block]} if make is m.widen else {})
        named = set(inspect.signature(make).parameters) - {"options"}
        assert named <= table.keys(), f"{op}: no wrong values of {named - table.keys()}"
        for argument, values in table.items():
            for bad in values:
                if not (make is m.widen and argument == "dim" and bad is None):  # the default
                    refused(op, make, right | {argument: bad}, argument)
        for unknown in ("sinkhorn_iter", "verbose", "layer_idx" if make is m.widen else "steps"):
            with pytest.raises(TypeError, match=rf"options must be of .*|argument .*{unknown}"):
                make(**right | {unknown: 1})
        assert not hasattr(block, "connections")
        make(**right)


def refused_at(make, name: str, *values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"\] {name} must .* but got"):
            make(**{name: value})


def test_bounds_are_as_they_are_told():
    """The last value on each side of a bound: the one is taken, the other refused."""

    def convention(**fields):
        return m.Convention("X", **fields)

    most, beyond = 2.0**127, math.nextafter(2.0**127, math.inf)  # with every digit in float32
    for name in ("eps", "pre_eps", "post_scale", "post_eps"):
        for value in (0, most):
            assert getattr(convention(**{name: value}), name) == value
        refused_at(convention, name, beyond, -(2.0**-126))
    assert convention(eps=2.0**-100).eps == 2.0**-100 and convention(iters=1).iters == 1
    refused_at(convention, "eps", math.nextafter(2.0**-100, 0))
    refused_at(convention, "iters", 0)

    def layer_op(**options):
        return m.mhc_static(x, gate, gate, mix, mx.ones(8), **options)

    for eps in (2.0**-126, most):
        layer_op(eps=eps)
    refused_at(layer_op, "eps", math.nextafter(2.0**-126, 0), beyond)
    for threads in (32, 1024):
        layer_op(threads_per_group=threads)
    refused_at(layer_op, "threads_per_group", 0, 1056, 1040)

    def connection(**options):
        return m.HyperConnection(8, **options)

    for scale in (-most, most):
        connection(init_scale=scale)
    refused_at(connection, "init_scale", -beyond, beyond)
    assert connection(num_streams=1).num_streams == 1
    assert connection(num_streams=64).num_streams == 64 == m.ops.MAX_STREAMS
    refused_at(connection, "num_streams", 0, 65)
    one = mx.ones((1, 1))  # an axis of streams and one of channels are enough
    assert m.stream_mix_add(one, one[0], one[0], one).tolist() == [[2.0]]
    assert m.merge_streams(one).tolist() == m.reduce_streams(one).tolist() == [1.0]
    assert m.split_streams(one[0], 1).tolist() == m.expand_streams(one[0], 1).tolist() == [[1.0]]
    many = mx.ones((64, 2))
    assert m.stream_aggregate(many, mx.ones(64)).tolist() == [64.0, 64.0]


def test_options_that_are_set_later():
    """Are checked when the module is called."""
    for module in (
        *(m.HyperConnection(8), m.HyperConnection(8, dynamic=False), m.HyperHead(8)),
        *(m.MHCLayer(4, 8), m.MHCLayer(4, 8, dynamic=True)),
        *(m.MHCLayer(4, 8, convention=m.IDENTITY), m.GatedResidual(8), m.GatedHead(8)),
    ):
        names = ["use_metal", "differentiable", "threads_per_group"]
        names += ["norm_eps"] * ("phi" in module) + ["eps"] * hasattr(module, "eps")
        for name in names:
            right = getattr(module, name)
            for bad in LAYER[name]:
                setattr(module, name, bad)
                with pytest.raises((TypeError, ValueError), match=rf"^\[\w+\] {name} must .* but"):
                    module(x)
            setattr(module, name, right)
        mx.eval(module(x)[0])
    block = m.MHCLiteBlock(mx.tanh, 8)
    block.subtract_input = 1
    with pytest.raises(TypeError, match=r"\[MHCLiteBlock\] subtract_input must be a bool"):
        block(x)
    block.layer, block.subtract_input = (lambda u: None), True
    with pytest.raises(TypeError, match=r"\[MHCLiteBlock\] y must be an mx.array but got NoneType"):
        block(x)
    with pytest.raises(TypeError, match=r"\[MHCLayer\] sublayer must be a module or function"):
        m.MHCLayer(4, 8)(x, 3)


# Of every public function and class, but for conventions: a parameter has one default everywhere.
DEFAULTS = {
    **{"eps": 1e-5, "norm_eps": 1e-6, "weight": None, "h_res": None, "round_aggregate": False},
    **{"use_metal": True, "threads_per_group": None, "verbose": False, "differentiable": True},
    **{"num_streams": 4, "layer_idx": 0, "sinkhorn_iters": None, "init_scale": 0.01, "norm": None},
    **{"subtract_input": False, "how": "mean", "reduce": "mean", "layers": None, "dim": None},
    **{"connection": "hyper", "gate_min": None, "gate_max": None},
    **{"example": (), "in_axes": 0, "out_axes": 0, "logs": None, "column": "bits_per_byte"},
    **{"gradient_norms": None, "loss": None, "loss_fn": None, "before": None, "name": "eps"},
    **{"source": None, "leave": (), "rank": None, "y": None, "h_post": None, "inject": None},
}
USUAL = {"sinkhorn_knopp": m.ROW_FIRST, "mhc_layer": m.ROW_FIRST, "MHCLayer": m.ROW_FIRST}
USUAL |= {"mhc_single_pass": m.DEEPSEEK_V4}  # others have PAPER
EPS = dict.fromkeys(("stream_norm", "gated_residual", "GatedResidual", "GatedHead"), 1e-6)
DYNAMIC_BY_DEFAULT = {"HyperConnection": True, "MHCLayer": False}


def test_every_default():
    """Also of the reference, which tests call with every argument named."""
    from mhc_mlx import diagnostics, reference

    seen = set()
    for module in (m, ops, reference, diagnostics):
        for name, f in vars(module).items():
            if name.startswith("_") or not (inspect.isfunction(f) or inspect.isclass(f)):
                continue
            for p in inspect.signature(f).parameters.values():
                if f is m.Convention or p.default is p.empty:
                    continue
                want = DEFAULTS | {"convention": USUAL.get(name, m.PAPER)}
                want |= {"dynamic": DYNAMIC_BY_DEFAULT.get(name), "eps": EPS.get(name, 1e-5)}
                same = type(p.default) is type(want[p.name]) and p.default == want[p.name]
                assert same, f"{name}, {p.name}: {p.default}"
                seen.add(p.name)
    assert seen == {*DEFAULTS, "convention", "dynamic"}
    names = ("iters", "eps", "transposed", "sigmoid", "pre_eps", "post_scale", "post_eps")
    plain = m.Convention("PLAIN")  # H_pre = sigmoid, H_post = 2 sigmoid, rows first
    assert (plain.start, plain.first) == ("exp", "rows")
    assert [getattr(plain, name) for name in names] == [20, 0.0, False, True, 0.0, 2.0, 0.0]


def test_dataclasses_do_not_change():
    """A convention is a key of caches, a report a record."""
    from mhc_mlx import diagnostics

    found = {
        *(k for k in vars(m).values() if inspect.isclass(k) and dataclasses.is_dataclass(k)),
        *(diagnostics.ConnectionReport, diagnostics.StabilityReport),
    }
    assert m.Convention in found
    for kind in found:
        with pytest.raises(dataclasses.FrozenInstanceError):
            object.__new__(kind).name = 3


def test_ops_take_what_the_reference_takes():
    from mhc_mlx import reference

    for name, f in vars(reference).items():
        no_op = name.startswith("_") or name in ("gates", "gated_residual")  # which is two ops
        if inspect.isfunction(f) and not no_op:
            positional = [p.name for p in inspect.signature(getattr(ops, name)).parameters.values()]
            assert positional[: len(inspect.signature(f).parameters)] == list(
                inspect.signature(f).parameters
            )


def test_which_arrays_all_tokens_may_share():
    """An array whose shape does not grow with the tokens, and how many axes it has."""
    for case in {case.op: case for case in CASES}.values():
        options = {"per_token": (False, False), "identity": False, "norm": True, "layouts": ()}
        one, six = (
            dataclasses.replace(case, lead=lead, **options).arrays() for lead in ((), (2, 3))
        )
        pairs = zip(one, six, strict=True)
        want = tuple(a.ndim if a.shape == b.shape else None for a, b in pairs)
        assert FUSED_OPS[case.op].shared_ndim == want, case.op


def wrong_values(op: str, right: tuple) -> list[tuple]:
    """Of each argument: an array of another type, dtype or shape, or none; another constant. And
    what is raised."""
    row, names, found = OPS[op], list(inspect.signature(getattr(m, op)).parameters), []
    for name, a in zip(row.arrays, right, strict=False):
        for other in [[1.0], *[None] * (name not in row.optional)]:
            found.append((name, other, TypeError, f"be an mx.array but got {type(other).__name__}"))
        for dtype in (mx.int8, mx.int32, mx.complex64):
            found.append((name, a.astype(dtype), TypeError, "be float32, float16 or bfloat16 but"))
        found.append((name, mx.concatenate([a.flatten()] * 2), ValueError, "have shape .* but got"))
    wrong = WRONG | {"eps": LAYER["eps"], "round_aggregate": BOOL, "verbose": BOOL}
    wrong["convention"] = (*CONVENTION, m.ADDITIVE if op in OF_LOGITS else m.MHC_LITE)
    constants = [(name, value) for name in names[len(row.arrays) :] for value in wrong[name]]
    return found + [(*constant, (TypeError, ValueError), ".* but got") for constant in constants]


@pytest.mark.parametrize("op", FUSED)
def test_every_argument_of_every_op(op):
    """Wrong once in each way, the others right."""
    f, case = getattr(m, op), Case(op, (2,), 4, 8, convention=m.PAPER)
    right, names = (*case.arrays(), *case.statics), inspect.signature(f).parameters
    f(*right)
    for name, value, kind, must in wrong_values(op, right):
        with pytest.raises(kind, match=rf"^\[{op}\] {name} must {must}"):
            f(**dict(zip(names, right, strict=False)) | {name: value})
