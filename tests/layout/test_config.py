"""What a configuration refuses, and says when it does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from patchpipe import ParallelConfig


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pipefusion": 0}, "pipefusion=0 must be a whole number of 1 or more"),
        ({"pipefusion": True}, "pipefusion=True must be a whole number"),
        ({"pipefusion": 2.0}, "pipefusion=2.0 must be a whole number"),
        ({"patches": 0}, "patches=0 must be a whole number of 1 or more"),
        ({"warmup": -1}, 'warmup=-1 must be a whole number of 0 or more, or "all"'),
        ({"warmup": "every"}, "warmup='every' must be a whole number"),
        ({"patch_rows": ()}, "must list at least one row for each patch"),
        ({"patch_rows": (2, 0)}, "must list at least one row for each patch"),
        ({"patch_rows": (2, 2), "patches": 3}, "names 2 patches but patches=3: leave one of them out"),
        ({"stage_blocks": (2, 2)}, "must list at least one block for each of the 1 stages"),
        ({"stage_blocks": (4, 0), "pipefusion": 2}, "must list at least one block for each of the 2 stages"),
        ({"output_rank": 1}, "output_rank=1 is not one of the 1 ranks"),
        ({"pipefusion": 2, "text_rank": -1}, "text_rank=-1 is not one of the 2 ranks"),
        ({"pipefusion": 2, "text_rank": "all"}, 'text_rank=all is not one of the 2 ranks 0…1; or say "spread"'),
        ({"split_batch": 1}, "split_batch=1 must be True, False or None"),
        (
            {"split_batch": True, "distrifusion": 2},
            "split_batch=True is for patches that stream; distrifusion has none",
        ),
        ({"share_blocks": 1}, "share_blocks=1 must be True, False or None"),
        (
            {"share_blocks": True, "distrifusion": 2},
            "share_blocks=True is for patches that stream; distrifusion has none",
        ),
        (
            {"share_blocks": True, "split_batch": True, "pipefusion": 2},
            "share_blocks=True shares blocks by patches, split_batch=True by halves: leave one of them out",
        ),
        (
            {"stage_blocks": (1.5, 2.5), "split_batch": True, "pipefusion": 2},
            "stage_blocks=(1.5, 2.5) shares blocks by patches, split_batch=True by halves: leave one of them out",
        ),
        (
            {"stage_blocks": (1.5, 2.5), "warmup": 0, "pipefusion": 2},
            "stage_blocks=(1.5, 2.5) needs a synchronous step to begin with: use warmup=1 or more",
        ),
        (
            {"stage_blocks": (2, 2), "share_blocks": True, "pipefusion": 2},
            "share_blocks=True and stage_blocks=(2, 2) exclude each other",
        ),
        ({"backend": "mpi"}, "backend='mpi' is unknown: use 'auto', 'nccl' or 'gloo'"),
        ({"timeout": 0}, "timeout=0 must be a positive number of seconds"),
        ({"timeout": float("nan")}, "timeout=nan must be a positive number of seconds"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        ParallelConfig(**options)
    assert text in str(caught.value)


def test_it_survives_json_and_cannot_be_changed() -> None:
    config = ParallelConfig(pipefusion=2, stage_blocks=[1.25, 2.75], share_blocks=None)
    assert ParallelConfig(**json.loads(json.dumps(config.as_dict()))) == config
    config = ParallelConfig(pipefusion=2, patch_rows=[3, 1], stage_blocks=[1, 3], warmup="all")
    assert ParallelConfig(**json.loads(json.dumps(config.as_dict()))) == config
    assert config.patch_rows == (3, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.warmup = 3


def test_parts_are_placed_on_different_ranks_unless_told() -> None:
    assert (ParallelConfig(pipefusion=3).encoder_rank(), ParallelConfig(pipefusion=3).output_rank) == (2, 0)
    assert ParallelConfig(pipefusion=3, text_rank=0).encoder_rank() == 0
    assert ParallelConfig(pipefusion=3).world_size == 3
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    for world_size, homes in ((1, [0, 0, 0]), (2, [1, 0, 1]), (3, [2, 1, 0]), (4, [3, 2, 1])):
        config = ParallelConfig(pipefusion=world_size, text_rank="spread")
        assert [config.encoder_rank(encoder) for encoder in encoders] == homes


def test_it_describes_itself() -> None:
    text = ParallelConfig(pipefusion=2, patches=4).describe()
    assert text == "pipefusion 2 · patches 4 · warm-up 1 or 2 with guidance"
    text = ParallelConfig(patch_rows=(1, 2), warmup="all").describe()
    assert text == "patches 2 (1, 2) · every step synchronous"
    assert ParallelConfig(cfg=2, ring=2).describe() == "cfg 2 · ring 2 · warm-up 1"
    assert ParallelConfig().describe() == "one device · warm-up 1"
    text = str(ParallelConfig(cfg=2, pipefusion=2, text_rank="spread"))
    assert "3     1    1     stage 2/2, guidance branch 2, text encoder 1, if any\n" in text
    assert "0     0    0     stage 1/2, guidance branch 1, text encoder 4, if any, VAE, gets the images" in text
    assert "sends per step for FLUX.1 at 1024×1024 in bf16: pipefusion 28 MB" in text
    text = str(
        ParallelConfig(pipefusion=8)
    )  # the stream, and keys and values of all rows for each of seven shared blocks
    assert f"pipefusion {3 * 28.3:.0f} MB" in text
    assert "pipefusion 28 MB" in str(ParallelConfig(pipefusion=8, share_blocks=False))
    text = str(ParallelConfig(pipefusion=2, tensor=2))  # 19 blocks with two sums over all tokens, 38 with one
    assert f"tensor {(2 * 19 + 38) * 4608 // 2 * 3072 * 2 / 1e6:,.0f} MB" in text
    assert "its noise predictions alone" in str(ParallelConfig(data=2))
