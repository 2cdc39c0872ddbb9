"""Runs the transformer's calls through the stages: the schedule of the patch pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from patchpipe.config import ParallelConfig
from patchpipe.lazy import PatchTensor, patch_of
from patchpipe.mesh import Group
from patchpipe.models.plan import ModelPlan
from patchpipe.patches import Cut, Patch
from patchpipe.request import Branch, Request, RequestStats
from patchpipe.stage import CallContext, Stage, Streams
from patchpipe.transport import Receive

Take = Callable[[int], Tensor]


class Runner:
    """Stands in for a transformer's ``forward`` on one rank.

    Every rank calls it in the same order, since every rank runs the same pipeline code. A call streams the
    latent's patches (or the whole latent, in a synchronous step) through this rank's stage and returns at
    once with a lazy noise prediction, of which only the first stage ever holds values.

    Args:
        model: The transformer.
        plan: Its plan.
        config: The layout.
        group: The ranks.
        stage: This rank's part of the model.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, config: ParallelConfig, group: Group, stage: Stage) -> None:
        self.model, self.plan, self.config, self.group, self.stage = model, plan, config, group, stage
        self.request: Request | None = None
        self.last = RequestStats()
        self._branch_name: str | None = None
        self._dtype = _matrix_dtype(model)
        self._width = plan.width(model)
        self._signature = inspect.signature(type(model).forward)

    # -- requests --------------------------------------------------------------------------------

    @contextmanager
    def serving(self) -> Iterator[Request]:
        """The extent of one request; whatever it kept is gone afterwards."""
        if self.request is not None:
            raise RuntimeError("this pipeline is already serving a request: wait for it, or load a second pipeline")
        self.group.begin_request()
        self.request = Request(self.config, self.plan, self.model, self.group)
        self.last = self.request.stats
        sent, waited = self._traffic()
        try:
            yield self.request
            for channel in self._channels():
                channel.drain()
        finally:
            now_sent, now_waited = self._traffic()
            self.last = self.request.finish(now_sent - sent, now_waited - waited)
            self.request = None

    @contextmanager
    def branch(self, name: str, original: AbstractContextManager[Any] | None = None) -> Iterator[None]:
        """Names the guidance branch of the calls inside, as diffusers' ``cache_context`` does."""
        outer, self._branch_name = self._branch_name, name
        try:
            if original is None:
                yield
            else:
                with original:
                    yield
        finally:
            self._branch_name = outer

    # -- one call --------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's ``forward``: same arguments, a lazy result.

        Raises:
            ValueError: An input the plan does not cover, or a latent that cannot be cut as configured.
        """
        if self.request is None:
            raise RuntimeError(
                "the transformer was called outside a pipeline call; wrap your own loop in "
                "`with pipe.patchpipe.serving():` so that patchpipe knows where a request begins and ends"
            )
        inputs = self.plan.bind(self._signature, args, kwargs)
        cut = self.request.cut_for(inputs)
        self._recut(inputs, cut)
        branch = self.request.branch_for(inputs, self._branch_name)
        prediction = self._call(inputs, cut, branch)
        if inputs.get("return_dict", True):
            return Transformer2DModelOutput(sample=prediction)
        return (prediction,)

    def _recut(self, inputs: dict[str, Any], cut: Cut) -> None:
        """A lazy latent that was reshaped since it was cut is gathered, on every rank alike."""
        latent = inputs[self.plan.latent]
        if isinstance(latent, PatchTensor) and (latent.cut_dim, latent.bounds) != (self.plan.grid.dim, cut.bounds):
            inputs[self.plan.latent] = latent.materialise("a latent of another shape")

    def _call(self, inputs: dict[str, Any], cut: Cut, branch: Branch) -> PatchTensor:
        assert self.request is not None
        synchronous = self.request.synchronous(branch, cut)
        patches = (cut.whole,) if synchronous else cut.patches
        stores = branch.stores if self.request.keeps_stores(cut) else None
        self._count(synchronous)
        branch.calls += 1
        take = self._stream(inputs, cut, patches, stores)
        latent = inputs[self.plan.latent]
        shape = self.plan.grid.output_shape(self.model, latent.shape)
        return PatchTensor.promise(
            shape, self._dtype, latent.device, self.plan.grid.dim, cut.bounds,
            self._as_patches(take, cut) if synchronous and take else take, self.request,
        )  # fmt: skip

    def _count(self, synchronous: bool) -> None:
        if synchronous:
            self.last.steps_synchronous += 1
        else:
            self.last.steps_patched += 1

    def _stream(
        self, inputs: dict[str, Any], cut: Cut, patches: tuple[Patch, ...], stores: dict[str, Any] | None
    ) -> Take | None:
        """Runs every patch through this stage; gives the way to the noise prediction on the first stage."""
        assert self.request is not None
        text_rows = self.plan.text_rows(inputs)
        expected = [self._expect_streams(inputs, patch, text_rows) for patch in patches]
        answers = self._expect_answers(inputs, patches)
        memo: dict[str, Any] = {}
        results: list[Tensor] = []
        for patch, receives in zip(patches, expected, strict=True):
            received = {name: receive.take() for name, receive in receives.items()}
            context = CallContext(patch, stores, text_rows, received or None, memo, self.request.memo)
            latent = self._latent_patch(inputs, cut, patch) if self.group.first else None
            result = self.stage.run(inputs, latent, context)
            if isinstance(result, Tensor):
                self._answer(result, results)
            else:
                self._pass_on(result, patch, text_rows)
        if not self.group.first:
            return None
        return (lambda index: answers[index].take()) if answers else results.__getitem__

    def _as_patches(self, take: Take, cut: Cut) -> Take:
        """The patches of a prediction that comes in one piece."""
        whole: list[Tensor] = []

        def piece(index: int) -> Tensor:
            if not whole:
                whole.append(take(0))
            start, stop = cut.bounds[index], cut.bounds[index + 1]
            return whole[0].narrow(self.plan.grid.dim, start, stop - start).contiguous()

        return piece

    def _latent_patch(self, inputs: dict[str, Any], cut: Cut, patch: Patch) -> Tensor:
        """A patch of the latent as a plain tensor: here the lazy arithmetic of the last step is done."""
        latent, dim = inputs[self.plan.latent], self.plan.grid.dim
        if not isinstance(latent, PatchTensor):
            return latent if patch.whole else patch_of(latent, dim, *patch.units, patch.index)
        if not patch.whole:
            return latent.patch(patch.index)
        return torch.cat([latent.patch(index) for index in range(len(cut.patches))], dim=dim)

    # -- hops ------------------------------------------------------------------------------------

    def _stream_shapes(self, inputs: dict[str, Any], patch: Patch, text_rows: int) -> dict[str, torch.Size]:
        """Shapes of what goes from stage to stage, the same worked out on both sides."""
        batch = inputs[self.plan.latent].shape[0]
        shapes = {"hidden_states": torch.Size((batch, patch.token_count, self._width))}
        if text_rows and patch.carries_text:
            shapes[self.plan.text] = torch.Size((batch, text_rows, self._width))
        return shapes

    def _expect_streams(self, inputs: dict[str, Any], patch: Patch, text_rows: int) -> dict[str, Receive]:
        if self.group.first:
            return {}
        channel = self.group.channel_from_previous()
        shapes = self._stream_shapes(inputs, patch, text_rows)
        return {name: channel.expect(shape, self._dtype) for name, shape in shapes.items()}

    def _pass_on(self, streams: Streams, patch: Patch, text_rows: int) -> None:
        channel = self.group.channel_to_next()
        names = ["hidden_states"] + ([self.plan.text] if text_rows and patch.carries_text else [])
        for name in names:
            if streams[name].dtype != self._dtype:
                raise RuntimeError(
                    f"{name} left the stage as {streams[name].dtype}, the next one expects {self._dtype}"
                )
            channel.send(streams[name])

    def _expect_answers(self, inputs: dict[str, Any], patches: tuple[Patch, ...]) -> list[Receive]:
        if not self.group.first or self.group.last:
            return []
        channel, dim = self.group.channel_from_last(), self.plan.grid.dim
        shape = list(self.plan.grid.output_shape(self.model, inputs[self.plan.latent].shape))
        receives = []
        for patch in patches:
            shape[dim] = patch.units[1] - patch.units[0]
            receives.append(channel.expect(tuple(shape), self._dtype))
        return receives

    def _answer(self, prediction: Tensor, results: list[Tensor]) -> None:
        if self.group.first:
            results.append(prediction)
        else:
            self.group.channel_to_first().send(prediction)

    def _channels(self) -> list[Any]:
        if self.group.world_size == 1:
            return []
        group, found = self.group, []
        if not group.first:
            found.append(group.channel_from_previous())
        if not group.last:
            found.append(group.channel_to_next())
        if group.last:
            found.append(group.channel_to_first())
        if group.first:
            found.append(group.channel_from_last())
        return found

    def _traffic(self) -> tuple[int, float]:
        channels = self._channels()
        return sum(c.sent_bytes for c in channels), sum(c.waited_seconds for c in channels)


def _matrix_dtype(model: nn.Module) -> torch.dtype:
    """The dtype the model computes in; single vectors may be kept in float32."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.ndim >= 2]
    return max(set(dtypes), key=dtypes.count)
