"""The stand-in refuses what a custom kernel refuses, and a launch that its body does not expect.

That it computes what the kernels do, test_parity says.
"""

import mlx.core as mx
import pytest
import standin
from conftest import executor

from mhc_mlx import ROW_FIRST, ops, vmap

N, C = 4, 8
X, Y = mx.ones((3, N, C)), mx.ones((3, C))
GATE, EACH, MIX, WEIGHT = mx.ones(N), mx.ones((3, N)), mx.ones((N, N)), mx.ones(C)
CALLS = {
    "sinkhorn_knopp": (MIX, ROW_FIRST),
    "stream_aggregate_norm": (X, GATE, WEIGHT),
    "stream_mix_add": (X, Y, EACH, MIX),
    "mhc_static": (X, GATE, GATE, MIX, WEIGHT),
    "mhc_layer": (X, GATE, GATE, MIX, WEIGHT),
}


@pytest.mark.parametrize("transform", ["vjp", "jvp", "vmap"])
@pytest.mark.parametrize("name", CALLS)
def test_an_op_without_its_rules_is_noticed(name, transform):
    first, *rest = CALLS[name]

    def bare(a):
        return getattr(ops, name)(a, *rest, differentiable=False)

    with executor("stand-in"):
        out = bare(first)
        with pytest.raises(ValueError, match=rf"\[Primitive::{transform}\] Not implemented"):
            if transform == "vmap":
                mx.vmap(lambda a: bare(2 * a))(mx.stack([first, first]))
            else:
                getattr(mx, transform)(bare, [first], [out if transform == "vjp" else first])


def test_a_gradient_without_its_rules_is_noticed():
    """The kernels of the backward have no gradient either: ops.py gives them the reference's."""

    def first(a):
        return ops._KERNELS["sinkhorn_knopp"][2](a, a, ROW_FIRST, None, False)[0].sum()

    with executor("stand-in"):
        assert mx.isfinite(first(MIX))
        with pytest.raises(ValueError, match="Not implemented"):
            mx.grad(first)(MIX)


@pytest.mark.parametrize("per_token", [False, True])
def test_vmap_runs_kernels_where_it_may(per_token):
    """The backward's only if no gradient is a sum over the tokens of one mapped example."""
    x, y, post, res = (mx.stack([a, 2 * a]) for a in (X, Y, EACH, mx.ones((3, N, N))))
    arrays, axes = [x, y, post, res], (0, 0, 0, 0)
    if not per_token:
        arrays, axes = [x, y, GATE, MIX], (0, 0, None, None)
    gradient = mx.grad(lambda *a: (ops.stream_mix_add(*a) ** 2).sum(), argnums=(0, 1, 2, 3))
    with executor("stand-in") as launched:
        mx.eval(vmap(gradient, in_axes=axes)(*arrays))
    bodies = {variant[1] for variant in launched}
    assert bodies == {"stream_mix_add", *["mhc_backward"] * per_token}


def launch(groups=3, threads=32, out=(X.shape, mx.float32), template=(), **inputs):
    whole = {"T": mx.float32, "N": N, "VEC": 4, "THREADS": threads}
    whole |= {"POST_PER_TOKEN": True, "RES_PER_TOKEN": False} | dict(template)
    arrays = {"x": X, "y": Y, "h_post": EACH, "h_res": MIX} | inputs
    return standin.launch("stream_mix_add", arrays, {"out": out}, groups, threads, whole)


@pytest.mark.parametrize(
    "wrong",
    [
        {"h_post": GATE},
        {"h_res": mx.ones((3, N, N))},
        {"y": Y[:2]},
        {"y": Y.astype(mx.float16)},
        {"out": (Y.shape, mx.float32)},
        {"template": {"POST_PER_TOKEN": False}},
        {"template": {"N": 8}},
        {"template": {"T": mx.bfloat16}},
        {"template": {"THREADS": 64}},
        {"template": {"VEC": 16}},
        {"template": {"VEC": 1, "PASSES": 0}},
    ],
    ids=str,
)
def test_a_wrong_launch_is_noticed(wrong):
    assert launch()[0].shape == X.shape
    with pytest.raises(ValueError, match=r"\[stream_mix_add\] got"):
        launch(**wrong)
