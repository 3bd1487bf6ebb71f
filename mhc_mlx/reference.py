"""The maths in plain MLX: the source of truth that every kernel must match.

In shapes, leading axes ``...`` are tokens, n is the number of streams (1 to 64) and C that of
channels (at least 1). Arrays are float32, float16 or bfloat16. All arithmetic is float32, whatever
their dtype, and each result is rounded to its dtype once. Sums of products are elementwise, because
``@`` is TF32 on some GPUs.

The functions here do not check their arguments. The ops of the same names do: they raise ValueError
for a shape or a number that does not fit, and TypeError for a dtype or a type.
"""

import itertools

import mlx.core as mx

from . import stable
from .conventions import DEEPSEEK_V4, PAPER, ROW_FIRST, SINKHORN, Convention

__all__ = [
    "gate_mix",
    "gated_residual",
    "gates",
    "mhc_coefficients",
    "mhc_head",
    "mhc_layer",
    "mhc_pre",
    "mhc_seam",
    "mhc_single_pass",
    "mhc_static",
    "project",
    "rms_norm",
    "sinkhorn_knopp",
    "stream_aggregate",
    "stream_aggregate_norm",
    "stream_distribute",
    "stream_mix",
    "stream_mix_add",
    "stream_norm",
]


def _float(*arrays: mx.array) -> list[mx.array]:
    return [a.astype(mx.float32) for a in arrays]


def sinkhorn_knopp(logits: mx.array, convention: Convention = ROW_FIRST) -> mx.array:
    """Project logits to a nearly doubly stochastic matrix by truncated Sinkhorn-Knopp iteration.

    ``P = start(logits)``, then alternately ``P = P / (P.sum(rows) + eps)`` and
    ``P = P / (P.sum(columns) + eps)``, 2 * iters half-steps in all (arXiv 2512.24880, eq. 9). With
    the start exp the first two half-steps have no eps. With a clamp the logits are clipped to it
    first. The gradient is that of the truncated map, and 0 for a logit that is clipped or at an end
    of the clamp.

    Args:
        logits: ``[..., n, n]``, any finite values. With ADDITIVE no row or column of
            ``I + logits``, by whose sums it divides, may sum to 0.
        convention: A convention with half-steps: its start, clamp, order, iterations and eps.

    Returns:
        h_res ``[..., n, n]`` float32, row = output: ``out[i] = sum_j h_res[i, j] x[j]``.
    """
    axes = (-1, -2) if convention.first == "rows" else (-2, -1)
    eps, half_steps = convention.eps, 2 * convention.iters
    (p,) = _float(logits)
    if p.size == 0:
        return p
    if convention.clamp is not None:
        p = mx.clip(p, *convention.clamp)
    if convention.in_logs:
        p, first_step = stable.log_softmax(stable.log_softmax(p, axes[0]), axes[1]), 2
    elif convention.start == "softmax":
        p, first_step = stable.softmax(p) + eps, 1
    elif convention.start == "exp_plain":  # exp(l - max(l)), and the first half-step with eps
        largest, d, sum_of_others = stable.below_largest(p, axes[0])
        p, first_step = mx.where(largest, 1.0, mx.exp(d)) / (1 + sum_of_others + eps), 1
    else:
        p, first_step = mx.eye(p.shape[-1]) + p, 0
    eps_part = 0.0  # eps over the divisor of the last half-step
    if convention.in_range(p.shape[-1]):
        p = mx.exp(p) if convention.in_logs else p
        for k in range(first_step, half_steps):
            d = stable.line_sum(p, axes[k % 2]) + eps
            p, eps_part = p / d, eps / d
    else:
        p = p if convention.in_logs else mx.log(p)
        log_d: list[float | mx.array] = [0.0, 0.0]  # logs of all divisors along axes[0], axes[1]
        for k in range(first_step, half_steps):
            a = p - log_d[0] - log_d[1]
            m = mx.stop_gradient(a.max(axis=axes[k % 2], keepdims=True))
            d = stable.line_sum(mx.exp(a - m), axes[k % 2]) + eps * mx.exp(-m)
            log_d[k % 2], eps_part = log_d[k % 2] + (m + mx.log(d)), eps * mx.exp(-m) / d
        p = mx.exp(p - log_d[0] - log_d[1])
    p = p if convention.start == "additive" else stable.largest_by_sum(p, axes[1], 1 - eps_part)
    return p.swapaxes(-1, -2) if convention.transposed else p


