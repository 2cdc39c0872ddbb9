"""The same pictures painted both ways: how long each took, and how alike they are."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchpipe.cli.pictures import psnr

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Pair:
    """One picture painted both ways.

    Attributes:
        prompt: What was painted.
        seed: Its seed.
        one: The picture of one device.
        many: The picture of several.
        one_seconds: Timed runs of one device.
        many_seconds: Timed runs of several.
        stats: The several devices' last run.
    """

    prompt: str
    seed: int
    one: Image.Image
    many: Image.Image
    one_seconds: tuple[float, ...]
    many_seconds: tuple[float, ...]
    stats: dict[str, Any]

    @property
    def speed_up(self) -> float:
        """Ratio of the median times."""
        return statistics.median(self.one_seconds) / statistics.median(self.many_seconds)

    @property
    def psnr(self) -> float:
        """How alike the pictures are, in decibels; infinite where they are equal."""
        return psnr(self.one, self.many)


@dataclass(frozen=True)
class Comparison:
    """All pairs, and how many devices stood against one."""

    devices: int
    threads: int
    pairs: tuple[Pair, ...]

    @property
    def speed_up(self) -> float:
        """Median over the pictures."""
        return statistics.median(pair.speed_up for pair in self.pairs)

    def as_list(self) -> list[dict[str, Any]]:
        """The pairs as plain data."""
        return [
            {
                "prompt": pair.prompt,
                "seed": pair.seed,
                "one_device_seconds": pair.one_seconds,
                "seconds": pair.many_seconds,
                "speed_up": pair.speed_up,
                "psnr": None if math.isinf(pair.psnr) else pair.psnr,
                "identical": math.isinf(pair.psnr),
                "stats": pair.stats,
            }
            for pair in self.pairs
        ]
