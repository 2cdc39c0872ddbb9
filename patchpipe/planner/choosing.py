"""Finds out what a layout is to be chosen for, the model and the request, and chooses it."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.demo import call_defaults
from patchpipe.errors import UnsupportedModel
from patchpipe.models import names_transformer, plan_for
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.refusals import guided
from patchpipe.planner.automatic import Taken, one_device, take
from patchpipe.planner.machine.here import profile_of
from patchpipe.planner.machine.named import read_machine
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.search import Wishes, search
from patchpipe.planner.work.named import Asked, check_runnable, read_folder, workload_for, workload_of
from patchpipe.planner.work.presets import preset_named
from patchpipe.planner.work.workload import Workload

logger = logging.getLogger("patchpipe")


def best_config(
    model: str | Path,
    devices: int,
    device: str | None,
    link: str | None,
    profile: Profile | str | Path | None,
    wishes: dict[str, Any],
    asked: dict[str, Any],
) -> ParallelConfig:
    """See ``ParallelConfig.auto``."""
    machine = read_machine(device, link, profile)
    return search(workload_for(model, Asked(**asked)), devices, machine, Wishes(**wishes)).best.config


def layout_for_model(
    auto: AutoLayout, model: str | Path, devices: Sequence[str], cores: int, dtype: str | None = None, **hub: Any
) -> Taken:
    """A layout of a model that is not loaded, for the devices of this host.

    Args:
        auto: What is asked for.
        model: A folder in diffusers format, or a hub id.
        devices: The devices there are.
        cores: Cores of this host.
        dtype: In which the model is loaded; ``None`` takes what is usual on the devices.
        **hub: ``revision`` and the like, for a hub id.
    """
    if len(devices) == 1:
        return one_device(auto, "there is one device")
    profile = partial(_profile, devices, cores)
    try:
        workload = _workload_of_folder(auto, model, dtype or profile(1).dtype, hub)
    except (UnsupportedModel, FileNotFoundError, ValueError) as error:
        return one_device(auto, _one_line(error))
    if not workload.runnable:
        return one_device(auto, f"{workload.transformer} has no plan")
    return take(auto, workload, len(devices), profile)


def layout_for_ranks(auto: AutoLayout, workload: Workload, kind: str, ranks: int) -> ParallelConfig:
    """A layout for ranks that a launcher has started, each of which must get its part.

    Args:
        auto: What is asked for.
        workload: The request.
        kind: ``"cuda"`` or ``"cpu"``.
        ranks: Ranks of all hosts.

    Raises:
        UnsupportedModel: The model has no plan.
        ValueError: No layout has so many ranks.
    """
    check_runnable(workload)
    here = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    cards = max(1, torch.cuda.device_count()) if kind == "cuda" else 1
    devices = [kind if kind == "cpu" else f"cuda:{rank % cards}" for rank in range(here)]

    def profile(count: int) -> Profile:
        return profile_of(devices[:count], os.cpu_count() or 1, 1 if count <= here else -(-ranks // here))

    taken = take(auto, workload, ranks, profile, all_devices=True)
    assert taken.config is not None
    logger.info("layout: %s (%s)", taken.config.describe(), taken.why)
    return taken.config


def workload_of_pipeline(pipe: Any, auto: AutoLayout) -> Workload:
    """The request of a pipeline that is in memory."""
    model: nn.Module = pipe.transformer
    plan = plan_for(model)
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    request = {**call_defaults(name), **auto.request}
    parts = {
        part: value
        for part, value in pipe.components.items()
        if isinstance(value, nn.Module) and not names_transformer(part)
    }
    sizes = {part: sum(one.numel() * one.element_size() for one in value.parameters()) for part, value in parts.items()}
    dtype = {torch.float32: "fp32", torch.float16: "fp16"}.get(next(model.parameters()).dtype, "bf16")
    asked = _asked(request, _guided(type(pipe), plan, request), dtype)
    return workload_of(name, plan, model, int(getattr(pipe, "vae_scale_factor", 8)), sizes, request, asked)


def workload_of_folder(model: str | Path, dtype: str | None, kind: str, auto: AutoLayout, **hub: Any) -> Workload:
    """The request of a pipeline on disk or on the hub, for devices of this kind."""
    return _workload_of_folder(auto, model, dtype or ("fp32" if kind == "cpu" else "bf16"), hub)


def _profile(devices: Sequence[str], cores: int, count: int) -> Profile:
    return profile_of(devices[:count], cores)


def _workload_of_folder(auto: AutoLayout, model: str | Path, dtype: str, hub: Mapping[str, Any]) -> Workload:
    if not Path(model).is_dir() and preset_named(str(model)) is not None:  # known without a download
        return workload_for(model, _asked(auto.request, _strength(auto.request), dtype))
    source = read_folder(model, **hub)
    request = {**call_defaults(source.path), **auto.request}
    return workload_for(source.path, _asked(request, _guided(source.pipeline_class, source.plan(), request), dtype))


def _asked(request: Mapping[str, Any], guidance: bool | None, dtype: str) -> Asked:
    named = {"height": "height", "width": "width", "steps": "num_inference_steps"}
    sizes = {name: value for name, key in named.items() if isinstance(value := request.get(key), int)}
    return Asked(**sizes, guidance=guidance, dtype=dtype)


def _strength(request: Mapping[str, Any]) -> bool | None:
    """Whether there is guidance, of a model whose pipeline class is not known here."""
    scale = request.get("true_cfg_scale")
    return scale > 1 if isinstance(scale, (int, float)) else None


def _guided(pipeline_class: Any, plan: ModelPlan, request: Mapping[str, Any]) -> bool | None:
    """Whether a call with these arguments has two branches of guidance; ``None`` where nothing is known of the call."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    strength = "true_cfg_scale" if plan.guidance == "calls" else "guidance_scale"
    if not request or strength not in parameters:
        return None
    defaults = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
    return guided({**defaults, **request}, plan)


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
