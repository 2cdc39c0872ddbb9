"""Positions of a patch for embedders that work positions out from the shape they see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _NoTokens(nn.Module):
    """Stands in for the projection, so that the embedder returns its positions alone."""

    def __init__(self, projection: nn.Conv2d) -> None:
        super().__init__()
        self.width, self.stride = projection.out_channels, projection.stride

    def forward(self, latent: Tensor) -> Tensor:
        """Zeros ``[batch, width, rows, columns]``."""
        height, width = latent.shape[-2] // self.stride[0], latent.shape[-1] // self.stride[1]
        return latent.new_zeros(latent.shape[0], self.width, height, width)


class PositionTable:
    """Shows a diffusers ``PatchEmbed`` the positions of a patch instead of those of a small picture.

    The table of the whole picture is computed once by the embedder itself, then its rows are put in the
    place of the embedder's own table while a patch is embedded.
    """

    def __init__(self, embed: Any) -> None:
        self.embed = embed
        self._tables: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def showing(self, latent_shape: torch.Size, rows: tuple[int, int]) -> Iterator[None]:
        """While the block runs, the embedder gives ``rows`` of a latent ``[batch, channels, height, width]``."""
        embed = self.embed
        table, width = self._table(latent_shape), latent_shape[-1] // embed.patch_size
        kept = (embed.pos_embed_max_size, embed.height, embed.width, embed.pos_embed)
        embed.pos_embed_max_size, embed.height, embed.width = None, rows[1] - rows[0], width
        embed.pos_embed = table[:, rows[0] * width : rows[1] * width]
        try:
            yield
        finally:
            embed.pos_embed_max_size, embed.height, embed.width, embed.pos_embed = kept

    def _table(self, latent_shape: torch.Size) -> Tensor:
        key = (latent_shape[-2], latent_shape[-1])
        if key not in self._tables:
            self._tables = {key: self._compute(key)}
        return self._tables[key]

    def _compute(self, size: tuple[int, int]) -> Tensor:
        projection = self.embed.proj
        # float32 holds the table exactly whatever its own dtype is
        blank = torch.zeros(1, projection.in_channels, *size, device=projection.weight.device)
        self.embed.proj = _NoTokens(projection)
        try:
            return self.embed(blank)
        finally:
            self.embed.proj = projection
