"""Runs requests of a pipeline, one or several in flight together: refused by all ranks alike, or painted by all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from patchpipe.config import ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.mesh import Group
from patchpipe.layout.combinations import check_together
from patchpipe.lazy.latent import materialise_tree
from patchpipe.loading.choice import check_served, original_class
from patchpipe.models import plan_for
from patchpipe.models.matrix import check_tested
from patchpipe.parallel.refusals import check_calls, check_guidance
from patchpipe.pipeline.callbacks import Callbacks
from patchpipe.pipeline.extent import Extent
from patchpipe.pipeline.modular.steps import own_state, with_bars
from patchpipe.pipeline.parts import OutputElsewhere
from patchpipe.recipes.checks import check_surroundings
from patchpipe.schedule.flights import Flights, Refused
from patchpipe.schedule.runner import Runner
from patchpipe.schedule.steps.entries import Source
from patchpipe.schedule.steps.stream import Stream

logger = logging.getLogger("patchpipe")


class Requests:
    """Runs the requests of all pipelines on one transformer.

    Args:
        config: The layout.
        group: The ranks.
        runner: Runs the transformer's calls.
        extent: Opens and ends requests.
        callbacks: Notices when a user's callback runs.
    """

    def __init__(
        self, config: ParallelConfig, group: Group, runner: Runner, extent: Extent, callbacks: Callbacks
    ) -> None:
        self._config, self._group, self._runner = config, group, runner
        self._extent, self._callbacks = extent, callbacks

    def run(
        self,
        pipe: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        own: bool,
        around: Callable[[], AbstractContextManager[None]],
    ) -> Any:
        """Runs one request: the pipeline's output on the output rank, ``None`` on the others.

        Args:
            pipe: The pipeline.
            original: Its class's own call.
            args: The call's arguments by position.
            kwargs: The call's arguments by name.
            own: Whether it is the pipeline that was made parallel.
            around: What else is around the request on this rank.
        """

        def check() -> None:
            check_served(pipe)
            check_surroundings(pipe, self._runner, own=own)
            if self.use_transformer(pipe):
                check_guidance(partial(original, pipe), args, kwargs, self._runner.plan, self._config)

        _, problem = attempt(check)
        self._extent.begin(partial(original, pipe), [(args, kwargs)], problem)
        if self.use_transformer(pipe):
            self._warn_if_synchronous(kwargs)
        with self._extent.ending(), around(), self._runner.serving():
            self._align(kwargs.get("generator"))
            return self._paint(pipe, original, args, kwargs)

    def fly(
        self,
        pipe: Any,
        calls: Sequence[Mapping[str, Any]],
        seeds: Sequence[int] | None,
        bars: Sequence[Callable[..., Any]] | None,
        *,
        own: bool,
        around: Callable[[], AbstractContextManager[None]],
        copied: Callable[[int, Callable[..., Any] | None], Any],
        return_exceptions: bool,
    ) -> list[Any]:
        """Runs several requests in flight together; see ``Attachment.together``.

        Args:
            pipe: The pipeline.
            calls: The arguments of each call, by name.
            seeds: What each call seeds the default generator with.
            bars: What stands in for the progress bar of each call.
            own: Whether it is the pipeline that was made parallel.
            around: What else is around the requests on this rank.
            copied: Makes the copy of the pipeline that a call of a number, with a bar, runs on.
            return_exceptions: Whether a call that is refused gives its error in place of an output.
        """

        def check() -> None:
            check_calls(calls, seeds, bars)
            check_surroundings(pipe, self._runner, own=own)
            _check_flight(pipe, self._config)

        original: Callable[..., Any] = original_class(pipe).__call__  # type: ignore[operator]
        _, problem = attempt(check)
        self._extent.begin(partial(original, pipe), [] if problem else [((), call) for call in calls], problem)
        for call in calls:
            self._warn_if_synchronous(call)
        flights = Flights(self._runner, self._group, seeds, len(calls))

        def paint(number: int, call: Mapping[str, Any]) -> Any:
            return self.paint(copied(number, None if bars is None else bars[number]), original, call)

        try:
            with self._extent.ending(), around():
                return flights.run([partial(paint, *entry) for entry in enumerate(calls)], return_exceptions)
        except Refused as refused:
            raise refused.error from refused.error.__cause__

    def paint(self, pipe: Any, original: Callable[..., Any], call: Mapping[str, Any]) -> Any:
        """Runs one of several requests in flight, on a copy of the pipeline; see ``run``."""
        check_guidance(partial(original, pipe), (), call, self._runner.plan, self._config)
        self._align(call.get("generator"))
        return self._paint(pipe, original, (), call)

    def stream(self, pipe: Any, source: Source) -> None:
        """Serves requests that come and go, until told to end; see ``streams.serving``."""

        def check() -> None:
            check_surroundings(pipe, self._runner, own=True)
            _check_flight(pipe, self._config)

        _, problem = attempt(check)
        run: Callable[..., Any] = original_class(pipe).__call__  # type: ignore[operator]
        self._extent.begin(partial(run, pipe), [], problem)
        with self._extent.ending():
            Stream(self._runner, self._group, source).run()

    def use_transformer(self, pipe: Any) -> bool:
        """Whether a pipeline's requests go through the stages."""
        return any(part is model for part in vars(pipe).values() for model in self._runner.models)

    def _paint(self, pipe: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            output = original(pipe, *args, **self._callbacks.noticed(kwargs))
            output = materialise_tree(output, "the pipeline's output")
        except OutputElsewhere:
            return None
        return output if self._group.output or not self.use_transformer(pipe) else None

    def _warn_if_synchronous(self, kwargs: Mapping[str, Any]) -> None:
        steps, warmup = kwargs.get("num_inference_steps"), self._config.warmup_steps(guided=False)
        several = self._config.patches not in (None, 1) or max(self._config.pipefusion, self._config.distrifusion) > 1
        if isinstance(steps, int) and steps <= warmup and several and self._group.output:
            logger.warning(
                "num_inference_steps=%d is not more than warmup=%d: every step runs synchronously, no patch streams",
                steps,
                warmup,
            )

    def _align(self, generator: Any) -> None:
        """Generators go on from rank 0's state: several ranks may do the scheduler's arithmetic."""
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator or [])
        if self._group.world_size == 1 or not generators:
            return
        with self._runner.points.passing():
            states = self._group.share(0, lambda: [each.get_state() for each in generators])
        for each, state in zip(generators, states, strict=True):
            each.set_state(state.cpu())


