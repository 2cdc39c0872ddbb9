"""A pipeline's parallel side: its hooks, its requests, and the pipelines that share its modules."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any, NoReturn

from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.errors import PatchpipeError
from patchpipe.kernels.choice import watch_kernels
from patchpipe.layout.split import StageBlocks, sharing_stages
from patchpipe.lazy.latent import materialise_tree
from patchpipe.loading.choice import check_served, original_class
from patchpipe.lockstep.board import say_goodbye
from patchpipe.models import plan_for, transformers_of
from patchpipe.offload.offload import Offload
from patchpipe.parallel.blocks import Blocks
from patchpipe.parallel.tensor import TensorPart
from patchpipe.pipeline.callbacks import Callbacks
from patchpipe.pipeline.extent import Extent
from patchpipe.pipeline.modular.steps import SHARE, is_modular
from patchpipe.pipeline.parts import Hooks, Parts, hook_transformer, quieten
from patchpipe.pipeline.preview import Previews, Show
from patchpipe.pipeline.relatives import mark, others_with
from patchpipe.pipeline.requests import Requests, copy_for
from patchpipe.pipeline.served import served_class
from patchpipe.pipeline.tracing import Tracing
from patchpipe.recipes.adapters import Adapters, modules_of
from patchpipe.recipes.saving import no_saving
from patchpipe.schedule.request import Request, RequestStats
from patchpipe.schedule.runner import Runner
from patchpipe.schedule.shared_keys import shared_with_neighbours
from patchpipe.stage.balance import goes_in_halves
from patchpipe.stage.stage import Stage
from patchpipe.tracing.timeline import check_target


class Attachment:
    """A pipeline's parallel side, as ``pipe.patchpipe``.

    Args:
        pipe: The pipeline.
        config: The layout.
        group: The ranks.
        split: The blocks of every stage.
        parts: This rank's part of the matrices of each transformer, where they are split.
        offload: Moves the blocks' weights, where not all of them stay on the device.

    Attributes:
        runner: Runs the transformer's calls.
        requests: Runs requests.
    """

    def __init__(
        self,
        pipe: Any,
        config: ParallelConfig,
        group: Group,
        split: Sequence[StageBlocks],
        parts: Sequence[TensorPart | None],
        offload: Offload | None = None,
    ) -> None:
        self.config, self.group, self.offload = config, group, offload
        plan, owned = plan_for(pipe.transformer), split[group.stage]
        kernels = watch_kernels(group.device, group.output)
        ahead = config.values_first
        stages = [
            Stage(model, plan, owned, first=group.first, last=group.last, kernels=kernels, values_first=ahead)
            for model in transformers_of(pipe).values()
        ]
        group.open_keys(sharing_stages(split))
        shared = shared_with_neighbours(owned, stages[0].places, group)
        halves = goes_in_halves(config, split)
        self.runner = Runner(plan, config, group, stages, halves=halves, shared=shared, offload=offload)
        away = None if offload is None else offload.attach
        self._blocks = [Blocks(stage, part, config, group, away) for stage, part in zip(stages, parts, strict=True)]
        self._adapters = Adapters(pipe, self._blocks, self.runner)
        self._pipe = pipe
        self._hooks = Hooks()
        self._encode: Callable[..., Any] | None = None  # the pipeline's own, where one rank runs it for all
        self._tracing: Tracing | None = None
        self._extent = Extent(group, self.runner, lambda: self._adapters.state)
        self._callbacks = Callbacks()
        self.requests = Requests(config, group, self.runner, self._extent, self._callbacks)
        self._parts = Parts(config, group, self.runner, self._callbacks, self._finish_previews)
        self._previews: Previews | None = None
        self._first = self  # the attachment of the pipeline that was made parallel
        self._others: list[weakref.ref[Any]] = []  # pipelines that share its modules
        self._calls: list[tuple[int, Any]] = []  # pipelines being called, the inner ones last, and by which thread

    @property
    def last(self) -> RequestStats:
        """What the last request did on this rank."""
        return self.runner.last

    @property
    def stats(self) -> Sequence[RequestStats]:
        """The same for every request of the last `together`, in order."""
        return self.runner.stats

    @contextmanager
    def serving(self) -> Iterator[Request]:
        """The extent of a request, for a denoising loop of one's own around ``pipe.transformer``."""
        self._extent.begin(self._run, [])
        with self._extent.ending(), self._traced(), self.runner.serving() as request:
            yield request

    def cancel(self) -> bool:
        """Ends the request under way, on all ranks; any rank may call it, in a callback or from another thread.

        All ranks stop at the same call of the transformer, the next one that none of them has begun. There the
        pipeline's call raises ``Cancelled`` on every rank. The pipeline can serve the next request.

        Returns:
            Whether there was a request that could still be ended. One whose last call is over gives its picture.
        """
        return self._extent.cancel()

    @contextmanager
    def preview(self, every: int = 5, *, show: Show) -> Iterator[None]:
        """Shows approximate pictures of the requests in the block, which do not wait for them; every rank enters it.

        Example::

            with pipe.patchpipe.preview(every=5, show=lambda preview: preview.images[0].save("preview.png")):
                image = pipe(prompt)

        Args:
            every: Steps between them. The last step has none: the picture itself follows.
            show: Called with each ``Preview`` on the output rank, in a thread of its own; ignored on others.

        Raises:
            ValueError: ``every`` is no number of steps.
        """
        first = self._first
        if is_modular(self._pipe):
            raise ValueError(
                f"previews of a {type(self._pipe).__name__} have not been tested: use an ordinary pipeline"
            )
        outer, first._previews = (
            first._previews,
            Previews(every, show, first=self.group.rank == 0, output=self.group.output),
        )
        try:
            yield
        finally:
            first._previews = outer

    def _previewed(self, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        previews = self._first._previews
        if previews is None or self._first._calls or not self.requests.use_transformer(self._pipe):
            return nullcontext()
        names = [name for name in inspect.signature(original).parameters if name != "self"]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        return previews.of(self._pipe, original, arguments, self._extent.board)

    def _finish_previews(self) -> None:
        """One decodes at a time."""
        if self._first._previews is not None:
            self._first._previews.finish()

    @property
    def _run(self) -> Callable[..., Any]:
        """The pipeline's own call."""
        return partial(original_class(self._pipe).__call__, self._pipe)  # type: ignore[operator]

    def _traced(self) -> AbstractContextManager[None]:
        return nullcontext() if self._first._tracing is None else self._first._tracing.request()

    @contextmanager
    def tracing(self, path: str | Path) -> Iterator[None]:
        """Writes the timeline of every request in the block to a file; every rank enters it alike.

        The file is in Chrome's trace format, for ui.perfetto.dev, and `patchpipe trace` draws it. The output rank
        writes it when a request has ended; a second request in the block goes to ``NAME-2.json``, and so on.

        Args:
            path: The file, ``NAME.json``.

        Raises:
            ValueError: It cannot be written to, or the pipeline is being traced already.
        """
        if self._first._tracing is not None:
            raise ValueError("the pipeline is being traced already: end the outer `with …tracing(…)` first")
        place = self.group.share(self.config.output_rank, lambda: str(check_target(Path(path))))
        self._first._tracing = Tracing(Path(place), self.group, lambda: self.runner.stats, self._about)
        try:
            yield
        finally:
            self._first._tracing = None

    @property
    def _about(self) -> dict[str, Any]:
        """What a timeline says of this pipeline."""
        return {
            "pipeline": type(self._pipe).__name__,
            "model": type(self.runner.model).__name__,
            "layout": self.config.as_dict(),
            "layout_text": self.config.describe(),
        }

    def attach(self) -> None:
        """Hooks the pipeline: its call, its transformers, its text encoding and its VAE."""
        pipe = self._pipe
        for stage, blocks in zip(self.runner.stages, self._blocks, strict=True):
            try:
                blocks.attach()
            except (ValueError, PatchpipeError):
                self._hooks.undo()
                self.group.close()
                raise
            self._hooks.undone_by(blocks.detach)
            methods = {"save_pretrained": self.refuse_saving, **self._adapters.model_methods(stage.model)}
            hook_transformer(stage, self.runner, methods, self._hooks)
        self._parts.hook_encoders(pipe, self._hooks)
        if isinstance(getattr(pipe, "vae", None), nn.Module):
            strips = self.config.parallel_vae and self.group.world_size > 1
            self._parts.hook_vae(pipe.vae, self._hooks, strips=strips)
        self._serve()
        shared = [part for name, part in modules_of(pipe).items() if name.startswith(("text_encoder", "vae"))]
        shared += self.runner.models
        self._hooks.undone_by(mark(shared, self._adopt_new))
        for other in others_with(shared, pipe):
            self.adopt(other)
        if self.group.store is not None:
            self._hooks.undone_by(weakref.finalize(self, say_goodbye, self.group.store, self.group.rank))

    def adopt(self, pipe: Any) -> Attachment:
        """Serves another pipeline that shares modules with this one: on the same ranks, each call a request of its own.

        Pipelines made of this one's parts come here by themselves.

        Args:
            pipe: The other pipeline.

        Returns:
            Its attachment.
        """
        held: Attachment | None = vars(pipe).get("patchpipe")
        if held is not None and held._pipe is pipe:
            return held
        view = copy.copy(self._first)
        view._pipe, view._hooks, view._encode = pipe, Hooks(), None
        if held is not None:  # a copy of a parallel pipeline, with what was set on that one
            for name in ("encode_prompt", "patchpipe", SHARE):
                vars(pipe).pop(name, None)
        view._serve()
        others = self._first._others
        others[:] = [*(other for other in others if other() is not None), weakref.ref(pipe)]
        return view

    def _adopt_new(self, pipe: Any) -> None:
        check_served(pipe)
        self.adopt(pipe)

    def release(self) -> None:
        """Leaves this one pipeline as it was found."""
        self._hooks.undo()

    def refuse_saving(self, *_: Any, **__: Any) -> NoReturn:
        """Stands in for ``save_pretrained``."""
        raise no_saving([*modules_of(self._pipe).values(), *self.runner.models], split=self.config.tensor > 1)

    def _serve(self) -> None:
        """Hooks what a pipeline has for itself: its call, its progress bar and its text encoding."""
        pipe, kind = self._pipe, original_class(self._pipe)
        self._encode = self._parts.hook_text(pipe, self._hooks)
        if not self.group.output:
            quieten(pipe, self._hooks)
        pipe.__class__ = served_class(kind)
        self._hooks.undone_by(lambda: setattr(pipe, "__class__", kind))
        self._hooks.set(pipe, "patchpipe", self)

    @property
    def graphs(self) -> Mapping[str, int]:
        """Graphs that were compiled so far, by kind of block."""
        found: Counter[str] = Counter()
        for blocks in self._blocks:
            found.update(blocks.graphs)
        return found

    def change_adapters(self, name: str, method: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Runs one of diffusers' methods for LoRA; see ``recipes.adapters``."""
        return self._adapters.change(name, method, args, kwargs)

    def detach(self) -> None:
        """Leaves the pipeline, and all that share its modules, as they were found."""
        first = self._first
        for other in first._others:
            view: Attachment | None = vars(other() or first).get("patchpipe")
            if view is not None and view._first is first:  # neither gone nor with another attachment by now
                view.release()
        first.release()
        self.group.close()

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one request: the pipeline's output on the output rank, ``None`` on the others.

        Where another pipeline on the same weights makes the call, all ranks get the output, for it to go on with.
        """
        calls = self._first._calls
        if not calls or calls[-1][0] != get_ident() or any(pipe is self._pipe for _, pipe in calls):
            return self._request(original, args, kwargs)
        args, kwargs = materialise_tree((args, kwargs), f"a call of {type(self._pipe).__name__}")
        with self.runner.set_aside():
            output = self._request(original, args, kwargs)
        return self.everywhere(output)

    def everywhere(self, value: Any) -> Any:
        """Gives every rank what the output rank has, such as a picture another pipeline is to go on with.

        Args:
            value: Anything, of which only the output rank's counts.

        Returns:
            The output rank's value. Every rank calls this alike.
        """
        with self.runner.points.passing():
            return self.group.share(self.config.output_rank, lambda: value)

    def _request(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.requests.run(
            self._pipe,
            original,
            args,
            kwargs,
            own=self._first is self,
            around=partial(self._around, original, args, kwargs),
        )

    @contextmanager
    def _around(self, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """What else a request has around it on this rank."""
        vae = getattr(self._pipe, "vae", None)
        with self._traced(), self._previewed(original, args, kwargs), self._calling():
            if isinstance(vae, nn.Module):  # it may be another one by now
                self._parts.hook_vae(vae, self._first._hooks)
            yield

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """In the block, other pipelines on the same weights may be called."""
        self._first._calls.append((get_ident(), self._pipe))
        try:
            yield
        finally:
            self._first._calls.pop()

    def together(
        self,
        calls: Sequence[Mapping[str, Any]],
        *,
        seeds: Sequence[int] | None = None,
        bars: Sequence[Callable[..., Any]] | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Runs several calls of the pipeline in flight together; every rank calls it alike.

        Each paints what it would paint alone. A stage that has nothing to do for one of them works for another: with
        every step synchronous, as many calls as there are stages keep all stages busy. Keys and values, and what the
        pipeline keeps of a call, are in memory once for each call.

        Args:
            calls: The arguments of each call, by name. They may differ in everything.
            seeds: What each call seeds the default generator with, where it uses that one in place of a
                ``generator``, as ``torch.manual_seed`` before the call alone would; ``None`` draws seeds from it.
            bars: What stands in for the pipeline's ``progress_bar`` in each call; ``None`` shows a bar for each.
            return_exceptions: Whether a call that is refused gives its error in place of an output. Otherwise one
                refused call refuses all of them, before anything is painted.

        Returns:
            What each call gives: the pipeline's output on the output rank, ``None`` on the others.

        Raises:
            ValueError: A call is refused (also ``TypeError``), two calls share a generator, or the layout is not
                tested so. The pipeline stays usable.
            PatchpipeError: A rank failed.
        """
        own, errors = self._first is self, return_exceptions
        return self.requests.fly(
            self._pipe, calls, seeds, bars, own=own, around=self._traced, copied=self.copied, return_exceptions=errors
        )

    def copied(self, number: int, bar: Callable[..., Any] | None) -> Any:
        """The pipeline once more, for one of several calls in flight; see ``requests.copy_for``."""
        copied, encode = copy_for(self._pipe, number, bar, self._encode)
        if encode is not None:
            vars(copied)["encode_prompt"] = self._parts.share_prompts(encode)
        return copied
