"""Stand-ins for the parts of a pipeline that another rank holds.

A stand-in has the structure and the configuration of the part, but no weights. Pipelines ask such a part for the device
its inputs must be on, and some read the statistics it keeps in buffers, such as the mean of FLUX.2's latents: both are
those of the part itself. Its class is the part's own, for ``from_pipe`` compares classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    tell_device(part, device)
    return part


def tell_device(part: nn.Module, device: torch.device) -> None:
    """Has a part whose parameters are on ``meta`` say that it is on a device, without memory there."""
    name, first = next(part.named_parameters())  # the one that is asked for its device
    owner, _, leaf = name.rpartition(".")
    one = torch.zeros((), dtype=first.dtype, device=device).expand(first.shape)
    # Not by setattr: while another thread makes parts without weights, that puts parameters on meta too.
    part.get_submodule(owner)._parameters[leaf] = nn.Parameter(one, requires_grad=False)
    part.__dict__["_apply"] = partial(_apply, part)


def _apply(part: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``to`` and its like on a stand-in: no parameter gets memory by it."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor.to(dtype=change(torch.empty(0, dtype=tensor.dtype)).dtype)
        if tensor.numel() > 1 and not any(tensor.stride()):  # one element, as often as the shape says
            return change(tensor[(0,) * tensor.dim()]).expand(tensor.shape)
        return change(tensor)

    kind: Any = type(part)
    applied: nn.Module = kind._apply(part, changed, recurse)
    return applied
