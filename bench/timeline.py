"""Traces one request of a shape on this machine and draws it: docs/images/trace.png.

python -m bench.timeline --shape flux --patches 4 --steps 8
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

import patchpipe
from bench.contenders import AS_MEASURED
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from patchpipe.tracing.draw import draw
from patchpipe.tracing.timeline import read
from tests.support.ranks import Place, run_ranks

OUT = Path(__file__).parent.parent / "docs" / "images" / "trace.png"


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    ranks: Annotated[int, typer.Option(help="Pipeline stages.")] = 2,
    patches: Annotated[int, typer.Option(help="Patches M.")] = 4,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 8,
    out: Annotated[Path, typer.Option(help="The picture.")] = OUT,
) -> None:
    """Traces and draws."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        run_ranks(ranks, trace, shape, patches, steps, str(file), timeout=3600)
        draw(read(file), out)


def trace(place: Place, shape: str, patches: int, steps: int, file: str) -> None:
    """A request to warm up, then the one that is traced."""
    pipe, call = SHAPES[shape].build()
    config = ParallelConfig(pipefusion=place.world_size, patches=patches, timeout=600, **AS_MEASURED)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    pipe(**{**call, "num_inference_steps": 2})
    with pipe.patchpipe.tracing(file):
        pipe(**{**call, "num_inference_steps": steps}, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    typer.run(main)
