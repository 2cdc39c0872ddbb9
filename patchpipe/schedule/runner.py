"""Runs the transformer's calls through the stages: the schedule of the patch pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.lazy.latent import PatchTensor, patch_of
from patchpipe.lockstep.points import Points
from patchpipe.models import usual
from patchpipe.models.dtypes import matrix_dtype
from patchpipe.models.lora import scaled, split_scale
from patchpipe.models.plan import ModelPlan
from patchpipe.offload.offload import Offload
from patchpipe.offload.riding import Riders
from patchpipe.parallel.displaced import displaced_for
from patchpipe.parallel.refusals import check_elsewhere
from patchpipe.parallel.sharing import changed_for
from patchpipe.schedule.answers import Answers, Call
from patchpipe.schedule.branches import Branch
from patchpipe.schedule.hops import Crossing, Hops, Taken
from patchpipe.schedule.parts import Part, may_ride, parts_of
from patchpipe.schedule.request import Request, RequestStats
from patchpipe.schedule.shared_keys import SharedBlock
from patchpipe.stage.attending import Sharing
from patchpipe.stage.context import CallContext, Streams
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.stage import Stage
from patchpipe.tracing.recorder import Where, span


class Runner:
    """Stands in for a transformer's ``forward`` on one rank.

    Every rank calls it in the same order, since every rank runs the same pipeline code. A call streams the
    latent's patches (or the whole latent, in a synchronous step) through this rank's stage and returns at
    once with a lazy noise prediction, of which only the first stage ever holds values.

    Args:
        plan: The transformer's plan.
        config: The layout.
        group: The ranks.
        stages: This rank's part of the transformer, or of each of those that take turns.
        halves: Whether batches go through the stages in halves.
        shared: The blocks that this rank's stage shares with another.
        offload: Moves the blocks' weights, where not all of them stay on the device.

    Attributes:
        dtype: What the model computes in.
    """

    def __init__(
        self,
        plan: ModelPlan,
        config: ParallelConfig,
        group: Group,
        stages: Sequence[Stage],
        *,
        halves: bool,
        shared: Sequence[SharedBlock] = (),
        offload: Offload | None = None,
    ) -> None:
        self.plan, self.config, self.group, self.stages = plan, config, group, stages
        self._halves, self._shared, self._offload = halves, shared, offload
        self.request: Request | None = None
        self.points = Points(None)  # of the requests being served
        self.stats = [RequestStats()]  # of the requests served last, or being served
        self._open = False
        self._seconds: list[Tensor] = []  # rows of the class's second output that this rank made in the call
        self.dtype = matrix_dtype(self.model)
        self._hops = Hops(group)
        self._signature = inspect.signature(type(self.model).forward)

    @property
    def model(self) -> nn.Module:
        """The transformer; of several the first, which the others are like."""
        return self.stages[0].model

    @property
    def models(self) -> list[nn.Module]:
        """All of them."""
        return [stage.model for stage in self.stages]

    # -- requests --------------------------------------------------------------------------------

    @contextmanager
    def serving(self) -> Iterator[Request]:
        """The extent of one request; whatever it kept is gone afterwards."""
        with self.open(), self.serving_one() as request:
            yield request
            self.end()

    @contextmanager
    def open(self, requests: int = 1) -> Iterator[None]:
        """The extent of one request, or of several in flight together."""
        self.check_idle()
        self._open = True
        self.group.begin_requests(requests)
        self.stats = [RequestStats() for _ in range(requests)]
        self._hops = Hops(self.group)
        try:
            yield
        finally:
            self.request, self._open = None, False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """In the block another request may be served, which the one under way waits for."""
        request, stats, hops = self.request, self.stats, self._hops
        assert request is not None
        self.settle()
        request.traffic.pause()
        self.request, self._open = None, False
        try:
            yield
        finally:
            request.stats.add(self.last)
            self.request, self.stats, self._hops, self._open = request, stats, hops, True
            request.traffic.resume()

    def check_idle(self) -> None:
        """Refuses a request inside another one.

        Raises:
            RuntimeError: One is being served.
        """
        if self._open:
            raise RuntimeError("this pipeline is already serving a request: wait for it, or load a second pipeline")

    def end(self) -> None:
        """Ends them on all ranks; from here on they cannot be cancelled."""
        self.points.end()
        self.settle()

    def settle(self) -> None:
        """Waits until nothing of them is under way."""
        if self.request is not None and self.request.riders is not None:
            self.request.riders.run()
        self._hops.end()
        self.group.drain()

    @contextmanager
    def serving_one(self, number: int = 0) -> Iterator[Request]:
        """The extent of one of the requests; whatever it kept is gone afterwards."""
        request = self.request = Request(
            self.config, self.plan, self.group, number, halves=self._halves, shared=self._shared,
            points=self.points, stage=self.stages[0],
        )  # fmt: skip
        if self._offload is not None and self.config.pipefusion == self.config.distrifusion == 1:
            request.riders = Riders(self._offload, 2 if self.plan.guidance == "calls" else 1)
        self.stats[number % len(self.stats)] = request.stats
        request.traffic.resume()
        try:
            yield request
        finally:
            request.traffic.pause()
            request.finish()
            if self.request is request:  # else another's turn goes on while this one is given up
                self.request = None

    @property
    def last(self) -> RequestStats:
        """What the last request did on this rank."""
        return self.stats[-1]

    @contextmanager
    def branch(self, name: str, original: AbstractContextManager[Any] | None = None) -> Iterator[None]:
        """Names the guidance branch of the calls inside, as diffusers' ``cache_context`` does."""
        with original or nullcontext(), nullcontext() if self.request is None else self.request.naming(name):
            yield

    # -- one call --------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, stage: Stage, *args: Any, **kwargs: Any) -> Any:
        """A transformer's ``forward``: same arguments, a lazy result.

        Args:
            stage: This rank's part of that transformer.
            args: Its arguments by position.
            kwargs: Its arguments by name.

        Raises:
            ValueError: An input the plan does not cover, or a latent that cannot be cut as configured.
        """
        if self.request is None:
            raise RuntimeError(
                f"the {type(self.model).__name__} of a parallel pipeline was called outside a pipeline call; wrap your "
                "own loop in `with pipe.patchpipe.serving():` so that patchpipe knows where a request begins and ends"
            )
        inputs = self.request.known(self.plan.bind(self._signature, args, kwargs))
        self.request.turn_to(stage)
        self.request.begin_section(inputs)
        cut = self.request.cut_for(inputs)
        self._recut(inputs, cut)
        branch = self.request.branch_for(inputs, self.request.context)
        prediction: Any
        if self.request.answering:
            check_elsewhere(self.plan, inputs)
            prediction = self.plan.grid.given(self.request.answer(inputs, branch))
        else:
            plain, scale = split_scale(inputs, usual.ATTENTION_ARGUMENTS)
            with scaled(stage.model, scale):
                made, second = self._call(plain, cut, branch, rides=scale == 1)
            prediction = self.plan.grid.given(made)
            if second is not None:
                if inputs.get("return_dict", True):
                    raise ValueError(f"a parallel {self.plan.model} gives clip and sound as a pair: return_dict=False")
                return prediction, second
        if (cache := self.request.shapes_of(inputs).cache) is not None:
            return prediction, cache
        return Transformer2DModelOutput(sample=prediction) if inputs.get("return_dict", True) else (prediction,)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what ``forward`` would refuse of a request's first call, before anything is sent.

        Raises:
            ValueError: An input the plan does not cover, or a latent that cannot be cut or shared as configured.
        """
        assert self.request is not None
        self.request.turn_to(self.stages[0] if self.plan.beside else self.request.stage)  # where a step begins
        inputs = self.plan.bind(self._signature, args, kwargs)
        self.request.cut_for(inputs)
        self.request.shares_of(inputs)

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return self.plan.bind(self._signature, args, kwargs)

    def forget(self, number: int) -> None:
        """One of several requests in flight is over."""
        self._hops.forget(number)

    def _recut(self, inputs: dict[str, Any], cut: Cut) -> None:
        """A lazy latent that was reshaped since it was cut is gathered, on every rank alike."""
        latent = inputs[self.plan.latent]
        if isinstance(latent, PatchTensor) and (latent.cut_dim, latent.bounds) != (self.plan.grid.dim, cut.bounds):
            inputs[self.plan.latent] = latent.materialise("a latent of another shape")

    def _call(
        self, inputs: dict[str, Any], cut: Cut, branch: Branch, *, rides: bool
    ) -> tuple[PatchTensor, Tensor | None]:
        assert self.request is not None
        latent = inputs[self.plan.latent]
        synchronous = self.request.synchronous(branch, cut, latent.shape[0]) or self.plan.extracts(inputs)
        keeps = self.request.keeps_stores(cut)
        stored = keeps and self.config.changed_tokens is None
        passes = 1 if synchronous else self.request.passes(branch, latent.shape[0])
        call = Call(
            stage=self.request.stage,
            inputs=inputs,
            cut=cut,
            patches=(cut.whole,) if synchronous or self._displaced or len(cut.patches) == 1 else cut.patches,
            shares=self.request.shares_of(inputs, branch.index),
            stores=branch.stores if stored else None,
            prefixes=branch.prefixes,
            shared=() if synchronous else branch.shared,
            shapes=self.request.shapes_of(inputs),
            paces=branch.paces(inputs[self.plan.time], passes, asked=stored and self.config.forecasts),
            where=Where(branch.calls, branch.index, synchronous, request=self.request.number),
        )
        share = call.share_of(self.group.mesh)
        parts = [] if share is None else parts_of(call, share, self.request, self.group, halves=self._halves)
        self.points.begin("goes on to the next call of the transformer")
        self.request.count(synchronous, passes - 1)
        self.group.next_call()
        branch.calls, branch.cold = branch.calls + 1, False
        answers = Answers(call, self.plan, self.group)
        alone: Sharing | None = displaced_for(self.group, cut, branch if keeps else None, synchronous, call.pace)
        if keeps and not stored:
            alone = changed_for(self.group, cut, branch, inputs[self.plan.time], synchronous=synchronous)
        give: Callable[[int], Tensor] = answers.patch
        riders = self.request.riders if rides and self.group.recorder is None else None
        if share is None:
            for patch in call.patches:
                answers.expect(patch)
        elif riders is not None and may_ride(call, parts, self.plan):
            run = partial(self._stream, call, parts, answers, alone)
            give = riders.add(latent, call.stage, inputs.values(), run, give)
        else:
            self._stream(call, parts, answers, alone)
        second = answers.second(self._seconds) if self.plan.second else None
        self.points.finish()
        return PatchTensor.promise(
            call.shapes.output, call.shapes.dtype, latent.device, self.plan.grid.dim, cut.bounds,
            give if self.group.first else None, self.request,
        ), second  # fmt: skip

    def _stream(self, call: Call, parts: Sequence[Part], answers: Answers, alone: Sharing | None) -> None:
        """Runs every patch of this rank's share of a call through this stage.

        Where the model raises, the other ranks get zeros in place of what they wait for, if the call can be ended so.
        """
        key = call.where.request, call.where.branch
        crossings = self._hops.coded(key, [part.crossing(call, self.group) for part in parts])
        expected = self._hops.begin(key, crossings)
        for keys in call.shared:
            keys.begin(call.patches, call.pace)
        made: list[Tensor] = []
        self._seconds.clear()
        trailing: list[CallContext] = []
        failure: Exception | None = None
        for part, crossing, receives in zip(parts, crossings, expected, strict=True):
            assert self.request is not None
            context = part.context(call, self.request, self.group, alone)
            result, failure = self._try(call, part, crossing, receives, context, failure)
            if context.trailing is not None:
                trailing.append(context)
            if context.second is not None:
                self._seconds.append(context.second)
            if isinstance(result, Tensor):
                made.append(result)
            else:
                self._hops.pass_on(result, crossing)
                self._give_keys(call, part.patch)
            if part.completes and made:
                answers.give(made[0] if len(made) == 1 else torch.cat(made), part.patch)
                made.clear()
            if part.completes:
                answers.expect(part.patch)
        for keys in call.shared:
            keys.end()
        if failure is not None:
            self.points.finish()
            raise failure
        for context in trailing:  # when the next stage has all it waits for
            with span(self.group.recorder, "compute"):
                call.stage.trail(context)
        self._catch_up(call.inputs[self.plan.latent])

    def _try(
        self,
        call: Call,
        part: Part,
        crossing: Crossing,
        receives: Taken,
        context: CallContext,
        failure: Exception | None,
    ) -> tuple[Streams | Tensor, Exception | None]:
        """What this stage makes of a part, or zeros where it has failed, and why it has."""
        if failure is None:
            try:
                return self._run(call, part, receives, context), None
            except Exception as error:
                mates = {rank for line in self.group.lines.values() for rank in line.ranks}
                if call.shared or not self.points.fail_inside(error, mates):
                    raise
                failure = error
        return part.blank(call, crossing, self.plan.grid.dim, call.inputs[self.plan.latent].device), failure

    def _give_keys(self, call: Call, patch: Patch) -> None:
        """Sends the keys and values of a block that the next stage runs too, after the streams it waits for."""
        for keys in call.shared:
            if keys.earlier and keys.own(patch):
                keys.give(patch)

    def _run(self, call: Call, part: Part, receives: Taken, context: CallContext) -> Streams | Tensor:
        recorder, first = self.group.recorder, self.group.first
        if recorder is not None:
            patch = None if part.patch.whole else part.patch.index
            warmup = call.where.warmup or part.draft
            recorder.where = replace(call.where, patch=patch, half=part.share.half, warmup=warmup)
        with span(recorder if first else None, "latent"):
            latent = self._latent_piece(call, part) if first else None
        context.received = {name: receive.take() for name, receive in receives.items()}
        with span(recorder, "compute"):
            return call.stage.run(part.inputs, latent, context)

    def _latent_piece(self, call: Call, part: Part) -> Tensor:
        """This rank's part of a patch as a plain tensor: here the lazy arithmetic of the last step is done."""
        latent, dim, share = call.inputs[self.plan.latent], self.plan.grid.dim, part.share
        patch, piece = part.patch, part.piece
        if piece.uncut and not isinstance(latent, PatchTensor):
            rows = latent
        else:
            index = piece.part[0] if self._displaced else patch.index
            spans = [patch_of(latent, dim, start, stop, index) for start, stop in piece.spans]
            rows = spans[0] if len(spans) == 1 else torch.cat(spans, dim)
        return rows if share.size == latent.shape[0] else rows[share.range[0] : share.range[1]].contiguous()

    @property
    def _displaced(self) -> bool:
        return self.config.distrifusion > 1

    def _catch_up(self, latent: Tensor) -> None:
        """Does the arithmetic of the other ranks' parts one step late, when their predictions have long come."""
        if self._displaced and isinstance(latent, PatchTensor) and not latent.materialised:
            for index in range(self.config.distrifusion):
                latent.patch(index)