def project(logits: mx.array, n: int, convention: Convention = PAPER) -> mx.array | None:
    """Project R logits to the mixing matrix h_res.

    With half-steps it is ``sinkhorn_knopp(logits.reshape(..., n, n))`` (arXiv 2512.24880, eq. 9).
    Without, it is one of the other projections of `Convention`, which has their formulas.

    Args:
        logits: ``[..., R]``, R = ``convention.res_size(n)``.
        n: The number of streams.
        convention: The projection.

    Returns:
        h_res ``[..., n, n]`` float32, row = output. It is None, for the identity, where R is 0.
    """
    lead = logits.shape[:-1]
    (logits,) = _float(logits)
    if convention.start in SINKHORN:
        return sinkhorn_knopp(logits.reshape(*lead, n, n), convention)
    if convention.start == "unconstrained":
        h_res = mx.eye(n) + logits.reshape(*lead, n, n)
        return h_res.swapaxes(-1, -2) if convention.transposed else h_res
    if logits.shape[-1] == 0:
        return None
    if logits.size == 0:
        return mx.zeros((*lead, n, n))
    if convention.start == "permutations":
        weights, eye = stable.largest_by_sum(stable.softmax(logits), -1), mx.eye(n)
        orders = enumerate(itertools.permutations(range(n)))
        terms = (weights[..., k, None, None] * eye[mx.array(order)] for k, order in orders)
        h_res = sum(terms, start=mx.array(0.0))
        return h_res.swapaxes(-1, -2) if convention.transposed else h_res
    h_res = mx.ones((*lead, 1, 1))
    for k in range(0, logits.shape[-1], 2):
        z = logits[..., k] - logits[..., k + 1]
        p = mx.stack([stable.sigmoid(z), stable.sigmoid(-z)], axis=-1)
        pair = mx.stack([p, p[..., ::-1]], axis=-2)
        size = 2 * h_res.shape[-1]
        # Each index adds one axis: with two, vmap of MLX 0.32 errs where it maps the last axis.
        h_res = h_res[..., :, None, :][..., None] * pair[..., None, :, :][..., None, :]
        h_res = h_res.reshape(*lead, size, size)
    return h_res


def gates(H_pre: mx.array, H_post: mx.array, convention: Convention) -> tuple[mx.array, mx.array]:
    """h_pre = sigmoid(H_pre) + pre_eps, h_post = post_scale * sigmoid(H_post) + post_eps
    (arXiv 2512.24880, eq. 8).

    Args:
        H_pre, H_post: ``[...]``, each of any shape.
        convention: The gates. Without sigmoid, h_pre = H_pre and h_post = H_post.

    Returns:
        h_pre in H_pre's shape and h_post in H_post's, float32.
    """
    H_pre, H_post = _float(H_pre, H_post)
    if not convention.sigmoid:
        return H_pre, H_post
    h_post = convention.post_scale * stable.sigmoid(H_post) + convention.post_eps
    return stable.sigmoid(H_pre) + convention.pre_eps, h_post


def stream_aggregate(x: mx.array, h_pre: mx.array) -> mx.array:
    """Read the streams for a sublayer: ``u = sum_j h_pre[j] x[j]`` (arXiv 2512.24880, eq. 3).

    Args:
        x: ``[..., n, C]``.
        h_pre: ``[n]``, or ``[..., n]`` with x's leading axes.

    Returns:
        u ``[..., C]`` in x's dtype, rounded once.
    """
    xf, h_pre = _float(x, h_pre)
    return (h_pre[..., None] * xf).sum(-2).astype(x.dtype)


