"""Attention over the stale store, seen at the one call every diffusers processor ends in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.kernels.choice import KernelWatch
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.keys.masks import SHARED_BY_HEADS, as_mask, key_column, row_numbers, table_of
from patchpipe.stage.keys.store import Entries, LayerStore
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows


@dataclass(frozen=True)
class Attend:
    """``scaled_dot_product_attention`` and whatever a model gave it beside its tensors.

    Attributes:
        compute: The function.
        column: What its ``attn_mask`` adds to the scores of this rank's fresh keys, ``[batch, 1 or heads, rows, 1]``;
            ``None`` where no key of the layer is masked, on any rank.
        table: The mask of all rows ``[batch, 1 or heads, rows, rows]``, where it differs from query to query. The
            column then has the number of each key's row.
        dropout: Its ``dropout_p``.
        causal: Its ``is_causal``.
        scale: Its ``scale``; ``None`` is one over the root of the channels.
        grouped: Its ``enable_gqa``.
    """

    compute: Callable[..., Tensor]
    column: Tensor | None = None
    table: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The column, if there is one: what is kept and sent beside keys and values."""
        return () if self.column is None else (self.column,)

    def mask(self, column: Tensor, asking: Tensor | None = None) -> Tensor:
        """A column as a mask ``[batch, 1 or heads, 1 or queries, keys]``.

        Args:
            column: Of keys.
            asking: Of the queries, where it tells the numbers of rows; this rank's fresh rows, if not given.
        """
        if self.table is None:
            return as_mask(column)
        asking = self.column if asking is None else asking
        assert asking is not None
        return self.table[:, :, asking[0, 0, :, 0]][..., column[0, 0, :, 0]]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, column: Tensor | None = None, *, asking: Tensor | None = None
    ) -> Tensor:
        """Attention of a query over keys and values on this rank, and the column of all those keys; see ``mask``."""
        options = {"enable_gqa": True} if self.grouped else {}
        mask = None if column is None else self.mask(column, asking)
        return self.compute(query, key, value, mask, self.dropout, self.causal, scale=self.scale, **options)


class Sharing(Protocol):
    """How the ranks that share a patch attend together."""

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """Attention of this rank's rows ``[batch, heads, own rows, channels]`` over all rows there are.

        Args:
            attend: Attention of a query over keys and values on this rank, and the column of its own keys.
            query: Of this rank's rows.
            key: The same.
            value: The same.
            layer: The layer's store, and its rows.

        Returns:
            The result for this rank's rows and all heads.
        """
        ...


@dataclass(frozen=True)
class Attending:
    """What a self-attention layer needs beside its own module.

    Attributes:
        patch: This rank's rows.
        store: The layer's keys and values; ``None`` where nothing is ever stale.
        sharing: The ranks that share the patch, if there are several.
        rows: The layer's sequence: its keys and values.
        masked: Whether some of its keys are masked, on whatever rank.
        entries: Which entries of the batch are at work; ``None`` for all.
        kernels: Looks at what torch's kernels are given; ``None`` where there is but one.
        pace: Of the call, where stale rows are forecast.
        queries: The rows that ask, if they are not all of them.
    """

    patch: Patch
    store: LayerStore | None
    sharing: Sharing | None
    rows: Rows
    masked: bool = False
    entries: Entries | None = None
    kernels: KernelWatch | None = None
    pace: Pace | None = None
    queries: Rows | None = None

    @property
    def asking(self) -> Rows:
        """The rows of its queries."""
        return self.queries or self.rows

    @property
    def outlives(self) -> bool:
        """Whether something may hold on to queries, keys or values themselves after the layer is done with them."""
        return self.sharing is not None or (self.store is not None and self.patch.whole)

    def remember(self, patch: Patch, *fresh: Tensor) -> tuple[Tensor, ...]:
        """Stores a whole patch's fresh keys, values and column, if any; returns those of every row that exists."""
        if self.store is None:
            return fresh
        if patch.whole:
            return self.store.keep(*fresh, entries=self.entries, pace=self.pace)
        return self.store.write(patch, *fresh, pace=self.pace)


