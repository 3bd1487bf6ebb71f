"""The ops inside MLX's transformations, with this machine's kernels, the stand-in and without."""

import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from cases import FUSED, OPS, Case
from mlx.utils import tree_flatten
from proof import executor

from mhc_mlx import (
    DEEPSEEK_V4,
    PAPER,
    ROW_FIRST,
    XING,
    HyperHead,
    MHCLayer,
    launch,
    ops,
    reference,
    vmap,
)
from mhc_mlx.conventions import ADDITIVE, IDENTITY, KRONECKER, MHC_LITE, UNCONSTRAINED

LEAD, N, C = (6,), 4, 40
DYNAMIC = (PAPER, ROW_FIRST, DEEPSEEK_V4, XING, MHC_LITE, KRONECKER, IDENTITY, UNCONSTRAINED)


@pytest.fixture(params=["gpu", "stand-in", "reference"])
def use_metal(request, need):
    if request.param == "reference":
        yield False
        return
    need(request.param)
    with executor(request.param):
        yield True


def inputs(lead=LEAD, dtype=mx.float32):
    mx.random.seed(3)
    x = mx.random.normal((*lead, N, C)).astype(dtype)
    gates = mx.random.normal((N,)), mx.random.normal((N,))
    return x, *gates, 2 * mx.random.normal((N, N)), mx.random.uniform(0.5, 1.5, (C,))


def close(got, want, bound=2e-5):
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            close(g, w, bound)
        return
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape)
    error = mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max().item()
    assert error <= bound * max(1.0, mx.abs(want.astype(mx.float32)).max().item()), error


def layer(use_metal):
    return lambda *a: ops.mhc_layer(*a, ROW_FIRST, 1e-5, use_metal=use_metal)


def results(made) -> list[mx.array]:
    """What a call returns, but for None."""
    return [r for r in made if r is not None] if isinstance(made, tuple) else [made]


def loss(f, weights):
    weights = weights if isinstance(weights, list) else [weights]

    def total(*a):
        pairs = zip(results(f(*a)), weights, strict=True)
        return sum((r.astype(mx.float32) * w).sum() for r, w in pairs)

    return total


def test_compiled_training_step(use_metal):
    arrays, weights = inputs(), mx.random.normal((*LEAD, N, C))
    step = mx.compile(mx.value_and_grad(loss(layer(use_metal), weights), argnums=tuple(range(5))))
    want = mx.value_and_grad(loss(reference.mhc_layer, weights), argnums=tuple(range(5)))(*arrays)
    for _ in range(2):
        got = step(*arrays)
        close(got[0], want[0])
        close(got[1], want[1])


def gradients(f, arrays):
    return mx.vjp(f, list(arrays), [mx.array(1.0)])[1]


FEW_ITERS = [replace(c, iters=3) for c in (PAPER, DEEPSEEK_V4)]


class Model(nn.Module):
    def __init__(self, use_metal, checkpoint, dynamic=False):
        super().__init__()
        mx.random.seed(5)
        options = {"use_metal": use_metal, "dynamic": dynamic}
        self.layers = [
            MHCLayer(N, C, convention=c, layer_idx=k, **options)
            for k, c in enumerate((*FEW_ITERS, MHC_LITE if dynamic else replace(ADDITIVE, iters=3)))
        ]
        self.head = HyperHead(C, N, use_metal=use_metal) if dynamic else None
        for layer in [*self.layers, self.head] if dynamic else []:  # so that tokens differ
            layer.phi, layer.alpha = 25 * layer.phi, 50 * layer.alpha
        self.linear = nn.Linear(C, C)
        self.wrap = nn.utils.checkpoint if checkpoint else lambda layer: layer

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.wrap(layer)(x)
        x = self.layers[-1](x, self.linear)
        return x if self.head is None else x + self.head(x)[..., None, :]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_training_of_a_model(use_metal, checkpoint, dynamic):
    """Three steps, the state of model and optimizer compiled in, against the reference's."""
    mx.random.seed(4)
    x, target = mx.random.normal((2, *LEAD, N, C))

    def train(model, compiled):
        optimizer = optim.SGD(1.0, momentum=0.9)
        gradient = nn.value_and_grad(model, lambda x: ((model(x) - target) ** 2).mean())

        def step(x):
            value, gradients = gradient(x)
            optimizer.update(model, gradients)
            return value

        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        return mx.stack([step(x) for _ in range(3)]), dict(tree_flatten(model.parameters()))

    start = dict(tree_flatten(Model(False, False, dynamic).parameters()))
    losses, parameters = train(Model(use_metal, checkpoint, dynamic), compiled=True)
    want_losses, want = train(Model(False, False, dynamic), compiled=False)
    close(losses, want_losses, 1e-4)
    for name in start:
        moved = want[name] - start[name]
        assert mx.abs(moved).max() > 1e-4, f"{name} does not train"
        error = mx.abs(parameters[name] - want[name]).max()
        assert error < 1e-2 * mx.abs(moved).max() + 1e-6, f"{name}: {error.item()}"


