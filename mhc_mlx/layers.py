"""Modules: parameters, initial values, calls to ops."""

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .conventions import MHC_LITE, PAPER, ROW_FIRST, SINKHORN, Convention
from .ops.checks import check_bools, check_dtype, check_number, check_sizes, check_type

__all__ = ["HyperConnection", "HyperHead", "MHCBlock", "MHCLayer", "MHCLiteBlock"]


def check_options(op: str, options: dict[str, Any], *taken: str) -> None:
    """That options are keywords of `HyperConnection`, but for those that are taken."""
    parameters = inspect.signature(HyperConnection.__init__).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken]
    for name in options:
        if name not in keywords:
            raise TypeError(f"[{op}] options must be of {', '.join(keywords)} but got {name}.")


def _check_input(module: nn.Module, x: mx.array, n: int, C: int) -> None:
    op = type(module).__name__
    check_dtype(op, x=x)
    if x.shape[-2:] != (n, C):
        must = f"have shape [..., n={n}, C={C}]"
        raise ValueError(f"[{op}] x must {must} but got {list(x.shape)}.")


def _logit(p: float) -> float:
    """Where the sigmoid is p, kept from 0.0001 to 0.9: beyond, a gate has hardly a gradient."""
    p = min(max(p, 1e-4), 0.9)
    return math.log(p / (1 - p))


