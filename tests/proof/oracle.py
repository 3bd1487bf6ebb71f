"""The equations of arXiv 2512.24880 in float64 NumPy, with gradients derived by hand.

Each function returns its results and a function ``backward`` that takes their cotangents to the
gradients of its array arguments. This module shares no code with the package.
"""

import dataclasses

import numpy as np


def logsumexp(a, axis):
    m = a.max(axis=axis, keepdims=True)
    return m + np.log(np.exp(a - m).sum(axis=axis, keepdims=True))


def log_step_backward(q, y, axis, left=0.0):
    """The gradient of a, ``q - y * sum(q)``, for ``b = a - log(sum(exp(a)) + eps)``.

    q is the gradient of b and y = exp(b). For the largest y, ``1 - y`` is computed as the sum of
    the other y and of left = eps / (sum(exp(a)) + eps).
    """
    largest = np.zeros(y.shape, dtype=bool)
    np.put_along_axis(largest, y.argmax(axis=axis, keepdims=True), True, axis)
    others, total = np.where(largest, 0, q).sum(axis, keepdims=True), q.sum(axis, keepdims=True)
    rest = np.where(largest, 0, y).sum(axis, keepdims=True) + left
    return np.where(largest, q * rest - y * others, q - y * total)


def sinkhorn_logs(logits, convention):
    """`sinkhorn_knopp` for the starts that take exp of logits, computed entirely in logs."""
    order = [-1, -2] if convention.first == "rows" else [-2, -1]
    eps, softmax = convention.eps, convention.start == "softmax"
    log_eps = np.log(eps) if eps else -np.inf
    steps, a, share = [], logits, 0.0
    first_eps = {"exp": 2, "softmax": 1, "exp_plain": 0}[convention.start]  # the half-step
    low, high = convention.clamp or (-np.inf, np.inf)
    a = np.minimum(np.maximum(a, low), high)
    top = np.zeros(a.shape, dtype=bool)  # of equal logits of a line the first
    np.put_along_axis(top, a.argmax(order[0], keepdims=True), True, order[0])
    if convention.start == "exp_plain":
        a = a - a.max(order[0], keepdims=True)
    for k in range(2 * convention.iters):
        axis, total = order[k % 2], logsumexp(a, order[k % 2])
        if eps and k >= first_eps:
            total = np.logaddexp(total, log_eps)
        a = a - total
        left = np.exp(log_eps - total) if eps and k >= first_eps else 0.0 * total
        steps.append((axis, np.exp(a), left))
        if softmax and k == 0 and eps:
            share = np.exp(a - np.logaddexp(a, log_eps))  # s / (s + eps)
            a = np.logaddexp(a, log_eps)

    def backward(g):
        q, shift = g, 0.0
        for k, (axis, y, left) in reversed(list(enumerate(steps))):
            if k == len(steps) - 1:  # a shift of a line of g changes the gradient only through eps
                at = y.argmax(axis=axis, keepdims=True)
                shift = np.take_along_axis(g, at, axis)
                q = log_step_backward(y * (g - shift), y, axis, left) + y * shift * left
                continue
            q = log_step_backward(q * share if softmax and k == 0 and eps else q, y, axis, left)
        if convention.start == "exp_plain":  # the maximum: a shift of a line changes nothing
            q = np.where(top, -np.where(top, 0, q).sum(order[0], keepdims=True), q)
        return q * (low < logits) * (logits < high)

    return np.exp(a), backward


def sinkhorn_knopp(logits, convention):
    """h_res of the logits, by half-steps."""
    if convention.start == "additive":
        order = [-1, -2] if convention.first == "rows" else [-2, -1]
        steps, final = [], np.eye(logits.shape[-1]) + logits
        for k in range(2 * convention.iters):
            d = final.sum(axis=order[k % 2], keepdims=True) + convention.eps
            final = final / d
            steps.append((order[k % 2], final, d))

        def back(g):
            for axis, y, d in reversed(steps):
                g = (g - (g * y).sum(axis=axis, keepdims=True)) / d
            return g
    else:
        final, back = sinkhorn_logs(logits, convention)

    def backward(g):
        return back(np.swapaxes(g, -1, -2) if convention.transposed else g)

    return (np.swapaxes(final, -1, -2) if convention.transposed else final), backward


