"""Stands in for the kernels: the results of each body by the reference, lazily, on any device.

So what the simulator cannot run, because it evaluates, runs through the launching code without a
GPU: mx.compile, checkpoint, vmap, export and second derivatives. What a body promises in its header
is checked of every launch: names, shapes and dtypes of arrays, and that its threads cover C.
"""

from types import SimpleNamespace

import mlx.core as mx

from mhc_mlx import reference
from mhc_mlx.conventions import STARTS

COEFFICIENTS = ("h_pre", "h_post", "h_res", "weight")  # in the order of the columns of `partial`

SAME = {"x", "y", "dout", "du", "dx_out", "partial"}  # of dtype T
FLOAT32 = {"params", "eps", "l", "dz", "dz_res", "rows", "dp", "dh_pre", "dh_post"}


def opaque(a: mx.array) -> mx.array:
    """To MLX as a custom kernel's result: View has no gradient and AsStrided no vmap.

    Both can be compiled and exported; a custom_function that raises could not be exported.
    """
    row = a.flatten() * 1  # AsStrided takes no strides and mx.contiguous cannot be exported
    bits = row.view({2: mx.uint16, 4: mx.uint32}[a.dtype.size])
    return mx.as_strided(bits).view(a.dtype).reshape(a.shape)


def convention(t: dict, eps: mx.array, gates=(0, 1, 0)) -> SimpleNamespace:
    """What `reference` reads of a Convention, from the template and the arrays of a launch."""
    columns = t.get("COLUMNS", False)
    return SimpleNamespace(
        start=STARTS[t.get("START", 0)],
        first="columns" if columns else "rows",
        iters=t.get("ITERS"),
        transposed=columns != t.get("OUT_COLUMNS", columns),
        sigmoid=t.get("GATES", False),
        eps=eps,
        **dict(zip(("pre_eps", "post_scale", "post_eps"), gates, strict=True)),
    )


def sinkhorn_knopp(t, groups, logits, eps):
    return {"h_res": reference.sinkhorn_knopp(logits, convention(t, eps[0]))}


def sinkhorn_knopp_backward(t, groups, logits, dh_res, eps):
    c = convention(t, eps[0])
    _, (dlogits,) = mx.vjp(lambda a: reference.sinkhorn_knopp(a, c), [logits], [dh_res])
    return {"dlogits": dlogits}


def stream_mix_add(t, groups, x, y, h_post, h_res):
    return {"out": reference.stream_mix_add(x, y, h_post, h_res)}


def layer(t: dict, params: mx.array | None, arrays: dict):
    """The function of a layer's bodies, and its arrays by name: coefficients as they are used."""
    if not t.get("NORM", True):
        return reference.stream_mix_add, arrays
    eps, *gates, projection = params
    c = convention(t, projection, gates)
    h_pre, h_post = reference.gates(arrays["h_pre"], arrays.get("h_post", mx.zeros(1)), c)
    if not t["MIX"]:
        return lambda *a: reference.stream_aggregate_norm(*a, eps), arrays | {"h_pre": h_pre}
    project = reference.sinkhorn_knopp if t.get("SINKHORN") else lambda h_res, _: h_res
    ready = {"h_pre": h_pre, "h_post": h_post, "h_res": project(arrays["h_res"], c)}
    return lambda *a: reference.mhc_static(*a, eps), arrays | ready


def mhc_fused(t, groups, params, **arrays):
    f, arrays = layer(t, params, arrays)
    return {"out": f(*arrays.values())}


def partials(rows: int, *sums: mx.array) -> mx.array:
    """`partial`, as if one threadgroup had had it all."""
    total = mx.concatenate([a.flatten() for a in sums])
    return mx.pad(total[None], [(0, rows - 1), (0, 0)])


def mhc_backward(t, groups, dout, params=None, **arrays):
    f, arrays = layer(t, params, arrays)
    gradients = mx.vjp(f, list(arrays.values()), [dout])[1]
    made = {f"d{k}": g for k, g in zip(arrays, gradients, strict=True)}
    alone = {"dh_post": t["POST_PER_TOKEN"], "dh_res": t["RES_PER_TOKEN"]}
    summed = [f"d{k}" for k in COEFFICIENTS if f"d{k}" in made and not alone.get(f"d{k}")]
    if summed:
        made["partial"] = partials(groups, *(made.pop(k) for k in summed))
    return made


