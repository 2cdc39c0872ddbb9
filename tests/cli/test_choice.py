"""Another pipeline class or scheduler by name, in ``from_pretrained``, the engine and on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image

import patchpipe
from patchpipe import Engine, ParallelConfig
from patchpipe.cli import app
from patchpipe.cli.inputs import fitting_size, read_picture
from patchpipe.loading.choice import choose_class, tasks_of
from patchpipe.loading.schedulers import build_scheduler, full_name, scheduler_class, schedulers_for
from patchpipe.models import PLANS
from tests import tiny
from tests.pipeline.test_pipelines import KINDS, arguments, layout, mask, paint, picture, same
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

SERVED = {
    "flux": ("FluxPipeline", "FluxImg2ImgPipeline"),
    "sd3-16": ("StableDiffusion3Pipeline", "StableDiffusion3InpaintPipeline"),
    "qwen": ("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
    "pixart": ("PixArtAlphaPipeline",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quieten()
    return tiny.save("flux", tmp_path_factory.mktemp("flux") / "model")


def settings(pipe: Any) -> dict[str, Any]:
    return {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}


def index(**changes: Any) -> dict[str, Any]:
    parts = {name: ["diffusers", name] for name in ("scheduler", "vae", "text_encoder", "text_encoder_2")}
    tokenizers = {name: ["transformers", name] for name in ("tokenizer", "tokenizer_2")}
    own = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    return {**own, **parts, **tokenizers, **changes}


# -- classes -------------------------------------------------------------------------------------


def test_a_task_names_the_class_that_diffusers_has_for_it() -> None:
    for saved, task, kind in (
        ("FluxPipeline", "image-to-image", "FluxImg2ImgPipeline"),
        ("FluxImg2ImgPipeline", "text-to-image", "FluxPipeline"),
        ("FluxPipeline", "inpainting", "FluxInpaintPipeline"),
    ):
        assert choose_class(index(_class_name=saved), task=task).__name__ == kind
    assert choose_class(index()) is FluxPipeline
    assert tasks_of(diffusers.PixArtSigmaPipeline) == {"text-to-image": diffusers.PixArtSigmaPipeline}


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"pipeline": "FluxImg2Img"}, r"no pipeline class 'FluxImg2Img': did you mean 'FluxImg2ImgPipeline'\?"),
        ({"pipeline": "Nonsense"}, "on these weights there are FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline"),
        ({"pipeline": "StableDiffusion3Pipeline"}, "runs on SD3Transformer2DModel, but this model's transformer is of"),
        ({"pipeline": "StableDiffusionPipeline"}, "StableDiffusionPipeline has no transformer"),
        ({"pipeline": "FluxControlNetPipeline"}, "FluxControlNetPipeline also needs controlnet"),
        ({"pipeline": "torch"}, "no pipeline class 'torch'"),
        ({"pipeline": "FluxModularPipeline"}, r"FluxModularPipeline is modular, .*update_components"),
        ({"pipeline": "FluxAutoBlocks"}, "FluxAutoBlocks is modular"),
        ({"task": "upscaling"}, "'upscaling' is none of text-to-image, image-to-image, inpainting"),
        ({"task": "inpainting", "pipeline": "FluxPipeline"}, "both name a class: leave one of them out"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(choice: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        choose_class(index(), **choice)


def test_the_pipelines_that_are_listed_fit_their_transformer_and_are_in_the_docs() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
    for plan in PLANS:
        assert plan.pipelines
        for name in plan.pipelines:
            assert f"`{name}`" in docs
            types = getattr(diffusers, name)._get_signature_types()["transformer"]
            assert plan.model in [one.__name__ for one in types]


def test_a_task_that_a_model_has_no_class_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no pipeline for image-to-image on .* PixArtAlphaPipeline: .* text-to-image"):
        choose_class({"_class_name": "PixArtAlphaPipeline"}, task="image-to-image")


def loaded(place: Place, folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Parts of a pipeline of each class, with text encoders and VAE on other ranks than blocks."""
    for choice in ({"pipeline": "FluxInpaintPipeline"}, {"task": "image-to-image"}, {"pipeline": FluxImg2ImgPipeline}):
        config = layout(place, text_rank=place.world_size - 1)
        pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), dtype="fp32", **choice)
        assert same(place, paint(pipe, "flux"), expected[type(pipe).__name__])
        back = FluxPipeline.from_pipe(pipe)
        assert same(place, paint(back, "flux"), expected["FluxPipeline"])


def test_from_pretrained_takes_a_class_and_a_task(folder: Path) -> None:
    plain = FluxPipeline.from_pretrained(folder)
    kinds = [FluxPipeline, *(getattr(diffusers, kind) for kind in KINDS["flux"])]
    expected = {kind.__name__: paint(kind.from_pipe(plain), "flux") for kind in kinds}
    run_threads(2, loaded, folder, expected)


