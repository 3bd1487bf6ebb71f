"""`save_adapters` and `load_adapters`: what training has changed in a model, connections included.

A folder has the files of mlx-lm's adapters. ``adapters.safetensors`` holds the trained parameters
by their names in the model. ``adapter_config.json`` says how to make the LoRA layers, and under
``mhc_mlx`` which model they fit. mlx-lm's own loader reads the folder if it has LoRA parameters
alone, or none.
"""

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .conventions import Convention
from .gated import GatedHead, GatedResidual
from .layers import HyperConnection, HyperHead
from .ops.checks import fail
from .widening import WidenedBlock

__all__ = ["load_adapters", "save_adapters"]

Model = TypeVar("Model", bound=nn.Module)
WEIGHTS, CONFIG, FORMAT = "adapters.safetensors", "adapter_config.json", 1
_LEAVES = ("lora_a", "lora_b", "m")  # parameters of a LoRA layer; m is DoRA's
_MAKERS = {  # modules with linear_to_lora_layers, by the package whose LoRA layers a model has
    "mlx_lm": "mlx_lm.tuner.utils",
    "mlx_vlm": "mlx_vlm.trainer.peft.adapter_utils",
}
# Attributes of modules that say how results are computed, not what they are.
_EXECUTION = ("use_metal", "threads_per_group", "differentiable")
_SAMPLES = 64


def _flat(parameters: Any) -> dict[str, mx.array]:
    flat: Any = tree_flatten(parameters)
    return dict(flat)


# ---- LoRA layers


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the LoRA and DoRA layers of a model by name."""
    return {k: x for k, x in model.named_modules() if "lora_a" in x and "lora_b" in x}


def _lora_settings(layer: Any) -> dict[str, Any]:
    """Return rank, scale and dropout of a LoRA layer, by mlx-lm's names."""
    b: mx.array = layer.lora_b
    rank = b.shape[-1] if b.ndim == 3 else b.shape[0]  # the layers of experts have it last
    return {"rank": rank, "scale": layer.scale, "dropout": round(1 - layer.dropout._p_1, 9)}


def _plain_name(name: str, lora: list[str]) -> str:
    """Return the name that a parameter has in the model without its LoRA layers."""
    for layer in lora:
        for child in ("linear", "embedding"):
            if name.startswith(f"{layer}.{child}."):
                return f"{layer}.{name.removeprefix(f'{layer}.{child}.')}"
    return name


def _describe_lora(op: str, layers: dict[str, Any]) -> tuple[str, str, dict[str, Any] | None]:
    """Return mlx-lm's fine_tune_type, the package of the layers, and mlx-lm's lora_parameters.

    The keys there are full names: mlx-lm makes LoRA layers of the modules with these names alone.
    """
    if not layers:
        return "full", "", None
    kinds = {k: ("dora" if "m" in x else "lora") for k, x in layers.items()}
    packages = {k: type(x).__module__.split(".")[0] for k, x in layers.items()}
    settings = {k: _lora_settings(x) for k, x in layers.items()}
    first = next(iter(layers))
    for name in layers:
        if packages[name] not in _MAKERS:
            must = f"have LoRA layers of {' or '.join(_MAKERS)}"
            raise ValueError(fail(op, "model", must, f"{type(layers[name])} at {name}"))
        theirs = (kinds[name], packages[name], settings[name])
        ours = (kinds[first], packages[first], settings[first])
        if theirs != ours:
            must = f"have LoRA layers of one kind, rank, scale and dropout, {ours} as {first},"
            raise ValueError(fail(op, "model", must, f"{theirs} at {name}"))
    return kinds[first], packages[first], settings[first] | {"keys": list(layers)}


# ---- what a model is, for comparison


