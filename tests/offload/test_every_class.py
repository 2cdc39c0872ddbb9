"""Every class with a plan paints the same, to the bit, when its weights come and go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import patchpipe
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.models.matrix import untested
from tests import tiny
from tests.models.test_family_features import NAMES, several
from tests.support.parity import call_pipeline
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tests.tiny import images as tiny_images

NONE_STAY = OffloadConfig(resident=0.0, chunk=0.004, depth=2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipefusion": {"pipefusion": 2, "warmup": 1},
    "ulysses": {"ulysses": 2, "warmup": "all"},
    "tensor": {"tensor": 2, "warmup": "all"},
}


OTHERS: dict[tuple[str, str], dict[str, Any]] = {("pixart", "tensor"): {"tensor": 3, "warmup": "all"}}  # of three heads
REFUSED = {("flux2-kv", "ulysses")}  # a prefix of keys and values


def setup_module() -> None:
    quieten()


def paint(place: Place, name: str, config: ParallelConfig) -> tuple[Any, Any]:
    pipe = tiny_images.settled(tiny.pipeline(name))
    patchpipe.parallelize(pipe, config, group=place.join(config))
    output = call_pipeline(pipe, several(pipe, name))
    offload = pipe.patchpipe.offload
    return None if output is None else np.asarray(tiny.painted(output)), offload and offload.stats.bytes


@pytest.mark.some(of=16)
@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "qwen", *NAMES])
def test_a_class_paints_the_same_with_offload(name: str) -> None:
    model = type(tiny.pipeline(name).transformer).__name__
    methods = [method for method in LAYOUTS if not untested(model, method) and (name, method) not in REFUSED]
    assert methods
    for method in methods:
        layout = OTHERS.get((name, method), LAYOUTS[method])
        stays, goes = (ParallelConfig(**layout, timeout=60, offload=asked) for asked in (None, NONE_STAY))
        expected, found = (run_threads(stays.world_size, paint, name, config) for config in (stays, goes))
        for (one, _), (other, moved) in zip(expected, found, strict=True):
            assert moved > 0
            assert (one is None) == (other is None)
            assert one is None or np.array_equal(one, other), method
