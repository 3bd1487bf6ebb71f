"""Sublayers of other projects in float64 NumPy, by their own formulas, and tensors by their names.

Each function of `MADE` returns a source's tensors by name, the module to load them into, and the
source's own sublayer: a function of x [..., n, C], F and the tensors, which returns what F reads
and the new streams.
"""

import itertools
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

import mhc_mlx as m

C = 12


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x, eps):
    """Streams in one row, divided by the root of their mean square."""
    flat = x.reshape(*x.shape[:-2], -1)
    return flat / np.sqrt((flat**2).mean(-1, keepdims=True) + eps)


def normal(random, *shape):
    return random.standard_normal(shape)


def sublayer(u):
    return np.tanh(u) + 0.5


def deepseek_v4(random, n):
    """mlx-vlm models/deepseek_v4/hyper_connection.py, `_hc_split_sinkhorn_ops`, `_hc_expand_op`."""
    outs, eps = 2 * n + n * n, 1e-3
    tensors = {
        "fn": normal(random, outs, n * C) * 2 / math.sqrt(n * C),
        "base": normal(random, outs),
        "scale": random.uniform(0.5, 1.5, 3),
    }
    convention = replace(m.DEEPSEEK_V4, iters=3, eps=eps, pre_eps=eps)
    module = m.HyperConnection(C, n, convention=convention, norm_eps=1e-2)

    def own(x, f, t):
        mixes = unit(x, 1e-2) @ t["fn"].T
        pre = sigmoid(mixes[..., :n] * t["scale"][0] + t["base"][:n]) + eps
        post = 2 * sigmoid(mixes[..., n : 2 * n] * t["scale"][1] + t["base"][n : 2 * n])
        comb = (mixes[..., 2 * n :] * t["scale"][2] + t["base"][2 * n :]).reshape(
            *x.shape[:-2], n, n
        )
        comb = softmax(comb) + eps
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
        for _ in range(2):
            comb = comb / (comb.sum(-1, keepdims=True) + eps)
            comb = comb / (comb.sum(-2, keepdims=True) + eps)
        u = (pre[..., None] * x).sum(-2)
        return u, post[..., None] * f(u)[..., None, :] + np.swapaxes(comb, -1, -2) @ x

    return tensors, module, own


def hy_v4(random, n, post_eps=0.0):
    """mlx-vlm models/hy_v4/hyper_connection.py, `IdentityHyperConnectionPre`, `hc_expand`."""
    tensors = {
        "hc_fn": normal(random, 2 * n, n * C) * 2 / math.sqrt(n * C),
        "hc_base": normal(random, 2 * n),
        "hc_scale": random.uniform(0.5, 1.5, 2),
    }
    convention = replace(m.HUNYUAN_V4, post_scale=1.7, pre_eps=1e-3, post_eps=post_eps)
    module = m.HyperConnection(C, n, convention=convention, norm_eps=1e-2)

    def own(x, f, t):
        pre, post = np.split(unit(x, 1e-2) @ t["hc_fn"].T, 2, axis=-1)
        pre_base, post_base = np.split(t["hc_base"], 2)
        pre = sigmoid(pre * t["hc_scale"][0] + pre_base) + 1e-3
        post = 1.7 * sigmoid(post * t["hc_scale"][1] + post_base) + post_eps
        u = (pre[..., None] * x).sum(-2)
        return u, x + post[..., None] * f(u)[..., None, :]

    return tensors, module, own


def hy_v4_of_transformers(random, n):
    return hy_v4(random, n, post_eps=1e-3)


def xing4_0(random, n):
    """mlx-vlm models/xing4_0/language.py, `HyperConnection`, `DecoderLayer`."""
    outs, eps = 2 * n + n * n, 1e-3
    tensors = {
        "hc_fn": normal(random, outs, n * C) * 4 / math.sqrt(n * C),
        "hc_base": normal(random, outs),
        "hc_scale": random.uniform(0.5, 1.5, 3),
    }
    convention = replace(m.XING, iters=3, eps=eps, clamp=(-5.0, 3.0))
    module = m.HyperConnection(C, n, convention=convention, norm_eps=1e-2)

    def own(x, f, t):
        mix = unit(x, 1e-2) @ t["hc_fn"].T
        pre, post, comb = np.split(mix, [n, 2 * n], axis=-1)
        pre_b, post_b, comb_b = np.split(t["hc_base"], [n, 2 * n])
        pre = sigmoid(pre * t["hc_scale"][0] + pre_b)
        post = 2 * sigmoid(post * t["hc_scale"][1] + post_b)
        comb = comb.reshape(*x.shape[:-2], n, n) * t["hc_scale"][2] + comb_b.reshape(n, n)
        assert comb.min() < -5 and comb.max() > 3  # both ends of the clamp are met
        comb = np.clip(comb, -5.0, 3.0)
        comb = np.exp(comb - comb.max(-1, keepdims=True))
        for _ in range(3):
            comb = comb / (comb.sum(-1, keepdims=True) + eps)
            comb = comb / (comb.sum(-2, keepdims=True) + eps)
        u = (pre[..., None] * x).sum(-2)
        return u, post[..., None] * f(u)[..., None, :] + comb @ x

    return tensors, module, own


