"""IP-Adapters: their attention sees the whole of their picture in every patch, and is what it is in plain diffusers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests import ip_adapters, tiny
from tests.oracle import naive_pipefusion
from tests.parity import TOLERANCE, relative
from tests.ranks import Place, quieten
from tests.test_pipelines import arguments, attach
from tests.threads import run_threads

# By title: the tiny pipeline, the class that is called, how many adapters there are, and the call's own arguments.
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "FLUX": ("flux", "", 1, {}),
    "FLUX, two adapters and pictures": ("flux", "", 2, {"num_images_per_prompt": 2}),
    "FLUX without true guidance": ("flux", "", 1, {"true_cfg_scale": 1.0}),
    "FLUX image to image": ("flux", "FluxImg2ImgPipeline", 1, {}),
    "SD3": ("sd3", "", 1, {}),
    "SD3.5": ("sd35", "", 1, {}),
    "SD3.5, three pictures": ("sd35", "", 1, {"num_images_per_prompt": 3}),
    "SD3.5, skip-layer guidance": (
        "sd35", "", 1, {"skip_guidance_layers": [0, 3], "skip_layer_guidance_stop": 0.9},
    ),
    "SD3 image to image": ("sd3-16", "StableDiffusion3Img2ImgPipeline", 1, {}),
    "Chroma": ("chroma", "", 1, {}),
}  # fmt: skip
STREAM: dict[str, Any] = {"patch_rows": (1, 3), "warmup": 1}


def setup_module() -> None:
    quieten()


def made(title: str, dtype: torch.dtype = torch.float64, adapters: int | None = None) -> Any:
    name, kind, several, _ = CASES[title]
    pipe = tiny.pipeline(name, dtype=dtype)
    if kind:
        pipe = getattr(diffusers, kind).from_pipe(pipe, torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
    if several if adapters is None else adapters:
        ip_adapters.load(pipe, several)
    return pipe


def latents(pipe: Any, title: str, seed: int = 5, **changes: Any) -> np.ndarray | None:
    name, _, adapters, own = CASES[title]
    known = inspect.signature(type(pipe).__call__).parameters
    wanted = arguments(name, type(pipe)) | own
    wanted["ip_adapter_image_embeds"] = ip_adapters.pictures(pipe, adapters, seed)
    if "negative_ip_adapter_image_embeds" in known:
        wanted["negative_ip_adapter_image_embeds"] = ip_adapters.pictures(pipe, adapters, seed + 1)
    wanted = {key: value for key, value in (wanted | changes).items() if value is not None}
    output = pipe(**wanted, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images.numpy()


def painted(place: Place, title: str, **options: Any) -> tuple[np.ndarray | None, Any]:
    pipe = attach(made(title), place, **{"split_batch": False, **options})
    return latents(pipe, title), pipe.patchpipe.last


@pytest.mark.parametrize("title", CASES)
def test_an_ip_adapter_is_exact_and_streams_as_it_should(title: str) -> None:
    """Bit-equal to diffusers where every step is synchronous; where patches stream, as one process and the oracle."""
    plain = made(title)
    exact = latents(plain, title)
    assert relative(exact, latents(plain, title, seed=9)) > TOLERANCE, "the picture changes nothing"
    alone = run_threads(1, partial(painted, **STREAM), title)[0][0]
    for stages in (2, 4):
        assert np.array_equal(run_threads(stages, painted, title)[0][0], exact)
        found, figures = run_threads(stages, partial(painted, **STREAM), title)[0]
        assert np.array_equal(found, alone)
        assert figures.materialisations == 1  # at the end
    given = arguments(CASES[title][0], type(plain)) | CASES[title][3]
    branches = 2 if given.get("true_cfg_scale", 1.0) > 1 or title == "Chroma" else 1
    with naive_pipefusion(plain, (1, 3), 1, branches=branches):
        assert relative(alone, latents(plain, title)) < TOLERANCE
    assert relative(alone, exact) > TOLERANCE
