"""`patch` and `unpatch` change the classes of a model's modules, and nothing else."""

import contextlib
import warnings
from collections.abc import Iterator

import mlx.nn as nn

from .. import ops
from ..ops.checks import check_bools, fail
from .families import family_of
from .family import Family, Options, Patched, Site, mapped
from .verify import failure


def enable(site: Site, options: Options) -> None:
    """Let a site run on these kernels."""
    family = site.family
    if type(site.hc) not in family.layers.values():
        mapped(family.own, site.hc)  # a class with gradients stands for the package's
        mapped(family.connections, site.hc)
    if "_mhc" not in vars(site.hc):
        site.hc._mhc = Patched()
    site.hc._mhc.sites[site.prefix] = options


def release(site: Site, trainable: bool = False) -> None:
    """Let a site run the package's own code again; its layer stays patched."""
    family = site.family
    del site.hc._mhc.sites[site.prefix]
    if type(site.hc) in family.connections.values():
        del site.hc._mhc
        mapped(family.own, site.hc)
        if trainable:
            mapped(family.trained, site.hc)


def _install(family: Family, model: nn.Module, options: Options) -> list[Site]:
    sites = family.sites(model)
    swaps = {**(family.trained if options.differentiable else {}), **family.layers}
    for module in model.modules():
        mapped(swaps, module)
    for site in sites:
        enable(site, options)
    family.prepare(model)
    return sites


def patch(
    model: nn.Module,
    *,
    trainable: bool = False,
    verify: bool = True,
    use_metal: bool = True,
    rounding: str = "stock",
) -> nn.Module:
    """Run the hyper-connections of a model on these kernels, in place.

    The model's family (`mhc_mlx.models.families`) is found by its classes. Only the classes of
    modules change. Parameters keep their names, so checkpoints, quantised models, adapters and
    sharding, before or after, work as they did. A site rounds where the package's code rounds; in
    16 bits a site of xing4_0 or qwen4_exp rounds less often. Where kernels run without a gradient
    it is compiled, with the parameters as arguments. A second call on a patched model applies the
    new options.

    With ``trainable=True`` the model gets a gradient, which most of these models do not have.
    Hyper-connections have the gradient of these ops. The choice of experts and of compressed keys
    passes no gradient, so an indexer, which serves that choice alone, does not learn. Simulated
    quantisation has the gradient of the identity. A table of experts by token and the constants of
    a hash are integers and stay frozen, after `unpatch` too. The results of the model stay the
    same. A call of deepseek_v41 under ``grad_checkpoint`` raises ValueError, because that breaks
    the arrays that the layers of this model share.

    Args:
        model: A model of one of the families, or a drafter of one, evaluated or not. On a pipeline
            the stage of this process is patched.
        trainable: Whether the model gets a gradient.
        verify: Whether to patch a site only if its errors against float64 are small enough, on
            random streams of 1, 8 and 512 tokens. First in float32, with scales at which logits
            deviate by 6: the median error of each output over tokens must be at most twice that of
            the package's code, or 4 units in the last place, and the largest at most 16 times
            these. Then, where a site has an h_res, with logits that deviate by 24: the ninth decile
            must be at most twice that of the package's code, or 128 units. Last in the model's
            dtype with the site's own scales: the largest must be at most that of the package's
            code (of a gated residual twice that), or 2 units. Each site decides alone. A warning
            names the others with both errors and the limit; they keep the package's code.
        use_metal: Run the kernels where the default device has them; otherwise the reference runs.
        rounding: In 16 bits, "stock" rounds what is read before its norm and before the weight of
            that norm, and where the package does the coefficients, so that tokens are the
            package's. "once" rounds only what is read and what is written, which is nearer to
            float32, and a site that is not lagged then has one launch less. A gated residual
            (qwen4_exp) has "stock" alone.

    Returns:
        The model.

    Raises:
        TypeError: The model is no `nn.Module`, a layer has another class, or an option has another
            type.
        ValueError: The model is of no family, or of another version of its package; its number of
            Sinkhorn iterations or an eps is out of range; or the family has no such rounding.
    """
    check_bools("patch", trainable=trainable, verify=verify, use_metal=use_metal)
    if not isinstance(rounding, str):
        raise TypeError(fail("patch", "rounding", "be a str", type(rounding).__name__))
    family = family_of("patch", model)
    if rounding not in family.roundings:
        must = f"be {' or '.join(map(repr, family.roundings))} for this model"
        raise ValueError(fail("patch", "rounding", must, repr(rounding)))
    unpatch(model)
    family.check_model("patch", model)
    for site in family.sites(model):
        ops.check_eps("patch", site.settings.norm_eps, "rms_norm_eps")
    options = Options(use_metal, trainable, rounding)
    sites = _install(family, model, options)
    if verify:
        try:
            _drop_failing(family, model, sites, options)
        except BaseException:
            unpatch(model)
            raise
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: give the modules of a model the package's classes again, and return the model.

    The results are then, bit for bit, those of before `patch`. A model that is not patched does not
    change.

    Raises:
        TypeError: The model is no `nn.Module`.
        ValueError: The model is of no family, or of another version of its package.
    """
    family = family_of("unpatch", model)
    for module in model.modules():
        family.forget(module)
        if "_mhc" in vars(module):
            del module._mhc
        mapped(family.own, module)
    return model


@contextlib.contextmanager
def as_stock(model: nn.Module) -> Iterator[None]:
    """Give all modules the package's classes until the context ends."""
    own = family_of("as_stock", model).own
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    try:
        for module in modules:
            mapped(own, module)
        yield
    finally:
        for module, kind in zip(modules, classes, strict=True):
            module.__class__ = kind


def is_patched(model: nn.Module) -> bool:
    """Tell whether a site of a model is patched."""
    return any(site.options is not None for site in family_of("is_patched", model).sites(model))


def _drop_failing(family: Family, model: nn.Module, sites: list[Site], options: Options) -> None:
    """Give sites whose errors are too large the package's code again, and warn about them."""
    dtype = family.dtype(model)
    found = [failure(site, options, dtype, k) for k, site in enumerate(sites)]
    failing = [f for f in found if f is not None]
    for f in failing:
        release(f.site, options.differentiable)
    if failing:
        listed = "; ".join(map(str, failing))
        warnings.warn(
            f"[patch] {len(failing)} of {len(sites)} hyper-connections keep {family.package}'s "
            f"code, because their error against float64 is too large: {listed}.",
            stacklevel=3,
        )
