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