def _digest(a: mx.array) -> str:
    """Return dtype, shape and a digest of an array: of the sum of its bits and 64 elements.

    The sum depends on every element, and on no order in which a device adds.
    """
    flat = a.reshape(-1)
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}.get(a.dtype.size, mx.uint32)
    step = max(1, flat.size // _SAMPLES)
    sample = mx.contiguous(flat[::step]).view(mx.uint8)
    total = mx.contiguous(flat).view(words).astype(mx.uint32).sum()
    samples: Any = sample.tolist()
    data = bytes(samples) + str(total.item()).encode()
    kind = str(a.dtype).rsplit(".", 1)[-1]
    return f"{kind} {list(a.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def _base(model: nn.Module, trained: set[str], lora: list[str]) -> dict[str, str]:
    """Return the digest of each parameter that is not trained, by its name without LoRA layers."""
    plain = {_plain_name(name, lora): a for name, a in _flat(model.parameters()).items()}
    return {name: _digest(a) for name, a in plain.items() if name not in trained}


def _scalars(value: Any, *kinds: type) -> Iterator[tuple[str, Any]]:
    for name, v in vars(value).items():
        if not name.startswith("_") and name not in _EXECUTION and type(v) in kinds:
            yield name, v


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the constants by which a module computes: numbers, strings, convention, config."""
    found = dict(_scalars(module, int, float, bool, str, type(None)))
    convention = getattr(module, "_convention", None)
    if isinstance(convention, Convention):
        fields = dataclasses.asdict(convention)
        found |= {f"convention.{k}": v for k, v in fields.items() if k != "name"}
    for name, value in vars(module).items():
        if name in ("config", "args") and hasattr(value, "__dict__"):
            found |= {f"{name}.{k}": v for k, v in _scalars(value, int, float, bool)}
    settings: dict[str, Any] = json.loads(json.dumps(found))  # tuples become lists, as in the file
    return settings


def _connections(model: nn.Module, trained: set[str]) -> dict[str, dict[str, Any]]:
    """Return the constants of each connection, and of each other module with trained parameters."""
    owners = {name.rpartition(".")[0] for name in trained}
    ours = (HyperConnection, HyperHead, GatedResidual, GatedHead, WidenedBlock)
    modules = model.named_modules()
    return {k: _settings(x) for k, x in sorted(modules) if k in owners or isinstance(x, ours)}


def _compare(folder: Path, what: str, saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError for the first name whose value differs, or that only one of two has."""
    for name in [*saved, *(k for k in found if k not in saved)]:
        if saved.get(name) != found.get(name):
            must = f"have {what} {name} = {saved.get(name, 'none')}, as the model of {folder} had,"
            raise ValueError(fail("load_adapters", "model", must, found.get(name, "none")))


def _compare_connections(folder: Path, saved: dict[str, Any], found: dict[str, Any]) -> None:
    for name, settings in saved.items():
        if name not in found:
            must = f"have the module {name}, as the model of {folder} had (was it widened?),"
            raise ValueError(fail("load_adapters", "model", must, "none"))
        for key in settings.keys() & found[name].keys():  # a patched class may have further ones
            if settings[key] != found[name][key]:
                must = f"have {name}.{key} = {settings[key]!r}, as the model of {folder} had,"
                raise ValueError(fail("load_adapters", "model", must, repr(found[name][key])))
    for name in found:
        if name not in saved:
            must = f"have no connection {name}, as the model of {folder},"
            raise ValueError(fail("load_adapters", "model", must, "one"))


# ---- files


def _check_folder(op: str, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    if not isinstance(model, nn.Module):
        raise TypeError(fail(op, "model", "be an mlx.nn.Module", type(model).__name__))
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(fail(op, "folder", "be a path", type(folder).__name__))
    return Path(folder)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the config and the arrays of a folder; ValueError for what is not whole."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(fail("load_adapters", "folder", f"have {name}", f"{folder}"))
    try:
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        must = f"have JSON in {CONFIG}"
        raise ValueError(fail("load_adapters", "folder", must, f"{folder}: {error}")) from None
    record = config.get("mhc_mlx") if isinstance(config, dict) else None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        must = f"be written by save_adapters (format {FORMAT})"
        got = f"{folder}; mlx_lm.tuner.utils.load_adapters reads what mlx-lm wrote"
        raise ValueError(fail("load_adapters", "folder", must, got))
    try:
        weights: Any = mx.load(str(folder / WEIGHTS))
    except RuntimeError as error:
        must = f"have arrays in {WEIGHTS}"
        raise ValueError(fail("load_adapters", "folder", must, f"{folder}: {error}")) from None
    for name, a in weights.items():
        if record["trained"].get(name) != list(a.shape):
            must = f"have {name} of shape {record['trained'].get(name, 'none')} in {WEIGHTS}"
            raise ValueError(fail("load_adapters", "folder", must, list(a.shape)))
    for name, shape in record["trained"].items():
        if name not in weights:
            must = f"have {name} of shape {shape} in {WEIGHTS}"
            raise ValueError(fail("load_adapters", "folder", must, "none"))
    if _sha256(folder / WEIGHTS) != record["sha256"]:
        must = f"have the {WEIGHTS} that {CONFIG} was written with"
        raise ValueError(fail("load_adapters", "folder", must, f"another in {folder}"))
    return config, weights


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save what training has changed in a model: LoRA layers and all other trainable parameters.

    The model may be widened by `widen` or patched, before or after it got LoRA layers. The folder
    gets ``adapters.safetensors`` and ``adapter_config.json``, as mlx-lm writes them.
    ``adapter_config.json`` also has, for `load_adapters`, the constants of the connections and a
    digest of each parameter that is not saved.

    Args:
        model: A model in training. With LoRA layers, of mlx-lm or mlx-vlm and of one rank, scale
            and dropout, their parameters are saved even if frozen, and so are connections that
            `widen` has made. Without LoRA layers it is mlx-lm's fine-tune type "full".
        folder: The folder, which is made if it does not exist. Files of an earlier call are
            replaced.

    Raises:
        TypeError: An argument has another type.
        ValueError: Nothing is trainable, or LoRA layers are of several kinds or of other packages.
    """
    path, layers = _check_folder("save_adapters", model, folder), _lora_layers(model)
    kind, package, lora_parameters = _describe_lora("save_adapters", layers)
    weights = _flat(model.trainable_parameters())
    for name, layer in layers.items():
        weights |= {f"{name}.{k}": layer[k] for k in _LEAVES if k in layer}
    for name, block in model.named_modules():
        if isinstance(block, WidenedBlock):  # widen starts them at random: no base has them
            parameters = _flat({"connections": [x.parameters() for x in block.connections]})
            weights |= {f"{name}.{k}": a for k, a in parameters.items()}
    if not weights:
        got = "none: unfreeze some, or add LoRA layers"
        raise ValueError(fail("save_adapters", "model", "have trainable parameters", got))
    trained = {_plain_name(name, list(layers)) for name in weights}
    own = {name for name in trained if name.rpartition(".")[0] not in layers}
    path.mkdir(parents=True, exist_ok=True)
    new_weights, new_config = path / f"new-{WEIGHTS}", path / f"new-{CONFIG}"
    mx.save_safetensors(str(new_weights), weights)
    config = {
        "fine_tune_type": kind,
        "num_layers": len(getattr(model, "layers", ())),
        "lora_parameters": lora_parameters,
        "mhc_mlx": {
            "format": FORMAT,
            "package": package,
            "sha256": _sha256(new_weights),
            "trained": {name: list(a.shape) for name, a in weights.items()},
            "connections": _connections(model, own),
            "base": _base(model, trained, list(layers)),
        },
    }
    new_config.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(new_weights, path / WEIGHTS)
    os.replace(new_config, path / CONFIG)


def load_adapters(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Load into a model, in place, what `save_adapters` has saved of its trained copy.

    The model is the one that training began with: the same base, widened by the same call of
    `widen`, patched or not. It gets the LoRA layers, unless it has them, and the trained
    parameters, bit for bit. Which of its parameters are trainable does not change; those of new
    LoRA layers are.

    Every parameter that was not saved is compared with that of the model that was saved (dtype,
    shape, and a digest of all its bits), and so are the constants of the connections: number of
    streams, convention, eps. A quantised base, for example, is another than the base in bfloat16.

    Args:
        model: The model.
        folder: A folder that `save_adapters` has written.

    Returns:
        The model.

    Raises:
        TypeError: An argument has another type.
        ImportError: The folder has LoRA layers, and the package that makes them is not installed.
        ValueError: A file is missing, damaged or not of `save_adapters`; ``adapters.safetensors``
            has other tensors than ``adapter_config.json`` says; or the model has another base or
            other connections. The model is then as it was.
    """
    path = _check_folder("load_adapters", model, folder)
    config, weights = _read(path)
    record, parameters = config["mhc_mlx"], config["lora_parameters"]
    keys: list[str] = parameters["keys"] if parameters else []
    lora = [*dict.fromkeys([*keys, *_lora_layers(model)])]
    trained = {_plain_name(name, lora) for name in weights}
    own = {name for name in trained if name.rpartition(".")[0] not in keys}
    _compare_connections(path, record["connections"], _connections(model, own))
    shapes = {_plain_name(k, lora): list(a.shape) for k, a in _flat(model.parameters()).items()}
    for name, a in weights.items():
        plain = _plain_name(name, lora)
        if plain in own and shapes.get(plain) != list(a.shape):
            must = f"have {plain} of shape {list(a.shape)}, as the model of {path} had,"
            raise ValueError(fail("load_adapters", "model", must, shapes.get(plain, "none")))
    _compare(path, "the parameter", record["base"], _base(model, trained, lora))
    if parameters:
        _make_lora(model, path, config, weights)
    model.load_weights(list(weights.items()), strict=False)
    return model


def _make_lora(
    model: nn.Module, folder: Path, config: dict[str, Any], weights: dict[str, mx.array]
) -> None:
    """Give a model its LoRA layers; ValueError, and none of them, if they do not fit the arrays."""
    parameters, has = config["lora_parameters"], _lora_layers(model)
    package, kind = config["mhc_mlx"]["package"], config["fine_tune_type"]
    if has and (found := _describe_lora("load_adapters", has)) != (kind, package, parameters):
        must = f"have no LoRA layers, or those of {folder}, {(kind, package, parameters)},"
        raise ValueError(fail("load_adapters", "model", must, found))
    before = [(k, x) for k, x in model.named_modules() if k in parameters["keys"]]
    if not has:
        maker: Any = importlib.import_module(_MAKERS[package])
        settings = (model, config["num_layers"], parameters)
        maker.linear_to_lora_layers(*settings, use_dora=kind == "dora")
    made = _flat(model.parameters())
    for name, a in weights.items():
        if name not in made or made[name].shape != a.shape:
            if not has:
                model.update_modules(tree_unflatten(before))
            must = f"have room for {name} of shape {list(a.shape)}, as the model of {folder} had,"
            got = list(made[name].shape) if name in made else "none"
            raise ValueError(fail("load_adapters", "model", must, got))