def rows_first(logits, iters):
    p = np.exp(logits)
    for _ in range(iters):
        p = p / p.sum(-1, keepdims=True)
        p = p / p.sum(-2, keepdims=True)
    return p


def mhc_cu(random, n):
    """mHC.cu src/python/mhc/layer.py and src/csrc/kernels/mhc_layer.cuh, use_dynamic_h=True."""
    width = n * C
    tensors = {
        "phi_pre": normal(random, n, width) * 2 / math.sqrt(width),
        "phi_post": normal(random, n, width) * 2 / math.sqrt(width),
        "phi_res": normal(random, n * n, width) * 2 / math.sqrt(width),
        "b_pre": normal(random, n),
        "b_post": normal(random, n),
        "b_res": normal(random, n, n),
        "alpha_pre": np.array(0.7),
        "alpha_post": np.array(1.2),
        "alpha_res": np.array(-1.1),
        "rmsnorm_weight": normal(random, C),
    }
    module = m.MHCLayer(n, C, sinkhorn_iters=2, eps=1e-2, norm_eps=1e-2, dynamic=True)

    def own(x, f, t):
        flat = unit(x, 1e-2)
        pre = sigmoid(t["alpha_pre"] * (flat @ t["phi_pre"].T) + t["b_pre"])
        post = 2 * sigmoid(t["alpha_post"] * (flat @ t["phi_post"].T) + t["b_post"])
        logits = (t["alpha_res"] * (flat @ t["phi_res"].T)).reshape(*x.shape[:-2], n, n)
        h = rows_first(logits + t["b_res"], 2)
        u = np.einsum("...i,...ic->...c", pre, x)
        u = u / np.sqrt((u**2).mean(-1, keepdims=True) + 1e-2) * t["rmsnorm_weight"]
        return u, np.einsum("...ij,...jc->...ic", h, x) + post[..., None] * f(u)[..., None, :]

    return tensors, module, own


def mhc_cu_static(random, n):
    """The same with use_dynamic_h=False: `sinkhorn_knopp_forward_fused_exp`, sigmoids fused."""
    tensors = {
        "H_pre": normal(random, n),
        "H_post": normal(random, n),
        "H_res": 2 * normal(random, n, n),
        "rmsnorm_weight": normal(random, C),
    }
    module = m.MHCLayer(n, C, sinkhorn_iters=2, eps=1e-2)

    def own(x, f, t):
        u = np.einsum("i,...ic->...c", sigmoid(t["H_pre"]), x)
        u = u / np.sqrt((u**2).mean(-1, keepdims=True) + 1e-2) * t["rmsnorm_weight"]
        post = 2 * sigmoid(t["H_post"])[:, None] * f(u)[..., None, :]
        return u, np.einsum("ij,...jc->...ic", rows_first(t["H_res"], 2), x) + post

    return tensors, module, own


def mhc_lite(random, n):
    """mHC-lite hyper_conn/mhc_lite.py, `width_connection`, `depth_connection`."""
    width, orders = n * C, list(itertools.permutations(range(n)))
    tensors = {
        "norm.gamma": 0.5 * normal(random, width),
        "dynamic_alpha_fn": normal(random, width, n + len(orders)) * 2 / math.sqrt(width),
        "dynamic_beta_fn": normal(random, width, n) * 2 / math.sqrt(width),
        "static_alpha": normal(random, n + len(orders)),
        "static_beta": normal(random, n),
        "pre_branch_scale": np.array([0.7]),
        "residual_scale": np.array([1.3]),
        "h_post_scale": np.array(-1.1),
    }
    module = m.MHCLiteBlock(lambda u: mx.tanh(u) + 0.5, C, n, norm_eps=1e-20)

    def own(x, f, t):
        flat = x.reshape(*x.shape[:-2], -1)
        normed = flat / np.linalg.norm(flat, axis=-1, keepdims=True) * width**0.5
        normed = normed * (t["norm.gamma"] + 1)
        pre, res = np.split(normed @ t["dynamic_alpha_fn"], [n], axis=-1)
        weights = softmax(t["residual_scale"] * res + t["static_alpha"][n:])
        matrices = np.stack([np.eye(n)[list(order)] for order in orders])
        residual = np.einsum("...r,rij->...ij", weights, matrices)
        pre = sigmoid(t["pre_branch_scale"] * pre + t["static_alpha"][:n])
        alpha = np.concatenate([pre[..., None], residual], axis=-1)  # [..., s, 1 + t]
        beta = 2 * sigmoid(normed @ t["dynamic_beta_fn"] * t["h_post_scale"] + t["static_beta"])
        mixed = np.einsum("...st,...sd->...td", alpha, x)
        u, streams = mixed[..., 0, :], mixed[..., 1:, :]
        return u, f(u)[..., None, :] * beta[..., None] + streams

    return tensors, module, own


