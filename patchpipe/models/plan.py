"""The vocabulary in which a transformer class is described to the patch pipeline.

A plan is data about a diffusers class: which inputs hold image rows, how the text enters, which module
lists are the blocks, what a block takes and returns, and which attention layers mix image tokens. The
engine runs the class's own ``forward``; nothing of it is copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models.lora import SCALE

AttentionKind = Literal["joint", "image", "cross"]
RowKind = Literal["text", "image"]
TEXT_ROWS = "text rows"  # no input can be named so


@dataclass(frozen=True)
class Rows:
    """How the latent of one call divides into rows of tokens.

    Attributes:
        count: Token rows in the picture.
        tokens: Image tokens in one row.
        units: Entries of the latent's cut dim in one row.
    """

    count: int
    tokens: int
    units: int


class Grid(Protocol):
    """Where the image tokens lie in the latent a transformer takes."""

    @property
    def dim(self) -> int:
        """The latent's dim that is cut."""
        ...

    def rows(self, model: nn.Module, latent_shape: torch.Size, inputs: Mapping[str, Any]) -> Rows:
        """Token rows of a latent of ``latent_shape``."""
        ...

    def output_shape(self, model: nn.Module, latent_shape: torch.Size) -> torch.Size:
        """Shape of the noise prediction for a latent of ``latent_shape``."""
        ...


@dataclass(frozen=True)
class PackedTokens:
    """A latent ``[batch, tokens, channels]`` in raster order, its rows told by position ids.

    Args:
        ids: The input with one position per image token, ``[tokens, axes]``.
        column: The axis of the ids that counts rows.
    """

    ids: str = "img_ids"
    column: int = 1
    dim: int = 1

    def rows(self, model: nn.Module, latent_shape: torch.Size, inputs: Mapping[str, Any]) -> Rows:
        """Token rows, read off the ids.

        Raises:
            ValueError: The ids do not form rows of one length in raster order.
        """
        ids = inputs[self.ids]
        ids = ids[0] if ids.ndim == 3 else ids
        column = ids[:, self.column].tolist()
        width = next((i for i, row in enumerate(column) if row != column[0]), len(column))
        count = len(column) // width
        raster = all(len(set(column[r * width : (r + 1) * width])) == 1 for r in range(count))
        if count * width != latent_shape[self.dim] or not raster:
            raise ValueError(
                f"{self.ids} does not describe one picture in raster order ({len(column)} positions, "
                f"{latent_shape[self.dim]} tokens): pictures joined to the latent as references are not supported"
            )
        return Rows(count=count, tokens=width, units=width)

    def output_shape(self, model: nn.Module, latent_shape: torch.Size) -> torch.Size:
        """``[batch, tokens, patch_size² · out_channels]``."""
        return _packed_shape(model, latent_shape)


@dataclass(frozen=True)
class PackedShapes:
    """A latent ``[batch, tokens, channels]`` in raster order, its rows told by the sizes of its pictures.

    Args:
        shapes: The input with a list of pictures for each entry of the batch, a picture being
            ``(frames, rows, columns)`` in tokens.
    """

    shapes: str = "img_shapes"
    dim: int = 1

    def rows(self, model: nn.Module, latent_shape: torch.Size, inputs: Mapping[str, Any]) -> Rows:
        """Token rows, read off the first entry's picture.

        Raises:
            ValueError: The entries differ, or are not one picture of one frame as large as the latent.
        """
        entries = [entry if isinstance(entry, list) else [entry] for entry in inputs[self.shapes]]
        if any(entry != entries[0] for entry in entries) or len(entries[0]) != 1:
            raise ValueError(
                f"{self.shapes}={inputs[self.shapes]} does not describe pictures of one size, each alone: pictures "
                f"joined to the latent as references or layers are not supported"
            )
        frames, count, width = entries[0][0]
        if frames != 1 or count * width != latent_shape[self.dim]:
            raise ValueError(
                f"{self.shapes} describes {frames} × {count} × {width} tokens but the latent has "
                f"{latent_shape[self.dim]}: pictures of one frame are supported, and nothing joined to them"
            )
        return Rows(count=count, tokens=width, units=width)

    def output_shape(self, model: nn.Module, latent_shape: torch.Size) -> torch.Size:
        """``[batch, tokens, patch_size² · out_channels]``."""
        return _packed_shape(model, latent_shape)


