"""Where kernels run, whatever the default device is, and the source that ``verbose`` prints."""

import contextlib
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from cases import Case
from proof import standin, tracing

from mhc_mlx import DEEPSEEK_V4, PAPER, MHCLayer, launch, ops, reference, vmap
from mhc_mlx.conventions import KRONECKER, MHC_LITE, START_CODES
from mhc_mlx.ops.arrays import Params
from mhc_mlx.ops.autodiff import FUSED_OPS

N, C = 4, 8
GPU, SECOND = mx.Device(mx.gpu, 0), mx.Device(mx.gpu, 1)


class Devices:
    """Stand-ins for MLX's devices, with the kernels' stand-in on both GPUs.

    Attributes:
        current: The default devices that `mx.stream` has set; each thread starts with the first.
        launched: Name, backend and device of each launch.
    """

    def __init__(self, patch: pytest.MonkeyPatch, start: mx.Device):
        self.current, self.launched = [start], []
        patch.setattr(mx, "default_device", lambda: self.current[-1])
        patch.setattr(mx, "stream", self.stream)
        patch.setattr(
            mx, "device_info", lambda device: {"compute_capability_major": 8 + index(device)}
        )
        patch.setattr(launch, "run", self.run)

    @contextlib.contextmanager
    def stream(self, device):
        self.current.append(device)
        try:
            yield
        finally:
            self.current.pop()

    def run(self, name, *rest):
        self.launched.append((name, launch.backend(), mx.default_device()))
        return standin.run(name, *rest)


def index(device: mx.Device) -> int:
    return int(device == SECOND)


@pytest.fixture(params=["metal", "cuda"])
def devices(request, monkeypatch):
    """On a machine with two GPUs of which the CPU is the default."""
    for name in ("metal", "cuda"):
        available = request.param == name
        monkeypatch.setattr(
            getattr(mx, name), "is_available", lambda available=available: available
        )
    with monkeypatch.context() as patch:
        found = Devices(patch, mx.Device(mx.cpu, 0))
        found.backend = request.param
        launch._cuda_device.cache_clear()
        yield found
    launch._cuda_device.cache_clear()


def test_every_gpu_has_kernels(devices):
    """Devices are compared by type: a second one equals `mx.gpu` as little as the CPU does."""
    assert SECOND != mx.gpu and launch.backend() is None
    for device in (GPU, SECOND):
        with mx.stream(device):
            assert launch.backend() == devices.backend
    MHCLayer(N, C)(mx.zeros((2, N, C)))
    assert not devices.launched
    with mx.stream(SECOND):
        MHCLayer(N, C)(mx.zeros((2, N, C)))
    assert devices.launched == [("mhc_fused", devices.backend, SECOND)]
    if devices.backend == "cuda":  # rings fit the GPU that runs them
        rooms = []
        for device in (GPU, SECOND):
            with mx.stream(device):
                rooms.append(launch.device().ring_memory)
        assert rooms == [163 << 10, 227 << 10]


def arrays_of_mhc_pre():
    outs = 2 * N + N * N
    phi = mx.random.normal((outs, N * C)) * (N * C) ** -0.5
    x = mx.random.normal((3, 2, N, C))
    return [x, phi, mx.random.normal((outs,)), mx.random.uniform(0.5, 1.5, (3,))]


def dynamic(module, device=None):
    """A sublayer with coefficients per token, a scalar; its ops on the device."""

    def f(*arrays):
        with mx.stream(device) if device else contextlib.nullcontext():
            u, h_post, h_res, x = module.mhc_pre(*arrays)
            out = module.stream_mix_add(x, mx.tanh(u), h_post, h_res)
        return (out * out).sum()

    return f


