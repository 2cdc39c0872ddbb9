"""What a rank moves weights with, by nominal figures of its device: what stays never depends on a clock."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.errors import UnsupportedModel
from patchpipe.layout.split import StageBlocks
from patchpipe.models.blocks import BlockPlace
from patchpipe.models.plan import ModelPlan
from patchpipe.offload.choice import Inventory, choose
from patchpipe.offload.offload import Means
from patchpipe.offload.ring import aligned
from patchpipe.offload.weights import Stored
from patchpipe.parallel.tensor import split_linears
from patchpipe.planner.choosing import workload_of_pipeline
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.here import profile_of
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.memory import block_memory
from patchpipe.planner.offloading import upload_link
from patchpipe.planner.search import HEADROOM
from patchpipe.stage.balance import block_cost

logger = logging.getLogger("patchpipe")
UNKNOWN = 0.5  # of the free memory for weights, where nothing is known of the requests to come


def means_for(
    pipe: Any, config: ParallelConfig, device: torch.device, stored: Mapping[int, Mapping[str, Stored]]
) -> Means:
    """What weights are moved with.

    Args:
        pipe: The pipeline.
        config: The layout, with offload.
        device: Where this rank computes.
        stored: Where the parameters of its transformers lie on disk, if they do.
    """
    assert config.offload is not None
    profile = _profile(config, device)
    return Means(
        upload_link(profile, config), _memory(pipe, config, device, profile),
        partial(_seconds, config, profile), stored,
    )  # fmt: skip


def check_memory(
    model: nn.Module, plan: ModelPlan, stages: Sequence[StageBlocks], config: ParallelConfig, device: torch.device
) -> None:
    """Refuses a memory that is too small for the blocks' weights to come and go, on all ranks alike.

    Args:
        model: A transformer, with weights or without.
        plan: Its plan.
        stages: The blocks of every stage.
        config: The layout.
        device: Where ranks compute.

    Raises:
        ValueError: A stage needs more; says how much.
    """
    if config.offload is None or config.offload.memory is None:
        return
    profile, places = _profile(config, device), plan.blocks_of(model)
    split = {}
    if config.tensor > 1:
        found = (each for place in places for each in split_linears(model, plan, place))
        split = {id(each.linear.weight): config.tensor for each in found}
    for stage in stages:  # of several transformers, which are alike, the rank's own choice counts all
        own = [places[index] for index in stage.held]
        weights = tuple(
            tuple(
                aligned(one.numel() * one.element_size() // split.get(id(one), 1)) for one in place.block.parameters()
            )
            for place in own
        )
        inventory = Inventory(weights, tuple(_seconds(config, profile, own)))
        choose(config.offload, inventory, upload_link(profile, config))


def _profile(config: ParallelConfig, device: torch.device) -> Profile:
    return profile_of([str(device)] if device.type == "cuda" else ["cpu"] * config.world_size, os.cpu_count() or 1)


def _seconds(config: ParallelConfig, profile: Profile, places: Sequence[BlockPlace]) -> list[float]:
    """How long each block computes in one pass, of a nominal picture."""
    passes = config.patches or config.pipefusion
    rate = profile.device.rate * passes * config.ulysses * config.ring * config.distrifusion * config.tensor
    return [2 * block_cost(place) / rate for place in places]


def _memory(pipe: Any, config: ParallelConfig, device: torch.device, profile: Profile) -> int | None:
    """Bytes of the device for the blocks, where the user names neither these nor a share."""
    asked = config.offload
    if asked is None or asked.memory is not None or asked.resident is not None or device.type != "cuda":
        return None
    try:
        layout = Layout(workload_of_pipeline(pipe, AutoLayout()), config, profile)
        return max(0, block_memory(layout, int(HEADROOM * profile.device.memory)))
    except (UnsupportedModel, ValueError) as problem:
        logger.warning("offload takes %.0f %% of the free memory for weights: %s", 100 * UNKNOWN, problem)
        return int(UNKNOWN * torch.cuda.mem_get_info(device)[0])