def starting_logits(
    n: int, convention: Convention, layer_idx: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Starting H_pre [n], H_post [n] and H_res [R], as `HyperConnection` says."""
    c, R = convention, convention.res_size(n)
    if c.sigmoid:
        pre = [0.9 if j == layer_idx % n else 0.1 / (n - 1) for j in range(n)]
        H_pre = mx.array([_logit(p - c.pre_eps) for p in pre])
        H_post = mx.full(n, _logit((1 - c.post_eps) / (c.post_scale or 1)))
    else:
        H_pre, H_post = mx.full(n, 1 / n), mx.ones(n)

    def off(others: int) -> float:
        return -8 - math.log(max(others, 1))

    if c.start in ("exp", "softmax"):
        H_res = (off(n - 1) * (1 - mx.eye(n))).flatten()
    elif c.start == "permutations":
        H_res = mx.array([0.0] + [off(R - 1)] * (R - 1))
    elif c.start == "kronecker":
        H_res = mx.array([0.0, off(R // 2)] * (R // 2))
    else:
        H_res = mx.zeros(R)
    return H_pre, H_post, H_res


def _noise(outs: int, width: int) -> mx.array:
    """phi at the start."""
    return mx.random.normal((outs, width)) * (0.02 / math.sqrt(width))


# What `stability_report` makes of (connection, x, the streams after it), in its own thread.
observer: ContextVar[Callable[..., mx.array]] = ContextVar(
    "observer", default=lambda connection, x, out: out
)

_OPTIONS = ("use_metal", "threads_per_group", "differentiable")  # of ops, attributes of modules


def _checked_options(module: nn.Module) -> dict[str, Any]:
    """The options of ops as the module has them now: they may have been set since."""
    op, options = type(module).__name__, {k: getattr(module, k) for k in _OPTIONS}
    check_bools(op, use_metal=options["use_metal"], differentiable=options["differentiable"])
    return options  # ops check the threads


class HyperConnection(nn.Module):
    """Reads the streams for a sublayer and writes its output back, with coefficients per token.

        u, add_residual = connection(x)  # u = sum_j h_pre[j] x[j]
        x = add_residual(sublayer(u))    # x[i] = sum_j h_res[i, j] x[j] + h_post[i] y

    Dynamic (arXiv 2512.24880, eq. 3, 7-9): h_pre, h_post, h_res = mhc_coefficients(x, phi, bias,
    alpha) with parameters ``phi [2n + R, n*C]``, ``bias [2n + R]``, ``alpha [3]``; R is
    ``convention.res_size(n)``. Each token makes its own from its own streams: causal. Static: from
    ``H_pre [n]``, ``H_post [n]`` and ``H_res``, ``[n, n]`` or ``[R]``, for all tokens. Parameters
    start in float32, may be cast, and are read as float.

    The start preserves a network's function: on n > 1 equal streams it is ``x + F(x)``, but for
    rounding and, if dynamic, for the noise of phi: 1e-4 at the end of 12 of them.
        h_pre: 0.9 on stream ``layer_idx % n``, so that neighbours differ, and 0.1 / (n - 1)
            elsewhere. The sum is 1; for n = 1 it is 0.9, since a sigmoid at 1 has no gradient.
        h_post: 1, the middle of its gate.
        h_res: the identity but for e**-8 = 3e-4 that leaves each stream, so that a gradient comes
            back: logits 0 on the diagonal, -(8 + ln(n - 1)) elsewhere; MHC_LITE 0 on the identity,
            -(8 + ln(n! - 1)) on the other permutations; KRONECKER pairs (0, -(8 + ln log2 n)).
            UNCONSTRAINED and ADDITIVE are linear and start with zeros.
        phi: normal with deviation 0.02 / sqrt(n*C), so that at any width the noise that it adds to
            a logit is 0.02 * ``init_scale``: too small for the model to notice, and enough for
            alpha, which is ``init_scale``, to have a gradient at once, as phi has. The rows of
            h_res are 0 with UNCONSTRAINED, where no gate dampens them.
    ADDITIVE, static only, starts with h_pre = 1 / n. Streams that are equal copies hide h_res and,
    but for its sum, h_pre from the loss: at step 0 their gradients may be zero by symmetry.

    Args:
        dim: C, channels per stream.
        num_streams: n, 1 to 64; at most 5 with MHC_LITE, a power of two with KRONECKER.
        layer_idx: Which stream is read at the start.
        dynamic: Coefficients per token, or parameters.
        convention: How coefficients are made.
        sinkhorn_iters: Sinkhorn-Knopp iterations; None keeps the convention's, 20 in the presets.
            None for a convention without half-steps.
        init_scale: Start of alpha.
        norm_eps: Added to the mean square of a token's n*C elements, above 0.
        use_metal: Run the fused kernels where the default device has them (Metal or CUDA).
        threads_per_group: Threads in a threadgroup; None picks from the shape.
        differentiable: False calls the kernels bare: `mx.export_function` can record the module,
            and it has no gradient. Like the two before, an attribute that may be set later.
    """

    dim: int
    num_streams: int
    dynamic: bool
    norm_eps: float
    use_metal: bool
    threads_per_group: int | None
    differentiable: bool
    phi: mx.array
    bias: mx.array
    alpha: mx.array
    H_pre: mx.array
    H_post: mx.array
    H_res: mx.array

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        *,
        layer_idx: int = 0,
        dynamic: bool = True,
        convention: Convention = PAPER,
        sinkhorn_iters: int | None = None,
        init_scale: float = 0.01,
        norm_eps: float = 1e-6,
        use_metal: bool = True,
        threads_per_group: int | None = None,
        differentiable: bool = True,
    ):
        super().__init__()
        op, n = type(self).__name__, num_streams
        check_sizes(op, dim=(dim, math.inf), num_streams=(n, ops.MAX_STREAMS))
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"[{op}] layer_idx must be an int but got {type(layer_idx).__name__}.")
        ops.check_convention(op, convention)
        convention.check_streams(op, n)
        check_number(op, "init_scale", init_scale)
        check_bools(op, dynamic=dynamic, use_metal=use_metal, differentiable=differentiable)
        if sinkhorn_iters is not None:
            check_sizes(op, sinkhorn_iters=(sinkhorn_iters, math.inf))
        if dynamic and not convention.sigmoid:
            got = convention.name
            raise ValueError(f"[{op}] convention must have sigmoid gates if dynamic but got {got}.")
        ops.check_threads(op, threads_per_group)
        ops.check_eps(op, norm_eps, "norm_eps")
        self.dim, self.num_streams, self.dynamic, self.norm_eps = dim, n, dynamic, norm_eps
        if sinkhorn_iters is not None:
            if convention.start not in SINKHORN:
                name, got = convention.name, sinkhorn_iters
                raise ValueError(
                    f"[{op}] sinkhorn_iters must be None with {name}, which has no half-steps, "
                    f"but got {got}."
                )
            convention = replace(convention, iters=sinkhorn_iters)
        self._convention = convention
        self.use_metal, self.threads_per_group = use_metal, threads_per_group
        self.differentiable = differentiable
        H_pre, H_post, H_res = starting_logits(n, convention, layer_idx)
        if dynamic:
            self.phi = _noise(2 * n + H_res.size, n * dim)
            if convention.start == "unconstrained":  # no gate makes the noise of h_res small
                self.phi[2 * n :] = 0
            self.bias = mx.concatenate([H_pre, H_post, H_res])
            self.alpha = mx.full(3, init_scale)
        else:
            self.H_pre, self.H_post = H_pre, H_post
            if H_res.size:
                self.H_res = H_res.reshape(n, n) if H_res.size == n * n else H_res

    @property
    def convention(self) -> Convention:
        return self._convention

    @property
    def _options(self) -> dict[str, Any]:
        return _checked_options(self)

    def mixing_matrix(self) -> mx.array | None:
        """h_res ``[n, n]`` float32, row = output, of a static connection; None is the identity."""
        if self.dynamic:
            op = type(self).__name__
            raise ValueError(
                f"[{op}] dynamic must be False but got True: coefficients(x) has h_res."
            )
        if self._convention.start in SINKHORN:
            options: dict[str, Any] = self._options | {"threads_per_group": None}
            return ops.sinkhorn_knopp(self.H_res, self._convention, **options)
        logits = self.H_res.flatten() if "H_res" in self else mx.zeros(0)
        return ops.project(logits, self.num_streams, self._convention)

    def coefficients(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
        """h_pre, h_post and h_res for streams x, float32: per token, or static ones."""
        _check_input(self, x, self.num_streams, self.dim)
        if self.dynamic:
            arrays = (x, self.phi, self.bias, self.alpha)
            return ops.mhc_coefficients(*arrays, self._convention, self.norm_eps, **self._options)
        return *ops.gates(self.H_pre, self.H_post, self._convention), self.mixing_matrix()

    def _read(
        self, x: mx.array, weight: mx.array | None = None, eps: float = 1e-5
    ) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
        c, options = self._convention, self._options
        if self.dynamic:
            u, h_post, h_res, x = ops.mhc_pre(
                *(x, self.phi, self.bias, self.alpha, weight, c, self.norm_eps, eps), **options
            )
        else:
            h_pre, h_post, h_res = self.coefficients(x)
            if weight is None:
                u = ops.stream_aggregate(x, h_pre, **options)
            else:
                u = ops.stream_aggregate_norm(x, h_pre, weight, eps, **options)

        def add_residual(y: mx.array) -> mx.array:
            return observer.get()(self, x, ops.stream_mix_add(x, y, h_post, h_res, **options))

        return u, add_residual

    def __call__(self, x: mx.array) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
        """``[..., n, C]`` to u ``[..., C]`` and the function from y ``[..., C]`` to the streams,
        all in x's dtype.
        """
        _check_input(self, x, self.num_streams, self.dim)
        return self._read(x)

    def _extra_repr(self) -> str:
        c = self._convention
        return (
            f"n={self.num_streams}, C={self.dim}, convention={c.name}, iters={c.iters}, "
            f"dynamic={self.dynamic}"
        )


class MHCLayer(HyperConnection):
    """The self-contained layer of mHC.cu, static also of mhc-mlx and SuperFused.

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] F(RMSNorm(sum_j h_pre[j] x[j]))``: a
    `HyperConnection`, its parameters and its start, and ``rms_weight [C]``.

    Args:
        n: Streams, 1 to 64.
        C: Channels per stream.
        sinkhorn_iters: Sinkhorn-Knopp iterations; None keeps the convention's.
        eps: Of the RMSNorm, above 0.
        convention: How coefficients are made.
        dynamic: Coefficients per token, or parameters.
        options: Of `HyperConnection`: layer_idx, init_scale, norm_eps, use_metal,
            threads_per_group, differentiable.
    """

    eps: float
    rms_weight: mx.array

    def __init__(
        self,
        n: int,
        C: int,
        *,
        sinkhorn_iters: int | None = None,
        eps: float = 1e-5,
        convention: Convention = ROW_FIRST,
        dynamic: bool = False,
        **options: Any,
    ):
        check_sizes("MHCLayer", n=(n, ops.MAX_STREAMS), C=(C, math.inf))
        ops.check_eps("MHCLayer", eps)
        check_options("MHCLayer", options, "sinkhorn_iters", "convention", "dynamic")
        options |= {"sinkhorn_iters": sinkhorn_iters, "convention": convention, "dynamic": dynamic}
        super().__init__(C, n, **options)
        self.eps = eps
        self.rms_weight = mx.ones(C)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: mx.array, sublayer: Callable[[mx.array], mx.array] | None = None
    ) -> mx.array:
        """``[..., n, C] -> [..., n, C]`` in x's dtype; sublayer is F, the identity by default."""
        _check_input(self, x, self.num_streams, self.dim)
        if sublayer is not None and not callable(sublayer):
            got = type(sublayer).__name__
            raise TypeError(f"[MHCLayer] sublayer must be a module or function but got {got}.")
        if sublayer is None and not self.dynamic and self._convention.start in SINKHORN:
            parameters = (self.H_pre, self.H_post, self.H_res, self.rms_weight)
            out = ops.mhc_layer(x, *parameters, self._convention, self.eps, **self._options)
            return observer.get()(self, x, out)
        if sublayer is None and not self.dynamic:
            parameters = (*self.coefficients(x), self.rms_weight)
            out = ops.mhc_static(x, *parameters, self.eps, **self._options)
            return observer.get()(self, x, out)
        u, add_residual = self._read(x, self.rms_weight, self.eps)
        return add_residual(u if sublayer is None else sublayer(u))

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, eps={self.eps}"


