"""Loads of a pipeline only what this rank owns."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from patchpipe.agreement import attempt
from patchpipe.apply import Attachment
from patchpipe.balance import StageBlocks, split_blocks
from patchpipe.checkpoint import Checkpoint
from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.errors import UnsupportedModel
from patchpipe.joining import meet, settle
from patchpipe.mesh import Group
from patchpipe.models import plan_for
from patchpipe.models.plan import ModelPlan
from patchpipe.source import Source, resolve_source
from patchpipe.tensor import check_tensor, tensor_part

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
# What builds a model without weights changes torch for the whole process meanwhile: one thread at a time.
_BUILDING = threading.Lock()


def from_pretrained(
    model: str | Path,
    config: ParallelConfig | AutoLayout | None = None,
    *,
    dtype: torch.dtype | str | None = None,
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
        dtype: ``torch.bfloat16`` or its name; ``None`` takes float32, as diffusers does.
        device: Where this rank computes; ``None`` takes its CUDA device, else the CPU.
        variant: File variant such as ``"fp16"``.
        group: The ranks; ``None`` joins those ``torchrun`` started.
        kwargs: Components or options for the pipeline's own ``from_pretrained``, such as ``scheduler``.

    Returns:
        The ordinary diffusers pipeline. Called as ever, it gives the images on the output rank and ``None`` on
        the others.

    Raises:
        UnsupportedModel: The transformer's class has no plan.
        ValueError: The layout does not fit the model or the ranks, or the ranks disagree.
        FileNotFoundError: The model or a part of it is missing.
    """
    layout, store = settle(config, group, partial(_choose, model, dtype, device))
    found, problem = attempt(lambda: _Found.at(model, layout, dtype, variant))
    group = meet(layout, group, device, found.about if found else {}, problem, store)
    assert found is not None
    try:
        return _load(found, layout, group, kwargs)
    except Exception as error:
        group.report_failure(f"{type(error).__name__}: {error}")
        group.close()  # peers that have loaded theirs must not wait for the deadline
        raise


def _choose(
    model: str | Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    auto: AutoLayout,
    ranks: int,
) -> ParallelConfig:
    """The planner's layout of so many ranks."""
    from patchpipe.planner.choosing import layout_for_ranks, workload_of_folder  # heavy, and needed here alone

    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    name = None if dtype is None else str(as_dtype(dtype)).removeprefix("torch.")
    return layout_for_ranks(auto, workload_of_folder(model, name, kind, auto), kind, ranks)


def _load(found: _Found, config: ParallelConfig, group: Group, options: dict[str, Any]) -> Any:
    """Reads this rank's part and attaches it to the pipeline."""
    source, transformer, wanted, owned = found.source, found.transformer, found.dtype, found.stages[group.stage]
    names = owned_names(transformer, found.plan, owned.held, last=group.last)
    part = tensor_part(transformer, found.plan, owned.held, group.mesh.at("tensor"), config.tensor)
    slices = part.slices if part is not None else {}
    found.checkpoint.fill(transformer, names, dtypes_of(transformer, wanted), group.device, slices)
    _finish(transformer, group.device)
    parts = {"transformer": transformer, **source.other_parts(config, group, wanted), **options}
    with _BUILDING:
        pipe = source.pipeline_class.from_pretrained(source.path, dtype=wanted, **parts)
    _place(pipe, group)
    Attachment(pipe, config, group, found.stages, part).attach()
    return pipe


