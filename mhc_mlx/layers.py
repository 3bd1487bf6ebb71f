"""Modules hold parameters, set their starting values and call ops."""

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .conventions import EXPONENTIAL, MHC_LITE, PAPER, ROW_FIRST, SINKHORN, Convention
from .ops.checks import check_bools, check_dtype, check_number, check_sizes, check_type, fail

__all__ = ["HyperConnection", "HyperHead", "MHCBlock", "MHCLayer", "MHCLiteBlock"]


def check_options(
    op: str, options: dict[str, Any], *excluded: str, of: type[nn.Module] | None = None
) -> None:
    """Raise TypeError for an option that is no keyword of ``of``, or is excluded.

    None stands for `HyperConnection`.
    """
    parameters = inspect.signature((of or HyperConnection).__init__).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in excluded]
    for name in options:
        if name not in keywords:
            raise TypeError(f"[{op}] options must be of {', '.join(keywords)} but got {name}.")


def check_input(module: nn.Module, x: mx.array, n: int, C: int) -> None:
    op = type(module).__name__
    check_dtype(op, x=x)
    if x.shape[-2:] != (n, C):
        raise ValueError(fail(op, "x", f"have shape [..., n={n}, C={C}]", list(x.shape)))


def _logit(p: float) -> float:
    """``log(p / (1 - p))``, p clamped to [0.0001, 0.9]: a gate outside hardly has a gradient."""
    p = min(max(p, 1e-4), 0.9)
    return math.log(p / (1 - p))


