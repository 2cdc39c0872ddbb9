"""The vocabulary in which a transformer class is described to the patch pipeline.

A plan is data about a diffusers class: how its latent is laid out, which module lists are its blocks, whose rows each
argument of a block has, and which attention layers mix image tokens. The engine runs the class's own ``forward``, which
always sees whole shapes; only the arguments of blocks are cut. So nothing need be said of embeddings, positions,
refiners, padding or heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models.latent import IMAGE, REFERENCE, Latent
from patchpipe.models.lora import SCALE

CROSS = ()  # the rows of an attention layer whose keys and values no patch changes


@dataclass(frozen=True)
class Holds:
    """Whose rows a tensor has.

    Args:
        segments: In their order. ``"image"`` is the picture that is painted, ``"reference"`` pictures that follow it in
            the latent, which ride with the last patch; any other name, such as ``"text"``, is of rows that ride with
            the first, or are spread over some.
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
        path: Name of the list in the model.
        count: Field of the model's configuration that tells how many blocks it has, or has an entry for each.
        streams: Arguments a block takes *and* returns, in the order it returns them. A block that returns a lone tensor
            has one stream.
        rows: Whose rows each argument has, streams included; for a tuple of tensors a tuple, with ``None`` for what
            goes in whole. Arguments that are not named go in whole.
        attention: The segments that each attention module of a block mixes, in their order; ``CROSS`` where it takes
            its keys and values from the text alone.
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
        counts: Arguments that say how many of the picture's tokens, from its first on, are special, such as those of
            a given first frame. A patch is told how many of them it has.
        text_parameters: Parts of parameter names that serve the text stream alone.
        per_call: Modules of a block whose result is the same for every patch of a call, such as modulation.
        per_request: Modules of a block whose result follows from these inputs of the call alone.
    """

    path: str
    count: str
    streams: tuple[str, ...]
    rows: Mapping[str, Holds | tuple[Holds | None, ...]]
    attention: Mapping[str, tuple[str, ...]]
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
    counts: tuple[str, ...] = ()
    text_parameters: tuple[str, ...] = ()
    per_call: tuple[str, ...] = ()
    per_request: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
class ModelPlan:
    """Everything the engine knows of one transformer class.

    Args:
        model: Name of the diffusers class.
        grid: How its latent is laid out and cut.
        blocks: The block lists in the order the model runs them.
        inputs: Inputs beside the latent that it may be called with.
        ignored_inputs: Inputs that change nothing here when empty; any other input is refused. They may hold the
            strength of LoRA, as ``scale``.
        residuals: Inputs with a list of tensors that the root adds to streams between blocks, such as those of a
            ControlNet, and whose rows each of them has.
        unbatched_inputs: Inputs without a batch dim.
        batch_dims: The batch dim of inputs where it is not the first; the items of a list count as a dim.
        idle_inputs: Inputs that are objects, and what shows that one changes nothing here; else they are refused.
        time: The input that falls, or rises, with the noise level.
        text: The input that identifies the prompt, which tells guidance branches apart.
        embed: Module that turns the latent into tokens: after the first stage it has nothing to do.
        tail: Last module after the blocks up to which the root's code treats every row by itself; only then are the
            patch's rows put back into the whole.
        tail_dims: Inputs that must have so many dims for that; with more, they have values for each row.
        per_call: Modules whose result is the same for every patch of a call; ``encoder.*`` is every module of a list.
        per_request: Modules whose result follows from these inputs of the call alone; of the latent, from its shape.
            ``refiner.*`` is every module of a list.
        shared_parts: Modules of blocks that the root uses too, so that every rank needs them.
        sections: Whether pipelines make a clip section by section in one call, one after the other from noise. A noise
            level above the last one then begins a section, whose first steps are warm-up steps; to see that, every
            call waits for its time.
        between: Modules whose results the root adds to streams between blocks. Where blocks of other stages are handed
            through they have nothing to do, and add nothing.
        refused_settings: Fields of the configuration that must be off, since nothing tests them.
        guidance: Whether pipelines of this class guide by two calls a step or by one batch of both branches.
        tensor: How the Linears of the blocks split under tensor parallelism, as in diffusers' ``_tp_plan``: by glob,
            ``"colwise"`` or ``"rowwise"``. ``"class"`` takes the class's own; ``None`` covers none.
        lengths: Masks whose number of ones decides how many rows a segment has.
        same_lengths: Whether they must have as many ones for every entry of the batch, since rows of the picture begin
            after them.
        second: The segment whose rows the class predicts too, as its second output, such as the sound of a clip. All
            ranks get it at the end of every call, so that the stages wait for each other once a step.
        frames_per_second: How fast its clips play, as its makers show them.
        pipelines: Pipeline classes that are tested; docs/pipelines.md says how.
    """

    model: str
    grid: Latent
    blocks: tuple[BlockList, ...]
    inputs: tuple[str, ...]
    ignored_inputs: tuple[str, ...] = ()
    residuals: Mapping[str, Holds] = field(default_factory=dict)
    unbatched_inputs: tuple[str, ...] = ()
    batch_dims: Mapping[str, int] = field(default_factory=dict)
    idle_inputs: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    time: str = "timestep"
    text: str = "encoder_hidden_states"
    embed: str = ""
    tail: str = ""
    tail_dims: Mapping[str, int] = field(default_factory=dict)
    per_call: tuple[str, ...] = ()
    per_request: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared_parts: tuple[str, ...] = ()
    sections: bool = False
    between: tuple[str, ...] = ()
    refused_settings: tuple[str, ...] = ()
    guidance: Literal["calls", "batch"] = "batch"
    tensor: Mapping[str, Any] | Literal["class"] | None = None
    lengths: tuple[str, ...] = ()
    same_lengths: bool = False
    second: str = ""
    frames_per_second: float = 16
    pipelines: tuple[str, ...] = ()

    @property
    def latent(self) -> str:
        """Name of the latent input."""
        return self.grid.name

    @property
    def joint(self) -> bool:
        """Whether text takes part in self-attention."""
        return any(set(mixed) - {IMAGE} for listing in self.blocks for mixed in listing.attention.values())

    @property
    def plain(self) -> bool:
        """Whether all that rows meet in is one attention a layer, and nothing but streams goes from block to block."""
        return self.shares_blocks and not (self.second or self.sections or any(each.special for each in self.blocks))

    @property
    def spreads_text(self) -> bool:
        """Whether rows of text may ride with several patches: they then meet in the same attention as the picture's."""
        held = [each for listing in self.blocks for mixed in listing.attention.values() for each in mixed]
        return self.plain and len(set(held) - {IMAGE, REFERENCE}) == 1

    @property
    def attends(self) -> bool:
        """Whether rows meet in attention over keys alone, so that ranks can share a patch."""
        return not any(listing.sums or listing.borders for listing in self.blocks)

    @property
    def shares_blocks(self) -> bool:
        """Whether two stages can run a block in turns: what they then give each other is keys and values by row."""
        more = any(each.drops_masked or each.asking or each.emits for each in self.blocks)
        return self.attends and not more and all(each.mask in (None, *each.rows) for each in self.blocks)

    @property
    def makes_clips(self) -> bool:
        """Whether it makes clips of several frames."""
        return "f" in self.grid.axes

    def width(self, model: nn.Module) -> int:
        """Channels of the tokens between blocks."""
        layer = self._mixer(model)
        return next(module.in_features for module in layer.modules() if isinstance(module, nn.Linear))

    def _mixer(self, model: nn.Module) -> nn.Module:
        """The first layer in which rows of the picture meet."""
        place = self.blocks_of(model)[0]
        return place.block.get_submodule(next(iter((*place.self_attention, *place.listing.sums))))

    def heads(self, model: nn.Module) -> int:
        """Attention heads."""
        layer: Any = self._mixer(model)
        return int(layer.heads if hasattr(layer, "heads") else layer.num_heads)

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
        known = {self.latent, *self.inputs, *self.residuals, "return_dict"}
        for name, value in inputs.items():
            if name not in known and not self._ignorable(name, value):
                raise ValueError(
                    f"{self.model} was called with {name}, which patchpipe has not been tested with and "
                    f"refuses rather than risk a wrong picture: leave it out, or run the pipeline on one device"
                )
        for name in self.lengths if self.same_lengths else ():
            self._check_lengths(inputs[name])
        return {**inputs, self.latent: self.grid.joined(inputs[self.latent])}

    def _check_lengths(self, mask: Tensor) -> None:
        lengths = mask.sum(-1).tolist() if len(mask) > 1 else []
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{self.model} lets the picture begin where its prompt ends, and these prompts have {lengths} tokens: "
                f"paint prompts of different lengths one after the other"
            )

    def has_tail(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call's rows are put back into the whole only after ``tail``."""
        return bool(self.tail) and all(inputs[name].ndim == ndim for name, ndim in self.tail_dims.items())

    def _ignorable(self, name: str, value: Any) -> bool:
        if value is None or value is False or (name in self.idle_inputs and self.idle_inputs[name](value)):
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
    def self_attention(self) -> dict[str, tuple[str, ...]]:
        """The segments of each of its layers whose keys and values the patches change, by path."""
        listed = self.listing.attention.items()
        return {path: mixed for path, mixed in listed if mixed and part_of(self.block, path) is not None}

    def layer(self, path: str) -> str:
        """The name in the model of one of its layers."""
        return f"{self.name}.{path}"


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
