"""What a family of models says about itself, and what all families share.

A *site* is one hyper-connection. A family lists the sites of a model, names the classes that take
the place of the package's own, and has the package's own code of a site to compare with.
"""

import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..conventions import Convention


@dataclass(frozen=True, eq=False)
class Settings:
    """Constants of sites. A family makes one object for all sites with the same constants.

    It is compared by identity, because it is a key at every call.
    """

    n: int  # streams
    convention: Convention
    norm_eps: float
    out_of_y: bool = False  # streams are written in the dtype of y; otherwise they keep theirs
    tokenwise: bool = False  # the package's results do not depend on the number of tokens up to 8
    rounded: bool = False  # h_post and h_res are rounded to the dtype of x


@dataclass(frozen=True, eq=False)
class GatedSettings:
    """Constants of gated residuals, which have no convention; compared by identity, too."""

    n: int  # streams
    norm_eps: float
    out_of_y: bool = False


class Options(NamedTuple):
    """How a patched site runs."""

    use_metal: bool
    differentiable: bool
    rounding: str = "stock"  # or "once"

    @property
    def of_ops(self) -> dict[str, bool]:
        """Return the options that ops take."""
        return {"use_metal": self.use_metal, "differentiable": self.differentiable}


class Site(NamedTuple):
    """A hyper-connection: the module with its parameters, and the norm of what is read.

    The parameters are ``hc[prefix + "fn"]`` ``[2n + R, n*C]``, ``prefix + "base"`` ``[2n + R]`` and
    ``prefix + "scale"``.
    """

    family: "Family"
    name: str
    hc: Any
    norm: Any  # a module, or None where nothing is read or no norm follows
    prefix: str = ""
    kind: str = "pair"  # "lagged": `single_pass`; "pair": `read`, `write_back`; "head": read alone

    waits = 1  # the small array on which all else of a site depends: base
    own_factor = 1.0  # errors in the model's dtype may be this much larger than the package's

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Return fn, base and scale."""
        hc, prefix = self.hc, self.prefix
        return hc[prefix + "fn"], hc[prefix + "base"], hc[prefix + "scale"]

    @property
    def parameters(self) -> tuple[Any, ...]:
        """Return what `with_arrays` takes: fn, base, scale and the norm's weight, or None."""
        return *self.arrays, None if self.norm is None else self.norm["weight"]

    @property
    def settings(self) -> Any:
        """Return the constants that the module has now."""
        return self.family.settings(self.hc)

    @property
    def options(self) -> Options | None:
        """Return the options of a patched site, or None if it runs the package's own code."""
        patched = getattr(self.hc, "_mhc", None)
        return None if patched is None else patched.sites.get(self.prefix)

    @property
    def size(self) -> tuple[int, int]:
        """Return n and C."""
        n = self.settings.n
        return n, self.arrays[0].shape[1] // n

    def outputs(self, options: Options | None, x: mx.array, y: mx.array | None) -> "Outputs":
        """Return what the site computes, with these options or by the package's own code.

        y may be None if the site is not lagged: its sublayer is then the identity.
        """
        return self.family.outputs(self, options, x, y)

    @property
    def timed(self) -> bool:
        """Tell whether the site is timed: it has a plain norm, and streams as results."""
        return type(self.norm) is nn.RMSNorm and self.kind != "head"

    @property
    def mixes(self) -> bool:
        """Tell whether the site has an h_res."""
        return self.kind != "head" and self.settings.convention.res_size(self.size[0]) > 0

    def with_arrays(self, *parameters: Any) -> "Site":
        """Return this site with other parameters; the modules of the model do not change."""
        hc, norm = copy.copy(self.hc), copy.copy(self.norm)
        *arrays, weight = parameters
        for name, a in zip(("fn", "base", "scale"), arrays, strict=True):
            hc[self.prefix + name] = a
        if weight is not None:
            norm["weight"] = weight
        return self._replace(hc=hc, norm=norm)

    def draw(self, seed: int) -> None:
        """Give the site's module random parameters, with which every part of it shows."""
        fn, base, scale = self.arrays
        kf, kb, ks = mx.random.split(mx.random.key(seed), 3)
        self.hc[self.prefix + "fn"] = mx.random.normal(fn.shape, key=kf) * fn.shape[1] ** -0.5
        self.hc[self.prefix + "base"] = mx.random.normal(base.shape, key=kb)
        self.hc[self.prefix + "scale"] = mx.random.uniform(0.5, 1.5, scale.shape, key=ks)

    def start(self, x: mx.array, y: mx.array) -> tuple[mx.array, ...]:
        """Return what the first `step` of a chain of sites takes, of streams and an output."""
        return x, y

    def step(self, options: Options | None, *state: mx.array) -> tuple[Any, ...]:
        """Run the site between two sublayers, each the identity: return out and u, of x and y."""
        x, y = state
        outputs = self.outputs(options, x, y if self.kind == "lagged" else None)
        return outputs["out"], outputs["u"]

    @property
    def product_rows(self) -> float:
        """Return the rows of C per token that MLX's own ops move in a patched step."""
        # A site that is not lagged leaves its norm to MLX: it reads and writes u.
        return 2.0 if self.kind == "pair" and self.norm is not None else 0.0


