"""The parameters of a block, taken apart into plain tensors and put together again somewhere else.

A quantised parameter is a tensor subclass around packed bytes and scales. It is moved as these, never unpacked.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patchpipe.offload.ring import Placement, aligned

logger = logging.getLogger("patchpipe")
PARTS = ("torchao", "optimum")  # libraries whose tensors can be taken apart, and are tested


@dataclass(frozen=True)
class Shape:
    """What a plain tensor is, but for its bytes."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        """That of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size.numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """Such a tensor in memory that begins with its bytes."""
        return memory[: self.nbytes].view(self.dtype).as_strided(self.size, self.stride)


@dataclass
class Weight:
    """One parameter, under all the names that it has in its block.

    Attributes:
        name: The first of them.
        owners: The modules it is in, with its name there.
        found: The parameter as it was found.
        plain: The plain tensors it is made of.
    """

    name: str
    found: nn.Parameter
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)

    def put(self, parameter: nn.Parameter) -> None:
        """Has the block compute with another parameter."""
        for module, leaf in self.owners:
            module._parameters[leaf] = parameter

    def settle(self) -> None:
        """Has the block compute with what its plain tensors are by now; what they were before is let go."""
        if _ordinary(self.found):
            self.found.data = self.plain[0]
        else:
            self.found = self.made_of(iter(self.plain))
        self.put(self.found)

    def move(self, device: torch.device) -> None:
        """Has the block compute with it on a device."""
        self.plain = [each.to(device) for each in self.plain]
        self.settle()

    def made_of(self, plain: Iterator[Tensor]) -> nn.Parameter:
        """The parameter, of other plain tensors."""
        return nn.Parameter(_joined(self.found, plain), requires_grad=self.found.requires_grad)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes that each of its tensors takes in a buffer."""
        return tuple(aligned(Shape.of(each).nbytes) for each in self.plain)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in a buffer."""
        return sum(self.sizes)


def weights_of(block: nn.Module, name: str, elsewhere: Callable[[nn.Parameter], bool]) -> list[Weight]:
    """The parameters of a block that can come and go.

    Args:
        block: The block.
        name: Its name, for messages.
        elsewhere: Whether a parameter is also part of something else, and so stays.

    Raises:
        ValueError: A parameter is of a kind that cannot be taken apart.
    """
    found: dict[int, Weight] = {}
    for path, module in block.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta or elsewhere(parameter):
                continue
            whole = ".".join(filter(None, (name, path, leaf)))
            weight = found.setdefault(id(parameter), Weight(whole, parameter))
            weight.owners.append((module, leaf))
    for weight in found.values():
        weight.plain = list(_plain(weight.found, weight.name))
    return [weight for weight in found.values() if _may_move(weight)]


def _may_move(weight: Weight) -> bool:
    """Whether its bytes lie side by side; what is expanded, or a part of something with gaps, stays."""
    whole = (torch._debug_has_internal_overlap(each) == 0 and _dense(each) for each in weight.plain)
    return weight.nbytes > 0 and all(whole)


def _dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _plain(tensor: Tensor, name: str) -> Iterator[Tensor]:
    if _ordinary(tensor):
        yield tensor.detach()
        return
    if _gguf(tensor):
        yield tensor.as_tensor().detach()  # type: ignore[attr-defined]
        return
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor).__module__.split(".")[0] not in PARTS:
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, which cannot be taken apart into what it is made of: leave offload "
            f"out, or quantise with torchao or GGUF"
        )
    for part in (getattr(tensor, leaf) for leaf in tensor.__tensor_flatten__()[0]):
        if part is not None:
            yield from _plain(part, name)


def _joined(like: Any, plain: Iterator[Tensor]) -> Tensor:
    if _ordinary(like):
        return next(plain)
    if _gguf(like):
        return type(like)(next(plain), quant_type=like.quant_type)
    names, context = like.__tensor_flatten__()
    found = {name: getattr(like, name) for name in names}
    parts = {name: None if part is None else _joined(part, plain) for name, part in found.items()}
    return type(like).__tensor_unflatten__(parts, context, like.size(), like.stride())


def _gguf(tensor: Tensor) -> bool:
    """Whether it is diffusers' parameter around bytes as they are in a GGUF file, which need not be installed."""
    return type(tensor).__module__ == "diffusers.quantizers.gguf.utils"


def _ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


# -- where a block's weights are while they are not on the device --------------------------------


class Home(Protocol):
    """Where the streamed weights of one block come from.

    Attributes:
        nbytes: Bytes of it.
        in_memory: Whether these are in host memory.
        shared: Whether other ranks have the same copy there.
    """

    nbytes: int
    in_memory: bool
    shared: bool

    def piece(self, start: int, size: int) -> Tensor:
        """Bytes of it, on the host; they stay until the next are asked for."""
        ...

    def ahead(self, start: int, size: int) -> None:
        """Readies bytes that will be asked for."""
        ...

    def close(self) -> None:
        """Lets it go."""
        ...