def _check_flight(pipe: Any, config: ParallelConfig) -> None:
    """Refuses to run calls of a pipeline in flight together where that is not right.

    Raises:
        ValueError: Nothing tests the layout so, or the transformer keeps what belongs to one request.
    """
    check_together(config.methods, config.compile)
    check_tested(plan_for(pipe.transformer).model, "together", "in flight together", "paint one after the other")
    if getattr(pipe.transformer, "is_cache_enabled", False):
        raise ValueError(
            "a step cache keeps one request's results: call disable_cache() before calls in flight together"
        )


def copy_for(
    pipe: Any, number: int, bar: Callable[..., Any] | None, encode: Callable[..., Any] | None = None
) -> tuple[Any, Callable[..., Any] | None]:
    """A pipeline once more, with the same models but its own scheduler, for one of several calls in flight.

    Pipelines keep the guidance strength, the number of steps and the like on themselves during a call.

    Args:
        pipe: The pipeline.
        number: Which of the calls, from 0.
        bar: What stands in for its ``progress_bar``; ``None`` shows one.
        encode: Its own ``encode_prompt``, where something else stands in for that one.

    Returns:
        The copy, and ``encode`` bound to it.
    """
    copied = copy.copy(pipe)
    own = vars(copied)
    for name, value in vars(pipe).items():
        own[name] = _bound_to(copied, value, pipe)
    if "scheduler" in own:
        own["scheduler"] = copy.deepcopy(own["scheduler"])
    own_state(copied)
    for shows in (vars(each) for each in with_bars(copied)):
        shows["_progress_bar_config"] = {**shows.get("_progress_bar_config", {}), "position": number}
        if bar is not None:
            shows["progress_bar"] = bar
    return copied, None if encode is None else _bound_to(copied, encode, pipe)


def _bound_to(copied: Any, value: Any, original: Any) -> Any:
    """A method bound to the original, bound to its copy; anything else as it is."""
    return value.__func__.__get__(copied) if getattr(value, "__self__", None) is original else value
