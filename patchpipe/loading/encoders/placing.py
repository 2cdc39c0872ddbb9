"""The text encoders of a pipeline on disk, each rank with its layers of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from patchpipe.config import ParallelConfig
from patchpipe.layout.text import DISK, HOST, LAYERS, from_the_last
from patchpipe.loading.checkpoint import ENCODER_STEM, Checkpoint
from patchpipe.loading.dtypes import dtype_of
from patchpipe.loading.encoders.layers import Layers
from patchpipe.loading.encoders.reading import EncoderReader
from patchpipe.loading.folder import BUILDING, PipelineFolder, is_component
from patchpipe.loading.quantised import of_component

MOVABLE = ("torchao", "quanto")  # libraries whose tensors can be taken apart and put together


@dataclass(frozen=True)
class LayeredEncoder:
    """An encoder of which layers are read, before any is.

    Attributes:
        name: Its name in the pipeline.
        model: The encoder, without weights.
        layers: What it consists of.
        reader: Reads modules of it.
    """

    name: str
    model: Any
    layers: Layers
    reader: EncoderReader

    def read(self, config: ParallelConfig, rank: int) -> Any:
        """The encoder with what the rank holds of it."""
        homes = self.layers.homes(from_the_last(config.world_size, config.output_rank))
        held = [name for name, home in homes.items() if home == rank and config.text_rank == LAYERS]
        self.reader.hold(held, self.layers.names)
        if config.text_rank == DISK:
            self.reader.stream(self.layers.names)
        return self.model


def layered_encoders(
    source: PipelineFolder,
    config: ParallelConfig,
    dtype: Any,
    device: torch.device,
    given: Callable[[str], Any],
    asked: Any,
) -> tuple[LayeredEncoder, ...]:
    """Takes the encoders of a pipeline apart, where the layout asks for it.

    Args:
        source: The pipeline.
        config: The layout.
        dtype: What they are to be, or a dtype for each component.
        device: Where this rank computes.
        given: A component that is given in place of the pipeline's own, by name; or ``None``.
        asked: The ``quantization_config``.

    Raises:
        ValueError: One of them cannot be taken apart.
        FileNotFoundError: Its weights are missing.
    """
    names = [name for name in _names(source) if given(name) is None]
    if config.text_rank == HOST:
        for name in names:
            _check_hosted(source, name, dtype, asked)
    if config.text_rank not in (LAYERS, DISK):
        return ()
    return tuple(_one(source, name, dtype, device, asked, config) for name in names)


def _names(source: PipelineFolder) -> Iterable[str]:
    return [name for name, entry in source.index.items() if is_component(entry) and name.startswith("text_encoder")]


def _check_hosted(source: PipelineFolder, name: str, dtype: Any, asked: Any) -> None:
    """Refuses an encoder that cannot come from host memory, before any is read."""
    Layers.of(source.build(name, dtype_of(name, dtype)))
    stored, recipe = source.config(name).get("quantization_config"), of_component(asked, name)
    method = stored.get("quant_method") if stored else getattr(recipe, "quant_method", None)
    told = str(getattr(method, "value", method))
    if method is not None and told not in MOVABLE:
        raise ValueError(
            f'text_rank="host" cannot move weights quantised with {told}, as {name} has them: quantise it with '
            f"{' or '.join(MOVABLE)}, or give text_rank a rank"
        )


def _one(
    source: PipelineFolder, name: str, dtype: Any, device: torch.device, asked: Any, config: ParallelConfig
) -> LayeredEncoder:
    own, told = dtype_of(name, dtype), f'text_rank="{config.text_rank}"'
    if source.index[name][0] != "transformers":
        raise ValueError(f"{told} is for encoders of transformers, and {name} is none: give text_rank a rank")
    if source.config(name).get("quantization_config") or of_component(asked, name) is not None:
        raise ValueError(f"{told} reads whole weights, and {name} is quantised: give text_rank a rank")
    model = source.build(name, own)
    with BUILDING:  # meanwhile a parameter that is set would become another one
        model.tie_weights()
    layers = Layers.of(model)
    reader = EncoderReader(model, Checkpoint(source.path / name, source.variant, ENCODER_STEM), own, device)
    return LayeredEncoder(name, model, layers, reader)
