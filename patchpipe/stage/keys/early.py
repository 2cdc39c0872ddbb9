"""Values that set out as soon as they are projected, before queries and keys are begun (CoCoDiff, arXiv 2604.14561).

Values need neither a norm nor a rotation, so nothing is left to be done to them. In a layer's ``forward`` they are
projected last, though. So when the layer asks for its queries, its values are projected first, from the same rows, and
kept until the layer asks for them too. Whether it asks for both with the same rows is seen the first time it runs.

Nothing keeps a processor from changing values later. So a copy is sent, and what the layer then attends with must be
the same to the bit, each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from patchpipe.models.latent import IMAGE, REFERENCE
from patchpipe.models.plan import ModelPlan

OWN = (("to_q", "to_v"), ("to_query", "to_value"))  # what diffusers calls the projections of a layer's own rows
OTHER = (("add_q_proj", "add_v_proj"), ("to_q_t", "to_v_t"))  # and of those that a second stream brings: text
PICTURE = (IMAGE, REFERENCE, "pad")  # the segments of the first stream, where there are two


@dataclass(frozen=True)
class Part:
    """A projection that makes values of some of a layer's segments.

    Attributes:
        query: Its name among the layer's modules, of queries.
        value: The same, of values.
        segments: Whose rows it is given, in the layer's order.
    """

    query: str
    value: str
    segments: tuple[str, ...]


class Ahead(Protocol):
    """Values of a layer that go ahead of its queries and keys."""

    def put(self, index: int, projected: Tensor) -> None:
        """Sends what a projection made, ``[batch, rows, heads · channels]``.

        Args:
            index: Which of the layer's parts.
            projected: Its result.
        """
        ...

    def take(self, value: Tensor) -> Tensor:
        """All rows of own heads, ``[batch, own heads, rows, channels]``.

        Args:
            value: What the layer attends with, ``[batch, heads, own rows, channels]``: must be what was sent.
        """
        ...


def parts_of(layer: nn.Module, segments: Sequence[str]) -> tuple[Part, ...]:
    """The projections that make a layer's values, in the order of its rows.

    None where they are not known, are one with others, or make fewer heads than queries have: values are then repeated.
    """
    names, others = _pair(layer, OWN), _pair(layer, OTHER)
    if names is None or getattr(layer, "fused_projections", False):
        return ()
    if _outputs(layer, names[0]) != _outputs(layer, names[1]):
        return ()
    if others is None or len(segments) == 1:
        return (Part(*names, tuple(segments)),)
    found: list[Part] = []
    for segment in segments:
        own = names if segment in PICTURE else others
        if found and found[-1].value == own[1]:
            found[-1] = Part(*own, (*found[-1].segments, segment))
        else:
            found.append(Part(*own, (segment,)))
    return tuple(found) if len({part.value for part in found}) == len(found) else ()


def _pair(layer: nn.Module, known: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Those of the known names that the layer has modules for."""
    return next(
        (pair for pair in known if all(isinstance(getattr(layer, name, None), nn.Module) for name in pair)), None
    )


def _outputs(layer: nn.Module, name: str) -> int | None:
    return getattr(getattr(layer, name), "out_features", None)


def check_values(model: nn.Module, plan: ModelPlan) -> None:
    """Refuses to send the values of a model first none of whose layers can.

    Raises:
        ValueError: It is one.
    """
    for place in plan.blocks_of(model):
        layers = {} if place.listing.drops_masked else place.self_attention
        if any(parts_of(place.block.get_submodule(path), segments) for path, segments in layers.items()):
            return
    raise ValueError(
        f"values_first=True is not supported for {plan.model}: its layers project values together with others, or "
        f"change them before they attend. Leave it out"
    )


class Early:
    """The hooks on a layer's projections.

    Args:
        layer: The attention module.
        parts: Its projections.
    """

    def __init__(self, layer: nn.Module, parts: tuple[Part, ...]) -> None:
        self.layer, self.parts = layer, parts
        self._ahead: Ahead | None = None
        self._asked: dict[int, Tensor] = {}  # what queries were made of
        self._made: dict[int, tuple[Tensor, int, Tensor]] = {}  # values that the layer has not asked for yet
        self._compute: dict[int, Callable[..., Tensor]] = {}  # values, without the module's own hooks: they run later
        self._same: dict[int, bool] = {}  # whether a part makes values of what it makes queries of

    @property
    def heads(self) -> int:
        """Heads of the layer, on this rank."""
        layer: Any = self.layer
        return int(layer.heads if hasattr(layer, "heads") else layer.num_heads)

    def hook(self, override: Callable[[nn.Module, Callable[..., Any]], Callable[[], None]]) -> list[Callable[[], None]]:
        """Puts the hooks on; returns what takes them off again.

        Args:
            override: Puts a function in the place of a module's ``forward``, and returns what undoes it.
        """
        undo = []
        for index, part in enumerate(self.parts):
            queries, values = getattr(self.layer, part.query), getattr(self.layer, part.value)
            self._compute[index] = values.forward
            undo.append(override(queries, partial(self._query, index, queries.forward)))
            undo.append(override(values, partial(self._value, index)))
        return undo

    @contextmanager
    def sending(self, ahead: Ahead) -> Iterator[None]:
        """While it lasts, the layer's values are given to ``ahead``."""
        self._ahead = ahead
        try:
            yield
        finally:
            self._ahead = None
            self._asked.clear()
            self._made.clear()

    def _query(self, index: int, compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        rows = args[0] if args else None
        if self._ahead is not None and isinstance(rows, Tensor) and not rows.is_inference():
            self._asked[index] = rows
            if self._same.get(index):
                self._made[index] = (rows, rows._version, self._project(index, rows))
        return compute(*args, **kwargs)

    def _value(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        if self._ahead is None:
            return self._compute[index](*args, **kwargs)
        made = self._made.pop(index, None)
        if made is not None:
            rows, version, values = made
            if args[0] is not rows or rows._version != version:
                raise RuntimeError(
                    f"{type(self.layer).__name__} made its values of other rows than its queries, which it has not "
                    f"done before: leave values_first out"
                )
            return values
        self._same.setdefault(index, args[0] is self._asked.get(index))
        return self._project(index, *args, **kwargs)

    def _project(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        assert self._ahead is not None
        values = self._compute[index](*args, **kwargs)
        self._ahead.put(index, values)
        return values
