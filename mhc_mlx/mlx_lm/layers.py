"""`SinglePassLayer` is mlx-lm's decoder layer on these kernels."""

import weakref
from typing import Any

import mlx.core as mx

from .sites import run_site, stock


class Owner:
    """By this object a layer refers to its text model.

    It is no module, list or dict, so that trees of parameters and modules do not enter it. It is
    weak, so that a model frees its memory with its last reference, not when Python collects cycles.
    """

    def __init__(self, text: stock.TextModel | None):
        self._text = (lambda: None) if text is None else weakref.ref(text)

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

    def __setstate__(self, text: stock.TextModel | None) -> None:
        Owner.__init__(self, text)


_HANDED = "_mhc_mlx"  # the key of (layer_idx, streams, u) in the dict that layers share


class SinglePassLayer(stock.DecoderLayer):
    """This is mlx-lm's DecoderLayer, in which each site runs when its sublayer ends.

    The second site makes the u of the next layer of this pipeline stage and puts it in ``shared``.
    That layer takes it from there if it gets the same streams; otherwise it makes u from streams
    and pre_mix, as mlx-lm does.
    """

    _owner: Owner

    def _next(self) -> "SinglePassLayer | None":
        """Return the next layer of this pipeline stage, if it is one and patched."""
        layers, k = self._owner.layers, self.layer_idx + 1
        after = layers[k] if k < len(layers) else None  # other stages' layers are None
        return after if isinstance(after, SinglePassLayer) else None

    def __call__(
        self,
        streams: mx.array,
        pre_mix: mx.array,
        *,
        start_pos: int,
        window_idx: mx.array,
        cache: stock.LayerCache,
        shared: dict[str, Any],
    ) -> tuple[mx.array, mx.array]:
        if type(self).__call__ is not _LAYER_CALL:
            raise ValueError(
                "[patch] model.layers must not be under mlx-lm's grad_checkpoint but are: layers "
                "of deepseek_v41 share arrays in a way that it does not see, and results would be "
                "wrong."
            )
        layer_idx, read_streams, u = shared.pop(_HANDED, (None, None, None))
        if layer_idx != self.layer_idx or read_streams is not streams:
            u = self.input_layernorm(stock._collapse(streams, pre_mix))
        y = self.self_attn(
            u, start_pos=start_pos, window_idx=window_idx, cache=cache, shared=shared
        )
        streams, u, _ = run_site(self.attn_hc, streams, y, self.post_attention_layernorm)
        after = self._next()
        norm = None if after is None else after.input_layernorm
        streams, u, pre_mix = run_site(self.ffn_hc, streams, self.mlp(u), norm)
        if after is not None:
            shared[_HANDED] = (after.layer_idx, streams, u)
        return streams, pre_mix


_LAYER_CALL = SinglePassLayer.__call__