def calls(lead=LEAD, dtype=mx.float32):
    """Each op by what it is called for, with its arrays: streams of ``dtype``, the rest mixed; and
    its convention."""
    x, pre, post, res, weight = inputs(lead, dtype)
    y = mx.random.normal((*lead, C)).astype(dtype)
    post_each, res_each = mx.random.normal((*lead, N)), mx.random.normal((*lead, N, N))
    pre, post_each, res = pre.astype(mx.bfloat16), post_each.astype(mx.float16), res.astype(dtype)
    made = {
        "sinkhorn_knopp": ("sinkhorn_knopp", [res_each.astype(dtype)]),
        "aggregate": ("stream_aggregate_norm", [x, pre, weight]),
        "write": ("stream_mix_add", [x, y, post, res]),
        "write post": ("stream_mix_add", [x, y, post_each, res]),
        "write res": ("stream_mix_add", [x, y, post, res_each]),
        "write both": ("stream_mix_add", [x, y, post_each, res_each]),
        "write only": ("stream_mix_add", [x, y, post]),
        "static": ("mhc_static", [x, pre, post, res, weight]),
        "layer": ("mhc_layer", [x, pre, post, res, weight]),
        "read": ("stream_aggregate", [x, pre]),
        "read each": ("stream_aggregate", [x, post_each]),
    }
    made["seam"] = ("mhc_seam", [x, y, pre, post, res, weight])
    made["seam each"] = ("mhc_seam", [x, y, post_each, post_each[..., ::-1], res_each])
    for c in DYNAMIC:
        outs = 2 * N + c.res_size(N)
        phi = (mx.random.normal((outs, N * C)) / (N * C) ** 0.5).astype(dtype)
        bias, alpha = mx.random.normal((outs,)).astype(mx.float16), mx.random.uniform(0.5, 2, (3,))
        made[f"coefficients {c.name}"] = ("mhc_coefficients", [x, phi, bias, alpha], c)
        made[f"pre {c.name}"] = ("mhc_pre", [x, phi, bias, alpha], c)
        made[f"pre norm {c.name}"] = ("mhc_pre", [x, phi, bias, alpha, weight], c)
        if c in (DEEPSEEK_V4, XING, MHC_LITE, IDENTITY):
            made[f"single pass {c.name}"] = ("mhc_single_pass", [x, y, phi, bias, alpha, weight], c)
    made["head"] = ("mhc_head", [x, phi[:N], bias[:N], alpha[:1]], DEEPSEEK_V4)
    centred = mx.random.normal((N, C))
    made["norm"] = ("stream_norm", [x, centred])
    made["norm after a write-back"] = ("stream_norm", [x, centred, y, post])
    case = Case("stream_norm", lead, N, C, str(dtype).split(".")[-1], per_token=(True, True))
    made["norm and inject"] = ("stream_norm", case.arrays())
    for op in [op for op in FUSED if op not in {name for name, *_ in made.values()}]:
        c = [PAPER] if "convention" in OPS[op].statics else []
        case = Case(op, lead, N, C, str(dtype).split(".")[-1], *c, per_token=(True, True))
        made[op] = (op, case.arrays(), *c)
    return made


