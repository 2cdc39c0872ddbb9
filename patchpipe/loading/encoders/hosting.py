"""A text encoder in host memory: its layers come to the device one after the other while it runs.

No weight of it stays on the device. A new prompt costs one copy of the layers; between prompts the device is the
transformer's. Words are looked up in their table on the host, and what else surrounds the layers is copied when called.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial, wraps
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from patchpipe.loading.encoders.layers import Layers
from patchpipe.offload.copying import copier_for
from patchpipe.offload.model import Transfers
from patchpipe.offload.mover import Mover, MoverStats, Streamed
from patchpipe.offload.ring import ring_bytes
from patchpipe.offload.streaming import StreamedBlock, sizes_of
from patchpipe.offload.weights import HostHome, Weight, weights_of
from patchpipe.stage.attention import override

logger = logging.getLogger("patchpipe")
CHUNK = 16 * 2**20  # bytes
AHEAD = 8  # chunks: a layer computes for less time than these take to come, unless the prompt is very long


def check_hosted(name: str, model: nn.Module) -> None:
    """Refuses an encoder whose weights cannot come and go.

    Args:
        name: Its name in the pipeline.
        model: The encoder, with weights or without.

    Raises:
        ValueError: It has no list of layers, is quantised by a library whose tensors cannot be moved, or has LoRA.
    """
    Layers.of(model)
    if getattr(model, "peft_config", None):
        raise ValueError(f'text_rank="host" takes no LoRA in encoders, and {name} has some: give text_rank a rank')
    try:
        weights_of(model, name, lambda _: False)
    except ValueError as problem:
        raise ValueError(f'text_rank="host" cannot move a weight: {problem}; or give text_rank a rank') from problem


class HostedEncoder:
    """A text encoder whose weights are in host memory.

    Args:
        name: Its name in the pipeline.
        model: The encoder, with its weights, wherever they are.
        device: Where it computes.
        timeout: Seconds a layer may wait for its weights.
        throttle: Gigabytes a second that come from the host at most, for trials on machines without a GPU.

    Attributes:
        stats: What was copied for layers so far.
        hosted: Bytes of it in host memory.
        on_device: Most bytes of the device that its weights take while it runs.
    """

    def __init__(
        self, name: str, model: Any, device: torch.device, timeout: float, throttle: float | None = None
    ) -> None:
        self.stats = MoverStats()
        self.hosted = self.on_device = 0
        self._name, self._model, self._device, self._timeout = name, model, device, timeout
        self._copier = copier_for(device, throttle)
        self._undo: list[Callable[[], None]] = []
        self._owners: list[nn.Module] = []
        self._kept: list[nn.Parameter] = []  # on the host
        self._streamed: dict[Any, Streamed] = {}
        self._layers: list[StreamedBlock] = []
        self._size = 0  # of the working buffer
        self._transfers: Transfers
        self._ring: Tensor | None = None
        self._mover: Mover | None = None
        self.ride = None  # calls are made one by one
        self._lock = threading.RLock()
        self._running = 0

    def attach(self) -> Callable[[], None]:
        """Takes the weights to the host.

        Returns:
            What brings them back.

        Raises:
            ValueError: They cannot be moved; the encoder is as it was found.
        """
        check_hosted(self._name, self._model)
        layers = Layers.of(self._model)
        parts = {name: self._model.get_submodule(name) for name in layers.names}
        found = {name: weights_of(part, f"{self._name}.{name}", lambda _: False) for name, part in parts.items()}
        embeddings = [name for name in layers.around if isinstance(parts[name], nn.Embedding)]
        self._move_rest(found, embeddings)
        homes = {name: self._take(found[name]) for name in found if found[name] and name not in embeddings}
        for name in embeddings:  # now, as a table may be the last layer's matrix too, which is on the host by now
            found[name] = weights_of(parts[name], f"{self._name}.{name}", lambda _: False)
            self._keep(found[name])
        for weights in found.values():
            for weight in weights:
                weight.put(_stand_in(weight, self._device))
        following: dict[str, str | None] = dict(pairwise(name for name in layers.layers if found[name]))
        for name in filter(found.get, found):
            if name in layers.layers:
                self._streamed[name] = Streamed(homes[name], sizes_of(found[name]), following.get(name))
                self._stream(name, parts[name], found[name])
            else:
                here = torch.device("cpu") if name in embeddings else self._device  # of a table few rows are needed
                part = _ForOneCall(parts[name], found[name], here, self._device)
                self._undo.append(override(parts[name], part))
        self._measure(layers, embeddings, found)
        self._undo.append(override(self._model, self._opened(self._model.forward)))
        self._set("save_pretrained", self._no_saving)
        if hasattr(self._model, "generate"):  # calls the encoder for every word
            self._set("generate", self._opened(self._model.generate))
        logger.info("%s", self.describe())
        return self.restore

    def restore(self) -> None:
        """Puts every weight back to where it was found."""
        while self._undo:
            self._undo.pop()()

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self._name}: {self.hosted / 1e6:,.1f} MB in host memory; while it runs, its weights take at most "
            f"{self.on_device / 1e6:,.1f} MB of the device"
        )

    # -- its weights -----------------------------------------------------------------------------

    def _take(self, weights: Sequence[Weight]) -> HostHome:
        """Packs weights into host memory."""
        before = [(weight, weight.plain[0].device) for weight in weights]
        self._owners += [module for weight in weights for module, _ in weight.owners]
        home = HostHome(weights, pinned=self._device.type == "cuda")
        self.hosted += home.nbytes
        self._kept += [weight.found for weight in weights]
        for weight in weights:
            weight.settle()

        def back() -> None:
            for weight, device in before:
                weight.move(device)
            home.close()

        self._undo.append(back)
        return home

    def _keep(self, weights: Sequence[Weight]) -> None:
        """Takes weights to the host as they are."""
        for weight in weights:
            self._undo.append(partial(weight.move, weight.plain[0].device))
            weight.move(torch.device("cpu"))
            self.hosted += 0 if any(weight.found is one for one in self._kept) else weight.nbytes
        self._kept += [weight.found for weight in weights]

    def _move_rest(self, found: dict[str, list[Weight]], embeddings: Sequence[str]) -> None:
        """What does not come and go is where it is needed: on the device, or on the host beside a table of words."""
        moving = {id(weight.found) for weights in found.values() for weight in weights}
        for path, module in self._model.named_modules():
            here = torch.device("cpu") if path in embeddings else self._device
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    self._set_buffer(module, leaf, buffer.to(here))
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in moving and not parameter.is_meta:
                    self._undo.append(_moved(parameter, here))

    def _set_buffer(self, module: nn.Module, leaf: str, value: Tensor) -> None:
        before = module._buffers[leaf]
        module._buffers[leaf] = value
        self._undo.append(lambda: module._buffers.__setitem__(leaf, before))

    def _stream(self, name: str, module: nn.Module, weights: Sequence[Weight]) -> None:
        block = StreamedBlock(module, name, weights, self)
        self._layers.append(block)
        self._undo.append(override(module, self._opened(block)))

    def _measure(self, layers: Layers, embeddings: Sequence[str], found: dict[str, list[Weight]]) -> None:
        sizes = {name: sum(weight.nbytes for weight in weights) for name, weights in found.items()}
        largest = max(sizes[name] for name in layers.layers)
        tensor = max(each.nbytes for name in layers.layers for each in found[name])
        chunk = max(1, min(CHUNK, -(-largest // 4)))
        self._transfers = Transfers(0.0, chunk, AHEAD, gate=False)
        self._size = ring_bytes(largest, tensor, AHEAD, chunk)
        beside = [sizes[name] for name in layers.around if name not in embeddings]
        self.on_device = self._size + max(beside, default=0)

    # -- at work ---------------------------------------------------------------------------------

    @property
    def mover(self) -> Mover:
        """What copies layers, while the encoder runs."""
        assert self._mover is not None
        return self._mover

    @property
    def ring(self) -> Tensor:
        """The working buffer, while the encoder runs."""
        assert self._ring is not None
        return self._ring

    def _opened(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Something that layers are called in; a layer that is called by itself has the buffer to itself."""

        @wraps(forward, updated=())
        def opened(*args: Any, **kwargs: Any) -> Any:
            with self._open():
                return forward(*args, **kwargs)

        return opened

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The extent in which the working buffer is there; its memory is the transformer's the rest of the time."""
        with self._lock:
            if not self._running:
                self._check_whole()
                self._ring = torch.empty(self._size, dtype=torch.uint8, device=self._device)
                self._mover = Mover(self._ring, self._copier, self._transfers, None, self._timeout)
                self._mover.add(self._streamed)
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
                if not self._running:
                    self._close()

    def _close(self) -> None:
        assert self._mover is not None
        self._mover.close()
        for field in fields(MoverStats):
            before, now = getattr(self.stats, field.name), getattr(self._mover.stats, field.name)
            setattr(self.stats, field.name, max(before, now) if field.name == "peak" else before + now)
        self._mover = self._ring = None
        for block in self._layers:
            block.forget()

    def _check_whole(self) -> None:
        """A layer that has become another one would compute with what stands in for its weights."""
        now = {id(module) for module in self._model.modules()}
        if not all(id(module) in now for module in self._owners):
            raise ValueError(
                f'layers of {self._name} have become others, which text_rank="host" does not know: give text_rank a '
                f"rank, or change the encoder before the pipeline is made parallel"
            )

    def _set(self, name: str, method: Callable[..., Any]) -> None:
        setattr(self._model, name, method)
        self._undo.append(lambda: self._model.__dict__.pop(name))

    def _no_saving(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"save_pretrained: the weights of {self._name} are in host memory, and not in their places. Load the model "
            f"once with plain diffusers and save that"
        )


