"""Part c: plain diffusers beside one rank with 1, 2, 4 and 8 patches, at FLUX.1's own sizes, and blocks by tokens.

Weights are random and made on the card; seconds do not depend on their values.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.gpu.setting import Note, Setting
from bench.one_device import build, row, step_seconds, wait
from bench.shapes import SHAPES
from patchpipe.planner import Device, Workload, block_seconds
from patchpipe.planner.machine.cards import card_found
from patchpipe.planner.machine.measure import measure_device
from patchpipe.planner.work.named import Asked, workload_for
from tests import tiny

REAL, SMALL = "flux-real", "bundled"
PATCHES, ROUNDS, STEPS = (1, 2, 4, 8), 3, 6
GIB = 32.0  # 24 of weights, and what a step needs
TOKENS = (256, 512, 1024, 2048, 4096)
REPEATS = 5


def run(setting: Setting, note: Note) -> None:
    """A row for plain diffusers and every number of patches, then for every kind of block and number of tokens."""
    setting.needs(GIB)
    shape = SMALL if setting.tiny else REAL
    pipe, call = build(shape, setting.device, "fp32" if setting.tiny else "bf16")
    _patches(pipe, call, shape, setting, note)
    if setting.tiny:
        pipe = tiny.pipeline("flux")
    _blocks(pipe.transformer, setting, note)
    _device(setting, note)


def _patches(pipe: Any, call: dict[str, Any], shape: str, setting: Setting, note: Note) -> None:
    counts = (1, 2) if setting.tiny else PATCHES
    found: dict[int, list[float]] = {count: [] for count in (0, *counts)}  # 0: plain diffusers
    for turn in range(2 if setting.tiny else ROUNDS + 1):
        for count, seconds in found.items():
            spent = step_seconds(pipe, call, count, 3 if setting.tiny else STEPS)
            if turn:
                seconds.append(spent)
    for count, seconds in found.items():
        title = f"{shape}: {f'{count} patches' if count else 'plain diffusers'}"
        note(title, None, row(count, seconds, found[0], SHAPES[shape].image))


def _blocks(model: Any, setting: Setting, note: Note) -> None:
    """Seconds of FLUX's two kinds of blocks on so many image rows, beside what the planner says of this card."""
    workload, device = _predicted(setting)
    text = 64 if setting.tiny else 512
    for tokens in TOKENS[:2] if setting.tiny else TOKENS:
        for kind, blocks in (("dual", model.transformer_blocks), ("single", model.single_transformer_blocks)):
            seconds = timed_block(blocks[0], tokens, text)
            figures: dict[str, Any] = {"kind": kind, "tokens": tokens, "text": text, "milliseconds": seconds * 1e3}
            if workload is not None and device is not None:
                block = workload.blocks[0 if kind == "dual" else -1]
                figures["predicted"] = 1e3 * block_seconds(block, tokens, tokens, device, text=text)
            note(f"{kind} block, {tokens} image rows and {text} of text", None, figures)


def _predicted(setting: Setting) -> tuple[Workload | None, Device | None]:
    card = None if setting.tiny else card_found(setting.card)
    if card is None:
        return None, None
    return workload_for("flux.1-dev", Asked(height=1024, width=1024)), card.device


@torch.no_grad()
def timed_block(block: Any, tokens: int, text: int) -> float:
    """Median seconds of a block on rows of its own, as many queries as keys."""
    weight = next(parameter for parameter in block.parameters() if parameter.ndim == 2)
    width = block.norm.linear.in_features if hasattr(block, "norm") else block.norm1.linear.in_features
    rows, words, time = (
        torch.randn(*shape, device=weight.device, dtype=weight.dtype)
        for shape in ((1, tokens, width), (1, text, width), (1, width))
    )
    return _seconds(lambda: block(hidden_states=rows, encoder_hidden_states=words, temb=time), inner=4)


def _seconds(work: Any, inner: int) -> float:
    spent = []
    for turn in range(REPEATS + 2):
        wait()
        began = perf_counter()
        for _ in range(inner):
            work()
        wait()
        if turn >= 2:
            spent.append((perf_counter() - began) / inner)
    return median(spent)


def _device(setting: Setting, note: Note) -> None:
    """What `patchpipe profile` would say of the card."""
    if setting.tiny:
        return
    device = measure_device(torch.device("cuda:0"), 1, None, lambda _: None)
    figures = {name: getattr(device, name) for name in ("flops", "efficiency", "bandwidth", "fill", "launch")}
    note("the card as `patchpipe profile` measures it", None, figures)