# -- schedulers ----------------------------------------------------------------------------------


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", SERVED)
def test_every_scheduler_that_is_offered_paints(name: str) -> None:
    quieten()
    plain = tiny.pipeline(name)
    for kind in (getattr(diffusers, one) for one in SERVED[name]):
        offered = schedulers_for(settings(plain), kind)
        assert type(plain.scheduler) in offered
        for one in offered:
            pipe = kind.from_pipe(plain, scheduler=build_scheduler(one.__name__, settings(plain), kind))
            steps = 12 if one.__name__ == "PNDMScheduler" else 3
            assert np.isfinite(paint(pipe, name, num_inference_steps=steps)).all(), one.__name__


def test_schedulers_have_short_names() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    noise = {"_class_name": "DPMSolverMultistepScheduler"}
    for short, found, kind, name in (
        ("euler", flow, FluxPipeline, "FlowMatchEulerDiscreteScheduler"),
        ("heun", flow, StableDiffusion3Pipeline, "FlowMatchHeunDiscreteScheduler"),
        ("dpm++", flow, FluxPipeline, "DPMSolverMultistepScheduler"),
        ("unipc", flow, FluxPipeline, "UniPCMultistepScheduler"),
        ("euler", noise, diffusers.PixArtAlphaPipeline, "EulerDiscreteScheduler"),
        ("DDIM", noise, diffusers.PixArtAlphaPipeline, "DDIMScheduler"),
    ):
        assert scheduler_class(short, found, kind).__name__ == name


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("ddim", FluxPipeline, "DDIMScheduler denoises models that predict noise, but FluxPipeline's predicts a flow"),
        ("heun", FluxPipeline, r"FlowMatchHeunDiscreteScheduler cannot serve FluxPipeline, which calls set_timesteps"),
        ("unipc", FluxImg2ImgPipeline, r"UniPCMultistepScheduler cannot serve .*, which calls scale_noise\(\)"),
        ("nonsense", FluxPipeline, "diffusers has no scheduler 'nonsense': use FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_cannot_serve_is_refused_with_those_that_can(name: str, kind: type, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        scheduler_class(name, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, kind)
    assert "use " in str(refused.value)
    assert "FlowMatchEulerDiscreteScheduler" in str(refused.value)


def test_settings_of_the_own_scheduler_stay() -> None:
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 500}
    heun = build_scheduler("heun", own, StableDiffusion3Pipeline)
    expected = FlowMatchHeunDiscreteScheduler(shift=3.0, num_train_timesteps=500)
    assert dict(heun.config) == dict(expected.config)
    solver = build_scheduler("dpm++", own, StableDiffusion3Pipeline)
    assert (solver.config.use_flow_sigmas, solver.config.flow_shift) == (True, 3.0)
    assert solver.config.prediction_type == "flow_prediction"


def test_settings_follow_a_scheduler_s_name() -> None:
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    name = "dpm++:algorithm_type=sde-dpmsolver++, solver_order=3,lower_order_final=false"
    config = build_scheduler(name, own, StableDiffusion3Pipeline).config
    assert (config.algorithm_type, config.solver_order, config.lower_order_final) == ("sde-dpmsolver++", 3, False)
    assert config.flow_shift == 3.0
    assert full_name("euler:stochastic_sampling=true", FlowMatchEulerDiscreteScheduler) == (
        "FlowMatchEulerDiscreteScheduler:stochastic_sampling=true"
    )
    for wrong, told in (("euler:shfit=2", "did you mean 'shift'"), ("euler:shift", "must look like key=value")):
        with pytest.raises(ValueError, match=told):
            scheduler_class(wrong, own, StableDiffusion3Pipeline)
    with pytest.raises(ValueError, match="here without dynamic shifting"):
        scheduler_class("dpm++", own, FluxPipeline)
    scheduler_class("dpm++:use_dynamic_shifting=true", own, FluxPipeline)


# -- the engine ----------------------------------------------------------------------------------


