"""The vocabulary in which a transformer class is described to the patch pipeline.

A plan is data about a diffusers class: how its latent is laid out, which module lists are its blocks, whose rows each
argument of a block has, and which attention layers mix image tokens. The engine runs the class's own ``forward``, which
always sees whole shapes; only the arguments of blocks are cut. So nothing need be said of embeddings, positions,
refiners, padding or heads. What most classes do alike is the default, see ``models/usual.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models import usual
from patchpipe.models.adapters import PICTURES, PROJECTIONS, check_batch
from patchpipe.models.blocks import BlockList, BlockPlace, Holds
from patchpipe.models.latent import IMAGE, PREFIX, REFERENCE, Latent
from patchpipe.models.lora import SCALE

PICTURE = Latent("bchw")  # one picture, cut by rows


@dataclass(frozen=True)
class Prefix:
    """Rows before the picture that see no row of it: a pipeline keeps their keys and values from its first call on.

    The first call is whole, and each block puts its keys and values of these rows into a cache; in later calls the
    blocks have the other rows alone.

    Args:
        mode: Input that is ``"extract"`` in the first call and ``"cached"`` in later ones.
        always: Whether calls that keep nothing have such rows too; these are refused.
        mask: Input that masks some of these rows, if it is given: refused where patches stream.
    """

    mode: str = "kv_cache_mode"
    always: bool = False
    mask: str = ""


@dataclass(frozen=True)
class ModelPlan:
    """Everything the engine knows of one transformer class.

    Args:
        model: Name of the diffusers class.
        grid: How its latent is laid out and cut.
        blocks: The block lists in the order the model runs them.
        inputs: Inputs beside latent, time and text that it may be called with; any other one is refused.
            ``attention_kwargs`` and its like change nothing where they are empty or hold the strength of LoRA alone.
        residuals: Inputs with a list of tensors that the root adds to streams between blocks, such as those of a
            ControlNet, and whose rows each of them has.
        apart_by: Inputs that change in some calls what layers do, such as whether each row sees itself alone. Such a
            call is a guidance branch of its own.
        unbatched_inputs: Inputs without a batch dim, beside those that are mostly called so.
        batch_dims: The batch dim of inputs where it is not the first; the items of a list count as a dim.
        adapters: Attention processors of IP-Adapters that are tested, by class name, and the segments whose keys their
            own attention has beside those of the adapter's picture; none for those of the picture alone.
        idle_inputs: Inputs that are objects, and what shows that one changes nothing here; else they are refused.
        time: The input that falls, or rises, with the noise level.
        text: The input that identifies the prompt, which tells guidance branches apart.
        embed: Module that turns the latent into tokens: after the first stage it has nothing to do. ``None`` for the
            usual one.
        tail: Last module after the blocks up to which the root's code treats every row by itself; only then are the
            patch's rows put back into the whole. Not where the time has values for each row. ``None`` for the usual one
            if the blocks end with the picture's rows alone; ``""`` for none.
        per_call: Modules whose result is the same for every patch of a call, beside the usual ones; ``encoder.*`` is
            every module of a list.
        per_request: Modules whose result follows from these inputs of the call alone, beside the usual ones; of the
            latent, from its shape. ``refiner.*`` is every module of a list.
        shared_parts: Modules of blocks that the root uses too, so that every rank needs them.
        sections: Whether pipelines make a clip section by section in one call, one after the other from noise. A noise
            level above the last one then begins a section, whose first steps are warm-up steps; to see that, every
            call waits for its time.
        between: Modules whose results the root adds to streams between blocks. Where blocks of other stages are handed
            through they have nothing to do, and add nothing.
        refused_settings: Fields of the configuration that must be off, since nothing tests them.
        guidance: Whether pipelines of this class guide by two calls a step or by one batch of both branches.
        tensor: How the Linears of the blocks split under tensor parallelism, as in diffusers' ``_tp_plan``: by glob,
            ``"colwise"`` or ``"rowwise"``. ``"class"`` takes the class's own, ``"usual"`` the one by usual names;
            ``None`` covers none.
        lengths: Masks whose number of ones decides how many rows a segment has.
        same_lengths: Whether they must have as many ones for every entry of the batch, since rows of the picture begin
            after them.
        beside: Name in pipelines of a second transformer, alike, that is called in every step beside the first, as for
            guidance; it has branches of its own. Other transformers of a pipeline take turns over the steps.
        second: The segment whose rows the class predicts too, as its second output, such as the sound of a clip. All
            ranks get it at the end of every call, so that the stages wait for each other once a step.
        frames_per_second: How fast its clips play, as its makers show them.
        prefix: What its pipelines keep of their first call, if they do.
        pipelines: Pipeline classes that are tested; docs/pipelines.md says how. None named means the one that has the
            model's name.
    """

    model: str
    blocks: tuple[BlockList, ...]
    grid: Latent = PICTURE
    inputs: tuple[str, ...] = ()
    residuals: Mapping[str, Holds] = field(default_factory=dict)
    apart_by: tuple[str, ...] = ()
    unbatched_inputs: tuple[str, ...] = ()
    batch_dims: Mapping[str, int] = field(default_factory=dict)
    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    idle_inputs: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    time: str = "timestep"
    text: str = "encoder_hidden_states"
    embed: str | None = None
    tail: str | None = None
    per_call: tuple[str, ...] = ()
    per_request: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared_parts: tuple[str, ...] = ()
    sections: bool = False
    between: tuple[str, ...] = ()
    refused_settings: tuple[str, ...] = ()
    guidance: Literal["calls", "batch"] = "batch"
    tensor: Mapping[str, Any] | Literal["class", "usual"] | None = None
    lengths: tuple[str, ...] = ()
    same_lengths: bool = False
    beside: str = ""
    second: str = ""
    frames_per_second: float = 24
    prefix: Prefix | None = None
    pipelines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pipelines", self.pipelines or (usual.pipeline(self.model),))

    @property
    def latent(self) -> str:
        """Name of the latent input."""
        return self.grid.name

    @property
    def known_inputs(self) -> tuple[str, ...]:
        """Inputs beside the latent that it may be called with."""
        return tuple(dict.fromkeys((self.text, self.time, *self.inputs, *self.apart_by, *self.leaving_out)))

    @property
    def leaving_out(self) -> tuple[str, ...]:
        """Inputs that say which blocks a call leaves out; the root is not given them."""
        return tuple(listing.left_out_by for listing in self.blocks if listing.left_out_by)

    @property
    def joint(self) -> bool:
        """Whether text takes part in self-attention."""
        return any(set(mixed) - {IMAGE, PREFIX} for listing in self.blocks for mixed in listing.attention.values())

    @property
    def plain(self) -> bool:
        """Whether all that rows meet in is one attention a layer, and nothing but streams goes from block to block."""
        return self.shares_blocks and not (self.second or self.sections or any(each.special for each in self.blocks))

    @property
    def spreads_text(self) -> bool:
        """Whether rows of text may ride with several patches: they then meet in the same attention as the picture's."""
        held = [each for listing in self.blocks for mixed in listing.attention.values() for each in mixed]
        special = self.second or self.sections or any(each.special for each in self.blocks)
        return self.attends and not special and len(set(held) - {IMAGE, REFERENCE, PREFIX}) == 1

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
        known = {self.latent, *self.known_inputs, *self.residuals, "return_dict"}
        for name, value in inputs.items():
            if name not in known and not self._ignorable(name, value):
                raise ValueError(
                    f"{self.model} was called with {name}, which patchpipe has not been tested with and "
                    f"refuses rather than risk a wrong picture: leave it out, or run the pipeline on one device"
                )
        for name in self.lengths if self.same_lengths else ():
            self._check_lengths(inputs[name])
        inputs = {**inputs, self.latent: self.grid.joined(inputs[self.latent])}
        check_batch(inputs, inputs[self.latent].shape[0])
        return self.grid.parted(inputs, read=self.prefix is None or self.extracts(inputs))

    def keeps_prefix(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call fills or reads the cache of its prefix."""
        return self.prefix is not None and inputs.get(self.prefix.mode) is not None

    def extracts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call fills the cache of its prefix."""
        return self.prefix is not None and inputs.get(self.prefix.mode) == "extract"

    def _check_lengths(self, mask: Tensor) -> None:
        lengths = mask.sum(-1).tolist() if len(mask) > 1 else []
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{self.model} lets the picture begin where its prompt ends, and these prompts have {lengths} tokens: "
                f"paint prompts of different lengths one after the other"
            )

    def one_time(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call has one time for all rows of a picture; only then may ``tail`` see a patch's rows alone."""
        return getattr(inputs.get(self.time), "ndim", 0) <= 1

    def embed_of(self, model: nn.Module) -> str:
        """The module that turns the latent into tokens, or nothing."""
        return usual.embed(model) if self.embed is None else self.embed

    def tail_of(self, model: nn.Module) -> str:
        """The last module before a patch's rows are put back into the whole, or nothing for the last block."""
        last = self.blocks[-1]
        held = next(rows.segments for rows in map(last.stream_rows, last.streams) if IMAGE in rows.segments)
        if self.tail is None and not last.whole_between and set(held) <= {IMAGE, REFERENCE}:
            return usual.tail(model)
        return self.tail or ""

    def shared_in_call(self, model: nn.Module) -> tuple[str, ...]:
        """Modules whose result is the same for every patch of a call."""
        projections = PROJECTIONS if self.adapters else ()
        return *self.per_call, *projections, *(path for path in usual.per_call(model) if path not in self.per_request)

    def shared_in_request(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Modules whose result follows from these inputs alone."""
        found = usual.per_request(model, self.latent, self.text, self.known_inputs)
        return {path: names for path, names in found.items() if path not in self.per_call} | dict(self.per_request)

    def unbatched(self, name: str, value: Any) -> bool:
        """Whether an input has no batch dim."""
        of_one = name in usual.IDS and isinstance(value, Tensor) and value.ndim == 2
        return of_one or name in (*usual.UNBATCHED, *self.unbatched_inputs, *self.apart_by, *self.leaving_out)

    def _ignorable(self, name: str, value: Any) -> bool:
        if value is None or value is False or (name in self.idle_inputs and self.idle_inputs[name](value)):
            return True
        if name not in usual.ATTENTION_ARGUMENTS or not isinstance(value, dict):
            return False
        given = {key: inner for key, inner in value.items() if inner is not None}
        scale = given.pop(SCALE, 1.0)
        return isinstance(scale, (int, float)) and set(given) <= ({PICTURES} if self.adapters else set())

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
