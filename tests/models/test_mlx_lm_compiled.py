"""Compiled sites of `mhc_mlx.models`: their traces, and what they launch."""

import concurrent.futures

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: its adapter is not tested")

from mhc_mlx import launch, ops  # noqa: E402
from mhc_mlx.models.exact import random_inputs  # noqa: E402
from mhc_mlx.models.family import Options  # noqa: E402
from mhc_mlx.models.times import random_sites  # noqa: E402
from models import modules  # noqa: E402
from models.tiny_deepseek import (  # noqa: E402
    exactly,
    family,
    find_sites,
    patched,
    run_ours,
    streams_dtype,
    tiny,
    within,
)


@pytest.fixture
def launches(monkeypatch):
    """Names of the bodies that Python launches, by the stand-in: none where a trace is used. On a
    GPU `mx.compile` would fuse the stand-in's own ops, and round them otherwise."""
    with mx.stream(mx.cpu), modules.running("stand-in"), monkeypatch.context() as context:
        usual, names = launch.run, []
        counted = lambda name, *rest: names.append(name) or usual(name, *rest)  # noqa: E731
        context.setattr(launch, "run", counted)
        yield names


def run(site, x, y):
    made = run_ours(site, x, y)
    mx.eval(made)
    return made


def uncompiled(site, x, y):
    mx.disable_compile()
    try:
        return run(site, x, y)
    finally:
        mx.enable_compile()


def same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            exactly(a, b)


@pytest.mark.parametrize("kind, wide", [("float32", False), ("4-bit", False), ("4-bit", True)])
def test_sites_share_a_trace_of_each_shape(kind, wide, launches):
    """All with a norm one, the last one another; bit for bit what each makes uncompiled."""
    model = patched(tiny(kind=kind))
    dtype, sites = streams_dtype(model), find_sites(model)
    for count, traced in ((3, False), (1, False), (3, True), (40, False)):
        for k, site in enumerate(sites):
            x, y = random_inputs(site, dtype, count, k)
            y = y.astype(mx.float32) * (1 + 2**-10) if wide else y
            launches.clear()
            got = run(site, x, y)
            assert bool(launches) == (not traced and site in (sites[0], sites[-1]))
            same(got, uncompiled(site, x, y))


def test_a_compiled_site_follows_its_parameters(launches):
    site = find_sites(patched(tiny()))[1]
    x, y = random_inputs(site, mx.float32, 3)
    before = run(site, x, y)
    for module, name in (
        *((site.hc, "fn"), (site.hc, "base"), (site.hc, "scale"), (site.norm, "weight")),
    ):
        module.update({name: 1.5 * module[name]})
        launches.clear()
        after = run(site, x, y)
        assert not launches
        same(after, uncompiled(site, x, y))
        assert not mx.array_equal(before[1], after[1]).item(), name
        before = after


def test_a_compiled_site_follows_its_constants(launches):
    site = find_sites(patched(tiny()))[1]
    x, y = random_inputs(site, mx.float32, 3)
    before = run(site, x, y)
    for module, name in (
        *((site.hc, "iters"), (site.hc, "hc_eps"), (site.hc, "norm_eps"), (site.norm, "eps")),
    ):
        setattr(module, name, 1 if name == "iters" else 0.1)
        after = run(site, x, y)
        same(after, uncompiled(site, x, y))
        assert not mx.array_equal(before[1], after[1]).item(), name
        before = after


def test_sites_that_are_not_compiled(launches, monkeypatch):
    """With a gradient, without kernels, without a GPU, without tokens, and of a length that is no
    decoder's and no whole chunk: each call calls the op."""
    site = find_sites(patched(tiny()))[1]
    x, y = random_inputs(site, mx.float32, 3)
    rest, chunk = (random_inputs(site, mx.float32, length) for length in (65, 256))
    with monkeypatch.context() as context:
        op, calls = ops.mhc_single_pass, []
        counted = lambda *args, **options: calls.append(options) or op(*args, **options)  # noqa: E731
        context.setattr(ops, "mhc_single_pass", counted)
        none = (x[:, :0], y[:, :0])
        for given, backend, use_metal, differentiable, count in (
            *(((x, y), "metal", True, True, 2), ((x, y), "metal", False, False, 2)),
            *(((x, y), None, True, False, 2), (none, "metal", True, False, 2)),
            *((rest, "metal", True, False, 2), (chunk, "metal", True, False, 1)),
            ((x, y), "metal", True, False, 1),
        ):
            context.setattr(launch, "backend", lambda backend=backend: backend)
            site.hc._mhc.sites[""] = Options(use_metal, differentiable)
            calls.clear()
            for _ in range(2):
                assert [a.shape[1] for a in run(site, *given)] == 3 * [given[0].shape[1]]
            options = {"use_metal": use_metal, "differentiable": differentiable}
            assert calls == count * [options | {"round_aggregate": True}]


def test_a_trace_is_of_one_backend(launches, monkeypatch):
    site = find_sites(patched(tiny()))[1]
    x, y = random_inputs(site, mx.float32, 3)
    with monkeypatch.context() as wrong:  # so that a trace that is used shows
        usual = launch.run
        wrong.setattr(launch, "run", lambda *call: [2 * a for a in usual(*call)])
        doubled = run(site, x, y)
    right = uncompiled(site, x, y)
    assert not mx.array_equal(doubled[0], right[0]).item()
    with monkeypatch.context() as moved:
        for backend, want in (("metal", doubled), ("cuda", right), (None, right)):
            moved.setattr(launch, "backend", lambda backend=backend: backend)
            for a, b in zip(run(site, x, y), want, strict=True):
                within(a, b, mx.float32)


def test_a_compiled_site_inside_others(tmp_path, launches):
    """Compiled and exported again, on a stream and in a thread, after it was traced alone."""
    site = find_sites(patched(tiny()))[1]
    x, y = random_inputs(site, mx.float32, 3)
    want = run(site, x, y)

    def f(x, y):
        return run_ours(site, x, y)

    launches.clear()
    same(mx.compile(f)(x, y), want)
    assert launches  # into the outer trace
    mx.export_function(str(tmp_path / "f.mlxfn"), f, x, y)
    same(mx.import_function(str(tmp_path / "f.mlxfn"))(x, y), want)
    with mx.stream(mx.new_stream(mx.default_device())):
        same(run(site, x, y), want)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        same(pool.submit(run, site, x, y).result(), want)


@pytest.mark.parametrize("count, most", [(1, 2), (16, 2), (17, 2), (2048, 2)])
def test_launches(count, most, launches):
    """Kernels of one sublayer at a model's size, recorded and not run; everything else that its
    graph has is a view."""
    (site,) = random_sites(4096, 1, family.FAMILY)
    run_ours(site, *random_inputs(site, mx.bfloat16, count))
    assert 1 <= len(launches) <= most, launches