def _rounded(a: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return a rounded to dtype, as float32; the gradient is that of the identity."""
    return a + mx.stop_gradient(a.astype(dtype).astype(mx.float32) - a)


def rms_norm(u: mx.array, weight: mx.array, eps: float = 1e-5) -> mx.array:
    """``u * rsqrt(mean(u**2) + eps) * weight``, where the mean is over the last axis.

    Args:
        u: ``[..., C]``.
        weight: ``[C]``.
        eps: Added to the mean square, above 0.

    Returns:
        ``[..., C]`` in u's dtype, rounded once.
    """
    uf, weight = _float(u, weight)
    return (uf * mx.rsqrt(mx.mean(uf * uf, axis=-1, keepdims=True) + eps) * weight).astype(u.dtype)


def stream_aggregate_norm(
    x: mx.array, h_pre: mx.array, weight: mx.array, eps: float = 1e-5
) -> mx.array:
    """Read the streams and normalise: ``rms_norm(sum_j h_pre[j] x[j], weight, eps)``.

    Args:
        x: ``[..., n, C]``.
        h_pre: ``[n]``.
        weight: ``[C]``.
        eps: Added to the mean square, above 0.

    Returns:
        ``[..., C]`` in x's dtype, rounded once.
    """
    xf, h_pre = _float(x, h_pre)
    return rms_norm(stream_aggregate(xf, h_pre), weight, eps).astype(x.dtype)


def stream_distribute(y: mx.array, h_post: mx.array) -> mx.array:
    """Write a sublayer's output to the streams: ``out[i] = h_post[i] y``.

    This is a part of arXiv 2512.24880, eq. 3.

    Args:
        y: ``[..., C]``.
        h_post: ``[n]``, or ``[..., n]`` with y's leading axes.

    Returns:
        ``[..., n, C]`` in y's dtype, rounded once.
    """
    yf, h_post = _float(y, h_post)
    return (h_post[..., None] * yf[..., None, :]).astype(y.dtype)


def stream_mix(x: mx.array, h_res: mx.array) -> mx.array:
    """Mix the streams beside a sublayer: ``out[i] = sum_j h_res[i, j] x[j]``.

    This is a part of arXiv 2512.24880, eq. 3.

    Args:
        x: ``[..., n, C]``.
        h_res: ``[n, n]``, or ``[..., n, n]`` with x's leading axes, row = output.

    Returns:
        ``[..., n, C]`` in x's dtype, rounded once.
    """
    xf, h_res = _float(x, h_res)
    terms = [h_res[..., j, None] * xf[..., j : j + 1, :] for j in range(x.shape[-2])]
    return sum(terms[1:], terms[0]).astype(x.dtype)


def stream_mix_add(
    x: mx.array, y: mx.array, h_post: mx.array, h_res: mx.array | None = None
) -> mx.array:
    """Write back: ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] y`` (arXiv 2512.24880, eq. 3).

    Args:
        x: ``[..., n, C]``.
        y: ``[..., C]`` in x's dtype.
        h_post: ``[n]``, or ``[..., n]`` with x's leading axes.
        h_res: ``[n, n]``, or ``[..., n, n]``, row = output; None is the identity.

    Returns:
        ``[..., n, C]`` in x's dtype, rounded once.
    """
    xf, yf = _float(x, y)
    mixed = xf if h_res is None else stream_mix(xf, h_res)
    return (mixed + stream_distribute(yf, h_post)).astype(x.dtype)


def mhc_static(
    x: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None,
    weight: mx.array,
    eps: float = 1e-5,
) -> mx.array:
    """Compute the layer whose sublayer is an RMSNorm, from coefficients (arXiv 2512.24880, eq. 3).

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] rms_norm(sum_j h_pre[j] x[j], weight, eps)``

    Args:
        x: ``[..., n, C]``.
        h_pre, h_post: ``[n]``.
        h_res: ``[n, n]``, row = output; None is the identity.
        weight: ``[C]``.
        eps: Added to the mean square, above 0.

    Returns:
        ``[..., n, C]`` in x's dtype, rounded once.
    """
    (xf,) = _float(x)
    y = stream_aggregate_norm(xf, h_pre, weight, eps)
    return stream_mix_add(xf, y, h_post, h_res).astype(x.dtype)


def mhc_layer(
    x: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    H_res: mx.array,
    weight: mx.array,
    convention: Convention = ROW_FIRST,
    eps: float = 1e-5,
) -> mx.array:
    """Compute the layer whose sublayer is an RMSNorm, from parameters that all tokens share.

    It is ``mhc_static`` with h_pre, h_post = gates(H_pre, H_post) and h_res = sinkhorn_knopp(H_res)
    (arXiv 2512.24880, eq. 3, 8, 9, the static part).

    Args:
        x: ``[..., n, C]``.
        H_pre, H_post: ``[n]``.
        H_res: ``[n, n]``.
        weight: ``[C]``.
        convention: How coefficients are made from the parameters; a convention with half-steps.
        eps: Added to the mean square in the RMSNorm, above 0.

    Returns:
        ``[..., n, C]`` in x's dtype, rounded once.
    """
    h_pre, h_post = gates(H_pre, H_post, convention)
    return mhc_static(x, h_pre, h_post, sinkhorn_knopp(H_res, convention), weight, eps)


def _logits(x: mx.array, phi: mx.array, norm_eps: float) -> mx.array:
    """``rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x))``: float32, a logit per row of phi."""
    v = x.astype(mx.float32).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    (phi,) = _float(phi)
    phi_product = mx.stack([stable.long_sum(v * row) for row in phi], axis=-1)
    return phi_product * mx.rsqrt(stable.long_sum(v * v)[..., None] / v.shape[-1] + norm_eps)


def mhc_coefficients(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Make the coefficients of each token from its streams (arXiv 2512.24880, eq. 7-9).

    The logits ``l = rsqrt(mean(x**2) + norm_eps) * (phi @ vec(x))`` have three parts, l_pre [n],
    l_post [n] and l_res [R], and so has the bias b. Then
    h_pre, h_post = gates(alpha[0] l_pre + b_pre, alpha[1] l_post + b_post) and
    h_res = project(alpha[2] l_res + b_res).

    Args:
        x: ``[..., n, C]``.
        phi: ``[2n + R, n*C]``, R = ``convention.res_size(n)``. A model whose norm of vec(x) has a
            weight ``[n*C]`` passes ``phi * weight``.
        bias: ``[2n + R]``.
        alpha: ``[3]``, or ``[2]`` where R is 0; a third has no effect there.
        convention: How coefficients are made from logits; not ADDITIVE, whose gates take none.
        norm_eps: Added to the mean square of the n*C elements of a token, above 0.

    Returns:
        h_pre ``[..., n]``, h_post ``[..., n]``, h_res ``[..., n, n]``, float32; h_res is None, the
        identity, where R is 0.
    """
    n = x.shape[-2]
    alpha, bias = _float(alpha, bias)
    size = (n, n, phi.shape[0] - 2 * n)
    parts = [mx.broadcast_to(alpha[i], (k,)) for i, k in enumerate(size[: alpha.size])]
    z = mx.concatenate(parts) * _logits(x, phi, norm_eps) + bias
    h_pre, h_post = gates(z[..., :n], z[..., n : 2 * n], convention)
    return h_pre, h_post, project(z[..., 2 * n :], n, convention)


