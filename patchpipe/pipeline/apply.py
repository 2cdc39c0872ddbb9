"""Attaches the patch pipeline to a diffusers pipeline, and takes it off again."""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import nn

from patchpipe.config import SPREAD, AutoLayout, ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.joining import meet, settle
from patchpipe.distributed.mesh import Group
from patchpipe.kernels.choice import watch_kernels
from patchpipe.layout.combinations import check_together
from patchpipe.lazy.latent import materialise_tree
from patchpipe.loading.choice import check_served, original_class
from patchpipe.loading.quantised import check_in_memory
from patchpipe.lockstep.board import say_goodbye
from patchpipe.models import plan_for
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.blocks import Blocks
from patchpipe.parallel.refusals import check_calls, check_guidance
from patchpipe.parallel.tensor import TensorPart, check_tensor, tensor_part
from patchpipe.pipeline.callbacks import Callbacks
from patchpipe.pipeline.extent import Extent
from patchpipe.pipeline.preview import Previews, Show
from patchpipe.pipeline.relatives import mark, pipelines_with
from patchpipe.pipeline.served import served_class
from patchpipe.pipeline.tracing import Tracing
from patchpipe.recipes.adapters import Adapters, modules_of
from patchpipe.recipes.checks import check_recipes, check_surroundings
from patchpipe.recipes.saving import no_saving
from patchpipe.schedule.flights import Flights, Refused
from patchpipe.schedule.request import Request, RequestStats
from patchpipe.schedule.runner import Runner
from patchpipe.schedule.shared_keys import shared_with_neighbours
from patchpipe.stage.balance import StageBlocks, goes_in_halves, sharing_stages, split_blocks
from patchpipe.stage.stage import Stage
from patchpipe.tracing.recorder import span
from patchpipe.tracing.timeline import check_target
from patchpipe.vae import spread_vae

logger = logging.getLogger("patchpipe")


class _OutputElsewhere(BaseException):
    """Ends the pipeline on a rank that has nothing left to do: another one decodes."""


