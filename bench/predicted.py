"""What the planner says of the bench's own models on this machine, before they are measured."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch

from bench.contenders import AS_MEASURED, OURS
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from patchpipe.planner import Link, Profile, Workload, calibrated, predict
from patchpipe.planner.machine.measure import measure_device
from patchpipe.planner.search import Wishes, search
from patchpipe.planner.work.named import Asked, workload_for


def workload_of(shape: str, steps: int) -> Workload:
    """A model of the bench as the planner sees it."""
    pipe, call = SHAPES[shape].build()
    asked = Asked(
        height=call["height"], width=call["width"], steps=steps, guidance=SHAPES[shape].batch > 1, dtype="fp32",
        text_tokens=SHAPES[shape].text or call["max_sequence_length"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        return workload_for(folder, asked)


def profile_of(workload: Workload, layer_seconds: float, bandwidth: float, latency: float, ranks: int) -> Profile:
    """This machine, as fast as it was just measured to be, behind a link.

    Args:
        workload: What was measured.
        layer_seconds: What one of its blocks took on one core.
        bandwidth: Bytes a second of the link.
        latency: Seconds of an empty message.
        ranks: Processes of one thread.
    """
    device = measure_device(torch.device("cpu"), ranks, 1, lambda _: None)
    link = Link("shaped", bandwidth, latency, ranks, bandwidth, 0.0, 0.0, "python -m bench.links")
    seconds = layer_seconds * len(workload.blocks) * workload.steps
    return calibrated(workload, Profile(device, link, "fp32"), seconds)


@dataclass(frozen=True)
class Forecast:
    """The planner's word on every contender.

    Attributes:
        seconds: By contender.
        choice: The contender it would take.
    """

    seconds: dict[str, float]
    choice: str

    def of(self, name: str, patches: int) -> float | None:
        """Seconds of a contender; one that took a number of patches by itself goes by that number."""
        return self.seconds.get(name, self.seconds.get(f"{name}:{patches}"))


def forecast(workload: Workload, profile: Profile, ranks: int) -> Forecast:
    """Predicts every method of ours, PipeFusion with the planner's patches and with the program's, and picks one."""
    planned = search(workload, ranks, profile, Wishes(fresh=0, methods=("pipefusion",), warmup=1)).best
    own = predict(workload, ParallelConfig(pipefusion=ranks, **AS_MEASURED), profile)
    seconds = {f"pipefusion:{one.patches}": one.seconds for one in (own, planned)}
    for method in OURS:
        if method != "pipefusion":
            options: dict[str, int] = {method: ranks}
            seconds[method] = predict(workload, ParallelConfig(**{**AS_MEASURED, **options}), profile).seconds  # type: ignore[arg-type]
    return Forecast(seconds, min(seconds, key=lambda name: seconds[name]))
