"""What the hooks of a stage read while one patch of one transformer call runs through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from patchpipe.models.blocks import Holds
from patchpipe.stage.attending import Sharing
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.keys.prefix import Prefixes, PrefixKeys
from patchpipe.stage.keys.store import Entries, LayerStores
from patchpipe.stage.patches import Patch
from patchpipe.stage.root.survey import CallShapes
from patchpipe.stage.rows import Cutter

Streams = dict[str, Tensor]


@dataclass
class CallContext:
    """One patch on its way through the stage.

    Attributes:
        patch: The patch at work; of one that ranks share, this rank's rows.
        shapes: What is known of the call.
        stores: The branch's key/value store of each layer; ``None`` where nothing is ever stale.
        received: The streams from the stage before.
        memo: Results shared by the patches of this call.
        request_memo: Results shared by the calls of this request.
        inputs: The arguments of the call.
        sharing: The ranks that share the patch, if there are several.
        entries: Which entries of the batch run; ``None`` for all.
        pace: Of the call, where stale rows are forecast.
        draft: Whether its keys and values alone are asked for, and no prediction.
        turn: Which turn it is, of how many, where the stage shares blocks; see ``balance.Boundary``.
        entering: What to do before a shared block runs, by its place.
        leaving: What to do after it.
        trailing: The block that the next stage runs in this synchronous step, for its keys and values alone.
        tail: Whether what follows the last block takes the patch's rows as they are.
        patches: All patches of the latent.
        results: What blocks returned that later ones need, by ``result_name``; see ``CallShapes.carried``.
        masked: Whether the block at work masks some keys, on whatever rank.
        second: This rank's rows of the class's second output; see ``ModelPlan.second``.
        entered: Whether a block of this stage has begun.
        streams_are: What the root has in the place of streams since the last block: the patch's ``"rows"``, the
            ``"whole"``, or, where a block of another stage was handed through, ``"nothing"`` that counts.
        left_out: What the call leaves out; see ``Stage.left_out``.
        passed: What came from the stage before for a later list; see ``BlockList.passes``.
        prefixes: What the branch keeps of its first call, by block; see ``plan.Prefix``.
        alike: What self-attention layers of the same kind need, but for their stores.
        kept_keys: Of a block that drops masked rows, what of its mask is this rank's, by argument; see
            ``BlockList.drops_masked``.
    """

    patch: Patch
    shapes: CallShapes
    stores: LayerStores | None
    received: Streams = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    request_memo: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    sharing: Sharing | None = None
    entries: Entries | None = None
    pace: Pace | None = None
    draft: bool = False
    turn: tuple[int, int] | None = None
    entering: dict[int, Callable[[], None]] = field(default_factory=dict)
    leaving: dict[int, Callable[[], None]] = field(default_factory=dict)
    trailing: Callable[[], Any] | None = None
    tail: bool = False
    masked: bool = False
    patches: tuple[Patch, ...] = ()
    results: Streams = field(default_factory=dict)
    kept_keys: Tensor | None = None
    second: Tensor | None = None
    entered: bool = False
    streams_are: Literal["rows", "whole", "nothing"] = "whole"
    left_out: frozenset[int | str] = frozenset()
    passed: Streams = field(default_factory=dict)
    prefixes: Prefixes = field(default_factory=dict)
    alike: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _narrowed: dict[tuple[int, Any], tuple[Any, Any]] = field(default_factory=dict)

    @property
    def keeps(self) -> bool:
        """Whether keys and values are kept, or go to other ranks."""
        return self.stores is not None or self.sharing is not None

    @cached_property
    def cutter(self) -> Cutter | None:
        """Cuts whole arguments to the patch; ``None`` where the patch is the whole."""
        if self.patch.uncut:
            return None
        return Cutter(self.patch, self.shapes.raster, self.shapes.sizes)

    def narrowed(self, value: Any, held: Holds | tuple[Holds | None, ...] | None) -> Any:
        """The patch's rows of an argument that many blocks are given; cut once."""
        assert self.cutter is not None
        if isinstance(value, (tuple, list)):  # which may be made anew for every block, of the same tensors
            each = held if isinstance(held, tuple) else (held,) * len(value)
            return type(value)(self.narrowed(part, own) for part, own in zip(value, each, strict=True))
        key = (id(value), held)
        if key not in self._narrowed:  # the argument is kept too, lest another one takes its id
            self._narrowed[key] = (value, self.cutter.narrow(value, held))
        return self._narrowed[key][1]

    def prefix_of(self, block: str) -> PrefixKeys:
        """What a block keeps of the branch's first call."""
        return self.prefixes.setdefault(block, PrefixKeys())

    def before(self, index: int) -> None:
        """Does what is asked for before a block."""
        if index in self.entering:
            self.entering[index]()

    def after(self, index: int) -> None:
        """Does what is asked for after a block."""
        if index in self.leaving:
            self.leaving[index]()


@dataclass(frozen=True)
class Kept:
    """Results of modules that are not computed anew for every patch.

    Attributes:
        call: Of the call at work.
        request: Of its request, with what they follow from.
        inputs: The call's arguments.
        turns: How often each module has been called in this run.
    """

    call: dict[Any, Any]
    request: dict[tuple[Any, ...], tuple[Any, Any]]
    inputs: Mapping[str, Any]
    turns: Counter[str] = field(default_factory=Counter)

    def turn(self, path: str) -> int:
        """Counts a call of a module: in every run its calls follow one another alike."""
        self.turns[path] += 1
        return self.turns[path]


def identity_of(value: Any) -> Any:
    """Tells a tensor from another one, and from itself after an in-place change; a number is its own identity."""
    if isinstance(value, int):
        return value
    if isinstance(value, list):
        return tuple(map(identity_of, value))
    versioned = isinstance(value, Tensor) and not value.is_inference()
    return id(value), value._version if versioned else 0