class Attachment:
    """A pipeline's parallel side, as ``pipe.patchpipe``.

    Args:
        pipe: The pipeline.
        config: The layout.
        group: The ranks.
        split: The blocks of every stage.
        part: This rank's part of their matrices, where they are split.

    Attributes:
        config: The layout.
        group: The ranks.
        runner: Runs the transformer's calls.
    """

    def __init__(
        self,
        pipe: Any,
        config: ParallelConfig,
        group: Group,
        split: Sequence[StageBlocks],
        part: TensorPart | None = None,
    ) -> None:
        self.config, self.group = config, group
        model: nn.Module = pipe.transformer
        plan = plan_for(model)
        kernels = watch_kernels(group.device, group.output)
        stage = Stage(model, plan, split[group.stage], first=group.first, last=group.last, kernels=kernels)
        group.open_keys(sharing_stages(split))
        shared = shared_with_neighbours(split[group.stage], plan.blocks_of(model), group)
        self.runner = Runner(model, plan, config, group, stage, halves=goes_in_halves(config, split), shared=shared)
        self._blocks = Blocks(stage, part, config, group)
        self._adapters = Adapters(pipe, self._blocks, self.runner)
        self._pipe = pipe
        self._undo: list[Callable[[], None]] = []
        self._encode: Callable[..., Any] | None = None  # the pipeline's own, where one rank runs it for all
        self._tracing: Tracing | None = None
        self._extent = Extent(group, self.runner, lambda: self._adapters.state)
        self._callbacks = Callbacks()
        self._previews: Previews | None = None
        self._first = self  # the attachment of the pipeline that was made parallel
        self._others: list[weakref.ref[Any]] = []  # pipelines that share its modules
        self._hooked: set[int] = set()  # VAEs
        self._calls: list[tuple[int, Any]] = []  # pipelines being called, the inner ones last, and by which thread
        self._computing = False  # this rank alone, for all of them

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
        if previews is None or self._first._calls or not self._uses_transformer:
            return nullcontext()
        names = [name for name in inspect.signature(original).parameters if name != "self"]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        return previews.of(self._pipe, original, arguments, self._extent.board)

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
        """Hooks the pipeline: its call, its transformer, its text encoding and its VAE."""
        pipe, model = self._pipe, self._pipe.transformer
        try:
            self._blocks.attach()
        except ValueError:
            self.group.close()
            raise
        self._undo.append(self._blocks.detach)
        self._set(model, "forward", self.runner.forward)
        self._set(model, "save_pretrained", self.refuse_saving)
        for name, method in self._adapters.model_methods().items():
            self._set(model, name, method)
        if hasattr(model, "cache_context"):
            original = model.cache_context
            self._set(model, "cache_context", lambda name, **kw: self.runner.branch(name, original(name, **kw)))
        if self.config.text_rank == SPREAD:
            self._hook_encoders()
        if isinstance(getattr(pipe, "vae", None), nn.Module):
            self._hook_vae(pipe.vae, strips=self.config.parallel_vae and self.group.world_size > 1)
        self._serve()
        parts = modules_of(pipe).items()
        shared = [model, *(part for name, part in parts if name == "vae" or name.startswith("text_encoder"))]
        self._undo.append(mark(shared, self._adopt_new))
        for other in pipelines_with(shared):
            self.adopt(other)
        if self.group.store is not None:
            self._undo.append(weakref.finalize(self, say_goodbye, self.group.store, self.group.rank))

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
        view._pipe, view._undo, view._encode = pipe, [], None
        if held is not None:  # a copy of a parallel pipeline, with what was set on that one
            for name in ("encode_prompt", "patchpipe"):
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
        while self._undo:
            self._undo.pop()()

    def refuse_saving(self, *_: Any, **__: Any) -> NoReturn:
        """Stands in for ``save_pretrained``."""
        raise no_saving([*modules_of(self._pipe).values(), self.runner.model], split=self.config.tensor > 1)

    def _serve(self) -> None:
        """Hooks what a pipeline has for itself: its call, its progress bar and its text encoding."""
        pipe, kind = self._pipe, original_class(self._pipe)
        if self.config.text_rank != SPREAD and hasattr(pipe, "encode_prompt"):
            self._encode = pipe.encode_prompt
            self._set(pipe, "encode_prompt", self._on_owner(self._encode, self.config.encoder_rank(), "text"))
        if not self.group.output:
            self._quieten()
        pipe.__class__ = served_class(kind)
        self._undo.append(lambda: setattr(pipe, "__class__", kind))
        self._set(pipe, "patchpipe", self)

    @property
    def graphs(self) -> Mapping[str, int]:
        """Graphs that were compiled so far, by kind of block."""
        return self._blocks.graphs

    def change_adapters(self, name: str, method: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Runs one of diffusers' methods for LoRA; see ``pipeline.adapters``."""
        return self._adapters.change(name, method, args, kwargs)

    def _hook_encoders(self) -> None:
        """Each text encoder runs on a rank of its own and gives all its result."""
        for name, part in modules_of(self._pipe).items():
            if name.startswith("text_encoder"):
                self._set(part, "forward", self._on_owner(part.forward, self.config.encoder_rank(name), "text"))

    def _hook_vae(self, vae: nn.Module, *, strips: bool = False) -> None:
        """Decoding on the output rank alone, or on all ranks in strips of rows."""
        first = self._first
        if id(vae) in first._hooked:
            return
        if strips:
            first._undo.append(spread_vae(vae, self.group.rows(), gather_to=self.config.output_rank))
        else:
            first._set(vae, "encode", self._on_owner(vae.encode, self.config.output_rank, "vae"))
        first._set(vae, "decode", self._decode(vae.decode))
        first._hooked.add(id(vae))

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
        _, problem = attempt(lambda: self._check_request(original, args, kwargs))
        self._extent.begin(partial(original, self._pipe), [(args, kwargs)], problem)
        if self._uses_transformer:
            self._warn_if_synchronous(kwargs)
        vae = getattr(self._pipe, "vae", None)
        with (
            self._extent.ending(),
            self._traced(),
            self._previewed(original, args, kwargs),
            self.runner.serving(),
            self._calling(),
        ):
            self._align(kwargs.get("generator"))
            if isinstance(vae, nn.Module):  # it may be another one by now
                self._hook_vae(vae)
            return self._paint(self._pipe, original, args, kwargs)

    def _check_request(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        check_served(self._pipe)
        self._check_recipes()
        if self._uses_transformer:
            check_guidance(partial(original, self._pipe), args, kwargs, self.runner.plan, self.config)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """In the block, other pipelines on the same weights may be called."""
        self._first._calls.append((get_ident(), self._pipe))
        try:
            yield
        finally:
            self._first._calls.pop()

    @property
    def _uses_transformer(self) -> bool:
        return any(part is self.runner.model for part in vars(self._pipe).values())

    def _paint(self, pipe: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            output = original(pipe, *args, **self._callbacks.noticed(kwargs))
            output = materialise_tree(output, "the pipeline's output")
        except _OutputElsewhere:
            return None
        return output if self.group.output or not self._uses_transformer else None

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
        _, problem = attempt(lambda: self._check_together(calls, seeds, bars))
        self._extent.begin(self._run, [] if problem else [((), call) for call in calls], problem)
        for call in calls:
            self._warn_if_synchronous(dict(call))
        original, flights = type(self._pipe).__mro__[1].__call__, Flights(self.runner, self.group, seeds, len(calls))

        def paint(number: int, call: Mapping[str, Any]) -> Any:
            check_guidance(partial(original, self._pipe), (), call, self.runner.plan, self.config)
            self._align(call.get("generator"))
            return self._paint(self._copy(number, None if bars is None else bars[number]), original, (), call)

        try:
            with self._extent.ending(), self._traced():
                return flights.run([partial(paint, *entry) for entry in enumerate(calls)], return_exceptions)
        except Refused as refused:
            raise refused.error from refused.error.__cause__

    def _check_recipes(self) -> None:
        """Refuses what was done to the pipeline since, or is done around this call."""
        check_surroundings(self._pipe, self.runner, own=self._first is self)

    def _check_together(
        self, calls: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None, bars: Sequence[Callable[..., Any]] | None
    ) -> None:
        check_calls(calls, seeds, bars)
        self._check_recipes()
        check_together(self.config.methods, self.config.compile)
        if getattr(self._pipe.transformer, "is_cache_enabled", False):
            raise ValueError("a step cache keeps one request's results: disable_cache() before requests fly together")

    def _copy(self, number: int, bar: Callable[..., Any] | None) -> Any:
        """The pipeline once more, with the same models but its own scheduler, for one of several calls in flight.

        Pipelines keep the guidance strength, the number of steps and the like on themselves during a call.
        """
        copied = copy.copy(self._pipe)
        own = vars(copied)
        for name, value in vars(self._pipe).items():
            own[name] = _bound_to(copied, value, self._pipe)
        if self._encode is not None:
            encode = _bound_to(copied, self._encode, self._pipe)
            own["encode_prompt"] = self._on_owner(encode, self.config.encoder_rank(), "text")
        if "scheduler" in own:
            own["scheduler"] = copy.deepcopy(own["scheduler"])
        own["_progress_bar_config"] = {**own.get("_progress_bar_config", {}), "position": number}
        if bar is not None:
            own["progress_bar"] = bar
        return copied

    def _warn_if_synchronous(self, kwargs: dict[str, Any]) -> None:
        steps, warmup = kwargs.get("num_inference_steps"), self.config.warmup
        several = self.config.patches not in (None, 1) or max(self.config.pipefusion, self.config.distrifusion) > 1
        if isinstance(steps, int) and isinstance(warmup, int) and steps <= warmup and several and self.group.output:
            logger.warning(
                "num_inference_steps=%d is not more than warmup=%d: every step runs synchronously, no patch streams",
                steps,
                warmup,
            )

    def _align(self, generator: Any) -> None:
        """Generators go on from rank 0's state: several ranks may do the scheduler's arithmetic."""
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator or [])
        if self.group.world_size == 1 or not generators:
            return
        with self.runner.points.passing():
            states = self.group.share(0, lambda: [each.get_state() for each in generators])
        for each, state in zip(generators, states, strict=True):
            each.set_state(state.cpu())

    def _on_owner(self, compute: Callable[..., Any], owner: int, carries: str) -> Callable[..., Any]:
        @wraps(compute)
        def shared(*args: Any, **kwargs: Any) -> Any:
            if self._first._computing:  # part of what the other ranks get as a whole
                return compute(*args, **kwargs)
            with span(self.group.recorder, "encode"), self.runner.points.passing():
                return self.group.share(owner, lambda: alone(*args, **kwargs), carries)

        def alone(*args: Any, **kwargs: Any) -> Any:
            self._first._computing = True
            try:
                return compute(*args, **kwargs)
            finally:
                self._first._computing = False

        return shared

    def _decode(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Every rank gathers the latent at this point; only the output rank goes on."""

        def here(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = materialise_tree((args, kwargs), "vae.decode")
            if self._first._previews is not None:
                self._first._previews.finish()  # one decodes at a time
            if self._callbacks.running:  # the pipeline goes on afterwards, so every rank gets the picture
                with self.runner.points.passing("decodes the latent"):
                    self.runner.points.meet()
                    picture = decode(*args, **kwargs) if self.config.parallel_vae else None
                    return self.group.share(
                        self.config.output_rank, lambda: picture or decode(*args, **kwargs), "picture"
                    )
            if not self.group.output and not self.config.parallel_vae:
                raise _OutputElsewhere
            with span(self.group.recorder, "decode"):
                picture = decode(*args, **kwargs)
            if not self.group.output:
                raise _OutputElsewhere
            return picture

        return here

    def _quieten(self) -> None:
        """One progress bar is enough."""
        pipe = self._pipe
        kept = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**{**kept, "disable": True})
        self._undo.append(lambda: pipe.set_progress_bar_config(**kept))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        had, previous = name in owner.__dict__, owner.__dict__.get(name)
        object.__setattr__(owner, name, value)
        self._undo.append(lambda: object.__setattr__(owner, name, previous) if had else object.__delattr__(owner, name))


def parallelize(pipe: Any, config: ParallelConfig | AutoLayout | None = None, *, group: Group | None = None) -> Any:
    """Spreads a pipeline that is already in memory over the ranks of this process's group.

    Every rank calls it with the same pipeline. Call the pipeline as ever afterwards: the output rank gets the
    images, the others ``None``. Parameters other ranks own, and matrices split over ranks, stay in memory whole, so
    that ``restore`` can give the pipeline back; ``from_pretrained`` reads only what a rank owns.

    Args:
        pipe: A diffusers pipeline whose transformer has a plan.
        config: The layout; ``None`` takes the planner's for the ranks there are, an ``AutoLayout`` says more of what is
            wanted of it.
        group: The ranks; ``None`` joins those ``torchrun`` started.

    Returns:
        The same pipeline.

    Raises:
        UnsupportedModel: The transformer's class has no plan.
        ValueError: The layout does not fit the model or the ranks, or the ranks disagree.
    """
    held: Attachment | None = getattr(pipe, "patchpipe", None)
    if held is not None and held.runner.model is getattr(pipe, "transformer", None):
        raise ValueError("the pipeline is already parallel: call patchpipe.restore(pipe) first")
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer: patchpipe spreads diffusion transformers only")
    check_served(pipe)
    if held is not None:
        held.release()  # it only shares an encoder or the VAE with another
    model: nn.Module = getattr(pipe.transformer, "_orig_mod", pipe.transformer)  # what torch.compile wraps
    layout, store = settle(config, group, partial(_choose, pipe))
    fitted, problem = attempt(lambda: fit(pipe, model, layout))
    about = {"model": type(model).__name__, "model_config": _settings(model)}
    group = meet(layout, group, _device_of(pipe), about, problem, store)
    assert fitted is not None
    plan, split = fitted
    part = tensor_part(model, plan, split[group.stage].held, group.mesh.at("tensor"), layout.tensor)
    Attachment(pipe, layout, group, split, part).attach()
    return pipe


def _choose(pipe: Any, auto: AutoLayout, ranks: int) -> ParallelConfig:
    """The planner's layout of so many ranks."""
    from patchpipe.planner.choosing import layout_for_ranks, workload_of_pipeline  # heavy, and needed here alone

    return layout_for_ranks(auto, workload_of_pipeline(pipe, auto), _device_of(pipe).type, ranks)


def fit(pipe: Any, model: nn.Module, config: ParallelConfig) -> tuple[ModelPlan, list[StageBlocks]]:
    """The plan of a model in memory and each stage's blocks, if the layout fits the model and what was done to it."""
    plan = plan_for(model)
    check_recipes(pipe, config)
    check_in_memory(model, config)
    stages = split_blocks(model, plan, config)
    check_tensor(model, plan, config.tensor)
    return plan, stages


def _settings(model: nn.Module) -> dict[str, Any]:
    """A model's configuration without diffusers' own notes, whose order differs from process to process."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def restore(pipe: Any) -> Any:
    """Undoes ``parallelize``; the pipeline is again what it was, and so are all that share its weights.

    Raises:
        ValueError: The pipeline is not parallel.
    """
    attachment = getattr(pipe, "patchpipe", None)
    if attachment is None:
        raise ValueError("the pipeline is not parallel")
    attachment.detach()
    return pipe


def _bound_to(copied: Any, value: Any, original: Any) -> Any:
    """A method bound to the original, bound to its copy; anything else as it is."""
    return value.__func__.__get__(copied) if getattr(value, "__self__", None) is original else value


def _device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes, which is not where weights are that are moved there group by group."""
    return torch.device(pipe._execution_device)
