"""Sources: the names, shapes and conventions of other projects' hyper-connections, for `load`.

docs/converting.md has these as tables.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import mlx.core as mx

from .conventions import (
    ADDITIVE,
    DEEPSEEK_V4,
    HUNYUAN_V4,
    MHC_LITE,
    ROW_FIRST,
    XING,
    Convention,
)
from .ops.checks import fail

__all__ = ["KINDS", "LAYOUTS", "PARTS", "STEPS", "Given", "Layout", "Tensor", "sizes"]

# Modules that tensors are loaded into. One with a norm takes the weight of the sublayer's RMSNorm.
KINDS = {
    "dynamic": "a dynamic HyperConnection",
    "dynamic with norm": "a dynamic MHCLayer",
    "static": "a static HyperConnection",
    "static with norm": "a static MHCLayer",
    "head": "a HyperHead",
    "gated": "a GatedResidual",
    "gated head": "a GatedHead",
}
PARTS = ("pre", "post", "res")  # of phi, bias and alpha, in the order of their rows


class Tensor(NamedTuple):
    """A tensor of a source: its name and shape there, and where it goes.

    ``to`` names a parameter of ours, with a dot between a submodule and its own, or in brackets
    parts of its first axis. It is empty for a tensor that only serves a step of another. ``steps``
    are names in `STEPS`, done in turn before the tensor is put there. Sizes are keys of `sizes`, or
    rank.
    """

    name: str
    shape: tuple[str, ...]
    to: str
    steps: tuple[str, ...] = ()


class Layout(NamedTuple):
    """The tensors that a source has for one kind of module, and the module that they need.

    The module's convention must be ``convention``, but for the fields in ``free``. These come from
    the configuration beside a checkpoint: ``settings`` says how. None is that of a module without a
    convention.
    """

    source: str
    models: str
    kind: str
    convention: Convention | None
    free: tuple[str, ...]
    settings: str
    prefixes: str
    tensors: tuple[Tensor, ...]

    def fits(self, c: Convention | None) -> bool:
        """Tell whether a module with convention c computes what the source does."""
        if c is None or self.convention is None:
            return c is self.convention
        names = {field.name for field in fields(c)} - {"name", *self.free}
        return all(getattr(c, name) == getattr(self.convention, name) for name in names)


class Given(NamedTuple):
    """What a step may need beside its tensor: all of them by name, and what the module is."""

    tensors: dict[str, mx.array]
    full_names: dict[str, str]
    n: int
    convention: Convention | None


def sizes(n: int, C: int) -> dict[str, int]:
    """Return the sizes by which the shapes of tensors are written."""
    orders = math.factorial(n)
    return {
        **{"1": 1, "2": 2, "3": 3, "C": C, "n": n, "2n": 2 * n, "n*C": n * C, "n*n": n * n},
        **{"n!": orders, "2n+n*n": 2 * n + n * n, "n+n!": n + orders, "2n+n!": 2 * n + orders},
    }


def _take_res(a: mx.array, order: list[int]) -> mx.array:
    """Return a with its last rows, one for each permutation, in this order."""
    first = a.shape[0] - len(order)
    return mx.concatenate([a[:first], a[first:][mx.array(order)]])


def _in_order_of_perm_mat(a: mx.array, given: Given) -> mx.array:
    n, name = given.n, given.full_names["perm_mat"]
    matrices: list = given.tensors["perm_mat"].reshape(-1, n, n).tolist()  # type: ignore[assignment]
    ours = list(itertools.permutations(range(n)))
    found = {
        order: matrices.index([[float(k == column) for k in range(n)] for column in order])
        for order in ours
        if [[float(k == column) for k in range(n)] for column in order] in matrices
    }
    if len(found) < len(ours):
        must = f"have each of the {len(ours)} permutation matrices once, in any order,"
        raise ValueError(fail("load", name, must, f"{len(found)} of them"))
    return _take_res(a, [found[order] for order in ours])


def _in_order_of_inverses(a: mx.array, given: Given) -> mx.array:
    ours = list(itertools.permutations(range(given.n)))
    inverses = [tuple(order.index(k) for k in range(given.n)) for order in ours]
    return _take_res(a, [ours.index(order) for order in inverses])


def _times_gamma(a: mx.array, given: Given) -> mx.array:
    return a.astype(mx.float32) * (1 + given.tensors["norm.gamma"].astype(mx.float32))


def _less_identity(a: mx.array, given: Given) -> mx.array:
    assert given.convention is not None  # its layout has one
    return mx.abs(a.astype(mx.float32)) - mx.eye(given.n) + given.convention.eps


PERM_MAT = "rows of res in the order of perm_mat"
INVERSES = "rows of res in the order of the inverse permutations"
GAMMA = "columns times 1 + norm.gamma, in float32"
SIGMOID = "sigmoid, in float32"
SHARE = "divided by its sum + 1e-8"
BY_STREAM = "a row of C for each stream"
LESS_IDENTITY = "abs - I + eps, in float32"

STEPS: dict[str, Callable[[mx.array, Given], mx.array]] = {
    "transposed": lambda a, given: a.T,
    BY_STREAM: lambda a, given: a.reshape(given.n, -1),
    "flat": lambda a, given: a.reshape(-1),
    GAMMA: _times_gamma,
    PERM_MAT: _in_order_of_perm_mat,
    INVERSES: _in_order_of_inverses,
    SIGMOID: lambda a, given: mx.sigmoid(a.astype(mx.float32)),
    SHARE: lambda a, given: a / (a.sum() + 1e-8),
    LESS_IDENTITY: _less_identity,
}

_GATED = (  # of Qwen's connections and of its read-out
    Tensor("hc_norm.weight", ("n*C",), "weight", (BY_STREAM,)),
    Tensor("input_mix_weight_down.weight", ("rank", "n*C"), "down.weight"),
    Tensor("input_mix_weight_up.weight", ("n*C", "rank"), "up.weight"),
)

LAYOUTS = (
    Layout(
        source="deepseek_v4",
        models="DeepSeek V4, V4.1, GLM-5.3",
        kind="dynamic",
        convention=DEEPSEEK_V4,
        free=("iters", "eps", "pre_eps"),
        settings="iters = hc_sinkhorn_iters, eps = pre_eps = hc_eps; norm_eps = rms_norm_eps",
        prefixes="layers.0.hc_attn, layers.0.hc_ffn; in MLX also model.layers.0.attn_hc, ...ffn_hc",
        tensors=(
            Tensor("fn", ("2n+n*n", "n*C"), "phi"),
            Tensor("base", ("2n+n*n",), "bias"),
            Tensor("scale", ("3",), "alpha"),
        ),
    ),
    Layout(
        source="deepseek_v4",
        models="DeepSeek V4",
        kind="head",
        convention=DEEPSEEK_V4,
        free=("iters", "eps", "pre_eps"),
        settings="pre_eps = hc_eps; norm_eps = rms_norm_eps",
        prefixes="hc_head; in MLX also model.hc_head",
        tensors=(
            Tensor("fn", ("n", "n*C"), "phi"),
            Tensor("base", ("n",), "bias"),
            Tensor("scale", ("1",), "alpha"),
        ),
    ),
    Layout(
        source="hy_v4",
        models="Hy4 (Hunyuan V4)",
        kind="dynamic",
        convention=HUNYUAN_V4,
        free=("pre_eps", "post_scale", "post_eps"),
        settings="post_scale = hc_magnitude, pre_eps = hc_eps, post_eps = hc_eps in transformers "
        "and 0 in mlx-vlm; norm_eps = rms_norm_eps",
        prefixes="model.layers.0.hc_attn_layer.hc_pre, model.layers.0.hc_mlp_layer.hc_pre",
        tensors=(
            Tensor("hc_fn", ("2n", "n*C"), "phi"),
            Tensor("hc_base", ("2n",), "bias"),
            Tensor("hc_scale", ("2",), "alpha"),
        ),
    ),
    Layout(
        source="hy_v4",
        models="Hy4 (Hunyuan V4)",
        kind="head",
        convention=HUNYUAN_V4,
        free=("pre_eps", "post_scale", "post_eps"),
        settings="pre_eps = hc_eps; norm_eps = rms_norm_eps",
        prefixes="model.hc_head",
        tensors=(
            Tensor("hc_head_fn", ("n", "n*C"), "phi"),
            Tensor("hc_head_base", ("n",), "bias"),
            Tensor("hc_head_scale", ("1",), "alpha"),
        ),
    ),
    Layout(
        source="xing4_0",
        models="Xing 4",
        kind="dynamic",
        convention=XING,
        free=("iters", "eps", "clamp"),
        settings="iters = hc_sinkhorn_iters, eps = hc_eps, clamp = (mhc_h_res_clamp_min, "
        "mhc_h_res_clamp_max); norm_eps = rms_norm_eps",
        prefixes="model.layers.0.attn_hc, model.layers.0.ffn_hc",
        tensors=(
            Tensor("hc_fn", ("2n+n*n", "n*C"), "phi"),
            Tensor("hc_base", ("2n+n*n",), "bias"),
            Tensor("hc_scale", ("3",), "alpha"),
        ),
    ),
    Layout(
        source="mhc_cu",
        models="mHC.cu MHCLayer, use_dynamic_h=True",
        kind="dynamic with norm",
        convention=ROW_FIRST,
        free=("iters",),
        settings="iters = sinkhorn_iters; norm_eps = eps = its eps",
        prefixes="that of its MHCLayer",
        tensors=(
            Tensor("phi_pre", ("n", "n*C"), "phi[pre]"),
            Tensor("phi_post", ("n", "n*C"), "phi[post]"),
            Tensor("phi_res", ("n*n", "n*C"), "phi[res]"),
            Tensor("b_pre", ("n",), "bias[pre]"),
            Tensor("b_post", ("n",), "bias[post]"),
            Tensor("b_res", ("n", "n"), "bias[res]", ("flat",)),
            Tensor("alpha_pre", (), "alpha[pre]", ("flat",)),
            Tensor("alpha_post", (), "alpha[post]", ("flat",)),
            Tensor("alpha_res", (), "alpha[res]", ("flat",)),
            Tensor("rmsnorm_weight", ("C",), "rms_weight"),
        ),
    ),
    Layout(
        source="mhc_cu",
        models="mHC.cu MHCLayer, use_dynamic_h=False",
        kind="static with norm",
        convention=ROW_FIRST,
        free=("iters",),
        settings="iters = sinkhorn_iters; eps = its eps",
        prefixes="that of its MHCLayer",
        tensors=(
            Tensor("H_pre", ("n",), "H_pre"),
            Tensor("H_post", ("n",), "H_post"),
            Tensor("H_res", ("n", "n"), "H_res"),
            Tensor("rmsnorm_weight", ("C",), "rms_weight"),
        ),
    ),
    Layout(
        source="mhc_lite",
        models="mHC-lite MHCLite, num_fracs = num_input_views = 1",
        kind="dynamic",
        convention=MHC_LITE,
        free=(),
        settings="norm_eps = 1e-20, because it adds none",
        prefixes="that of its MHCLite",
        tensors=(
            Tensor("norm.gamma", ("n*C",), ""),
            Tensor(
                name="dynamic_alpha_fn",
                shape=("n*C", "n+n!"),
                to="phi[pre, res]",
                steps=("transposed", GAMMA, INVERSES),
            ),
            Tensor("dynamic_beta_fn", ("n*C", "n"), "phi[post]", ("transposed", GAMMA)),
            Tensor("static_alpha", ("n+n!",), "bias[pre, res]", (INVERSES,)),
            Tensor("static_beta", ("n",), "bias[post]"),
            Tensor("pre_branch_scale", ("1",), "alpha[pre]"),
            Tensor("h_post_scale", (), "alpha[post]", ("flat",)),
            Tensor("residual_scale", ("1",), "alpha[res]"),
        ),
    ),
    Layout(
        source="flash_mhc",
        models="flash-mHC MHCLiteBlock",
        kind="dynamic",
        convention=MHC_LITE,
        free=(),
        settings="norm_eps = 1e-6, that of its kernels; it writes h_post (F(u) - u): "
        "MHCLiteBlock(subtract_input=True)",
        prefixes="that of its MHCLiteBlock",
        tensors=(
            Tensor("perm_mat", ("n!", "n*n"), ""),
            Tensor("W_all.weight", ("2n+n!", "n*C"), "phi", (PERM_MAT,)),
            Tensor("W_all.bias", ("2n+n!",), "bias", (PERM_MAT,)),
            Tensor("alpha_pre", ("1",), "alpha[pre]"),
            Tensor("alpha_post", ("1",), "alpha[post]"),
            Tensor("alpha_res", ("1",), "alpha[res]"),
        ),
    ),
    Layout(
        source="mhc_triton",
        models="mHC-triton HyperConnection, dynamic=False",
        kind="static",
        convention=ADDITIVE,
        free=("iters", "eps"),
        settings="iters = sinkhorn_iters, eps = 1e-8",
        prefixes="that of its HyperConnection",
        tensors=(
            Tensor("H_pre_base", ("n",), "H_pre", (SIGMOID, SHARE)),
            Tensor("H_post_base", ("n",), "H_post", (SIGMOID,)),
            Tensor("H_res_base", ("n", "n"), "H_res", (LESS_IDENTITY,)),
        ),
    ),
    Layout(
        source="qwen4_exp",
        models="Qwen3.8-Flash-Next",
        kind="gated",
        convention=None,
        free=(),
        settings="rank = hc_lowrank; eps = rms_norm_eps",
        prefixes="model.language_model.layers.0.attn_hyper_connection, ...mlp_hyper_connection; in "
        "MLX language_model.model.layers.0...",
        tensors=(*_GATED, Tensor("block_inject_weight.weight", ("n", "n*C"), "inject.weight")),
    ),
    Layout(
        source="qwen4_exp",
        models="Qwen3.8-Flash-Next",
        kind="gated head",
        convention=None,
        free=(),
        settings="rank = hc_lowrank; eps = rms_norm_eps",
        prefixes="model.language_model.hyper_connection_mixer; in MLX "
        "language_model.model.hyper_connection_mixer",
        tensors=_GATED,
    ),
)