def flash_mhc(random, n, mixed=False):
    """flash-mHC src/flash_mhc/block.py, `_mhc_coeffs_pytorch`, `_mhc_post_res_pytorch`."""
    orders = list(itertools.permutations(range(n)))
    if mixed:
        random.shuffle(orders)
    outs, width = 2 * n + len(orders), n * C
    tensors = {
        "perm_mat": np.stack([np.eye(n)[list(order)].reshape(-1) for order in orders]),
        "W_all.weight": normal(random, outs, width) * 2 / math.sqrt(width),
        "W_all.bias": normal(random, outs),
        "alpha_pre": np.array([0.7]),
        "alpha_post": np.array([1.2]),
        "alpha_res": np.array([-1.1]),
    }
    block = m.MHCLiteBlock(lambda u: mx.tanh(u) + 0.5, C, n, norm_eps=1e-6, subtract_input=True)

    def own(x, f, t):
        proj = unit(x, 1e-6) @ t["W_all.weight"].T
        bias = t["W_all.bias"]
        pre = sigmoid(t["alpha_pre"] * proj[..., :n] + bias[:n])
        post = 2 * sigmoid(t["alpha_post"] * proj[..., n : 2 * n] + bias[n : 2 * n])
        a_res = softmax(t["alpha_res"] * proj[..., 2 * n :] + bias[2 * n :])
        merged = (a_res @ t["perm_mat"]).reshape(*x.shape[:-2], n, n)
        merged = merged - post[..., :, None] * pre[..., None, :]
        u = (pre[..., None, :] @ x)[..., 0, :]
        return u, merged @ x + post[..., None] * f(u)[..., None, :]

    return tensors, block, own


def flash_mhc_in_another_order(random, n):
    return flash_mhc(random, n, mixed=True)


def mhc_triton(random, n):
    """mHC-triton src/mhc/module.py, dynamic=False, and `_sinkhorn_kernel`."""
    tensors = {
        "H_pre_base": normal(random, n),
        "H_post_base": normal(random, n),
        "H_res_base": normal(random, n, n),
    }
    convention = replace(m.ADDITIVE, iters=2, eps=1e-3)
    module = m.HyperConnection(C, n, convention=convention, dynamic=False)

    def own(x, f, t):
        pre = sigmoid(t["H_pre_base"])
        pre = pre / (pre.sum() + 1e-8)
        p = np.abs(t["H_res_base"]) + 1e-3
        for _ in range(2):
            p = p / (p.sum(-1, keepdims=True) + 1e-3)
            p = p / (p.sum(-2, keepdims=True) + 1e-3)
        u = np.einsum("n,...nd->...d", pre, x)
        added = sigmoid(t["H_post_base"])[:, None] * f(u)[..., None, :]
        return u, np.einsum("nm,...md->...nd", p, x) + added

    return tensors, module, own


def qwen4_exp(random, n):
    """mlx-vlm models/qwen4_exp/language.py, `Qwen4ExpGatedResidual` and its decoder layer."""
    tensors = {
        "hc_norm.weight": normal(random, n * C) / 2,
        "input_mix_weight_down.weight": normal(random, 5, n * C) / math.sqrt(C),
        "input_mix_weight_up.weight": normal(random, n * C, 5),
        "block_inject_weight.weight": normal(random, n, n * C) / math.sqrt(C),
    }
    module = m.GatedResidual(C, n, 5, 1e-2)

    def own(x, f, t):
        weight, down, up, inject = t.values()
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2)
        v = normed.reshape(*x.shape[:-2], -1) * (1 + weight)
        z = v @ down.T / n
        gates = sigmoid((z * sigmoid(z)) @ up.T)
        u = (gates * v).reshape(x.shape).mean(-2)
        return u, x + (2 * sigmoid(v @ inject.T / n))[..., None] * f(u)[..., None, :]

    return tensors, module, own


MADE = {
    f.__name__: f
    for f in (
        *(deepseek_v4, hy_v4, hy_v4_of_transformers, xing4_0, mhc_cu, mhc_cu_static),
        *(mhc_lite, flash_mhc, flash_mhc_in_another_order, mhc_triton, qwen4_exp),
    )
}
