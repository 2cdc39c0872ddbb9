"""What the forecast of stale keys and values costs: a block of FLUX's real size, with and without.

python -m bench.forecast
python -m bench.forecast --rounds 5 --patches 4

One dual-stream and one single-stream block of FLUX.1 dev (24 heads of 128 channels, 4,096 image and 512 text tokens),
patch by patch on one rank. The two take turns; a step's time is that of its patches. What is kept is counted.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.progress import track

from bench.rounds import keep_freed_memory, save
from patchpipe import ParallelConfig
from patchpipe.layout.split import stages_of
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.stage.context import CallContext
from patchpipe.stage.keys.forecast import Clock, Pace
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut
from patchpipe.stage.stage import Stage

COMMAND = "python -m bench.forecast"
RASTER = Raster(64, 64, 64)


class Steps:
    """Steady steps of the blocks, with or without a forecast.

    Args:
        model: The blocks.
        patches: Patches of the latent.
        forecast: Whether stale rows are forecast.
    """

    def __init__(self, model: FluxTransformer2DModel, patches: int, forecast: bool) -> None:
        self.stage = Stage(model, plan_for(model), stages_of((2,))[0], first=True, last=True)
        self.inputs = _inputs(model.dtype)
        self.stores: dict[str, LayerStore] = {}
        self.kept: dict[tuple[Any, ...], Any] = {}
        self.patches, self.clock, self.forecast, self.level = patches, Clock(), forecast, 1000.0

    def run(self, synchronous: bool = False) -> float:
        """One step; its seconds."""
        self.level -= 20
        self.inputs["timestep"] = torch.full((1,), self.level / 1000, dtype=self.inputs["hidden_states"].dtype)
        pace = self.clock.tick(self.inputs["timestep"]) if self.forecast else None
        self.stage.attach()
        self.stage.sew()
        try:
            shapes = self.stage.look(self.inputs, RASTER, self.kept)
            cut = Cut.of(RASTER, ParallelConfig(patches=self.patches), shapes.riders)
            began = perf_counter()
            self._patches(shapes, (cut.whole,) if synchronous else cut.patches, pace)
            return perf_counter() - began
        finally:
            self.stage.detach()

    def _patches(self, shapes: Any, patches: Any, pace: Pace | None) -> None:
        memo: dict[str, Any] = {}
        for patch in patches:
            context = CallContext(patch, shapes, self.stores, memo=memo, request_memo=self.kept, pace=pace)
            latent = self.inputs["hidden_states"].narrow(1, patch.units[0], patch.units[1] - patch.units[0])
            self.stage.run(self.inputs, latent, context)

    @property
    def bytes(self) -> int:
        """Memory of keys, values and their changes."""
        return sum(store.bytes for store in self.stores.values())


def _inputs(dtype: torch.dtype) -> dict[str, Any]:
    make = torch.Generator().manual_seed(0)
    ids = torch.zeros(64, 64, 3)
    ids[..., 1] += torch.arange(64)[:, None]
    ids[..., 2] += torch.arange(64)[None]
    return {
        "hidden_states": torch.randn(1, 4096, 64, generator=make).to(dtype),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=make).to(dtype),
        "pooled_projections": torch.randn(1, 768, generator=make).to(dtype),
        "img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(512, 3), "guidance": torch.ones(1, dtype=dtype),
    }  # fmt: skip


def main(
    patches: Annotated[int, typer.Option(help="Patches of the latent.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timed rounds; one more is not timed.")] = 5,
) -> None:
    """Measures, prints and writes bench/results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    with torch.no_grad():
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
        both = [Steps(model, patches, forecast) for forecast in (False, True)]
        for steps in both:
            steps.run(synchronous=True)
            steps.run()
        ratios, seconds = [], []
        for turn in track(range(rounds + 1), "measuring", transient=True):
            stale, forecast = (steps.run() for steps in (both if turn % 2 else reversed(both)))
            stale, forecast = (stale, forecast) if turn % 2 else (forecast, stale)
            if turn:
                ratios.append(forecast / stale)
                seconds.append(stale)
    figures = {
        "patches": patches, "seconds": median(seconds), "ratio": median(ratios), "spread": [min(ratios), max(ratios)],
        "bytes": [steps.bytes for steps in both],
    }  # fmt: skip
    Console().print(figures)
    save("forecast", f"{COMMAND} --patches {patches} --rounds {rounds}", figures)


if __name__ == "__main__":
    typer.run(main)
