"""Attention on a strip of rows: own queries, everybody's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchpipe.vae.hooks import Spread, Undo, override

PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0")


def spread_attention(block: nn.Module, spread: Spread) -> Undo:
    """Lets an attention block attend to all ranks' rows.

    The block's own forward runs on the strip; where it calls ``scaled_dot_product_attention``, keys and
    values are gathered first. Rows of a strip are neighbours in the flattened sequence, so joining the ranks'
    keys in rank order is the whole picture's order.

    Args:
        block: A self-attention block without mask that attends by ``scaled_dot_product_attention``.
        spread: The ranks.

    Returns:
        What takes the hook off.

    Raises:
        ValueError: The block's processor attends some other way.
    """
    processor = getattr(block, "processor", None)
    if processor is not None and type(processor).__name__ not in PROCESSORS:
        raise ValueError(
            f"the VAE's attention uses {type(processor).__name__}, which strips of rows do not support: call "
            "vae.set_attn_processor(AttnProcessor2_0()) first"
        )
    whole = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not spread.active:
            return whole(*args, **kwargs)
        with _GatheredKeys(spread) as seen:
            output = whole(*args, **kwargs)
        if not seen.calls:
            raise RuntimeError(
                f"{type(block).__name__} did not call scaled_dot_product_attention: its rows would not mix"
            )
        return output

    return override(block, "forward", forward)


class _GatheredKeys(TorchFunctionMode):
    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self.spread, self.calls = spread, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Shapes (batch, heads, tokens, width); the output has this rank's tokens."""
        if attn_mask is not None or is_causal or dropout_p:
            raise ValueError("attention with a mask or dropout cannot be spread over strips of rows")
        group = self.spread.group
        tokens = torch.tensor([key.shape[-2]])
        sizes = [int(size) for size in group.all_gather(tokens, [1] * group.size, 0)]
        key, value = group.all_gather(torch.stack((key, value)), sizes, -2).unbind(0)
        return F.scaled_dot_product_attention(query, key, value, **kwargs)