class _StoreMode(TorchFunctionMode):
    """Gives ``scaled_dot_product_attention`` the stored keys and values beside the fresh ones.

    By then keys carry qk-norm and rotary embedding, whatever the processor. A mode is local to its
    thread, so that two models in one process do not meet.
    """

    def __init__(self, attending: Attending) -> None:
        super().__init__()
        self.attending = attending
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.reshape and not kwargs and args[0].numel() == 0:
            return args[0].reshape(empty_shape(args[0].shape, args[1:]))
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self.attend(func, *args, **kwargs)

    def attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attends in the place of the function a model called; the other arguments are those of torch."""
        layer = self.attending
        func = func if layer.kernels is None else layer.kernels.watching(func)
        column, table = self._column(attn_mask, query, key)
        attend = Attend(func, column, table, dropout_p, is_causal, scale, enable_gqa)
        if layer.sharing is not None:
            return layer.sharing.attend(attend, query, key, value, layer)
        seen = layer.remember(layer.patch, key, value, *attend.columns)
        if layer.patch.uncut:  # every key is fresh: the call stands as the model made it
            options = {"enable_gqa": True} if enable_gqa else {}
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        return attend(query, *seen)

    def _column(self, mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The column of the fresh keys, if they are to meet others or to be kept; the table, if there must be one."""
        layer = self.attending
        if layer.patch.uncut and layer.store is None:
            return None, None
        if mask is not None and not layer.masked:
            raise NotImplementedError(
                "the model masks self-attention, which its plan does not tell (mask) and which is therefore not "
                "supported while patches stream or are shared: use warmup='all' on one device, or with pipefusion alone"
            )
        table = table_of(mask, layer.rows, query.dtype) if layer.masked else None
        if table is not None:
            column = row_numbers(layer.rows.ranges(layer.patch), key)
        else:
            column = key_column(mask, key, query.dtype) if layer.masked else None
        by_heads = [each for each in (column, table) if each is not None and each.shape[1] != SHARED_BY_HEADS]
        if by_heads and layer.sharing is not None:
            raise NotImplementedError(
                "a self-attention mask that differs from head to head is not supported while ranks share patches: use "
                "pipefusion instead of ulysses, ring or distrifusion"
            )
        return column, table


class _LookMode(TorchFunctionMode):
    """Has the arguments of ``scaled_dot_product_attention`` looked at, and leaves the call as it is."""

    def __init__(self, kernels: KernelWatch) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            func = self.kernels.watching(func)
        return func(*args, **(kwargs or {}))


def empty_shape(old: Sequence[int], asked: tuple[Any, ...]) -> list[int]:
    """The shape meant by a reshape of no rows at all, where torch finds -1 ambiguous.

    Text rows ride with the first patch alone; rotary embeddings split the channels of whatever rows there are.
    """
    new = list(asked[0] if len(asked) == 1 and not isinstance(asked[0], int) else asked)
    if -1 in new and 0 in new:
        known = prod([size for size in new if size > 0])
        new[new.index(-1)] = prod([size for size in old if size > 0]) // known
    return new


class Attended:
    """Stands in for the ``forward`` of a self-attention layer, which goes through its store and the sharing ranks.

    Args:
        layer: The attention module.
        find: What the patch at work needs; ``None`` leaves the layer alone.
        kernels: Looks at what torch's kernels are given; ``None`` where there is but one.
    """

    def __init__(
        self, layer: nn.Module, find: Callable[[], Attending | None], kernels: KernelWatch | None = None
    ) -> None:
        self.name = type(layer).__name__
        self.compute, self.find, self.kernels = layer.forward, find, kernels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with its one attention seen."""
        attending = self.find()
        if attending is None:
            return self._alone(*args, **kwargs)
        with _StoreMode(attending) as mode:
            result = self.compute(*args, **kwargs)
        self.check(mode.calls)
        return result

    def _alone(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, looked at the first time."""
        kernels, self.kernels = self.kernels, None
        if kernels is None:
            return self.compute(*args, **kwargs)
        with _LookMode(kernels):
            return self.compute(*args, **kwargs)

    def attend(self, rows: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, *options: Any) -> Tensor:
        """The layer's one attention by itself, where a compiled forward asks for it.

        Args:
            rows: Query, key and value of this rank's rows. Their memory is used for other things afterwards.
            mask: The model's ``attn_mask``.
            options: ``dropout_p``, ``is_causal``, ``scale`` and ``enable_gqa``.
        """
        attending, compute = self.find(), functional.scaled_dot_product_attention
        if attending is None:
            dropout, causal, scale, grouped = options
            compute = compute if self.kernels is None else self.kernels.watching(compute)
            more = {"enable_gqa": True} if grouped else {}
            return compute(*rows, mask, dropout, causal, scale=scale, **more)
        if attending.outlives:
            rows = (rows[0].clone(), rows[1].clone(), rows[2].clone())
        return _StoreMode(attending).attend(compute, *rows, mask, *options)

    def check(self, calls: int) -> None:
        """Makes sure that the attention was seen.

        Raises:
            RuntimeError: It was not, or there were several.
        """
        if calls != 1:
            raise RuntimeError(
                f"{self.name} called scaled_dot_product_attention {calls} times instead of once, so "
                f"its keys and values cannot be kept: use diffusers' native attention backend"
            )


def attend_through(
    layer: nn.Module, find: Callable[[], Attending | None], kernels: KernelWatch | None = None
) -> Callable[[], None]:
    """Sends a layer's self-attention through its store and the ranks that share the patch.

    Args:
        layer: The attention module.
        find: What the patch at work needs; ``None`` leaves the layer alone.
        kernels: Looks at what torch's kernels are given; ``None`` where there is but one.

    Returns:
        A function that undoes it.
    """
    return override(layer, Attended(layer, find, kernels))


def override(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Puts a function in the place of a module's ``forward``.

    Returns:
        A function that undoes it.
    """
    previous = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if previous is None:
            del module.__dict__["forward"]
        else:  # a hook that was there before, or a forward of the user's own
            module.forward = previous  # type: ignore[method-assign]

    return undo
