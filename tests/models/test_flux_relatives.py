"""FLUX's other pipelines, whose transformers take more than the latent: control pictures, masks, reference pictures."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from tests import tiny
from tests.pipeline.test_pipelines import arguments, attach, picture
from tests.support.oracle import naive_pipefusion
from tests.support.parity import TOLERANCE, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

# By name: channels of the transformer's input, and the call's own arguments.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "FluxControlPipeline": (32, {"control_image": picture()}),
    "FluxFillPipeline": (16 + 16 + 256, {}),
    "FluxKontextPipeline": (16, {"image": picture(1), "_auto_resize": False, "max_area": 64 * 48}),
}
SIZES = {
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": tiny.WIDTH,
    "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def setup_module() -> None:
    quieten()


def made(name: str) -> Any:
    """A tiny pipeline of the class, in float64."""
    parts = dict(tiny.pipeline("flux").components)
    with tiny._BUILDING:
        torch.manual_seed(0)
        channels = KINDS[name][0]
        parts["transformer"] = FluxTransformer2DModel(
            in_channels=channels, out_channels=16, num_layers=2, num_single_layers=2, **SIZES
        )
        tiny._stir(parts["transformer"])
        parts["transformer"].requires_grad_(False)
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    pipe = kind(**{part: value for part, value in parts.items() if part in taken}).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> np.ndarray | None:
    wanted = arguments("flux", type(pipe)) | KINDS[type(pipe).__name__][1]
    output = pipe(**wanted, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images.numpy()


def painted(place: Place, name: str, **options: Any) -> tuple[np.ndarray | None, int]:
    pipe = attach(made(name), place, split_batch=False, **options)
    return latents(pipe), pipe.patchpipe.last.materialisations


@pytest.mark.parametrize("name", KINDS)
def test_they_are_exact_and_stream_as_they_should(name: str) -> None:
    """Bit-equal where every step is synchronous; where patches stream, as one process does and as the oracle."""
    exact = latents(made(name))
    assert np.array_equal(run_threads(2, painted, name)[0][0], exact)
    rows, references = (1, 3), 12 if name == "FluxKontextPipeline" else 0  # as large as the picture
    schedule = {"patch_rows": rows, "warmup": 1, "forecast": False}

    def stream(place: Place) -> tuple[np.ndarray | None, int]:
        return painted(place, name, **schedule)

    alone, both = run_threads(1, stream)[0][0], run_threads(2, stream)[0]
    assert np.array_equal(alone, both[0])
    assert both[1] == 1
    plain = made(name)
    guided = "negative_prompt" in inspect.signature(type(plain).__call__).parameters
    with naive_pipefusion(plain, rows, 1, branches=1 + guided, references=references):
        expected = latents(plain)
    assert relative(alone, expected) < TOLERANCE
    assert relative(alone, exact) > TOLERANCE
