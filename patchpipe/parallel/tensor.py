"""Tensor parallelism: the ranks of a line share every matrix of a block (Megatron-LM, arXiv 1909.08053, section 3).

Matrices come in pairs. The first is split by columns, so that each rank computes some of the attention heads or of the
hidden channels; the second by rows, so that each rank's result is one summand of the whole, and a sum over the
ranks (all-reduce) ends the pair. Norms, modulation and embedders are whole on every rank. Which Linear is which is
data: diffusers' ``_tp_plan`` where a class has one, else the plan's own in the same format.

Why not ``torch.distributed.tensor.parallel``, tried with torch 2.13: a ``DeviceMesh``, ``from_group`` included, asks
for the process-wide default group and ranks counted in it, while a pipeline's groups are its own, so that two
pipelines, or a user's own ``init_process_group``, do not meet. Its collectives go around the transport: no deadline
that names the rank that failed, no count of what was sent. And each pair of Linears costs 0.3–0.4 ms more on the
host (a DTensor's dispatch: at best 460 against 170 µs at width 32, 990 against 620 µs at width 256, two gloo ranks),
which a streaming pipeline pays for every patch. What is left of the method without it is a slice and a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.tensor_parallel import PackedRowwiseParallel
from torch import Tensor, nn
from torch.nn import functional

from patchpipe.distributed.exchange import Exchange
from patchpipe.models import usual
from patchpipe.models.blocks import BlockPlace, part_of
from patchpipe.models.lora import check_adapters, lora_parts
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.refusals import check_divisible, heads_of, no_tensor_plan

OUTPUTS, INPUTS = 0, 1  # dims of a Linear's weight


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that one rank holds.

    Attributes:
        dim: The dim that is split.
        ranges: This rank's ranges of it, put together in this order.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def of(self, tensor: Any) -> Tensor:
        """Takes the part out of a tensor, or out of a safetensors slice that has not been read yet."""
        before = (slice(None),) * self.dim
        parts = [tensor[(*before, slice(start, stop))] for start, stop in self.ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)).contiguous()


@dataclass(frozen=True)
class SplitLinear:
    """One Linear whose matrix is split.

    Attributes:
        name: Its name in the model.
        linear: The module.
        dim: ``OUTPUTS`` where it is split by columns, ``INPUTS`` by rows.
        blocks: Sizes of the pieces of that dim that are split one by one: a Linear may take several split tensors
            side by side.
    """

    name: str
    linear: nn.Linear
    dim: int
    blocks: tuple[int, ...]

    @property
    def size(self) -> int:
        """Of that dim while the matrix is whole."""
        return sum(self.blocks)

    def slices(self, index: int, degree: int) -> dict[str, Slice]:
        """The slices of its parameters that a rank holds, by ``"weight"`` and ``"bias"``.

        A bias added after the sum is whole everywhere.
        """
        ranges, start = [], 0
        for block in self.blocks:
            size = block // degree
            ranges.append((start + index * size, start + (index + 1) * size))
            start += block
        found = {"weight": Slice(self.dim, tuple(ranges))}
        if self.dim == OUTPUTS and self.linear.bias is not None:
            found["bias"] = Slice(0, tuple(ranges))
        return found


class TensorPart:
    """One rank's part of the matrices of the blocks it owns.

    Made while the model is whole, be it on ``meta``; what it finds there is what ``detach`` puts back.

    Args:
        model: The transformer.
        plan: Its plan.
        owned: Range of the blocks in running order that this rank's stage owns.
        index: This rank's place in the line.
        degree: Ranks in the line.

    Attributes:
        slices: The part of each split tensor to load, by name.
        loaded: Whether only those parts were loaded, so that this rank has no whole matrix.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, owned: range, index: int, degree: int) -> None:
        places = plan.blocks_of(model)
        self.model, self.plan, self.index, self.degree = model, plan, index, degree
        self._places = [places[at] for at in owned]
        self.slices: dict[str, Slice] = {}
        self._found: list[tuple[nn.Linear, str, nn.Parameter]] = []
        for split in self._linears():
            for leaf, part in split.slices(index, degree).items():
                self.slices[f"{split.name}.{leaf}"] = part
                self._found.append((split.linear, leaf, split.linear.get_parameter(leaf)))
        self._kept: dict[tuple[nn.Linear, str], nn.Parameter] = {}  # slices that were put away by ``release``
        self._undo: list[Callable[[], None]] = []

    @property
    def loaded(self) -> bool:
        """Whether this rank has nothing but its slices: what it found at first was on ``meta``."""
        return any(whole.is_meta for _, _, whole in self._found)

    def attach(self, exchange: Exchange) -> None:
        """Takes this rank's slices, unless they were loaded as such, and sums where a pair of Linears ends."""
        for split in self._linears():
            for leaf, part in split.slices(self.index, self.degree).items():
                self._narrow(split, leaf, part)
            if split.dim == INPUTS:
                self._set(split.linear, "forward", _summed(split.linear, exchange))
        for place in self._places:
            for layer in _attention_layers(place):
                for name in ("heads", "inner_dim"):  # processors work out a head's channels from either
                    if hasattr(layer, name):
                        self._set(layer, name, getattr(layer, name) // self.degree)

    def release(self) -> None:
        """Lets layers be added to the matrices, until ``attach``: each has its whole shape again.

        One that was loaded as a slice has the shape alone, in a tensor that takes no memory.
        """
        while self._undo:
            self._undo.pop()()

    def detach(self) -> None:
        """Puts the whole matrices back; of a model loaded in slices those are empty, so that it cannot run."""
        self.release()
        for linear, leaf, whole in self._found:
            if whole.is_meta:
                linear._parameters[leaf] = whole

    def _linears(self) -> list[SplitLinear]:
        return [found for place in self._places for found in split_linears(self.model, self.plan, place)]

    def _narrow(self, split: SplitLinear, leaf: str, part: Slice) -> None:
        linear, held = split.linear, split.linear.get_parameter(leaf)
        kept = self._kept.pop((linear, leaf), None)
        if kept is None and held.shape[part.dim] != split.size:
            kept = held  # it was loaded as a slice
        if kept is not None:
            linear._parameters[leaf] = kept
            self._undo.append(lambda: self._keep(split, leaf, part.dim))
            return
        linear._parameters[leaf] = nn.Parameter(part.of(held.detach()), requires_grad=held.requires_grad)
        self._undo.append(lambda: linear._parameters.__setitem__(leaf, held))

    def _keep(self, split: SplitLinear, leaf: str, dim: int) -> None:
        """Puts a slice away, and in its place a tensor that has no more than the shape of the whole."""
        held = split.linear.get_parameter(leaf)
        shape = [split.size if at == dim else size for at, size in enumerate(held.shape)]
        self._kept[split.linear, leaf] = held
        split.linear._parameters[leaf] = nn.Parameter(held.new_zeros(()).expand(shape), requires_grad=False)

    def _set(self, owner: nn.Module, name: str, value: Any) -> None:
        had, previous = name in owner.__dict__, owner.__dict__.get(name)
        object.__setattr__(owner, name, value)
        self._undo.append(lambda: object.__setattr__(owner, name, previous) if had else object.__delattr__(owner, name))


def tensor_part(model: nn.Module, plan: ModelPlan, owned: range, index: int, degree: int) -> TensorPart | None:
    """This rank's part of the matrices; ``None`` where they are not split."""
    return TensorPart(model, plan, owned, index, degree) if degree > 1 else None


def check_tensor(model: nn.Module, plan: ModelPlan, degree: int) -> None:
    """Refuses a degree the model cannot be split by, before any rank waits for another.

    Raises:
        ValueError: The plan does not cover tensor parallelism, a size does not divide, or the model was changed in
            a way that the split would not reach.
    """
    if degree == 1:
        return
    if tensor_plan(model, plan) is None:
        raise no_tensor_plan(plan, degree)
    sizes: dict[int, str] = {}
    for place in plan.blocks_of(model):
        for layer in _attention_layers(place):
            _check_layer(layer, plan)
            sizes.setdefault(layer.heads, heads_of(plan, layer.heads))
        for split in split_linears(model, plan, place):
            for block in split.blocks:
                sizes.setdefault(block, f"the {block} channels of {split.name}")
    check_divisible(degree, sizes)


def tensor_plan(model: nn.Module, plan: ModelPlan) -> Mapping[str, Any] | None:
    """How the Linears of a class split, by globs as in diffusers' ``_tp_plan``."""
    if plan.tensor == "usual":
        return {f"{each.path}.*.{name}": style for each in plan.blocks for name, style in usual.TENSOR.items()}
    return getattr(type(model), "_tp_plan", None) if plan.tensor == "class" else plan.tensor


def split_linears(model: nn.Module, plan: ModelPlan, place: BlockPlace) -> list[SplitLinear]:
    """The Linears of one block that are split; what a block lacks, such as a last block's text side, is passed over.

    Raises:
        ValueError: A module to split is not a plain Linear, with or without LoRA beside it.
    """
    found = []
    for pattern, style in (tensor_plan(model, plan) or {}).items():
        listing, _, path = pattern.partition(".*.")
        linear = part_of(place.block, path) if listing == place.listing.path else None
        if linear is None:
            continue
        found += _with_adapters(f"{place.name}.{path}", linear, style)
    return found


def _with_adapters(name: str, module: nn.Module, style: Any) -> list[SplitLinear]:
    """A Linear and the LoRA layers beside it.

    The change that LoRA makes to a matrix ``W`` is a product ``B·A``. Where the outputs of ``W`` are split so are
    those of ``B``. Where its inputs are split so are those of ``A``, whose results are then summed over the ranks
    like those of ``W``.
    """
    check_adapters(name, module)
    parts = lora_parts(module)
    linear = module if parts is None else parts.base
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"{name} is a {type(linear).__name__}, not a plain Linear: load the model without quantization, or use "
            f"tensor=1"
        )
    if parts is None:
        return [_split_linear(name, linear, style)]
    base = _split_linear(f"{name}.base_layer", linear, style)
    beside = parts.outputs if base.dim == OUTPUTS else parts.inputs
    return [base, *(SplitLinear(f"{name}.{path}", each, base.dim, base.blocks) for path, each in beside.items())]