def laid(weights: Sequence[Weight], memory: Tensor) -> list[list[Tensor]]:
    """Where the plain tensors of each weight lie in memory that holds them packed."""
    found, at = [], 0
    for weight in weights:
        shapes = [Shape.of(each) for each in weight.plain]
        starts = list(accumulate(weight.sizes, initial=at))
        found.append([shape.view(memory[start:]) for shape, start in zip(shapes, starts, strict=False)])
        at = starts[-1]
    return found


class HostHome:
    """The streamed weights of one block in host memory, packed.

    Args:
        weights: The weights; of what they were found in nothing is kept.
        pinned: Whether the device can copy from it by itself.

    Attributes:
        nbytes: Bytes of it.
        in_memory: They are in host memory.
        shared: It is this rank's own.
    """

    in_memory, shared = True, False

    def __init__(self, weights: Sequence[Weight], *, pinned: bool) -> None:
        self.nbytes = sum(weight.nbytes for weight in weights)
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8)
        self._pinned = pinned and pin(self._memory)
        for weight, moved in zip(weights, laid(weights, self._memory), strict=True):
            for target, each in zip(moved, weight.plain, strict=True):
                target.copy_(each)
            weight.plain = moved

    def piece(self, start: int, size: int) -> Tensor:
        """Bytes of it, on the host."""
        return self._memory[start : start + size]

    def ahead(self, start: int, size: int) -> None:
        """Nothing need be read."""

    def close(self) -> None:
        """Lets the memory go when nobody uses it any more."""
        if self._pinned:
            unpin(self._memory)
            self._pinned = False


def give_back() -> None:
    """Has the C library give memory back that was let go: it keeps pieces of less than 32 MB, as many matrices are."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def pin(memory: Tensor) -> bool:
    """Locks memory for copies by the device; torch's own pinned memory comes in powers of two."""
    if not memory.numel() or not torch.cuda.is_available():
        return False
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    if int(status) != 0:
        logger.warning(
            "the host gives no more pinned memory (%s): weights come from ordinary memory, at a part of the speed; "
            "raise `ulimit -l`, or leave more of them on the device",
            status,
        )
        return False
    return True


def unpin(memory: Tensor) -> None:
    """Lets it go again."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies in a file.

    Attributes:
        file: The file.
        offset: Where its bytes begin.
        nbytes: How many there are.
    """

    file: Path
    offset: int
    nbytes: int


class DiskHome:
    """The streamed weights of one block in the model's own files.

    Args:
        weights: The weights.
        stored: Where each parameter of the model lies.
        chunk: Bytes read at once.
        pinned: Whether what was read is to be where the device can copy from it by itself.

    Attributes:
        nbytes: Bytes of it.
        in_memory: They are not.
        shared: Nothing is.

    Raises:
        ValueError: A weight is not on disk as it is in memory.
    """

    in_memory = shared = False

    def __init__(self, weights: Sequence[Weight], stored: Mapping[str, Stored], chunk: int, *, pinned: bool) -> None:
        self._parts: list[tuple[int, Stored]] = []  # where each begins in the home
        at = 0
        for weight in weights:
            place = stored.get(weight.name)
            shape = Shape.of(weight.plain[0])
            if place is None or place.nbytes != shape.nbytes or len(weight.plain) != 1:
                raise ValueError(
                    f"{weight.name} is not stored as the device needs it, so that tier='disk' cannot read it each "
                    f"time: load the model in the dtype of its files, whole (tensor=1), unquantised and without LoRA, "
                    f"or use tier='host'"
                )
            self._parts.append((at, place))
            at += aligned(place.nbytes)
        self.nbytes = at
        self._staging = torch.empty(min(chunk, at), dtype=torch.uint8)
        self._pinned = pinned and pin(self._staging)
        self._files = {place.file: os.open(place.file, os.O_RDONLY) for _, place in self._parts}

    def piece(self, start: int, size: int) -> Tensor:
        """Bytes of it, read; they stay until the next are."""
        target = self._staging[:size]
        for at, offset, length, file in self._within(start, size):
            _read(file, offset, memoryview((ctypes.c_char * length).from_address(target.data_ptr() + at)))
        return target

    def ahead(self, start: int, size: int) -> None:
        """Has the system read bytes that will be asked for."""
        for _, offset, length, file in self._within(start, size):
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the files."""
        if self._pinned:
            unpin(self._staging)
            self._pinned = False
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _within(self, start: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Where each part of a range goes, and where in which file it is."""
        for begin, place in self._parts:
            low, high = max(start, begin), min(start + size, begin + place.nbytes)
            if low < high:
                yield low - start, place.offset + low - begin, high - low, self._files[place.file]


def _read(file: int, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if count == 0:
            raise OSError("the weights' file ended: it has changed since the model was loaded")
        done += count


def views(weights: Sequence[Weight], placement: Placement, ring: Tensor) -> list[nn.Parameter]:
    """The weights as they lie in the working buffer."""
    made, starts = [], iter(placement.starts)
    for weight in weights:
        shapes = [Shape.of(each) for each in weight.plain]
        made.append(weight.made_of(iter([shape.view(ring[next(starts) % ring.numel() :]) for shape in shapes])))
    return made
