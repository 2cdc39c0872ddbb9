"""Copies of what is dear to build: one is built, the others are read back from its pickle.

A pipeline's modules, tokenizers and configurations take longer to make than to copy. The numbers of tensors are not in
the pickle: each copy clones them, so that no copy shares anything with another.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


class Original:
    """What copies are made of.

    Args:
        whole: Anything that can be pickled; it is not changed, and may be changed afterwards.
    """

    def __init__(self, whole: Any) -> None:
        self._tensors: list[torch.Tensor] = []
        file = io.BytesIO()
        _Writer(file, self._tensors).dump(whole)
        self._pickle = file.getvalue()

    def copy(self) -> Any:
        """A new one, as the whole was when it was taken."""
        return _Reader(io.BytesIO(self._pickle), self._tensors).load()


class _Writer(pickle.Pickler):
    """Puts tensors into a list, and their places into the pickle."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors
        self._places: dict[int, tuple[int, bool]] = {}
        self._seen: list[torch.Tensor] = []  # an id is one object's as long as that lives

    def persistent_id(self, part: Any) -> tuple[int, bool] | None:
        if not isinstance(part, torch.Tensor):
            return None
        if id(part) not in self._places:
            self._places[id(part)] = len(self._tensors), isinstance(part, torch.nn.Parameter)
            self._seen.append(part)
            self._tensors.append(part.detach().clone().requires_grad_(part.requires_grad))
        return self._places[id(part)]


class _Reader(pickle.Unpickler):
    """Clones tensors: one that has several names stays one."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, place: tuple[int, bool]) -> torch.Tensor:
        number, parameter = place
        if number not in self._made:
            own = self._tensors[number]
            copied = own.detach().clone()
            made = torch.nn.Parameter(copied, own.requires_grad) if parameter else copied
            self._made[number] = made
        return self._made[number]
