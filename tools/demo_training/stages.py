"""The training schedules as data: what each stage draws, how fast it learns, how long it lasts.

Stages last a share of the wall-clock minutes given, so every run ends on time, whatever the machine.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """A mixture of noise levels s (0 = picture, 1 = pure noise); the rest is logit-normal(mean, std).

    Args:
        near_one: Share drawn as ``1 - 0.35 u^1.5``: what the caption decides is learned there.
        high: Share drawn evenly from 0.65 to 1.
        uniform: Share drawn evenly from 0 to 1, of what the two above leave.
        exact: Share set to exactly 1, of what the first two leave.
        mean: Mean of the logit-normal part.
        std: Standard deviation of the logit-normal part.
    """

    near_one: float = 0.0
    high: float = 0.0
    uniform: float = 0.30
    exact: float = 0.03
    mean: float = 0.2
    std: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise levels, float32 of shape (count,)."""
        which, inner, one, u = torch.rand(4, count, generator=generator)
        s = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))
        s = torch.where(inner < self.uniform, u, s)
        s = torch.where(one < self.exact, torch.ones_like(s), s)
        s = torch.where(which < self.near_one + self.high, 0.65 + 0.35 * u, s)
        return torch.where(which < self.near_one, 1 - 0.35 * u**1.5, s)


@dataclass(frozen=True)
class TextLength:
    """A T5 length in tokens, how often it is drawn, and the largest batch it allows."""

    tokens: int
    share: float
    batch: int | None = None


SHORT_TEXT = (TextLength(16, 1.0),)
MIXED_TEXT = (TextLength(16, 0.45), TextLength(32, 0.30), TextLength(96, 0.15, 32), TextLength(512, 0.10, 8))
GPU_TEXT = (TextLength(16, 0.50), TextLength(32, 0.30), TextLength(128, 0.10), TextLength(512, 0.10, 128))


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Args:
        name: Shown in the progress.
        share: Share of the whole training's minutes.
        batch: Pictures per step.
        muon: Peak rate of the blocks' matrices.
        adamw: Peak rate of all other weights.
        text_scale: Factor on the text encoders' rate.
        warmup: Steps from rate zero to the peak, or the stage's first tenth where that is over sooner.
        hold: Part of the stage at the starting rate, before it falls.
        decay: How the rate falls from ``start`` to ``end``.
        start: Factor on the peak rates at the stage's start.
        end: Factor on the peak rates at the stage's end.
        ema: Decay of the averaged weights per step.
        noise: The noise levels.
        text: The T5 lengths, drawn per batch.
        large: Share of the batches with 256 px pictures (256 tokens).
        large_batch: Pictures in such a batch.
    """

    name: str
    share: float
    batch: int = 64
    muon: float = 4e-3
    adamw: float = 1.2e-3
    text_scale: float = 1.0
    warmup: int = 80
    hold: float = 0.0
    decay: Literal["cosine", "linear"] = "cosine"
    start: float = 1.0
    end: float = 0.03
    ema: float = 0.99
    noise: Noise = Noise()
    text: tuple[TextLength, ...] = SHORT_TEXT
    large: float = 0.0
    large_batch: int = 64

    def rate(self, progress: float, step: int) -> float:
        """Factor on the peak rates.

        Args:
            progress: How much of the stage's time is over, 0 to 1.
            step: Steps taken in this stage.
        """
        fall = min(1.0, max(0.0, progress - self.hold) / max(1e-9, 1 - self.hold))
        if self.decay == "cosine":
            fall = (1 - math.cos(math.pi * fall)) / 2
        ramp = max((step + 1) / self.warmup, 10 * progress) if self.warmup else 1.0
        return min(1.0, ramp) * (self.start + (self.end - self.start) * fall)

    def draw_text(self, rng: random.Random) -> TextLength:
        """Draw a T5 length for a batch."""
        return rng.choices(self.text, weights=[length.share for length in self.text])[0]


_HALF_NEAR_ONE = Noise(near_one=0.5)
_CPU_MAIN = Stage("main", 25 / 58, hold=0.25, text_scale=2, noise=_HALF_NEAR_ONE)
_PLAIN = Noise(uniform=0.0, exact=0.0)
_GPU = Stage("layout", 0.32, batch=384, adamw=1e-3, warmup=500, end=1.0, ema=0.9995, text=GPU_TEXT)

PLANS: dict[str, tuple[Stage, ...]] = {
    # What the bundled weights were trained with, on two cores.
    "cpu": (
        Stage("start", 22 / 58, muon=1.5e-3, adamw=1e-3, ema=0.98),
        Stage("caption", 8 / 58, muon=2e-3, adamw=1e-3, text_scale=2, ema=0.98, noise=_HALF_NEAR_ONE),
        _CPU_MAIN,
        replace(
            _CPU_MAIN, name="long text", share=3 / 58, decay="linear", warmup=0, hold=0, start=0.1, end=0.0,
            ema=0.97, noise=Noise(near_one=0.35), text=MIXED_TEXT,
        ),
    ),
    # 25 minutes of a GPU: one rate, falling over the last 30 %, the last fifth with 256 px pictures too.
    "gpu": (
        replace(_GPU, noise=Noise(high=0.5, uniform=0.0, exact=0.0)),
        replace(_GPU, name="main", share=0.38, warmup=0, noise=_PLAIN),
        replace(_GPU, name="cool", share=0.10, warmup=0, noise=_PLAIN, decay="linear", end=2 / 3),
        replace(
            _GPU, name="256 px", share=0.20, warmup=0, noise=_PLAIN, decay="linear", start=2 / 3, end=0.0,
            large=0.3, large_batch=128,
        ),
    ),
    # Onwards from trained weights, gently.
    "continue": (
        Stage(
            "continue", 1.0, hold=0.2, warmup=20, decay="linear", start=0.1, end=0.0, text_scale=2, ema=0.97,
            noise=Noise(near_one=0.35), text=MIXED_TEXT[:2],
        ),
    ),
}  # fmt: skip


def find_stage(stages: tuple[Stage, ...], part: float) -> tuple[int, float]:
    """Return which stage a part (0 to 1) of the whole time falls in, and how far into that stage it is."""
    start = 0.0
    for index, stage in enumerate(stages):
        if part < start + stage.share or index == len(stages) - 1:
            return index, min(1.0, (part - start) / stage.share)
        start += stage.share
    raise ValueError("a plan needs at least one stage")
