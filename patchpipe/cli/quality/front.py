"""Likeness against predicted time: which settings no other one beats, and their drawing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patchpipe.cli.quality.measure import Found, Setting
from patchpipe.config import ParallelConfig

if TYPE_CHECKING:
    from patchpipe.planner.machine.profiles import Profile
    from patchpipe.planner.work.workload import Workload

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 680, 340, 48, 24, 44


@dataclass(frozen=True)
class Cards:
    """The cards that seconds are predicted for.

    Attributes:
        number: How many; each is a stage.
        name: For people: the card and its link.
        profile: What they are like.
    """

    number: int
    name: str
    profile: Profile

    @classmethod
    def read(cls, text: str, link: str | None) -> Cards:
        """Reads ``8xl40``.

        Raises:
            ValueError: It looks otherwise, or the card or the link is not known.
        """
        from patchpipe.planner.machine.cards import card_named
        from patchpipe.planner.machine.profiles import Profile

        number, sign, card = text.partition("x")
        if not sign or not number.isdigit() or int(number) < 1:
            raise ValueError(f"--on {text} must be a number of cards and their kind, such as 8xl40")
        link = link or card_named(card).link
        return cls(int(number), f"{number} × {card} over {link}", Profile.named(card, link))

    def seconds(self, workload: Workload, setting: Setting | None) -> float:
        """Seconds of a request, as the planner predicts them: on all cards, or plain on one."""
        from patchpipe.planner.predict import predict

        config = ParallelConfig() if setting is None else setting.config
        if setting is not None and not setting.distrifusion:
            config = replace(config, pipefusion=min(self.number, len(workload.blocks)))
        return predict(workload, config, self.profile).seconds


def front(found: Sequence[Found]) -> list[Found]:
    """Those that no other one beats in both time and likeness, the quickest first."""
    timed = sorted((one for one in found if one.seconds is not None), key=lambda one: (one.seconds, -one.mean))
    kept: list[Found] = []
    for one in timed:
        if not kept or one.mean > kept[-1].mean:
            kept.append(one)
    return kept


def drawing(found: Sequence[Found], one_device: float | None, cards: str) -> str:
    """Mean decibels by predicted seconds as SVG, those on the front named; nothing where no seconds are known."""
    timed = [one for one in found if one.seconds is not None and math.isfinite(one.mean)]
    if not timed:
        return ""
    best = front(timed)
    times = [one.seconds or 0.0 for one in timed]
    left, right = min(times) * 0.95, max(times) * 1.05
    low, high = (round(pick(one.mean for one in timed)) + step for pick, step in ((min, -2), (max, 2)))

    def at(one: Found) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - 40) * ((one.seconds or 0.0) - left) / (right - left)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - one.mean) / (high - low)

    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' font-size='12' fill='#444'>"]
    for decibels in range(low, high + 1, max(1, (high - low) // 6)):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - decibels) / (high - low)
        parts.append(f"<line x1='{LEFT}' x2='{WIDTH - 40}' y1='{y:.1f}' y2='{y:.1f}' stroke='#eee'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{decibels}</text>")
    for tick in range(5):
        seconds, x = left + (right - left) * tick / 4, LEFT + (WIDTH - LEFT - 40) * tick / 4
        parts.append(f"<text x='{x:.1f}' y='{HEIGHT - 24}' text-anchor='middle'>{seconds:.3g} s</text>")
    plain = "" if one_device is None else f"; one takes {one_device:.3g} s"
    parts.append(
        f"<text x='{LEFT}' y='{HEIGHT - 6}'>predicted on {html.escape(cards)}{plain}; mean dB against one device</text>"
    )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, best))
    parts.append(f"<polyline points='{points}' fill='none' stroke='#1f6feb' stroke-width='1.5'/>")
    for one in timed:
        x, y = at(one)
        named = any(one is other for other in best)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{'#1f6feb' if named else '#9aa4ae'}'/>")
        if named:
            label, (anchor, shift) = html.escape(one.setting.label), ("end", -8) if x > WIDTH * 0.6 else ("start", 8)
            parts.append(f"<text x='{x + shift:.1f}' y='{y - 6:.1f}' text-anchor='{anchor}'>{label}</text>")
    return "".join([*parts, "</svg>"])
