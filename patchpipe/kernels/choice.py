"""Which of torch's attention kernels takes a call, and why not a faster one.

On CUDA ``scaled_dot_product_attention`` has three fused kernels (flash, memory-efficient, cuDNN) and a slow way,
"math", which writes all scores to memory. It picks one by dtype, strides, head size and mask, and says nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

logger = logging.getLogger("patchpipe")

_FUSED = {
    "flash": "can_use_flash_attention",
    "memory-efficient": "can_use_efficient_attention",
    "cuDNN": "can_use_cudnn_attention",
}


def kernel_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> SDPBackend:
    """The kernel that ``scaled_dot_product_attention`` takes for these arguments; nothing is computed."""
    chosen = torch._fused_sdp_choice(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return SDPBackend(chosen)


def refusals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    grouped: bool = False,
) -> str:
    """Why each of CUDA's fused kernels does not take these arguments, in torch's own words."""
    asked = cuda.SDPAParams(query, key, value, mask, dropout, causal, grouped)
    told = []
    for title, name in _FUSED.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            taken = getattr(cuda, name)(asked, True)
        reasons = [_gist(str(warning.message)) for warning in caught]
        if not taken:
            told.append(f"{title}: {'; '.join(filter(None, reasons)) or 'refused without a reason'}")
    return "; ".join(told)


def _gist(text: str) -> str:
    """A warning of torch without the place in its source."""
    return " ".join(text.partition("(Triggered internally")[0].split()).rstrip(". ")


class KernelWatch:
    """Tells once, for a pipeline, that self-attention falls to the slow kernel, and why.

    A kernel is looked up once for each kind of call: dtypes, head size, strides and whether there is a mask decide, the
    number of rows does not.

    Args:
        level: Of the message, for ``logging``.
    """

    def __init__(self, level: int = logging.WARNING) -> None:
        self._level, self._told = level, False
        self._seen: set[tuple[Any, ...]] = set()

    def look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Takes the arguments of ``scaled_dot_product_attention``, by the same names."""
        if self._told or not (query.numel() and key.numel()):  # a line may have more ranks than heads
            return
        kind = (*map(_traits, (query, key, value)), attn_mask is None, is_causal, enable_gqa)
        if kind in self._seen:
            return
        self._seen.add(kind)
        given = query, key, value, attn_mask, dropout_p, is_causal
        if kernel_for(*given, scale, enable_gqa) == SDPBackend.MATH:
            self._tell(query, attn_mask, refusals(*given, enable_gqa))

    def _tell(self, query: Tensor, mask: Tensor | None, why: str) -> None:
        self._told = True
        logger.log(
            self._level,
            "self-attention falls to torch's slow kernel, which writes out all scores (%s, %d channels a head%s). "
            "Why no fused kernel takes it: %s. In bfloat16 or float16, with at most 256 channels a head, one does",
            str(query.dtype).removeprefix("torch."),
            query.shape[-1],
            "" if mask is None else ", masked",
            why,
        )

    def watching(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, which is ``scaled_dot_product_attention``, with a look at what it is given."""

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            self.look(*args, **kwargs)
            return compute(*args, **kwargs)

        return watched


def watch_kernels(device: torch.device, output: bool) -> KernelWatch | None:
    """A watch for a rank: one that warns on the output rank, whispers on the others; none where there is one kernel.

    Args:
        device: Where the rank computes.
        output: Whether it is the output rank, whose messages people read.
    """
    if device.type != "cuda":
        return None
    return KernelWatch(logging.WARNING if output else logging.INFO)


def _traits(rows: Tensor) -> tuple[torch.dtype, int, bool]:
    return rows.dtype, rows.shape[-1], rows.stride(-1) == 1
