"""Stands in for the kernels: the results of each body by the reference, lazily, on any device.

A body with an op's name gives the reference's results, one with that and _backward its gradients;
`BODIES` has the maths of those whose outputs are others.

So what the simulator cannot run, because it evaluates, runs through the launching code without a
GPU: mx.compile, checkpoint, vmap, export and second derivatives. What a body promises in its header
is checked of every launch: names, shapes and dtypes of arrays, and that its threads cover C.
"""

import inspect
import math
from types import SimpleNamespace

import mlx.core as mx
from calls import always, never
from cases import ARRAYS, OPS

from mhc_mlx import reference
from mhc_mlx.conventions import START_CODES, Convention
from mhc_mlx.ops.arrays import Params
from mhc_mlx.ops.autodiff import FUSED_OPS
from proof.compare import several

LOWER = {k: a for k, a in ARRAYS.items() if k.islower()}
SAME = {"x", "y", "dout", "du", "ds", "dx_out", "partial"}  # of dtype T
STARTS = {code: start for start, code in START_CODES.items()}
FLOAT32 = {"params", "l", "dz_res", "dp", "partial_logits", "token_factors"}
FLOAT32 |= {"dh_pre", "dh_post", "post_logits", "dnext_post", "roots", "dlogits"}
WRITTEN = {
    "out": "WRITE_BACK",
    "next_post": "INJECT",
    "post_logits": "INJECT",
}  # which flag says that stream_norm does


def opaque(a: mx.array) -> mx.array:
    """To MLX as a custom kernel's result: View has no gradient and AsStrided no vmap.

    Both can be compiled and exported; a custom_function that raises could not be exported.
    """
    row = a.flatten() * 1  # AsStrided takes no strides and mx.contiguous cannot be exported
    bits = row.view({2: mx.uint16, 4: mx.uint32}[a.dtype.size])
    return mx.as_strided(bits).view(a.dtype).reshape(a.shape)


def convention(t: dict, params: mx.array) -> SimpleNamespace:
    """What `reference` reads of a Convention, from the template and the arrays of a launch."""
    columns, p = t.get("COLUMNS", False), Params(*params)
    start, clamp = STARTS[t.get("START", 0)], (p.clamp_low, p.clamp_high)
    any_clamp = (-1.0, 1.0) if start == "exp_plain" else None
    c = Convention("", start, iters=t.get("ITERS", 20), eps=1.0, clamp=any_clamp)
    return SimpleNamespace(
        start=c.start,
        in_logs=c.in_logs,
        in_range=c.in_range,
        clamp=clamp if t.get("CLAMP") else None,
        first="columns" if columns else "rows",
        iters=c.iters,
        transposed=columns != t.get("OUT_COLUMNS", columns),
        sigmoid=t.get("GATES", False),
        eps=p.projection_eps,
        pre_eps=p.pre_eps,
        post_scale=p.post_scale,
        post_eps=p.post_eps,
    )


def gradients(f, arrays: dict, cotangents: list) -> dict:
    found = mx.vjp(f, list(arrays.values()), cotangents)[1]
    return {f"d{k}": g for k, g in zip(arrays, found, strict=True)}


def layer(t: dict, params: mx.array | None, arrays: dict):
    """The function of a layer's bodies, and its arrays by name: coefficients as they are used."""
    if not t.get("NORM", True):
        return reference.stream_mix_add, arrays
    c, eps = convention(t, params), Params(*params).eps
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


def mhc_fused_backward(t, groups, dout, params=None, **arrays):
    f, arrays = layer(t, params, arrays)
    return gradients(f, arrays, [dout])


def sum_partials(t, groups, partial, h_pre=None, h_post=None, params=None):
    total, n = partial.sum(0), t["N"]
    if t["GATES"]:
        c = convention(t, params)
        dgates = [total[:n], total[n : 2 * n]]
        logits = mx.vjp(lambda *a: reference.gates(*a, c), [h_pre, h_post], dgates)[1]
        total = mx.concatenate([*logits, total[2 * n :]])
    return {"out": total}


def mixing_matrix(t, groups, logits):
    start = "permutations" if t["PERMUTATIONS"] else "kronecker"
    c = SimpleNamespace(start=start, transposed=t["TRANSPOSED"])
    return {"h_res": reference.project(logits, t["N"], c)}


def mixing_matrix_backward(t, groups, logits, dh_res):
    _, (dlogits,) = mx.vjp(lambda a: mixing_matrix(t, groups, a)["h_res"], [logits], [dh_res])
    return {"dlogits": dlogits}


def head(t: dict) -> bool:
    """Whether h_pre is all that the logits make."""
    return t.get("NUM_LOGITS") == t["N"]