# The modules of a gated residual, by mlx-vlm's names; the last writes back, which a head does not.
DOWN, UP, INJECT = "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight"
NEXT = "next "  # begins the names of what a site reads after its own write-back


def fused_weight(inject: Any) -> Any:
    """Return the weight of INJECT if `stream_norm` can make its product, otherwise None."""
    return inject["weight"] if type(inject) is nn.Linear and "bias" not in inject else None


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module and of the modules in it, with the same arrays."""
    made = copy.copy(module)
    for name, child in module.items():
        if isinstance(child, nn.Module):
            made[name] = _copied(child)
    return made


class GatedSite(Site):
    """A gated residual (`reference.gated_residual`): a module with a norm and linear layers.

    Its parameters are those of ``hc_norm`` ``[n*C]``, centred at 0, and of the linear layers DOWN,
    UP and INJECT, which may be quantised or adapted. The norm of what is read belongs to the site,
    so `norm` is None. A step runs as in a model: the write-back of one site and all of the next.
    """

    waits = 0  # hc_norm's weight
    # Both codes round s and the products alike, and products make these errors larger, so that
    # luck decides whose largest is larger: at C = 64 and 512 in bfloat16, at logits that deviate by
    # 0.6 to 6, in 288 draws with float weights ours was at most 1.49 times mlx-vlm's, in 144 with 4
    # bits 1.19 times.
    own_factor = 2.0

    @property
    def linears(self) -> list[str]:
        """Return the names of the linear layers."""
        return [name for name in (DOWN, UP, INJECT) if name in self.hc]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Return the norm's weight, then all arrays of each linear layer."""
        leaves: list[Any] = [self.hc.hc_norm["weight"]]
        for name in self.linears:
            leaves += [a for _, a in tree_flatten(self.hc[name].parameters())]
        return tuple(leaves)

    @property
    def parameters(self) -> tuple[Any, ...]:
        return self.arrays

    @property
    def size(self) -> tuple[int, int]:
        n = self.settings.n
        return n, self.hc.hc_norm["weight"].shape[-1] // n

    @property
    def timed(self) -> bool:
        return self.kind != "head"

    @property
    def mixes(self) -> bool:
        return False

    def with_arrays(self, *parameters: Any) -> "GatedSite":
        hc, rest = copy.copy(self.hc), list(parameters)
        hc["hc_norm"] = copy.copy(hc["hc_norm"])
        hc["hc_norm"]["weight"] = rest.pop(0)
        for name in self.linears:
            hc[name] = _copied(hc[name])
            names = [k for k, _ in tree_flatten(hc[name].parameters())]
            hc[name].update(tree_unflatten([(k, rest.pop(0)) for k in names]))
        return self._replace(hc=hc)

    def draw(self, seed: int) -> None:
        keys = iter(mx.random.split(mx.random.key(seed), 4))
        weight = self.hc.hc_norm["weight"]
        self.hc.hc_norm["weight"] = mx.random.uniform(-0.5, 0.5, weight.shape, key=next(keys))
        for name in self.linears:
            linear = self.hc[name]
            shape = linear["weight"].shape
            # Products have a deviation of about 1; those of DOWN and INJECT are divided by n.
            scale = self.settings.n ** (name != UP) * shape[1] ** -0.5
            linear["weight"] = mx.random.normal(shape, key=next(keys)) * scale

    def start(self, x: mx.array, y: mx.array) -> tuple[mx.array, ...]:
        return x, y, mx.ones(x.shape[:-1], x.dtype)

    def step(self, options: Options | None, *state: mx.array) -> tuple[Any, ...]:
        """Return out, u and the h_post of the next write-back, of x, y and h_post."""
        return self.family.joined(self, options, *state)

    @property
    def product_rows(self) -> float:
        n, inject = self.settings.n, self.hc.get(INJECT)
        reads = 1 if inject is None or fused_weight(inject) is not None else 2
        return float(n * (1 + reads))  # UP writes the gates' logits; DOWN and INJECT read s


# What a site computes, by name: out, u (None if nothing is read), and its coefficients.
Outputs = dict[str, Any]


