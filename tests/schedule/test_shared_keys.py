"""Blocks that two stages run in turns: the same picture, the same keys and values on both sides, nothing left over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.layout.volume import kept, traffic
from patchpipe.planner.work.describe import describe_model
from tests import tiny
from tests.layout.test_combinations import VOLUMES
from tests.support import parity
from tests.support.ranks import Place, run_ranks
from tests.support.threads import run_threads

STEPS, IMAGES = 4, 2  # of a tiny pipeline, as tests call it
STREAMING = [{"patches": 3, "warmup": 1}, {"patches": 4, "warmup": 2}]
TWO: list[dict[str, Any]] = [
    {"pipefusion": 2, "stage_blocks": (1.5, 2.5)},  # within FLUX's last dual-stream block
    {"pipefusion": 2, "stage_blocks": (2.4, 1.6)},
]
FOUR: list[dict[str, Any]] = [
    {"pipefusion": 2, "stage_blocks": (1.5, 2.5), method: 2} for method in ("ulysses", "ring", "tensor", "cfg", "data")
]


@pytest.mark.some(of=3)
@pytest.mark.parametrize("name", ["flux", "sd3", "sd35", "pixart", "qwen", "qwen-padded"])
def test_law_2_shared_blocks_never_show(name: str) -> None:
    call = {"num_images_per_prompt": IMAGES} if name in VOLUMES else {}
    found = parity.differences(name, TWO, STREAMING, run=run_threads, **call)
    assert max(found.values()) <= parity.TOLERANCE, found


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_law_6_shared_blocks_go_with_every_method(name: str) -> None:
    found = parity.differences(name, FOUR, STREAMING[:1], run=run_threads, num_images_per_prompt=IMAGES)
    assert max(found.values()) <= parity.TOLERANCE, found


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_a_stage_may_share_both_its_ends(name: str) -> None:
    layouts = [{"pipefusion": 3, "stage_blocks": sizes} for sizes in ((1.3, 1.4, 1.3), (1.5, 1, 1.5))]
    found = parity.differences(name, layouts, STREAMING, run=run_threads)
    assert max(found.values()) <= parity.TOLERANCE, found


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_what_is_sent_and_held_is_what_explain_says(name: str) -> None:
    layout, volume = TWO[0], VOLUMES[name]
    shared = dataclasses.replace(volume, shared=volume.attended // 4)
    config, entries = ParallelConfig(**layout), 2 * IMAGES
    made = parity.compare(name, [layout], [{"patches": 2, "warmup": 1}], height=128, num_images_per_prompt=IMAGES)
    (found,) = made.values()
    alone, both = (traffic(config.mesh_shape, one)["pipefusion"] for one in (volume, shared))
    assert found.sent["pipefusion"] == entries * (alone + (STEPS - 1) * both)  # none goes over in the synchronous step
    assert found.kept == config.world_size * entries * kept(config.mesh_shape, shared, forecasts=False)


def left_under_way(place: Place, name: str) -> list[int]:
    """What is on its way to or from this rank after each of three requests."""
    config = ParallelConfig(pipefusion=2, stage_blocks=(1.5, 2.5), patches=4)
    pipe = tiny.pipeline(name)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    left = []
    for steps in (3, 6, 9):
        call = {**tiny.call_arguments(name), "num_inference_steps": steps}
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
        channels = [one for wire in pipe.patchpipe.group._all_wires for one in wire.channels]
        left.append(sum(len(channel._sends) + len(channel._receives) for channel in channels))
    return left


def test_nothing_is_left_under_way() -> None:
    assert run_ranks(2, left_under_way, "flux") == [[0, 0, 0]] * 2


def test_a_boundary_where_a_cut_leaves_one_side_nothing_is_none() -> None:
    """A tenth of four patches is no patch: the later stage runs the block alone, and nothing goes over."""
    layout = {"pipefusion": 2, "stage_blocks": (1.1, 2.9)}
    (found,) = parity.compare("flux", [layout], [{"patches": 4, "warmup": 1}]).values()
    assert found.error <= parity.TOLERANCE
    whole = {"pipefusion": 2, "stage_blocks": (1, 3)}
    (plain,) = parity.compare("flux", [whole], [{"patches": 4, "warmup": 1}]).values()
    assert found.sent == plain.sent


def test_info_tells_who_runs_a_shared_block_when(tmp_path: Path) -> None:
    info = describe_model(tiny.save("qwen", tmp_path), ParallelConfig(pipefusion=3))
    name = "transformer_blocks"
    assert [stage.blocks for stage in info.stages] == [
        f"{name} 0…1; {name} 1 for 33% of the patches",
        f"{name} 1…2; {name} 1 for 67% of the patches; {name} 2 for 67% of the patches",
        f"{name} 2…3; {name} 2 for 33% of the patches",
    ]