def of_outputs(t: dict, alpha: mx.array) -> mx.array:
    """The alpha of each row of phi."""
    n = t["N"]
    sizes = [n] if head(t) else [n, n, t["NUM_LOGITS"] - 2 * n]
    return mx.concatenate([mx.broadcast_to(alpha[i], (k,)) for i, k in enumerate(sizes)])


def pre_parts(t, alpha, bias, params):
    """Logits of l, and h_pre and h_post of logits."""
    c = convention({"GATES": True}, params)
    return (
        lambda unit: of_outputs(t, alpha) * unit + bias,
        lambda z: reference.gates(z, z, c)[0],
        lambda z: reference.gates(z, z, c)[1],
    )


def mhc_pre(t, groups, x, phi, bias, alpha, params, weight=None):
    n, (logits, pre, post) = t["N"], pre_parts(t, alpha, bias, params)
    unit = reference._logits(x, phi, Params(*params).norm_eps)
    z, made = logits(unit), {}
    h_pre = pre(z[:, :n])
    if t["SAVE_LOGITS"]:
        scale = mx.rsqrt((x * x).mean((1, 2)) + Params(*params).norm_eps)
        made["l"] = mx.concatenate([unit, scale[:, None]], -1)
    if t["WRITE_U"]:
        u = reference.stream_aggregate(x, h_pre)
        made["u"] = reference.rms_norm(u, weight, Params(*params).eps) if t["NORM"] else u
    made |= {} if t["WRITE_U"] else {"h_pre": h_pre}
    made |= {} if head(t) else {"h_post": post(z[:, n : 2 * n])}
    if t["PROJECT"]:
        c = convention(t, params)
        made["h_res"] = reference.sinkhorn_knopp(z[:, 2 * n :].reshape(-1, n, n), c)
    elif not head(t) and t["NUM_LOGITS"] > 2 * n:
        made["logits"] = z[:, 2 * n :]
    return made


def coefficient_gradients(t, x, bias, alpha, params, weight, d):
    """What a token's coefficients give: h_pre, dp, pull, the gradient of x where it is read, and
    the sums over tokens."""
    n, gated, eps = t["N"], t["N"] if head(t) else 2 * t["N"], Params(*params).eps
    (logits, pre, post), (unit, scale) = (
        pre_parts(t, alpha, bias, params),
        mx.split(d["l"], [-1], -1),
    )
    z = logits(unit)

    def read(x, z, *weight):
        u = reference.stream_aggregate(x, pre(z))
        return reference.rms_norm(u, *weight, eps) if weight else u

    dx, dz, sums = 0, [], []
    if "du" in d:
        given = [x, z[:, :n]] + ([] if weight is None else [weight])
        dx, dz_pre, *sums = mx.vjp(read, given, [d["du"]])[1]
        dz = [dz_pre]
    else:
        dz = mx.vjp(pre, [z[:, :n]], [d["dh_pre"]])[1]
    dz = list(dz) + ([] if head(t) else mx.vjp(post, [z[:, n:gated]], [d["dh_post"]])[1])
    if t.get("PROJECT"):
        c, logits = convention(t, params), z[:, gated:].reshape(-1, n, n)
        res = mx.vjp(lambda a: reference.sinkhorn_knopp(a, c), [logits], [d["dh_res"]])[1][0]
        dz.append(res.reshape(len(x), -1))
    elif t["NUM_LOGITS"] > gated:
        dz.append(d["dz_res"])
    dz = mx.concatenate(dz, -1)
    dl = of_outputs(t, alpha) * dz
    pull = -scale * scale * (dl * unit).sum(-1, keepdims=True) / x[0].size
    return pre(z[:, :n]), scale * dl, pull, dx, [dz.sum(0), (dz * unit).sum(0), *sums]


