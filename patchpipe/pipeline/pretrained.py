"""Loads of a pipeline only what this rank owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import nn

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.joining import device_for, meet, settle
from patchpipe.distributed.mesh import Group
from patchpipe.layout.split import StageBlocks
from patchpipe.layout.text import HOST, LAYERS
from patchpipe.loading.checkpoint import Checkpoint
from patchpipe.loading.dtypes import as_torch, default_dtype, dtype_name, dtype_of, one_dtype
from patchpipe.loading.encoders.placing import LayeredEncoder, layered_encoders
from patchpipe.loading.folder import BUILDING, PipelineFolder
from patchpipe.loading.options import HUB
from patchpipe.loading.owned import dtypes_of, move_around, needs, owned_names, within_blocks
from patchpipe.loading.quantised import Quantiser, check_recipe, without_tensor
from patchpipe.loading.schedulers import build_scheduler
from patchpipe.models import transformers_of
from patchpipe.models.plan import ModelPlan
from patchpipe.models.relies import check_relied_on
from patchpipe.offload.weights import Stored
from patchpipe.parallel.tensor import Slice, check_tensor
from patchpipe.pipeline.apply import attach, check_offload, fit, parts_of
from patchpipe.recipes.adapters import encoders_of
from patchpipe.stage.balance import split_blocks

Dtype: TypeAlias = torch.dtype | str | Mapping[str, torch.dtype | str] | None


def from_pretrained(
    model: str | Path,
    config: ParallelConfig | AutoLayout | None = None,
    *,
    dtype: Dtype = None,
    torch_dtype: Dtype = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    group: Group | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a diffusers pipeline spread over the ranks of this process's group.

    Every rank calls it alike, for example in a script under ``torchrun``. A rank reads its own blocks and the
    shared embedders, and of split matrices its own slice alone; text encoders live where ``config.text_rank`` says,
    the VAE on ``config.output_rank``.

    Args:
        model: A folder in diffusers format, or a hub id.
        config: The layout; ``None`` takes the planner's for the ranks there are, an ``AutoLayout`` says more of what is
            wanted of it.
        dtype: ``torch.bfloat16`` or its name, or one for each component by name as in diffusers. ``None`` takes the
            checkpoint's own; on a CPU, which has no units for half precision, float32 in its place.
        torch_dtype: The older name of the same.
        device: Where this rank computes; ``None`` takes its CUDA device, else the CPU.
        variant: File variant such as ``"fp16"``.
        group: The ranks; ``None`` joins those ``torchrun`` started.
        kwargs: Further options of diffusers' ``from_pretrained`` (``revision``, ``cache_dir``, ``token`` and the others
            of the hub, ``quantization_config``), and components such as ``scheduler``, which may be a name such as
            ``"heun"``. A ``transformer`` that is given stays in memory whole, as with ``parallelize``. ``pipeline``
            takes another pipeline class for the same weights, by itself or by name; ``task`` the one that diffusers'
            AutoPipeline knows for ``"image-to-image"``, ``"inpainting"`` or ``"text-to-image"``.

    Returns:
        The ordinary diffusers pipeline. Called as ever, it gives the images on the output rank and ``None`` on
        the others.

    Raises:
        UnsupportedModel: The transformer's class has no plan.
        ValueError: The layout does not fit the model or the ranks, or the ranks disagree.
        TypeError: There is no such option.
        FileNotFoundError: The model or a part of it is missing.
    """
    place = group.device if group is not None else device_for(device)
    layout, store = settle(config, group, partial(_choose, model, dtype or torch_dtype, place.type, kwargs))
    found, problem = attempt(lambda: _Found.at(model, layout, one_dtype(dtype, torch_dtype), variant, kwargs, place))
    group = meet(layout, group, device, found.about if found else {}, problem, store)
    assert found is not None
    try:
        return _load(found, layout, group)
    except Exception as error:
        group.failures.report(f"{type(error).__name__}: {error}")
        group.close()  # peers that have loaded theirs must not wait for the deadline
        raise