EVERY = (0, 1, 2, 3)
GRADIENTS = {
    "grad": lambda f, map_: mx.grad(f, argnums=EVERY),
    "compiled": lambda f, map_: mx.compile(mx.grad(f, argnums=EVERY)),
    "checkpoint": lambda f, map_: mx.grad(mx.checkpoint(f), argnums=EVERY),
    "vmap": lambda f, map_: map_(mx.grad(f, argnums=EVERY), in_axes=(0, None, None, None)),
    "vmap of parameters": lambda f, map_: (
        lambda *a: map_(mx.grad(f, argnums=EVERY), in_axes=(None, None, 0, None))(
            a[0], a[1], mx.stack([a[2], a[2] + 1]), a[3]
        )
    ),
    "jvp": lambda f, map_: lambda *a: mx.jvp(f, list(a), list(a))[1],
    "second": lambda f, map_: mx.grad(
        lambda *a: sum((g * g).sum() for g in mx.grad(f, argnums=EVERY)(*a)), argnums=EVERY
    ),
    "jvp of grad": lambda f, map_: lambda *a: mx.jvp(mx.grad(f), list(a), list(a))[1],
}


def test_a_gradient_runs_where_its_forward_ran(devices):
    """Also where the default device is the CPU meanwhile, on which there are no kernels."""
    arrays, device = arrays_of_mhc_pre(), GPU if devices.backend == "metal" else SECOND
    for name, gradient in GRADIENTS.items():
        devices.launched.clear()
        got = gradient(dynamic(ops, device), vmap)(*arrays)
        if name != "compiled":  # on a CPU by a C++ compiler: there what was traced is enough
            want = gradient(dynamic(reference), mx.vmap)(*arrays)
            for g, w in zip(got, want, strict=True):
                error, most = mx.abs(g - w).max().item(), mx.abs(w).max().item()
                assert g.shape == w.shape and error <= 1e-4 * max(1, most), (name, error)
        # Not a set: equal devices of MLX have unequal hashes.
        assert devices.launched and all(
            one[1:] == (devices.backend, device) for one in devices.launched
        ), name
        backward = [k for k, *_ in devices.launched if "backward" in k]
        assert backward or "jvp" in name, name  # whose tangents are the reference's
        assert launch.backend() is None and len(devices.current) == 1


def test_a_gradient_of_the_reference_stays_on_the_cpu(devices):
    """Where the forward ran on the CPU, and the default device is the GPU at its gradient."""
    arrays = arrays_of_mhc_pre()
    got = dynamic(ops)(*arrays)
    with mx.stream(GPU):
        got = mx.grad(dynamic(ops, mx.Device(mx.cpu, 0)), argnums=EVERY)(*arrays)
    assert not devices.launched
    for g, w in zip(got, mx.grad(dynamic(reference), argnums=EVERY)(*arrays), strict=True):
        assert mx.allclose(g, w).item()


# ---- the source that verbose prints


def launching(x, y, h, logits):
    """Launches with every kind of template argument and arrays that are absent."""
    options = {"verbose": True, "differentiable": False}
    ops.stream_mix_add(x, y, h, **options)
    return ops.sinkhorn_knopp(logits, DEEPSEEK_V4, **options)


def arrays_of_launching(dtype=mx.bfloat16):
    x = mx.random.normal((3, N, C)).astype(dtype)
    return x, x[:, 0], mx.random.normal((N,)), mx.random.normal((N, N)).astype(dtype)


def test_source_is_what_mlx_generates():
    """Of another process as of this one, wherever this one runs."""
    arrays = arrays_of_launching()
    got = launch.metal_source(launching, *arrays)
    assert got.count("Generated source code for") == 2
    assert got.strip() == tracing.metal_source(launching, *arrays).strip()


PER_TOKEN = ("stream_aggregate", "stream_mix_add", "mhc_seam")
CONVENTION_OF = dict.fromkeys(("mhc_layer", "sinkhorn_knopp"), DEEPSEEK_V4)
SPECIAL = [("mhc_pre", 4, KRONECKER), ("mhc_coefficients", 4, MHC_LITE), ("mhc_pre", 12, PAPER)]
SPECIAL += [("mhc_single_pass", 4, KRONECKER), ("mhc_head", 12, PAPER)]


def calls_of_every_launch():
    """Each op with arrays shared and per token, 16 bits and 32, few streams and many: a case for
    each place that launches a kernel."""
    found = []
    for n, dtype in itertools.product((4, 12), ("float32", "bfloat16")):
        for op in FUSED_OPS:
            for each in ((False, False), (True, True)) if op in PER_TOKEN else ((False, False),):
                c, C = CONVENTION_OF.get(op, PAPER), n if op == "sinkhorn_knopp" else 8
                found.append(Case(op, (40,), n, C, dtype, c, per_token=each))
    found += [Case(op, (40,), n, 8, convention=c) for op, n, c in SPECIAL]
    return found + [Case(op, (2,), 4, 8, convention=PAPER) for op in ("mhc_pre", "mhc_single_pass")]


