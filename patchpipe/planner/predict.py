"""What a layout would do: seconds, traffic, memory and quality, without running anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.layout.split import shared_blocks
from patchpipe.layout.volume import Volume, traffic
from patchpipe.offload.choice import Chosen
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.machine.system import PATCHPIPE, System
from patchpipe.planner.memory import RankMemory, rank_memory
from patchpipe.planner.schedule import Schedule, Timing
from patchpipe.planner.work.workload import Workload


@dataclass(frozen=True)
class Prediction:
    """What a layout would do.

    Attributes:
        config: The layout.
        patches: Patches M.
        timing: Its seconds.
        traffic: Bytes a rank sends in a steady step, by method, all branches and pictures it runs.
        memory: What each rank holds.
        fresh: Mean share of the keys that are of this step.
        uploads: Bytes that a rank of each stage gets from its host in a steady step; empty without offload.
        hosted: Bytes that a rank of each stage has in its host's memory, once for all ranks of a host that hold the
            same; empty without offload, or where they stay on disk.
    """

    config: ParallelConfig
    patches: int
    timing: Timing
    traffic: dict[str, float]
    memory: tuple[RankMemory, ...]
    fresh: float
    uploads: tuple[int, ...] = ()
    hosted: tuple[int, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of all steps; text encoders and VAE are left out."""
        return self.timing.seconds

    @property
    def period(self) -> float:
        """Seconds from one steady step to the next."""
        return self.timing.period

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """Seconds that each stage computes in a steady step."""
        return self.timing.stages

    @property
    def host_bound(self) -> bool:
        """Whether devices wait for their hosts: kernels take most of a step to start, and longer than to run."""
        starting = max(self.timing.host, default=0.0)
        return starting > max(self.period / 2, *self.timing.stages)

    @property
    def busy(self) -> float:
        """Share of the request in which a rank computes, mean over the stages."""
        worked = self.timing.worked
        return sum(worked) / len(worked) / self.timing.seconds

    @property
    def bytes(self) -> int:
        """Memory of the rank that holds most."""
        return max(rank.total for rank in self.memory)

    @property
    def exact(self) -> bool:
        """Whether no key or value is ever stale."""
        return self.fresh == 1.0

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "config": self.config.as_dict(),
            "layout": self.config.describe(),
            "seconds": self.seconds,
            "period_seconds": self.period,
            "synchronous_seconds": self.timing.synchronous,
            "stage_seconds": list(self.stage_seconds),
            "patches": self.patches,
            "busy": self.busy,
            "host_bound": self.host_bound,
            "fresh": self.fresh,
            "traffic_bytes": self.traffic,
            "upload_bytes": list(self.uploads),
            "host_bytes": list(self.hosted),
            "memory_bytes": [rank.total for rank in self.memory],
        }


def predict(workload: Workload, config: ParallelConfig, profile: Profile, system: System = PATCHPIPE) -> Prediction:
    """Predicts a request under a layout.

    Args:
        workload: The request.
        config: The layout; ``stage_blocks`` and ``patches`` are worked out where they are ``None``.
        profile: The machine.
        system: The program that runs it.

    Raises:
        ValueError: The layout does not fit the model or the picture.
    """
    if config.pipefusion > len(workload.blocks):
        raise ValueError(
            f"pipefusion={config.pipefusion} is more stages than the {len(workload.blocks)} blocks of {workload.model}"
        )
    layout = Layout(workload, config, profile, system)
    schedule = Schedule(layout)
    timing, memory, patches = schedule.timing, rank_memory(layout, schedule.offloads), len(layout.patches)
    uploads = tuple(_uploaded(layout, stage, chosen) for stage, chosen in enumerate(schedule.offloads))
    in_memory = config.offload is not None and config.offload.tier == "host"
    hosted = tuple(workload.transformers * sum(chosen.streamed) for chosen in schedule.offloads) if in_memory else ()
    return Prediction(config, patches, timing, _traffic(layout), memory, fresh_share(config, patches), uploads, hosted)


def fresh_share(config: ParallelConfig, patches: int) -> float:
    """Mean share of the keys of a steady step that were made in this step."""
    if config.synchronous:
        return 1.0
    if config.distrifusion > 1:
        return 1 / config.distrifusion
    return (patches + 1) / (2 * patches)


def calibrated(workload: Workload, profile: Profile, seconds: float) -> Profile:
    """A profile on which one device takes as long for a workload as it was measured to.

    Args:
        workload: What was measured.
        profile: The machine.
        seconds: What one device took for all steps.

    Raises:
        ValueError: The time is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"a single device's {seconds} seconds must be above 0")
    device = profile.device
    unhurried = dataclasses.replace(profile, slowdown=1.0, device=dataclasses.replace(device, host=0.0))
    slowdown = seconds / predict(workload, ParallelConfig(), unhurried).seconds
    starting = workload.steps * sum(predict(workload, ParallelConfig(), profile).timing.host)
    if starting > seconds:  # the host was as fast as that, whatever the profile says
        device = dataclasses.replace(device, host=device.host * seconds / starting)
    return dataclasses.replace(profile, slowdown=slowdown, device=device)


def _uploaded(layout: Layout, stage: int, chosen: Chosen) -> int:
    """A stage's blocks run once for every patch, half and call of a step; their weights come as often, or less."""
    patches = 1 if layout.config.synchronous else len(layout.patches) * layout.halves
    return patches * layout.calls // layout.together * sum(chosen.streamed)


def _traffic(layout: Layout) -> dict[str, float]:
    entries = layout.batch * layout.calls
    sent = traffic(layout.config.mesh_shape, _volume(layout), layout.config.ulysses_inner)
    return {method: size * entries for method, size in sent.items()}


def _volume(layout: Layout) -> Volume:
    workload = layout.workload
    image, text = workload.image, workload.joint_text
    both = image + text
    rows = {"image": image, "text": text, "both": both}
    attended = [
        sum(both if layer.kind == "joint" else image for layer in block.attentions if layer.kind != "cross")
        for block in workload.blocks
    ]
    shared = sum(attended[index] for index in shared_blocks(layout.stages))
    summed = [rows[matrix.stream] for block in workload.blocks for matrix in block.matrices if matrix.summed]
    return Volume(both, workload.width, sum(attended), sum(summed), workload.itemsize, shared)
