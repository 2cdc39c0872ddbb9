"""What is checked: a class of diffusers, or a folder's model, made tiny, and how it is called."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from patchpipe.checking.inputs import GRID, fitted
from patchpipe.checking.loop import Call, Sample, in_halves, record
from patchpipe.checking.tiny import build, tiny_settings
from patchpipe.errors import UnsupportedModel
from patchpipe.models import names_transformer, plan_for
from patchpipe.models.latent import patch_sizes
from patchpipe.models.plan import ModelPlan

DTYPES = (torch.float64, torch.float32)  # some classes compute in float32 alone


@dataclass(frozen=True)
class Subject:
    """A tiny model and how it is called.

    Attributes:
        model: The model.
        sample: Its calls.
        told: How the inputs came about, in words.
    """

    model: nn.Module
    sample: Sample
    told: str

    @property
    def kind(self) -> str:
        """Its class."""
        return type(self.model).__name__


def subject_of(place: str, settings: Mapping[str, Any]) -> Subject:
    """What a command's argument names.

    Args:
        place: A transformer class of diffusers, or a folder.
        settings: Fields of the tiny model's configuration that are set.

    Raises:
        ValueError: There is no such thing, or it cannot be made tiny or called without being told more.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return subject_of_class(place, settings)
    if (folder / "model_index.json").is_file():
        return _of_pipeline(folder, settings)
    file = next((each for each in (folder / "config.json", folder / "transformer/config.json") if each.is_file()), None)
    found = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    if "_class_name" not in found:
        raise ValueError(f"{folder} has neither a model_index.json nor a config.json that names a class of diffusers")
    return subject_of_class(found["_class_name"], {**found, **settings})


def transformer_class(name: str) -> type:
    """A transformer class of diffusers by its name.

    Raises:
        ValueError: There is none.
    """
    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin):
        return kind
    known = [each for each in dir(diffusers) if "Transformer" in each and each.endswith("Model")]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(
        f"{name} is neither a folder nor a model class of diffusers {diffusers.__version__}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def subject_of_class(name: str, settings: Mapping[str, Any]) -> Subject:
    """A tiny model of a class, with inputs made by their names.

    Raises:
        ValueError: It cannot be made tiny or called without being told more.
    """
    kind = transformer_class(name)
    fields = {**tiny_settings(kind, settings), **{key: settings[key] for key in settings if key in _chosen(settings)}}
    plan = known_plan(name)
    layouts, wanted = ((), ()) if plan is None else ((plan.grid.axes,), plan.known_inputs)
    problem: ValueError | None = None
    for dtype in DTYPES:
        model = build(kind, fields, dtype)
        try:
            sample, axes = fitted(model, dtype, layouts, wanted)
        except ValueError as error:
            problem = problem or error
            continue
        if plan is not None and plan.guidance == "batch":
            sample = in_halves(sample, plan.unbatched, plan.batch_dims)
        return Subject(model, sample, f"inputs made by their names, latent {axes}")
    assert problem is not None
    raise problem


def _chosen(settings: Mapping[str, Any]) -> list[str]:
    """Fields that a user sets, and that are not of a model's own configuration: they stay as they are."""
    return [] if "_class_name" in settings else list(settings)


def known_plan(name: str) -> ModelPlan | None:
    """The plan of a class, if it has one."""
    try:
        return plan_for(name)
    except UnsupportedModel:
        return None


def _of_pipeline(folder: Path, settings: Mapping[str, Any]) -> Subject:
    """The folder's own pipeline, its transformer made tiny, tells what a transformer is called with.

    Some fields of a configuration are as large as the width by chance, and must stay, for the text to fit: if the
    narrow copy cannot be called, the width stays too.
    """
    problem: RuntimeError | None = None
    for narrow in (True, False):
        tiny = _tiny_transformers(folder, settings, narrow=narrow)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **tiny)
        pipe.set_progress_bar_config(disable=True)
        call = small_call(pipe)
        try:
            sample = record(pipe, lambda pipe=pipe, call=call: pipe(**call))  # type: ignore[misc]
        except RuntimeError as error:
            problem = problem or error
            continue
        return in_float64(tiny["transformer"], sample, f"inputs recorded from {type(pipe).__name__}")
    raise ValueError(f"the pipeline in {folder} cannot be called with a tiny transformer: {problem}") from problem


def _tiny_transformers(folder: Path, settings: Mapping[str, Any], *, narrow: bool) -> dict[str, nn.Module]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    tiny = {}
    for name, entry in index.items():
        if names_transformer(name) and isinstance(entry, list) and entry[1]:
            config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
            kind = transformer_class(entry[1])
            fields = {**tiny_settings(kind, config, alone=False, narrow=narrow), **settings}
            tiny[name] = build(kind, fields, torch.float32)
    if "transformer" not in tiny:
        raise ValueError(f"the pipeline in {folder} has no transformer: patchpipe spreads diffusion transformers only")
    return tiny


def in_float64(model: nn.Module, sample: Sample, told: str) -> Subject:
    """A model and its calls in float64, where what is left of a difference is rounding; as they are if it cannot."""
    wide = Subject(model.double(), cast(sample, torch.float64), told)
    try:
        with torch.no_grad():
            model(**wide.sample.inputs(0, wide.sample.latents[0]), return_dict=False)
    except RuntimeError:
        return Subject(model.float(), cast(sample, torch.float32), told)
    return wide


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """The same calls in another dtype."""

    def as_dtype(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: as_dtype(each) for key, each in value.items()}
        return type(value)(map(as_dtype, value)) if type(value) in (list, tuple) else value

    calls = tuple(Call(call.name, as_dtype(dict(call.inputs))) for call in sample.calls)
    return replace(sample, calls=calls, latents=as_dtype(sample.latents))


def small_call(pipe: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call that make a small picture or clip, guided, as its signature has them."""
    spans = {"f": 1, "h": 1, "w": 1}
    with contextlib.suppress(AttributeError, TypeError):  # else of one pixel each
        spans |= patch_sizes(pipe.transformer.config)
    factor: int = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8) or 8
    pixels = max(16, factor * spans["h"])
    height, width = GRID["h"] * pixels, GRID["w"] * pixels
    frames = (GRID["f"] - 1) * getattr(pipe, "vae_scale_factor_temporal", 4) * spans["f"] + 1
    picture = Image.linear_gradient("L").convert("RGB").resize((width, height))
    known = {
        "prompt": "a red apple", "negative_prompt": "a blue dog and a cherry blossom", "height": height, "width": width,
        "num_frames": frames, "num_inference_steps": 2, "guidance_scale": 3.0, "true_cfg_scale": 3.0,
        "guidance_schedule": None,
        "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    needed = {"image": picture, "mask_image": picture, "class_labels": [3]}
    parameters = inspect.signature(type(pipe).__call__).parameters
    call = {name: value for name, value in known.items() if name in parameters}
    wanted = {name for name, each in parameters.items() if each.default is each.empty}
    of_pictures = any(part in type(pipe).__name__ for part in ("Img2Img", "ImageToVideo", "Inpaint"))
    wanted |= {"image"} & set(parameters) if of_pictures else set()  # some say it may be left out, and need it
    return call | {name: value for name, value in needed.items() if name in wanted}
