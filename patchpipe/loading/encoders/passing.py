"""What ranks give each other of a prompt, and what a rank keeps of the prompts it has encoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_all, tree_leaves, tree_map

KEPT = 32  # prompts; each takes some MB of host memory
_LATER = ("_num_timesteps",)  # of the request before
_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


@dataclass(frozen=True)
class _Given:
    """Stands for a tensor that every rank has already."""

    index: int


def mark_given(result: Any, given: Any) -> Any:
    """A result without the tensors that were among the arguments, such as the positions' bias that T5 hands through."""
    places = {id(value): index for index, value in enumerate(tree_leaves(given)) if isinstance(value, Tensor)}
    return tree_map(lambda value: _Given(places[id(value)]) if id(value) in places else value, result)


def put_given(result: Any, given: Any) -> Any:
    """The result with these tensors again."""
    values = tree_leaves(given)
    return tree_map(lambda value: values[value.index] if isinstance(value, _Given) else value, result)


@dataclass(frozen=True)
class _Kept:
    """A tensor in host memory, and where it belongs."""

    value: Tensor
    device: torch.device


class Prompts:
    """The last prompts that were encoded, and what came of them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def remembering(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """An ``encode_prompt`` that encodes no prompt twice; one that is given tensors or pictures runs every time."""

        @wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not _plain((args, kwargs)):
                return encode(*args, **kwargs)
            asked = repr((encode.__qualname__, _settings(encode), args, kwargs))
            if asked not in self._kept:
                self._kept[asked] = tree_map(_keep, encode(*args, **kwargs))
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(asked)
            return tree_map(_take, self._kept[asked])

        return remembered


def _settings(encode: Callable[..., Any]) -> list[tuple[str, Any]]:
    """What the pipeline says of its request, which the method may look at: the strength of guidance, of LoRA."""
    said = vars(getattr(encode, "__self__", None) or _Nobody())
    return sorted((name, value) for name, value in said.items() if value and name not in _LATER and _plain(value))


class _Nobody:
    """What a function belongs to."""


def _plain(value: Any) -> bool:
    return tree_all(lambda leaf: isinstance(leaf, _PLAIN), value)


def _keep(value: Any) -> Any:
    return _Kept(value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else value


def _take(value: Any) -> Any:
    return value.value.to(value.device, copy=True) if isinstance(value, _Kept) else value
