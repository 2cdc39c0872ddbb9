"""A processor's own code, with the functions by which it attends exchanged for others.

A mode sees every torch function that a layer calls: some sixty for each attention, of which one is wanted. Each costs
the host a microsecond or two, and a patch has many layers. So while the layer computes its processor has a subclass of
the same name, whose ``__call__`` is its own code with other global names: diffusers' ``dispatch_attention_fn`` and
torch's ``functional`` lead to the mode of the layer at work, and nothing else does. Nothing of diffusers or torch is
changed for others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from types import FunctionType
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_at_work: ContextVar[TorchFunctionMode | None] = ContextVar("the mode of the attention layer at work", default=None)


def can_exchange(layer: nn.Module) -> bool:
    """Whether a layer's processor names one of the functions, and no hook of diffusers asks what class it has."""
    kind: Any = type(getattr(layer, "processor", None))
    return not hasattr(layer, "_diffusers_hook") and _subclass(kind) is not None


def exchanged(
    layer: Any, mode: TorchFunctionMode, compute: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a layer computes while attention of its processor leads to a mode."""
    processor = layer.processor
    kind: Any = type(processor)
    token = _at_work.set(mode)
    processor.__class__ = _subclass(kind)
    try:
        return compute(*args, **kwargs)
    finally:
        processor.__class__ = kind
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
    told = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
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