def sigmoid(v):
    return np.where(
        v >= 0, 1 / (1 + np.exp(-np.abs(v))), np.exp(-np.abs(v)) / (1 + np.exp(-np.abs(v)))
    )


def gates(H_pre, H_post, convention):
    """h_pre and h_post of H_pre and H_post."""
    c = convention
    if not c.sigmoid:
        return (H_pre, H_post), lambda dpre, dpost: (dpre, dpost)
    pre, post = sigmoid(H_pre), sigmoid(H_post)

    def backward(dpre, dpost):
        slope_pre, slope_post = pre * sigmoid(-H_pre), post * sigmoid(-H_post)
        return dpre * slope_pre, dpost * c.post_scale * slope_post

    return (pre + c.pre_eps, c.post_scale * post + c.post_eps), backward


def rms_norm(u, weight, eps, rounded=lambda a: a):
    r = 1 / np.sqrt((u * u).mean(axis=-1, keepdims=True) + eps)
    unit = rounded(u * r)

    def backward(dy):
        g = dy * weight
        du = r * g - r**3 * u * (g * u).mean(axis=-1, keepdims=True)
        return du, over_tokens(dy * unit, weight.ndim)

    return unit * weight, backward


def over_tokens(a, ndim):
    """The sum of a over its leading axes, down to ndim axes: tokens share the coefficient."""
    return a.reshape(-1, *a.shape[a.ndim - ndim :]).sum(0) if a.ndim > ndim else a


def stream_aggregate(x, h_pre):
    def backward(du):
        dx = h_pre[..., None] * du[..., None, :]
        return dx, over_tokens((x * du[..., None, :]).sum(-1), h_pre.ndim)

    return (h_pre[..., None] * x).sum(-2), backward


def stream_aggregate_norm(x, h_pre, weight, eps=1e-5):
    u, read_back = stream_aggregate(x, h_pre)
    y, norm_back = rms_norm(u, weight, eps)

    def backward(dy):
        du, dweight = norm_back(dy)
        return (*read_back(du), dweight)

    return y, backward


def stream_mix_add(x, y, h_post, h_res=None):
    mix = np.eye(x.shape[-2]) if h_res is None else h_res
    out = mix @ x + h_post[..., None] * y[..., None, :]

    def backward(g):
        dx = np.swapaxes(mix, -1, -2) @ g
        dy = (h_post[..., None] * g).sum(-2)
        dh_post = over_tokens((g * y[..., None, :]).sum(-1), h_post.ndim)
        dh_res = over_tokens(g @ np.swapaxes(x, -1, -2), mix.ndim)
        return (dx, dy, dh_post) if h_res is None else (dx, dy, dh_post, dh_res)

    return out, backward


def gate_mix(gate_logits, s):
    gate, n = sigmoid(gate_logits), s.shape[-2]

    def backward(du):
        ds = gate * (du[..., None, :] / n)
        return ds * sigmoid(-gate_logits) * s, ds

    return (gate * s).mean(axis=-2), backward


def mhc_static(x, h_pre, h_post, h_res, weight, eps=1e-5):
    y, norm_back = stream_aggregate_norm(x, h_pre, weight, eps)
    out, mix_back = stream_mix_add(x, y, h_post, h_res)

    def backward(g):
        dx, dy, dh_post, *dh_res = mix_back(g)
        dx_read, dh_pre, dweight = norm_back(dy)
        return (dx + dx_read, dh_pre, dh_post, *dh_res, dweight)

    return out, backward


def mhc_layer(x, H_pre, H_post, H_res, weight, convention, eps=1e-5):
    (h_pre, h_post), gates_back = gates(H_pre, H_post, convention)
    h_res, project_back = sinkhorn_knopp(H_res, convention)
    out, back = mhc_static(x, h_pre, h_post, h_res, weight, eps)

    def backward(g):
        dx, dpre, dpost, dres, dweight = back(g)
        return dx, *gates_back(dpre, dpost), project_back(dres), dweight

    return out, backward


def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(p, dp):
    dp = dp - np.take_along_axis(dp, p.argmax(-1, keepdims=True), -1)  # any shift is right
    return p * (dp - (dp * p).sum(-1, keepdims=True))


