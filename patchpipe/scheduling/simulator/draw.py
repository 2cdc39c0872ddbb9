"""Draws deadlines met against load, a line for each policy, for all requests and for each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchpipe.files import save_figure
from patchpipe.scheduling.simulator.measure import Figures

_PANELS = {"all": "all requests", "picture": "pictures", "clip": "clips"}
_COLOURS = {
    "fcfs": "#9d755d", "sjf": "#b279a2", "srtf": "#f58518", "edf": "#72b7b2", "rasp": "#8c8c8c", "genserve": "#4c78a8",
    "balanced": "#2a8f3c",
}  # fmt: skip
_INK, _LINE = "#333333", "#d4d4d4"


def draw(found: Sequence[Figures], title: str, out: Path) -> None:
    """Draws the figures to a file; its suffix names the format, such as ``.png`` or ``.svg``.

    Args:
        found: Figures of policies under loads.
        title: What was simulated.
        out: The picture.

    Raises:
        ValueError: matplotlib is not installed, or it knows no such format.
    """
    figure = figure_of(found, title)
    save_figure(figure, out)


def figure_of(found: Sequence[Figures], title: str) -> Any:
    """The picture as matplotlib's ``Figure``; see ``draw``."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: `pip install 'patchpipe[trace]'`, or leave out --output") from None
    figure = Figure(figsize=(13, 4.4), dpi=150, layout="constrained")
    figure.suptitle(title, color=_INK, fontsize=11)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (kind, name) in zip(axes, _PANELS.items(), strict=True):
        for policy in dict.fromkeys(one.policy for one in found):
            _line(axis, policy, [one for one in found if one.policy == policy], kind)
        axis.set_title(name, fontsize=10, color=_INK)
        axis.set_xlabel("requests a minute", color=_INK)
        axis.set_ylim(0, 102)
        axis.grid(color=_LINE, linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("deadlines met, %", color=_INK)
    axes[-1].legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def _line(axis: Any, policy: str, found: list[Figures], kind: str) -> None:
    shown = [one for one in sorted(found, key=lambda one: one.per_minute) if not math.isnan(one.met[kind].value)]
    loads = [one.per_minute for one in shown]
    values = [100 * one.met[kind].value for one in shown]
    halves = [100 * one.met[kind].half for one in shown]
    ours = policy == "balanced"
    colour = _COLOURS.get(policy, _INK)
    axis.plot(loads, values, color=colour, linewidth=2.4 if ours else 1.5, marker="o", markersize=3.5, label=policy)
    low = [value - half for value, half in zip(values, halves, strict=True)]
    high = [value + half for value, half in zip(values, halves, strict=True)]
    axis.fill_between(loads, low, high, color=colour, alpha=0.13, linewidth=0)
