"""Stand-ins for the parts of a pipeline that another rank holds.

A stand-in has the structure and the configuration of the part, but no weights. Pipelines ask such a part for the device
its inputs must be on, and some read the statistics it keeps in buffers, such as the mean of FLUX.2's latents: both are
those of the part itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from patchpipe.loading.checkpoint import Checkpoint


def without_weights(
    part: nn.Module, dtype: torch.dtype, device: torch.device, weights: Callable[[], Checkpoint] | None
) -> nn.Module:
    """Drops the parameters of a part, for good.

    Args:
        part: The part, with random weights.
        dtype: What it says it is in.
        device: Where it says it is.
        weights: Opens the part's weights, of which buffers alone are read; ``None`` leaves those without values too.

    Raises:
        FileNotFoundError: There are no such weights.
        ValueError: They lack a buffer.
    """
    part.to("meta", dtype)
    kept = part.state_dict()
    buffers = [name for name, _ in part.named_buffers() if name in kept]
    if buffers and weights is not None:
        weights().fill(part, buffers, {name: kept[name].dtype for name in buffers}, device, {})
    kind: Any = type(part)
    part.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _: device), "__module__": kind.__module__})
    return part
