"""mlx-lm's decoder layer on these kernels."""

import weakref
from typing import Any

import mlx.core as mx

from .sites import run_site, stock


class Owner:
    """The text model of a layer. No module, list or dict: nothing that a tree of parameters or
    modules would enter. The reference is weak, or a model that nobody has any more would keep its
    memory until Python looks for cycles."""

    def __init__(self, text: stock.TextModel | None):
        self._text = (lambda: None) if text is None else weakref.ref(text)

    @property
    def layers(self) -> list[Any]:
        """Of the model, none where it is gone."""
        text = self._text()
        return [] if text is None else text.layers

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        text = self._text()
        return Owner(memo.get(id(text), text))  # a layer that is copied alone stays this model's

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, (None,), self._text()

    def __setstate__(self, text: stock.TextModel | None) -> None:
        Owner.__init__(self, text)


_HANDED = "_mhc_mlx"  # in the dict that layers share


class SinglePassLayer(stock.DecoderLayer):
    """mlx-lm's DecoderLayer, whose second site makes what the next layer of this pipeline stage
    reads and leaves it in ``shared``. The next layer uses it only with the streams it was made of;
    without, it makes its own from the streams and pre_mix, as mlx-lm does.
    """

    _owner: Owner

    def _next(self) -> "SinglePassLayer | None":
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
        layer, of, u = shared.pop(_HANDED, (None, None, None))
        if layer != self.layer_idx or of is not streams:
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
