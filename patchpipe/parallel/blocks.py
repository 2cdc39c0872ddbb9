"""This rank's part of the transformer, hooked on and off: slices of matrices, its stage, its compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.errors import PatchpipeError
from patchpipe.parallel.tensor import TensorPart
from patchpipe.stage.stage import Stage


class Blocks:
    """The hooks on a rank's blocks.

    Args:
        stage: The blocks.
        part: This rank's part of their matrices, where they are split.
        config: The layout.
        group: The ranks.
        offload: Takes a hooked stage's weights off the device, and returns what brings them back.

    Attributes:
        graphs: Graphs that were compiled so far, by kind of block.
    """

    def __init__(
        self,
        stage: Stage,
        part: TensorPart | None,
        config: ParallelConfig,
        group: Group,
        offload: Callable[[Stage], Callable[[], None]] | None = None,
    ) -> None:
        self.graphs: Mapping[str, int] = {}
        self._stage, self._part, self._config, self._group = stage, part, config, group
        self._offload = offload
        self._bring_back: Callable[[], None] | None = None
        self._uncompile: Callable[[], None] | None = None
        self._kinds: dict[Any, Any] = {}  # of compiled blocks: their graphs outlive a change of the layers

    def attach(self) -> None:
        """Puts the hooks on.

        Raises:
            ValueError: The blocks are to be compiled, and one of them was changed in a way that would be lost; or the
                device has not the memory for the little that weights need that come and go.
        """
        if self._part is not None:
            self._part.attach(self._group.lines["tensor"])
        self._stage.attach()
        if self._config.compile:
            self._compile()
        if self._offload is not None:
            self._take_away(self._offload)
        self._stage.sew()

    def _take_away(self, offload: Callable[[Stage], Callable[[], None]]) -> None:
        try:
            self._bring_back = offload(self._stage)
        except (ValueError, PatchpipeError):
            self.detach()
            raise

    def _compile(self) -> None:
        from patchpipe.stage.compiling import compile_blocks  # heavy, and needed by those alone who ask for it

        try:
            self.graphs, self._uncompile = compile_blocks(self._stage.blocks, self._kinds)
        except ValueError:
            self.detach()
            raise

    def detach(self) -> None:
        """Takes them off, and puts whole matrices back; of a model loaded in slices those are empty."""
        self._unhook()
        if self._part is not None:
            self._part.detach()

    @contextmanager
    def open(self, *, merging: bool = False) -> Iterator[None]:
        """Shows the transformer's layers without hooks in the block, so that they can be changed.

        Args:
            merging: Whether adapters are merged into matrices. Slices that were loaded as such are all this rank has,
                and what is beside them is sliced alike; they are merged as they are.
        """
        self._unhook()
        if self._part is not None and not (merging and self._part.loaded):
            self._part.release()
        try:
            yield
        finally:
            if self._part is not None:
                self._part.release()
            self.attach()

    def _unhook(self) -> None:
        self._stage.unsew()
        if self._bring_back is not None:
            self._bring_back()
            self._bring_back = None
        if self._uncompile is not None:
            self._uncompile()
            self._uncompile = None
        self._stage.detach()
