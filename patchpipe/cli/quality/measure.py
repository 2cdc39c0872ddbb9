"""The settings that change a picture, and what the change is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchpipe.cli.pictures import as_pictures, psnr
from patchpipe.config import WATCHED, ParallelConfig, WarmupKind

if TYPE_CHECKING:
    from PIL import Image

HEADER = ("patches", "warm-up", "stale rows", "dB, mean", "dB, worst", "SSIM, mean", "SSIM, worst", "predicted")
WINDOW = 8  # pixels, each way, in which structure is compared
TELL = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What a picture depends on beside the model and the call: never on the number of devices.

    Attributes:
        patches: Patches of the latent.
        warmup: Synchronous steps, ``"streamed"`` or ``"auto"``.
        forecast: Whether stale keys and values are forecast.
    """

    patches: int
    warmup: WarmupKind
    forecast: bool

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.patches} patches, warm-up {self.warmup}, {'forecast' if self.forecast else 'stale'}"

    @property
    def config(self) -> ParallelConfig:
        """The same on one device; halves of a batch are left out, since they would change it too."""
        return ParallelConfig(
            patches=self.patches, warmup=self.warmup, forecast=self.forecast, split_batch=False, share_blocks=False
        )


@dataclass
class Found:
    """What came of a setting.

    Attributes:
        setting: It.
        decibels: Peak signal-to-noise ratio of each picture against one device's.
        structure: Structural similarity of each, 1 where they are the same.
        pictures: The pictures.
        seconds: What the planner predicts for it on many cards; ``None`` where nothing was asked.
    """

    setting: Setting
    decibels: list[float] = field(default_factory=list)
    structure: list[float] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    seconds: float | None = None

    @property
    def mean(self) -> float:
        """Mean decibels."""
        return sum(self.decibels) / len(self.decibels)

    @property
    def worst(self) -> int:
        """The picture that differs most."""
        return min(range(len(self.decibels)), key=self.decibels.__getitem__)

    @property
    def cells(self) -> list[str]:
        """A row of the table of figures, as ``HEADER`` names its columns."""
        setting, similar = self.setting, self.structure
        return [
            str(setting.patches),
            str(setting.warmup),
            "forecast" if setting.forecast else "as they were",
            told(self.mean),
            told(min(self.decibels)),
            f"{sum(similar) / len(similar):.4f}",
            f"{min(similar):.4f}",
            "" if self.seconds is None else f"{self.seconds:.3g} s",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data; an identical picture has no decibels."""
        decibels = [None if math.isinf(one) else round(one, 3) for one in self.decibels]
        setting = {name: getattr(self.setting, name) for name in ("patches", "warmup", "forecast")}
        similar = [round(one, 5) for one in self.structure]
        return {**setting, "psnr": decibels, "ssim": similar, "seconds": self.seconds}


def told(decibels: float) -> str:
    """For people."""
    return "identical" if math.isinf(decibels) else f"{decibels:.1f}"


def settings(patches: Sequence[int], warmups: Sequence[WarmupKind], forecasts: Sequence[bool]) -> list[Setting]:
    """Every combination there is: the warm-up that goes by a forecast needs one."""
    every = (Setting(*each) for each in itertools.product(patches, warmups, forecasts))
    return [one for one in every if one.forecast or one.warmup != WATCHED]


def measure(
    pipe: Any, prompts: Sequence[str], call: dict[str, Any], wanted: Sequence[Setting], seed: int, tell: TELL
) -> tuple[list[Image.Image], list[Found]]:
    """Paints every prompt on one device, and then with every setting, and compares.

    One process is enough: the schedule never shows in a picture.

    Args:
        pipe: The pipeline, plain.
        prompts: What to paint.
        call: Further arguments of its call.
        wanted: The settings.
        seed: Of the first prompt; the others count up.
        tell: Called with what is done now, before each picture.

    Returns:
        One device's pictures, and what came of every setting.
    """
    from patchpipe.pipeline.apply import parallelize, restore

    def painted(title: str) -> Iterator[Image.Image]:
        import torch

        for number, prompt in enumerate(prompts):
            tell(f"{title}: {prompt}")
            output = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed + number), **call)
            yield as_pictures(output.images, type(pipe).__name__)[0]

    plain, all_found = list(painted("one device")), []
    for setting in wanted:
        found = Found(setting)
        parallelize(pipe, setting.config)
        try:
            for reference, picture in zip(plain, painted(setting.label), strict=True):
                found.decibels.append(psnr(reference, picture))
                found.structure.append(structure(reference, picture))
                found.pictures.append(picture)
        finally:
            restore(pipe)
        all_found.append(found)
    return plain, all_found


def structure(one: Image.Image, other: Image.Image) -> float:
    """Structural similarity of two pictures in grey, over windows of 8 × 8 pixels (Wang et al. 2004, equation 13)."""
    import numpy as np
    import torch
    from torch.nn.functional import avg_pool2d

    first, second = (
        torch.from_numpy(np.array(picture.convert("L"), dtype=np.float64))[None, None] for picture in (one, other)
    )

    def mean(values: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(values, WINDOW, stride=1)

    near_black, flat = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    means = mean(first), mean(second)
    spread = mean(first * first) - means[0] ** 2 + mean(second * second) - means[1] ** 2
    together = mean(first * second) - means[0] * means[1]
    light = (2 * means[0] * means[1] + near_black) / (means[0] ** 2 + means[1] ** 2 + near_black)
    return float((light * (2 * together + flat) / (spread + flat)).mean())
