"""Draws the map of a machine: its ranks, their domains with fast links inside, and what joins these."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from patchpipe.files import save_figure
from patchpipe.planner.machine.devices import GB
from patchpipe.planner.machine.links import Line, Link

FAST, SLOW, INK, PALE = "#1f6feb", "#d1782c", "#24292f", "#eef2f6"
RING, RANK = 0.62, 0.15  # radius of a domain's ring of ranks, and of a rank
STEP = 2.5  # from the middle of one domain to that of the next
MOST_DRAWN = 4  # domains


def told(link: Link, ranks: int) -> str:
    """The domains of so many ranks, in words, with the option that tells them."""
    if ranks <= link.island:
        return f"one of {ranks} ranks that reach each other alike: --ulysses-inner has no use here"
    count = math.ceil(ranks / link.island)
    inner = link.domain(Line(ranks))
    words = f"{count} of {link.island} neighbours · {speed(link.bandwidth)} inside, {speed(link.trunk)} between, shared"
    return words + (f" · for all of them --ulysses {ranks} --ulysses-inner {inner}" if inner > 1 else "")


def speed(rate: float) -> str:
    """Bytes a second, for people."""
    return f"{rate / GB:.3g} GB/s"


def draw_map(device: str, link: Link, ranks: int, out: Path) -> None:
    """Draws it to a file; its suffix names the format, such as ``.png`` or ``.svg``.

    Args:
        device: The card.
        link: How ranks reach each other.
        ranks: How many there are.
        out: The picture.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    domains = [range(first, min(first + link.island, ranks)) for first in range(0, ranks, link.island)]
    drawn = domains[:MOST_DRAWN]
    figure = Figure(figsize=(2.3 * max(2, len(drawn)) + 0.6, 3.6), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    for place, members in enumerate(drawn):
        _domain(axis, place * STEP, members)
    right = (len(drawn) - 1) * STEP
    if len(domains) > 1:
        axis.plot([0, right], [-1.5, -1.5], color=SLOW, linewidth=3, solid_capstyle="round")
        for place in range(len(drawn)):
            axis.plot([place * STEP] * 2, [-1.5, -1.02], color=SLOW, linewidth=3)
        between = f"{speed(link.trunk)} between domains, shared by all that crosses"
        axis.text(right / 2, -1.62, between, ha="center", va="top", fontsize=9, color=SLOW)
    further = f", {len(domains) - len(drawn)} further domains alike" if len(domains) > len(drawn) else ""
    axis.text(right / 2, 1.5, f"{ranks} ranks · {device} · {link.name}{further}", ha="center", fontsize=10, color=INK)
    inside = f"{speed(link.bandwidth)} from rank to rank" + (" inside a domain" if len(domains) > 1 else "")
    axis.text(right / 2, 1.2, inside, ha="center", fontsize=9, color=FAST)
    axis.set_xlim(min(-1.2, right / 2 - STEP), max(right + 1.2, right / 2 + STEP))
    axis.set_ylim(-2.0 if len(domains) > 1 else -1.1, 1.8)
    axis.set_aspect("equal")
    axis.axis("off")
    save_figure(figure, out)


def _domain(axis: Any, middle: float, members: range) -> None:
    """A box with its ranks in a ring, each joined to each."""
    from matplotlib.patches import Circle, FancyBboxPatch

    axis.add_patch(
        FancyBboxPatch((middle - 0.9, -0.9), 1.8, 1.8, boxstyle="round,pad=0.1", facecolor=PALE, edgecolor="#c9d1d9")
    )
    turn = 2 * math.pi / len(members)
    radius = RING if len(members) > 1 else 0.0
    at = [(middle + radius * math.sin(turn * place), radius * math.cos(turn * place)) for place in range(len(members))]
    for (one, up), (other, down) in itertools.combinations(at, 2):
        axis.plot([one, other], [up, down], color=FAST, linewidth=1.2, alpha=0.7, zorder=1)
    for (across, up), rank in zip(at, members, strict=True):
        axis.add_patch(Circle((across, up), RANK, facecolor="white", edgecolor=INK, linewidth=1, zorder=2))
        axis.text(across, up, str(rank), ha="center", va="center", fontsize=8, color=INK, zorder=3)
