"""Part a: the laws' core on two ranks that share the card and talk over the host.

Every step synchronous is bit-equal to plain diffusers; patches that stream paint on two stages what they paint on one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bench.gpu.painting import LARGE, Case, alone, apart, paint, painted_by
from bench.gpu.ranks import Ranks, problems
from bench.gpu.setting import Note, Setting

STAGES = 2
SYNCHRONOUS: dict[str, Any] = {"warmup": "all"}
PATCHED: dict[str, Any] = {"patches": 4, "warmup": 1}
SHARED: dict[str, Any] = {**PATCHED, "share_blocks": True}
TINY = ("flux", "sd3", "pixart", "qwen-padded")
LARGER = f"{LARGE}flux-wide"  # 4096 tokens and heads of 128 channels, as FLUX.1 has them


def cases(setting: Setting) -> list[Case]:
    """All of them on a GPU, two on a CPU."""
    if setting.tiny:
        return [Case("flux", "fp32", SHARED, 5), Case("sd3", "bf16", SYNCHRONOUS)]
    found = [
        Case(name, dtype, layout) for dtype in ("bf16", "fp32") for name in TINY for layout in (SYNCHRONOUS, PATCHED)
    ]
    found += [Case("flux", dtype, SHARED, 5) for dtype in ("bf16", "fp32")]
    return found + [Case(LARGER, "bf16", layout) for layout in (SYNCHRONOUS, PATCHED)]


def run(setting: Setting, note: Note) -> None:
    """A row for every model, dtype and law."""
    places = setting.places(STAGES, own=False)
    with Ranks(places) as ranks:
        for case in cases(setting):
            right = alone(_on_one(case), places[0])
            answers = ranks.run(paint, replace(case, layout={**(case.layout or {}), "pipefusion": STAGES}))
            note(*_row(case, right, alone(_on_one(case), places[0]), answers))


def _on_one(case: Case) -> Case:
    """What the case must equal: plain diffusers, or the same patches on one stage."""
    assert case.layout is not None
    if case.layout["warmup"] == "all":
        return replace(case, layout=None)
    return replace(case, layout={key: value for key, value in case.layout.items() if key != "share_blocks"})


def _row(
    case: Case, right: np.ndarray, again: np.ndarray, answers: list[Any]
) -> tuple[str, bool | None, dict[str, Any]]:
    law = "synchronous = plain" if case.layout == SYNCHRONOUS else "2 stages = 1 stage"
    title = f"{case.model} {case.dtype}: {law}" + (", a shared block" if case.layout == SHARED else "")
    why = problems(answers)
    if why:
        return title, False, {"why": why}
    made = painted_by(answers)
    figures = {
        "bit_equal": bool(np.array_equal(made, right)), "apart": apart(made, right),
        "repeats": bool(np.array_equal(right, again)),  # else it is the device that differs from itself
    }  # fmt: skip
    return title, figures["bit_equal"], figures
