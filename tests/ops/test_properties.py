"""Properties of the maths, on the reference, the simulator and the GPU."""

import itertools
from dataclasses import replace
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from cases import CONVENTIONS, EXACT
from proof import executor, oracle, set_tiling

from mhc_mlx import ADDITIVE, DEEPSEEK_V4, PAPER, ROW_FIRST, XING, Convention, launch, ops
from mhc_mlx.devices import APPLE, H100


@pytest.fixture(params=["reference", "simulator", "gpu"], autouse=True)
def runs(request, need):
    """Each test runs with kernels by this executor, and the same random arrays each time."""
    mx.random.seed(0)
    if request.param == "reference":
        if launch.backend():
            pytest.skip("reference: the default device has kernels")
        yield request.param
        return
    need(request.param)
    with executor(request.param):
        yield request.param


def bits(a: mx.array) -> bytes:
    return np.array(a.view(mx.uint16) if a.dtype.size == 2 else a).tobytes()


def logits_of(name: str, shape) -> mx.array:
    """Such that the convention's sums are far from 0."""
    return mx.random.uniform(0.1, 1, shape) if name == "ADDITIVE" else mx.random.normal(shape)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["PAPER", "ROW_FIRST", "DEEPSEEK_V4"])
def test_any_logits_give_finite_results(name, scale):
    logits = scale * mx.random.normal((8, 4, 4), key=mx.random.key(1))
    cotangent = mx.random.normal((8, 4, 4), key=mx.random.key(2))
    (h,), (gradient,) = mx.vjp(
        lambda a: ops.sinkhorn_knopp(a, CONVENTIONS[name]), [logits], [cotangent]
    )
    assert mx.isfinite(h).all() and mx.isfinite(gradient).all()
    wide, backward = oracle.sinkhorn_knopp(np.array(logits).astype(np.float64), CONVENTIONS[name])
    assert np.abs(np.array(h) - wide).max() < 1e-5 * max(1, scale)
    want = backward(np.array(cotangent).astype(np.float64))
    if scale <= 30:
        assert np.abs(np.array(gradient) - want).max() < 1e-5 * max(1, scale) * np.abs(want).max()


@pytest.mark.parametrize("n", [1, 3, 4, 8])
@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_rows_and_columns_sum_to_one(name, n):
    c = CONVENTIONS[name]
    h = np.array(ops.sinkhorn_knopp(logits_of(name, (8, n, n)), c))
    last = -1 if (c.first == "columns") != c.transposed else -2  # the axis of the last half-step
    assert np.abs(h.sum(last) - 1).max() < 3e-6
    assert np.abs(h.sum(-3 - last) - 1).max() < 1e-3  # truncated after 20 iterations
    assert (h >= 0).all()


def test_conventions_differ_from_each_other_and_their_transposes():
    logits = mx.random.uniform(0.5, 3, (4, 4), key=mx.random.key(5))
    different = [
        c for c in CONVENTIONS.values() if c.name != "XING"
    ]  # ROW_FIRST, at logits as small
    results = [np.array(ops.sinkhorn_knopp(logits, replace(c, iters=2))) for c in different]
    for i, a in enumerate(results):
        assert np.abs(a - a.T).max() > 1e-3
        for b in results[:i]:
            assert np.abs(a - b).max() > 1e-3


def projected(logits: mx.array, c: Convention) -> list[mx.array]:
    """h_res and the gradient of the logits."""
    g = mx.random.normal(logits.shape, key=mx.random.key(3))
    return [a[0] for a in mx.vjp(lambda a: ops.sinkhorn_knopp(a, c), [logits], [g])]


def test_a_clamp_that_cuts_nothing_changes_nothing():
    """Bit for bit, and exp_plain without eps is exp; a clamp is mx.clip before the projection."""
    logits = 3 * mx.random.normal((6, 4, 4), key=mx.random.key(1))
    wide, narrow = (-1e30, 1e30), (-2.0, 3.0)
    for c in (PAPER, DEEPSEEK_V4):
        for a, b in zip(
            projected(logits, c), projected(logits, replace(c, clamp=wide)), strict=True
        ):
            assert mx.array_equal(a, b).item(), c.name
        cut = projected(logits, replace(c, clamp=narrow))
        clipped = projected(mx.clip(logits, *narrow), c)
        assert mx.array_equal(cut[0], clipped[0]).item()
        inside = mx.logical_and(narrow[0] < logits, logits < narrow[1])
        assert mx.array_equal(cut[1], mx.where(inside, clipped[1], 0)).item()
        assert 0 < inside.sum().item() < logits.size
    plain = replace(ROW_FIRST, clamp=(-30.0, 30.0))
    found = [projected(logits, c) for c in (plain, replace(plain, start="exp_plain"))]
    assert all(mx.array_equal(a, b).item() for a, b in zip(*found, strict=True))


