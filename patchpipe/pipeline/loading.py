"""Loads of a pipeline only what this rank owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import nn

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.joining import device_for, meet, settle
from patchpipe.distributed.mesh import Group
from patchpipe.loading.checkpoint import Checkpoint
from patchpipe.loading.dtypes import as_torch, default_dtype, dtype_name, dtype_of, one_dtype
from patchpipe.loading.folder import BUILDING, PipelineFolder
from patchpipe.loading.options import HUB
from patchpipe.loading.owned import dtypes_of, needs, owned_names
from patchpipe.loading.quantised import Quantiser, check_recipe, without_tensor
from patchpipe.loading.schedulers import build_scheduler
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.tensor import Slice, check_tensor, tensor_part
from patchpipe.pipeline.apply import fit
from patchpipe.pipeline.attachment import Attachment
from patchpipe.stage.balance import StageBlocks, split_blocks

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
    source, transformer, owned = found.source, found.transformer, found.stages[group.stage]
    part = tensor_part(transformer, found.plan, owned.held, group.mesh.at("tensor"), config.tensor)
    if found.checkpoint is not None:
        _read(found, found.checkpoint, group, {} if part is None else part.slices)
        _finish(transformer, group.device)
    others = source.other_parts(partial(_elsewhere, config, group), found.dtype, group.device)
    parts = {**others, **found.options, "transformer": transformer}
    with BUILDING:
        pipe = source.pipeline_class.from_pretrained(source.path, dtype=found.dtype, **parts)
    _place(pipe, group)
    Attachment(pipe, config, group, found.stages, part).attach()
    return pipe


def _elsewhere(config: ParallelConfig, group: Group, part: str) -> bool:
    """Whether another rank holds a text encoder or the VAE."""
    if part == "vae":
        return not (group.output or config.parallel_vae)
    return group.rank != config.encoder_rank(part)


def _read(found: _Found, checkpoint: Checkpoint, group: Group, slices: Mapping[str, Slice]) -> None:
    transformer, plan, owned = found.transformer, found.plan, found.stages[group.stage].held
    if found.quantiser is not None:
        needed = needs(transformer, plan, owned)
        blocks = [place.name for place in plan.blocks_of(transformer)]
        with BUILDING:
            found.quantiser.fill(transformer, checkpoint, needed, blocks, group.device)
        return
    names = owned_names(transformer, plan, owned)
    dtypes = dtypes_of(transformer, dtype_of("transformer", found.dtype))
    checkpoint.fill(transformer, names, dtypes, group.device, slices)


@dataclass(frozen=True)
class _Found:
    """What a rank knows of a model before it meets the others.

    Attributes:
        source: The pipeline on disk.
        plan: The plan of its transformer.
        transformer: The transformer, without weights unless it was given.
        stages: The blocks of every stage.
        checkpoint: Its weights; ``None`` where it was given.
        quantiser: Reads them where they are to be quantised.
        dtype: What they are to be, or a dtype for each component.
        options: What the pipeline's own ``from_pretrained`` is to get.
    """

    source: PipelineFolder
    plan: ModelPlan
    transformer: Any
    stages: list[StageBlocks]
    checkpoint: Checkpoint | None
    quantiser: Quantiser | None
    dtype: Any
    options: dict[str, Any]

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
        given = rest.pop("transformer", None)
        if given is not None:
            plan, stages = fit(SimpleNamespace(transformer=given, components={}), given, config)
            return cls(source, plan, given, stages, None, None, wanted, rest)
        plan, settings, own = source.plan(), source.config("transformer"), dtype_of("transformer", wanted)
        asked, checkpoint = rest.get("quantization_config"), Checkpoint(source.path / "transformer", variant)
        quantiser = Quantiser(settings, asked, own) if check_recipe(settings, asked, config) else None
        transformer = source.build("transformer", quantiser.dtype if quantiser else own)
        stages = split_blocks(transformer, plan, config)
        check_tensor(transformer, plan, config.tensor)
        if quantiser is not None:
            with BUILDING:
                quantiser.prepare(transformer, checkpoint)
        return cls(source, plan, transformer, stages, checkpoint, quantiser, wanted, rest)

    @property
    def about(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        settings = self.source.config("transformer")
        return {"dtype": str(self.dtype), "model": self.plan.model, "model_config": settings}


def _finish(transformer: Any, device: torch.device) -> None:
    """What diffusers does after loading; computed buffers keep the dtype they were made with."""
    for module in transformer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    transformer.requires_grad_(False).eval()


def _place(pipe: Any, group: Group) -> None:
    for part in pipe.components.values():
        tensors = [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else []
        if any(tensor.device != group.device for tensor in tensors) and not any(tensor.is_meta for tensor in tensors):
            part.to(group.device)
