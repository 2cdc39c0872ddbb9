"""Pictures to latents and back, and the shuffled draw of a training's batches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """``uint8`` (n, h, w, 3) to float32 (n, 3, h, w) in -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Jitter:
    """Small random moves of a picture on its white ground, against memorising.

    Args:
        shift: Largest shift, as a share of the picture's side.
        scale: Largest change of scale.
    """

    shift: float = 4 / 128
    scale: float = 0.1

    def __call__(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Move every picture of a batch by its own random amount."""
        count = len(pictures)
        move = torch.rand(count, 3, generator=generator) * 2 - 1
        zoom = 1 / (1 + self.scale * move[:, 0])
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, :, 2] = 2 * self.shift * move[:, 1:]
        grid = F.affine_grid(theta, list(pictures.shape), align_corners=False).to(pictures)
        ink = F.grid_sample(1 - pictures, grid, mode="bilinear", align_corners=False)
        return 1 - ink


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: NDArray[np.uint8], batch: int = 64, jitter: int | None = None) -> Tensor:
    """Encode pictures to raw latents (the posterior's mode), float32 on the autoencoder's device.

    Args:
        vae: The autoencoder.
        pixels: Pictures, ``uint8`` of shape (n, h, w, 3).
        batch: Pictures at a time.
        jitter: Seed of a random move of each picture, or ``None`` for none.
    """
    generator = torch.Generator().manual_seed(jitter or 0)
    parts = []
    for start in range(0, len(pixels), batch):
        x = to_tensor(pixels[start : start + batch])
        x = x if jitter is None else Jitter()(x, generator)
        parts.append(vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().float())
    return torch.cat(parts)


def normalise(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Raw latents to what the transformer sees: mean 0, deviation 1."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 64) -> Tensor:
    """Raw latents to pictures, float32 (n, 3, h, w) in -1 to 1."""
    return torch.cat([vae.decode(part).sample.float() for part in latents.to(vae.dtype).split(batch)]).clamp(-1, 1)


class Shuffle:
    """Endless indices: every picture once, in random order, then again in another order.

    ``left``, what remains of the current order, can be saved and put back.
    """

    def __init__(self, count: int, rng: random.Random) -> None:
        self._count, self._rng = count, rng
        self.left: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next indices."""
        while len(self.left) < count:
            self.left += self._rng.sample(range(self._count), self._count)
        taken, self.left = self.left[:count], self.left[count:]
        return taken