def test_gradient_at_the_ends_of_a_clamp():
    """As that of mx.clip: a logit at an end has none, its neighbour inside has one."""
    low, high = np.float32(-1.5), np.float32(2.0)
    inner = [np.nextafter(low, high), np.nextafter(high, low)]
    line = mx.array(np.array([low, *inner, high, low - 1, high + 1, 0, 1], np.float32))
    mask = mx.grad(lambda a: mx.clip(a, low.item(), high.item()).sum())(line)
    assert mask.tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    logits = mx.stack([mx.roll(line, k) for k in range(8)])
    masks = mx.stack([mx.roll(mask, k) for k in range(8)])
    for c in (XING, PAPER, DEEPSEEK_V4):
        c = replace(c, clamp=(low.item(), high.item()), eps=0.1)
        _, d = projected(logits, c)
        assert mx.array_equal(d != 0, masks == 1).item(), c.name


def test_exp_plain_of_equal_logits():
    """The first of them has the gradient of the maximum; a shift of a line changes nothing."""
    c = replace(XING, eps=0.3, iters=2)
    logits = mx.array([[1.0, 1, 1, 1], [0, 2, 2, -1], [0, 1, 2, 2], [-1, -1, -1, 0]])
    h, d = projected(logits, c)
    g = mx.random.normal(logits.shape, key=mx.random.key(3))
    want, back = oracle.sinkhorn_knopp(np.array(logits).astype(np.float64), c)
    dwant = back(np.array(g).astype(np.float64))
    assert np.abs(np.array(h) - want).max() < 1e-6 and np.abs(np.array(d) - dwant).max() < 1e-6
    assert np.abs(np.array(d).sum(-1)).max() < 1e-6 < np.abs(dwant).max()
    shifted = projected(logits + mx.array([[4.0], [-3.0], [0.5], [8.0]]), c)
    assert mx.array_equal(shifted[0], h).item()


def test_deepseek_without_eps_is_the_paper_transposed():
    """The projection, and the layer: output and gradients."""
    v4, logits = replace(DEEPSEEK_V4, eps=0.0, pre_eps=0.0), 2 * mx.random.normal((6, 4, 4))
    h = ops.sinkhorn_knopp(logits, v4)
    assert mx.abs(h - ops.sinkhorn_knopp(logits.swapaxes(-1, -2), PAPER)).max() < 4e-7
    x, cotangent = mx.random.normal((3, 4, 24)), mx.random.normal((3, 4, 24))
    arrays = [x, mx.random.normal((4,)), mx.random.normal((4,)), logits[0], mx.ones(24)]
    (a,), of_v4 = mx.vjp(lambda *b: ops.mhc_layer(*b, v4), arrays, [cotangent])
    arrays[3] = logits[0].T
    (b,), of_paper = mx.vjp(lambda *b: ops.mhc_layer(*b, PAPER), arrays, [cotangent])
    of_paper[3] = of_paper[3].T
    for g, w in zip([a, *of_v4], [b, *of_paper], strict=True):
        assert mx.abs(g - w).max() < 3e-6 * mx.abs(w).max()


ORDER = mx.array([2, 0, 3, 1])


def permuted(a: mx.array, axes: tuple[int, ...]) -> mx.array:
    for axis in axes:
        a = mx.take(a, ORDER, axis=axis)
    return a


