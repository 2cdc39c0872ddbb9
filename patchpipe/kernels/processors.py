"""A processor's own code, with the functions by which it attends exchanged for others.

A mode sees every torch function that a layer calls: some sixty for each attention, of which one is wanted. Each costs
the host a microsecond or two, and a patch has many layers. So the processor gets a subclass of the same name, whose
``__call__`` is its own code with other global names: diffusers' ``dispatch_attention_fn`` and torch's ``functional``
lead to the mode of the layer at work, and nothing else does. Nothing of diffusers or torch is changed for others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import FunctionType
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_at_work: ContextVar[TorchFunctionMode | None] = ContextVar("the mode of the attention layer at work", default=None)


def exchange(layer: nn.Module) -> Callable[[], None]:
    """Gives a layer's processor the subclass, if its code names one of the functions.

    Returns:
        A function that undoes it.
    """
    processor: Any = getattr(layer, "processor", None)
    kind: Any = type(processor)
    own = None if processor is None or exchanged(layer) else _subclass(kind)
    if own is None:
        return lambda: None
    processor.__class__ = own

    def undo() -> None:
        if type(processor) is own:
            processor.__class__ = kind

    return undo


def exchanged(layer: nn.Module) -> bool:
    """Whether a layer's processor, which a user may have set anew, is of such a subclass."""
    return getattr(type(getattr(layer, "processor", None)), "_exchanged", False)


@contextmanager
def led_to(mode: TorchFunctionMode) -> Iterator[None]:
    """In the block, attention of exchanged processors goes to a mode."""
    token = _at_work.set(mode)
    try:
        yield
    finally:
        _at_work.reset(token)


@cache
def _subclass(kind: type) -> type | None:
    """The subclass; ``None`` where its code names none of the functions, or cannot be run with other names."""
    call: Any = kind.__call__
    if not isinstance(call, FunctionType) or "__slots__" in vars(kind):
        return None
    others = {name: other for name in call.__code__.co_names if (other := _other(call.__globals__.get(name)))}
    if not others:
        return None
    code, names = call.__code__, {**call.__globals__, **others}
    own: Any = FunctionType(code, names, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__, own.__doc__ = call.__kwdefaults__, call.__doc__
    own.__signature__ = inspect.signature(call)  # layers ask for it in every call
    told = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_exchanged": True}
    return type(kind.__name__, (kind,), {"__call__": own, **told})


def _other(value: Any) -> Any:
    """What stands in the place of a global; ``None`` leaves it."""
    return {id(dispatch_attention_fn): _dispatch, id(functional): _FUNCTIONAL}.get(id(value))


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    mode = _at_work.get()
    if mode is None:
        return dispatch_attention_fn(*args, **kwargs)
    with mode:
        return dispatch_attention_fn(*args, **kwargs)


class _Functional:
    """``torch.nn.functional`` but for one function."""

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    @staticmethod
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        mode, compute = _at_work.get(), functional.scaled_dot_product_attention
        return compute(*args, **kwargs) if mode is None else mode.__torch_function__(compute, (), args, kwargs)


_FUNCTIONAL = _Functional()
