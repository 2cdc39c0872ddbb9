"""``autoencoder``: trains the AutoencoderKL on crops (or whole pictures) of all the icon sets."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from .console import CONSOLE, Meter, Running
from .dataset import Pictures
from .ema import Average
from .latents import Shuffle, decode, encode, to_tensor
from .model import new_autoencoder


@dataclass(frozen=True)
class AutoencoderPlan:
    """How the autoencoder is built and trained.

    Args:
        channels: Channels of each level.
        crop: Side of the random crops in pixels, or ``None`` for whole pictures.
        batch: Crops per step.
        rate: AdamW's peak rate.
        warmup: Steps to the peak.
        ema: Decay of the averaged weights.
    """

    channels: tuple[int, ...] = (16, 32, 64, 96)
    crop: int | None = 64
    batch: int = 24
    rate: float = 2e-3
    warmup: int = 50
    ema: float = 0.995


AUTOENCODER_PLANS: dict[str, AutoencoderPlan] = {
    "cpu": AutoencoderPlan(),
    "gpu": AutoencoderPlan(channels=(32, 64, 128, 128), crop=None, batch=64, rate=1e-3, warmup=200, ema=0.999),
}


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + 0.5 MSE + 0.5 L1 of differences between neighbours + 0.5 L1 of 4x4 averages."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges + 0.5 * coarse


def divergence(posterior: DiagonalGaussianDistribution) -> Tensor:
    """Mean KL divergence per latent number from the unit normal."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class CropSource:
    """Batches of crops, half from all the pictures and half from the transformer's concepts."""

    def __init__(self, pictures: Pictures, plan: AutoencoderPlan, seed: int) -> None:
        self._pixels, self._plan = pictures.pixels, plan
        self._rng = random.Random(seed)
        self._core = [i for i, entry in enumerate(pictures.entries) if entry.core]
        self._from_all = Shuffle(len(pictures.entries), self._rng)
        self._from_core = Shuffle(len(self._core), self._rng)

    def batch(self) -> Tensor:
        """Draw a batch, float32 (batch, 3, side, side) in -1 to 1."""
        half = self._plan.batch // 2
        rows = self._from_all.take(self._plan.batch - half) + [self._core[i] for i in self._from_core.take(half)]
        return to_tensor(np.stack([self._crop(row) for row in rows]))

    def _crop(self, row: int) -> np.ndarray:
        picture, side = self._pixels[row], self._plan.crop
        if side is None:
            return picture
        y, x = self._corner(len(picture) - side), self._corner(len(picture) - side)
        return picture[y : y + side, x : x + side]

    def _corner(self, room: int) -> int:
        return min(room, max(0, round(self._rng.gauss(room / 2, room / 4))))


def train_autoencoder(
    pictures: Pictures, plan: AutoencoderPlan, minutes: float, device: torch.device, seed: int
) -> AutoencoderKL:
    """Train on the pictures that are not held out, for a number of minutes; return the averaged weights.

    The latents' mean and deviation are measured and stored in the model's config.
    """
    torch.manual_seed(seed)
    seen = pictures.pick(held_out=False)
    vae = new_autoencoder(plan.channels).to(device, memory_format=torch.channels_last)
    source = CropSource(seen, plan, seed)
    average = Average(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    loss, seconds, step = Running(), minutes * 60, 0
    with Meter("autoencoder", seconds) as meter:
        while meter.seconds < seconds:
            _set_rate(optimizer, plan, meter.seconds / seconds, step)
            value = _step(vae, optimizer, source.batch().to(device))
            average.update(min(plan.ema, (1 + step) / (10 + step)))
            step += 1
            meter.update(meter.seconds, f"step {step}  loss {loss.add(value):.4f}")
    CONSOLE.print(f"{step} steps of {plan.batch} pictures")
    average.keep()
    measure_latents(vae, seen)
    return vae


def _set_rate(optimizer: torch.optim.Optimizer, plan: AutoencoderPlan, progress: float, step: int) -> None:
    cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = plan.rate * cosine * min(1.0, (step + 1) / plan.warmup)


def _step(vae: AutoencoderKL, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        output = vae.decode(posterior.sample()).sample
    loss = reconstruction_loss(output.float(), x) + 2e-4 * divergence(posterior)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, pictures: Pictures) -> None:
    """Set ``shift_factor`` to the latents' mean and ``scaling_factor`` to one over their deviation."""
    core = pictures.pick(core=True)
    latents = encode(vae, core.pixels)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def psnr(vae: AutoencoderKL, pictures: Pictures) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, in dB."""
    target = to_tensor(pictures.pixels).to(vae.device)
    output = decode(vae, encode(vae, pictures.pixels))
    mse = ((output - target) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def save_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    """Write the autoencoder in float32; the pipeline's export turns it to bf16."""
    vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(folder)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Load an autoencoder folder, or the ``vae`` of a pipeline folder, in float32."""
    inner = folder / "vae" if (folder / "model_index.json").is_file() else folder
    return AutoencoderKL.from_pretrained(inner, torch_dtype=torch.float32, local_files_only=True)
