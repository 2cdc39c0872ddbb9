"""A block, or a layer, whose weights come into a working buffer before it runs and may go afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from patchpipe.offload.mover import Mover
from patchpipe.offload.riding import Ride
from patchpipe.offload.ring import Placement
from patchpipe.offload.weights import Weight, views


class WorkingBuffer(Protocol):
    """What blocks find their weights in."""

    @property
    def mover(self) -> Mover:
        """What fills it."""
        ...

    @property
    def ring(self) -> Tensor:
        """Its memory, once the mover is there."""
        ...

    @property
    def ride(self) -> Ride | None:
        """The calls that go through the blocks together at this moment, if several do."""
        ...


class StreamedBlock:
    """Stands in for the ``forward`` of a block whose weights come and go.

    Args:
        block: The block.
        key: Its name for the mover.
        weights: Its weights; what the block has in their place now it has whenever it does not run.
        buffer: Where they come to.
    """

    def __init__(self, block: nn.Module, key: Any, weights: Sequence[Weight], buffer: WorkingBuffer) -> None:
        self.key, self.weights, self.buffer = key, weights, buffer
        self.compute: Callable[..., Any] = block.forward
        self._at_home = [module._parameters[leaf] for module, leaf in (each.owners[0] for each in weights)]
        self._views: dict[int, list[nn.Parameter]] = {}  # by where in the buffer the block begins
        self._versions = self._count_writes()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's streams."""
        if self.buffer.ride is not None:
            return self.buffer.ride.through(self, lambda: self.compute(*args, **kwargs))
        self.hold()
        try:
            return self.compute(*args, **kwargs)
        finally:
            self.let_go()

    def hold(self) -> None:
        """Waits until the block's weights are there.

        Raises:
            ValueError: A weight was written in place, which what was copied ahead and other ranks do not know of.
        """
        if self._count_writes() != self._versions:
            raise ValueError(
                f"a weight of {self.key} was written in place while weights come and go: call patchpipe.restore(pipe), "
                f"write, and call parallelize again; diffusers' own methods for LoRA need nothing of this"
            )
        placement = self.buffer.mover.need(self.key)
        try:
            self._put(self._placed(placement))
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """The block's weights may go."""
        self._put(self._at_home)
        self.buffer.mover.done()

    def _count_writes(self) -> list[int]:
        tensors = [*self._at_home, *(one for weight in self.weights for one in weight.plain)]
        return [each._version for each in tensors if each is not None and not each.is_inference()]

    def forget(self) -> None:
        """The views that were made are no longer of the buffer."""
        self._views.clear()

    def _placed(self, placement: Placement) -> list[nn.Parameter]:
        at = placement.start % self.buffer.ring.numel()
        if at not in self._views:
            self._views[at] = views(self.weights, placement, self.buffer.ring)
        return self._views[at]

    def _put(self, parameters: Sequence[nn.Parameter | None]) -> None:
        for weight, parameter in zip(self.weights, parameters, strict=True):
            assert parameter is not None
            weight.put(parameter)


def sizes_of(weights: Sequence[Weight]) -> tuple[int, ...]:
    """Bytes that each plain tensor of some weights takes in a buffer."""
    return tuple(size for weight in weights for size in weight.sizes)