class PipelineFolder:
    """A pipeline on disk in diffusers format.

    Args:
        path: The folder with ``model_index.json``.
        variant: File variant of the weights.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path, self.variant = path, variant
        self.index: dict[str, Any] = json.loads((path / "model_index.json").read_text())

    @classmethod
    def locate(cls, model: str | Path, variant: str | None = None) -> PipelineFolder:
        """Finds a local folder, or fetches a hub id.

        Raises:
            FileNotFoundError: There is no such folder, or the hub cannot be reached or knows no such model.
            ValueError: What is there is not a diffusers pipeline.
        """
        source = resolve_source(model)
        folder = Path(source.path)
        return cls(folder if folder.is_dir() else _fetch(source, variant), variant)

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline class."""
        name = self.index["_class_name"]
        found = getattr(diffusers, name, None)
        if found is None:
            raise UnsupportedModel(f"this diffusers ({diffusers.__version__}) has no pipeline class {name}: upgrade it")
        return found

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
        return json.loads(path.read_text())

    def build(self, part: str, dtype: torch.dtype) -> Any:
        """A part without weights: parameters on ``meta``, computed buffers real."""
        library, name = self.index[part]
        with _BUILDING, _default_dtype(dtype), init_empty_weights(include_buffers=False):
            if library == "diffusers":
                kind = getattr(diffusers, name)
                return kind.from_config(self.config(part))
            kind = getattr(transformers, name)
            return kind(kind.config_class.from_pretrained(self.path / part))

    def other_parts(self, config: ParallelConfig, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        """Stand-ins for text encoders and VAE where this rank does not hold them."""
        parts: dict[str, Any] = {}
        for part, entry in self.index.items():
            if not isinstance(entry, list) or not entry[1]:
                continue
            encodes = part.startswith("text_encoder") and hasattr(self.pipeline_class, "encode_prompt")
            decodes_elsewhere = part == "vae" and not (group.output or config.parallel_vae)
            if (encodes and group.rank != config.encoder_rank(part)) or decodes_elsewhere:
                parts[part] = self.build(part, dtype).to("meta", dtype)
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
        transformer: The transformer, without weights.
        stages: The blocks of every stage.
        checkpoint: Its weights.
        dtype: What they are to be.
    """

    source: PipelineFolder
    plan: ModelPlan
    transformer: Any
    stages: list[StageBlocks]
    checkpoint: Checkpoint
    dtype: torch.dtype

    @classmethod
    def at(
        cls, model: str | Path, config: ParallelConfig, dtype: torch.dtype | str | None, variant: str | None
    ) -> _Found:
        """Finds the model and checks that the layout fits it."""
        wanted, source = as_dtype(dtype), PipelineFolder.locate(model, variant)
        plan, transformer = source.plan(), source.build("transformer", wanted)
        stages = split_blocks(transformer, plan, config)
        check_tensor(transformer, plan, config.tensor)
        checkpoint = Checkpoint(source.path / "transformer", variant)
        return cls(source, plan, transformer, stages, checkpoint, wanted)

    @property
    def about(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        settings = self.source.config("transformer")
        return {"dtype": str(self.dtype), "model": self.plan.model, "model_config": settings}


def owned_names(model: nn.Module, plan: ModelPlan, owned: range, *, last: bool) -> list[str]:
    """Names of the parameters and kept buffers a stage needs: its blocks, the embedders, and its head."""
    skipped = [place.name for index, place in enumerate(plan.blocks_of(model)) if index not in owned]
    skipped += [] if last else list(plan.head)

    def needed(name: str) -> bool:
        return not any(name == part or name.startswith(part + ".") for part in skipped)

    return [name for name in model.state_dict() if needed(name)]


def dtypes_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every tensor; some classes ask to keep a few in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return {
        name: torch.float32 if any(part in name.split(".") for part in kept) else dtype for name in model.state_dict()
    }


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype from its name.

    Raises:
        ValueError: The name is unknown.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return DTYPES[dtype.lower().removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}") from None


def _finish(transformer: Any, device: torch.device) -> None:
    """What diffusers does after loading; computed buffers keep the dtype they were made with."""
    for module in transformer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    transformer.requires_grad_(False).eval()


def _place(pipe: Any, group: Group) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and not any(tensor.is_meta for tensor in part.parameters()):
            part.to(group.device)


def _fetch(source: Source, variant: str | None) -> Path:
    try:
        found = diffusers.DiffusionPipeline.download(source.path, variant=variant, local_files_only=source.offline)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{source.path} could not be fetched from the hub: {reason}") from error
    return Path(found)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)
