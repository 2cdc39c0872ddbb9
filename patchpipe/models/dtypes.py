"""The dtype a model computes in, which is not always the one its weights are kept in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

MATRIX_WEIGHT = 2**20  # vectors count where there is no matrix
CASTING = "layerwise_casting"  # diffusers' name for its hook


def matrix_dtype(model: nn.Module) -> torch.dtype:
    """The dtype most matrices are multiplied in; single vectors may be kept in float32.

    Weights that diffusers casts when their layer runs (``enable_layerwise_casting``) count as what they are cast to.
    Matrices packed into bytes do not count: what was left whole tells what they are unpacked to.
    """
    counts: Counter[torch.dtype] = Counter()
    for module in model.modules():
        registry: Any = module.__dict__.get("_diffusers_hook")
        casting = None if registry is None else registry.hooks.get(CASTING)
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                weight = MATRIX_WEIGHT if parameter.ndim >= 2 else 1
                counts[parameter.dtype if casting is None else casting.compute_dtype] += weight
    return counts.most_common(1)[0][0]
