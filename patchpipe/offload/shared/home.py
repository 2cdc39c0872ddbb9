"""A block's streamed weights in memory that other ranks of the host map too.

The block's parameters lie in a private mapping of it: whoever writes into one of them, as ``fuse_lora`` does, gets a
page of its own at that moment, and nobody else sees it. What is copied to a CUDA device comes from a mapping that all
share, since locking a private one would copy all its pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from patchpipe.offload.shared.file import Place
from patchpipe.offload.weights import Shape, Weight, laid, pin, unpin


class OtherWeights(Exception):
    """What another rank has packed is not what this rank has."""


class SharedHome:
    """The streamed weights of one block, as one rank has packed them for several.

    Args:
        place: Where they were packed.
        weights: This rank's own, which it lets go for those.
        pinned: Whether the device can copy from it by itself.
        compared: Whether this rank's are to be the same, byte for byte.

    Attributes:
        nbytes: Bytes of it.
        in_memory: They are in host memory.
        shared: Whether another rank has the same copy.

    Raises:
        OSError: It cannot be mapped from here.
        OtherWeights: They are not the same; nothing has changed.
    """

    in_memory = True

    def __init__(self, place: Place, weights: Sequence[Weight], *, pinned: bool, compared: bool) -> None:
        self.nbytes, self.shared = place.nbytes, compared
        memory = place.mapped(private=True)
        found = laid(weights, memory)
        if compared:
            _compare(weights, found)
        self._source, self._pinned = memory, False
        if pinned:
            common = place.mapped(private=False)
            self._pinned = pin(common)
            self._source = common if self._pinned else memory
        for weight, moved in zip(weights, found, strict=True):
            weight.plain = moved

    def piece(self, start: int, size: int) -> Tensor:
        """Bytes of it, on the host."""
        return self._source[start : start + size]

    def ahead(self, start: int, size: int) -> None:
        """Nothing need be read."""

    def close(self) -> None:
        """Lets the memory go when nobody uses it any more."""
        if self._pinned:
            unpin(self._source)
            self._pinned = False


def packed(place: Place, weights: Sequence[Weight]) -> None:
    """Packs weights into a file, once for all that map it.

    Raises:
        OSError: It cannot be mapped.
    """
    for weight, targets in zip(weights, laid(weights, place.mapped(private=False)), strict=True):
        for target, each in zip(targets, weight.plain, strict=True):
            target.copy_(each)


def _compare(weights: Sequence[Weight], found: Sequence[Sequence[Tensor]]) -> None:
    for weight, theirs in zip(weights, found, strict=True):
        for one, other in zip(weight.plain, theirs, strict=True):
            if not _same_bytes(one.cpu(), other):
                raise OtherWeights(f"{weight.name} has other values there")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors laid out alike, without gaps, are equal to the bit; quicker than torch's own."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes, compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return int(compare(one.data_ptr(), other.data_ptr(), Shape.of(one).nbytes)) == 0