def mhc_pre(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    weight: mx.array | None = None,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
    eps: float = 1e-5,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    """Make u, which a sublayer reads, and the coefficients of its write-back.

    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps);
    u = sum_j h_pre[j] x[j], or with a weight rms_norm(sum_j h_pre[j] x[j], weight, eps)
    (arXiv 2512.24880, eq. 3, 7-9).

    Args:
        x, phi, bias, alpha, convention, norm_eps: As in `mhc_coefficients`.
        weight: ``[C]``, or None for no RMSNorm.
        eps: Added to the mean square in that RMSNorm, above 0.

    Returns:
        u ``[..., C]`` in x's dtype, rounded once; h_post and h_res as in `mhc_coefficients`; and x
        itself. If the write-back uses this x, the kernel adds its gradient to that of x.
    """
    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps)
    u = stream_aggregate(x.astype(mx.float32), h_pre)
    u = u if weight is None else rms_norm(u, weight, eps)
    return u.astype(x.dtype), h_post, h_res, x


def mhc_head(
    x: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    convention: Convention = PAPER,
    norm_eps: float = 1e-6,
) -> mx.array:
    """Read the streams out as DeepSeek V4 does: ``u = sum_j h_pre[j] x[j]``, h_pre per token.

    h_pre = sigmoid(alpha[0] l + bias) + pre_eps, with the n logits l of `mhc_coefficients`.

    Args:
        x: ``[..., n, C]``.
        phi: ``[n, n*C]``.
        bias: ``[n]``.
        alpha: ``[1]``.
        convention: A convention with sigmoid gates, of which pre_eps alone is used.
        norm_eps: Added to the mean square of the n*C elements of a token, above 0.

    Returns:
        ``[..., C]`` in x's dtype, rounded once.
    """
    alpha, bias = _float(alpha, bias)
    z = alpha * _logits(x, phi, norm_eps) + bias
    return stream_aggregate(x, gates(z, z, convention)[0])


