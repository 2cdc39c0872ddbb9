"""A layout taken without being asked: which one, why, the same on every rank, and every request is served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.ranks import Place
from tests.threads import run_threads

pytestmark = pytest.mark.timeout(120)

# -- a second branch that has nothing to do ------------------------------------------------------


@pytest.mark.parametrize(
    "degrees", [{}, {"pipefusion": 2}, {"distrifusion": 2}, {"ulysses": 2}], ids=["cfg", "pipe", "displaced", "ulysses"]
)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_unguided_requests_leave_the_second_branch_idle(name: str, degrees: dict[str, int]) -> None:
    if name == "pixart" and "ulysses" in degrees:
        pytest.skip("three heads")
    call = {**tiny.call_arguments(name, guided=False), "output_type": "latent"}
    config = ParallelConfig(cfg=2, idle_branch=True, warmup="all", **degrees)

    def paint(place: Place) -> Any:
        pipe = patchpipe.parallelize(tiny.pipeline(name), config, group=place.join(config))
        try:
            return [pipe(**call, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
        finally:
            patchpipe.restore(pipe)

    first, again = run_threads(config.world_size, paint)[0]
    plain = tiny.pipeline(name)(**call, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_array_equal(first.images, again.images)
    if set(degrees) & {"distrifusion", "ulysses"}:  # sums in another order
        assert np.linalg.norm(first.images - plain) < 1e-5 * np.linalg.norm(plain)
    else:
        np.testing.assert_array_equal(first.images, plain)
