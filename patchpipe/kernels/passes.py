"""Which passes a forecast makes on a device: fused ones where they run and give what torch's operations give."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch

from patchpipe.kernels.trends import PLAIN, Passes, Rows

ALIKE = 0.03  # of the largest value: two ways in 16 bits and eight may differ by this much
PARTS = (slice(0, 17), slice(17, 40))  # of the rows that are tried: those of the first patch, and the others

logger = logging.getLogger("patchpipe")


@cache
def passes_for(device: torch.device, dtype: torch.dtype) -> Passes:
    """The passes of a device: fused if Triton is there and gives, on a few rows, what torch gives."""
    if device.type != "cuda" or find_spec("triton") is None or dtype is torch.float64:
        return PLAIN
    try:
        from patchpipe.kernels.trends_fused import FUSED

        error = difference(FUSED, device, dtype)
    except Exception as problem:  # of a compiler that is missing, say
        logger.warning("forecasts run in torch's operations, which are slower: Triton fails (%s)", problem)
        return PLAIN
    if not error <= ALIKE:
        logger.warning("forecasts run in torch's operations, which are slower: Triton's are off by %.2g", error)
        return PLAIN
    return FUSED


def difference(passes: Passes, device: torch.device, dtype: torch.dtype, channels: int = 64) -> float:
    """How far passes are from those in torch's operations, as a share of the largest value, after some calls.

    Args:
        passes: What is tried.
        device: Where.
        dtype: Of keys and values.
        channels: Of a head.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 2, 3, 40, channels, generator=generator).to(device, dtype)
    found = []
    for each in (PLAIN, passes):
        kept, change = drawn[0].clone(), torch.zeros_like(drawn[0], dtype=torch.int8)
        scale, ahead = kept.new_zeros(2, 3, 40, 1), kept.new_zeros(2, 3, 1, 1)
        again = torch.zeros((), dtype=torch.float64, device=device)
        sums = []
        for fresh in drawn[1:]:
            rows = [Rows(kept[:, :, part], change[:, :, part], scale[:, :, part]) for part in PARTS]
            sums.append(each.renew(rows[0], fresh[:, :, PARTS[0]], ahead * 0, again, True))
            ahead = torch.full_like(ahead, 0.75)
            each.show(rows[1], ahead)
            each.renew(rows[1], fresh[:, :, PARTS[1]], ahead, again + 1, False)
        told = [getattr(one, name).flatten() / drawn[0].numel() for one in sums for name in ("size", "met", "came")]
        found.append(torch.cat([kept.flatten().double(), (change * scale).flatten().double(), *told]))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())
