"""Draws how patches stream through the stages: docs/images/schedule.png.

python tools/draw_schedule.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES, PATCHES, STEPS, WARMUP, HOP = 3, 4, 4, 1, 0.12
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
OUT = Path(__file__).parent.parent / "docs" / "images" / "schedule.png"

Task = tuple[int, float, float, int, int | None]  # stage, start, seconds, step, patch


def schedule() -> list[Task]:
    """Start and length of every piece of work: a patch takes 1 on a stage, a whole latent as many as patches."""
    tasks: list[Task] = []
    free = [0.0] * STAGES
    ready = [0.0] * PATCHES  # when the first stage has each patch of the last step's prediction
    for step in range(STEPS):
        if step < WARMUP:
            at = max(ready)
            for stage in range(STAGES):
                start = max(at, free[stage])
                tasks.append((stage, start, PATCHES, step, None))
                free[stage] = start + PATCHES
                at = free[stage] + HOP
            ready = [at] * PATCHES
            continue
        for patch in range(PATCHES):
            at = ready[patch]
            for stage in range(STAGES):
                start = max(at, free[stage])
                tasks.append((stage, start, 1, step, patch))
                free[stage] = start + 1
                at = free[stage] + HOP
            ready[patch] = at
    return tasks


def draw(tasks: list[Task]) -> None:
    """Stages down, time across."""
    figure, axis = plt.subplots(figsize=(11, 2.7), dpi=130)
    for stage, start, seconds, step, patch in tasks:
        colour = "#9d9d9d" if patch is None else COLOURS[patch]
        shade = 1.0 if step % 2 else 0.72
        axis.barh(stage, seconds, left=start, height=0.82, color=colour, alpha=shade, edgecolor="white", linewidth=1)
        label = f"step {step + 1} · warm-up" if patch is None else f"{step + 1}·{patch + 1}"
        axis.text(start + seconds / 2, stage, label, ha="center", va="center", color="white", fontsize=7.5)
    axis.set_yticks(range(STAGES), [f"device {stage + 1}\nblocks {stage + 1}/{STAGES}" for stage in range(STAGES)])
    axis.invert_yaxis()
    axis.set_xlabel("time →      (step·patch; no bubble between steps once the pipe is full)")
    axis.set_xticks([])
    axis.margins(x=0.005)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT)


if __name__ == "__main__":
    draw(schedule())
