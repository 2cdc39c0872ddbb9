"""Pipelines that share a module with a parallel one: found wherever they were made, and given to it to serve.

diffusers makes a second pipeline on the same weights in many ways: ``from_pipe``, ``AutoPipelineForImage2Image``,
``Pipeline(**pipe.components)``, an assignment, or a pipeline that holds two others. All of them end in an attribute
of a pipeline being set to one of the modules. So while a pipeline is parallel its modules bear a mark, and setting an
attribute of any pipeline to a marked module tells whoever marked it. Those made before are looked for once.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

Serve = Callable[[Any], object]

KINDS = (DiffusionPipeline, ModularPipeline)  # neither derives from the other
_MARK = "_patchpipe_serve"
_USERS = "patchpipe_users"
_LOCK = threading.Lock()


def mark(modules: Iterable[nn.Module], serve: Serve) -> Callable[[], None]:
    """Has ``serve`` called with every pipeline that gets one of the modules, until the returned function is called."""
    distinct = {id(module): module for module in modules}.values()  # one may have two names in a pipeline
    marked = [module for module in distinct if _MARK not in vars(module)]
    for module in marked:
        object.__setattr__(module, _MARK, serve)
    unwatch = _watch()

    def undo() -> None:
        unwatch()
        for module in marked:
            object.__delattr__(module, _MARK)

    return undo


def others_with(modules: Iterable[nn.Module], pipe: Any) -> list[Any]:
    """All other pipelines of this process that have one of the modules as an attribute.

    A search goes through all objects of the process. The second one, for whose attributes they are, is mostly spared:
    nothing but the pipeline itself has them among its attributes.

    Args:
        modules: The modules.
        pipe: A pipeline that has them.
    """
    wanted = {id(module): module for module in modules}
    own = vars(pipe)
    # Not all objects of the process: to hold a tuple that another thread is just making breaks that thread.
    holders = gc.get_referrers(*wanted.values())
    held = [holder for holder in holders if type(holder) is dict and holder is not own and _may_be_attributes(holder)]
    owners = {id(owner): owner for owner in (*holders, *(gc.get_referrers(*held) if held else ()))}
    pipes = [owner for owner in owners.values() if issubclass(type(owner), KINDS) and owner is not pipe]
    return [pipe for pipe in pipes if any(id(value) in wanted for value in list(vars(pipe).values()))]


def _may_be_attributes(held: dict[Any, Any]) -> bool:
    """Whether a dictionary may be all attributes of a pipeline, which has a configuration beside its modules."""
    return not all(isinstance(value, nn.Module) for value in list(held.values()))


def _watch() -> Callable[[], None]:
    """Replaces how pipelines set attributes, for all pipelines of this process, as long as anybody needs it."""
    with _LOCK:
        unwatch = [_watch_kind(kind) for kind in KINDS]

    def undo() -> None:
        with _LOCK:
            for each in unwatch:
                each()

    return undo


def _watch_kind(kind: Any) -> Callable[[], None]:
    current = kind.__setattr__
    if not hasattr(current, _USERS):
        current = _told(current)
        kind.__setattr__ = current
    setattr(current, _USERS, getattr(current, _USERS) + 1)

    def undo() -> None:
        setattr(current, _USERS, getattr(current, _USERS) - 1)
        if getattr(current, _USERS) == 0 and kind.__setattr__ is current:
            kind.__setattr__ = current.__wrapped__

    return undo


def _told(original: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    @functools.wraps(original)
    def set_attribute(pipe: Any, name: str, value: Any) -> None:
        original(pipe, name, value)
        serve = vars(value).get(_MARK) if isinstance(value, nn.Module) else None
        if serve is not None:
            serve(pipe)

    setattr(set_attribute, _USERS, 0)
    return set_attribute
