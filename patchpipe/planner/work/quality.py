"""How near the pictures of a setting are to one device's, as ``patchpipe quality`` measured it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchpipe.config import STREAMED, ParallelConfig, WarmupKind

Way = tuple[WarmupKind | None, bool, bool]  # the warm-up, whether stale rows are forecast, whether it is DistriFusion


@dataclass(frozen=True)
class Quality:
    """Decibels against one device of what a picture depends on, and how many it must have.

    Attributes:
        model: The model that was measured.
        steps: Steps of its pictures; ``None`` where the file does not tell.
        pictures: How many were compared.
        least: Mean decibels of a layout that may win.
        decibels: Mean decibels by warm-up and forecast, then by number of patches (DistriFusion: of ranks).
    """

    model: str
    steps: int | None
    pictures: int
    least: float
    decibels: dict[Way, dict[int, float]]

    @classmethod
    def read(cls, path: Path, least: float) -> Quality:
        """Reads what ``patchpipe quality`` wrote beside its page.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is something else, or ``least`` is no number of decibels.
        """
        if not math.isfinite(least):
            raise ValueError(f"--min-psnr {least} must be a number of decibels, such as 40")
        if not path.is_file():
            raise FileNotFoundError(f"--quality {path}: there is no such file")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            found = told["found"]
            decibels: dict[Way, dict[int, float]] = {}
            for one in found:
                decibels.setdefault(_way(one), {})[int(one["patches"])] = _mean(one["psnr"])
            steps = told["call"].get("num_inference_steps")
            return cls(str(told["model"]), steps, len(found[0]["psnr"]), least, decibels)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"--quality {path} is not what `patchpipe quality` writes as .json: {error}") from error

    @property
    def ways(self) -> list[tuple[WarmupKind | None, bool]]:
        """Warm-up and forecast of what was measured of patches that stream."""
        return [(warmup, forecast) for warmup, forecast, distrifusion in self.decibels if not distrifusion]

    def check(self, steps: int) -> None:
        """Refuses a request that is farther from one device's picture than those that were measured.

        Raises:
            ValueError: It has fewer steps, between which more changes.
        """
        if self.steps is not None and steps < self.steps:
            raise ValueError(
                f"--quality was measured with {self.steps} steps, and fewer steps differ more from one device: "
                f"measure again with `patchpipe quality --steps {steps}`"
            )

    def of(self, config: ParallelConfig, patches: int) -> float | None:
        """Mean decibels of a layout; infinite where its picture is one device's, ``None`` where nothing is known.

        Of a number of patches (DistriFusion: of ranks) that was not measured those of the next larger one count, which
        sees older rows.

        Args:
            config: The layout.
            patches: Its patches.
        """
        patches = max(patches, config.distrifusion)
        if config.synchronous or patches == 1:
            return math.inf
        warmup = 1 if config.warmup is None else config.warmup
        measured = self.decibels.get((warmup, config.forecasts, config.distrifusion > 1), {})
        return next((measured[count] for count in sorted(measured) if count >= patches), None)

    def meets(self, config: ParallelConfig, patches: int) -> bool:
        """Whether a layout is known to have as many decibels as are asked for."""
        found = self.of(config, patches)
        return found is not None and found >= self.least

    @property
    def told(self) -> str:
        """For people: what was measured."""
        steps = "" if self.steps is None else f", {self.steps} steps"
        return f"{self.pictures} picture{'s' if self.pictures > 1 else ''} of {self.model}{steps}"


def _way(one: dict[str, Any]) -> Way:
    warmup = one["warmup"]
    if warmup != STREAMED and not isinstance(warmup, int):
        raise ValueError(f"warm-up {warmup!r}")
    return warmup, bool(one["forecast"]), bool(one.get("distrifusion", False))


def _mean(decibels: list[float | None]) -> float:
    """Of pictures that are identical there are none."""
    known = [one for one in decibels if one is not None]
    return sum(known) / len(known) if known or not decibels else math.inf