def project(logits, n, convention):
    """h_res of R logits; where R is 0 it is None, for the identity, and backward takes nothing."""
    lead = logits.shape[:-1]
    if logits.shape[-1] == 0:
        return None, lambda: np.zeros_like(logits)
    if convention.transposed and convention.start in ("unconstrained", "permutations"):
        h_res, back = project(logits, n, dataclasses.replace(convention, transposed=False))
        return np.swapaxes(h_res, -1, -2), lambda g: back(np.swapaxes(g, -1, -2))
    if convention.start == "unconstrained":
        return np.eye(n) + logits.reshape(*lead, n, n), lambda g: 1 * g.reshape(logits.shape)
    if convention.start == "permutations":
        orders = [s for s in np.ndindex((n,) * n) if len(set(s)) == n]  # lexicographic
        matrices = np.eye(n)[np.array(orders)]  # row i has its 1 in column s[i]
        p = softmax(logits)

        def backward(g):
            dp = np.einsum("...ij,kij->...k", g, matrices)
            return softmax_backward(p, dp)

        return np.einsum("...k,kij->...ij", p, matrices), backward
    if convention.start == "kronecker":  # h[i, j] = prod_k p[k, bit k of i xor bit k of j]
        bits = n.bit_length() - 1
        p = softmax(logits.reshape(*lead, bits, 2))
        differ = np.arange(n)[:, None] ^ np.arange(n)
        choice = np.array([differ >> (bits - 1 - k) & 1 for k in range(bits)])  # outermost first
        factors = np.stack([p[..., k, choice[k]] for k in range(bits)])

        def backward(g):
            dp = np.zeros_like(p)
            for k in range(bits):
                dfactor = g * np.delete(factors, k, 0).prod(0)
                for b in (0, 1):
                    dp[..., k, b] = (dfactor * (choice[k] == b)).sum((-1, -2))
            return softmax_backward(p, dp).reshape(logits.shape)

        return factors.prod(0), backward
    h_res, back = sinkhorn_knopp(logits.reshape(*lead, n, n), convention)
    return h_res, lambda g: back(g).reshape(logits.shape)


def token_logits(x, phi, norm_eps):
    """l = phi @ vec(x) / rms(vec(x))."""
    v = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    r = 1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + norm_eps)
    logits = r * (v @ phi.T)

    def backward(g):
        dr = (g * logits).sum(-1, keepdims=True) / r
        dv = r * (g @ phi) - r**3 * v * dr / v.shape[-1]
        dphi = (r * g).reshape(-1, len(phi)).T @ v.reshape(-1, v.shape[-1])
        return dv.reshape(x.shape), dphi

    return logits, backward


def mhc_coefficients(x, phi, bias, alpha, convention, norm_eps=1e-6):
    """h_pre, h_post and, unless it is the identity, h_res; backward takes a tuple of as many."""
    n = x.shape[-2]
    logits, logits_back = token_logits(x, phi, norm_eps)
    scale = np.repeat(alpha, (n, n, len(phi) - 2 * n)[: len(alpha)])
    z_pre, z_post, z_res = np.split(scale * logits + bias, [n, 2 * n], axis=-1)
    gated, gates_back = gates(z_pre, z_post, convention)
    h_res, project_back = project(z_res, n, convention)

    def backward(g):
        dz = np.concatenate([*gates_back(*g[:2]), project_back(*g[2:])], axis=-1)
        dscale = over_tokens(dz * logits, 1)
        dalpha = np.array([part.sum() for part in np.split(dscale, [n, 2 * n])[: len(alpha)]])
        return *logits_back(scale * dz), over_tokens(dz, 1), dalpha

    return gated if h_res is None else (*gated, h_res), backward


def mhc_pre(x, phi, bias, alpha, weight, convention, norm_eps=1e-6, eps=1e-5):
    """u, h_post, h_res unless it is the identity, and x; backward takes a tuple of as many."""
    (h_pre, *kept), make_back = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps)
    u, read_back = stream_aggregate(x, h_pre)
    u, norm_back = (u, lambda du: (du,)) if weight is None else rms_norm(u, weight, eps)

    def backward(g):
        du, *dkept, dx_out = g
        du, *dweight = norm_back(du)
        dx_read, dh_pre = read_back(du)
        dx_made, *dmade = make_back((dh_pre, *dkept))
        return dx_made + dx_read + dx_out, *dmade, *dweight

    return (u, *kept, x), backward


