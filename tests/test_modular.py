"""Modular pipelines of diffusers: blocks and a state in place of a pipeline's own code, run as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests import tiny
from tests.oracle import naive_pipefusion
from tests.parity import TOLERANCE, ROUNDED, relative
from tests.ranks import Place, quieten
from tests.test_pipelines import attach
from tests.threads import run_threads

BLOCKS = {"flux": "FluxAutoBlocks", "qwen": "QwenImageAutoBlocks", "wan": "WanBlocks"}


def setup_module() -> None:
    quieten()


def made(name: str, blocks: Any = None, dtype: torch.dtype = torch.float64, **guider: Any) -> Any:
    """A modular pipeline with the components of a tiny one."""
    parts = tiny.pipeline(name, dtype=dtype).components
    pipe = (blocks or getattr(diffusers, BLOCKS[name])()).init_pipeline()
    known = pipe.components
    pipe.update_components(**{part: value for part, value in parts.items() if part in known and value is not None})
    if "guider" in known:
        pipe.update_components(guider=known["guider"].new(guidance_scale=3.0, **guider))
    for block in loops(pipe._blocks):
        block.set_progress_bar_config(disable=True)
    return pipe


def loops(block: Any) -> list[Any]:
    own = [block] if hasattr(block, "set_progress_bar_config") else []
    return own + [each for part in block.sub_blocks.values() for each in loops(part)]


def call(pipe: Any, name: str, **changes: Any) -> Any:
    known = {each.name for each in pipe.blocks.inputs}
    wanted = tiny.call_arguments(name) | {"output_type": "np"} | changes
    output = changes.get("output", "videos" if name == "wan" else "images")
    given = {key: value for key, value in wanted.items() if key in known}
    return pipe(**given, generator=torch.Generator().manual_seed(0), output=output)


def painted(place: Place, name: str, **options: Any) -> tuple[Any, Any]:
    pipe = attach(made(name), place, **options)
    return call(pipe, name), pipe.patchpipe.last


@pytest.mark.parametrize("name", BLOCKS)
def test_synchronous_is_exact(name: str) -> None:
    exact = call(made(name), name)
    for ranks in (1, 2):
        found = run_threads(ranks, painted, name)
        assert np.array_equal(found[0][0], exact)
        assert all(picture is None for picture, _ in found[1:])
        assert all(figures.stages == ranks and figures.steps_synchronous > 0 for _, figures in found)
