"""Attention over the stale store, seen at the one call every diffusers processor ends in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.kernels.choice import KernelWatch
from patchpipe.kernels.processors import can_exchange, exchanged
from patchpipe.models.latent import PREFIX
from patchpipe.models.skips import takes_values
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Ahead, Early
from patchpipe.stage.keys.masks import SHARED_BY_HEADS, key_column, row_numbers, table_of
from patchpipe.stage.keys.prefix import PrefixKeys

logger = logging.getLogger("patchpipe")


class _StoreMode(TorchFunctionMode):
    """Gives ``scaled_dot_product_attention`` the stored keys and values beside the fresh ones.

    By then keys carry qk-norm and rotary embedding, whatever the processor. A mode is local to its
    thread, so that two models in one process do not meet.
    """

    def __init__(self, attending: Attending) -> None:
        super().__init__()
        self.attending = attending
        self.calls = 0
        self.adapted = 0  # calls of an IP-Adapter, which follow the layer's own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.reshape and not kwargs and args[0].numel() == 0:
            return args[0].reshape(empty_shape(args[0].shape, args[1:]))
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if self.calls and self.attending.adapted:
            self.adapted += 1
            return func(*args, **kwargs) if self.attending.again is None else self.attend_again(func, *args, **kwargs)
        self.calls += 1
        return self.attend(func, *args, **kwargs)

    def attend_again(
        self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Attention of an IP-Adapter over the patches' rows and, after them, those of its picture, which are whole."""
        layer = self.attending.again
        assert layer is not None
        if self.adapted > 1 or any(options.values()):
            raise RuntimeError("an IP-Adapter attends in another way than the one its plan tells of")
        own = layer.rows.count(layer.patch)
        [key, *_], [value, *_] = further = [rows.split([own, rows.shape[2] - own], 2) for rows in (key, value)]
        attend = Attend(func, further=tuple(rows for _, rows in further))
        if layer.sharing is None:
            return attend(query, *layer.remember(layer.patch, key, value))
        result = layer.sharing.attend(attend, query, key, value, layer)
        return result.transpose(1, 2).contiguous().transpose(1, 2)  # as torch's kernels lay it out: it is viewed so

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
        if layer.each:
            layer = layer.each[self.calls - 1]
        if layer.masks_queries and attn_mask is not None:
            attn_mask = attn_mask.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        if layer.blanks:
            if attn_mask is not None and attn_mask.shape[-1] == key.shape[2]:
                attn_mask = without_rows(attn_mask.transpose(-2, -1), layer.blanks).transpose(-2, -1)
            query, key, value = (without_rows(rows, layer.blanks) for rows in (query, key, value))
        if layer.kept_keys is not None:
            attn_mask = layer.kept_keys[:, None, None]
        options = attn_mask, dropout_p, is_causal, scale, enable_gqa
        result = self._attend(layer, func, query, key, value, *options)
        return with_rows(result, layer.blanks) if layer.blanks else result

    def _attend(
        self,
        layer: Attending,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        func = func if layer.kernels is None else layer.kernels.watching(func)
        if layer.prefix is not None and layer.patch.uncut:
            self._keep_beside(layer, layer.prefix, key, value)
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        column, table = self._column(layer, attn_mask, query, key)
        attend = Attend(func, column, table, dropout_p, is_causal, scale, enable_gqa, layer.further, query.dtype)
        if layer.sharing is not None:
            return layer.sharing.attend(attend, query, key, value, layer)
        seen = layer.remember(layer.patch, key, value, *attend.columns)
        if layer.patch.uncut:  # every key is fresh: the call stands as the model made it
            options = {"enable_gqa": True} if enable_gqa else {}
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        return attend(query, *seen)

    def _keep_beside(self, layer: Attending, prefix: PrefixKeys, key: Tensor, value: Tensor) -> None:
        """Keeps the other rows' keys and values in a call that has those before the picture among them.

        Of the calls a layer makes then, the one that sees all rows counts.
        """
        held = zip(layer.rows.segments, layer.rows.sizes, strict=True)
        sizes = [prefix.count if name == PREFIX else size for name, size in held]
        if key.shape[2] != sum(sizes):
            self.calls -= 1
            return
        at = sum(sizes[: layer.rows.segments.index(PREFIX)])
        layer.remember(layer.patch, prefix.without(key, at), prefix.without(value, at))

    def _column(
        self, layer: Attending, mask: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The column of the fresh keys, if they are to meet others or to be kept; the table, if there must be one."""
        if layer.patch.uncut and layer.store is None:
            return None, None
        if mask is not None and not layer.masked:
            raise NotImplementedError(
                "the model masks self-attention, but its plan does not say so (mask): not supported if patches "
                "stream or are shared. Use warmup='all' on one device, or warmup='all' with pipefusion alone"
            )
        table = table_of(mask, layer.rows) if layer.masked else None
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


class _ValueMode(_StoreMode):
    """Has every row see itself alone, as perturbed attention guidance does: nothing is kept or asked of other ranks."""

    def attend(
        self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """The values in place of what attention makes of them."""
        return value


class _LookMode(TorchFunctionMode):
    """Has the arguments of ``scaled_dot_product_attention`` looked at, and leaves the call as it is."""

    def __init__(self, kernels: KernelWatch) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            func = self.kernels.watching(func)
        return func(*args, **(kwargs or {}))


def _some_empty(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.numel() == 0 for value in (*args, *kwargs.values()))


def empty_shape(old: Sequence[int], asked: tuple[Any, ...]) -> list[int]:
    """The shape meant by a reshape of no rows at all, where torch finds -1 ambiguous.

    Text rows ride with the first patch alone; rotary embeddings split the channels of whatever rows there are.
    """
    new = list(asked[0] if len(asked) == 1 and not isinstance(asked[0], int) else asked)
    if -1 in new and 0 in new:
        known = prod([size for size in new if size > 0])
        new[new.index(-1)] = prod([size for size in old if size > 0]) // known
    return new


def without_rows(rows: Tensor, at: Sequence[int]) -> Tensor:
    """``[batch, heads, rows, channels]`` without these rows."""
    for index in reversed(at):
        rows = torch.cat((rows[:, :, :index], rows[:, :, index + 1 :]), dim=2)
    return rows


def with_rows(rows: Tensor, at: Sequence[int]) -> Tensor:
    """The reverse: rows of zeros at these places."""
    for index in at:
        blank = rows.new_zeros(*rows.shape[:2], 1, rows.shape[3])
        rows = torch.cat((rows[:, :, :index], blank, rows[:, :, index:]), dim=2)
    return rows


class Attended:
    """Stands in for the ``forward`` of a self-attention layer, which goes through its store and the sharing ranks.

    Args:
        layer: The attention module.
        find: What the patch at work needs; ``None`` leaves the layer alone.
        kernels: Looks at what torch's kernels are given; ``None`` where there is but one.
        early: The hooks on its projections, where values are to go ahead.
    """

    def __init__(
        self,
        layer: nn.Module,
        find: Callable[[], Attending | None],
        kernels: KernelWatch | None = None,
        early: Early | None = None,
    ) -> None:
        self.layer, self.name = layer, type(layer).__name__
        self.compute, self.find, self.kernels, self.early = layer.forward, find, kernels, early
        self.hidden = False  # whether the processor's own code does not attend, but what it calls
        self.reshapes = False  # whether it reshapes in a way that torch finds ambiguous where there are no rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with its one attention seen."""
        attending = self.find()
        if attending is None:
            return self._alone(*args, **kwargs)
        if takes_values(self.layer, kwargs):
            with _ValueMode(attending):
                return self.compute(*args, **kwargs)
        ahead = self._ahead(attending)
        if self.early and ahead:
            mode = _StoreMode(replace(attending, ahead=ahead))
            with self.early.sending(ahead), mode:
                result = self.compute(*args, **kwargs)
        else:
            mode = _StoreMode(attending)
            result = self._seen(mode, args, kwargs)
        self.check(mode.calls, attending.calls)
        return result

    def _seen(self, mode: _StoreMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's own forward: its attention alone is seen, or all it does where that is not enough."""
        if not self.hidden and can_exchange(self.layer) and not (self.reshapes and _some_empty(args, kwargs)):
            try:
                result = exchanged(self.layer, mode, self.compute, args, kwargs)
                if mode.calls:
                    return result
                self.hidden = True
            except RuntimeError as error:  # of a reshape of no rows at all, which the mode mends
                if mode.calls or not _some_empty(args, kwargs):
                    raise
                self.reshapes = True
                logger.debug("%s is watched where it has no rows: %s", self.name, error)
        with mode:
            return self.compute(*args, **kwargs)

    def _ahead(self, attending: Attending) -> Ahead | None:
        """Values that go ahead, if this layer's can: blank rows, and entries one by one, are told apart too late."""
        if self.early is None or attending.sharing is None or attending.blanks or attending.each:
            return None
        return attending.sharing.ahead(attending, self.early.parts, self.early.heads)

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

    def check(self, calls: int, expected: int = 1) -> None:
        """Makes sure that the attention was seen.

        Raises:
            RuntimeError: It was not, or there were more than there should be.
        """
        if calls != expected:
            raise RuntimeError(
                f"{self.name} called scaled_dot_product_attention {calls} times instead of {expected}, so "
                f"its keys and values cannot be kept: use diffusers' native attention backend"
            )


def attend_through(
    layer: nn.Module,
    find: Callable[[], Attending | None],
    kernels: KernelWatch | None = None,
    early: Early | None = None,
) -> Callable[[], None]:
    """Sends a layer's self-attention through its store and the ranks that share the patch.

    Args:
        layer: The attention module.
        find: What the patch at work needs; ``None`` leaves the layer alone.
        kernels: Looks at what torch's kernels are given; ``None`` where there is but one.
        early: The hooks on its projections, where values are to go ahead.

    Returns:
        A function that undoes it.
    """
    return override(layer, Attended(layer, find, kernels, early))


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
