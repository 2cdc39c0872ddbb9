"""Which of a model's parameters and buffers a stage needs, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from patchpipe.models.plan import ModelPlan


def owned_names(model: nn.Module, plan: ModelPlan, owned: range) -> list[str]:
    """Names of the parameters and kept buffers a stage needs: its blocks, and all that surrounds blocks."""
    return list(filter(needs(model, plan, owned), model.state_dict()))


def needs(model: nn.Module, plan: ModelPlan, owned: range) -> Callable[[str], bool]:
    """Whether a stage needs the parameter or buffer of a name."""
    skipped = [place.name for index, place in enumerate(plan.blocks_of(model)) if index not in owned]

    def within(name: str, parts: Sequence[str]) -> bool:
        return any(name == part or name.startswith(part + ".") for part in parts)

    return lambda name: not within(name, skipped) or within(name, plan.shared_parts)


def dtypes_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every tensor; some classes ask to keep a few in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return {
        name: torch.float32 if any(part in name.split(".") for part in kept) else dtype for name in model.state_dict()
    }


def within_blocks(model: nn.Module, plan: ModelPlan) -> Callable[[str], bool]:
    """Whether a parameter or buffer of a name is part of a block."""
    around = needs(model, plan, range(0))
    return lambda name: not around(name)


def move_around(model: nn.Module, plan: ModelPlan, device: torch.device) -> None:
    """Moves to a device what surrounds the blocks, and all buffers; the blocks' weights stay where they are."""
    within = within_blocks(model, plan)
    for name, parameter in model.named_parameters():
        if not within(name) and not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
