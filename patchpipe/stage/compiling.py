"""Compiled blocks: a stage's blocks through ``torch.compile``, each kind once for the patches of every shape.

What is traced is a block's own ``forward``, whole. Three things in it are not arithmetic and stay outside, as operators
that the compiler calls but does not look into: self-attention, which goes through the store and the ranks that share
the patch; modules whose result patches share; and the Linears that end with a sum over ranks. All three are the hooks
that an eager stage has, found by the ``forward`` they put on a module, so that nothing here knows what they do.

Blocks of one kind run the same code on different parameters, so that they share graphs. Sizes are dynamic, but torch
never treats 0 and 1 as any other number, so that patches without text rows have a graph of their own, and so do batches
of one entry: up to four graphs a kind, of which a request for one picture without guidance in a batch uses two.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, library, nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.models.blocks import BlockPlace
from patchpipe.stage.attention import Attended, empty_shape

BACKEND = "inductor"

logger = logging.getLogger("patchpipe")
_at_work: ContextVar[CompiledBlock] = ContextVar("the compiled block at work")


# -- what the compiler calls but does not look into ----------------------------------------------


@library.custom_op("patchpipe::attend", mutates_args=("order",))
def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, order: Tensor, path: str,
    dropout: float, causal: bool, scale: float | None, grouped: bool,
) -> Tensor:  # fmt: skip
    """Self-attention of the layer at ``path`` of the block at work.

    ``order`` stands for the stores and connections that change: what changes the same thing keeps its order.
    """
    result = _at_work.get().attend(path, (query, key, value), mask, dropout, causal, scale, grouped)
    return result.transpose(1, 2).contiguous().transpose(1, 2)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_rest: Any) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)


@library.custom_op("patchpipe::hooked", mutates_args=("order",))
def _hooked(rows: Tensor, order: Tensor, path: str, width: int) -> Tensor:
    """The module at ``path`` of the block at work, with its hook.

    The result may be kept for other patches, and the compiler writes into what it is given: it gets a copy.
    """
    return _at_work.get().run_hooked(path, rows, width).clone(memory_format=torch.contiguous_format)


@_hooked.register_fake
def _(rows: Tensor, order: Tensor, path: str, width: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


# -- what is traced in the place of the hooks ----------------------------------------------------


class _AttendMode(TorchFunctionMode):
    """Has a layer's attention done by the operator."""

    def __init__(self, path: str, order: Tensor) -> None:
        super().__init__()
        self.path, self.order = path, order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.reshape and not kwargs and args[0].numel() == 0:
            return args[0].reshape(empty_shape(args[0].shape, args[1:]))
        if func is Tensor.unflatten:  # a method in Python, whose call of its super class cannot be traced
            return torch.unflatten(*args, **kwargs)
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return _attend(
            query, key, value, attn_mask, self.order, self.path, dropout_p, is_causal, scale, enable_gqa
        )  # fmt: skip


def _traced_attention(attended: Attended, path: str, order: Tensor) -> Callable[..., Any]:
    compute = attended.compute

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _AttendMode(path, order):
            return compute(*args, **kwargs)

    return forward


def _traced_module(path: str, width: int, order: Tensor) -> Callable[..., Tensor]:
    def forward(rows: Tensor) -> Tensor:
        return _hooked(rows, order, path, width)

    return forward


