"""Draws passes of the bench of offload, without the gate and with it: what was computed, exchanged and copied when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.patches import Patch

from bench.offload import Model, offloaded
from patchpipe import OffloadConfig

OUT = Path(__file__).parent.parent / "docs" / "images" / "offload.png"
BLOCKS, BANDWIDTH = 4, 160
ASKED = OffloadConfig(resident=0.5, chunk=0.6)
COLOURS = {"compute": "#1f6feb", "exchange": "#d1782c", "chunk": "#3a9d5d", "gate": "#e8e3c8", "stall": "#c9d1d9"}
NAMES = {
    "compute": "a block computes", "exchange": "exchange with other ranks", "chunk": "a chunk of weights is copied",
    "gate": "the next chunk waits at the gate", "stall": "a block waits for its weights",
}  # fmt: skip
LULL = 0.03  # seconds: longer ones no gate makes here
LANES = {"compute": 2, "stall": 2, "exchange": 1, "chunk": 0, "gate": 0}


def timeline(out: Path) -> Path:
    """Runs a pass each way, and draws both."""
    figure, axes = pyplot.subplots(2, 1, figsize=(10, 5), sharex=True, layout="constrained")
    model, longest = Model(BLOCKS), 0.0
    for axis, gate in zip(axes, ("off", "on"), strict=True):
        events, seconds = _pass(model, gate)
        _draw(axis, events)
        longest = max(longest, seconds)
        exchanges = [end - start for kind, _, start, end in events if kind == "exchange"]
        mean = 1000 * sum(exchanges) / len(exchanges)
        axis.set_title(f"gate {gate}: an exchange takes {mean:.0f} ms", loc="left", fontsize=10)
    axes[-1].set_xlabel("ms of one pass through four blocks")
    axes[-1].set_xlim(0, 1000 * longest)
    handles = [Patch(color=COLOURS[kind], label=name) for kind, name in NAMES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(out, dpi=150)
    return out


def _pass(model: Model, gate: Any) -> tuple[list[tuple[str, str, float, float]], float]:
    with offloaded(model, BANDWIDTH, replace(ASKED, gate=gate)) as (moving, device):
        model.on[:] = [device]
        model(torch.zeros(1))
        events = device.events
        events.clear()
        moving.mover.watch = lambda kind, key, start, end: events.append((kind, str(key), start, end))
        began = device.link.clock.now()
        model(torch.zeros(1))
        seconds = device.link.clock.now() - began
        moving.mover.watch = None
        shown = [(kind, key, start - began, end - began) for kind, key, start, end in list(events)]
        return [event for event in shown if event[3] > 0 and event[2] < seconds], seconds


def _draw(axis: Any, events: list[tuple[str, str, float, float]]) -> None:
    for kind, _, start, end in sorted(events, key=lambda event: event[0] not in ("stall", "gate")):
        lane = LANES[kind]
        axis.broken_barh([(1000 * start, 1000 * (end - start))], (lane - 0.4, 0.8), color=COLOURS[kind], linewidth=0)
        if kind == "chunk":
            axis.plot([1000 * start] * 2, [lane - 0.4, lane + 0.4], color="white", linewidth=0.8)
    for key, start, end in _runs(events):
        if end - start > 0.02:  # else there is no room for a label
            title = f"weights of block {key.rpartition('.')[2]}"
            axis.text(500 * (start + end), -0.46, title, ha="center", va="top", fontsize=8)
    for number in range(BLOCKS):
        own = [(start, end) for kind, key, start, end in events if kind == "compute" and key == f"blocks.{number}"]
        if own:
            axis.text(1000 * own[0][0] + 3, 2.48, f"block {number}", fontsize=8, va="bottom")
    axis.set_yticks([0, 1, 2], ["copies", "exchanges", "blocks"])
    axis.set_ylim(-0.85, 2.9)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _runs(events: list[tuple[str, str, float, float]]) -> list[tuple[str, float, float]]:
    """Chunks of one block that follow one another, as one: its block, and from when to when."""
    runs: list[tuple[str, float, float]] = []
    for start, end, key in sorted((start, end, key) for kind, key, start, end in events if kind == "chunk"):
        if runs and runs[-1][0] == key and start - runs[-1][2] < LULL:
            runs[-1] = (key, runs[-1][1], end)
        else:
            runs.append((key, start, end))
    return runs