def all_reduce(exchange: Exchange, tensor: Tensor) -> Tensor:
    """The sum of the line's tensors, the same bits on every rank; overwrites ``tensor`` or leaves it.

    ``sent_bytes`` counts what a ring sends, ``2·(T-1)/T`` of the tensor from each rank (Patarasuk & Yuan, 2009): that
    is what gloo does, and the least any algorithm can do.
    """
    if tensor.numel() == 0:  # patches after the first carry no text rows, on any rank
        return tensor
    wire = exchange.wire
    staged = tensor.to(wire.place).contiguous()
    exchange.wait(wire.start(lambda: wire.group.allreduce([staged]), exchange.whom))
    size = reduced_bytes(staged.nbytes, exchange.size)
    exchange.sent_bytes += size
    wire.sent(size, f"the ranks {exchange.ranks}")
    return staged.to(wire.device)


def reduced_bytes(size: int, degree: int) -> int:
    """Bytes each rank sends to sum a tensor of ``size`` bytes."""
    return 2 * (degree - 1) * size // degree


def _summed(linear: nn.Linear, exchange: Exchange) -> Callable[[Tensor], Tensor]:
    """A Linear split by rows: the bias joins after the sum, lest it count once per rank."""

    def forward(rows: Tensor) -> Tensor:
        total = all_reduce(exchange, functional.linear(rows, linear.weight))
        return total if linear.bias is None else total + linear.bias

    return forward