def mhc_pre_backward_coefficients(t, groups, x, bias, alpha, params, weight=None, **d):
    h_pre, dp, pull, _, sums = coefficient_gradients(t, x, bias, alpha, params, weight, d)
    made = {"token_factors": mx.concatenate([h_pre, pull], -1), "dp": dp}
    if weight is None:
        return made | {"partial": partials(groups * (t["THREADS"] // 32), *sums)}
    eps, u = Params(*params).eps, reference.stream_aggregate(x, h_pre)
    (dread,) = mx.vjp(lambda u: reference.rms_norm(u, weight, eps), [u], [d["du"]])[1]
    return made | {"dread": dread, "partial": partials(groups, *sums)}


def mhc_pre_backward_generic(t, groups, x, bias, alpha, params, phi, weight=None, **d):
    _, dp, pull, dx, sums = coefficient_gradients(t, x, bias, alpha, params, weight, d)
    dx += (dp[..., None] * phi).sum(1).reshape(x.shape) + pull[..., None] * x
    made = {"dp": dp, "partial": partials(groups // t["SPLITS"], *sums)}
    return made | {"dx": dx + d["dx_out"] if t["HAS_DX_OUT"] else dx}


def mhc_pre_backward_projection(t, groups, x, phi, dp, token_factors, du=None, dx_out=None):
    units = t["N"] * -(-x.shape[2] // t["SPAN"])
    chunks, left = divmod(groups, -(-units // (t["THREADS"] // 32)))
    agree("mhc_pre_backward_projection", {"threadgroups left": left}, {"threadgroups left": 0})
    dx = (dp[..., None] * phi).sum(1).reshape(x.shape) + token_factors[:, -1, None, None] * x
    dx = dx + token_factors[:, :-1, None] * du[:, None] if t["HAS_DU"] else dx
    dphi = (dp[..., None] * x.reshape(len(x), 1, -1)).sum(0)
    return {"dx": dx + dx_out if t["HAS_DX_OUT"] else dx, "partial": partials(chunks, dphi)}


def mhc_pre_backward_phi(t, groups, x, dp):
    v = x.reshape(x.shape[0], -1)
    spans, blocks = (
        -(-v.shape[1] // (t["THREADS"] * t["VEC"])),
        -(-t["NUM_LOGITS"] // t["LOGITS_PER_THREAD"]),
    )
    chunks = groups // (spans * blocks)
    return {"partial": partials(chunks, (dp[..., None] * v[:, None]).sum(0))}


def mhc_pre_partial_logits(t, groups, x, phi):
    v = x.reshape(len(x), -1)
    fill = -v.shape[1] % 32
    v, phi = (mx.pad(a, [(0, 0), (0, fill)]).reshape(len(a), -1, 32) for a in (v, phi))
    products = (v[:, None] * phi).sum(-1).swapaxes(1, 2)
    shares = (v * v).reshape(*v.shape[:-1], 4, 8).sum(-1)
    return {"partial_logits": mx.concatenate([products, shares], -1)}


def mhc_seam(
    t, groups, x, params, partial_logits=None, bias=None, alpha=None, y=None, weight=None, **h
):
    n, made = t["N"], {}
    if t["FROM_PARTIAL_LOGITS"]:
        sums = partial_logits.sum(1)
        scale = mx.rsqrt(
            sums[:, t["NUM_LOGITS"] :].sum(-1, keepdims=True) / x[0].size + Params(*params).norm_eps
        )
        unit, (logits, pre, post) = (
            scale * sums[:, : t["NUM_LOGITS"]],
            pre_parts(t, alpha, bias, params),
        )
        z = logits(unit)
        h = {"h_pre": pre(z[:, :n]), "h_post": post(z[:, n : 2 * n])}
        made |= {"l": mx.concatenate([unit, scale], -1)} if t["SAVE_LOGITS"] else {}
        made |= {"new_h_pre": h["h_pre"]} if t["WRITE_H_PRE"] else {}
        made |= {} if head(t) or t["WRITE_BACK"] else {"new_h_post": h["h_post"]}
        if t["PROJECT"]:
            c = convention(t, params)
            h["h_res"] = reference.sinkhorn_knopp(z[:, 2 * n :].reshape(-1, n, n), c)
            made |= {} if t["WRITE_BACK"] else {"new_h_res": h["h_res"]}
        elif not head(t) and t["NUM_LOGITS"] > 2 * n:
            made["logits"] = z[:, 2 * n :]
    if t["WRITE_BACK"]:
        arrays = [x.astype(t["T"]), y.astype(t["T"]), h["h_pre"], h["h_post"], h["h_res"], weight]
        made["out"], made["u"] = reference.mhc_seam(*arrays, Params(*params).eps, t["ROUND_U"])
    elif t["WRITE_U"]:
        made["u"] = reference._read(x, h["h_pre"], weight, Params(*params).eps, mx.float32)
    return made


def stream_norm(t, groups, x, weight, params, y=None, h_post=None, inject=None):
    streams, eps = [None if a is None else a.astype(t["T"]) for a in (x, y)], Params(*params).eps
    arrays = (streams[0], weight, streams[1], h_post, inject)
    out, s, next_post = reference.stream_norm(*arrays, eps)
    roots = mx.rsqrt(out.astype(mx.float32).square().mean(-1) + eps)
    made = {"out": out, "s": s, "next_post": next_post, "roots": roots}
    if inject is not None:
        made["post_logits"] = s.reshape(len(s), -1).astype(mx.float32) @ inject.T / t["N"]
    return {k: a for k, a in made.items() if t.get(WRITTEN.get(k), True)}


def stream_norm_backward(t, groups, x, roots, dout, ds, weight, y=None, h_post=None, **gate):
    inject, made = gate.get("inject"), {}
    if inject is not None:
        slope = 2 * mx.sigmoid(gate["post_logits"]) * mx.sigmoid(-gate["post_logits"])
        made["dlogits"] = gate["dnext_post"] * slope / t["N"]
        ds = ds + (made["dlogits"] @ inject).reshape(ds.shape)
    g = ds * (1 + weight)
    mean = (g * x).mean(-1, keepdims=True)
    made["dx"] = dout + roots[..., None] * g - x * roots[..., None] ** 3 * mean
    if h_post is not None:
        write = reference.stream_mix_add
        dwritten = mx.vjp(lambda *a: write(x, *a), [y, h_post], [made["dx"]])[1]
        made["dy"], made["dh_post"] = dwritten
    return made


def stream_norm_backward_weights(t, groups, x, roots, ds, dlogits=None, weight=0, inject=None):
    rows, n, unit = t["ROWS"], t["N"], x * roots[..., None]
    parts = -(-x[0].size // (t["THREADS"] * t["VEC"])) * (n // rows if rows else 1)
    if not rows:
        return {"partial": partials(groups // parts, (ds * unit).sum(0))}
    s = (unit * (1 + weight)).astype(t["T"]).astype(mx.float32)
    of_rows = dlogits[:, :, None, None] * inject.reshape(n, *x.shape[1:])
    blocks = [of_rows[:, k : k + rows].sum(1) for k in range(0, n, rows)]
    blocks[0] = blocks[0] + ds
    dinject = (dlogits[:, :, None, None] * s[:, None]).sum(0)
    sums = []
    for k, d in enumerate(blocks):
        sums += [(d * unit).sum(0), dinject[k * rows : (k + 1) * rows]]
    return {"partial": partials(groups // parts, *sums)}


BODIES = (mhc_fused, mhc_fused_backward, sum_partials, mixing_matrix, mixing_matrix_backward)
BODIES += (mhc_pre, mhc_pre_backward_coefficients, mhc_pre_backward_generic, mhc_pre_backward_phi)
BODIES += (mhc_pre_backward_projection, mhc_pre_partial_logits, mhc_seam)
BODIES += (stream_norm, stream_norm_backward, stream_norm_backward_weights)
BODIES = {f.__name__: f for f in BODIES} | {
    "mhc_fused_backward_wide": mhc_fused_backward,
    "mhc_pre_backward_coefficients_norm": mhc_pre_backward_coefficients,
}

# ---- bodies with an op's name


def of_op(name: str, t: dict, given: dict, outputs: dict) -> dict:
    """The results, or the gradient of each array."""
    op = name.removesuffix("_backward")
    if op not in FUSED_OPS:
        raise ValueError(f"[{name}] must be named as an op is or be in BODIES of standin.py.")
    row = {k.lower(): a for k, a in OPS[op].arrays.items()}
    cotangents = [k for k in given if k not in (*row, "params")]
    taken = {k: a for k, a in given.items() if k not in cotangents}
    streams = {k: t["T"] for k in taken.keys() & row.keys() if row[k].dtype == "dtype"}
    taken = checked(name, taken, promised(t, given, row), streams)
    arrays = {k: a for k, a in taken.items() if k in row}
    arrays = {k: a if k in streams else a.astype(mx.float32) for k, a in arrays.items()}
    known, params = {"round_aggregate": t.get("ROUND_U")}, taken.get("params")
    if params is not None:
        known |= Params(*params)._asdict() | {"convention": convention(t, params)}
    names = list(inspect.signature(getattr(reference, op)).parameters)
    fixed = [known[k] for k in names[len(row) :]]

    def f(*present):
        named = dict(zip(arrays, present, strict=True))
        return several(getattr(reference, op)(*map(named.get, row), *fixed))

    results = f(*arrays.values())
    if name == op:
        return dict(zip(outputs, results, strict=True))
    like = dict(zip(cotangents, results, strict=True))
    shapes, dtypes = ({k: getattr(a, of) for k, a in like.items()} for of in ("shape", "dtype"))
    taken = checked(name, {k: given[k] for k in like}, shapes, dtypes)
    return gradients(f, arrays, list(taken.values()))


# ---- what a launch promises


def promised(t: dict, given: dict, row: dict) -> dict:
    """Shape of each input by name, as the headers of the bodies say."""
    n, L, seam, first = t["N"], t.get("NUM_LOGITS", 0), "ROUND_U" in t, next(iter(given.values()))
    tokens, C, gates = len(first), first.shape[-1], n if head(t) else 2 * n

    def lead(k: str) -> tuple:
        if row[k].per_token in (always, never):
            return (tokens,) * (row[k].per_token is always)
        flag = f"{k.split('_')[-1]}_per_token".upper()  # a seam's coefficients are per token
        return (tokens,) * t.get(flag, t.get("PER_TOKEN", seam))

    sizes = {"n": n, "C": C, "K": n * C, "L": L, "1": 1, "parts": 3}
    shapes = {k: a.shape(lead(k), sizes.get) for k, a in row.items()}
    each = {"dp": (L,), "token_factors": (n + 1,), "l": (L + 1,), "dz_res": (L - gates,)}
    each |= {"partial_logits": (-(-n * C // 32), L + 4), "dx_out": (n, C), "du": (C,)}
    norm = "INJECT" in t
    each |= {"dout": (n, C) if t.get("MIX") or seam or norm else (C,), "partial": (C,)}
    each |= {"ds": (n, C)} | dict.fromkeys(("roots", "dlogits", "post_logits", "dnext_post"), (n,))
    each |= {"dh_pre": (n,), "dh_post": (n,), "dh_res": (n, n)} | ({"logits": (L,)} if L else {})
    shapes |= {k: (tokens, *last) for k, last in each.items()}
    clamped = t.get("CLAMP", False)
    if not t.get("PROJECT", t.get("SINKHORN", "ITERS" in t)):  # the body does not read the clamp
        clamped = given.get("params", first).shape == (len(Params._fields),)
    params = {"params": (len(Params._fields) if clamped else 6,)}
    if L == 2 * n and given.get("alpha", first).shape == (2,):  # R is 0
        shapes["alpha"] = (2,)
    return shapes | params | ({"alpha": (1,)} if head(t) else {})


def agree(name: str, got: dict, want: dict) -> None:
    if got != want:
        raise ValueError(f"[{name}] got {got} but the body has {want}.")


def checked(name: str, given: dict, shapes: dict, dtypes: dict) -> dict:
    """Arrays in the shapes that the body has: of all but x the leading axes are as they come."""
    given = dict(given)
    for k, a in given.items():
        axes = len(shapes[k]) - 1
        if k != "x" and a.size == math.prod(shapes[k]) and a.shape[-axes:] == shapes[k][-axes:]:
            given[k] = a.reshape(shapes[k])
    agree(name, {k: a.shape for k, a in given.items()}, {k: shapes[k] for k in given})
    dtypes = dict.fromkeys(given.keys() & FLOAT32, mx.float32) | dtypes
    agree(name, {k: given[k].dtype for k in dtypes}, dtypes)
    return given


def run(name, inputs, outputs, groups, threads, template, verbose=False) -> list[mx.array]:
    """`launch.run` by the reference: float32 inside, one rounding at the end."""
    given = {k.lower(): a for k, a in inputs.items() if a is not None}
    wanted = {k: spec for k, spec in outputs.items() if spec is not None}
    agree(name, {"THREADS": threads}, {"THREADS": template.get("THREADS", 256)})
    if name in BODIES:
        same = {k: template["T"] for k in given.keys() & SAME}
        same |= {"du": template["DU_T"]} if "du" in same and "DU_T" in template else {}
        own = OPS["stream_norm"].arrays if name.startswith("stream_norm") else {}
        given = checked(name, given, promised(template, given, LOWER | own), same)
        made = BODIES[name](template, groups, **{k: a.astype(mx.float32) for k, a in given.items()})
    else:
        made = of_op(name, template, given, wanted)
    if "VEC" in template:
        C, vec = given["x" if "x" in given else "s"].shape[2], template["VEC"]
        most = threads * vec * template.get("PASSES", C)
        agree(name, {"C % VEC": C % vec, "C": min(C, most)}, {"C % VEC": 0, "C": C})
    if summed := [made.pop(k) for k in list(made) if k not in wanted]:  # gradients, over tokens
        made["partial"] = partials(groups, *summed)
    rows = {k: (math.prod(shape), shape[-1]) for k, (shape, _) in wanted.items()}
    if name == "sum_partials":  # in the shape of a parameter
        rows = {"out": (rows["out"][0],) * 2}
    agree(name, rows, {k: (a.size, a.shape[-1]) for k, a in made.items()})
    return [opaque(made[k].astype(d)).reshape(shape) for k, (shape, d) in wanted.items()]
