"""One stage of the patch pipeline: the model's own ``forward``, but only the blocks this rank owns.

The root ``forward`` of the diffusers class runs on one patch as if it were a smaller picture. Blocks of other
stages are stood in for; hidden states from the stage before enter at the first owned block, and the run
ends at the last owned block, whose result goes to the stage after. The last stage runs on to the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.kernels.choice import KernelWatch
from patchpipe.models.plan import TEXT_ROWS, BlockPlace, ModelPlan, SlicedResult
from patchpipe.stage.attention import Attending, Sharing, attend_through
from patchpipe.stage.balance import StageBlocks
from patchpipe.stage.patches import Patch
from patchpipe.stage.positions import PositionTable
from patchpipe.stage.store import Entries, LayerStore, LayerStores

Streams = dict[str, Tensor]


@dataclass
class CallContext:
    """What the hooks read while one patch of one transformer call runs through the stage.

    Attributes:
        patch: The patch at work.
        stores: The branch's key/value store of each layer; ``None`` where nothing is ever stale.
        text_rows: Text rows in joint attention.
        received: The streams from the stage before.
        memo: Results shared by the patches of this call.
        request_memo: Results shared by the calls of this request.
        inputs: The arguments of the call.
        sharing: The ranks that share the patch, if there are several.
        entries: Which entries of the batch run; ``None`` for all.
        turn: Which turn it is, of how many, where the stage shares blocks; see ``balance.Boundary``.
        entering: What to do before a shared block runs, by its place.
        leaving: What to do after it.
        trailing: The block that the next stage runs in this synchronous step, for its keys and values alone.
    """

    patch: Patch
    stores: LayerStores | None
    text_rows: int
    received: Streams | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    request_memo: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    sharing: Sharing | None = None
    entries: Entries | None = None
    turn: tuple[int, int] | None = None
    entering: dict[int, Callable[[], None]] = field(default_factory=dict)
    leaving: dict[int, Callable[[], None]] = field(default_factory=dict)
    trailing: Callable[[], Any] | None = None

    def whole_argument(self, source: str) -> Any:
        """What an argument is for the call uncut, as a ``SlicedResult`` names it."""
        return self.text_rows if source == TEXT_ROWS else self.inputs[source]

    def rows_of(self, results: tuple[Tensor, ...], sliced: SlicedResult) -> tuple[Tensor, ...]:
        """The patch's rows of tensors that have a row for every token of the call."""
        if self.patch.uncut:
            return results
        ranges = {"image": self.patch.tokens, "text": self.patch.text_range(self.text_rows)}
        spans = zip(results, (ranges[kind] for kind in sliced.rows), strict=True)
        return tuple(result.narrow(sliced.dim, start, stop - start) for result, (start, stop) in spans)


class _StageDone(Exception):
    """Ends the root ``forward`` after the last owned block; carries its streams."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams


class StandIn(nn.Module):
    """Takes the place of a block another stage owns and hands its streams through."""

    def __init__(self, streams: tuple[str, ...], positions: Mapping[str, int]) -> None:
        super().__init__()
        self.streams = streams
        self.positions = dict(positions)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the streams it was given, in the order a block returns them."""
        found = tuple(self.given(args, kwargs).values())
        return found if len(found) > 1 else found[0]

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """The streams among a block's arguments."""
        return {name: kwargs[name] if name in kwargs else args[self.positions[name]] for name in self.streams}


class SharedStandIn(StandIn):
    """Takes the place of a block that a neighbour runs too; hands the streams through where it is the neighbour's turn.

    Args:
        place: The block.
        runs: Whether it is this stage's turn.
    """

    def __init__(self, place: BlockPlace, runs: Callable[[], bool]) -> None:
        super().__init__(place.listing.streams, argument_positions(place.block))
        self.block, self.runs = place.block, runs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's result, or what it was given."""
        return self.block(*args, **kwargs) if self.runs() else super().forward(*args, **kwargs)