def _split_linear(name: str, linear: nn.Linear, style: Any) -> SplitLinear:
    if style == "colwise":
        return SplitLinear(name, linear, OUTPUTS, (linear.out_features,))
    if style == "rowwise":
        return SplitLinear(name, linear, INPUTS, (linear.in_features,))
    if isinstance(style, PackedRowwiseParallel):
        return SplitLinear(name, linear, INPUTS, _packed(linear, style))
    raise ValueError(f"{name} is to be split as {style!r}, which is not covered: use tensor=1")


def _packed(linear: nn.Linear, style: PackedRowwiseParallel) -> tuple[int, ...]:
    """Sizes of the pieces of a packed input; diffusers gives them as proportions or on the module."""
    blocks: Any = style.blocks or linear._tp_packed_row_blocks
    unit = linear.in_features // sum(blocks)
    return tuple(block * unit for block in blocks)


def _attention_layers(place: BlockPlace) -> list[Any]:
    found = (part_of(place.block, path) for path in place.listing.attention)
    return [layer for layer in found if layer is not None]


def _check_layer(layer: Any, plan: ModelPlan) -> None:
    """What would run, and wrongly: fused projections that no glob names, and norms over all heads at once."""
    if getattr(layer, "fused_projections", False):
        raise ValueError(f"the projections of {plan.model} are fused: call unfuse_qkv_projections() or use tensor=1")
    channels = layer.to_q.out_features // layer.heads
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(layer, name, None)
        if norm is None:
            continue
        over: Any = getattr(norm, "dim", None) or getattr(norm, "normalized_shape", (channels,))
        if tuple(over) != (channels,):
            raise ValueError(f"{plan.model} normalises {name} over all heads at once, which no rank has: use tensor=1")
