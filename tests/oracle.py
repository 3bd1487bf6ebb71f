"""The equations in float64 NumPy, with gradients by hand; written from the paper."""

import numpy as np


def logsumexp(a, axis):
    m = a.max(axis=axis, keepdims=True)
    return m + np.log(np.exp(a - m).sum(axis=axis, keepdims=True))


def sinkhorn_knopp(logits, convention):
    """h_res, and the function that takes its cotangent to the gradient of the logits."""
    order = [-1, -2] if convention.first == "rows" else [-2, -1]
    steps, p = [], logits
    if convention.start == "exp":
        for (
            axis
        ) in order:  # exp first and normalise after is the same map: (e / s) with e = exp(l - max)
            p = p - logsumexp(p, axis)
            steps.append(("log", axis, np.exp(p), None))
        p, k = np.exp(p), 2
    elif convention.start == "softmax":
        e = np.exp(p - p.max(axis=-1, keepdims=True))
        s = e / e.sum(axis=-1, keepdims=True)
        steps.append(("softmax", -1, s, None))
        p, k = s + convention.eps, 1
    else:
        p, k = np.eye(p.shape[-1]) + p, 0
    while k < 2 * convention.iters:
        axis = order[k % 2]
        d = p.sum(axis=axis, keepdims=True) + convention.eps
        p = p / d
        steps.append(("plain", axis, p, d))
        k += 1
    final = p

    def backward(g):
        g = np.swapaxes(g, -1, -2) if convention.transposed else g
        inside_exp = convention.start == "exp"
        for kind, axis, y, d in reversed(steps):
            if kind == "plain":
                g = (g - (g * y).sum(axis=axis, keepdims=True)) / d
            elif kind == "softmax":
                g = y * (g - (g * y).sum(axis=axis, keepdims=True))
            else:
                if inside_exp:
                    g, inside_exp = g * y, False
                g = g - y * g.sum(axis=axis, keepdims=True)
        return g

    return (np.swapaxes(final, -1, -2) if convention.transposed else final), backward


def sigmoid(v):
    return np.where(
        v >= 0, 1 / (1 + np.exp(-np.abs(v))), np.exp(-np.abs(v)) / (1 + np.exp(-np.abs(v)))
    )


def norm_backward(u, weight, eps, dy):
    """Gradients of rms_norm: u, weight."""
    r = 1 / np.sqrt((u * u).mean(axis=-1, keepdims=True) + eps)
    g = dy * weight
    du = r * g - r**3 * u * (g * u).mean(axis=-1, keepdims=True)
    return du, (dy * u * r).reshape(-1, u.shape[-1]).sum(0)


def over_tokens(a, ndim):
    """Sum of leading axes, for a coefficient that all tokens share."""
    return a.reshape(-1, *a.shape[a.ndim - ndim :]).sum(0) if a.ndim > ndim else a


def stream_aggregate_norm(x, h_pre, weight, eps=1e-5):
    u = (h_pre[..., None] * x).sum(-2)
    r = 1 / np.sqrt((u * u).mean(axis=-1, keepdims=True) + eps)

    def backward(dy):
        du, dweight = norm_backward(u, weight, eps, dy)
        dx = h_pre[..., None] * du[..., None, :]
        return dx, over_tokens((x * du[..., None, :]).sum(-1), h_pre.ndim), dweight

    return u * r * weight, backward


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


def mhc_static(x, h_pre, h_post, h_res, weight, eps=1e-5):
    y, norm_back = stream_aggregate_norm(x, h_pre, weight, eps)
    out, mix_back = stream_mix_add(x, y, h_post, h_res)

    def backward(g):
        dx, dy, dh_post, *dh_res = mix_back(g)
        dx_read, dh_pre, dweight = norm_back(dy)
        return (dx + dx_read, dh_pre, dh_post, *dh_res, dweight)

    return out, backward


def mhc_layer(x, H_pre, H_post, H_res, weight, convention, eps=1e-5):
    c = convention
    pre, post = (sigmoid(H_pre), sigmoid(H_post)) if c.sigmoid else (H_pre, H_post)
    h_pre, h_post = (
        (pre + c.pre_eps, c.post_scale * post + c.post_eps) if c.sigmoid else (pre, post)
    )
    h_res, project_back = sinkhorn_knopp(H_res, c)
    out, back = mhc_static(x, h_pre, h_post, h_res, weight, eps)

    def backward(g):
        dx, dpre, dpost, dres, dweight = back(g)
        if c.sigmoid:
            dpre, dpost = dpre * pre * (1 - pre), dpost * c.post_scale * post * (1 - post)
        return dx, dpre, dpost, project_back(dres), dweight

    return out, backward
