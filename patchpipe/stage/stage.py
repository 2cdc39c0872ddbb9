"""One stage of the patch pipeline: the model's own ``forward``, but only the blocks this rank owns.

The root ``forward`` of the diffusers class runs for every patch and always sees whole shapes: the latent has zeros
outside the patch, and after the first stage nothing but its shape. What surrounds the blocks, the ``Seam``, cuts and
widens; see there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.kernels.choice import KernelWatch
from patchpipe.layout.split import StageBlocks
from patchpipe.models.blocks import BlockList, BlockPlace, part_of
from patchpipe.models.latent import AHEAD, IMAGE, PREFIX, Raster
from patchpipe.models.plan import ModelPlan
from patchpipe.models.skips import changed, layers_of, left_out, note_skips
from patchpipe.stage.attending import Attending
from patchpipe.stage.attention import attend_through, override
from patchpipe.stage.context import CallContext, Kept, Streams, identity_of
from patchpipe.stage.keys.early import Early, parts_of
from patchpipe.stage.keys.store import LayerStore, again_of
from patchpipe.stage.mixing import bordered, summed
from patchpipe.stage.patches import Patch
from patchpipe.stage.root.embedded import embedding, of_rows
from patchpipe.stage.root.survey import CallShapes, Survey
from patchpipe.stage.rows import Rows
from patchpipe.stage.seam import Passage, Residuals, Seam, StageDone


class Stage:
    """The part of a transformer that one rank runs.

    Args:
        model: The transformer; changed in place by ``attach`` and ``sew``, and restored by ``detach``.
        plan: Its plan.
        owned: The blocks that this stage owns.
        first: Whether this is the first stage.
        last: Whether this is the last stage.
        kernels: Looks at what torch's attention kernels are given; ``None`` where there is but one.
        values_first: Whether values are sent to the ranks that share a patch as soon as they are projected.
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
        values_first: bool = False,
    ) -> None:
        self.values_first = values_first
        self.model, self.plan, self.owned = model, plan, owned
        self.first, self.last = first, last
        self.kernels = kernels
        self.passage = Passage(owned, first)
        self._tail = plan.tail_of(model)
        self.places = plan.blocks_of(model)
        self._layers = [layers_of(place.block) for place in self.places]  # those that a call may leave out
        self._kept: Kept | None = None
        self._undo: list[Callable[[], None]] = []
        self._seams: list[Callable[[], None]] = []
        self._forward: Callable[..., Any] = model.forward
        self._cache: Any = None  # that the root returned in the last run
        self._beside: Tensor | None = None  # the class's second output

    @property
    def blocks(self) -> list[BlockPlace]:
        """The blocks this stage owns, in running order."""
        return [self.places[index] for index in self.owned.held]

    def left_out(self, inputs: Mapping[str, Any]) -> frozenset[int | str]:
        """What a call leaves out: blocks by their place among all, layers of other blocks by names, or what says so."""
        found: set[int | str] = {f"{name}={inputs[name]}" for name in self.plan.apart_by if inputs.get(name)}
        for index, place in enumerate(self.places):
            if place.left_out(inputs) or left_out(place.block):
                found.add(index)
            else:
                found.update(place.layer(name) for name, layer in self._layers[index] if changed(layer))
        return frozenset(found)

    def keeps_keys(self, index: int, left_out: frozenset[int | str]) -> bool:
        """Whether a block has self-attention in calls that leave this out."""
        place = self.places[index]
        return index not in left_out and any(place.layer(path) not in left_out for path in place.self_attention)

    def attach(self) -> None:
        """Hooks the stage into the layers of its blocks and into what surrounds them."""
        for place in self.blocks:
            self._hook_attention(place)
            self._hook_others(place)
            for path in place.listing.per_call:
                self._share_between_patches(place.layer(path))
            for path, names in place.listing.per_request.items():
                self._share_between_calls(place.layer(path), names)
        for pattern in self.plan.shared_in_call(self.model):
            for path in self._matching(pattern):
                self._share_between_patches(path)
        for pattern, names in self.plan.shared_in_request(self.model).items():
            for path in self._matching(pattern):
                self._share_between_calls(path, names)
        for pattern in self.plan.between:
            for path in self._matching(pattern):
                self._idle_before(path)
        self._hook_embedding(self.plan.embed_of(self.model))

    def sew(self) -> None:
        """Puts seams around all blocks of the model: the last thing to be done to them."""
        self._layers = [layers_of(place.block) for place in self.places]
        for index, place in enumerate(self.places):
            ends = index + 1 == len(self.places)
            last = ends or self.places[index + 1].listing is not place.listing
            self._seams.append(override(place.block, Seam(self.passage, place, index, last=last, ends=ends)))
            self._seams.append(note_skips(place.block))
        if self._tail and self.last:
            self._seams.append(self._widen_after(self._tail))

    def unsew(self) -> None:
        """Takes the seams off."""
        while self._seams:
            self._seams.pop()()

    def detach(self) -> None:
        """Takes every hook off again, last one first."""
        self.unsew()
        while self._undo:
            self._undo.pop()()

    # -- one patch -------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any], latent: Tensor | None, context: CallContext) -> Streams | Tensor:
        """Runs one patch.

        Args:
            inputs: The arguments of the transformer call, uncut.
            latent: The patch of the latent; ``None`` on every stage but the first.
            context: What the hooks are to know.

        Returns:
            The streams for the next stage, or on the last stage the patch of the noise prediction; of a draft none.
        """
        context.inputs, context.left_out = inputs, self.left_out(inputs)
        context.tail = bool(self._tail) and self.plan.one_time(inputs)
        self.passage.context, self._kept = context, Kept(context.memo, context.request_memo, inputs)
        try:
            prediction = self._root(inputs, self._whole(inputs[self.plan.latent], latent, context))
        except StageDone as done:
            return done.streams
        finally:
            self.passage.context = self._kept = None
        if self.plan.second and context.patch.carries_riders:
            context.second = self._second(context)
        if context.patch.uncut:
            return prediction
        rows = spans_of(prediction, self.plan.grid.dim, context.patch)
        return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, self.plan.grid.dim)

    def exchange_work(self, other: Any) -> Any:
        """Takes what a run is at work with, and gives back what the run before it was, which goes on later.

        Args:
            other: What this gave back before; ``None`` for a run that begins.
        """
        mine = self.passage.context, self._kept, self._beside, self._cache
        self.passage.context, self._kept, self._beside, self._cache = other or (None,) * 4
        return mine

    def _second(self, context: CallContext) -> Tensor:
        """This rank's rows of the second output, of which the root has the whole unless it was never put back."""
        assert self._beside is not None
        rows = Rows.of((self.plan.second,), context.shapes.sizes, context.shapes.raster)
        [(start, stop)] = rows.ranges(context.patch)
        whole = self._beside.shape[1] == rows.total
        return self._beside[:, start:stop].contiguous() if whole else self._beside

    def trail(self, context: CallContext) -> None:
        """Runs the block that the next stage has begun to run, so that this one knows its keys and values too."""
        assert context.trailing is not None
        self.passage.context, self._kept = context, Kept(context.memo, context.request_memo, context.inputs)
        try:
            context.trailing()
        finally:
            self.passage.context = self._kept = None

    def look(self, inputs: Mapping[str, Any], raster: Raster, memo: dict[tuple[Any, ...], Any]) -> CallShapes:
        """Finds out the shapes inside a call, with no block run.

        Args:
            inputs: The arguments of the transformer call; of the latent nothing but its shape is read.
            raster: How the latent divides.
            memo: Results shared by the calls of the request.

        Raises:
            RuntimeError: The plan does not fit the model.
        """
        latent = inputs[self.plan.latent]
        blank = torch.zeros((), dtype=latent.dtype, device=latent.device).expand(latent.shape)
        inputs = {**inputs, self.plan.latent: blank}
        survey = Survey(self.plan, raster)
        self.passage.survey, self._kept = survey, Kept({}, memo, inputs)
        try:
            prediction = self._root(inputs, blank)
            return replace(survey.shapes(prediction, self._beside), cache=self._cache)
        finally:
            self.passage.survey = self._kept = None

    def _root(self, inputs: Mapping[str, Any], latent: Tensor) -> Tensor:
        """The class's own forward for a whole latent."""
        given = {name: value for name, value in inputs.items() if name not in ("return_dict", *self.plan.leaving_out)}
        ahead, dim, rows = given.pop(AHEAD, None), self.plan.grid.dim, latent.shape[self.plan.grid.dim]
        latent = latent if ahead is None else torch.cat((ahead, latent), dim)
        given[self.plan.latent] = self.plan.grid.given(latent)
        for name, held in self.plan.residuals.items():
            if given.get(name) is not None:
                given[name] = Residuals(given[name], held, self.passage)
        result = self._forward(**given, return_dict=False)
        self._beside = result[1] if self.plan.second else None
        self._cache = result[1] if self.plan.extracts(inputs) and len(result) > 1 else None
        prediction = self.plan.grid.joined(result[0] if isinstance(result, tuple) else result)
        if self.plan.prefix is None or prediction.shape[dim] == rows:
            return prediction
        return prediction.narrow(dim, prediction.shape[dim] - rows, rows).contiguous()

    def _whole(self, shape: Tensor, latent: Tensor | None, context: CallContext) -> Tensor:
        """The latent uncut, with zeros wherever this stage does not know it."""
        if latent is None:
            return torch.zeros((), dtype=shape.dtype, device=shape.device).expand(shape.shape)
        if context.patch.uncut:
            return latent
        whole, dim = latent.new_zeros(shape.shape), self.plan.grid.dim
        targets = spans_of(whole, dim, context.patch)
        for target, rows in zip(targets, latent.split([each.shape[dim] for each in targets], dim), strict=True):
            target.copy_(rows)
        return whole

    def _widen_after(self, path: str) -> Callable[[], None]:
        """Puts the patch's rows into the whole after a module of the head, where they have few channels."""
        module = self.model.get_submodule(path)
        streams = map(self.plan.blocks[-1].stream_rows, self.plan.blocks[-1].streams)
        compute, held = module.forward, next(rows for rows in streams if IMAGE in rows.segments)

        def widened(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            context = self.passage.context
            if context is None or context.cutter is None or not context.tail:
                return result
            return context.cutter.widen(result, held)

        return override(module, widened)

    # -- hooks -----------------------------------------------------------------------------------

    def _share_between_patches(self, path: str) -> None:
        module = self._find(path)
        if module is None:
            return
        compute = module.forward

        def shared(*args: Any, **kwargs: Any) -> Any:
            assert self._kept is not None
            key = path, self._kept.turn(path)
            if key not in self._kept.call:
                self._kept.call[key] = compute(*args, **kwargs)
            return self._kept.call[key]

        self._undo.append(override(module, shared))

    def _hook_embedding(self, path: str) -> None:
        """Has the first stage embed the patch's rows alone, and others nothing but a shape."""
        module, dim = self._find(path), self.plan.grid.dim
        if module is not None and not self.first:
            self._share_between_calls(path, (self.plan.latent, AHEAD), contiguous=True)
        elif module is not None:
            find = partial(self.passage.range_of, self.plan.grid)
            self._undo += [override(each, of_rows(each, dim, find)) for each in embedding(module, dim)]

    def _idle_before(self, path: str) -> None:
        """Has a module add nothing while blocks of stages before are handed through, and in a survey."""
        module = self.model.get_submodule(path)
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            context = self.passage.context
            if context is None or not context.entered:
                given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                return given.new_zeros(())
            return compute(*args, **kwargs)

        self._undo.append(override(module, forward))

    def _share_between_calls(self, path: str, names: tuple[str, ...], *, contiguous: bool = False) -> None:
        """Keeps a result for the request, as long as the inputs it follows from are the same tensors."""
        module = self._find(path)
        if module is None:
            return
        compute = module.forward

        def shared(*args: Any, **kwargs: Any) -> Any:
            assert self._kept is not None
            memo, inputs = self._kept.request, self._kept.inputs
            sources = tuple(inputs.get(name) for name in names)
            shaped = (inputs[self.plan.latent], inputs.get(AHEAD))
            kinds = [
                tuple(each.shape) if each is not None and any(each is one for one in shaped) else identity_of(each)
                for each in sources
            ]
            key = (self, path, self._kept.turn(path), *kinds)
            if key not in memo:  # the sources are kept too, lest another tensor takes their id
                result = compute(*args, **kwargs)
                if contiguous and isinstance(result, Tensor):  # or SD3's root would copy it for every patch
                    result = result.contiguous()
                memo[key] = (sources, result)
            return memo[key][1]

        self._undo.append(override(module, shared))

    def _hook_attention(self, place: BlockPlace) -> None:
        for path, segments in place.self_attention.items():
            layer, find = place.block.get_submodule(path), partial(self._attending, place, path, segments)
            parts = parts_of(layer, segments) if self.values_first else ()
            early = Early(layer, parts) if parts else None
            self._undo += early.hook(override) if early else []
            self._undo.append(attend_through(layer, find, self.kernels, early))

    def _hook_others(self, place: BlockPlace) -> None:
        for kind, paths in ((summed, place.listing.sums), (bordered, place.listing.borders)):
            for path in paths:
                layer = place.block.get_submodule(path)
                forward = kind(layer, place.layer(path), lambda: self.passage.at_work)
                self._undo.append(override(layer, forward))

    def _attending(self, place: BlockPlace, path: str, segments: tuple[str, ...]) -> Attending | None:
        """What a self-attention layer needs beside its own module; ``None`` where it needs nothing."""
        context, listing = self.passage.at_work, place.listing
        if not context.keeps:
            return None
        key = id(listing), segments, listing.asking.get(path, segments), context.masked
        if key not in context.alike:  # all layers of a list are alike but for their stores
            context.alike[key] = self._needs(context, listing, *key[1:3])
        attending = context.alike[key]
        name, stores = place.layer(path), context.stores
        if listing.drops_masked:
            assert context.kept_keys is not None
            return attending.one_by_one(name, stores, context.kept_keys, listing.rows[listing.mask or ""].segments)  # type: ignore[union-attr]
        if self.plan.keeps_prefix(context.inputs):
            attending = replace(attending, prefix=context.prefix_of(place.name))
        return self._adapted(self._stored(attending, name, segments), place.block.get_submodule(path), name)

    def _needs(
        self, context: CallContext, listing: BlockList, segments: tuple[str, ...], asking: tuple[str, ...]
    ) -> Attending:
        rows, queries = (Rows.of(names, context.shapes.sizes, context.shapes.raster) for names in (segments, asking))
        return Attending(
            context.patch, None, context.sharing, rows, context.masked and len(segments) > 1, context.entries,
            self.kernels, context.pace, rows.empty(context.patch, listing.segments_never_empty), listing.masks_queries,
            queries=queries,
        )  # fmt: skip

    def _stored(self, attending: Attending, name: str, segments: tuple[str, ...]) -> Attending:
        """With the layer's store, if keys and values are kept."""
        context = self.passage.at_work
        if context.stores is None:
            return attending
        if name not in context.stores:
            sizes = {**context.shapes.sizes, PREFIX: 0}
            context.stores[name] = LayerStore(Rows.of(segments, sizes, context.shapes.raster))
        return replace(attending, store=context.stores[name])

    def _adapted(self, attending: Attending, layer: Any, name: str) -> Attending:
        """With what the attention of an IP-Adapter needs, if the layer has one."""
        segments = self.plan.adapters.get(type(getattr(layer, "processor", None)).__name__)
        if not segments:
            return attending if segments is None else replace(attending, adapted=True)
        seen = self.passage.at_work.shapes
        rows = Rows.of(segments, seen.sizes, seen.raster)
        again = replace(attending, rows=rows, queries=None, masked=False, blanks=(), store=None)
        return replace(attending, adapted=True, again=self._stored(again, again_of(name), segments))

    def _matching(self, pattern: str) -> list[str]:
        """A path, or those of all modules of a list: ``refiner.*``."""
        if not pattern.endswith(".*"):
            return [pattern]
        return [f"{pattern[:-2]}.{name}" for name, _ in self.model.get_submodule(pattern[:-2]).named_children()]

    def _find(self, path: str) -> nn.Module | None:
        return part_of(self.model, path)


def spans_of(whole: Tensor, dim: int, piece: Patch) -> list[Tensor]:
    """What a piece has of a whole latent, as views."""
    return [whole.narrow(dim, start, stop - start) for start, stop in piece.spans]