def _choose(
    model: str | Path, dtype: Dtype, kind: str, options: Mapping[str, Any], auto: AutoLayout, ranks: int
) -> ParallelConfig:
    """The planner's layout of so many ranks."""
    from patchpipe.planner.choosing import layout_for_ranks, workload_of_folder  # heavy, and needed here alone

    names = one_dtype(dtype, None)
    name = None if names is None else dtype_name(dtype_of("transformer", as_torch(names)))
    hub = {name: value for name, value in options.items() if name in HUB and value is not None}
    if options.get("quantization_config") is not None:
        auto = without_tensor(auto)
    return layout_for_ranks(auto, workload_of_folder(model, name, kind, auto, **hub), kind, ranks)


def _load(found: _Found, config: ParallelConfig, group: Group) -> Any:
    """Reads this rank's part and attaches it to the pipeline."""
    source, models = found.source, [one.model for one in found.transformers]
    kind = source.pipeline_class
    parts_held = parts_of(models, found.plan, found.stages, group)
    stored: dict[int, dict[str, Stored]] = {}
    for transformer, part in zip(found.transformers, parts_held, strict=True):
        if transformer.checkpoint is not None:
            slices = {} if part is None else part.slices
            stored[id(transformer.model)] = _read(found, transformer, transformer.checkpoint, config, group, slices)
            _finish(transformer.model, group.device)
    alone = group.rank == config.encoder_rank() or not hasattr(kind, "encode_prompt")
    mine = found.encoders if alone or config.text_rank == LAYERS else ()
    read = {one.name: one.read(config, group.rank) for one in mine}
    others = source.other_parts(partial(_elsewhere, config, group), found.dtype, group.device, read)
    parts = {**others, **found.options, **{one.name: one.model for one in found.transformers}}
    with BUILDING:
        pipe = kind.from_pretrained(source.path, dtype=found.dtype, **parts)
    hosted = encoders_of(pipe).values() if config.text_rank == HOST else ()
    _place(pipe, group, [*hosted, *([] if config.offload is None else models)])
    if config.offload is not None:
        for model in models:
            move_around(model, found.plan, group.device)
    attach(pipe, config, group, found.stages, parts_held, stored)
    return pipe


def _elsewhere(config: ParallelConfig, group: Group, part: str) -> bool:
    """Whether another rank holds a text encoder or the VAE."""
    if part == "vae":
        return not (group.output or config.parallel_vae)
    return group.rank != config.encoder_rank(part)


def _read(
    found: _Found,
    transformer: _Transformer,
    checkpoint: Checkpoint,
    config: ParallelConfig,
    group: Group,
    slices: Mapping[str, Slice],
) -> dict[str, Stored]:
    """Reads what a rank owns; with offload, what the blocks are read from later stays in the files.

    Returns:
        Where weights lie that were not read.
    """
    model, plan, owned = transformer.model, found.plan, found.stages[group.stage].held
    within, around = within_blocks(model, plan), needs(model, plan, range(0))
    places: list[tuple[torch.device, Callable[[str], bool]]] = [(group.device, lambda _name: True)]
    if config.offload is not None:
        places = [(torch.device("cpu"), within), (group.device, around)]
    if transformer.quantiser is not None:
        needed, blocks = needs(model, plan, owned), [place.name for place in plan.blocks_of(model)]
        with BUILDING:
            for device, here in places:
                transformer.quantiser.fill(model, checkpoint, partial(_both, needed, here), blocks, device)
        return {}
    dtypes, names = dtypes_of(model, dtype_of(transformer.name, found.dtype)), owned_names(model, plan, owned)
    stay: set[str] = set()
    if config.offload is not None:
        stay = {name for name, _ in model.named_parameters() if within(name) and name not in slices}
    if config.offload is not None and config.offload.tier == "host":
        stay.intersection_update(checkpoint.as_stored(stay, dtypes))  # packed from there: ranks have one copy of them
    for device, here in places:
        checkpoint.fill(model, [name for name in names if here(name) and name not in stay], dtypes, device, slices)
    return checkpoint.map(model, [name for name in names if name in stay], dtypes)


def _both(first: Callable[[str], bool], second: Callable[[str], bool], name: str) -> bool:
    return first(name) and second(name)


