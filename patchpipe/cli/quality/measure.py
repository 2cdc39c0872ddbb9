"""The settings that change a picture, and what the change is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from patchpipe.cli.pictures import as_pictures, psnr
from patchpipe.cli.quality.features import Features
from patchpipe.config import WATCHED, ParallelConfig, WarmupKind

if TYPE_CHECKING:
    from PIL import Image

HEADER = ("patches", "warm-up", "stale rows", "dB", "SSIM", "features ‰", "predicted")
MEASURES = (
    "Mean/worst. SSIM is 1 where structure is the same. Features, in thousandths, are how far apart two pictures are "
    "to the model's own picture encoder."
)
WINDOW = 8  # pixels, each way, in which structure is compared
TELL = Callable[[str, int], None]  # what is painted now, and how many pictures it is
Painter = Callable[..., Sequence[Any]]  # takes a prompt and a seed, returns pictures


@dataclass(frozen=True)
class Setting:
    """What a picture depends on beside the model and the call: never on the number of devices.

    Attributes:
        patches: Patches of the latent.
        warmup: Synchronous steps, ``"streamed"`` or ``"auto"``.
        forecast: Whether stale keys and values are forecast.
        distrifusion: Whether every patch has a rank of its own, which sees the others one step late, in place of
            streaming. The picture then does depend on the number of devices: it is that of patches.
    """

    patches: int
    warmup: WarmupKind
    forecast: bool
    distrifusion: bool = False

    @property
    def label(self) -> str:
        """For people."""
        cut = f"DistriFusion on {self.patches}" if self.distrifusion else f"{self.patches} patches"
        return f"{cut}, warm-up {self.warmup}, {self.stale}"

    @property
    def stale(self) -> str:
        """For people: how stale rows are shown."""
        return "forecast" if self.forecast else "as they were"

    @property
    def config(self) -> ParallelConfig:
        """The same on as few devices as paint it; halves of a batch are left out, since they would change it too."""
        if self.distrifusion:
            return ParallelConfig(distrifusion=self.patches, warmup=self.warmup, forecast=self.forecast)
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
        features: How far each is from one device's to the model's picture encoder, 0 where they are the same; empty
            if it has none.
        pictures: The pictures.
        seconds: What the planner predicts for it on many cards; ``None`` where nothing was asked.
    """

    setting: Setting
    decibels: list[float] = field(default_factory=list)
    structure: list[float] = field(default_factory=list)
    features: list[float] = field(default_factory=list)
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
        """A row of the table of figures, as ``HEADER`` names its columns; a measure has its mean and its worst."""
        setting = self.setting
        return [
            f"{setting.patches} ranks" if setting.distrifusion else str(setting.patches),
            str(setting.warmup),
            setting.stale,
            f"{told(self.mean)}/{told(min(self.decibels))}",
            f"{_mean(self.structure):.3f}/{min(self.structure):.3f}",
            f"{1000 * _mean(self.features):.2f}/{1000 * max(self.features):.2f}" if self.features else "",
            "" if self.seconds is None else f"{self.seconds:.3g} s",
        ]

    def add(self, reference: Image.Image, picture: Image.Image, features: Features | None) -> None:
        """Compares one more picture with one device's."""
        self.pictures.append(picture)
        self.decibels.append(psnr(reference, picture))
        self.structure.append(structure(reference, picture))
        if features is not None:
            self.features.append(features.distance(reference, picture))

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data; an identical picture has no decibels."""
        decibels = [None if math.isinf(one) else round(one, 3) for one in self.decibels]
        similar, apart = [round(one, 5) for one in self.structure], [round(one, 7) for one in self.features]
        return {**asdict(self.setting), "psnr": decibels, "ssim": similar, "features": apart, "seconds": self.seconds}


def told(decibels: float) -> str:
    """For people."""
    return "identical" if math.isinf(decibels) else f"{decibels:.1f}"


def settings(
    patches: Sequence[int], warmups: Sequence[WarmupKind], forecasts: Sequence[bool], ranks: Sequence[int] = ()
) -> list[Setting]:
    """Every combination there is: the warm-up that goes by a forecast needs one, and DistriFusion has a plain one.

    Args:
        patches: Numbers of patches that stream.
        warmups: Warm-ups.
        forecasts: With and without.
        ranks: Numbers of ranks of DistriFusion.
    """
    streaming = (Setting(*each) for each in itertools.product(patches, warmups, forecasts))
    beside = (Setting(*each, distrifusion=True) for each in itertools.product(ranks, warmups, forecasts))
    every = [one for one in streaming if one.forecast or one.warmup != WATCHED]
    return every + [one for one in beside if isinstance(one.warmup, int)]


def measure(
    pipe: Any,
    prompts: Sequence[str],
    call: dict[str, Any],
    wanted: Sequence[Setting],
    seed: int,
    tell: TELL,
    crew: Callable[[Setting], AbstractContextManager[Painter]],
    batch: int = 1,
) -> tuple[list[Image.Image], list[Found]]:
    """Paints every prompt on one device, and then with every setting, and compares.

    One process is enough for patches that stream: the schedule never shows in a picture.

    Args:
        pipe: The pipeline, plain.
        prompts: What to paint.
        call: Further arguments of its call.
        wanted: The settings.
        seed: Of the first prompt; the others count up.
        tell: Called with what is done now, before each picture.
        crew: Opens what paints a setting that needs ranks of its own.
        batch: Pictures painted at once. Each has a forecast of its own, so that it changes only how sums are rounded.

    Returns:
        One device's pictures, and what came of every setting.
    """
    features = Features.of(pipe)

    def painted(title: str, paint: Painter) -> Iterator[Image.Image]:
        for start in range(0, len(prompts), batch):
            some = list(prompts[start : start + batch])
            seeds = list(range(seed + start, seed + start + len(some)))
            tell(f"{title}: {some[0]}", len(some))
            given: dict[str, Any] = (
                {"prompt": some, "seed": seeds} if batch > 1 else {"prompt": some[0], "seed": seeds[0]}
            )
            yield from as_pictures(paint(**given, **call), type(pipe).__name__)[: len(some)]

    plain, all_found = list(painted("one device", _painter(pipe))), []
    for setting in wanted:
        found = Found(setting)
        with crew(setting) if setting.distrifusion else _parallel(pipe, setting) as paint:
            for reference, picture in zip(plain, painted(setting.label, paint), strict=True):
                found.add(reference, picture, features)
        all_found.append(found)
    return plain, all_found


@contextmanager
def _parallel(pipe: Any, setting: Setting) -> Iterator[Painter]:
    from patchpipe.pipeline.apply import parallelize, restore

    parallelize(pipe, setting.config)
    try:
        yield _painter(pipe)
    finally:
        restore(pipe)


def _painter(pipe: Any) -> Painter:
    def paint(seed: int | list[int], **call: Any) -> Sequence[Any]:
        import torch

        many = [torch.Generator().manual_seed(one) for one in ([seed] if isinstance(seed, int) else seed)]
        torch.manual_seed(many[0].initial_seed())  # some schedulers draw noise from the default generator
        return pipe(generator=many[0] if isinstance(seed, int) else many, **call).images

    return paint


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