def functions(call, use_metal=True, **of_arrays):
    """The reference's function of a call, the op's, and their arrays."""
    name, arrays, *convention = calls(**of_arrays)[call]
    options = {"convention": convention[0]} if convention else {}
    plain = functools.partial(getattr(reference, name), **options)
    return plain, functools.partial(getattr(ops, name), **options, use_metal=use_metal), arrays


def random_like(made) -> list[mx.array]:
    return [mx.random.normal(r.shape) for r in results(made)]


@pytest.mark.parametrize("call", calls())
@pytest.mark.parametrize("lead", [LEAD, (2, 3), (2, 0), ()], ids=["tokens", "axes", "none", "one"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_results_and_gradient_of_every_array(use_metal, call, lead, dtype):
    """In place, in its array's shape and dtype, and the same where no other is asked for."""
    plain, op, arrays = functions(call, use_metal, lead=lead, dtype=dtype)
    made, wanted = results(op(*arrays)), results(plain(*arrays))
    assert [(r.shape, r.dtype) for r in made] == [(w.shape, w.dtype) for w in wanted]
    for r, w in zip(made, wanted, strict=True):
        if r.size:
            close(r, w, 2e-5 if r.dtype == mx.float32 else 1e-2)
    weights = random_like(plain(*arrays))
    f = loss(op, weights)
    got = gradients(f, arrays)
    assert [(g.shape, g.dtype) for g in got] == [(a.shape, a.dtype) for a in arrays]
    want = gradients(loss(plain, weights), arrays)
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.size:
            close(g, w, 2e-5 if g.dtype == mx.float32 else 1e-2)
            close(mx.grad(f, argnums=k)(*arrays), g, 0)


@pytest.mark.parametrize("call", calls())
def test_second_derivative_of_every_op(use_metal, call):
    plain, op, arrays = functions(call, use_metal)
    arrays = [a.astype(mx.float32) for a in arrays]
    weights = random_like(plain(*arrays))

    def curvature(f):
        squares = lambda *a: sum((g * g).sum() for g in gradients(loss(f, weights), a))  # noqa: E731
        return gradients(squares, arrays)

    close(curvature(op), curvature(plain), 1e-4)


@pytest.mark.parametrize("call", calls())
def test_checkpoint_of_every_op(use_metal, call):
    plain, op, arrays = functions(call, use_metal)
    weights = random_like(plain(*arrays))
    arrays = [a.astype(mx.float32) for a in arrays]
    got = gradients(loss(mx.checkpoint(lambda *a: tuple(results(op(*a)))), weights), arrays)
    close(got, gradients(loss(plain, weights), arrays))


@pytest.mark.parametrize("call", calls())
@pytest.mark.parametrize("mapped", ["tokens", "all"])
@pytest.mark.parametrize("gradient", [False, True], ids=["results", "gradients"])
def test_vmap_of_every_op(use_metal, call, mapped, gradient):
    """Over a leading axis of the arrays per token, or of all arrays: example by example."""
    plain, op, arrays = functions(call, use_metal, lead=(2, 3))
    arrays = [a.astype(mx.float32) for a in arrays]
    axes = [0 if a.shape[:2] == (2, 3) else None for a in arrays]
    if mapped == "all":
        pairs = zip(arrays, axes, strict=True)
        arrays = [mx.stack([a, a[::-1]]) if i is None else a for a, i in pairs]
        axes = [0] * len(arrays)

    def example(k):
        return [a if i is None else a[k] for a, i in zip(arrays, axes, strict=True)]

    weights = random_like(plain(*example(0)))

    def of(f):
        if gradient:
            return lambda *a: tuple(gradients(loss(f, weights), a))
        return lambda *a: tuple(results(f(*a)))

    got = vmap(of(op), in_axes=tuple(axes))(*arrays)
    each = zip(*(of(plain)(*example(k)) for k in range(2)), strict=True)
    close(got, [mx.stack(pair) for pair in each])


@pytest.mark.parametrize("call", calls())
def test_export_of_every_op(use_metal, call):
    plain, op, arrays = functions(call, use_metal)

    def f(*a):
        return tuple(results(op(*a, differentiable=False)))

    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(f"{folder}/op.mlxfn", f, *arrays)
        close(mx.import_function(f"{folder}/op.mlxfn")(*arrays), results(plain(*arrays)))


@pytest.mark.parametrize(
    "axes", [(0, None, None, None, None), (1, None, None, None, None), (0, 0, None, None, None)]
)
def test_vmap(use_metal, axes):
    x, *rest = inputs((3, 2))
    rest[0] = mx.random.normal((3, N)) if axes[1] == 0 else rest[0]
    got = vmap(layer(use_metal), in_axes=axes)(x, *rest)
    close(got, mx.vmap(reference.mhc_layer, in_axes=axes)(x, *rest))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("power", [1, 2], ids=["cotangent shared", "cotangent mapped"])
def test_vmap_of_gradient(use_metal, per_token, power):
    """A shared coefficient has one gradient per mapped example, not one for the whole batch."""
    x, weights = mx.random.normal((3, 2, N, C)), mx.random.normal((2, N, C))
    y, post = mx.random.normal((3, 2, C)), mx.random.normal((3, 2, N) if per_token else (N,))
    res = mx.random.normal((3, 2, N, N) if per_token else (N, N))
    axes = (0, 0, 0, 0) if per_token else (0, 0, None, None)

    def gradients(f):
        one = mx.grad(loss(lambda *a: f(*a) ** power, weights), argnums=(0, 1, 2, 3))
        return vmap(one, in_axes=axes)(x, y, post, res)

    got = gradients(lambda *a: ops.stream_mix_add(*a, use_metal=use_metal))
    close(got, gradients(reference.stream_mix_add))


COMBINATIONS = {  # of f [2, N, C] -> [2, N, C], a weight for its loss, and x and t [3, 2, N, C]
    "jvp": lambda f, w, x, t: mx.jvp(f, [x], [t]),
    "compile of jvp": lambda f, w, x, t: mx.compile(lambda x: mx.jvp(f, [x], [x])[1][0])(x),
    "vmap of jvp": lambda f, w, x, t: vmap(lambda x, t: mx.jvp(f, [x], [t])[1][0])(x, t),
    "jvp of vmap": lambda f, w, x, t: mx.jvp(vmap(f), [x], [t]),
    "jvp of checkpoint": lambda f, w, x, t: mx.jvp(mx.checkpoint(f), [x], [t]),
    "jvp of grad": lambda f, w, x, t: mx.jvp(mx.grad(loss(f, w)), [x], [t]),
    "vmap of jvp of grad": lambda f, w, x, t: vmap(
        lambda x, t: mx.jvp(mx.grad(loss(f, w)), [x], [t])[1][0]
    )(x, t),
    "jvp of vmap of grad": lambda f, w, x, t: mx.jvp(vmap(mx.grad(loss(f, w))), [x], [t]),
    "grad of jvp": lambda f, w, x, t: mx.grad(loss(lambda x: mx.jvp(f, [x], [t])[1][0], w))(x),
    "jvp of jvp": lambda f, w, x, t: mx.jvp(lambda x: mx.jvp(f, [x], [t])[1][0], [x], [t]),
    "third derivative": lambda f, w, x, t: mx.grad(
        lambda x: (mx.grad(lambda x: (mx.grad(loss(f, w))(x) * t).sum())(x) * t).sum()
    )(x),
    "vmap of checkpoint": lambda f, w, x, t: vmap(mx.checkpoint(f))(x),
    "vmap of vmap of checkpoint": lambda f, w, x, t: vmap(vmap(mx.checkpoint(f)))(x),
    "vmap of checkpoint of vmap": lambda f, w, x, t: vmap(mx.checkpoint(vmap(f)))(x),
    "checkpoint of vmap": lambda f, w, x, t: mx.grad(loss(mx.checkpoint(vmap(f)), w))(x),
    "vmap of compile": lambda f, w, x, t: vmap(mx.compile(f))(x),
    "compile of vmap": lambda f, w, x, t: mx.compile(vmap(f))(x),
    "compile of vmap of grad": lambda f, w, x, t: mx.compile(vmap(mx.grad(loss(f, w))))(x),
    "vmap to other axes": lambda f, w, x, t: vmap(f, in_axes=1, out_axes=2)(x),
    "vmap of vmap of grad": lambda f, w, x, t: vmap(vmap(mx.grad(loss(f, w[0]))))(x),
    "vmap of MLX's vmap": lambda f, w, x, t: vmap(mx.vmap(f))(x),
    "vmap of grad of grad": lambda f, w, x, t: vmap(
        lambda x, t: mx.grad(lambda x: (mx.grad(loss(f, w))(x) * t).sum())(x)
    )(x, t),
}


@pytest.mark.parametrize("rung", ["gpu", "stand-in"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_transformations_of_transformations(rung, dynamic, need):
    """Each as the same of the reference. What mx.compile made is not run: a CPU would compile C++
    for seconds, and the tests of training compare its numbers."""
    need(rung)
    x, t = mx.random.normal((2, 3, 2, N, C))
    w = mx.random.normal((2, N, C))
    options = {"dynamic": dynamic, "sinkhorn_iters": 3}
    layer, plain = (MHCLayer(N, C, use_metal=use, **options) for use in (True, False))
    if dynamic:
        layer.phi, layer.alpha = 25 * layer.phi, 50 * layer.alpha
    plain.update(layer.parameters())
    wanted = {name: of(plain, w, x, t) for name, of in COMBINATIONS.items()}
    with executor(rung) as launched:
        for name, of in COMBINATIONS.items():
            got, want = of(layer, w, x, t), wanted[name]
            if name.startswith("compile"):
                assert (got.shape, got.dtype) == (want.shape, want.dtype), name
            else:
                close(got, want, 1e-4)
        assert launched


@pytest.mark.parametrize("rung", ["gpu", "stand-in"])
def test_tangents_of_every_op_and_gradient(rung, need):
    """By every array at once, and by one, whose other tangents are None."""
    need(rung)
    for call in calls():
        plain, op, arrays = functions(call)
        arrays = [a.astype(mx.float32) for a in arrays]
        tangents = random_like(tuple(arrays))
        weights = random_like(plain(*arrays))

        def alone(f, arrays=arrays):
            return lambda x: tuple(results(f(x, *arrays[1:])))

        def pulled(f, arrays=arrays, weights=weights):
            return lambda x: gradients(loss(alone(f), weights), [x])[0]

        with executor(rung):
            got = mx.jvp(lambda *a: tuple(results(op(*a))), arrays, tangents)  # noqa: B023
            one = mx.jvp(alone(op), arrays[:1], tangents[:1])
            curved = mx.jvp(pulled(op), arrays[:1], tangents[:1])
        close(got, mx.jvp(lambda *a: tuple(results(plain(*a))), arrays, tangents), 1e-4)  # noqa: B023
        close(one, mx.jvp(alone(plain), arrays[:1], tangents[:1]), 1e-4)
        close(curved, mx.jvp(pulled(plain), arrays[:1], tangents[:1]), 1e-3)


def test_vmap_of_parameters_as_a_tree():
    """Over a module's parameters, and its gradient by each example's own."""
    layer = MHCLayer(N, C, dynamic=True)
    parameters = {k: mx.stack([a, 1.1 * a]) for k, a in layer.parameters().items()}
    x, w = mx.random.normal((2, 2, N, C))

    def call(parameters, x):
        return layer.update(parameters)(x)

    def each(f):
        return [f({k: a[i] for k, a in parameters.items()}, x) for i in range(2)]

    by = mx.grad(lambda p, x: (call(p, x) * w).sum())
    wanted, gradients = each(call), each(by)
    with executor("stand-in"):
        close(vmap(call, in_axes=(0, None))(parameters, x), mx.stack(wanted))
        got = vmap(by, in_axes=(0, None))(parameters, x)
    for k, g in got.items():
        close(g, mx.stack([each[k] for each in gradients]), 1e-4)


def test_export_of_modules():
    """Without a gradient; with one MLX says what it cannot record."""
    x = mx.random.normal((2, N, C))
    for module in (MHCLayer(N, C), MHCLayer(N, C, dynamic=True), HyperHead(C, N)):
        want = module(x)
        with executor("stand-in"), tempfile.TemporaryDirectory() as folder:
            with pytest.raises(ValueError, match="Unable to serialize primitive CustomTransforms"):
                mx.export_function(f"{folder}/f.mlxfn", module, x)
            module.differentiable = False
            mx.export_function(f"{folder}/f.mlxfn", module, x)
            close(mx.import_function(f"{folder}/f.mlxfn")(x), [want])


def test_vmap_of_one_array(use_metal):
    logits = mx.random.normal((5, 2, N, N))
    got = vmap(lambda a: ops.sinkhorn_knopp(a, DEEPSEEK_V4, use_metal=use_metal))(logits)
    close(got, reference.sinkhorn_knopp(logits, DEEPSEEK_V4))


def test_export_without_gradient(use_metal):
    arrays = inputs()

    def f(*a):
        return ops.mhc_layer(*a, PAPER, 1e-5, use_metal=use_metal, differentiable=False)

    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(f"{folder}/layer.mlxfn", f, *arrays)
        (got,) = mx.import_function(f"{folder}/layer.mlxfn")(*arrays)
        close(got, reference.mhc_layer(*arrays, PAPER, 1e-5))


def test_inside_a_larger_graph(use_metal):
    x, *rest = inputs(dtype=mx.bfloat16)

    def f(g):
        return lambda x, *a: g(g(x * 2, *a).swapaxes(-1, -2).swapaxes(-1, -2)[::2], *a)

    close(f(layer(use_metal))(x, *rest), f(reference.mhc_layer)(x, *rest), 2e-2)


@pytest.mark.parametrize("axis", ["tokens", "streams", "channels"])
def test_strided_slices(use_metal, axis):
    cut = {"tokens": np.s_[::2], "streams": np.s_[:, 1:5], "channels": np.s_[:, :, 3 : 3 + C]}[axis]
    shape = (12, 6 if axis == "streams" else N, C + 7 if axis == "channels" else C)
    x, rest = mx.random.normal(shape)[cut], inputs()[1:]
    close(layer(use_metal)(x, *rest), reference.mhc_layer(x, *rest))


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
@pytest.mark.parametrize("n", [4, 8, 33])
def test_threads_per_group(use_metal, threads, n):
    x, y = mx.random.normal((3, n, 260)), mx.random.normal((3, 260))
    arrays = [x, y, mx.random.normal((n,)), mx.random.normal((n, n))]
    weights = mx.random.normal(x.shape)
    options = {"use_metal": use_metal, "threads_per_group": threads}
    for op, args in (
        ("stream_mix_add", arrays),
        ("mhc_layer", [x, arrays[2], arrays[2][::-1], arrays[3], mx.random.normal((260,))]),
        ("sinkhorn_knopp", [arrays[3]]),
    ):
        w = weights if op != "sinkhorn_knopp" else weights[0, :, :n]
        wanted = tuple(range(len(args)))
        f = loss(lambda *a, op=op: getattr(ops, op)(*a, **options), w)
        got = mx.grad(f, argnums=wanted)(*args)
        want = mx.grad(loss(getattr(reference, op), w), argnums=wanted)(*args)
        close(got, want, 1e-4)


def test_verbose_prints_the_source(capfd):
    ops.stream_mix_add(mx.zeros((1, 4, 8)), mx.zeros((1, 8)), mx.zeros(4), verbose=True)
    printed = capfd.readouterr().out
    assert "stream_mix_add" in printed and "threadgroup_barrier" in printed


def test_in_another_thread():
    """What ops keep between calls is of no thread's stream, even if only a trace has used it."""
    x, y, h = mx.random.normal((3, 4, 8)), mx.random.normal((3, 8)), mx.random.normal((4,))
    mx.eval(x, y, h)
    op = lambda *arrays: ops.stream_mix_add(*arrays)  # noqa: E731, without h_res

    def run(f):
        made = f(x, y, h)
        mx.eval(made)
        return made

    with executor("stand-in"), ThreadPoolExecutor(1) as pool:
        ops.autodiff.identity.cache_clear()
        want = run(mx.compile(op))
        assert mx.allclose(pool.submit(run, op).result(), want).item()
        ops.autodiff.identity.cache_clear()
        pool.submit(op, x, y, h).result()
        assert mx.allclose(run(op), want).item()


def test_backend_says_what_runs():
    assert launch.backend() in (None, "metal", "cuda")
    assert (launch.backend() is None) == (mx.default_device().type == mx.DeviceType.cpu)
