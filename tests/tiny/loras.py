"""Tiny LoRAs with random weights, for the tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

FILE = "pytorch_lora_weights.safetensors"


def save(
    pipe: Any,
    folder: Path,
    *,
    rank: int = 2,
    seed: int = 1,
    takes: Callable[[str], bool] = lambda _: True,
    text: bool = False,
    alpha: float | None = None,
) -> Path:
    """Saves a LoRA beside all Linears of a pipeline's transformer, or some of them.

    Args:
        pipe: The pipeline.
        folder: Where to.
        rank: Channels between the two matrices.
        seed: Of their values.
        takes: Whether a Linear is to have one, by its name.
        text: Whether the first text encoder's attention has one too.
        alpha: The strength beside the rank; ``None`` leaves it out, and the strength is 1.
    """
    parts = {"transformer": takes}
    if text:
        parts["text_encoder"] = lambda name: name.endswith(("q_proj", "v_proj", "out_proj"))
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for part, chosen in parts.items():
        for name, linear in getattr(pipe, part).named_modules():
            if not isinstance(linear, nn.Linear) or not chosen(name):
                continue
            for leaf, shape in (("lora_A", (rank, linear.in_features)), ("lora_B", (linear.out_features, rank))):
                values = torch.randn(shape, generator=draw) * 0.5 / shape[1] ** 0.5
                tensors[f"{part}.{name}.{leaf}.weight"] = values
            if alpha is not None:
                tensors[f"{part}.{name}.alpha"] = torch.tensor(float(alpha))
    assert tensors, "no Linear was chosen"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE)
    return folder