def _own_code(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function with a code object of its own: torch keeps graphs by code, and counts them against a limit."""

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(block, *args, **kwargs)

    return FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, closure=run.__closure__)


# -- blocks --------------------------------------------------------------------------------------


class Kind:
    """Blocks of one class and structure, which share graphs.

    Args:
        block: The first of them.
        name: For people.

    Attributes:
        graphs: Compiled so far.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self.name, self.graphs = name, 0
        self._eager = _own_code(type(block).forward, name)
        self._run: Callable[..., Any] = torch.compile(self._eager, backend=self._build, fullgraph=True)

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A block's result, by a graph that is there already or a new one."""
        try:
            return self._run(block, *args, **kwargs)
        except FailOnRecompileLimitHit:
            logger.warning(
                "%s has been compiled for %d shapes, which is torch's limit: it runs uncompiled from now on",
                self.name,
                self.graphs,
            )
            self._run = self._eager
            return self._run(block, *args, **kwargs)

    def _build(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return lookup_backend(BACKEND)(graph, inputs)


def _plain(value: Any) -> Any:
    """Tensors as graphs are made for: strides that follow from their shape, no view of a larger one, sizes dynamic."""
    if isinstance(value, tuple):
        return tuple(_plain(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    rows = value.contiguous().view(-1).view(value.shape).data if value.numel() else value.new_empty(value.shape)
    for dim, size in enumerate(rows.shape):
        if size > 1:
            maybe_mark_dynamic(rows, dim)
    return rows


class CompiledBlock:
    """Stands in for the ``forward`` of an owned block.

    Args:
        place: The block, hooked.
        kind: Its kind.
        order: The tensor that stands for what the hooks change.
    """

    def __init__(self, place: BlockPlace, kind: Kind, order: Tensor) -> None:
        self.block, self.kind, self.order = place.block, kind, order
        self._attended: dict[str, Attended] = {}
        self._hooked: dict[str, Callable[..., Any]] = {}
        self._calls: Counter[str] = Counter()
        self._modules = _hooked_modules(place.block)

    def attach(self) -> None:
        """Puts what is to be traced in the place of the hooks, and this in the place of the block's forward."""
        for path, module in self._modules.items():
            hook = module.__dict__["forward"]
            if isinstance(hook, Attended):
                self._attended[path] = hook
                forward = _traced_attention(hook, path, self.order)
            else:
                self._hooked[path] = hook
                forward = _traced_module(path, _width(module), self.order)
            module.__dict__["forward"] = forward
        self.block.__dict__["forward"] = self

    def detach(self) -> None:
        """Puts the hooks back."""
        del self.block.__dict__["forward"]
        for path, hook in (self._attended | self._hooked).items():
            self._modules[path].__dict__["forward"] = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's streams.

        Raises:
            RuntimeError: A layer's attention was not seen exactly once.
        """
        self._calls.clear()
        token = _at_work.set(self)
        try:
            result = self.kind(self.block, *_plain(args), **{name: _plain(value) for name, value in kwargs.items()})
        finally:
            _at_work.reset(token)
        for path, attended in self._attended.items():
            attended.check(self._calls[path])
        return result

    def attend(self, path: str, rows: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, *options: Any) -> Tensor:
        """What the attention operator does."""
        self._calls[path] += 1
        return self._attended[path].attend(rows, mask, *options)

    def run_hooked(self, path: str, rows: Tensor, width: int) -> Tensor:
        """What the operator of hooked modules does."""
        result = self._hooked[path](rows)
        expected = (*rows.shape[:-1], width)
        if tuple(result.shape) != expected or result.dtype != rows.dtype:
            raise RuntimeError(
                f"{path} gave {tuple(result.shape)} in {result.dtype} where {expected} in {rows.dtype} was expected, "
                f"so that the blocks cannot be compiled: use compile=False"
            )
        return result


def compile_blocks(
    places: list[BlockPlace], kinds: dict[Any, Kind] | None = None
) -> tuple[Mapping[str, int], Callable[[], None]]:
    """Compiles hooked blocks, as they are needed.

    Args:
        places: The blocks a stage owns.
        kinds: Kinds of an earlier time, whose graphs serve again; new ones are added.

    Returns:
        A live count of the graphs of each kind, and a function that undoes it all.

    Raises:
        ValueError: A block was changed in a way that would be lost.
    """
    for place in places:
        _check(place)
    kinds = {} if kinds is None else kinds
    device = next(places[0].block.parameters()).device
    order = torch.zeros(1, device=device)
    blocks = []
    for place in places:
        structure = _structure(place)
        if structure not in kinds:
            same_class = sum(kind.name.startswith(type(place.block).__name__) for kind in kinds.values())
            kinds[structure] = Kind(
                place.block, type(place.block).__name__ + (f"_{same_class + 1}" if same_class else "")
            )
        blocks.append(CompiledBlock(place, kinds[structure], order))
    for block in blocks:
        block.attach()

    def undo() -> None:
        for block in blocks:
            block.detach()

    return GraphCounts(list(kinds.values())), undo


class GraphCounts(Mapping[str, int]):
    """Graphs compiled so far, by the name of the kind."""

    def __init__(self, kinds: list[Kind]) -> None:
        self._kinds = {kind.name: kind for kind in kinds}

    def __getitem__(self, name: str) -> int:
        return self._kinds[name].graphs

    def __iter__(self) -> Any:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __repr__(self) -> str:
        return repr(dict(self))


def _check(place: BlockPlace) -> None:
    if "forward" in place.block.__dict__:
        raise ValueError(
            f"the forward of {place.name} has been replaced, by an offloading hook for example, which compiling would "
            f"undo: use compile=False, or take the hook off"
        )
    for path, module in _hooked_modules(place.block).items():
        if not isinstance(module.__dict__["forward"], Attended) and _width(module) is None:
            raise ValueError(
                f"{place.name}.{path} is a {type(module).__name__}, whose result compiled blocks cannot share between "
                f"patches: use compile=False"
            )


def _hooked_modules(block: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in block.named_modules() if path and "forward" in module.__dict__}


def _width(module: nn.Module) -> Any:
    """Channels of a Linear's result, or of a chain that ends in one; ``None`` for anything else."""
    last = list(module.children())[-1:] if isinstance(module, nn.Sequential) else [module]
    return getattr(last[0], "out_features", None) if last else None


def _structure(place: BlockPlace) -> tuple[Any, ...]:
    """What two blocks must have in common to share graphs."""
    modules = tuple((path, type(module)) for path, module in place.block.named_modules())
    shapes = tuple((name, each.shape, each.dtype) for name, each in place.block.named_parameters())
    return place.listing.path, modules, shapes