class _ForOneCall:
    """Stands in for what surrounds the layers, which has its weights while it is called.

    Args:
        module: What it stands in for.
        weights: Its weights, on the host.
        here: Where it computes.
        device: Where its results go.
    """

    def __init__(self, module: nn.Module, weights: Sequence[Weight], here: torch.device, device: torch.device) -> None:
        self._weights, self._here, self._device, self._forward = weights, here, device, module.forward
        self._at_rest = [each.owners[0][0]._parameters[each.owners[0][1]] for each in weights]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        for weight in self._weights:
            weight.put(weight.made_of(iter([each.to(self._here, non_blocking=True) for each in weight.plain])))
        try:
            args, kwargs = _to((args, kwargs), self._here)
            return _to(self._forward(*args, **kwargs), self._device)
        finally:
            for weight, parameter in zip(self._weights, self._at_rest, strict=True):
                assert parameter is not None
                weight.put(parameter)


def _to(values: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


def _stand_in(weight: Weight, device: torch.device) -> nn.Parameter:
    """What a module has in a weight's place at rest: a pipeline asks an encoder for its device and dtype."""
    one = torch.zeros((), dtype=weight.found.dtype, device=device)
    return nn.Parameter(one.expand(weight.found.shape), requires_grad=False)


def _moved(parameter: nn.Parameter, device: torch.device) -> Callable[[], None]:
    before = parameter.data
    parameter.data = before.to(device)

    def back() -> None:
        parameter.data = before

    return back
