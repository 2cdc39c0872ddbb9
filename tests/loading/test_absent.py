"""Stand-ins for parts that another rank holds."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from patchpipe.loading.absent import without_weights

CPU = torch.device("cpu")


def stand_in() -> AutoencoderKL:
    part = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    assert isinstance(without_weights(part, torch.bfloat16, CPU, None), AutoencoderKL)
    return part


def held(part: AutoencoderKL) -> int:
    """Bytes in memory."""
    return sum(0 if one.is_meta else one.untyped_storage().nbytes() for one in part.parameters())


def test_it_says_where_it_is_and_holds_one_number() -> None:
    part = stand_in()
    assert (part.device, part.dtype, held(part)) == (CPU, torch.bfloat16, 2)
    assert type(part) is AutoencoderKL, "from_pipe compares classes"


def test_it_moves_and_changes_dtype_without_memory() -> None:
    part = stand_in()
    part.to(CPU, torch.float32)
    assert (part.device, part.dtype, held(part)) == (CPU, torch.float32, 4)
    assert {one.dtype for one in part.parameters()} == {torch.float32}
    part.to("meta")
    assert part.device.type == "meta"
