"""A text encoder as its list of layers and what surrounds them, whatever its class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from patchpipe.layout.split import balanced


@dataclass(frozen=True)
class Layers:
    """An encoder, taken apart into modules that are called one after the other.

    Attributes:
        layers: Names of the modules of its largest list, in running order.
        around: Names of the largest other modules that have weights: embeddings, norms, towers for pictures.
        costs: Parameters of each layer.
        surrounding: Parameters of what surrounds them.
    """

    layers: tuple[str, ...]
    around: tuple[str, ...]
    costs: tuple[int, ...]
    surrounding: int

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Finds them.

        Raises:
            ValueError: The encoder has no list of layers.
        """
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        path, listing = max(lists, key=lambda one: parameters(one[1]), default=("", nn.ModuleList()))
        if not len(listing):
            raise ValueError(
                f"{type(model).__name__} has no list of layers, by which to spread or stream it: give text_rank a rank"
            )
        layers = [f"{path}.{index}" for index in range(len(listing))]
        costs = tuple(parameters(layer) for layer in listing)
        return cls(tuple(layers), tuple(_around(model, path)), costs, parameters(model) - sum(costs))

    @property
    def names(self) -> tuple[str, ...]:
        """All modules."""
        return (*self.around, *self.layers)

    def parts(self, ranks: int) -> list[range]:
        """The layers of each rank that holds some, as even as can be; the first one has what surrounds them too."""
        count = min(ranks, len(self.layers))
        costs = [float(cost) for cost in self.costs]
        costs[0] += self.surrounding
        found, start = [], 0
        for size in balanced(costs, count):
            found.append(range(start, start + size))
            start += size
        return found

    def homes(self, order: list[int]) -> dict[str, int]:
        """The rank that holds each module, of ranks in the order in which they take layers."""
        homes = dict.fromkeys(self.around, order[0])
        for rank, part in zip(order, self.parts(len(order)), strict=False):
            homes.update((self.layers[index], rank) for index in part)
        return homes

    def held(self, order: list[int]) -> dict[int, int]:
        """Parameters of each rank that holds some; the few that belong to none of the modules count for the first."""
        parts = self.parts(len(order))
        found = {rank: sum(self.costs[index] for index in part) for rank, part in zip(order, parts, strict=False)}
        found[order[0]] += self.surrounding
        return found


def parameters(module: nn.Module) -> int:
    """Its number of parameters, those that are tied counted once."""
    return sum(one.numel() for one in module.parameters())


def _around(model: nn.Module, path: str, prefix: str = "") -> Iterable[str]:
    """Modules with weights that neither are the list nor hold it, as large as they can be."""
    return [name for name, module in _beside(model, path, prefix) if any(True for _ in module.parameters())]


def _beside(model: nn.Module, path: str, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        full = f"{prefix}{name}"
        if path.startswith(f"{full}."):
            yield from _beside(child, path, f"{full}.")
        elif full != path:
            yield full, child