def mhc_head(x, phi, bias, alpha, convention, norm_eps=1e-6):
    logits, logits_back = token_logits(x, phi, norm_eps)
    z = alpha * logits + bias
    (h_pre, _), gates_back = gates(z, z, convention)
    u, read_back = stream_aggregate(x, h_pre)

    def backward(du):
        dx_read, dh_pre = read_back(du)
        dz, _ = gates_back(dh_pre, 0.0)
        dx_made, dphi = logits_back(alpha * dz)
        return dx_made + dx_read, dphi, over_tokens(dz, 1), (dz * logits).sum().reshape(1)

    return u, backward


def mhc_seam(
    x, y, h_pre, h_post, h_res, weight, eps=1e-5, round_aggregate=False, out=None, rounded=None
):
    """out and u. The read takes the argument ``out``, the rounded streams, if it is there.

    ``rounded`` is the function that rounds to the dtype of the streams.
    """
    made, back = stream_mix_add(x, y, h_post, h_res)
    streams = made if out is None else out
    u, read_back = stream_aggregate(streams, h_pre)
    inside = rounded if round_aggregate and rounded else lambda a: a
    u, norm_back = (
        (u, lambda du: (du,)) if weight is None else rms_norm(inside(u), weight, eps, inside)
    )

    def backward(g):
        dout, du = g
        du, *dweight = norm_back(du)
        dread, dh_pre = read_back(du)
        dx, dy, dh_post, *dh_res = back(dout + dread)
        return dx, dy, dh_pre, dh_post, *dh_res, *dweight

    return (made, u), backward


def mhc_single_pass(
    x,
    y,
    phi,
    bias,
    alpha,
    weight,
    convention,
    norm_eps=1e-6,
    eps=1e-5,
    round_aggregate=False,
    out=None,
    rounded=None,
):
    (h_pre, h_post, *h_res), make_back = mhc_coefficients(x, phi, bias, alpha, convention, norm_eps)
    mixing = h_res[0] if h_res else None
    made, back = mhc_seam(x, y, h_pre, h_post, mixing, weight, eps, round_aggregate, out, rounded)

    def backward(g):
        dout, du, dh_pre = g
        dx, dy, dpre, dpost, *rest = back((dout, du))
        dres, dweight = rest[: len(h_res)], rest[len(h_res) :]
        dx_made, *dmade = make_back((dpre + dh_pre, dpost, *dres))
        return dx + dx_made, dy, *dmade, *dweight

    return (*made, h_pre), backward


def stream_norm(x, weight, y, h_post, inject, eps=1e-6, out=None, s_read=None):
    """out, s and, with inject, next_post; backward takes a tuple of as many.

    The norm reads the argument ``out``, and the product with inject ``s_read``, the rounded arrays,
    if they are there.
    """
    n, C = x.shape[-2:]
    made, write_back = (x, lambda g: (g,)) if y is None else stream_mix_add(x, y, h_post)
    s, norm_back = rms_norm(made if out is None else out, 1 + weight, eps)
    next_post, gate_back = None, None
    if inject is not None:
        v = (s if s_read is None else s_read).reshape(*x.shape[:-2], n * C)
        z = (v @ inject.T) / n
        next_post = 2 * sigmoid(z)

        def gate_back(g):
            dz = g * 2 * sigmoid(z) * sigmoid(-z) / n
            return (dz @ inject).reshape(x.shape), dz.reshape(-1, n).T @ v.reshape(-1, n * C)

    def backward(g):
        dout, ds, *dnext_post = g
        dinject = []
        if gate_back:
            dgate, *dinject = gate_back(*dnext_post)
            ds = ds + dgate
        dnormed, dweight = norm_back(ds)
        dx, *dwritten = write_back(dout + dnormed)
        return dx, dweight, *dwritten, *dinject

    return (made, s, next_post), backward
