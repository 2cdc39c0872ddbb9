"""ControlNets: what they add between blocks reaches the stage that owns the block, cut to the patch's rows."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel
from torch import Tensor

import patchpipe
from patchpipe.config import PASSES
from patchpipe.models.blocks import of
from patchpipe.stage.seam import Nothing, Passage, Residuals
from tests import tiny
from tests.pipeline.test_pipelines import arguments, attach, layout, mask, picture
from tests.support.oracle import naive_pipefusion
from tests.support.parity import TOLERANCE, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": tiny.WIDTH, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
REPEATED = {"num_single_layers": 0, "conditioning_embedding_channels": 4, "patch_size": 2}  # looks at pixels
SD3 = {
    "sample_size": 32, "patch_size": 2, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": tiny.WIDTH, "caption_projection_dim": tiny.WIDTH, "pooled_projection_dim": 32,
    "pos_embed_max_size": 24,
}  # fmt: skip
QWEN = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": tiny.WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
UNION = {"control_image": [picture(), picture(1)], "control_mode": [0, 1], "controlnet_conditioning_scale": [0.5, 0.7]}
CONTROL = {"control_image": picture()}
MASKED = {"control_image": picture(), "control_mask": mask()}
LATE = {"control_guidance_start": 0.3}  # no residuals in the first step

# By title: the tiny pipeline it is made of, the pipeline class, its ControlNet, and the call's own arguments.
CASES: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "FLUX": ("flux", "FluxControlNetPipeline", lambda: FluxControlNetModel(**FLUX), CONTROL | LATE),
    "FLUX, several pictures": (
        "flux", "FluxControlNetPipeline", lambda: FluxControlNetModel(**FLUX), CONTROL | {"num_images_per_prompt": 2},
    ),
    "FLUX union": (
        "flux", "FluxControlNetPipeline", lambda: FluxMultiControlNetModel([FluxControlNetModel(**FLUX, num_mode=2)]),
        UNION,
    ),
    "FLUX, one residual for every block in turn": (
        "flux", "FluxControlNetPipeline", lambda: FluxControlNetModel(**FLUX | REPEATED), CONTROL,
    ),
    "FLUX image to image": ("flux", "FluxControlNetImg2ImgPipeline", lambda: FluxControlNetModel(**FLUX), CONTROL),
    "FLUX inpainting": ("flux", "FluxControlNetInpaintPipeline", lambda: FluxControlNetModel(**FLUX), CONTROL),
    "SD3": (
        "sd3", "StableDiffusion3ControlNetPipeline", lambda: SD3ControlNetModel(**SD3, in_channels=4), CONTROL | LATE,
    ),
    "SD3 inpainting": (
        "sd3-16", "StableDiffusion3ControlNetInpaintingPipeline",
        lambda: SD3ControlNetModel(**SD3, in_channels=16, extra_conditioning_channels=1), MASKED,
    ),
    "Qwen-Image": ("qwen", "QwenImageControlNetPipeline", lambda: QwenImageControlNetModel(**QWEN), CONTROL | LATE),
    "Qwen-Image inpainting": (
        "qwen", "QwenImageControlNetInpaintPipeline",
        lambda: QwenImageControlNetModel(**QWEN, extra_condition_channels=4), MASKED,
    ),
}  # fmt: skip


def setup_module() -> None:
    quieten()


@pytest.fixture(autouse=True)
def no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3 draws its control picture from torch's default generator, which ranks that are threads share."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _generator=None: self.mode())


def control_net(title: str) -> Any:
    with tiny._BUILDING:
        torch.manual_seed(1)
        made = CASES[title][2]()
        tiny._stir(made)
    return made.requires_grad_(False).eval()


def made(title: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny pipeline of the class."""
    name, kind, *_ = CASES[title]
    kind = getattr(diffusers, kind)
    parts = dict(tiny.pipeline(name).components) | {"controlnet": control_net(title)}
    taken = inspect.signature(kind.__init__).parameters
    pipe = kind(**{part: value for part, value in parts.items() if part in taken}).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, title: str, **changes: Any) -> np.ndarray | None:
    name, *_, own = CASES[title]
    wanted = arguments(name, type(pipe)) | own | changes
    output = pipe(**wanted, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images.numpy()


def painted(place: Place, title: str, **options: Any) -> tuple[np.ndarray | None, Any]:
    pipe = attach(made(title), place, split_batch=False, **options)
    return latents(pipe, title), pipe.patchpipe.last


@pytest.mark.some(of=3)
@pytest.mark.parametrize("title", CASES)
def test_a_control_net_is_exact_and_streams_as_it_should(title: str) -> None:
    """Bit-equal where every step is synchronous; where patches stream, as one process does and as the oracle."""
    exact = latents(made(title), title)
    assert np.array_equal(run_threads(2, painted, title)[0][0], exact)
    stream = partial(painted, patch_rows=(1, 3), warmup=1, forecast=False)
    (alone, _), (both, figures) = run_threads(1, stream, title)[0], run_threads(2, stream, title)[0]
    assert np.array_equal(alone, both)
    plain = made(title)
    known = inspect.signature(type(plain).__call__).parameters
    calls = 1 + ("true_cfg_scale" in known)  # of a step
    steps = (figures.steps_synchronous + figures.steps_patched) // calls
    assert figures.materialisations == steps  # before every step but the first, and at the end
    with naive_pipefusion(plain, (1, 3), 1, branches=calls):
        assert relative(alone, latents(plain, title)) < TOLERANCE
    assert relative(alone, exact) > TOLERANCE
    assert relative(exact, latents(plain, title, controlnet_conditioning_scale=uncontrolled(title))) > TOLERANCE


def uncontrolled(title: str) -> Any:
    return [0.0, 0.0] if title == "FLUX union" else 0.0


# Beside pipeline stages: other ways of sharing a step, which reorder sums.
METHODS = {"FLUX": ({"ulysses": 2}, {"distrifusion": 2, "warmup": "all"}), "SD3": ({"cfg": 2}, {"tensor": 2}),
           "Qwen-Image": ({"ring": 2},)}  # fmt: skip


@pytest.mark.parametrize(("title", "options"), [(title, each) for title in METHODS for each in METHODS[title]], ids=str)
def test_other_methods_give_their_ranks_their_rows(title: str, options: dict[str, Any]) -> None:
    exact = latents(made(title), title)
    found = run_threads(2, partial(painted, **{"pipefusion": 1, **options}), title)[0][0]
    assert relative(found, exact) < TOLERANCE


# Beside one synchronous step: text spread over patches, a warm-up that streams, a block of two stages.
SCHEDULES = {
    "FLUX": {"text_patches": 2, "warmup": 1}, "SD3": {"warmup": "streamed"},
    "Qwen-Image": {"stage_blocks": (1.5, 2.5), "warmup": 1},
}  # fmt: skip


@pytest.mark.parametrize("title", SCHEDULES)
def test_other_schedules_stream_as_they_should(title: str) -> None:
    options = {"patch_rows": (2, 2), "forecast": False, **SCHEDULES[title]}
    alone = {key: value for key, value in options.items() if key != "stage_blocks"}
    found = run_threads(2, partial(painted, **options), title)[0][0]
    assert np.array_equal(found, run_threads(1, partial(painted, **alone), title)[0][0])
    plain, streamed = made(title), PASSES[True] if options["warmup"] == "streamed" else ()
    told = {"streamed": streamed, "branches": 1 + (title != "SD3"), "text_patches": options.get("text_patches", 1)}
    with naive_pipefusion(plain, (2, 2), 0 if streamed else 1, **told):
        assert relative(found, latents(plain, title)) < TOLERANCE


def from_disk(place: Place, folder: Path, given: bool) -> np.ndarray | None:
    config = layout(place)
    own = {"pipeline": "FluxControlNetPipeline", "controlnet": control_net("FLUX")} if given else {}
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), dtype="fp32", **own)
    return latents(pipe, "FLUX")


def test_a_control_net_is_read_from_disk_or_given(tmp_path: Path) -> None:
    """Saved with a pipeline of the class; or given beside a model that was saved without one."""
    pipe = made("FLUX", torch.float32)
    exact = latents(pipe, "FLUX")
    pipe.save_pretrained(tmp_path / "both")
    tiny.save("flux", tmp_path / "base")
    for folder, given in (("both", False), ("base", True)):
        assert np.array_equal(run_threads(2, from_disk, tmp_path / folder, given)[0], exact)


def test_residuals_are_cut_as_the_streams_are() -> None:
    passage = Passage(None, first=False)  # type: ignore[arg-type]
    residuals = Residuals([torch.ones(1, 4, 2)], of("image"), passage)
    assert len(residuals) == 1
    assert residuals[0].shape == (1, 4, 2), "while shapes are found out, they are whole"
    stream: Tensor = torch.zeros(1, 4, 2)
    assert stream + Nothing() is stream, "of another stage's block nobody reads the sum"
    with pytest.raises(TypeError):
        torch.cat([stream, Nothing()])  # type: ignore[list-item]