@pytest.mark.parametrize("name", [None, *CONVENTIONS])
def test_permuting_streams_permutes_results(name):
    """Output and every gradient, of the write back (None) and of the layer by convention."""
    x, pre, post = mx.random.normal((3, 4, 24)), mx.random.normal((4,)), mx.random.normal((4,))
    if name is None:
        arrays = [x, mx.random.normal((3, 24)), post, mx.random.normal((4, 4))]
        axes, f = [(-2,), (), (0,), (0, 1)], ops.stream_mix_add
    else:
        arrays = [x, pre, post, logits_of(name, (4, 4)), mx.random.uniform(0.5, 1.5, (24,))]
        axes = [(-2,), (0,), (0,), (0, 1), ()]

        def f(*a):
            return ops.mhc_layer(*a, CONVENTIONS[name])

    cotangent = mx.random.normal(x.shape)
    out, gradients = mx.vjp(f, arrays, [cotangent])
    moved = [permuted(a, along) for a, along in zip(arrays, axes, strict=True)]
    of_moved = mx.vjp(f, moved, [permuted(cotangent, (-2,))])
    axes = [(-2,), *axes]
    for a, b, along in zip(out + gradients, of_moved[0] + of_moved[1], axes, strict=True):
        assert mx.abs(permuted(a, along) - b).max() < 3e-6 * mx.abs(a).max()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("n", [1, 4, 12])
def test_identity_and_no_write_return_x(n, dtype):
    x = (1e4 * mx.random.normal((3, n, 24))).astype(dtype)
    y, zeros = mx.random.normal((3, 24)).astype(dtype), mx.zeros(n)
    for h_res in (mx.eye(n), None):
        assert bits(ops.mhc_static(x, mx.ones(n), zeros, h_res, mx.ones(24))) == bits(x)
        assert bits(ops.stream_mix_add(x, y, zeros, h_res)) == bits(x)


def per_token(n, C, tokens, dtype):
    """By op: a function of arrays that all have an entry per token, and those arrays."""
    x, y = mx.random.normal((tokens, n, C)).astype(dtype), mx.random.normal((tokens, C))
    pre, post, res = mx.random.normal((n,)), mx.random.normal((n,)), mx.random.normal((n, n))
    weight, logits = mx.ones(C), mx.random.normal((tokens, n, n))
    posts = mx.random.normal((tokens, n))
    return {
        "mhc_layer": (lambda x: ops.mhc_layer(x, pre, post, res, weight), [x]),
        "mhc_static": (lambda x: ops.mhc_static(x, pre, post, res, weight), [x]),
        "stream_aggregate_norm": (lambda x: ops.stream_aggregate_norm(x, pre, weight), [x]),
        "stream_mix_add": (ops.stream_mix_add, [x, y.astype(dtype), posts, logits]),
        "sinkhorn_knopp": (ops.sinkhorn_knopp, [logits]),
    }


OPS = ("mhc_layer", "mhc_static", "stream_aggregate_norm", "stream_mix_add", "sinkhorn_knopp")


