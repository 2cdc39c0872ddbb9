"""Captions to padded token ids, with a memory for captions seen before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer


class Tokens:
    """Both tokenizers of a pipeline.

    CLIP's ids are padded to the longest caption only: its attention is causal and its pooled output is taken
    at the first end token, so later pads change nothing. T5's pads are seen by every token, as in
    ``FluxPipeline``, so their number matters.
    """

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer, device: torch.device) -> None:
        self._clip, self._t5, self._device = clip, t5, device
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return ids for CLIP (count, longest) and for T5 (count, length)."""
        pairs = [self._lookup(caption) for caption in captions]
        longest = max(len(clip) for clip, _ in pairs)
        clip_ids = [_padded(clip, longest, self._clip.pad_token_id) for clip, _ in pairs]
        t5_ids = [_padded(t5, length, self._t5.pad_token_id) for _, t5 in pairs]
        return torch.tensor(clip_ids, device=self._device), torch.tensor(t5_ids, device=self._device)

    def _lookup(self, caption: str) -> tuple[list[int], list[int]]:
        if caption not in self._known:
            clip = self._clip(caption, truncation=True).input_ids
            self._known[caption] = (list(clip), list(self._t5(caption).input_ids))
        return self._known[caption]


def _padded(ids: list[int], length: int, pad: int) -> list[int]:
    if len(ids) > length:  # the end token stays
        return [*ids[: length - 1], ids[-1]]
    return ids + [pad] * (length - len(ids))
