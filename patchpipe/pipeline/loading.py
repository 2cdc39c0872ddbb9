"""Loads of a pipeline only what this rank owns."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.joining import device_for, meet, settle
from patchpipe.distributed.mesh import Group
from patchpipe.errors import UnsupportedModel
from patchpipe.loading.checkpoint import Checkpoint
from patchpipe.loading.choice import choose_class, named
from patchpipe.loading.dtypes import as_torch, default_dtype, dtype_name, dtype_of, one_dtype
from patchpipe.loading.options import HUB, Options, read_options
from patchpipe.loading.quantised import Quantiser, check_recipe, without_tensor
from patchpipe.loading.schedulers import build_scheduler, scheduler_settings
from patchpipe.loading.source import fetch, resolve_source
from patchpipe.models import plan_for
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.tensor import Slice, check_tensor, tensor_part
from patchpipe.pipeline.apply import Attachment, fit
from patchpipe.stage.balance import StageBlocks, split_blocks

Dtype: TypeAlias = torch.dtype | str | Mapping[str, torch.dtype | str] | None
# What builds a model without weights changes torch for the whole process meanwhile: one thread at a time.
_BUILDING = threading.Lock()


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
        group.report_failure(f"{type(error).__name__}: {error}")
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
    parts = {**source.other_parts(config, group, found.dtype), **found.options, "transformer": transformer}
    with _BUILDING:
        pipe = source.pipeline_class.from_pretrained(source.path, dtype=found.dtype, **parts)
    _place(pipe, group)
    Attachment(pipe, config, group, found.stages, part).attach()
    return pipe


def _read(found: _Found, checkpoint: Checkpoint, group: Group, slices: Mapping[str, Slice]) -> None:
    transformer, plan, owned = found.transformer, found.plan, found.stages[group.stage].held
    if found.quantiser is not None:
        needed = needs(transformer, plan, owned, last=group.last)
        blocks = [place.name for place in plan.blocks_of(transformer)]
        with _BUILDING:
            found.quantiser.fill(transformer, checkpoint, needed, blocks, group.device)
        return
    names = owned_names(transformer, plan, owned, last=group.last)
    dtypes = dtypes_of(transformer, dtype_of("transformer", found.dtype))
    checkpoint.fill(transformer, names, dtypes, group.device, slices)


class PipelineFolder:
    """A pipeline on disk in diffusers format.

    Args:
        path: The folder with ``model_index.json``.
        variant: File variant of the weights.
        kind: The pipeline's class; ``None`` takes the one it was saved as.
    """

    def __init__(self, path: Path, variant: str | None = None, kind: type[Any] | None = None) -> None:
        self.path, self.variant, self._kind = path, variant, kind
        self.index: dict[str, Any] = json.loads((path / "model_index.json").read_text(encoding="utf-8"))

    @classmethod
    def locate(
        cls, model: str | Path, variant: str | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[PipelineFolder, Options]:
        """Finds a local folder, or fetches a hub id.

        Args:
            model: The folder, or the hub id.
            variant: File variant of the weights.
            options: Options of ``from_pretrained``.

        Returns:
            The pipeline, and the options read.

        Raises:
            TypeError: There is no such option.
            FileNotFoundError: There is no such folder, or the hub cannot be reached or knows no such model.
            ValueError: What is there is not a diffusers pipeline.
        """
        given, pipeline, task = named(options or {})
        source = resolve_source(model, **{name: value for name, value in given.items() if name in HUB})
        kind = choose_class(source.index, pipeline, task, given) if pipeline or task else None
        read = read_options(given, source.index, kind)
        return cls(fetch(source, variant, {**read.hub, **read.files, **read.load}), variant, kind), read

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline class."""
        return self._kind or choose_class(self.index)

    def plan(self) -> ModelPlan:
        """The plan of the pipeline's transformer.

        Raises:
            UnsupportedModel: There is none.
        """
        if not self.index.get("transformer") or not self.index["transformer"][1]:
            raise UnsupportedModel(
                f"{self.index['_class_name']} has no transformer: patchpipe spreads diffusion transformers only"
            )
        if self.index.get("transformer_2", [None, None])[1]:
            raise UnsupportedModel(f"{self.index['_class_name']} has two transformers, which no plan covers yet")
        plan = plan_for(self.index["transformer"][1])
        plan.check_settings(self.config("transformer"))
        return plan

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of one part."""
        path = self.path / part / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.path} lacks {part}/config.json: the download is incomplete, fetch the model again"
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def scheduler_settings(self) -> dict[str, Any]:
        """The configuration of the pipeline's own scheduler."""
        return scheduler_settings(self.path)

    def build(self, part: str, dtype: torch.dtype) -> Any:
        """A part without weights: parameters on ``meta``, computed buffers real."""
        library, name = self.index[part]
        with _BUILDING, _default_dtype(dtype), init_empty_weights(include_buffers=False):
            if library == "diffusers":
                kind = getattr(diffusers, name)
                return kind.from_config(self.config(part))
            kind = getattr(transformers, name)
            return kind(kind.config_class.from_pretrained(self.path / part))

    def other_parts(self, config: ParallelConfig, group: Group, dtype: Any) -> dict[str, Any]:
        """Stand-ins for text encoders and VAE where this rank does not hold them."""
        parts: dict[str, Any] = {}
        taken = inspect.signature(self.pipeline_class.__init__).parameters
        for part, entry in self.index.items():
            if not isinstance(entry, list) or not entry[1] or part not in taken:
                continue
            encodes = part.startswith("text_encoder") and hasattr(self.pipeline_class, "encode_prompt")
            decodes_elsewhere = part == "vae" and not (group.output or config.parallel_vae)
            if (encodes and group.rank != config.encoder_rank(part)) or decodes_elsewhere:
                own = dtype_of(part, dtype)
                parts[part] = self.build(part, own).to("meta", own)
        if self.variant and len(parts) < self._weighted():
            parts["variant"] = self.variant
        return parts

    def _weighted(self) -> int:
        return sum(part == "vae" or part.startswith("text_encoder") for part in self.index)


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
            with _BUILDING:
                quantiser.prepare(transformer, checkpoint)
        return cls(source, plan, transformer, stages, checkpoint, quantiser, wanted, rest)

    @property
    def about(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        settings = self.source.config("transformer")
        return {"dtype": str(self.dtype), "model": self.plan.model, "model_config": settings}


def owned_names(model: nn.Module, plan: ModelPlan, owned: range, *, last: bool) -> list[str]:
    """Names of the parameters and kept buffers a stage needs: its blocks, the embedders, and its head."""
    return list(filter(needs(model, plan, owned, last=last), model.state_dict()))


def needs(model: nn.Module, plan: ModelPlan, owned: range, *, last: bool) -> Callable[[str], bool]:
    """Whether a stage needs the parameter or buffer of a name."""
    skipped = [place.name for index, place in enumerate(plan.blocks_of(model)) if index not in owned]
    skipped += [] if last else list(plan.head)
    return lambda name: not any(name == part or name.startswith(part + ".") for part in skipped)


def dtypes_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every tensor; some classes ask to keep a few in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return {
        name: torch.float32 if any(part in name.split(".") for part in kept) else dtype for name in model.state_dict()
    }


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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)
