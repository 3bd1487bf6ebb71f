"""`patch` and `unpatch` change the classes of a model's modules, and nothing else."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import ops
from ..layers import check_sizes
from ..ops.checks import check_bools, check_number
from .exact import random_inputs, site_errors, streams_dtype
from .gradients import TRAINED
from .layers import Owner, SinglePassLayer
from .sites import (
    MODELS,
    SinglePassConnection,
    find_sites,
    stage_layers,
    stock,
    text_model,
)

_STOCK = {v: k for k, v in TRAINED.items()}
_STOCK |= {SinglePassLayer: stock.DecoderLayer, SinglePassConnection: stock.HyperConnection}


def _set_class(module: nn.Module, classes: dict[type, type]) -> None:
    module.__class__ = classes.get(type(module), type(module))


def _install(text: stock.TextModel, trainable: bool, use_metal: bool) -> None:
    for layer in stage_layers(text):
        layer.__class__, layer._owner = SinglePassLayer, Owner(text)
        for hc in (layer.attn_hc, layer.ffn_hc):
            hc.__class__ = SinglePassConnection
            hc.use_metal, hc.differentiable = use_metal, trainable
        if trainable:
            for module in layer.modules():
                _set_class(module, TRAINED)


def patch(
    model: nn.Module, *, trainable: bool = False, verify: bool = True, use_metal: bool = True
) -> nn.Module:
    """Run the hyper-connections of mlx-lm's DeepSeek V4.1 on these kernels, in place.

    Only the classes of modules change. Parameters keep their names ``fn``, ``base`` and ``scale``,
    so checkpoints, quantised models, adapters, `shard` and `pipeline`, before or after, work as
    they did. Between two sublayers one `mhc_single_pass` computes what mlx-lm does and rounds where
    mlx-lm rounds. Where kernels run without a gradient it is compiled, with the parameters as
    arguments. A second call on a patched model applies the new options.

    With ``trainable=True`` the model gets a gradient, which mlx-lm's model does not have.
    Hyper-connections have the gradient of these ops. The choice of experts and of compressed keys
    passes no gradient, so the indexer, which serves that choice alone, does not learn. The
    simulated quantisation of keys and values has the gradient of the identity. The results of the
    model stay the same. A call under mlx-lm's ``grad_checkpoint`` raises ValueError, because that
    breaks the arrays that the layers of this model share.

    Args:
        model: A ``deepseek_v41`` model, evaluated or not. On a pipeline the stage of this process
            is patched.
        trainable: Whether the model gets a gradient.
        verify: Whether to patch a site only if its error is small enough: on random tokens, with
            its weights, its error against float64 must be at most that of mlx-lm's code, or 2 units
            in the last place of the model's dtype. A warning names the other sites, which stay
            mlx-lm's. The number of tokens decides which kernels run, so a site of each kind also
            runs with 1 and 512 tokens; if one of these fails, no site is patched.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.

    Returns:
        The model.

    Raises:
        TypeError: The model is no ``deepseek_v41``, a layer has another class, or an option is no
            bool.
        ValueError: The model's ``hc_sinkhorn_iters`` or ``rms_norm_eps`` is not positive, or its
            ``hc_eps`` is negative.
    """
    text = text_model("patch", model)
    check_bools("patch", trainable=trainable, verify=verify, use_metal=use_metal)
    unpatch(model)
    for layer in stage_layers(text):
        for module, kind in (
            *((layer, stock.DecoderLayer), (layer.self_attn, stock.Attention)),
            *((layer.attn_hc, stock.HyperConnection), (layer.ffn_hc, stock.HyperConnection)),
        ):
            if type(module) is not kind:
                got = f"{type(module).__module__}.{type(module).__qualname__}"
                raise TypeError(
                    f"[patch] model.layers must be as in {MODELS} but got {got} for a "
                    f"{kind.__name__}."
                )
    for site in find_sites(text):
        check_sizes("patch", hc_sinkhorn_iters=(site.hc.iters, math.inf))
        check_number("patch", "hc_eps", site.hc.hc_eps, 0.0, "be finite and at least 0")
        ops.check_eps("patch", site.hc.norm_eps, "rms_norm_eps")
    _install(text, trainable, use_metal)
    if verify:
        try:
            _drop_failing(text, trainable)
        except BaseException:
            unpatch(model)
            raise
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: give the modules of a model mlx-lm's classes again, and return the model.

    The results are then, bit for bit, those of before `patch`. A model that is not patched does not
    change.

    Raises:
        TypeError: The model is no ``deepseek_v41``.
    """
    for layer in stage_layers(text_model("unpatch", model)):
        if isinstance(layer, SinglePassLayer):
            del layer._owner
        for module in layer.modules():
            if isinstance(module, SinglePassConnection):
                _release(module)
            _set_class(module, _STOCK)
    return model


def _release(hc: Any) -> None:
    """Give a patched hyper-connection mlx-lm's class again."""
    del hc.use_metal, hc.differentiable
    hc.__class__ = stock.HyperConnection


@contextlib.contextmanager
def as_stock(text: stock.TextModel) -> Iterator[None]:
    """Give all modules mlx-lm's classes until the context ends."""
    modules = [module for layer in stage_layers(text) for module in layer.modules()]
    classes = [type(module) for module in modules]
    try:
        for module in modules:
            _set_class(module, _STOCK)
        yield
    finally:
        for module, kind in zip(modules, classes, strict=True):
            module.__class__ = kind


def _fails(ours: float, theirs: float) -> bool:
    return not ours <= max(theirs, 2.0)


def _kind_of_norm(norm: nn.Module | None) -> tuple[Any, ...]:
    """Return the kind of a site's norm: sites with norms of one kind run the same kernels."""
    parameters: Any = [] if norm is None else tree_flatten(norm.parameters())
    return type(norm), *(a.dtype for _, a in parameters)


def _drop_failing(text: stock.TextModel, trainable: bool) -> None:
    """Give sites whose errors are too large mlx-lm's class again, and warn about them."""
    dtype, sites, failing, checked_kinds = streams_dtype(text), find_sites(text), [], set()
    for k, site in enumerate(sites):
        x, y = random_inputs(site, dtype, 4, k)
        if _fails(*site_errors(site, x, y)):
            failing.append(site)
        elif (kind := _kind_of_norm(site.norm)) not in checked_kinds:
            one_token = site_errors(site, x[:, :1], y[:, :1])
            if _fails(*one_token) or _fails(*site_errors(site, x, y, 128)):
                failing = sites  # the number of tokens is the cause, not the weights of this site
                break
            checked_kinds.add(kind)
    for site in failing:
        _release(site.hc)
        if trainable:
            _set_class(site.hc, TRAINED)
    if failing:
        names = ", ".join(site.name for site in failing)
        warnings.warn(
            f"[patch] {len(failing)} of {len(sites)} hyper-connections stay mlx-lm's, because their"
            f" error against float64 is more than mlx-lm's and 2 units in the last place: {names}.",
            stacklevel=3,
        )
