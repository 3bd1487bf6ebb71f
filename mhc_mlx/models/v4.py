"""`load_v4` loads the tensors of DeepSeek V4 by their names."""

from dataclasses import replace

import mlx.core as mx

from ..conventions import DEEPSEEK_V4
from ..layers import HyperConnection, HyperHead
from ..ops.checks import check_dtype, fail


def load_v4(
    module: HyperConnection | HyperHead, weights: dict[str, mx.array], prefix: str
) -> HyperConnection | HyperHead:
    """Load a hyper-connection or the read-out of a DeepSeek V4 checkpoint, in place.

        connection = HyperConnection(dim, 4, convention=DEEPSEEK_V4, norm_eps=rms_norm_eps)
        load_v4(connection, weights, "layers.0.hc_attn")  # or "layers.0.hc_ffn"
        head = load_v4(HyperHead(dim, 4, convention=DEEPSEEK_V4), weights, "hc_head")

    ``{prefix}_fn``, ``{prefix}_base`` and ``{prefix}_scale`` are phi, bias and alpha. mlx-lm's
    names, which have a dot in place of the underscore, work too.

    Args:
        module: A dynamic `HyperConnection` or a `HyperHead` with the convention DEEPSEEK_V4, or
            with one that differs from it only in iters, eps and pre_eps.
        weights: Arrays by name, of which three are loaded.
        prefix: The beginning of the three names.

    Returns:
        The module.

    Raises:
        TypeError: The module is neither of the two, or a tensor is no array of floats.
        ValueError: The module has another convention, or a tensor is missing or has another shape.
    """
    if not isinstance(module, (HyperConnection, HyperHead)) or "phi" not in module:
        must = "be a dynamic HyperConnection or a HyperHead"
        raise TypeError(fail("load_v4", "module", must, type(module).__name__))
    if not isinstance(weights, dict):
        raise TypeError(fail("load_v4", "weights", "be a dict", type(weights).__name__))
    if not isinstance(prefix, str):
        raise TypeError(fail("load_v4", "prefix", "be a str", type(prefix).__name__))
    c, v4 = module._convention, DEEPSEEK_V4
    if c != replace(v4, name=c.name, iters=c.iters, eps=c.eps, pre_eps=c.pre_eps):
        raise ValueError(f"[load_v4] module.convention must be DEEPSEEK_V4's but got {c.name}.")
    found: list[tuple[str, mx.array]] = []
    for ours, theirs in (("phi", "fn"), ("bias", "base"), ("alpha", "scale")):
        name = next((k for k in (f"{prefix}_{theirs}", f"{prefix}.{theirs}") if k in weights), None)
        if name is None:
            raise ValueError(f"[load_v4] weights must have {prefix}_{theirs} but have it not.")
        check_dtype("load_v4", **{name: weights[name]})
        if weights[name].shape != module[ours].shape:
            must, got = list(module[ours].shape), list(weights[name].shape)
            raise ValueError(f"[load_v4] {name} must have shape {must} but got {got}.")
        found.append((ours, weights[name]))
    module.load_weights(found, strict=False)  # because an MHCLayer also has the weight of a norm
    return module
