"""What a request's thread finds as its caller left it: default generators, gradients, CUDA streams and the like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


class Draws:
    """The state of torch's default generators, of which every request has its own.

    Args:
        device: Where this rank computes.
        seed: What they are seeded with; ``None`` takes them as they are.
    """

    def __init__(self, device: torch.device, seed: int | None = None) -> None:
        self._device = device
        if seed is None:
            self.keep()
            return
        self._host = torch.Generator().manual_seed(seed).get_state()
        self._cuda = torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None

    def keep(self) -> None:
        """Notes how far they have come."""
        self._host = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def restore(self) -> None:
        """Lets them go on from there."""
        torch.set_rng_state(self._host)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Surroundings:
    """What torch keeps for each thread apart, as the thread that makes this object has it.

    Args:
        device: Where this rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._inference, self._gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kinds = sorted({"cpu", device.type})
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same in another thread."""
        torch.set_num_threads(self._threads)
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))  # makes its device the current one as well
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


@contextmanager
def forwards_through(through: Callable[..., Any], models: Iterable[nn.Module]) -> Iterator[None]:
    """In the block, calls of models go through a function, which is given the model's own ``forward`` first."""
    forwards = {model: model.forward for model in models}
    for model, forward in forwards.items():
        stands_in: Any = partial(through, forward)
        stands_in.__signature__ = inspect.signature(forward)
        object.__setattr__(model, "forward", stands_in)
    try:
        yield
    finally:
        for model, forward in forwards.items():
            object.__setattr__(model, "forward", forward)