def test_options_reach_every_launch(monkeypatch):
    """Of every op and its gradient: verbose, and threads but where rows of sums are added."""
    launched, options = set(), {"threads_per_group": 96, "verbose": True}

    def run(name, inputs, outputs, groups, threads, template, verbose=False):
        assert verbose is options["verbose"], f"{name} of {case}: verbose is {verbose}"
        assert threads == 96 or name == "sum_partials", f"{name} of {case}: {threads} threads"
        launched.add(name)
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    for options["verbose"] in (True, False):
        for case in calls_of_every_launch():
            arrays = [a for a in case.arrays() if a is not None]

            def call(*arrays, case=case):
                out = getattr(ops, case.op)(*arrays, *case.statics, **options)
                return [a for a in out if a is not None] if isinstance(out, tuple) else [out]

            mx.vjp(call, arrays, [mx.zeros(a.shape, a.dtype) for a in call(*arrays)])
            getattr(ops, case.op)(*arrays, *case.statics, **options, differentiable=False)
    assert launched == {path.stem for path in launch._FOLDERS[1].glob("*.metal")}


def test_verbose_of_any_folder_and_path(tmp_path, monkeypatch, capsys):
    """The other process imports what this one does: its path, not the environment's."""
    launch._printed.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    x, y, h, _ = arrays_of_launching(mx.float32)
    with mx.stream(mx.cpu):  # on a GPU MLX itself prints
        out = ops.stream_mix_add(x, y, h, verbose=True)
        assert mx.array_equal(out, reference.stream_mix_add(x, y, h))
    printed = capsys.readouterr().out  # by Python, in the thread that asked
    assert "Generated source code for `stream_mix_add`" in printed and "threadgroup" in printed


def test_verbose_disturbs_no_other_thread(capfd):
    """While one thread traces, the others run, and print to the standard output."""
    x, y, h, _ = arrays = arrays_of_launching(mx.float32)
    mx.eval(arrays)

    def elsewhere():
        os.write(1, b"printed elsewhere\n")
        out = ops.stream_mix_add(x, y, h)
        mx.eval(out)
        return launch.backend(), out

    def traced(*arrays):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(elsewhere).result())
        return launching(*arrays)

    seen, here = [], launch.backend()
    source = launch.metal_source(traced, *arrays)
    assert "printed elsewhere" in capfd.readouterr().out and "printed elsewhere" not in source
    ((backend, out),) = seen
    assert backend == here and launch.backend() == here
    assert mx.allclose(out, reference.stream_mix_add(x, y, h)).item()


def test_verbose_says_why_it_cannot_print(monkeypatch):
    arrays = arrays_of_launching()
    monkeypatch.setattr(launch, "_PRINT", "raise SystemExit('no such place')")
    launch._printed.cache_clear()
    with pytest.raises(RuntimeError, match=r"\[verbose\] the process .* with 1: no such place"):
        launch.metal_source(launching, *arrays)
    monkeypatch.setattr("sys.frozen", True, raising=False)  # its executable is no interpreter
    with pytest.raises(RuntimeError, match=r"\[verbose\] needs a Python interpreter"):
        launch.metal_source(launching, *arrays)
    assert launch.backend() is None or mx.default_device().type == mx.DeviceType.gpu


def test_starts_have_the_names_and_values_of_the_header():
    (words,) = re.findall(r"enum \{ (START_[^}]*) \};", launch.text("include/sinkhorn.h"))
    values = dict(word.split(" = ") for word in words.split(", "))
    assert {f"START_{start.upper()}": str(code) for start, code in START_CODES.items()} == values


def test_params_have_the_slots_of_the_header():
    (words,) = re.findall(r"enum \{ (PRE_EPS[^}]*) \};", launch.text("include/common.h"))
    assert words.lower().split(", ") == [*Params._fields, "count"]