@pytest.mark.some(of=2)
@pytest.mark.parametrize("config", ["plain", ParallelConfig(pipefusion=2, warmup="all", timeout=60.0)])
def test_an_engine_serves_another_class_and_scheduler(folder: Path, config: Any) -> None:
    plain = FluxImg2ImgPipeline.from_pretrained(folder)
    plain.scheduler = diffusers.FlowMatchLCMScheduler.from_config(plain.scheduler.config)
    given = {key: value for key, value in arguments("flux", FluxImg2ImgPipeline).items() if key != "image"}
    pixels = np.asarray(picture(), np.float32) / 255
    images = [picture(), [picture()], pixels[None], torch.from_numpy(pixels).permute(2, 0, 1)[None]]
    with Engine(folder, config, "cpu", threads=1, task="image-to-image", scheduler="lcm") as engine:
        assert engine.ranks[0].pipeline_class == "FluxImg2ImgPipeline"
        for image in images:
            torch.manual_seed(7)  # this scheduler draws noise from the process's generator
            expected = plain(**given, image=image, output_type="np", generator=torch.Generator().manual_seed(7)).images
            assert np.array_equal(engine(**given, image=image, output_type="np", seed=7), expected), type(image)
        assert isinstance(engine(**given, image=picture(), seed=7)[0], Image.Image)


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"pipeline": "QwenImagePipeline"}, "runs on QwenImageTransformer2DModel"),
        ({"task": "upscaling"}, "is none of"),
        ({"scheduler": "ddim"}, "predicts a flow"),
        ({"pipeline": type("Mine", (FluxPipeline,), {})}, "Mine is no pipeline class of diffusers"),
    ],
)
def test_an_engine_refuses_a_choice_before_it_starts(folder: Path, choice: dict[str, Any], problem: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=problem):
        Engine(folder, ParallelConfig(pipefusion=2), "cpu", **choice)
    assert time.monotonic() - began < 10


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "out")}
    picture().save(found["image"])
    mask().save(found["mask"])
    return found


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line that a command ends with, before anything starts."""
    began = time.monotonic()
    assert app(args=["generate", "a cat", "--devices", "cpu", *args]) == 2
    assert time.monotonic() - began < 10
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    return errors


def test_the_command_line_paints_a_picture_over(
    folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = files["out"].with_suffix(".json")
    settings = ("--set", "max_sequence_length=8", "--steps", "3", "--seed", "0", "--strength", "0.75")
    layout = ("--pipefusion", "2", "--warmup", "all", "--devices", "cpu", "--threads", "1", "--dtype", "fp32")
    given = (
        "--image",
        str(files["image"]),
        "--mask",
        str(files["mask"]),
        "-o",
        str(files["out"]),
        "--json",
        str(report),
    )
    status = app(args=["generate", tiny.PROMPT, "--model", str(folder), *given, *settings, *layout])
    assert status == 0, capsys.readouterr().err
    plain = diffusers.FluxInpaintPipeline.from_pretrained(folder)
    wanted = {"prompt": tiny.PROMPT, "max_sequence_length": 8, "num_inference_steps": 3, "strength": 0.75}
    wanted |= {"image": picture(), "mask_image": mask(), "height": 64, "width": 48}
    expected = plain(**wanted, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(Image.open(files["out"])), np.asarray(expected))
    told = json.loads(report.read_text())
    assert told["ranks"][0]["pipeline_class"] == "FluxInpaintPipeline"
    assert told["arguments"]["image"] == "picture of 48 × 64"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("--image", "{out}"), "there is no file"),
        (("--image", "{folder}"), "is a folder: name a picture"),
        (("--image", "{folder}/model_index.json"), "is no picture that can be read"),
        (("--mask", "{mask}"), "needs a picture to start from: add --image FILE"),
        (("--strength", "0.5"), "needs a picture to start from: add --image FILE"),
        (("--image", "{image}", "--strength", "1.5"), "--strength 1.5 must be from 0"),
        (("--image", "{image}", "--task", "upscaling"), "is none of text-to-image"),
        (("--scheduler", "ddim"), "predicts a flow"),
        (("--pipeline", "FluxImg2Img"), "did you mean 'FluxImg2ImgPipeline'?"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    folder: Path, files: dict[str, Path], given: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(**files, folder=folder) for text in given]
    assert problem in refused(capsys, "--model", str(folder), *filled)


def test_a_mask_of_another_size_is_refused(
    folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mask().resize((64, 64)).save(files["mask"])
    given = ("--image", str(files["image"]), "--mask", str(files["mask"]))
    assert "a mask must be of the picture's size" in refused(capsys, "--model", str(folder), *given)


def test_a_picture_is_read_the_right_way_up(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    picture().save(tmp_path / "turned.jpg", exif=turned)
    assert read_picture(tmp_path / "turned.jpg", "RGB").size == (64, 48)
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", "RGB").mode == "RGB"


def test_a_large_picture_is_made_as_small_as_the_model_paints() -> None:
    assert fitting_size(48, 64, 1024 * 1024) == (48, 64)
    assert fitting_size(100, 70, 1024 * 1024) == (96, 64)
    assert fitting_size(4096, 3072, 1024 * 1024) == (1168, 880)
    assert fitting_size(1024, 1024, 128 * 128) == (128, 128)


def test_a_refusal_is_one_line_in_a_fresh_process(folder: Path) -> None:
    """Nothing is said of optional libraries, and a missing file does not wait for torch."""
    command = [sys.executable, "-m", "patchpipe", "generate", "x", "--devices", "cpu", "--model", str(folder)]
    run = subprocess.run([*command, "--scheduler", "ddim"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: DDIMScheduler denoises models that predict noise")
    assert run.stderr.count("\n") == 1
    code = "import sys; from patchpipe.cli import app; app(args=['generate', 'x', '--image', 'none.png']); "
    script = [sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"]
    assert subprocess.run(script, capture_output=True, check=False).returncode == 0
