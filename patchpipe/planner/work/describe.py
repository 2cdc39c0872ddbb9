"""What a model consists of and what each rank would hold, worked out without reading weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.layout.axes import Mesh
from patchpipe.layout.split import StageBlocks, shared_blocks
from patchpipe.layout.text import DISK, HOST, LAYERS, from_the_last
from patchpipe.layout.volume import Volume
from patchpipe.loading.checkpoint import Checkpoint
from patchpipe.loading.encoders.layers import Layers, parameters
from patchpipe.loading.folder import PipelineFolder, is_component
from patchpipe.loading.owned import needs
from patchpipe.loading.quantised import check_recipe
from patchpipe.models.blocks import BlockPlace
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.tensor import INPUTS, check_tensor, split_linears
from patchpipe.stage.balance import split_blocks


@dataclass(frozen=True)
class StageInfo:
    """What one rank holds.

    Attributes:
        rank: The rank.
        blocks: Its blocks, for people.
        parameters: Parameters of its part of the transformer and of its components.
        bytes: Their size as stored.
        components: The components it holds, for people: their names, and which layers of a text encoder.
    """

    rank: int
    blocks: str
    parameters: int
    bytes: int
    components: list[str]


@dataclass(frozen=True)
class ModelInfo:
    """What a model consists of.

    Attributes:
        pipeline_class: The diffusers pipeline.
        transformer_class: Its transformer.
        parameters: Parameters of the transformer.
        dtype: How the transformer's weights are stored.
        block_lists: Name, number of blocks, class and parameters of each list of blocks.
        stages: What each rank holds.
        plan: What the plan says, in a line.
    """

    pipeline_class: str
    transformer_class: str
    parameters: int
    dtype: str
    block_lists: list[tuple[str, int, str, int]]
    stages: list[StageInfo]
    plan: str


def describe_model(
    model: str | Path, config: ParallelConfig, variant: str | None = None, revision: str | None = None
) -> ModelInfo:
    """Describes a model folder or hub id under a layout.

    Raises:
        UnsupportedModel: The transformer's class has no plan.
        ValueError: The layout does not fit the model.
        FileNotFoundError: The model or a part of it is missing.
    """
    source, _ = PipelineFolder.locate(model, variant, {"revision": revision})
    plan = source.plan()
    transformer = source.build("transformer", torch.float32)
    checkpoint = Checkpoint(source.path / "transformer", variant)
    dtype, recipe = checkpoint.dtype(), check_recipe(source.config("transformer"), None, config)
    stored = checkpoint.sizes() if recipe else {}
    return ModelInfo(
        pipeline_class=source.index["_class_name"],
        transformer_class=plan.model,
        parameters=parameters(transformer),
        dtype=str(dtype).removeprefix("torch.") + (f", quantised by {recipe}" if recipe else ""),
        block_lists=[_block_list(transformer, listing.path) for listing in plan.blocks],
        stages=_stages(source, transformer, plan, config, dtype.itemsize, stored),
        plan=describe_plan(plan),
    )


def describe_plan(plan: ModelPlan) -> str:
    """What a plan says, in a line: how text enters and what attention sees."""
    kinds = [
        f"{path} {' and '.join(mixed) or 'text by itself'}"
        for listing in plan.blocks
        for path, mixed in listing.attention.items()
    ]
    text = "text goes with the first patch" if plan.joint else "text by cross-attention"
    return f"{text} · attention: {', '.join(dict.fromkeys(kinds))}"


def _stages(
    source: PipelineFolder,
    transformer: nn.Module,
    plan: ModelPlan,
    config: ParallelConfig,
    itemsize: int,
    stored: Mapping[str, int],
) -> list[StageInfo]:
    """What every rank holds; ``stored`` has the bytes of tensors that are quantised."""
    places, stages = plan.blocks_of(transformer), []
    sizes = {name: value.numel() for name, value in transformer.state_dict().items()}
    parts, count = _components(source), len(source.transformers)
    split = split_blocks(transformer, plan, config)
    check_tensor(transformer, plan, config.tensor)
    for rank in range(config.world_size):
        stage = Mesh(config.mesh_shape, rank).at("pipe")
        owned = split[stage]
        needed = needs(transformer, plan, owned.held)
        held = dict(_held(part, model, config, rank) for part, model in parts.items())
        held.pop("", None)
        own, others = count * _sum(sizes, needed), sum(held.values())
        weights = count * _sum(stored, needed) if stored else own * itemsize
        blocks = _blocks(places, owned)
        stages.append(StageInfo(rank, blocks, own + others, weights + others * itemsize, list(held)))
    return stages


def _sum(sizes: Mapping[str, int], needed: Callable[[str], bool]) -> int:
    return sum(size for name, size in sizes.items() if needed(name))


def _blocks(places: list[BlockPlace], owned: StageBlocks) -> str:
    """For example ``transformer_blocks 4…6; 3…6 for the second half of a batch``."""
    if owned.halves:
        first, second = (_ranges([places[index] for index in owned.of(half)]) for half in range(2))
        return first if first == second else f"{first}; {second} for the second half of a batch"
    shares = ((owned.start, 1 - owned.start.share), (owned.stop, owned.stop.share))
    parts = [f"{_ranges([places[side.block]])} for {share:.0%} of the patches" for side, share in shares if side.share]
    return "; ".join([_ranges([places[index] for index in owned.held]), *parts])


def _ranges(places: list[BlockPlace]) -> str:
    """For example ``transformer_blocks 16…18, single_transformer_blocks 0…5``."""
    indices: dict[str, list[int]] = {}
    for place in places:
        indices.setdefault(place.listing.path, []).append(place.index)
    spans = {path: f"{found[0]}…{found[-1]}" if len(found) > 1 else str(found[0]) for path, found in indices.items()}
    return ", ".join(f"{path} {span}" for path, span in spans.items())


def _held(part: str, model: nn.Module, config: ParallelConfig, rank: int) -> tuple[str, int]:
    """What a rank holds of a component, in words, and its parameters; no words where it holds nothing."""
    if part == "vae":
        here = rank == config.output_rank or config.parallel_vae
    elif config.text_rank == LAYERS:
        return _held_layers(part, Layers.of(model), from_the_last(config.world_size, config.output_rank), rank)
    else:
        here = rank == config.encoder_rank(part)
        words = {HOST: "in host memory", DISK: "one layer at a time"}
        if here and config.text_rank in words:
            return f"{part} ({words[config.text_rank]})", 0
    return (part, parameters(model)) if here else ("", 0)


def _held_layers(part: str, layers: Layers, order: list[int], rank: int) -> tuple[str, int]:
    own = dict(zip(order, layers.parts(len(order)), strict=False)).get(rank)
    if own is None:
        return "", 0
    more = " and what surrounds them" if rank == order[0] else ""
    return f"{part} layers {own[0]}…{own[-1]}{more}", layers.held(order)[rank]


def _components(source: PipelineFolder) -> dict[str, nn.Module]:
    """The VAE and every text encoder, without weights."""
    parts = [
        part
        for part, entry in source.index.items()
        if is_component(entry) and (part == "vae" or part.startswith("text_encoder"))
    ]
    return {part: source.build(part, torch.float32) for part in parts}


def component_parameters(source: PipelineFolder) -> dict[str, int]:
    """Parameters of the VAE and of every text encoder."""
    return {part: parameters(model) for part, model in _components(source).items()}


def _block_list(model: nn.Module, path: str) -> tuple[str, int, str, int]:
    blocks: Any = model.get_submodule(path)
    kind = type(blocks[0]).__name__ if len(blocks) else "none"
    return path, len(blocks), kind, parameters(blocks)


def volume_of(
    model: str | Path, config: ParallelConfig, image_tokens: int, text_tokens: int, revision: str | None = None
) -> Volume:
    """What a step of a model works on, for ``traffic``.

    Raises:
        UnsupportedModel: The transformer's class has no plan.
        ValueError: The layout does not fit the model.
        FileNotFoundError: The model or a part of it is missing.
    """
    source, _ = PipelineFolder.locate(model, options={"revision": revision})
    plan = source.plan()
    transformer = source.build("transformer", torch.float32)
    split = split_blocks(transformer, plan, config)
    check_tensor(transformer, plan, config.tensor)
    dtype = Checkpoint(source.path / "transformer").dtype()
    joint, width, places = text_tokens if plan.joint else 0, plan.width(transformer), plan.blocks_of(transformer)
    attended = [_attended(place, image_tokens, joint) for place in places]
    return Volume(
        tokens=image_tokens + joint,
        width=width,
        attended=sum(attended),
        shared=sum(attended[index] for index in shared_blocks(split)),
        summed=sum(_summed(transformer, plan, place, image_tokens, joint) for place in places),
        itemsize=dtype.itemsize,
    )


def _attended(place: BlockPlace, image: int, text: int) -> int:
    """Rows of a block's self-attention layers."""
    return sum(image + (text if len(mixed) > 1 else 0) for mixed in place.self_attention.values())


def _summed(model: nn.Module, plan: ModelPlan, place: BlockPlace, image: int, text: int) -> int:
    """Rows of the sums that end a block's split matrices."""
    served = {"image": image, "text": text, "both": image + text}
    splits = (split for split in split_linears(model, plan, place) if split.dim == INPUTS)
    return sum(served[place.serves(split.name.removeprefix(f"{place.name}."))] for split in splits)
