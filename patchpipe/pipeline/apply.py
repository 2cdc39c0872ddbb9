"""Attaches the patch pipeline to a diffusers pipeline, and takes it off again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.joining import meet, settle
from patchpipe.distributed.mesh import Group
from patchpipe.layout.split import StageBlocks
from patchpipe.layout.text import DISK, HOST
from patchpipe.loading.choice import check_served
from patchpipe.loading.encoders.hosting import check_hosted
from patchpipe.loading.quantised import check_in_memory, recipe_in_memory
from patchpipe.models import plan_for, settings_of, transformers_of
from patchpipe.models.matrix import check_tested, forecast_of
from patchpipe.models.plan import ModelPlan
from patchpipe.models.relies import check_relied_on
from patchpipe.offload.offload import Offload
from patchpipe.offload.weights import Stored
from patchpipe.parallel.refusals import check_special
from patchpipe.parallel.tensor import TensorPart, check_tensor, tensor_part
from patchpipe.pipeline.attachment import Attachment
from patchpipe.pipeline.modular.steps import is_modular
from patchpipe.recipes.adapters import encoders_of
from patchpipe.recipes.checks import check_recipes
from patchpipe.stage.balance import split_blocks


def parallelize(pipe: Any, config: ParallelConfig | AutoLayout | None = None, *, group: Group | None = None) -> Any:
    """Spreads a pipeline that is already in memory over the ranks of this process's group.

    Every rank calls it with the same pipeline. Call the pipeline as ever afterwards: the output rank gets the
    images, the others ``None``. Parameters other ranks own, and matrices split over ranks, stay in memory whole, so
    that ``restore`` can give the pipeline back; ``from_pretrained`` reads only what a rank owns.

    Args:
        pipe: A diffusers pipeline whose transformer has a plan.
        config: The layout; ``None`` takes the planner's for the ranks there are, an ``AutoLayout`` says more of what is
            wanted of it.
        group: The ranks; ``None`` joins those ``torchrun`` started.

    Returns:
        The same pipeline.

    Raises:
        UnsupportedModel: The transformer's class has no plan.
        ValueError: The layout does not fit the model or the ranks, or the ranks disagree.
    """
    held: Attachment | None = getattr(pipe, "patchpipe", None)
    if held is not None and getattr(pipe, "transformer", None) in held.runner.models:
        raise ValueError("the pipeline is already parallel: call patchpipe.restore(pipe) first")
    if getattr(pipe, "transformer", None) is None:
        why = "patchpipe spreads diffusion transformers only"
        if is_modular(pipe):
            why = "load its components first, with pipe.load_components() or pipe.update_components(transformer=…)"
        raise ValueError(f"{type(pipe).__name__} has no transformer: {why}")
    check_served(pipe)
    if held is not None:
        held.release()  # it only shares an encoder or the VAE with another
    models = transformers_of(pipe)
    first = models["transformer"]
    layout, store = settle(config, group, partial(_choose, pipe))
    device = _device_of(pipe)
    fitted, problem = attempt(lambda: _fit_in_memory(pipe, models.values(), layout, device))
    about = {"model": type(first).__name__, "model_config": settings_of(first), "transformers": sorted(models)}
    group = meet(layout, group, device, about, problem, store)
    assert fitted is not None
    plan, split = fitted
    attach(pipe, layout, group, split, parts_of(models.values(), plan, split, group), {})
    return pipe


def attach(
    pipe: Any,
    config: ParallelConfig,
    group: Group,
    split: Sequence[StageBlocks],
    parts: Sequence[TensorPart | None],
    stored: Mapping[int, Mapping[str, Stored]],
) -> None:
    """Gives a pipeline that fits its layout its parallel side.

    Args:
        pipe: The pipeline.
        config: The layout.
        group: The ranks.
        split: The blocks of every stage.
        parts: This rank's part of the matrices of each transformer, where they are split.
        stored: Where the parameters of each transformer lie on disk, by the transformer's id.
    """
    offload = _offload_for(pipe, config, group, stored)
    forecast = forecast_of(plan_for(pipe.transformer).model, config.forecast)
    Attachment(pipe, replace(config, forecast=forecast), group, split, parts, offload).attach()


def _offload_for(
    pipe: Any, config: ParallelConfig, group: Group, stored: Mapping[int, Mapping[str, Stored]]
) -> Offload | None:
    """What moves the blocks' weights of a pipeline; ``None`` where all of them stay on the device."""
    if config.offload is None:
        return None
    from patchpipe.planner.means import means_for  # heavy, and needed here alone

    return Offload(config, group, means_for(pipe, config, group.device, stored), len(transformers_of(pipe)))