def starting_logits(
    n: int, convention: Convention, layer_idx: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the starting values of H_pre ``[n]``, H_post ``[n]`` and H_res ``[R]``, float32.

    `HyperConnection` says what they are.
    """
    c, R = convention, convention.res_size(n)
    if c.sigmoid:
        pre = [0.9 if j == layer_idx % n else 0.1 / (n - 1) for j in range(n)]
        H_pre = mx.array([_logit(p - c.pre_eps) for p in pre])
        H_post = mx.full(n, _logit((1 - c.post_eps) / (c.post_scale or 1)))
    else:
        H_pre, H_post = mx.full(n, 1 / n), mx.ones(n)

    def small_logit(count: int) -> float:
        """``count * exp(small_logit(count)) = exp(-8)``."""
        return -8 - math.log(max(count, 1))

    if c.start in EXPONENTIAL:
        H_res = (small_logit(n - 1) * (1 - mx.eye(n))).flatten()
        if c.clamp is not None:  # inside it, since a logit at an end of it has no gradient
            margin = (c.clamp[1] - c.clamp[0]) / 16
            H_res = mx.clip(H_res, c.clamp[0] + margin, c.clamp[1] - margin)
    elif c.start == "permutations":
        H_res = mx.array([0.0] + [small_logit(R - 1)] * (R - 1))
    elif c.start == "kronecker":
        H_res = mx.array([0.0, small_logit(R // 2)] * (R // 2))
    else:
        H_res = mx.zeros(R)
    return H_pre, H_post, H_res


def _starting_phi(num_logits: int, width: int) -> mx.array:
    """Return phi ``[num_logits, width]`` at the start: normal with deviation 0.02 / sqrt(width)."""
    return mx.random.normal((num_logits, width)) * (0.02 / math.sqrt(width))


# A connection calls it with itself, its input x and its output, and returns the result in place of
# the output. `stability_report` sets it, in its thread alone.
observer: ContextVar[Callable[..., mx.array]] = ContextVar(
    "observer", default=lambda connection, x, out: out
)


class StreamModule(nn.Module):
    """Modules that read streams share these options of ops."""

    use_metal: bool
    threads_per_group: int | None
    differentiable: bool

    def _set_options(self, use_metal, threads_per_group, differentiable):
        """Check these arguments of a constructor, and keep them as attributes."""
        op = type(self).__name__
        ops.check_threads(op, threads_per_group)
        check_bools(op, use_metal=use_metal, differentiable=differentiable)
        self.threads_per_group, self.differentiable = threads_per_group, differentiable
        self.use_metal = use_metal

    @property
    def _options(self) -> dict[str, Any]:
        """Return the options of ops, checked at each use, because a user may set the attributes."""
        options = {"use_metal": self.use_metal, "differentiable": self.differentiable}
        check_bools(type(self).__name__, **options)
        return options | {"threads_per_group": self.threads_per_group}  # ops check this one


class HyperConnection(StreamModule):
    """Reads the streams for a sublayer and writes the sublayer's output back to them.

        u, add_residual = connection(x)  # u = sum_j h_pre[j] x[j]
        x = add_residual(sublayer(u))    # out[i] = sum_j h_res[i, j] x[j] + h_post[i] y

    Dynamic (arXiv 2512.24880, eq. 3, 7-9): each token makes its coefficients from its streams
    alone, so the connection is causal: h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha)
    with the parameters ``phi [2n + R, n*C]``, ``bias [2n + R]`` and ``alpha [3]``, where R is
    ``convention.res_size(n)``; alpha is ``[2]`` where R is 0. Static: all tokens share the
    coefficients, which are made from the parameters ``H_pre [n]``, ``H_post [n]`` and ``H_res``,
    ``[n, n]`` or ``[R]``. Parameters start in float32 and may be cast; all arithmetic is float32.

    The starting values preserve a network's function. On n > 1 equal streams a connection is
    ``x + F(x)``, up to rounding and, if dynamic, up to the noise of phi, which has made an error of
    1e-4 at the end of 12 connections. These are the starting values:
        h_pre: 0.9 on stream ``layer_idx % n``, so that neighbouring layers read different streams,
            and 0.1 / (n - 1) elsewhere. Their sum is 1; for n = 1 h_pre is 0.9, since a sigmoid at
            1 has no gradient.
        h_post: 1, the middle of the range of its gate.
        h_res: the identity, except that a weight of e**-8 = 3e-4 goes to other streams, so that
            the logits have a gradient. Logits are 0 on the diagonal and -(8 + ln(n - 1)) elsewhere;
            with MHC_LITE they are 0 for the identity and -(8 + ln(n! - 1)) for the other
            permutations; with KRONECKER each pair is (0, -(8 + ln log2 n)). UNCONSTRAINED and
            ADDITIVE are linear in their logits, which start at 0.
        phi: normal with deviation 0.02 / sqrt(n*C). At any width it adds noise of deviation
            0.02 * ``init_scale`` to a logit. That is too small for the model to notice, and lets
            phi and alpha, which starts at ``init_scale``, have a gradient at once. With
            UNCONSTRAINED the rows of phi for h_res start at 0, because no gate dampens their noise.
    ADDITIVE is static only and starts with h_pre = 1 / n. While the streams are equal, the loss
    depends neither on h_res nor on h_pre apart from its sum, so at step 0 the gradients of both may
    be zero by symmetry.

    Args:
        dim: C, channels per stream.
        num_streams: n, 1 to 64; at most 5 with MHC_LITE, a power of two with KRONECKER.
        layer_idx: The stream ``layer_idx % n`` has the largest h_pre at the start.
        dynamic: Whether each token makes its coefficients; otherwise all tokens share them.
        convention: How coefficients are made from logits.
        sinkhorn_iters: Sinkhorn-Knopp iterations; None keeps the convention's, 20 in the presets.
            It must be None for a convention without half-steps.
        init_scale: Starting value of alpha.
        norm_eps: Added to the mean square of a token's n*C elements, above 0.
        use_metal: Run the fused kernels where the default device has them (Metal or CUDA).
        threads_per_group: Threads in a threadgroup; None lets the shape decide.
        differentiable: False calls the kernels without their gradients, which
            `mx.export_function` needs. Like the two options before, it is an attribute that may be
            set later.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range, or does not fit the convention.
    """

    dim: int
    num_streams: int
    dynamic: bool
    norm_eps: float
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
        check_bools(op, dynamic=dynamic)
        check_number(op, "init_scale", init_scale)
        ops.check_eps(op, norm_eps, "norm_eps")
        self._set_options(use_metal, threads_per_group, differentiable)
        self.norm_eps = norm_eps
        if sinkhorn_iters is not None:
            check_sizes(op, sinkhorn_iters=(sinkhorn_iters, math.inf))
        if dynamic and not convention.sigmoid:
            must = "have sigmoid gates if dynamic"
            raise ValueError(fail(op, "convention", must, convention.name))
        self.dim, self.num_streams, self.dynamic = dim, n, dynamic
        if sinkhorn_iters is not None:
            if convention.start not in SINKHORN:
                must = f"be None with {convention.name}, which has no half-steps,"
                raise ValueError(fail(op, "sinkhorn_iters", must, sinkhorn_iters))
            convention = replace(convention, iters=sinkhorn_iters)
        self._convention = convention
        H_pre, H_post, H_res = starting_logits(n, convention, layer_idx)
        if dynamic:
            self.phi = _starting_phi(2 * n + H_res.size, n * dim)
            if convention.start == "unconstrained":  # no gate dampens the noise of h_res
                self.phi[2 * n :] = 0
            self.bias = mx.concatenate([H_pre, H_post, H_res])
            self.alpha = mx.full(3 if H_res.size else 2, init_scale)
        else:
            self.H_pre, self.H_post = H_pre, H_post
            if H_res.size:
                self.H_res = H_res.reshape(n, n) if H_res.size == n * n else H_res

    @property
    def convention(self) -> Convention:
        """This says how coefficients are made from logits, with ``sinkhorn_iters`` applied."""
        return self._convention

    def mixing_matrix(self) -> mx.array | None:
        """Return h_res ``[n, n]`` float32, row = output; None stands for the identity.

        A dynamic connection has a matrix per token, and raises ValueError.
        """
        if self.dynamic:
            got = "True: coefficients(x) has h_res"
            raise ValueError(fail(type(self).__name__, "dynamic", "be False", got))
        if self._convention.start in SINKHORN:
            options: dict[str, Any] = self._options | {"threads_per_group": None}
            return ops.sinkhorn_knopp(self.H_res, self._convention, **options)
        logits = self.H_res.flatten() if "H_res" in self else mx.zeros(0)
        return ops.project(logits, self.num_streams, self._convention)

    def coefficients(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
        """Return h_pre, h_post and h_res, float32, for streams x ``[..., n, C]``.

        The shapes are ``[..., n]``, ``[..., n]`` and ``[..., n, n]`` for a dynamic connection, and
        ``[n]``, ``[n]`` and ``[n, n]`` for a static one. h_res is None where it is the identity.
        """
        check_input(self, x, self.num_streams, self.dim)
        if self.dynamic:
            arrays = (x, self.phi, self.bias, self.alpha)
            return ops.mhc_coefficients(*arrays, self._convention, self.norm_eps, **self._options)
        return *ops.gates(self.H_pre, self.H_post, self._convention), self.mixing_matrix()

    def _read(
        self, x: mx.array, weight: mx.array | None = None, eps: float = 1e-5
    ) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
        """Return u, normalised if there is a weight, and the function ``add_residual``."""
        c, options = self._convention, self._options
        if self.dynamic:
            arrays = (x, self.phi, self.bias, self.alpha, weight)
            u, h_post, h_res, x = ops.mhc_pre(*arrays, c, self.norm_eps, eps, **options)
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
        """Return u ``[..., C]`` of streams x ``[..., n, C]``, and the function ``add_residual``.

        ``add_residual(y)`` takes y ``[..., C]`` and returns the new streams ``[..., n, C]``. All
        arrays have x's dtype.
        """
        check_input(self, x, self.num_streams, self.dim)
        return self._read(x)

    def _extra_repr(self) -> str:
        c = self._convention
        return (
            f"n={self.num_streams}, C={self.dim}, convention={c.name}, iters={c.iters}, "
            f"dynamic={self.dynamic}"
        )


class MHCLayer(HyperConnection):
    """This is the layer of mHC.cu: a hyper-connection with the RMSNorm of its sublayer.

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] F(rms_norm(u, rms_weight, eps))`` with
    ``u = sum_j h_pre[j] x[j]``.

    Its parameters are those of `HyperConnection`, with the same starting values, and
    ``rms_weight [C]``, which starts at 1. The static layer is also that of mhc-mlx and SuperFused.

    Args:
        n: Streams, 1 to 64.
        C: Channels per stream.
        sinkhorn_iters: Sinkhorn-Knopp iterations; None keeps the convention's.
        eps: Added to the mean square of u in the RMSNorm, above 0.
        convention: How coefficients are made from logits.
        dynamic: Whether each token makes its coefficients; otherwise all tokens share them.
        options: Further keywords of `HyperConnection`: layer_idx, init_scale, norm_eps, use_metal,
            threads_per_group, differentiable.

    Raises:
        TypeError: An argument has another type, or an option is unknown.
        ValueError: An argument is out of its range, or does not fit the convention.
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
        """Return out ``[..., n, C]`` of x ``[..., n, C]``, in x's dtype.

        ``sublayer`` is F, a function ``[..., C] -> [..., C]``; None is the identity.
        """
        check_input(self, x, self.num_streams, self.dim)
        if sublayer is not None and not callable(sublayer):
            got = type(sublayer).__name__
            raise TypeError(fail("MHCLayer", "sublayer", "be a module or function", got))
        if sublayer is not None or self.dynamic:
            u, add_residual = self._read(x, self.rms_weight, self.eps)
            return add_residual(u if sublayer is None else sublayer(u))
        if self._convention.start in SINKHORN:
            parameters = (self.H_pre, self.H_post, self.H_res, self.rms_weight)
            out = ops.mhc_layer(x, *parameters, self._convention, self.eps, **self._options)
        else:
            parameters = (*self.coefficients(x), self.rms_weight)
            out = ops.mhc_static(x, *parameters, self.eps, **self._options)
        return observer.get()(self, x, out)

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, eps={self.eps}"


