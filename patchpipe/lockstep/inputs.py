"""A call's arguments in short, so that ranks can tell before any work whether all of them were called alike.

Every rank runs the same program on its own copy of the arguments. Where these differ, the ranks would paint one rank's
picture, or wait for each other in vain. What is compared is small: plain values as text, pictures and tensors as a
digest. Callbacks are not compared: it is right to have one on one rank alone.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchpipe.lazy.latent import PatchTensor

Told = dict[str, tuple[str, str]]  # an argument in words, and a digest of what words do not tell
LONGEST = 80  # characters of a text in a message
NOT_GIVEN = ("not given", "")


def describe_call(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Told:
    """What a call was given, by name, with the defaults of what it was not given.

    Args:
        call: The pipeline's ``__call__``, bound.
        args: Its arguments by position.
        kwargs: Its arguments by name.
    """
    named = [one for one in inspect.signature(call).parameters.values() if one.kind is not one.VAR_KEYWORD]
    given = {one.name: one.default for one in named if one.default is not one.empty}
    for index, value in enumerate(args):
        given[named[index].name if index < len(named) else f"argument {index + 1}"] = value
    given.update(kwargs)
    told: Told = {}
    for name, value in given.items():
        if not name.startswith("callback"):
            told.update(_entries(name, value))
    return told


def difference(ours: Told, theirs: Told, other: int) -> str | None:
    """What rank 0 and another rank were given differently, in words.

    Args:
        ours: What rank 0 told.
        theirs: What the other told.
        other: Its rank.
    """
    for name in dict.fromkeys([*ours, *theirs]):
        one, two = ours.get(name, NOT_GIVEN), theirs.get(name, NOT_GIVEN)
        if one[0] != two[0]:
            return f"{name} is {one[0]} on rank 0 but {two[0]} on rank {other}"
        if one[1] != two[1]:
            return f"{name} ({one[0]}) has other values on rank {other} than on rank 0"
    return None


def _entries(name: str, value: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """The value's entries, each with its own name where there are several."""
    if isinstance(value, Mapping):
        yield name, (f"a dict of {len(value)}", "")
        for key, entry in value.items():
            yield from _entries(f"{name}[{key!r}]", entry)
    elif isinstance(value, (list, tuple)) and not all(isinstance(entry, (int, float)) for entry in value):
        yield name, (f"a list of {len(value)}", "")
        for index, entry in enumerate(value):
            yield from _entries(f"{name}[{index}]", entry)
    else:
        told = _in_short(value)
        if told is not None:
            yield name, told


def _in_short(value: Any) -> tuple[str, str] | None:
    """One value; ``None`` for what ranks may have each for itself."""
    if isinstance(value, torch.Generator):
        return f"a generator seeded {value.initial_seed()}", ""  # its state follows rank 0's
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype)[6:]} {tuple(value.shape)}", _digest_of(value)
    if isinstance(value, np.generic):
        return repr(value.item()), ""
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {value.shape}", _digest(np.ascontiguousarray(value).view(np.uint8).data)
    if isinstance(value, Image.Image):
        return f"a picture {value.mode} {value.width}x{value.height}", _digest(value.tobytes())
    if isinstance(value, str):
        return _short(repr(value)), _digest(value.encode()) if len(value) > LONGEST else ""
    if value is None or isinstance(value, (bool, int, float, complex, torch.dtype, enum.Enum, PurePath, list, tuple)):
        return _in_full(repr(value))
    return None if callable(value) else (type(value).__name__, "")


def _in_full(text: str) -> tuple[str, str]:
    return _short(text), _digest(text.encode()) if len(text) > LONGEST else ""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _digest_of(tensor: Tensor) -> str:
    if isinstance(tensor, PatchTensor) or tensor.is_meta or tensor.layout != torch.strided:
        return ""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rest = -data.numel() % 8
    if rest or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(rest)])
    words = data.view(torch.int64)
    places = 2 * torch.arange(words.numel(), device=words.device) + 1
    sums = [words.sum(), (words * places).sum()]  # where the tensor is: two numbers come to the host
    return "/".join(map(str, torch.stack(sums).tolist()))


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def first_difference(told: Sequence[Sequence[Mapping[str, Any]]]) -> str | None:
    """The first argument in which a rank's calls differ from rank 0's, in words.

    Args:
        told: Of every rank, what each of its calls was given.
    """
    for other, theirs in enumerate(told):
        if len(theirs) != len(told[0]):
            return f"rank 0 makes {len(told[0])} calls together but rank {other} makes {len(theirs)}"
        for number, pair in enumerate(itertools.zip_longest(told[0], theirs)):
            one, two = ({name: (entry[0], entry[1]) for name, entry in each.items()} for each in pair)
            found = difference(one, two, other)
            if found is not None:
                return found if len(theirs) == 1 else f"in call {number + 1}, {found}"
    return None
