"""The steps and loops of a modular pipeline, which is a tree of blocks and a state that goes from one to the next.

An ordinary pipeline has a method that encodes text. A modular one has a step for it, which says itself that it needs a
text encoder. One rank runs that step, and all get what it has changed in the state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from diffusers import BaseGuidance, LoopSequentialPipelineBlocks, ModularPipeline

from patchpipe.lazy.latent import materialise_tree
from patchpipe.loading.choice import ORIGINAL

SHARE = "_patchpipe_share"
_ABSENT = object()


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is made of blocks."""
    return isinstance(pipe, ModularPipeline)


def with_bars(pipe: Any) -> list[Any]:
    """What shows a pipeline's progress: itself, or its loops."""
    if not is_modular(pipe):
        return [pipe]
    return [block for block in _tree(pipe._blocks) if isinstance(block, LoopSequentialPipelineBlocks)]


def own_state(copied: Any) -> None:
    """Gives a shallow copy of a pipeline its own of what guiders and blocks keep during a call."""
    for name, value in list(vars(copied).items()):
        if isinstance(value, BaseGuidance):
            vars(copied)[name] = copy.copy(value)
    if is_modular(copied):
        vars(copied)["_blocks"] = copied.blocks


def hook_steps(pipe: Any) -> Iterator[Callable[[], None]]:
    """Has one rank encode text for all, and all ranks put together what is about to be decoded.

    Args:
        pipe: A modular pipeline; as its attribute ``SHARE`` it may have what makes a function one that one rank runs
            for all. Without it each step runs by itself, as in pipelines that are made of copies of these blocks.

    Yields:
        What undoes one change.
    """
    for step in _steps(pipe._blocks):
        parts = [spec.name for spec in step.expected_components]
        if hasattr(type(step), ORIGINAL):
            continue
        if any(name.startswith("text_encoder") for name in parts):
            yield _replace_call(step, _run_for_all)
        elif "vae" in parts:
            yield _replace_call(step, _run_on_whole)


def _replace_call(step: Any, run: Callable[..., Any]) -> Callable[[], None]:
    """Gives a step a subclass of its own class, with another call."""
    kind: Any = type(step)

    def call(self: Any, pipe: Any, state: Any) -> Any:
        return run(partial(kind.__call__, self, pipe, state), pipe, state)

    members = {"__call__": call, "__doc__": kind.__doc__, "__module__": kind.__module__, ORIGINAL: kind}
    step.__class__ = type(kind.__name__, (kind,), members)
    return lambda: setattr(step, "__class__", kind)


def _run_for_all(own: Callable[[], Any], pipe: Any, state: Any) -> Any:
    share = vars(pipe).get(SHARE)
    if share is None:
        return own()

    def changed() -> Any:
        before = dict(state.values)
        own()
        values = {name: value for name, value in state.values.items() if before.get(name, _ABSENT) is not value}
        return values, state.kwargs_mapping

    values, state.kwargs_mapping = share(changed)()
    state.values.update(values)
    return pipe, state


def _run_on_whole(own: Callable[[], Any], _pipe: Any, state: Any) -> Any:
    """Ranks that do not decode end there, so what the state has of lazy tensors is gathered before."""
    state.values.update(materialise_tree(dict(state.values), "vae.decode"))
    return own()


def _tree(block: Any) -> Iterator[Any]:
    yield block
    for part in block.sub_blocks.values():
        yield from _tree(part)


def _steps(block: Any) -> Iterator[Any]:
    """The blocks that have no parts and are in no loop."""
    if isinstance(block, LoopSequentialPipelineBlocks):
        return
    if not block.sub_blocks:
        yield block
    for part in block.sub_blocks.values():
        yield from _steps(part)
