"""In the steady state a step leaves nothing behind."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.support.ranks import Place, run_ranks

STEPS = 12


def live_bytes() -> int:
    """Memory of every tensor that is reachable now."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) is torch.Tensor and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bytes_by_step(place: Place, name: str, layout: dict[str, Any]) -> list[int]:
    """What is alive at the end of each step on this rank."""
    pipe, config = tiny.pipeline(name), ParallelConfig(**layout, timeout=60)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    found: list[int] = []

    forward = pipe.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(live_bytes())
        return forward(*args, **kwargs)

    pipe.transformer.forward = counted
    pipe(**tiny.call_arguments(name, guided=False, height=112, steps=STEPS), output_type="latent")
    return found


@pytest.mark.some
@pytest.mark.parametrize("layout", [{"patches": 3}, {"pipefusion": 2, "patches": 3}, {"distrifusion": 2}], ids=str)
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_no_step_leaves_anything_behind(name: str, layout: dict[str, Any]) -> None:
    for found in run_ranks(ParallelConfig(**layout).world_size, bytes_by_step, name, layout):
        assert len(found) == STEPS
        steady = found[5:]
        assert len(set(steady)) == 1, found
