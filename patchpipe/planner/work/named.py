"""From a model's name to a workload: a preset's figures, or a folder's or hub id's configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchpipe.demo import call_defaults
from patchpipe.errors import UnsupportedModel
from patchpipe.loading.dtypes import as_torch, dtype_name
from patchpipe.loading.folder import PipelineFolder
from patchpipe.loading.source import resolve_source
from patchpipe.models.blocks import BlockPlace, attention_width
from patchpipe.models.latent import PACKED, TEXT, Raster
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.tensor import INPUTS, split_linears, tensor_plan
from patchpipe.planner.work.describe import component_parameters
from patchpipe.planner.work.presets import PRESETS, Preset, preset_named
from patchpipe.planner.work.workload import Attention, AttentionKind, Block, Matrix, Workload

CONFIGURATION = ("model_index.json", "call.json", "*/config.json")
USUAL_TEXT = {
    "FluxTransformer2DModel": 512,
    "SD3Transformer2DModel": 333,  # CLIP's 77 and T5's 256
    "PixArtTransformer2DModel": 300,
    "QwenImageTransformer2DModel": 128,
    "Ideogram4Transformer2DModel": 2048,
}
USUAL_SIZE, USUAL_STEPS = 1024, 28
TOKEN = 2  # pixels of the latent to a token, each way, where the pipeline packs them


@dataclass(frozen=True)
class Asked:
    """What is asked of a model; ``None`` is as usual for it.

    Attributes:
        height: Pixels.
        width: Pixels.
        steps: Denoising steps.
        guidance: Whether there are two guidance branches.
        pictures: Pictures of the request.
        text_tokens: Tokens of the prompt.
        frames: Frames of a video.
        dtype: In which it is loaded.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: bool | None = None
    pictures: int = 1
    text_tokens: int | None = None
    frames: int | None = None
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("height", "width", "steps", "pictures", "text_tokens", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        dtype_name(self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return as_torch(dtype_name(self.dtype) or "float32").itemsize


def workload_for(model: str | Path, asked: Asked, revision: str | None = None) -> Workload:
    """The workload of a request.

    Args:
        model: A preset such as ``flux.1-dev``, a folder in diffusers format, or a hub id, of which the configuration
            files alone are fetched.
        asked: The request.
        revision: Of a hub id; ``None`` is its main branch.

    Raises:
        UnsupportedModel: The transformer's class has no plan, and it is no preset.
        FileNotFoundError: There is no such model.
        ValueError: The sizes do not fit the model.
    """
    preset = None if Path(model).is_dir() else preset_named(str(model))
    if preset is not None:
        return _from_preset(preset, asked)
    try:
        return _from_folder(str(model), read_folder(model, revision=revision), asked)
    except FileNotFoundError as error:
        names = ", ".join(preset.name for preset in PRESETS)
        raise FileNotFoundError(f"{error}; known without a download are {names}") from error


def _from_preset(preset: Preset, asked: Asked) -> Workload:
    height, width = asked.height or USUAL_SIZE, asked.width or USUAL_SIZE
    found = preset.workload(
        height, width, steps=asked.steps, frames=asked.frames, guidance=asked.guidance, pictures=asked.pictures
    )
    components = {part: size * asked.itemsize // 2 for part, size in found.components.items()}
    text = asked.text_tokens or found.text
    return replace(found, itemsize=asked.itemsize, components=components, text=text)


def read_folder(model: str | Path, **hub: Any) -> PipelineFolder:
    """A local folder, or a hub id's configuration files without its weights.

    Args:
        model: The folder or hub id.
        **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for the hub.
    """
    source = resolve_source(model, **hub)
    folder = source.folder
    if folder is None:
        from huggingface_hub import snapshot_download

        options = {**hub, "local_files_only": source.offline}
        folder = Path(snapshot_download(source.path, allow_patterns=list(CONFIGURATION), **options))
    return PipelineFolder(folder)


def _from_folder(name: str, source: PipelineFolder, asked: Asked) -> Workload:
    plan, transformer = source.plan(), source.build("transformer", torch.float32)
    components = {part: count * asked.itemsize for part, count in component_parameters(source).items()}
    scale = _latent_scale(source)
    return workload_of(name, plan, transformer, scale, components, call_defaults(source.path), asked)


def workload_of(
    name: str,
    plan: ModelPlan,
    transformer: Any,
    scale: int,
    components: Mapping[str, int],
    advised: Mapping[str, Any],
    asked: Asked,
) -> Workload:
    """The workload of a request to a transformer.

    Args:
        name: What to call the model.
        plan: Its plan.
        transformer: It, with or without weights.
        scale: Pixels to a pixel of its latent.
        components: Bytes of the text encoders and the VAE.
        advised: Its usual call.
        asked: The request.

    Raises:
        UnsupportedModel: The model makes clips.
        ValueError: The size is no whole number of tokens.
    """
    if plan.makes_clips:
        raise UnsupportedModel(
            f"{plan.model} makes clips, which the planner does not know yet: give a layout, such as pipefusion=2"
        )
    height = asked.height or advised.get("height") or USUAL_SIZE
    width = asked.width or advised.get("width") or USUAL_SIZE
    blocks = _blocks(transformer, plan)
    sizes = {key: value.numel() for key, value in transformer.state_dict().items()}
    return Workload(
        model=name,
        blocks=blocks,
        heads=plan.heads(transformer),
        rows=_rows(scale, plan, transformer, height, width),
        text=asked.text_tokens or _text(plan, advised),
        joint=plan.joint,
        branches=2 if _guided(plan, advised, asked) else 1,
        guidance=plan.guidance,
        steps=asked.steps or advised.get("num_inference_steps") or USUAL_STEPS,
        pictures=asked.pictures,
        itemsize=asked.itemsize,
        embedders=sum(sizes.values()) - sum(block.parameters for block in blocks),
        components=components,
        height=height,
        pixels=height * width,
        transformer=plan.model,
        tensor=tensor_plan(transformer, plan) is not None,
        transformers=2 if plan.beside else 1,
    )


def _text(plan: ModelPlan, advised: Mapping[str, Any]) -> int:
    usual = USUAL_TEXT.get(plan.model, 512)
    return advised.get("max_sequence_length") or usual


def _guided(plan: ModelPlan, advised: Mapping[str, Any], asked: Asked) -> bool:
    """FLUX has its guidance distilled into one branch, unless ``true_cfg_scale`` asks for two."""
    if plan.beside or asked.guidance is not None:
        return bool(plan.beside or asked.guidance)
    if plan.model == "FluxTransformer2DModel" or "true_cfg_scale" in advised:
        return advised.get("true_cfg_scale", 1.0) > 1
    return advised.get("guidance_scale", 2.0) > 1


def _rows(scale: int, plan: ModelPlan, transformer: Any, height: int, width: int) -> Raster:
    patch = TOKEN if PACKED in plan.grid.axes else plan.grid.spans_of(transformer)["h"]
    pixels = scale * patch
    if height % pixels or width % pixels:
        raise ValueError(f"{height}×{width} pixels are no multiple of the {pixels} that make a token of {plan.model}")
    return Raster(height // pixels, width // pixels, patch)


def _latent_scale(source: PipelineFolder) -> int:
    """Pixels to a pixel of the latent, as the pipelines of the supported classes work it out."""
    entry = source.index.get("vae")
    if not entry or not entry[1]:
        return 8
    config = source.config("vae")
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or config.get("dim_mult")
    return prod([2] * (len(levels) - 1)) if levels else 8


def _blocks(model: nn.Module, plan: ModelPlan) -> tuple[Block, ...]:
    known: dict[Block, Block] = {}  # equal blocks are one, so that what is worked out of one serves all
    found = [_block(model, plan, place) for place in plan.blocks_of(model)]
    return tuple(known.setdefault(block, block) for block in found)


def _block(model: nn.Module, plan: ModelPlan, place: BlockPlace) -> Block:
    width = plan.width(model)
    split = {one.name.removeprefix(f"{place.name}."): one.dim for one in split_linears(model, plan, place)}
    matrices = []
    for name, module in place.block.named_modules():
        once = name.startswith((*place.listing.per_call, *place.listing.per_request))
        if isinstance(module, nn.Linear) and not once:
            stream = place.serves(name)
            sizes = module.in_features, module.out_features
            matrices.append(Matrix(*sizes, stream, summed=split.get(name) == INPUTS, split=name in split))
    attentions = [
        Attention(_kind(mixed), attention_width(layer))
        for path, mixed in place.listing.attention.items()
        if (layer := getattr(place.block, path, None)) is not None
    ]
    parameters = sum(value.numel() for value in place.block.state_dict().values())
    return Block(type(place.block).__name__, width, tuple(matrices), tuple(attentions), parameters)


def _kind(mixed: tuple[str, ...]) -> AttentionKind:
    return "cross" if not mixed else "joint" if TEXT in mixed else "image"


def check_runnable(workload: Workload) -> None:
    """Refuses a workload that can be planned but not run.

    Raises:
        UnsupportedModel: No plan describes its class.
    """
    if not workload.runnable:
        raise UnsupportedModel(
            f"{workload.transformer} has no plan yet, so {workload.model} can be planned but not run: see "
            f"docs/adding-a-model.md"
        )