@dataclass(frozen=True)
class _Transformer:
    """A transformer, and where its weights are.

    Attributes:
        name: Its name in the pipeline.
        model: The transformer, without weights unless it was given.
        checkpoint: Its weights; ``None`` where it was given.
        quantiser: Reads them where they are to be quantised.
    """

    name: str
    model: Any
    checkpoint: Checkpoint | None = None
    quantiser: Quantiser | None = None

    @classmethod
    def at(
        cls, name: str, source: PipelineFolder, dtype: torch.dtype, asked: Any, config: ParallelConfig
    ) -> _Transformer:
        """Finds one on disk."""
        settings, checkpoint = source.config(name), Checkpoint(source.path / name, source.variant)
        recipe = check_recipe(settings, asked, config, name)
        quantiser = Quantiser(settings, asked, dtype, name) if recipe else None
        model = source.build(name, quantiser.dtype if quantiser else dtype)
        return cls(name, model, checkpoint, quantiser)

    def prepare(self) -> None:
        """Readies it for weights that are to be quantised."""
        if self.quantiser is not None and self.checkpoint is not None:
            with BUILDING:
                self.quantiser.prepare(self.model, self.checkpoint)


@dataclass(frozen=True)
class _Found:
    """What a rank knows of a model before it meets the others.

    Attributes:
        source: The pipeline on disk.
        plan: The plan of its transformers.
        transformers: One, or several that take turns.
        stages: The blocks of every stage.
        dtype: What they are to be, or a dtype for each component.
        options: What the pipeline's own ``from_pretrained`` is to get.
        encoders: Text encoders that are read by layer.
    """

    source: PipelineFolder
    plan: ModelPlan
    transformers: tuple[_Transformer, ...]
    stages: list[StageBlocks]
    dtype: Any
    options: dict[str, Any]
    encoders: tuple[LayeredEncoder, ...] = ()

    @classmethod
    def at(
        cls,
        model: str | Path,
        config: ParallelConfig,
        dtype: str | dict[str, str] | None,
        variant: str | None,
        options: Mapping[str, Any],
        device: torch.device,
    ) -> _Found:
        """Finds the model and checks that the layout fits it."""
        source, read = PipelineFolder.locate(model, variant, options)
        told = dtype or default_dtype(source.path, variant, [device.type]) or "float32"
        wanted, rest = as_torch(told), read.for_pipeline
        if isinstance(rest.get("scheduler"), str):
            rest["scheduler"] = build_scheduler(rest["scheduler"], source.scheduler_settings(), source.pipeline_class)
        encoders = layered_encoders(source, config, wanted, device, rest.get, rest.get("quantization_config"))
        given = {name: rest.pop(name) for name in source.transformers if rest.get(name) is not None}
        if given:
            missing = sorted(set(source.transformers) - set(given))
            if missing:
                raise ValueError(f"from_pretrained was given {', '.join(given)} but not {', '.join(missing)}: give all")
            if config.offload is not None and config.offload.tier == "disk":
                raise ValueError("offload tier='disk' cannot read a transformer that is given: use tier='host'")
            pipe = SimpleNamespace(**given, components={})
            plan, stages = fit(pipe, transformers_of(pipe).values(), config)
            return cls(source, plan, tuple(starmap(_Transformer, given.items())), stages, wanted, rest, encoders)
        plan, asked = source.plan(), rest.get("quantization_config")
        found = [_Transformer.at(name, source, dtype_of(name, wanted), asked, config) for name in source.transformers]
        transformers_of(SimpleNamespace(**{one.name: one.model for one in found}))
        check_relied_on(plan, found[0].model)
        stages = split_blocks(found[0].model, plan, config)
        check_tensor(found[0].model, plan, config.tensor)
        if all(one.quantiser is None for one in found):
            check_offload(found[0].model, plan, stages, config, device)
        elif config.offload is not None and config.offload.tier == "disk":
            raise ValueError("offload tier='disk' reads weights as they are stored, unquantised: use tier='host'")
        for one in found:
            one.prepare()
        return cls(source, plan, tuple(found), stages, wanted, rest, encoders)

    @property
    def about(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        settings = {name: self.source.config(name) for name in self.source.transformers}
        return {"dtype": str(self.dtype), "model": self.plan.model, "model_config": settings}


def _finish(transformer: Any, device: torch.device) -> None:
    """What diffusers does after loading; computed buffers keep the dtype they were made with."""
    for module in transformer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    transformer.eval()


def _place(pipe: Any, group: Group, offloaded: Sequence[nn.Module]) -> None:
    for part in pipe.components.values():
        if any(part is model for model in offloaded):
            continue
        tensors = [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else []
        if any(tensor.device != group.device for tensor in tensors) and not any(tensor.is_meta for tensor in tensors):
            part.to(group.device)