def mhc_seam(
    x: mx.array,
    y: mx.array,
    h_pre: mx.array,
    h_post: mx.array,
    h_res: mx.array | None = None,
    weight: mx.array | None = None,
    eps: float = 1e-5,
    round_aggregate: bool = False,
) -> tuple[mx.array, mx.array]:
    """Write back one sublayer's output y and read for the next sublayer.

    ``out[i] = sum_j h_res[i, j] x[j] + h_post[i] y``, rounded to x's dtype;
    ``u = sum_i h_pre[i] out[i]``, or with a weight ``rms_norm(u, weight, eps)``, rounded once.
    "Single pass" models (DeepSeek V4.1) have all coefficients before the write-back.

    Args:
        x: ``[..., n, C]``.
        y: ``[..., C]`` in x's dtype.
        h_pre, h_post: ``[n]``, or ``[..., n]`` with x's leading axes.
        h_res: ``[n, n]``, or ``[..., n, n]``, row = output; None is the identity.
        weight: ``[C]``, or None for no RMSNorm.
        eps: Added to the mean square in that RMSNorm, above 0.
        round_aggregate: Whether to round to x's dtype u before the norm, and
            ``u * rsqrt(mean(u**2) + eps)`` before the weight, as a model does that aggregates and
            normalises in that dtype. The gradient passes these roundings unchanged.

    Returns:
        out ``[..., n, C]`` and u ``[..., C]`` in x's dtype.
    """
    xf, yf = _float(x, y)
    out = _rounded(stream_mix_add(xf, yf, h_post, h_res), x.dtype)
    u = _read(out, h_pre, weight, eps, x.dtype if round_aggregate else mx.float32)
    return out.astype(x.dtype), u.astype(x.dtype)


def _read(
    x: mx.array, h_pre: mx.array, weight: mx.array | None, eps: float, dtype: mx.Dtype
) -> mx.array:
    """Return the u of `mhc_seam` in float32, for float32 streams, rounded to dtype in between."""
    u = stream_aggregate(x, h_pre)
    if weight is None:
        return u
    (weight,) = _float(weight)
    u = _rounded(u, dtype)
    normalized = u * mx.rsqrt(mx.mean(u * u, axis=-1, keepdims=True) + eps)
    return _rounded(normalized, dtype) * weight


