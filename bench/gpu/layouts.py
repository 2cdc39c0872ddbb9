"""Part b: every kind of layout over NCCL, with two and four ranks, and what happens when a rank dies.

Each must paint, to the bit, what it paints when it talks over the host, and about what one device paints.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

import patchpipe
from bench.gpu.painting import HEIGHT, Case, alone, apart, paint, painted_by, pipeline, request, rules
from bench.gpu.ranks import Answer, Ranks, Spot, problems
from bench.gpu.setting import Note, Setting, Skip, version
from patchpipe.errors import PatchpipeError

PATCHES: dict[str, Any] = {"patches": 4, "warmup": 1}
TWO: list[dict[str, Any]] = [
    {"pipefusion": 2, **PATCHES}, {"pipefusion": 2, **PATCHES, "share_blocks": True}, {"ulysses": 2}, {"ring": 2},
    {"tensor": 2}, {"distrifusion": 2}, {"cfg": 2},
]  # fmt: skip
FOUR: list[dict[str, Any]] = [
    {"pipefusion": 4, **PATCHES}, {"pipefusion": 2, "ulysses": 2, "patches": 2}, {"ulysses": 2, "ring": 2},
    {"pipefusion": 2, "ring": 2, "patches": 2}, {"pipefusion": 2, "tensor": 2, "patches": 2},
    {"cfg": 2, "pipefusion": 2, **PATCHES}, {"cfg": 2, "distrifusion": 2},
]  # fmt: skip
FEW: dict[int, list[dict[str, Any]]] = {2: [TWO[1]], 4: []}  # for a CPU
CLOSE = 1e-2  # of the largest value, in float32: sums are reordered, and 4 steps carry that on
PATIENCE = 45.0  # with the start of the ranks
SECONDS_TO_TELL = 15.0  # a rank's death is known to the others by then


def run(setting: Setting, note: Note) -> None:
    """A row for every layout, and two for ranks that die or fail."""
    if setting.nccl:
        note(f"NCCL {version(setting.nccl)}", None, {})
    ran = False
    for count, layouts in ((2, TWO), (4, FOUR)):
        why = setting.why_no_nccl(count)
        if why is not None:
            note(f"{count} ranks: skipped, {why}", None, {})
            continue
        ran = True
        with Ranks(setting.places(count, own=True)) as ranks:
            for layout in FEW[count] if setting.tiny else layouts:
                note(*_row(ranks, layout))
            if count == 2:
                _afflictions(ranks, note)
    if not ran:
        raise Skip(setting.why_no_nccl(2) or "no ranks")


def case_for(layout: dict[str, Any]) -> Case:
    """The model that suits a layout: a block must be left over where one is to be shared."""
    return Case("flux", "fp32", layout, blocks=5 if layout.get("share_blocks") else 4)


def _row(ranks: Ranks, layout: dict[str, Any]) -> tuple[str, bool, dict[str, Any]]:
    case = case_for(layout)
    title = case.config("cpu").describe()
    over_host = ranks.run(paint, case, patience=PATIENCE)
    began = time.monotonic()
    over_nccl = ranks.run(paint, replace(case, nccl=True), patience=PATIENCE)
    seconds = time.monotonic() - began
    why = problems(over_nccl) or problems(over_host)
    if why:
        return title, False, {"why": why, "over": "NCCL" if problems(over_nccl) else "the host"}
    made, staged = painted_by(over_nccl), painted_by(over_host)
    figures = {
        "bit_equal": bool(np.array_equal(made, staged)),
        "apart": apart(made, staged),
        "seconds": round(seconds, 2),
    }
    right = one_device(case)
    if right is not None:
        figures["from_one_device"] = apart(made, alone(right, ranks.places[0]))
    fine = figures["bit_equal"] and figures.get("from_one_device", 0.0) < CLOSE
    return title, bool(fine), figures


def one_device(case: Case) -> Case | None:
    """What one process paints to compare with; ``None`` where keys are stale in a way that one process has not."""
    assert case.layout is not None
    if case.layout.get("distrifusion", 1) > 1:
        return None
    kept = {key: value for key, value in case.layout.items() if key in ("patches", "warmup")}
    return replace(case, layout=kept or None)


# -- ranks that die ----------------------------------------------------------------------------------


def _afflictions(ranks: Ranks, note: Note) -> None:
    case = Case("flux", "fp32", {"pipefusion": 2, **PATCHES}, nccl=True)
    for affliction in ("raises", "is killed"):
        answers = ranks.run(afflicted, case, affliction)
        note(*_told(affliction, answers, _gone(ranks)))


def afflicted(spot: Spot, case: Case, affliction: str) -> dict[str, Any]:
    """Rank 1 falls ill in its third step: what this rank reads, and after how long."""
    pipe, call = pipeline(case.model, case.dtype, spot.device, case.blocks)
    pipeline.cache_clear()
    with rules(spot, case):
        config = case.config(spot.device)
        patchpipe.parallelize(pipe, config, group=spot.join(config))
        if spot.rank == 1:
            _afflict(pipe.patchpipe.runner, affliction)
        began = time.monotonic()
        try:
            request(pipe, call, num_inference_steps=6, height=HEIGHT)
        except Exception as error:
            kind = "PatchpipeError" if isinstance(error, PatchpipeError) else type(error).__name__
            return {"kind": kind, "text": str(error), "seconds": round(time.monotonic() - began, 1)}
        return {"kind": "nothing", "text": "the request went through", "seconds": 0.0}


def _afflict(runner: Any, affliction: str) -> None:
    work, calls = runner.stages[0].run, 0

    def ill(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 5:
            if affliction == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the block is on fire")
        return work(*args)

    runner.stages[0].run = ill


def _told(affliction: str, answers: list[Answer], left: list[int]) -> tuple[str, bool, dict[str, Any]]:
    title = f"rank 1 {affliction}: rank 0 says so"
    if answers[0].problem:
        return title, False, {"why": f"rank 0: {answers[0].problem.splitlines()[-1][:300]}"}
    told = answers[0].value
    fine = told["kind"] == "PatchpipeError" and "rank 1" in told["text"] and told["seconds"] < SECONDS_TO_TELL
    return title, fine and not left, {"text": told["text"][:300], "seconds": told["seconds"], "left_over": left}


def _gone(ranks: Ranks) -> list[int]:
    """Processes that are still there after their end."""
    pids = ranks.pids
    ranks.end()
    left = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            left.append(pid)
    return left