@pytest.fixture
def few_groups(runs):
    numbers = {"one_launch_tokens": 4, "forward_groups": 4, "many_groups": 4}
    with set_tiling(**numbers, backward_threads=4 * 128):
        yield


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("n", [4, 12])
@pytest.mark.parametrize("op", OPS)
def test_a_token_does_not_depend_on_its_neighbours(op, n, dtype, few_groups):
    """Bit for bit, forward and gradient: how many tokens are in the call, which, in what order.

    More than four tokens are many here: they share threadgroups and a launch of the projection.
    """
    f, arrays = per_token(n, 72, 9, dtype)[op]
    cotangent = mx.random.normal(f(*arrays).shape).astype(f(*arrays).dtype)

    def run(tokens):
        tokens = mx.array(list(tokens))
        outputs, gradients = mx.vjp(f, [a[tokens] for a in arrays], [cotangent[tokens]])
        return outputs + gradients

    whole = run(range(9))
    for tokens in ([0], [4], [8], [7, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
        for part, all_of_it in zip(run(tokens), whole, strict=True):
            assert bits(part) == bits(all_of_it[mx.array(tokens)]), tokens


def dynamic_arrays(n, C, dtype):
    """x of nine tokens, phi, bias, alpha and weight."""
    outs = 2 * n + n * n
    phi = mx.random.normal((outs, C * n))
    return mx.random.normal((9, n, C)).astype(dtype), phi, mx.random.normal((outs,)), mx.ones(3)


FEW = ([0], [4], [8], [7, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0])  # of nine tokens


@pytest.fixture
def few_tokens(runs):
    """Nine tokens are many, and of less than three the projection is a sweep."""
    if runs == "reference":
        pytest.skip("reference: MLX's products of matrices depend on their size")
    with set_tiling(few_tokens=4, few_backward_tokens=4, partial_logits_tokens=2):
        yield


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("n", [4, 12])
def test_a_token_of_mhc_pre_does_not_depend_on_its_neighbours(n, dtype, few_tokens):
    """Likewise, where a token is one of a tile, large or small, or shared by many threadgroups."""
    x, *rest = dynamic_arrays(n, 264, dtype)
    rest.append(None if dtype == mx.bfloat16 else mx.ones(264))
    cotangents = [mx.random.normal(a.shape).astype(a.dtype) for a in ops.mhc_pre(x, *rest)]

    def run(tokens):
        made = mx.vjp(lambda x: ops.mhc_pre(x, *rest), [x[tokens]], [c[tokens] for c in cotangents])
        return made[0] + made[1]

    whole = run(mx.arange(9))
    for tokens in FEW:
        for part, all_of_it in zip(run(mx.array(tokens)), whole, strict=True):
            assert bits(part) == bits(all_of_it[mx.array(tokens)]), tokens


@pytest.mark.parametrize("n, dtype", [(4, mx.float32), (4, mx.bfloat16), (8, mx.float16)])
def test_speculative_tokens_are_decoded_ones(n, dtype, few_tokens):
    """mhc_single_pass of many tokens at once, of few in two launches, and of few with gradients."""
    x, *rest = dynamic_arrays(n, 264, dtype)
    y, weight = mx.random.normal((9, 264)).astype(dtype), mx.random.uniform(0.5, 1.5, (264,))

    def run(tokens, differentiable):
        tokens, options = mx.array(tokens), {"differentiable": differentiable}
        arrays = (x[tokens], y[tokens], *rest, weight)
        return ops.mhc_single_pass(*arrays, round_aggregate=True, **options)

    whole = run(list(range(9)), True)
    for sweep in (2, 16):  # a token a threadgroup, and several in turn
        with set_tiling(partial_logits_tokens=sweep):
            parts = [(k, run(k, differentiable)) for k in FEW for differentiable in (False, True)]
        for tokens, made in parts:
            for part, all_of_it in zip(made, whole, strict=True):
                assert bits(part) == bits(all_of_it[mx.array(tokens)]), tokens


@pytest.mark.parametrize("device", [H100, APPLE], ids=lambda device: device.name)
def test_a_token_at_the_limits_of_a_device(device, runs):
    """At the real limits a token has the bits that it has alone: in partial logits, and in tiles of
    8 and of 16 tokens."""
    if runs == "reference":
        pytest.skip("reference: MLX's products of matrices depend on their size")
    n, C, run, forms = 4, 72, launch.run, []
    few, most = device.partial_logits_tokens, device.few_tokens
    counts = (1, few, few + 1, most, most + 1)
    _, *rest = dynamic_arrays(n, C, mx.bfloat16)
    x = mx.random.normal((most + 1, n, C)).astype(mx.bfloat16)

    def noted(name, inputs, outputs, groups, threads, template, verbose=False):
        forms.append((name, template.get("TILES")))
        return run(name, inputs, outputs, groups, threads, template, verbose)

    with set_tiling(partial_logits_tokens=few, few_tokens=most):
        with mock.patch.object(launch, "run", noted):
            made = {k: ops.mhc_coefficients(x[:k], *rest) for k in counts}
    partial = [("mhc_pre_partial_logits", None), ("mhc_seam", None)]
    assert forms == 2 * partial + [("mhc_pre", tiles) for tiles in (1, 1, 2)]
    for count, parts in made.items():
        for part, all_of_it in zip(parts, made[most + 1], strict=True):
            assert bits(part) == bits(all_of_it[:count]), count


def test_round_aggregate_rounds_where_mlx_does():
    """u is rms_norm, in bfloat16, of the aggregate in bfloat16. A sum in another order moves a tie:
    of these 9 x 512 elements at most five; without rounding in between, a third."""
    x, y = (mx.random.normal(s).astype(mx.bfloat16) for s in ((9, 4, 512), (9, 512)))
    pre, post, res = (mx.random.uniform(0.1, 1, (9, *s)) for s in ((4,), (4,), (4, 4)))
    weight = mx.random.uniform(0.5, 1.5, (512,)).astype(mx.bfloat16)
    want = ops.stream_mix_add(x, y, post, res)
    wanted = mx.fast.rms_norm(ops.stream_aggregate(want, pre), weight, 1e-6)
    different = []
    for rounded in (True, False):
        out, u = ops.mhc_seam(x, y, pre, post, res, weight, 1e-6, rounded)
        assert bits(out) == bits(want)
        different.append((u != wanted).sum().item())
    assert different[0] <= 5 and different[1] > 500, different


def test_nan_stays_in_its_token():
    x = mx.random.normal((5, 4, 24))
    x[2, 1, 3] = float("nan")
    x[3, 0, 0] = float("inf")
    out = ops.mhc_layer(x, mx.zeros(4), mx.zeros(4), mx.eye(4), mx.ones(24))
    finite = np.isfinite(np.array(out)).all(axis=(1, 2))
    assert finite.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("op", ["mhc_pre", "mhc_single_pass"])
def test_nan_stays_in_its_token_among_tiles(op, dtype, tokens):
    """Forward, and in the gradients per token; a tile has rows for tokens that there are not."""
    x, *rest = dynamic_arrays(4, 24, dtype)
    x = x[:tokens]
    x[1, 2, 3] = float("nan")
    y = [mx.random.normal((tokens, 24)).astype(dtype)] * (op == "mhc_single_pass")
    arrays = [x, *y]

    def f(*arrays):
        return getattr(ops, op)(*arrays, *rest, mx.ones(24))

    cotangents = [mx.random.normal(a.shape).astype(a.dtype) for a in f(*arrays)]
    made = [a for part in mx.vjp(f, arrays, cotangents) for a in part]
    finite = [mx.isfinite(a.reshape(tokens, -1).astype(mx.float32)).all(axis=1) for a in made]
    assert not any(f[1].item() for f in finite)
    assert all(f[k].item() for f in finite for k in range(tokens) if k != 1)


def test_zero_rows_and_extreme_gates():
    x = mx.zeros((2, 4, 24))
    gates = mx.array([1e4, -1e4, 0.0, 30.0])
    arrays = [x, gates, -gates, 1e4 * mx.random.normal((4, 4)), mx.ones(24)]
    (out,), gradients = mx.vjp(lambda *a: ops.mhc_layer(*a), arrays, [mx.random.normal(x.shape)])
    assert (out == 0).all()
    assert all(mx.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("n", [4, 12])
@pytest.mark.parametrize("op", ["mhc_layer", "stream_mix_add"])
def test_same_input_same_bits(op, n):
    """Sums over tokens too."""
    x, y = mx.random.normal((7, n, 129)), mx.random.normal((7, 129))
    pre, post, res = mx.random.normal((n,)), mx.random.normal((n,)), mx.random.normal((n, n))
    arrays = [x, y, post, res] if op == "stream_mix_add" else [x, pre, post, res, mx.ones(129)]
    cotangent = mx.random.normal(x.shape)

    def run():
        outputs, gradients = mx.vjp(lambda *a: getattr(ops, op)(*a), arrays, [cotangent])
        return [bits(a) for a in outputs + gradients]

    assert run() == run()


@pytest.mark.parametrize("op", OPS)
def test_zero_tokens(op):
    """Empty results of the right shape and dtype; a sum over no tokens is 0."""
    f, arrays = per_token(4, 24, 0, mx.bfloat16)[op]
    shape = {"stream_aggregate_norm": (0, 24), "sinkhorn_knopp": (0, 4, 4)}.get(op, (0, 4, 24))
    dtype = mx.float32 if op == "sinkhorn_knopp" else mx.bfloat16
    if op == "stream_mix_add":
        arrays[2:] = mx.ones(4), mx.eye(4)
    outputs, gradients = mx.vjp(f, arrays, [mx.zeros(shape, dtype)])
    assert (outputs[0].shape, outputs[0].dtype) == (shape, dtype)
    assert [(g.shape, g.dtype) for g in gradients] == [(a.shape, a.dtype) for a in arrays]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_zero_matrices(name):
    empty = mx.zeros((2, 0, 4, 4))
    outputs, gradients = mx.vjp(
        lambda a: ops.sinkhorn_knopp(a, CONVENTIONS[name]), [empty], [empty]
    )
    assert outputs[0].shape == gradients[0].shape == empty.shape


def test_additive_zero_start_is_near_the_identity():
    h = ops.sinkhorn_knopp(mx.zeros((4, 4)), ADDITIVE)
    assert mx.abs(h - mx.eye(4)).max() < 1e-6


def test_iterations_are_not_run_to_convergence():
    logits = 5 * mx.random.normal((4, 4), key=mx.random.key(0))
    results = [ops.sinkhorn_knopp(logits, replace(ROW_FIRST, iters=k)) for k in (1, 2, 20)]
    assert mx.abs(results[0] - results[1]).max() > 1e-3
    assert mx.abs(results[1] - results[2]).max() > 1e-3


def h_res_of(logits: mx.array, n: int, convention, op: str) -> mx.array | None:
    """h_res of logits [tokens, R], through `project` or as the bias of one token per call."""
    if op == "project":
        return ops.project(logits, n, convention)
    outs = 2 * n + convention.res_size(n)
    x, phi, alpha = mx.ones((1, n, 8)), mx.zeros((outs, 8 * n)), mx.ones(3)
    biases = [mx.concatenate([mx.zeros(2 * n), token]) for token in logits]
    made = [ops.mhc_coefficients(x, phi, bias, alpha, convention)[2] for bias in biases]
    return None if made[0] is None else mx.concatenate(made)


# Where mhc_coefficients is fused, its own bodies make h_res.
THROUGH = ("project", "mhc_coefficients")
KRON, LITE = EXACT["KRONECKER"], EXACT["MHC_LITE"]


@pytest.mark.parametrize("op", THROUGH)
def test_presets_differ_from_each_other_and_their_transposes(op):
    """From the first R of the same logits; KRONECKER and IDENTITY are symmetric. At logits as small
    XING is ROW_FIRST: test_vlm_conventions.py has those that tell them apart."""
    logits = mx.random.uniform(0.5, 3, (1, 24), key=mx.random.key(5))
    presets = {k: replace(c, iters=2) for k, c in CONVENTIONS.items()} | EXACT
    for same in ("XING", "HUNYUAN_V4", "HUNYUAN_V4_POST_EPS"):  # the last two as IDENTITY
        del presets[same]
    if op == "mhc_coefficients":  # not of per-token logits
        del presets["ADDITIVE"]
    made = {}
    for name, c in presets.items():
        h = h_res_of(logits[:, : c.res_size(4)], 4, c, op)
        made[name] = np.eye(4) if h is None else np.array(h)[0]
    for name, a in made.items():
        symmetric = name in ("KRONECKER", "IDENTITY")
        assert (np.abs(a - a.T).max() > 1e-3) != symmetric, name
        for other in made:
            if other != name:
                assert np.abs(a - made[other]).max() > 1e-3, (name, other)


@pytest.mark.parametrize("op", THROUGH)
@pytest.mark.parametrize(
    "convention, n", [(LITE, n) for n in range(1, 6)] + [(KRON, 2**k) for k in range(1, 6)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_exact_rows_and_columns_sum_to_one(convention, n, scale, op):
    """Off by rounding alone, with R logits at most 2R times.

    Of n! weights: their sum, then the sum of the line. Of log2(n) = R/2 pairs: the sum of the pair,
    its inverse, the quotient and the product.
    """
    h = np.array(h_res_of(scale * mx.random.normal((8, convention.res_size(n))), n, convention, op))
    assert h.shape == (8, n, n) and (h >= 0).all()
    for axis in (-1, -2):
        off = np.abs(h.astype(np.float64).sum(axis) - 1).max()
        assert off <= 2 * convention.res_size(n) * 2**-24


@pytest.mark.parametrize("op", THROUGH)
@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_kronecker_is_the_product_of_its_pairs_first_outermost(n, op):
    """Each of at most 5 pairs rounded at most 5 times: difference, exp, sum, quotient, product."""
    logits = mx.random.normal((3, KRON.res_size(n)))
    h = np.array(h_res_of(logits, n, KRON, op))
    for token, got in zip(np.array(logits).astype(np.float64), h, strict=True):
        want = np.ones((1, 1))
        for a, b in np.exp(token).reshape(-1, 2):
            want = np.kron(want, np.array([[a, b], [b, a]]) / (a + b))
        assert np.abs(got - want).max() < 25 * 2**-24 * want.max()


@pytest.mark.parametrize("op", THROUGH)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_huge_logit_is_that_permutation(n, op):
    """Row i has its 1 in column order[i]; the orders are those of itertools."""
    orders = list(itertools.permutations(range(n)))
    some = sorted({0, 1 % len(orders), len(orders) // 2, len(orders) - 1})
    h = np.array(h_res_of(1e4 * mx.eye(len(orders))[mx.array(some)], n, LITE, op))
    for k, got in zip(some, h, strict=True):
        want = np.zeros((n, n))
        want[np.arange(n), orders[k]] = 1
        assert (got == want).all(), orders[k]


@pytest.mark.parametrize("op", THROUGH)
def test_identity_has_no_mixing_matrix(op):
    assert h_res_of(mx.zeros((1, 0)), 4, EXACT["IDENTITY"], op) is None


@pytest.mark.parametrize("norm", [False, True])
def test_mhc_pre_passes_x_through(norm):
    x = (1e4 * mx.random.normal((3, 4, 24))).astype(mx.bfloat16)
    phi, bias = mx.random.normal((24, 96)), mx.random.normal((24,))
    made = ops.mhc_pre(x, phi, bias, mx.ones(3), mx.ones(24) if norm else None)
    assert bits(made[3]) == bits(x)


@pytest.mark.parametrize(
    "convention, n, words",
    [
        (LITE, 6, "at most 5 with MHC_LITE.* but got 6: KRONECKER"),
        (KRON, 6, "a power of two with KRONECKER but got 6"),
        (KRON, 12, "a power of two with KRONECKER but got 12"),
    ],
    ids=str,
)
def test_streams_that_a_projection_lacks(convention, n, words):
    with pytest.raises(ValueError, match=rf"\[some_op\] n must be {words}"):
        convention.check_streams("some_op", n)
    with pytest.raises(ValueError, match=rf"\[res_size\] n must be {words}"):
        convention.res_size(n)
    x, outs = mx.ones((2, n, 8)), 2 * n + 1
    arrays = [x, mx.ones((outs, 8 * n)), mx.ones(outs), mx.ones(3)]
    with pytest.raises(ValueError, match=rf"\[mhc_coefficients\] n must be {words}"):
        ops.mhc_coefficients(*arrays, convention)
    with pytest.raises(ValueError, match=rf"\[mhc_pre\] n must be {words}"):
        ops.mhc_pre(*arrays, None, convention)


@pytest.mark.parametrize("convention", [*CONVENTIONS.values(), *EXACT.values()], ids=str)
def test_streams_that_a_projection_has(convention):
    for n in {"MHC_LITE": range(1, 6), "KRONECKER": (1, 2, 4, 8, 16, 32, 64)}.get(
        convention.name, (1, 3, 6, 64)
    ):
        convention.check_streams("some_op", n)


@pytest.mark.parametrize("n, C", [(4, 4096), (12, 8192), (16, 4096), (64, 512)])
def test_few_variants_for_any_number_of_tokens(n, C):
    """Each is compiled while a program runs."""
    outs, tokens = 2 * n + n * n, [*range(1, 1300), *range(1300, 9000, 37)]
    shape = (n, C, mx.bfloat16, outs)
    projections = {ops.tiling.logits_tiling(*shape, t, None, APPLE) for t in tokens}
    tilings = [ops.tiling.generic_gradient_tiling(n, C, outs, t, None, APPLE) for t in tokens]
    spreads = {tiling._replace(rows=0) for tiling in tilings}  # of which a body knows all but rows
    assert len(projections) <= 8 and len(spreads) <= 10
    for g in projections:  # the first threadgroup makes all of h_pre
        blocks = -(-outs // (8 * g.block))
        assert g.splits <= blocks and -(-blocks // g.splits) * 8 * g.block >= n