def sum_partials(t, groups, partial, h_pre=None, h_post=None, params=None):
    total, n = partial.sum(0), t["N"]
    if t["GATES"]:
        c = convention(t, params[4], params[1:4])
        dgates = [total[:n], total[n : 2 * n]]
        logits = mx.vjp(lambda *a: reference.gates(*a, c), [h_pre, h_post], dgates)[1]
        total = mx.concatenate([*logits, total[2 * n :]])
    return {"out": total}


def stream_aggregate(t, groups, x, h_pre):
    return {"u": reference.stream_aggregate(x, h_pre)}


def stream_aggregate_backward(t, groups, x, h_pre, du):
    dx, dh_pre = mx.vjp(reference.stream_aggregate, [x, h_pre], [du])[1]
    made = {"dh_pre": dh_pre} if t["PER_TOKEN"] else {"partial": partials(groups, dh_pre)}
    return {"dx": dx} | made


def mixing_matrix(t, groups, logits):
    c = SimpleNamespace(start="permutations" if t["PERMUTATIONS"] else "kronecker")
    return {"h_res": reference.project(logits, t["N"], c)}


def mixing_matrix_backward(t, groups, logits, dh_res):
    _, (dlogits,) = mx.vjp(lambda a: mixing_matrix(t, groups, a)["h_res"], [logits], [dh_res])
    return {"dlogits": dlogits}


def of_outputs(t: dict, alpha: mx.array) -> mx.array:
    """The alpha of each row of phi."""
    n = t["N"]
    sizes = [n] if t["HEAD"] else [n, n, t["OUTS"] - 2 * n]
    return mx.concatenate([mx.broadcast_to(alpha[i], (k,)) for i, k in enumerate(sizes)])


def mhc_pre(
    t, groups, x, phi, bias, alpha, params, weight=None, du=None, dh_pre=None, dh_post=None
):
    c, norm_eps, eps = convention({"GATES": True}, None, params[:3]), params[3], params[4]
    n, gated = t["N"], t["N"] if t["HEAD"] else 2 * t["N"]
    unit = reference._logits(x, phi, norm_eps)
    z = of_outputs(t, alpha) * unit + bias

    def pre(z):
        return reference.gates(z, z, c)[0]

    def post(z):
        return reference.gates(z, z, c)[1]

    def read(z):
        u = reference.stream_aggregate(x, pre(z))
        return reference.rms_norm(u, weight, eps) if t["NORM"] else u

    made = {"h_pre": pre(z[:, :n])} if t["WRITE_PRE"] else {}
    made |= {"logits": z[:, gated:]} if t["OUTS"] > gated else {}
    if not t["BACKWARD"]:
        made |= {} if t["HEAD"] else {"h_post": post(z[:, n:gated])}
        return made | ({"u": read(z[:, :n])} if t["READ"] else {})
    f, d = (read, du) if t["READ"] else (pre, dh_pre)
    dz = mx.vjp(f, [z[:, :n]], [d])[1]
    dz += [] if t["HEAD"] else mx.vjp(post, [z[:, n:gated]], [dh_post])[1]
    rows = [mx.rsqrt((x * x).mean((1, 2)) + norm_eps), *2 * [mx.zeros(x.shape[0])]]
    if t["NORM"]:
        u = reference.stream_aggregate(x, pre(z[:, :n]))
        rows[1] = mx.rsqrt((u * u).mean(-1) + eps)
        rows[2] = rows[1] ** 2 * (du * weight * u).mean(-1)
    elif t["READ"]:
        rows[1] = mx.ones(x.shape[0])
    return made | {"l": unit, "dz": mx.concatenate(dz, -1), "rows": mx.stack(rows, -1)}


def mhc_pre_backward(
    t, groups, x, phi, alpha, h_pre, dz, rows, weight=None, dz_res=None, du=None, dx_out=None, **by
):
    unit, (scale, r, slope) = by["l"], mx.split(rows, 3, -1)
    dz = mx.concatenate([dz, dz_res], -1) if t["OUTS"] > dz.shape[1] else dz
    dl = of_outputs(t, alpha) * dz
    dp, sums = scale * dl, [dz.sum(0), (dz * unit).sum(0)]
    dx = (dp[..., None] * phi).sum(1).reshape(x.shape)
    dx += (-scale * scale * (dl * unit).sum(-1, keepdims=True) / phi.shape[1])[..., None] * x
    if t["NORM"]:
        u = reference.stream_aggregate(x, h_pre)
        sums.append((du * u * r).sum(0))
        du = r * (du * weight - u * slope)
    if t["READ"]:
        dx += h_pre[..., None] * du[:, None]
    dx = dx + dx_out if t["PASS"] else dx
    return {"dx": dx, "dp": dp, "partial": partials(groups, *sums)}


