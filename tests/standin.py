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


def opaque(a: mx.array) -> mx.array:
    """To MLX as a custom kernel's result: View has no gradient and AsStrided no vmap.

    Both can be compiled and exported; a custom_function that raises could not be exported.
    """
    return mx.as_strided(a.view({2: mx.uint16, 4: mx.uint32}[a.dtype.size])).view(a.dtype)


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


def mhc_backward(t, groups, dout, params=None, **arrays):
    f, arrays = layer(t, params, arrays)
    gradients = mx.vjp(f, list(arrays.values()), [dout])[1]
    made = {f"d{k}": g for k, g in zip(arrays, gradients, strict=True)}
    alone = {"dh_post": t["POST_PER_TOKEN"], "dh_res": t["RES_PER_TOKEN"]}
    summed = [f"d{k}" for k in COEFFICIENTS if f"d{k}" in made and not alone.get(f"d{k}")]
    if summed:  # one threadgroup has it all
        total = mx.concatenate([made.pop(k).flatten() for k in summed])
        made["partial"] = mx.pad(total[None], [(0, groups - 1), (0, 0)])
    return made


def sum_partials(t, groups, partial, h_pre=None, h_post=None, params=None):
    total, n = partial.sum(0), t["N"]
    if t["GATES"]:
        c = convention(t, params[4], params[1:4])
        dgates = [total[:n], total[n : 2 * n]]
        logits = mx.vjp(lambda *a: reference.gates(*a, c), [h_pre, h_post], dgates)[1]
        total = mx.concatenate([*logits, total[2 * n :]])
    return {"out": total}


BODIES = {f.__name__: f for f in (sinkhorn_knopp, sinkhorn_knopp_backward, stream_mix_add)}
BODIES |= {f.__name__: f for f in (mhc_fused, mhc_backward, sum_partials)}
BODIES["mhc_backward_tiled"] = mhc_backward


def promised(t: dict, given: dict) -> dict:
    """Shape of each input by name, as the headers of the bodies say."""
    if "partial" in given:
        n = t["N"]
        return {"partial": given["partial"].shape, "h_pre": (n,), "h_post": (n,), "params": (5,)}
    if "logits" in given:
        shape = (given["logits"].shape[0], t["N"], t["N"])
        return {"logits": shape, "dh_res": shape, "eps": (1,)}
    tokens, n, C = given["x"].shape
    return {
        "x": (tokens, t["N"], C),
        "y": (tokens, C),
        "dout": (tokens, n, C) if t.get("MIX") else (tokens, C),
        "h_pre": (n,),
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
    same = {k: a.dtype for k, a in given.items() if k in ("x", "y", "dout", "partial")}
    agree(name, same, {k: template["T"] for k in same})
    agree(name, {"THREADS": threads}, {"THREADS": template.get("THREADS", 256)})
    if "VEC" in template:
        C, vec = given["x"].shape[2], template["VEC"]
        most = threads * vec * template.get("PASSES", C)
        agree(name, {"C % VEC": C % vec, "C": min(C, most)}, {"C % VEC": 0, "C": C})
    made = BODIES[name](template, groups, **{k: a.astype(mx.float32) for k, a in given.items()})
    wanted = {k: spec for k, spec in outputs.items() if spec is not None}
    agree(name, {k: shape for k, (shape, _) in wanted.items()}, {k: made[k].shape for k in made})
    return [opaque(made[k].astype(dtype)) for k, (_, dtype) in wanted.items()]