class Patched:
    """The options of a module's patched sites, by prefix.

    It is no module, list or dict, so that trees of parameters and modules do not enter it.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Options] = {}


class Owner:
    """By this object a layer refers to the module that has all layers.

    It is no module, list or dict, so that trees of parameters and modules do not enter it. It is
    weak, so that a model frees its memory with its last reference, not when Python collects cycles.
    """

    def __init__(self, text: Any):
        self._text = (lambda: None) if text is None else weakref.ref(text)

    @property
    def module(self) -> Any:
        """Return the module that has all layers, or None if it no longer exists."""
        return self._text()

    @property
    def layers(self) -> list[Any]:
        """Return the layers of the model, or an empty list if the model no longer exists."""
        text = self._text()
        return [] if text is None else text.layers

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        text = self._text()
        return Owner(memo.get(id(text), text))  # the copy of a layer alone refers to this model

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, (None,), self._text()

    def __setstate__(self, text: Any) -> None:
        Owner.__init__(self, text)


class Family:
    """A family of models. Each file in `families` has one subclass, and FAMILY, its instance."""

    package: ClassVar[str]  # as messages and reports name it
    layers: ClassVar[Mapping[type, type]] = {}  # the package's class: ours; they stay swapped
    connections: ClassVar[Mapping[type, type]] = {}  # the same of modules that are one site each
    trained: ClassVar[Mapping[type, type]] = {}  # the same of what has no gradient
    roundings: ClassVar[tuple[str, ...]] = ("stock", "once")  # of `patch`

    def check_model(self, op: str, model: nn.Module) -> None:
        """Raise TypeError or ValueError if a module of the model is not as the package makes it."""

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites of a model, in the order in which they run."""
        raise NotImplementedError

    def settings(self, hc: Any) -> Any:
        """Return the constants of a module that has sites, as `Settings` or `GatedSettings`."""
        raise NotImplementedError

    def outputs(self, site: Site, options: Options | None, x: mx.array, y: Any) -> Outputs:
        """Return what a site computes of x ``[B, L, n, C]`` and y ``[B, L, C]``.

        With options it runs as a patched model does, otherwise by the package's own code.
        """
        raise NotImplementedError

    def joined(
        self, site: Site, options: Options | None, x: mx.array, y: mx.array, h_post: mx.array
    ) -> tuple[Any, ...]:
        """Return out, u and the next h_post of a gated residual that runs after a write-back."""
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> None:
        """Give the layers what their patched classes need beside the options."""

    def forget(self, module: Any) -> None:
        """Undo `prepare` for a module."""

    def new_site(self, d: int) -> Site:
        """Return a site of its own of hidden size d, with a norm, as the package starts it."""
        raise NotImplementedError

    def new_model(self, d: int, layers: int, kind: str) -> nn.Module:
        """Return a small model with hidden size d and 8 experts, as the package starts it.

        kind is one of the family's model types; all other sizes are multiples of 32.
        """
        raise NotImplementedError

    def metal_kernels(self) -> list[tuple[Any, str, Any]]:
        """Return what the package runs as one kernel on Metal, for counts of dispatches there.

        Each is a module, the name of a function in it, and a function that is one primitive.
        """
        return []

    # ---- the whole model, for `check` and `bench`

    def text(self, model: Any) -> Any:
        """Return the module that takes tokens and a cache; mlx-vlm has one for text in a model."""
        return getattr(model, "language_model", model)

    def logits(self, model: Any, tokens: mx.array, cache: Any) -> mx.array:
        """Return logits ``[batch, length, vocabulary]`` of tokens ``[batch, length]``."""
        return self.text(model)(tokens, cache=cache).logits

    def cache(self, model: Any) -> Any:
        """Return an empty cache for one generation."""
        return self.text(model).make_cache()

    def generate(self, model: Any, prompt: mx.array, count: int) -> Iterator[int]:
        """Yield the most likely tokens after a prompt ``[length]``."""
        cache = self.cache(model)
        token = self.logits(model, prompt[None], cache)[:, -1:].argmax(-1)
        for _ in range(count):
            after = self.logits(model, token, cache)[:, -1:].argmax(-1)
            mx.async_eval(token, after)
            found: Any = token.item()
            yield int(found)
            token = after

    def vocabulary(self, model: Any) -> int:
        """Return the number of tokens."""
        return self.text(model).config.vocab_size

    def dtype(self, model: Any) -> mx.Dtype:
        """Return the dtype of the model's streams."""
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
                return module(mx.zeros((1, 1), mx.int32)).dtype
        return next(site.norm.weight.dtype for site in self.sites(model) if site.norm is not None)

    @property
    def own(self) -> dict[type, type]:
        """Return the package's class of each class that a patched model has."""
        swaps = (self.layers, self.connections, self.trained)
        return {ours: theirs for swap in swaps for theirs, ours in swap.items()}


def module_of(model: nn.Module, kind: type) -> tuple[str, Any]:
    """Return the module of a class, and what the names of its parameters begin with."""
    name, module = next((k, m) for k, m in model.named_modules() if isinstance(m, kind))
    return f"{name}." if name else "", module


def check_whole(op: str, layers: Any) -> None:
    """Raise ValueError if the module that has the layers is a stage of a pipeline."""
    if layers.pipeline_size != 1:
        raise ValueError(
            f"[{op}] model must be whole but is a stage of {layers.pipeline_size}: the package's "
            "own call of this model does not pass streams between stages."
        )


def mapped(values: Mapping[type, type], module: nn.Module) -> None:
    """Give a module the class that stands for its class, if one does."""
    module.__class__ = values.get(type(module), type(module))
