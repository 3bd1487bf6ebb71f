"""`patch`, `unpatch`, and which sites are kept: classes of modules change, nothing else."""

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

_OWN = {v: k for k, v in TRAINED.items()}
_OWN |= {SinglePassLayer: stock.DecoderLayer, SinglePassConnection: stock.HyperConnection}


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

    Classes of modules change, nothing else: parameters keep their names ``fn``, ``base``,
    ``scale``, so checkpoints, quantised models, adapters, `shard` and `pipeline`, before or after,
    work as they did. Between two sublayers one `mhc_single_pass` computes what mlx-lm does, rounded
    where mlx-lm rounds; by kernels and without a gradient it is compiled, parameters its arguments.
    Patching a patched model anew applies the new options.

    With ``trainable=True`` the model has a gradient, which mlx-lm's has not: hyper-connections
    through these ops' own; no gradient through the choice of experts and of compressed keys, so
    that what serves that choice alone (the indexer) learns nothing; and the gradient of the
    identity for simulated quantisation of keys and values. The results stay the same. mlx-lm's
    ``grad_checkpoint`` is refused, because it breaks the arrays that layers of this model share.

    Args:
        model: A ``deepseek_v41`` model, evaluated or not; on a pipeline, its own stage is patched.
        trainable: Whether the model gets a gradient.
        verify: Keep a site only if, on random tokens and with its own weights, its error against
            float64 is at most the larger of mlx-lm's and 2 units in the last place of the model's
            dtype; a warning names the sites that stay mlx-lm's. Kernels follow the number of
            tokens, so one site of each kind runs 1 and 512 too; where one fails, all stay.
        use_metal: Run the kernels where the default device has them; otherwise the reference.

    Returns:
        The model.

    Raises:
        TypeError: The model is another, or a layer of it; or an option is no bool.
        ValueError: Its ``hc_sinkhorn_iters`` or an eps is not positive.
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
    """Give a model back the classes that mlx-lm gave it: its results are bit for bit what they were
    before `patch`. A model that is not patched stays as it is.

    Raises:
        TypeError: The model is not a ``deepseek_v41``.
    """
    for layer in stage_layers(text_model("unpatch", model)):
        if isinstance(layer, SinglePassLayer):
            del layer._owner
        for module in layer.modules():
            if isinstance(module, SinglePassConnection):
                _release(module)
            _set_class(module, _OWN)
    return model


def _release(hc: Any) -> None:
    del hc.use_metal, hc.differentiable
    hc.__class__ = stock.HyperConnection


@contextlib.contextmanager
def as_stock(text: stock.TextModel) -> Iterator[None]:
    """Classes as mlx-lm's for a while."""
    modules = [module for layer in stage_layers(text) for module in layer.modules()]
    classes = [type(module) for module in modules]
    try:
        for module in modules:
            _set_class(module, _OWN)
        yield
    finally:
        for module, kind in zip(modules, classes, strict=True):
            module.__class__ = kind


def _fails(ours: float, theirs: float) -> bool:
    return not ours <= max(theirs, 2.0)


def _kind_of_norm(norm: nn.Module | None) -> tuple[Any, ...]:
    """Sites whose norms are of one kind run the same kernels."""
    parameters: Any = [] if norm is None else tree_flatten(norm.parameters())
    return type(norm), *(a.dtype for _, a in parameters)


def _drop_failing(text: stock.TextModel, trainable: bool) -> None:
    dtype, sites, failing, counted = streams_dtype(text), find_sites(text), [], set()
    for k, site in enumerate(sites):
        x, y = random_inputs(site, dtype, 4, k)
        if _fails(*site_errors(site, x, y)):
            failing.append(site)
        elif (kind := _kind_of_norm(site.norm)) not in counted:
            one_token = site_errors(site, x[:, :1], y[:, :1])
            if _fails(*one_token) or _fails(*site_errors(site, x, y, 128)):
                failing = sites  # not its weights but the number of tokens is why
                break
            counted.add(kind)
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