def parts_of(
    models: Iterable[nn.Module], plan: ModelPlan, split: Sequence[StageBlocks], group: Group
) -> list[TensorPart | None]:
    """This rank's part of the matrices of each transformer; ``None`` where they are not split."""
    held, at = split[group.stage].held, group.mesh.at("tensor")
    return [tensor_part(model, plan, held, at, group.config.tensor) for model in models]


def _choose(pipe: Any, auto: AutoLayout, ranks: int) -> ParallelConfig:
    """The planner's layout of so many ranks."""
    from patchpipe.planner.choosing import layout_for_ranks, workload_of_pipeline  # heavy, and needed here alone

    return layout_for_ranks(auto, workload_of_pipeline(pipe, auto), _device_of(pipe).type, ranks)


def fit(pipe: Any, models: Iterable[nn.Module], config: ParallelConfig) -> tuple[ModelPlan, list[StageBlocks]]:
    """The plan of models in memory and each stage's blocks, if the layout fits them and what was done to them."""
    for model in models:
        plan = plan_for(model)
        check_recipes(pipe, config, model)
        check_in_memory(model, config)
        check_relied_on(plan, model)
        stages = split_blocks(model, plan, config)
        check_tensor(model, plan, config.tensor)
        check_special(plan, config)
        if recipe_in_memory(model) is not None:
            check_tested(plan.model, "quantised", "a transformer with quantised weights", "load the weights whole")
    return plan, stages


def _fit_in_memory(
    pipe: Any, models: Iterable[nn.Module], config: ParallelConfig, device: torch.device
) -> tuple[ModelPlan, list[StageBlocks]]:
    if config.offload is not None and config.offload.tier == "disk":
        raise ValueError("offload tier='disk' reads the model's files each time: use from_pretrained, or tier='host'")
    if config.text_rank == DISK:
        raise ValueError(
            'text_rank="disk" reads the encoders\' files each time: use from_pretrained, "host" or "layers"'
        )
    if config.text_rank == HOST:
        for name, part in encoders_of(pipe).items():
            check_hosted(name, part)
    plan, stages = fit(pipe, models, config)
    check_offload(next(iter(models)), plan, stages, config, device)
    return plan, stages


def check_offload(
    model: nn.Module, plan: ModelPlan, stages: Sequence[StageBlocks], config: ParallelConfig, device: torch.device
) -> None:
    """Refuses a memory for weights that come and go which is too small, before any rank waits for another.

    Raises:
        ValueError: It is; says what it would take.
    """
    if config.offload is not None:
        from patchpipe.planner.means import check_memory  # heavy, and needed here alone

        check_memory(model, plan, stages, config, device)


def restore(pipe: Any) -> Any:
    """Undoes ``parallelize``; the pipeline is again what it was, and so are all that share its weights.

    Raises:
        ValueError: The pipeline is not parallel.
    """
    attachment = getattr(pipe, "patchpipe", None)
    if attachment is None:
        raise ValueError("the pipeline is not parallel")
    attachment.detach()
    return pipe


def _device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes, which is not where weights are that are moved there group by group."""
    return torch.device(pipe._execution_device)