def mhc_phi_gradient(t, groups, x, dp):
    v = x.reshape(x.shape[0], -1)
    spans, blocks = -(-v.shape[1] // (t["THREADS"] * t["VEC"])), -(-t["OUTS"] // t["EACH"])
    chunks = groups // (spans * blocks)
    return {"partial": partials(chunks, (dp[..., None] * v[:, None]).sum(0))}


BODIES = {f.__name__: f for f in (sinkhorn_knopp, sinkhorn_knopp_backward, stream_mix_add)}
BODIES |= {f.__name__: f for f in (mhc_fused, mhc_backward, sum_partials)}
BODIES |= {f.__name__: f for f in (stream_aggregate, stream_aggregate_backward, mixing_matrix)}
BODIES |= {f.__name__: f for f in (mixing_matrix_backward, mhc_pre, mhc_pre_backward)}
BODIES["mhc_phi_gradient"] = mhc_phi_gradient
BODIES["mhc_backward_tiled"] = mhc_backward


def promised(t: dict, given: dict) -> dict:
    """Shape of each input by name, as the headers of the bodies say."""
    if "partial" in given:
        n = t["N"]
        return {"partial": given["partial"].shape, "h_pre": (n,), "h_post": (n,), "params": (5,)}
    if "logits" in given:
        count = given["logits"].shape[0]
        shape = (count, t["N"], t["N"])
        return {"logits": (count, t["R"]) if "R" in t else shape, "dh_res": shape, "eps": (1,)}
    tokens, n, C = given["x"].shape
    outs, gated = t.get("OUTS"), n if t.get("HEAD") else 2 * n
    made = {"phi": (outs, n * C), "bias": (outs,), "l": (tokens, outs), "dp": (tokens, outs)}
    made |= {"dz_res": (tokens, outs - gated)} if outs else {}
    return made | {
        "dz": (tokens, gated),
        "rows": (tokens, 3),
        "x": (tokens, t["N"], C),
        "y": (tokens, C),
        "dout": (tokens, n, C) if t.get("MIX") else (tokens, C),
        "du": (tokens, C),
        "dx_out": (tokens, n, C),
        "alpha": (1,) if t.get("HEAD") else (3,),
        "h_pre": (tokens, n) if t.get("PER_TOKEN", outs) else (n,),
        "dh_pre": (tokens, n),
        "dh_post": (tokens, n),
        "h_post": (tokens, n) if t.get("POST_PER_TOKEN") else (n,),
        "h_res": (tokens, n, n) if t.get("RES_PER_TOKEN") else (n, n),
        "weight": (C,),
        "params": (5,),
    }


def agree(name: str, got: dict, want: dict) -> None:
    if got != want:
        raise ValueError(f"[{name}] got {got} but the body has {want}.")


def launch(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """`kernel.launch` by the reference: float32 inside, one rounding at the end."""
    given = {k.lower(): a for k, a in inputs.items() if a is not None}
    shapes = promised(template, given)
    agree(name, {k: a.shape for k, a in given.items()}, {k: shapes[k] for k in given})
    dtypes = {k: template["T"] for k in given.keys() & SAME}
    dtypes |= dict.fromkeys(given.keys() & FLOAT32, mx.float32)
    agree(name, {k: given[k].dtype for k in dtypes}, dtypes)
    agree(name, {"THREADS": threads}, {"THREADS": template.get("THREADS", 256)})
    if "VEC" in template:
        C, vec = given["x"].shape[2], template["VEC"]
        most = threads * vec * template.get("PASSES", C)
        agree(name, {"C % VEC": C % vec, "C": min(C, most)}, {"C % VEC": 0, "C": C})
    made = BODIES[name](template, groups, **{k: a.astype(mx.float32) for k, a in given.items()})
    wanted = {k: spec for k, spec in outputs.items() if spec is not None}
    agree(name, {k: shape for k, (shape, _) in wanted.items()}, {k: made[k].shape for k in made})
    return [opaque(made[k].astype(dtype)) for k, (_, dtype) in wanted.items()]
