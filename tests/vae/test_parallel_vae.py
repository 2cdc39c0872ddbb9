"""A pipeline whose picture is decoded in strips, one per rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.support.ranks import Place, run_ranks

PLAIN = {"warmup": "all"}


def picture(place: Place, folder: Path, name: str, options: dict[str, object]) -> np.ndarray | None:
    config = ParallelConfig(pipefusion=place.world_size, **PLAIN, **options)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    arguments = tiny.call_arguments(name, height=112)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np")
    return None if output is None else output.images


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_strips_make_the_same_picture(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    [expected] = run_ranks(1, picture, folder, name, {})
    made = run_ranks(3, picture, folder, name, {"parallel_vae": True, "output_rank": 1})
    assert made[0] is None
    assert made[2] is None
    assert made[1].shape == expected.shape
    assert np.abs(made[1] - expected).max() < 1e-4


def test_restore_takes_the_vae_back() -> None:
    assert run_ranks(2, restored, "flux") == [True, True]


def restored(place: Place, name: str) -> bool:
    pipe = tiny.pipeline(name)
    latent = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    before = pipe.vae.decode(latent).sample
    config = ParallelConfig(pipefusion=2, parallel_vae=True, **PLAIN)
    patchpipe.restore(patchpipe.parallelize(pipe, config, group=place.join(config)))
    return torch.equal(pipe.vae.decode(latent).sample, before)
