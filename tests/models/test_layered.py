"""Qwen-Image-Layered: several layers of one picture are painted together, with that picture as their reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as layered

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models import plan_for
from tests import tiny
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tests.tiny import images as tiny_images

LAYERS = 2  # and the picture as a whole: three pictures of four token rows
WARM = {"patch_rows": (5, 4, 3), "split_batch": False}


def setup_module() -> None:
    quieten()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline paints 640 or 1024 pixels and nothing smaller."""
    monkeypatch.setattr(layered, "calculate_dimensions", lambda _area, _ratio: (48, 64))


def pipeline() -> Any:
    with tiny._BUILDING:
        torch.manual_seed(5)
        parts = tiny_images._qwen_parts(4, use_additional_t_cond=True, use_layer3d_rope=True)
        tiny._stir(parts["transformer"])
        pipe = QwenImageLayeredPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers_of(pipe: Any) -> np.ndarray | None:
    """The layers as pictures: this pipeline of diffusers fails where latents are asked for."""
    text = tiny_images._qwen_edit_call()
    text = {name: value.float() if name.endswith("embeds") else value for name, value in text.items()}
    picture, generator = tiny_images._picture(48, 64), torch.Generator().manual_seed(0)
    given = {"layers": LAYERS, "image": picture, "num_inference_steps": 4, "output_type": "np"}
    output = pipe(**text, prompt=" owl", **given, generator=generator)
    return None if output is None else np.asarray(output.images[0])


def painted(place: Place, layout: dict[str, Any]) -> np.ndarray | None:
    config = ParallelConfig(**layout, timeout=60)
    return layers_of(patchpipe.parallelize(pipeline(), config, group=place.join(config)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_synchronous_steps_are_exact(ranks: int) -> None:
    expected = layers_of(pipeline())
    assert expected is not None
    assert len(expected) == LAYERS
    assert np.array_equal(run_threads(ranks, painted, {"pipefusion": ranks, **WARM, "warmup": "all"})[0], expected)


def test_stale_rows_do_not_depend_on_the_stages() -> None:
    exact = layers_of(pipeline())
    alone = painted(Place(0, 1, None), {**WARM, "warmup": 1})
    for ranks in (2, 3):
        both = run_threads(ranks, painted, {"pipefusion": ranks, **WARM, "warmup": 1})[0]
        assert np.array_equal(both, alone)
    assert not np.array_equal(alone, exact), "nothing was stale"


@pytest.mark.parametrize("method", ["cfg", "ulysses", "ring", "tensor"])
def test_other_methods_paint_the_same(method: str) -> None:
    found, exact = run_threads(2, painted, {method: 2})[0], layers_of(pipeline())
    assert found is not None
    assert np.abs(found - exact).max() <= 1e-3


def test_layers_of_different_sizes_are_refused() -> None:
    model = pipeline().transformer
    grid, latent = plan_for(model).grid, torch.zeros(1, 12 + 20 + 12, 16)
    inputs = {"hidden_states": latent, "img_shapes": [[(1, 4, 3), (1, 5, 4), (1, 4, 3)]]}
    with pytest.raises(ValueError, match="has layers of different sizes: only those of one size are cut"):
        grid.rows(model, latent.shape, inputs)