class HyperHead(StreamModule):
    """This is the learned read-out of DeepSeek V4: ``u = sum_j h_pre[j] x[j]``, h_pre per token.

    ``h_pre = sigmoid(alpha rsqrt(mean(x**2) + norm_eps) (phi @ vec(x)) + bias) + pre_eps``, as in
    `mhc_head`. The parameters ``phi [n, n*C]``, ``bias [n]`` and ``alpha [1]`` start in float32.
    h_pre starts at 1 / n (at 0.9 for n = 1): u is the mean of the streams, to all of which the
    sublayers have written alike, and all streams have a gradient at once. phi starts as in
    `HyperConnection`.

    Args:
        dim: C, channels per stream.
        num_streams: n, 1 to 64.
        convention: A convention with sigmoid gates, of which the head uses pre_eps alone.
        init_scale, norm_eps, use_metal, threads_per_group, differentiable: As in `HyperConnection`.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range, or the convention has no sigmoid gates.
    """

    norm_eps: float
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
            raise ValueError(fail(op, "convention", "have sigmoid gates", convention.name))
        check_number(op, "init_scale", init_scale)
        ops.check_eps(op, norm_eps, "norm_eps")
        self._set_options(use_metal, threads_per_group, differentiable)
        self.norm_eps = norm_eps
        self._convention = convention
        self.phi = _starting_phi(n, n * dim)
        self.bias = mx.full(n, _logit(1 / n - convention.pre_eps))
        self.alpha = mx.full(1, init_scale)

    def __call__(self, x: mx.array) -> mx.array:
        """Return u ``[..., C]`` of x ``[..., n, C]``, in x's dtype."""
        n, width = self.phi.shape
        check_input(self, x, n, width // n)
        parameters = (self.phi, self.bias, self.alpha)
        return ops.mhc_head(x, *parameters, self._convention, self.norm_eps, **self._options)


class MHCBlock(nn.Module):
    """``out[i] = sum_j h_res[i, j] x[j] + h_post[i] F(norm(u))``: a layer F in a hyper-connection.

    `HyperConnection` makes u and the coefficients.

        block = MHCBlock(Attention(dim), dim, norm=nn.RMSNorm(dim), layer_idx=k)
        x = block(x, mask, cache=cache)

    Args:
        layer: F, a module or function ``[..., C] -> [..., C]`` that keeps its input's dtype. Where
            it returns a tuple, the block writes back the tuple's first element.
        dim: C, channels per stream.
        num_streams: n, 1 to 64.
        norm: A module or function that the block applies to u before the layer, or None.
        options: Further keywords of `HyperConnection`.

    Raises:
        TypeError: layer or norm is a class or cannot be called, another argument has another type,
            or an option is unknown.
        ValueError: An argument is out of its range, or does not fit the convention.
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
            is_function = callable(f) and not isinstance(f, type)
            if not is_function and (name == "layer" or f is not None):
                op, got = type(self).__name__, type(f).__name__
                raise TypeError(f"[{op}] {name} must be a module or function but got {got}.")
        check_options(type(self).__name__, options)
        self.connection = HyperConnection(dim, num_streams, **options)
        self.norm = norm
        self.layer = layer

    def _branch(self, u: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self.layer(u if self.norm is None else self.norm(u), *args, **kwargs)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array | Any:
        """Return out ``[..., n, C]`` of x ``[..., n, C]``, in x's dtype.

        The layer gets the other arguments. Where it returns a tuple (y, ...), this call returns
        (out, ...).
        """
        u, add_residual = self.connection(x)
        y = self._branch(u, *args, **kwargs)
        if isinstance(y, tuple):
            return add_residual(y[0]), *y[1:]
        return add_residual(y)


class MHCLiteBlock(MHCBlock):
    """This is `MHCBlock` with the convention MHC_LITE (arXiv 2601.05732).

    h_res is a weighted sum of the n! permutation matrices: doubly stochastic without iterations. n
    is at most 5.

    Args:
        layer, dim, num_streams, norm, options: As in `MHCBlock`.
        subtract_input: Write back ``h_post[i] (F(u) - u)`` instead of ``h_post[i] F(u)``, as
            flash-mHC does. Weights that flash-mHC has trained need it.

    Raises:
        TypeError, ValueError: As in `MHCBlock`.
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
