"""`load` puts the tensors of other projects into modules of this package, by their names there."""

from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .conventions import Convention
from .gated import GatedHead, GatedResidual
from .layers import HyperConnection, HyperHead, MHCBlock
from .ops.checks import check_dtype, fail
from .sources import KINDS, LAYOUTS, PARTS, STEPS, Given, Layout, Tensor, sizes

__all__ = ["load"]

Kind = HyperConnection | HyperHead | GatedResidual | GatedHead
Loaded = TypeVar("Loaded", bound=Kind | MHCBlock)
SOURCES = tuple(dict.fromkeys(layout.source for layout in LAYOUTS))


def _under(weights: dict[str, mx.array], prefix: str) -> dict[str, str]:
    """Return full names by what follows the prefix and its separator, a dot or an underscore."""
    full_names: dict[str, str] = {}
    for full in weights:
        if prefix and not full.startswith((f"{prefix}.", f"{prefix}_")):
            continue
        name = full[len(prefix) + 1 :] if prefix else full
        if name in full_names:
            must = f"stand for the same tensor as {full_names[name]}, or not be there,"
            raise ValueError(fail("load", full, must, "a second one"))
        full_names[name] = full
    return full_names


def _convention(module: Kind) -> Convention | None:
    return None if isinstance(module, (GatedResidual, GatedHead)) else module._convention


def _of_kind(layout: Layout, module: Kind) -> bool:
    for kind, cls in (("head", HyperHead), ("gated", GatedResidual), ("gated head", GatedHead)):
        if layout.kind == kind or isinstance(module, cls):
            return layout.kind == kind and isinstance(module, cls)
    kind, _, norm = layout.kind.partition(" with ")
    return kind == ("dynamic" if module.dynamic else "static") and (
        not norm or "rms_weight" in module
    )


