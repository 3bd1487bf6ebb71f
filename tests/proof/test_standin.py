"""The stand-in refuses what a custom kernel refuses, and a launch that its body does not expect.

That it computes what the kernels do, test_parity says.
"""

import mlx.core as mx
import pytest
from cases import FUSED, OF_LOGITS, Case

from mhc_mlx import MHC_LITE, ROW_FIRST, launch, ops, vmap
from mhc_mlx.ops.autodiff import FUSED_OPS
from proof import executor, standin

N, C = 4, 8
X, Y = mx.ones((3, N, C)), mx.ones((3, C))
GATE, EACH, MIX = mx.ones(N), mx.ones((3, N)), mx.ones((N, N))


def call(op: str) -> tuple:
    """Arrays of three tokens, some coefficients per token, and what follows them."""
    convention = MHC_LITE if op in OF_LOGITS else ROW_FIRST
    case = Case(op, (3,), N, C, convention=convention, per_token=(True, False))
    return (*case.arrays(), *case.statics)


CALLS = {op: call(op) for op in FUSED}


@pytest.mark.parametrize("transform", ["vjp", "jvp", "vmap"])
@pytest.mark.parametrize("name", CALLS)
def test_an_op_without_its_rules_is_noticed(name, transform):
    first, *rest = CALLS[name]

    def bare(a):
        return getattr(ops, name)(a, *rest, differentiable=False)

    with executor("stand-in"):
        out = bare(first)
        out = list(out) if isinstance(out, tuple) else [out]
        with pytest.raises(ValueError, match=rf"\[Primitive::{transform}\] Not implemented"):
            if transform == "vmap":
                mx.vmap(lambda a: bare(2 * a))(mx.stack([first, first]))
            else:
                getattr(mx, transform)(bare, [first], out if transform == "vjp" else [first])


def test_a_gradient_without_its_rules_is_noticed():
    """A backward's kernels have no gradient either: autodiff.py gives them the reference's."""

    def first(a):
        op = FUSED_OPS["sinkhorn_knopp"](launch.Options(), ROW_FIRST)
        return op.backward([a], [a], ())[0].sum()

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
    assert bodies == {"stream_mix_add", *["mhc_fused_backward"] * per_token}


@pytest.mark.parametrize("name", ["mhc_coefficients", "mhc_pre", "mhc_head"])
def test_vmap_of_streams_runs_kernels(name):
    """And shared parameters keep the backward's away: their gradients are sums over tokens."""
    x, *rest = CALLS[name]
    arrays = [a for a in rest if isinstance(a, mx.array)]
    statics = rest[len(arrays) :]

    def first(x, *arrays):
        made = getattr(ops, name)(x, *arrays, *statics)
        return made[0] if isinstance(made, tuple) else made

    def gradient(x):
        return mx.grad(lambda *a: (first(*a) ** 2).sum(), argnums=(0, 1))(x, *arrays)

    xs = mx.stack([x, 2 * x])
    with executor("stand-in") as launched:
        mx.eval(vmap(lambda x: first(x, *arrays))(xs))
        forward = {variant[1] for variant in launched}
        mx.eval(vmap(gradient)(xs))
    assert forward == {"mhc_pre", *["mixing_matrix"] * (name != "mhc_head")}
    assert {variant[1] for variant in launched} == forward


def mix_add(groups=3, threads=32, out=(X.shape, mx.float32), template=(), **inputs):
    whole = {"T": mx.float32, "N": N, "VEC": 4, "THREADS": threads}
    whole |= {"POST_PER_TOKEN": True, "RES_PER_TOKEN": False} | dict(template)
    arrays = {"x": X, "y": Y, "h_post": EACH, "h_res": MIX} | inputs
    return standin.run("stream_mix_add", arrays, {"out": out}, groups, threads, whole)


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
    assert mix_add()[0].shape == X.shape
    with pytest.raises(ValueError, match=r"\[stream_mix_add\] got"):
        mix_add(**wrong)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_array_of_any_launch_is_noticed(name, monkeypatch):
    """Of the forward and the backward: each array with one row more, and in another dtype."""
    launches = []

    def recorded(*args):
        launches.append(args)
        return standin.run(*args)

    arrays = [a for a in CALLS[name] if isinstance(a, mx.array)]
    statics = CALLS[name][len(arrays) :]
    with executor("stand-in"), monkeypatch.context() as patch:
        patch.setattr(launch, "run", recorded)
        out = getattr(ops, name)(*CALLS[name])
        cotangents = list(out) if isinstance(out, tuple) else [out]
        made = mx.vjp(lambda *a: getattr(ops, name)(*a, *statics), arrays, cotangents)[1]
        mx.eval(made)
    assert len({one[0] for one in launches}) >= 2
    for body, inputs, *rest in launches:
        for key, a in inputs.items():
            if a is None or key == "partial":  # whose rows are any
                continue
            with pytest.raises(ValueError, match=rf"\[{body}\] got"):
                longer = mx.concatenate([a, a[:1]])
                standin.run(body, inputs | {key: longer}, *rest)
            if key.lower() in standin.SAME | standin.FLOAT32:
                with pytest.raises(ValueError, match=rf"\[{body}\] got"):
                    standin.run(body, inputs | {key: a.astype(mx.float16)}, *rest)
