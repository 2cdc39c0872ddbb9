"""The vocabulary for a model's blocks: whose rows their arguments have, and which layers mix rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from patchpipe.models import usual
from patchpipe.models.latent import IMAGE, PREFIX, TEXT

CROSS = ()  # the rows of an attention layer whose keys and values no patch changes


@dataclass(frozen=True)
class Holds:
    """Whose rows a tensor has.

    Args:
        segments: In their order. ``"image"`` is the picture that is painted, ``"reference"`` pictures that follow it in
            the latent, of which every patch takes as many; any other name, such as ``"text"``, is of rows that ride
            with the first, or are spread over some.
        dim: Their dim.
        ndim: Dims the tensor must have, where the model gives a tensor without rows in its place too.
    """

    segments: tuple[str, ...]
    dim: int = 1
    ndim: int | None = None


def of(*segments: str, dim: int = 1, ndim: int | None = None) -> Holds:
    """Says that a tensor has the rows of these segments; see ``Holds``."""
    return Holds(segments, dim, ndim)


@dataclass(frozen=True)
class BlockList:
    """One ``ModuleList`` of blocks that run one after the other.

    Args:
        attention: The segments that each attention module of a block mixes, in their order; ``CROSS`` where it takes
            its keys and values from the text alone.
        path: Name of the list in the model.
        count: Field of the model's configuration that tells how many blocks it has, or has an entry for each.
        streams: Arguments a block takes *and* returns, in the order it returns them. A block that returns a lone tensor
            has one stream.
        rows: Whose rows each argument has; for a tuple of tensors a tuple, with ``None`` for what goes in whole. Of
            streams, ``encoder_hidden_states`` has the text's and any other the picture's unless it is said here.
            Other arguments that are not named go in whole.
        asking: The segments that ask in a module, where they are not those that answer: a clip asks its sound, and a
            text that no block changes asks nothing.
        mask: Argument that masks keys of those layers where it is a tensor, or has one. Patches without its rows get
            ``None``. If it is not among ``rows``, it stays whole, and may mask by query and key.
        masks_queries: Whether layers make a mask of queries by keys out of one of rows. Only keys matter then: what a
            masked query comes to is nothing that any key shows.
        drops_masked: Whether layers attend to the entries of the batch one by one, with the masked rows left out. They
            are given a mask of nothing, and keys are masked where they are kept, so that all entries have as many.
        never_empty: Arguments that a block cannot take without rows, since it slices them off the end (``[:, :-0]`` is
            nothing). A patch that has none of them is given a row of zeros, which attention leaves out.
        sums: Linear attention layers: they need of other rows the sum of their keys' and values' products.
        borders: 3×3 convolutions over the picture's rows: they need the rows next to the patch.
        row_counts: Arguments that say how many rows the picture has.
        whole_between: Whether the root changes streams between these blocks, as by adding rows of text for each. They
            are then put back into the whole after every block.
        links: Arguments that are a stream as an earlier block of the list returned it. It goes from stage to stage with
            the streams, up to the block that takes it.
        emits: What a block returns before its streams, which the root keeps and adds to those of a later list: rows
            like its first stream's. It goes from stage to stage likewise, to the last block.
        passes: Arguments a block takes and does not return, though blocks of a later list begin with them.
        left_out_by: Input of the model with the places of those of these blocks that a call leaves out. The root is not
            given it: it calls all blocks, and these hand their streams through.
        counts: Arguments that say how many of the picture's tokens, from its first on, are special, such as those of
            a given first frame. A patch is told how many of them it has.
        cache: Argument with the block's part of what a pipeline keeps of its first call, see ``plan.Prefix``; of a dict
            with a dot and the key. Rows of the prefix stand before those of the picture in whatever has these.
        text_parameters: Parts of parameter names that serve the text stream alone. Where no parameter of a block has
            one of them, and a stream has rows of text, its matrices serve both.
        per_call: Modules of a block whose result is the same for every patch of a call, such as modulation. A block
            may lack them.
        per_request: Modules of a block whose result follows from these inputs of the call alone.
    """

    attention: Mapping[str, tuple[str, ...]]
    path: str = "transformer_blocks"
    count: str = "num_layers"
    streams: tuple[str, ...] = ("hidden_states",)
    rows: Mapping[str, Holds | tuple[Holds | None, ...]] = field(default_factory=dict)
    asking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mask: str | None = None
    masks_queries: bool = False
    drops_masked: bool = False
    never_empty: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    borders: tuple[str, ...] = ()
    row_counts: tuple[str, ...] = ()
    whole_between: bool = False
    links: tuple[str, ...] = ()
    emits: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    left_out_by: str = ""
    counts: tuple[str, ...] = ()
    cache: str = ""
    text_parameters: tuple[str, ...] = usual.TEXT_PARAMETERS
    per_call: tuple[str, ...] = usual.BLOCK_TIME
    per_request: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        streams = {name: of(TEXT if name == "encoder_hidden_states" else IMAGE) for name in self.streams}
        rows = {**streams, **self.rows}
        if self.cache:
            object.__setattr__(self, "attention", {path: _prefixed(held) for path, held in self.attention.items()})
            rows = {name: _with_prefix(held) for name, held in rows.items()}
        object.__setattr__(self, "rows", rows)

    @property
    def special(self) -> bool:
        """Whether rows meet in more than one attention a layer, or blocks are given and return more than streams."""
        meets = self.drops_masked or self.never_empty or self.asking or self.sums or self.borders
        return bool(meets or self.emits or self.links or self.whole_between)

    @property
    def segments_never_empty(self) -> tuple[str, ...]:
        """The segments that always have a row."""
        return tuple(segment for name in self.never_empty for segment in self.stream_rows(name).segments)

    def stream_rows(self, name: str) -> Holds:
        """Whose rows a stream has."""
        held = self.rows[name]
        assert isinstance(held, Holds)
        return held


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
    def self_attention(self) -> dict[str, tuple[str, ...]]:
        """The segments of each of its layers whose keys and values the patches change, by path."""
        listed = self.listing.attention.items()
        return {path: mixed for path, mixed in listed if mixed and part_of(self.block, path) is not None}

    def left_out(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call of the model with these inputs leaves it out."""
        given = inputs.get(self.listing.left_out_by)
        return given is not None and self.index in given

    def layer(self, path: str) -> str:
        """The name in the model of one of its layers."""
        return f"{self.name}.{path}"

    def serves(self, parameter: str) -> Literal["image", "text", "both"]:
        """Whose rows a matrix of the block is applied to, by its name in the block."""
        if not any(TEXT in self.listing.stream_rows(name).segments for name in self.listing.streams):
            return "image"
        if not any(self._of_text(name) for name, _ in self.block.named_parameters()):
            return "both"
        return "text" if self._of_text(parameter) else "image"

    def _of_text(self, parameter: str) -> bool:
        return any(part in f"{parameter}." for part in self.listing.text_parameters)


def part_of(block: nn.Module, path: str) -> nn.Module | None:
    """A module of a block, if the block has it; attributes that hold ``None`` count as absent."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def attention_width(layer: Any) -> int:
    """Channels of all heads of an attention module, whatever its projections are called or fused with."""
    query = getattr(layer, "to_q", None) or getattr(layer, "to_query", None)
    return layer.inner_dim if query is None else query.out_features


def _prefixed(segments: tuple[str, ...]) -> tuple[str, ...]:
    """Segments with the prefix before the picture."""
    if PREFIX in segments or IMAGE not in segments:
        return segments
    at = segments.index(IMAGE)
    return (*segments[:at], PREFIX, *segments[at:])


def _with_prefix(held: Holds | tuple[Holds | None, ...]) -> Holds | tuple[Holds | None, ...]:
    if isinstance(held, Holds):
        return replace(held, segments=_prefixed(held.segments))
    return tuple(each and replace(each, segments=_prefixed(each.segments)) for each in held)