def _module_sizes(module: Kind) -> dict[str, int]:
    if isinstance(module, (GatedResidual, GatedHead)):
        return sizes(module.num_streams, module.dim) | {"rank": module.rank}
    if isinstance(module, HyperConnection):
        return sizes(module.num_streams, module.dim)
    n, width = module.phi.shape
    return sizes(n, width // n)


def _recognise(layouts: list[Layout], module, prefix: str, given: dict[str, mx.array]) -> Layout:
    """Return the layout that names speak for, then the kind of module, then shapes."""
    size = _module_sizes(module)

    def order(layout: Layout) -> tuple[int, ...]:
        present = [tensor for tensor in layout.tensors if tensor.name in given]
        fitting = [t for t in present if given[t.name].shape == tuple(size.get(s) for s in t.shape)]
        absent = len(layout.tensors) - len(present)
        kind, convention = _of_kind(layout, module), layout.fits(_convention(module))
        return len(present), kind, -absent, len(fitting), convention

    best = max(layouts, key=order)
    if not order(best)[0]:
        names = [f"{x.source} has {', '.join(t.name for t in x.tensors)}" for x in layouts]
        must = f"have tensors of a source under {prefix!r} ({'; '.join(dict.fromkeys(names))})"
        raise ValueError(fail("load", "weights", must, f"only {list(given)}"))
    return best


def _check_module(layout: Layout, module: Kind) -> None:
    """Raise ValueError unless the module is of the layout's kind and convention.

    TypeError says that a parameter belongs to a submodule that is no `nn.Linear`.
    """
    what = f"the tensors of {layout.source} ({layout.models})"
    if not _of_kind(layout, module):
        got = type(module).__name__
        if isinstance(module, HyperConnection):
            got = f"{'dynamic' if module.dynamic else 'static'} {got}"
        raise ValueError(fail("load", "module", f"be {KINDS[layout.kind]} for {what}", got))
    c = _convention(module)
    if not layout.fits(c) and c is not None and layout.convention is not None:
        but = f" but for {', '.join(layout.free)}" if layout.free else ""
        must = f"be {layout.convention.name}'s{but} for {what}"
        raise ValueError(fail("load", "module.convention", must, f"{c.name}: {c}"))
    for tensor in layout.tensors:
        child, dot, _ = tensor.to.partition(".")
        if dot and not isinstance(module[child], nn.Linear):
            got = type(module[child]).__name__
            raise TypeError(fail("load", f"module.{child}", f"be an nn.Linear for {what}", got))


def _check_tensors(layout: Layout, module, given: Given) -> None:
    """Raise ValueError for a tensor that is missing, unknown, or of another shape."""
    size = _module_sizes(module)
    for tensor in layout.tensors:
        must = [size[s] for s in tensor.shape]
        if tensor.name not in given.tensors:
            (some, full), *_ = given.full_names.items()  # has the separator
            of = f"have {full.removesuffix(some)}{tensor.name} of shape {must} ({layout.source})"
            raise ValueError(fail("load", "weights", of, f"only {[*given.full_names.values()]}"))
        got = list(given.tensors[tensor.name].shape)
        if got != must:
            full = given.full_names[tensor.name]
            raise ValueError(fail("load", full, f"have shape {must}", got))
    known = [tensor.name for tensor in layout.tensors]
    for name, a in given.tensors.items():
        if name not in known:
            must = f"be a tensor of {layout.source} ({', '.join(known)}) or be left by leave"
            got = f"an unknown one of shape {list(a.shape)}"
            raise ValueError(fail("load", given.full_names[name], must, got))


def _rows(parts: list[str], rows: int, n: int) -> list[int]:
    """Return how many of a tensor's rows belong to each part: n, n and the rest, or one each."""
    if rows == len(parts):
        return [1] * len(parts)
    return [rows - n * (len(parts) - 1) if part == "res" else n for part in parts]


def _split(tensor: Tensor, a: mx.array, n: int) -> tuple[str, dict[str, mx.array]]:
    """Return the parameter of ours that a tensor goes to, and what goes to each of its parts."""
    parameter, _, inside = tensor.to.rstrip("]").partition("[")
    if not inside:
        return parameter, {"": a}
    parts, found, first = inside.split(", "), {}, 0
    for part, count in zip(parts, _rows(parts, a.shape[0], n), strict=True):
        found[part] = a[first : first + count]
        first += count
    return parameter, found


def _parameters(layout: Layout, module, given: Given) -> dict[str, mx.array]:
    """Return the parameters of ours that a source's tensors make."""
    collected: dict[str, dict[str, mx.array]] = {}
    last: dict[str, str] = {}
    for tensor in layout.tensors:
        if not tensor.to:
            continue
        a = given.tensors[tensor.name]
        for step in tensor.steps:
            a = STEPS[step](a, given)
        parameter, found = _split(tensor, a, given.n)
        parts, full = collected.setdefault(parameter, {}), given.full_names[tensor.name]
        for before in parts.values():
            if before.dtype != a.dtype:
                must = f"have the dtype of {last[parameter]}, {before.dtype},"
                raise ValueError(fail("load", full, must, a.dtype))
        parts |= found
        last[parameter] = full
    made: dict[str, mx.array] = {}
    for parameter, parts in collected.items():
        if "" in parts:
            made[parameter] = parts[""]
            continue
        made[parameter] = mx.concatenate([parts[part] for part in PARTS if part in parts])
    for parameter, a in made.items():
        ours: Any = module
        for part in parameter.split("."):
            ours = ours[part]
        if a.shape != ours.shape:
            must = f"have {list(a.shape)} elements, as made of {layout.source}'s tensors,"
            got = list(ours.shape)
            raise ValueError(fail("load", f"module.{parameter}", must, got))
    return made


def load(
    module: Loaded,
    weights: dict[str, mx.array],
    prefix: str,
    *,
    source: str | None = None,
    leave: tuple[str, ...] = (),
) -> Loaded:
    """Load a hyper-connection or a read-out of another project into a module, in place.

        connection = HyperConnection(dim, 4, convention=DEEPSEEK_V4, norm_eps=rms_norm_eps)
        load(connection, weights, "layers.0.hc_attn")  # or "layers.0.hc_ffn"
        head = load(HyperHead(dim, 4, convention=DEEPSEEK_V4), weights, "hc_head")
        gated = GatedResidual(dim, 4, hc_lowrank, rms_norm_eps)
        load(gated, weights, "model.language_model.layers.0.attn_hyper_connection")

    docs/converting.md says for each source which names it has, where each tensor goes, and which
    module, convention and norm_eps it needs. Tensors keep their dtype, unless a step there computes
    something of them. Every name that begins with the prefix must be one of the source's.

    Args:
        module: A `HyperConnection` (`MHCLayer` too), a `HyperHead`, a `GatedResidual`, a
            `GatedHead`, or an `MHCBlock`, whose connection is loaded. The convention must be the
            source's, with the constants of the checkpoint's configuration. An `MHCLayer` keeps its
            norm where the source has none.
        weights: Arrays by name. Those whose names do not begin with the prefix are not looked at.
        prefix: What stands before the names, without the dot or underscore between; or "".
        source: ``"deepseek_v4"`` (V4.1 and GLM-5.3 too), ``"hy_v4"``, ``"xing4_0"``,
            ``"mhc_cu"``, ``"mhc_lite"``, ``"flash_mhc"``, ``"mhc_triton"`` or ``"qwen4_exp"``. None
            takes the source of which most names are there, then the one that fits the module, then
            the shapes.
        leave: Beginnings of names, after the prefix, that are loaded elsewhere: ``("layer.",)`` for
            the sublayer of flash-mHC's block, ``("branch.",)`` for that of mHC-lite.

    Returns:
        The module.

    Raises:
        TypeError: An argument has another type, a tensor is no array of floats (as those of a
            quantised checkpoint), or a product of the module is quantised or has LoRA.
        ValueError: No source has these names; the module is of another kind or convention; a tensor
            is missing, unknown, or has another shape or a dtype that does not fit its neighbours;
            or an `MHCBlock` writes back something else than the source. The module is then as it
            was.
    """
    if not isinstance(module, (Kind, MHCBlock)):
        must = "be a HyperConnection, HyperHead, GatedResidual, GatedHead or MHCBlock"
        raise TypeError(fail("load", "module", must, type(module).__name__))
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise TypeError(fail("load", "weights", "be a dict of str", type(weights).__name__))
    if not isinstance(prefix, str):
        raise TypeError(fail("load", "prefix", "be a str", type(prefix).__name__))
    if source is not None and source not in SOURCES:
        raise ValueError(fail("load", "source", f"be None or one of {SOURCES}", repr(source)))
    if not isinstance(leave, tuple) or not all(isinstance(name, str) for name in leave):
        raise TypeError(fail("load", "leave", "be a tuple of str", repr(leave)))
    full_names = {k: v for k, v in _under(weights, prefix).items() if not k.startswith(leave)}
    tensors = {name: weights[full] for name, full in full_names.items()}
    check_dtype("load", **{full_names[name]: a for name, a in tensors.items()})
    target = module.connection if isinstance(module, MHCBlock) else module
    layouts = [layout for layout in LAYOUTS if source in (None, layout.source)]
    layout = _recognise(layouts, target, prefix, tensors)
    _check_module(layout, target)
    subtracts = layout.source == "flash_mhc"
    if isinstance(module, MHCBlock) and getattr(module, "subtract_input", False) != subtracts:
        name = f"module.subtract_input of {type(module).__name__}"
        raise ValueError(fail("load", name, f"be {subtracts} for {layout.source}", not subtracts))
    given = Given(tensors, full_names, _module_sizes(target)["n"], _convention(target))
    _check_tensors(layout, target, given)
    target.update(tree_unflatten([*_parameters(layout, target, given).items()]))
    return module