class Stage:
    """The part of a transformer that one rank runs.

    Args:
        model: The transformer; changed in place by ``attach`` and restored by ``detach``.
        plan: Its plan.
        owned: The blocks that this stage owns.
        first: Whether this is the first stage.
        last: Whether this is the last stage.
        kernels: Looks at what torch's attention kernels are given; ``None`` where there is but one.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        owned: StageBlocks,
        *,
        first: bool,
        last: bool,
        kernels: KernelWatch | None = None,
    ) -> None:
        self.model, self.plan, self.owned = model, plan, owned
        self.first, self.last = first, last
        self.kernels = kernels
        self.context: CallContext | None = None
        self._undo: list[Callable[[], None]] = []
        self._places = plan.blocks_of(model)
        self._forward: Callable[..., Any] = model.forward
        self._width = plan.width(model)
        self._positions = PositionTable(model.get_submodule(plan.patch_embed)) if plan.patch_embed and first else None

    @property
    def blocks(self) -> list[BlockPlace]:
        """The blocks this stage owns, in running order."""
        return [self._places[index] for index in self.owned.held]

    def attach(self) -> None:
        """Hooks the stage into the model."""
        places = self._places
        for index, place in enumerate(places):
            if index not in self.owned.held:
                self._replace(place, StandIn(place.listing.streams, argument_positions(place.block)))
        for place in self.blocks:
            self._hook_attention(place)
            for path in place.listing.conditioning:
                self._share_between_patches(place.layer(path))
            for path, names in place.listing.constant.items():
                self._share_between_calls(place.layer(path), names, whole=True)
        for index in self.owned.shared:
            self._watch(places[index].block, index)
        if not self.first:
            for index in self.owned.start.places:
                self._enter_at(places[index], index)
            self._stub_embed()
        if not self.last:
            for stop in self.owned.stop.places:
                self._leave_at(places[stop - 1], stop)
            if self.owned.stop.share:
                self._leave_before(places[self.owned.stop.block])
        for path in self.plan.conditioning:
            self._share_between_patches(path)
        for path, names in self.plan.constant.items():
            self._share_between_calls(path, names, whole=names == (self.plan.text,) and not self.plan.text_inputs)
        for path, sliced in self.plan.sliced.items():
            self._slice(path, sliced)
        for index in self.owned.shared:  # last, since a block is no longer found by its name then
            self._replace(places[index], SharedStandIn(places[index], partial(self._runs, index)))

    def detach(self) -> None:
        """Takes every hook off again, last one first."""
        while self._undo:
            self._undo.pop()()

    def run(self, inputs: Mapping[str, Any], latent: Tensor | None, context: CallContext) -> Streams | Tensor:
        """Runs one patch.

        Args:
            inputs: The arguments of the transformer call, uncut.
            latent: The patch of the latent; ``None`` on every stage but the first.
            context: What the hooks are to know.

        Returns:
            The streams for the next stage, or on the last stage the patch of the noise prediction.
        """
        self.context, context.inputs = context, inputs
        try:
            with self._placed(inputs):
                return self._forward(**self._cut(inputs, latent), return_dict=False)[0]
        except _StageDone as done:
            return done.streams
        finally:
            self.context = None

    def trail(self, context: CallContext) -> None:
        """Runs the block that the next stage has begun to run, so that this one knows its keys and values too."""
        assert context.trailing is not None
        self.context = context
        try:
            context.trailing()
        finally:
            self.context = None

    # -- inputs of one patch ---------------------------------------------------------------------

    def _cut(self, inputs: Mapping[str, Any], latent: Tensor | None) -> dict[str, Any]:
        assert self.context is not None
        patch, plan = self.context.patch, self.plan
        cut = {name: value for name, value in inputs.items() if name != "return_dict"}
        cut[plan.latent] = self._placeholder(inputs[plan.latent]) if latent is None else latent
        if patch.uncut:
            return cut
        for name, dim in plan.cut_inputs.items():
            dim = dim + (cut[name].ndim == 3 and dim == 0)  # ids may still carry a batch dim
            cut[name] = cut[name].narrow(dim, patch.tokens[0], patch.token_count)
        start, stop = patch.text_range(self.context.text_rows)
        for name, dim in plan.text_inputs.items():
            dim = dim + (name != plan.text and cut[name].ndim == 3)
            cut[name] = cut[name].narrow(dim, start, stop - start)
        if plan.text_mask is not None and plan.masks_text(cut):
            cut[plan.text_mask] = cut[plan.text_mask].narrow(1, start, stop - start) if stop > start else None
        return cut

    def _placeholder(self, latent: Tensor) -> Tensor:
        """The shape of the patch without its values, which only the first stage knows."""
        assert self.context is not None
        shape, (start, stop) = list(latent.shape), self.context.patch.units
        shape[self.plan.grid.dim] = stop - start
        return torch.zeros((), dtype=latent.dtype, device=latent.device).expand(shape)

    @contextmanager
    def _placed(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        assert self.context is not None
        if self._positions is None or self.context.patch.uncut:
            yield
            return
        with self._positions.showing(inputs[self.plan.latent].shape, self.context.patch.rows):
            yield

    # -- hooks -----------------------------------------------------------------------------------

    @property
    def _now(self) -> range:
        """The blocks that run in this turn."""
        assert self.context is not None
        return self.owned.whole if self.context.turn is None else self.owned.of(*self.context.turn)

    @property
    def _trails(self) -> bool:
        """Whether the block after these is the next stage's in this step, but its keys and values are kept here too."""
        assert self.context is not None
        shared = self.owned.stop.share > 0 and not self.owned.halves
        return shared and self.context.turn is None and self.context.stores is not None

    def _runs(self, index: int) -> bool:
        return index in self._now or (index == self.owned.stop.block and self._trails)

    def _watch(self, block: nn.Module, index: int) -> None:
        """Does what the context asks for before and after a shared block."""

        def enter(*_: Any) -> None:
            assert self.context is not None
            if index in self.context.entering:
                self.context.entering[index]()

        def leave(*_: Any) -> None:
            assert self.context is not None
            if index in self.context.leaving:
                self.context.leaving[index]()

        self._undo.append(block.register_forward_pre_hook(enter).remove)
        self._undo.append(block.register_forward_hook(leave).remove)

    def _replace(self, place: BlockPlace, by: StandIn) -> None:
        blocks = self.model.get_submodule(place.listing.path)
        blocks[place.index] = by
        self._undo.append(lambda: blocks.__setitem__(place.index, place.block))

    def _enter_at(self, place: BlockPlace, index: int) -> None:
        positions = argument_positions(place.block)

        def receive(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._now.start != index:
                return None
            assert self.context is not None
            assert self.context.received is not None
            placed = list(args)
            for name, value in self.context.received.items():
                if name in kwargs:
                    kwargs[name] = value
                else:
                    placed[positions[name]] = value
            return tuple(placed), kwargs

        handle = place.block.register_forward_pre_hook(receive, with_kwargs=True, prepend=True)
        self._undo.append(handle.remove)

    def _leave_at(self, place: BlockPlace, stop: int) -> None:
        names = place.listing.streams

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._now.stop != stop or self._trails:
                return
            values = output if isinstance(output, tuple) else (output,)
            raise _StageDone(dict(zip(names, values, strict=True)))

        self._undo.append(place.block.register_forward_hook(leave).remove)

    def _leave_before(self, place: BlockPlace) -> None:
        """In a synchronous step the next stage is not kept waiting for a block that both run."""
        block, stand_in = place.block, StandIn(place.listing.streams, argument_positions(place.block))

        def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self.context is not None
            if self._trails and self.context.trailing is None:
                self.context.trailing = partial(block, *args, **kwargs)
                raise _StageDone(stand_in.given(args, kwargs))

        self._undo.append(block.register_forward_pre_hook(leave, with_kwargs=True).remove)

    def _stub_embed(self) -> None:
        """Before the first owned block nothing but the shape of the tokens matters."""

        def embed(latent: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            assert self.context is not None
            shape = (latent.shape[0], self.context.patch.token_count, self._width)
            return torch.zeros((), dtype=latent.dtype, device=latent.device).expand(shape)

        self._override(self.plan.embed, embed)

    def _share_between_patches(self, path: str) -> None:
        module = self._find(path)
        if module is None:
            return
        compute = module.forward

        def shared(*args: Any, **kwargs: Any) -> Any:
            assert self.context is not None
            memo = self.context.memo
            if path not in memo:
                memo[path] = compute(*args, **kwargs)
            return memo[path]

        self._override(path, shared)

    def _share_between_calls(self, path: str, names: tuple[str, ...], *, whole: bool) -> None:
        """Keeps a result for the request, as long as the inputs it follows from are the same tensors.

        Args:
            path: The module.
            names: The inputs of the call that its result follows from.
            whole: Whether every patch shares one result.
        """
        module = self._find(path)
        if module is None:
            return
        compute = module.forward

        def shared(*args: Any, **kwargs: Any) -> Any:
            assert self.context is not None
            context = self.context
            sources = tuple(context.inputs.get(name) for name in names)
            piece = None if whole else (context.patch.whole, context.patch.index)
            key = (path, piece, *map(_identity, sources))
            if key not in context.request_memo:  # the sources are kept too, lest another tensor takes their id
                context.request_memo[key] = (sources, compute(*args, **kwargs))
            return context.request_memo[key][1]

        self._override(path, shared)

    def _slice(self, path: str, sliced: SlicedResult) -> None:
        """Computes a module for the whole call and gives each patch its rows of the result."""
        compute = self.model.get_submodule(path).forward
        signature = inspect.signature(compute)

        def rows_of_patch(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            assert self.context is not None
            context, bound = self.context, signature.bind(*args, **kwargs)
            given = {name: context.whole_argument(source) for name, source in sliced.arguments.items()}
            bound.arguments.update(given)
            key = (path, *map(_identity, given.values()))
            if key not in context.request_memo:
                context.request_memo[key] = (given, compute(*bound.args, **bound.kwargs))
            return context.rows_of(context.request_memo[key][1], sliced)

        self._override(path, rows_of_patch)

    def _hook_attention(self, place: BlockPlace) -> None:
        for path, kind in place.self_attention.items():
            name, joint, text_first = place.layer(path), kind == "joint", place.listing.text_first
            layer, find = place.block.get_submodule(path), partial(self._attending, name, joint, text_first)
            self._undo.append(attend_through(layer, find, self.kernels))

    def _attending(self, name: str, joint: bool, text_first: bool) -> Attending | None:
        """What a self-attention layer needs beside its own module; ``None`` where it needs nothing."""
        assert self.context is not None
        context, text_rows = self.context, self.context.text_rows if joint else 0
        if context.stores is None and context.sharing is None:
            return None
        store = None
        if context.stores is not None:
            store = context.stores.setdefault(name, LayerStore(text_rows, text_first))
        masked = joint and self.plan.masks_text(context.inputs)
        seen = context.patch, store, context.sharing, text_rows, text_first, masked, context.entries
        return Attending(*seen, self.kernels)

    def _find(self, path: str) -> nn.Module | None:
        owner, _, leaf = path.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf, None)

    def _override(self, path: str, forward: Callable[..., Any]) -> None:
        module = self.model.get_submodule(path)
        previous = module.__dict__.get("forward")
        module.forward = forward  # type: ignore[method-assign]

        def undo() -> None:
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.forward = previous  # type: ignore[method-assign]

        self._undo.append(undo)


def _identity(value: Any) -> tuple[int, int] | int:
    """Tells a tensor from another one, and from itself after an in-place change; a number is its own identity."""
    if isinstance(value, int):
        return value
    versioned = isinstance(value, Tensor) and not value.is_inference()
    return id(value), value._version if versioned else 0


def argument_positions(block: nn.Module) -> dict[str, int]:
    """Place of each named argument of a block's ``forward``."""
    names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
    return {name: index for index, name in enumerate(names)}
