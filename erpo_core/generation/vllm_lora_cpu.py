"""LoRA in vLLM's CPU build, where all tokens of a batch have one adapter, as an engine of ours ever loads.

vLLM copies the adapter's weights for every token and multiplies row by row, which takes most of a decoding step. Here
they are two plain products.
"""

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class PlainProducts(PunicaWrapperCPU):
    """vLLM's wrapper; batches of several adapters, or of none, go its way."""

    _only: int | None = None
    """The adapter's place among the stacked weights; None where there is not one for all."""

    def update_metadata(self, *args, **kwargs) -> None:
        """As vLLM's, which calls it when other requests are served."""
        super().update_metadata(*args, **kwargs)
        places = self.token_lora_indices
        alike = len(places) > 0 and bool((places == places[0]).all()) and places[0] >= 0
        self._only = int(places[0]) if alike else None

    def _apply_shrink(self, y, x, w_t_all, scale) -> None:
        if self._only is None:
            super()._apply_shrink(y, x, w_t_all, scale)
            return
        down = w_t_all[self._only].view(-1, w_t_all.shape[-1])
        y[:, : len(down)] = scale * (x.to(y.dtype) @ down.to(y.dtype).T)

    def _apply_expand(self, y, x, w_t_all, y_offset, y_slice_size, add_inputs=True) -> None:
        if self._only is None:
            super()._apply_expand(y, x, w_t_all, y_offset, y_slice_size, add_inputs)
            return
        up = w_t_all[self._only].view(-1, w_t_all.shape[-1])
        part = y[:, y_offset : y_offset + y_slice_size]
        product = x.to(y.dtype) @ up.to(y.dtype).T
        if add_inputs:
            part += product
        else:
            part.copy_(product)