def _packed_shape(model: nn.Module, latent_shape: torch.Size) -> torch.Size:
    channels = model.config.patch_size**2 * model.out_channels
    return torch.Size((*latent_shape[:-1], channels))


@dataclass(frozen=True)
class ImageRows:
    """A latent ``[batch, channels, height, width]``, patchified by the model itself."""

    dim: int = 2

    def rows(self, model: nn.Module, latent_shape: torch.Size, inputs: Mapping[str, Any]) -> Rows:
        """Token rows: latent rows over the patch size.

        Raises:
            ValueError: The latent is no multiple of the patch size.
        """
        size = model.config.patch_size
        height, width = latent_shape[-2:]
        if height % size or width % size:
            raise ValueError(f"a latent of {height}×{width} is no multiple of the model's patch size {size}")
        return Rows(count=height // size, tokens=width // size, units=size)

    def output_shape(self, model: nn.Module, latent_shape: torch.Size) -> torch.Size:
        """``[batch, out_channels, height, width]``."""
        return torch.Size((latent_shape[0], model.out_channels, *latent_shape[2:]))


@dataclass(frozen=True)
class BlockList:
    """One ``ModuleList`` of blocks that run one after the other.

    Args:
        path: Name of the list in the model.
        count: Field of the model's configuration that tells how many blocks it has.
        streams: Arguments a block takes *and* returns, in the order it returns them. A block that
            returns a lone tensor has one stream.
        attention: Kind of each attention module in a block: ``"joint"`` holds text and image rows,
            ``"image"`` only image rows, ``"cross"`` takes its keys and values from the text alone.
        text_first: Whether text rows come before image rows in the joint attention.
        text_parameters: Parts of parameter names that serve the text stream alone.
        conditioning: Modules of a block whose result is the same for every patch of a call, such as modulation.
        constant: Modules of a block whose result follows from these inputs of the call alone.
    """

    path: str
    count: str
    streams: tuple[str, ...]
    attention: Mapping[str, AttentionKind]
    text_first: bool = True
    text_parameters: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()
    constant: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SlicedResult:
    """A module that works out something for every row of the call, such as rotary embeddings from sizes.

    It is computed once for the whole picture and prompt, and each patch is given its rows.

    Args:
        arguments: Arguments that must be those of the whole call: the name of an input, or ``TEXT_ROWS`` for the
            number of text rows. All others must be the same for every patch.
        rows: Whose rows each tensor of the result has, in the order they are returned.
        dim: Their dim.
    """

    arguments: Mapping[str, str]
    rows: tuple[RowKind, ...]
    dim: int = 0


@dataclass(frozen=True)
class ModelPlan:
    """Everything the engine knows of one transformer class.

    Args:
        model: Name of the diffusers class.
        grid: Where the image tokens lie in the latent.
        blocks: The block lists in the order the model runs them.
        cut_inputs: Further inputs with one row per image token, and the dim of the rows.
        text_inputs: Inputs with one row per text token, and the dim of the rows. They ride with patch 0;
            the other patches carry no text rows. Empty for models that only cross-attend to text.
        text_mask: Input ``[batch, text rows]`` that tells which text rows to attend to, ``None`` for all; every joint
            attention layer must mask these keys alike. Patches without text rows are given ``None``.
        shared_inputs: Inputs every patch takes whole.
        ignored_inputs: Inputs that change nothing here when empty; any other input is refused. They may hold the
            strength of LoRA, as ``scale``.
        embed: Module that turns the latent into tokens: the first stage's own.
        head: Modules and parameters after the blocks: the last stage's own.
        conditioning: Modules whose result is the same for every patch of a call.
        constant: Modules whose result follows from these inputs and the patch alone: computed once a request.
        sliced: Modules whose result covers the whole call, of which a patch takes its rows.
        refused_settings: Fields of the configuration that must be off, since nothing tests them.
        patch_embed: Module that adds positions it works out from the shape it sees, if there is one.
        unbatched_inputs: Inputs without a batch dim.
        guidance: Whether pipelines of this class guide by two calls a step or by one batch of both branches.
        tensor: How the Linears of the blocks split under tensor parallelism, as in diffusers' ``_tp_plan``: by glob,
            ``"colwise"`` or ``"rowwise"``. ``"class"`` takes the class's own; ``None`` covers none.
        pipelines: Pipeline classes that are tested; docs/pipelines.md says how.
        latent: Name of the latent input.
        text: Name of the input that identifies the prompt, which tells guidance branches apart.
    """

    model: str
    grid: Grid
    blocks: tuple[BlockList, ...]
    embed: str
    head: tuple[str, ...]
    cut_inputs: Mapping[str, int] = field(default_factory=dict)
    text_inputs: Mapping[str, int] = field(default_factory=dict)
    text_mask: str | None = None
    shared_inputs: tuple[str, ...] = ()
    ignored_inputs: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()
    constant: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sliced: Mapping[str, SlicedResult] = field(default_factory=dict)
    refused_settings: tuple[str, ...] = ()
    patch_embed: str | None = None
    unbatched_inputs: tuple[str, ...] = ()
    guidance: Literal["calls", "batch"] = "batch"
    tensor: Mapping[str, Any] | Literal["class"] | None = None
    pipelines: tuple[str, ...] = ()
    latent: str = "hidden_states"
    text: str = "encoder_hidden_states"

    def bind(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, refusing what the plan does not cover.

        Args:
            signature: Of the class's ``forward``, ``self`` included.
            args: The call's positional arguments.
            kwargs: The call's named arguments.

        Raises:
            ValueError: An input is set that was never tested under a patch pipeline.
        """
        bound = signature.bind(None, *args, **kwargs).arguments
        inputs = {name: value for name, value in bound.items() if name != "self"}
        known = {self.latent, *self.cut_inputs, *self.text_inputs, *self.shared_inputs, self.text_mask, "return_dict"}
        for name, value in inputs.items():
            if name not in known and not self._ignorable(name, value):
                raise ValueError(
                    f"{self.model} was called with {name}, which patchpipe has not been tested with and "
                    f"refuses rather than risk a wrong picture: leave it out, or run the pipeline on one device"
                )
        return inputs

    def _ignorable(self, name: str, value: Any) -> bool:
        if value is None or value is False:
            return True
        if name not in self.ignored_inputs or not isinstance(value, dict):
            return False
        given = {key: inner for key, inner in value.items() if inner is not None}
        return set(given) <= {SCALE} and all(isinstance(inner, (int, float)) for inner in given.values())

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuses a model of the class that is configured in a way nothing tests.

        Args:
            settings: Its configuration.

        Raises:
            UnsupportedModel: A field is on that must be off.
        """
        found = [name for name in self.refused_settings if settings.get(name)]
        if found:
            raise UnsupportedModel(
                f"{self.model} with {', '.join(f'{name}={settings[name]}' for name in found)} has not been tested and "
                f"is refused rather than risk a wrong picture: run the pipeline on one device"
            )

    def masks_text(self, inputs: Mapping[str, Any]) -> bool:
        """Whether joint attention masks some keys in a call; the same on every rank."""
        return self.text_mask is not None and inputs.get(self.text_mask) is not None

    def width(self, model: nn.Module) -> int:
        """Channels of the tokens between blocks."""
        return model.config.num_attention_heads * model.config.attention_head_dim

    def text_rows(self, inputs: Mapping[str, Any]) -> int:
        """Text rows that take part in joint attention."""
        if self.text not in self.text_inputs:
            return 0
        return inputs[self.text].shape[self.text_inputs[self.text]]

    def blocks_of(self, model: nn.Module) -> list[BlockPlace]:
        """Every block of the model in running order."""
        return [
            BlockPlace(listing, index, block)
            for listing in self.blocks
            for index, block in enumerate(model.get_submodule(listing.path))
        ]


@dataclass(frozen=True)
class BlockPlace:
    """One block and where it stands."""

    listing: BlockList
    index: int
    block: nn.Module

    @property
    def name(self) -> str:
        """Its name in the model."""
        return f"{self.listing.path}.{self.index}"

    @property
    def self_attention(self) -> dict[str, str]:
        """The kind, joint or image, of each of its layers whose keys and values the patches change, by path."""
        listed = self.listing.attention.items()
        return {path: kind for path, kind in listed if kind != "cross" and getattr(self.block, path, None) is not None}

    def layer(self, path: str) -> str:
        """The name in the model of one of its layers."""
        return f"{self.name}.{path}"
