"""What offloaded weights do to a layout: bytes of the device, and seconds in which blocks wait for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from patchpipe.config import ParallelConfig
from patchpipe.layout.axes import Mesh
from patchpipe.offload.choice import Chosen, Inventory, Link, choose
from patchpipe.offload.gathering import ranks_together
from patchpipe.offload.model import CONTENTION, Passing, waiting
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.devices import GB
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.work.workload import Block

OWN_LINKS = ("nvlink", "xgmi")  # exchanges over these do not meet the copies from the host


def upload_link(profile: Profile, config: ParallelConfig) -> Link:
    """What weights come over on a machine, in a layout with offload.

    Ranks that copy together have a chunk when each has copied its part, and then given it to the others.
    """
    assert config.offload is not None
    contention = 0.0 if profile.link.name.startswith(OWN_LINKS) else CONTENTION
    upload = min(profile.device.upload, (config.offload.throttle or math.inf) * GB)
    if config.offload.gathered:
        ranks = len(ranks_together(Mesh(config.mesh_shape, 0), config.ulysses_inner))
        upload = 1 / (1 / (ranks * upload) + (ranks - 1) / ranks / profile.link.bandwidth)
    return Link(upload, contention)


def choice_for(layout: Layout, stage: int, seconds: Sequence[float], exchanges: Sequence[float]) -> Chosen:
    """What stays of a stage's weights, and how the rest comes.

    Args:
        layout: The layout, with offload.
        stage: The stage.
        seconds: Of each of its blocks in one pass, exchanges included.
        exchanges: Of these, seconds of exchanges with other ranks.

    Raises:
        ValueError: The least that would do is more than the memory.
    """
    asked = layout.config.offload
    assert asked is not None
    weights = tuple(tuple(_weights(block, layout)) for block in layout.held(stage))
    inventory = Inventory(weights, tuple(seconds), tuple(exchanges), layout.workload.transformers)
    return choose(asked, inventory, upload_link(layout.profile, layout.config))


def stalled(chosen: Chosen, seconds: Sequence[float], exchanges: Sequence[float]) -> float:
    """Seconds that a pass through a stage takes longer than with all its weights on the device.

    Args:
        chosen: How they come.
        seconds: Of each block that runs.
        exchanges: Of these, seconds of exchanges.
    """
    passing = Passing(chosen.streamed[: len(seconds)], list(seconds), list(exchanges))
    return waiting(passing, chosen.transfers).exposed


def _weights(block: Block, layout: Layout) -> list[int]:
    """Bytes of a block's weights: its matrices, and the rest in pieces no larger than these."""
    tensor, itemsize = layout.config.tensor, layout.workload.itemsize
    sizes = [one.inputs * one.outputs // (tensor if one.split else 1) for one in block.matrices]
    rest = block.parameters - sum(one.inputs * one.outputs for one in block.matrices)
    largest = max(sizes, default=rest)
    pieces = [largest] * (rest // largest) + [rest % largest] if rest > 0 else []
    return [size * itemsize for size in (*sizes, *pieces) if size]