def mhc_single_pass(
    x: mx.array,
    y: mx.array,
    phi: mx.array,
    bias: mx.array,
    alpha: mx.array,
    weight: mx.array | None = None,
    convention: Convention = DEEPSEEK_V4,
    norm_eps: float = 1e-6,
    eps: float = 1e-5,
    round_aggregate: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute all that stands between two sublayers of DeepSeek V4.1.

    These are the coefficients of x, the write-back of y, and the read for the next sublayer:
    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps);
    out, u = mhc_seam(x, y, h_pre, h_post, h_res, weight, eps, round_aggregate).

    Args:
        x, y, weight, eps, round_aggregate: As in `mhc_seam`.
        phi, bias, alpha, convention, norm_eps: As in `mhc_coefficients`.

    Returns:
        out and u as in `mhc_seam`, and h_pre ``[..., n]`` float32.
    """
    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps)
    return *mhc_seam(x, y, h_pre, h_post, h_res, weight, eps, round_aggregate), h_pre


def stream_norm(
    x: mx.array,
    weight: mx.array,
    y: mx.array | None = None,
    h_post: mx.array | None = None,
    inject: mx.array | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Normalise each stream by itself, after a write-back if there is one (Qwen's gated residual).

    ``out[j] = x[j] + h_post[j] y``, rounded to x's dtype, or x itself without y;
    ``s[j] = out[j] * rsqrt(mean(out[j]**2) + eps) * (1 + weight[j])``, rounded to x's dtype;
    ``next_post = 2 sigmoid(inject @ vec(s) / n)``, the h_post of the next write-back.

    Args:
        x: ``[..., n, C]``.
        weight: ``[n, C]``, centred at 0.
        y: ``[..., C]`` in x's dtype, or None for no write-back.
        h_post: ``[..., n]`` with x's leading axes, or ``[n]``; given with y, None without.
        inject: ``[n, n*C]``, or None for no next_post.
        eps: Added to the mean square, above 0.

    Returns:
        out and s ``[..., n, C]`` in x's dtype, and next_post ``[..., n]`` float32 or None.
    """
    n, C = x.shape[-2:]
    (out,) = _float(x)
    if y is not None and h_post is not None:
        out = _rounded(stream_mix_add(out, _float(y)[0], h_post), x.dtype)
    (weight,) = _float(weight)
    mean_square = stable.long_sum(out * out)[..., None] / C
    s = _rounded(out * mx.rsqrt(mean_square + eps) * (1 + weight), x.dtype)
    next_post = None
    if inject is not None:
        v = s.reshape(*s.shape[:-2], n * C)
        product = mx.stack([stable.long_sum(v * row) for row in _float(inject)[0]], axis=-1)
        next_post = 2 * stable.sigmoid(product / n)
    return out.astype(x.dtype), s.astype(x.dtype), next_post


def gate_mix(gate_logits: mx.array, s: mx.array) -> mx.array:
    """Read streams with a gate for each channel: ``u = mean_j sigmoid(gate_logits[j]) s[j]``.

    Args:
        gate_logits: ``[..., n, C]`` in s's dtype.
        s: ``[..., n, C]``.

    Returns:
        u ``[..., C]`` in s's dtype, rounded once.
    """
    logits, sf = _float(gate_logits, s)
    return (stable.sigmoid(logits) * sf).mean(-2).astype(s.dtype)


def gated_residual(
    x: mx.array,
    weight: mx.array,
    down: mx.array,
    up: mx.array,
    inject: mx.array | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array | None]:
    """Read the streams as Qwen's gated residual does; the write-back is ``x[j] + h_post[j] y``.

    s and h_post are those of `stream_norm`, then
    ``a = silu(down @ vec(s) / n)`` and ``u = gate_mix(up @ a, s)``.

    Args:
        x: ``[..., n, C]``.
        weight: ``[n, C]``, centred at 0.
        down: ``[rank, n*C]``.
        up: ``[n*C, rank]``.
        inject: ``[n, n*C]``, or None where nothing is written back, as at the read-out.
        eps: Added to the mean square, above 0.

    Returns:
        u ``[..., C]`` in x's dtype; h_post ``[..., n]`` float32 or None. s, a and the gates' logits
        are rounded to x's dtype, as matrix products of that dtype do.
    """
    n, C = x.shape[-2:]
    _, s, h_post = stream_norm(x, weight, inject=inject, eps=eps)
    down, up, v = _float(down, up, s.reshape(*s.shape[:-2], n * C))
    z = _rounded((v[..., None, :] * down).sum(-1), x.dtype) / n
    a = _rounded(z * stable.sigmoid(z), x.dtype)
    gate_logits = _rounded((a[..., None, :] * up).sum(-1), x.dtype)
    return gate_mix(gate_logits.reshape(s.shape).astype(x.dtype), s), h_post
