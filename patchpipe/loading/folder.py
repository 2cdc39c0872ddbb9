"""A pipeline on disk in diffusers format: its class, its plan, and its parts without weights."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from patchpipe.errors import UnsupportedModel
from patchpipe.loading.absent import without_weights
from patchpipe.loading.checkpoint import Checkpoint
from patchpipe.loading.choice import choose_class, named
from patchpipe.loading.dtypes import dtype_of
from patchpipe.loading.options import HUB, Options, read_options
from patchpipe.loading.schedulers import scheduler_settings
from patchpipe.loading.source import fetch, resolve_source
from patchpipe.models import names_transformer, plan_for
from patchpipe.models.plan import ModelPlan

# What builds a model without weights changes torch for the whole process meanwhile: one thread at a time.
BUILDING = threading.Lock()


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
        plan = plan_for(self.index["transformer"][1])
        for name in self.transformers:
            plan.check_settings(self.config(name))
        return plan

    @property
    def transformers(self) -> list[str]:
        """Names of its transformers: one, or several that take turns over the steps."""
        entries = {name: entry for name, entry in self.index.items() if is_component(entry)}
        return list(filter(names_transformer, entries))

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
        with BUILDING, _default_dtype(dtype), init_empty_weights(include_buffers=False):
            if library == "diffusers":
                kind = getattr(diffusers, name)
                return kind.from_config(self.config(part))
            kind = getattr(transformers, name)
            config = kind.config_class.from_pretrained(self.path / part)
            for one in (config, *(getattr(config, inner, None) for inner in getattr(config, "sub_configs", ()))):
                if one is not None:
                    one.dtype = dtype  # that of models within the model, as transformers has it when it loads one
            return kind(config)

    def other_parts(
        self, elsewhere: Callable[[str], bool], dtype: Any, device: torch.device, read: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Text encoders that have been read, and stand-ins for those and the VAE that are not wanted here.

        Args:
            elsewhere: Whether a part of a name is held somewhere else.
            dtype: What they are to be, or a dtype for each component.
            device: Where this rank computes.
            read: Parts that have been read, by name.

        Raises:
            FileNotFoundError: A stand-in needs values that its part's checkpoint lacks.
        """
        parts: dict[str, Any] = dict(read)
        taken = inspect.signature(self.pipeline_class.__init__).parameters
        for part, entry in self.index.items():
            if not is_component(entry) or part not in taken or part in read:
                continue
            encodes = part.startswith("text_encoder") and hasattr(self.pipeline_class, "encode_prompt")
            if (encodes or part == "vae") and elsewhere(part):
                own = dtype_of(part, dtype)
                weights = partial(Checkpoint, self.path / part, self.variant) if part == "vae" else None
                parts[part] = without_weights(self.build(part, own), own, device, weights)
        if self.variant and len(parts) < self._weighted():
            parts["variant"] = self.variant
        return parts

    def _weighted(self) -> int:
        parts = [part for part, entry in self.index.items() if is_component(entry)]
        return sum(part == "vae" or part.startswith("text_encoder") for part in parts)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


def is_component(entry: Any) -> bool:
    """Whether an entry of ``model_index.json`` names a part that is there, and not a setting that is a list too."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) and name for name in entry)