class HyperHead(nn.Module):
    """The learned read-out of DeepSeek V4: ``u = sum_j h_pre[j] x[j]``, h_pre made per token.

    ``h_pre = sigmoid(alpha rsqrt(mean(x**2) + norm_eps) (phi @ vec(x)) + bias) + pre_eps``, as in
    `mhc_head`; parameters ``phi [n, n*C]``, ``bias [n]``, ``alpha [1]``, float32 at the start. It
    starts as the mean, h_pre = 1 / n, with phi as in `HyperConnection`: every sublayer has written
    to all streams alike, and all must have a gradient at once. (For n = 1: 0.9.)

    Args:
        dim: C, channels per stream.
        num_streams: n, 1 to 64.
        convention: Its pre_eps.
        init_scale, norm_eps, use_metal, threads_per_group, differentiable: As in `HyperConnection`.
    """

    norm_eps: float
    use_metal: bool
    threads_per_group: int | None
    differentiable: bool
    phi: mx.array
    bias: mx.array
    alpha: mx.array

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        *,
        convention: Convention = PAPER,
        init_scale: float = 0.01,
        norm_eps: float = 1e-6,
        use_metal: bool = True,
        threads_per_group: int | None = None,
        differentiable: bool = True,
    ):
        super().__init__()
        op, n = "HyperHead", num_streams
        check_sizes(op, dim=(dim, math.inf), num_streams=(n, ops.MAX_STREAMS))
        ops.check_convention(op, convention)
        if not convention.sigmoid:
            raise ValueError(
                f"[{op}] convention must have sigmoid gates but got {convention.name}."
            )
        ops.check_threads(op, threads_per_group)
        ops.check_eps(op, norm_eps, "norm_eps")
        check_number(op, "init_scale", init_scale)
        check_bools(op, use_metal=use_metal, differentiable=differentiable)
        self._convention, self.norm_eps = convention, norm_eps
        self.use_metal, self.threads_per_group = use_metal, threads_per_group
        self.differentiable = differentiable
        self.phi = _noise(n, n * dim)
        self.bias = mx.full(n, _logit(1 / n - convention.pre_eps))
        self.alpha = mx.full(1, init_scale)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., n, C] -> [..., C]`` in x's dtype."""
        n, width = self.phi.shape
        _check_input(self, x, n, width // n)
        options = _checked_options(self)
        parameters = (self.phi, self.bias, self.alpha)
        return ops.mhc_head(x, *parameters, self._convention, self.norm_eps, **options)


class MHCBlock(nn.Module):
    """Any layer F in a hyper-connection: ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] F(norm(u))``
    with u and the coefficients of `HyperConnection`.

        block = MHCBlock(Attention(dim), dim, norm=nn.RMSNorm(dim), layer_idx=k)
        x = block(x, mask, cache=cache)

    Args:
        layer: A module or function ``[..., C] -> [..., C]`` that keeps its input's dtype. Where it
            returns a tuple, y is the first element.
        dim: C, channels per stream.
        num_streams: n.
        norm: Applied to u before the layer; None if the layer normalises or nothing should.
        options: Of `HyperConnection`.
    """

    connection: HyperConnection
    norm: Callable[[mx.array], mx.array] | None
    layer: Callable[..., Any]

    def __init__(
        self,
        layer: Callable[..., Any],
        dim: int,
        num_streams: int = 4,
        *,
        norm: Callable[[mx.array], mx.array] | None = None,
        **options: Any,
    ):
        super().__init__()
        for name, f in (("layer", layer), ("norm", norm)):
            given = callable(f) and not isinstance(f, type)
            if not given and (name == "layer" or f is not None):
                op, got = type(self).__name__, type(f).__name__
                raise TypeError(f"[{op}] {name} must be a module or function but got {got}.")
        check_options(type(self).__name__, options)
        self.connection = HyperConnection(dim, num_streams, **options)
        self.norm = norm
        self.layer = layer

    def _branch(self, u: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self.layer(u if self.norm is None else self.norm(u), *args, **kwargs)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array | Any:
        """``[..., n, C] -> [..., n, C]``. The other arguments are the layer's; where it returns
        (y, ...), this returns (out, ...).
        """
        u, add_residual = self.connection(x)
        y = self._branch(u, *args, **kwargs)
        if isinstance(y, tuple):
            return add_residual(y[0]), *y[1:]
        return add_residual(y)


class MHCLiteBlock(MHCBlock):
    """`MHCBlock` with MHC_LITE (arXiv 2601.05732): h_res is a weighted sum of permutations, doubly
    stochastic without iterations; n <= 5.

    Args:
        layer, dim, num_streams, norm, options: Of `MHCBlock`.
        subtract_input: Write back ``h_post[i] (F(u) - u)`` instead of ``h_post[i] F(u)``, as
            flash-mHC does: for weights trained with it.
    """

    subtract_input: bool

    def __init__(
        self,
        layer: Callable[..., Any],
        dim: int,
        num_streams: int = 4,
        *,
        subtract_input: bool = False,
        **options: Any,
    ):
        connection_options = {k: v for k, v in options.items() if k != "norm"}
        check_options(type(self).__name__, connection_options, "convention")
        check_bools(type(self).__name__, subtract_input=subtract_input)
        super().__init__(layer, dim, num_streams, convention=MHC_LITE, **options)
        self.subtract_input = subtract_input

    def _branch(self, u: mx.array, *args: Any, **kwargs: Any) -> Any:
        y = super()._branch(u, *args, **kwargs)
        check_bools("MHCLiteBlock", subtract_input=self.subtract_input)
        if not self.subtract_input:
            return y
        first = y[0] if isinstance(y, tuple) else y
        check_type("MHCLiteBlock", y=first)
        return (first - u, *y[1:]) if isinstance(y, tuple) else first - u
