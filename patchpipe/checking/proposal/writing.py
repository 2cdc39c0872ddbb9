"""A plan as Python to paste."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from patchpipe.models.blocks import BlockList, Holds
from patchpipe.models.latent import Latent, sizes_by_numbers
from patchpipe.models.plan import ModelPlan


def written(plan: ModelPlan) -> str:
    """A plan as it would stand in ``patchpipe/models/families``, with what is as usual left out."""
    name = re.sub(r"(Transformer\w*|(?<=DiT)\dDModel)$", "", plan.model)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()
    return f"{name} = {_object(plan, 0)}\n"


def _object(value: Any, depth: int) -> str:
    given = {each.name: _given(value, each.name) for each in dataclasses.fields(value)}
    lines = [
        f"{'    ' * (depth + 1)}{each.name}={_text(given[each.name], depth + 1)},"
        for each in dataclasses.fields(value)
        if given[each.name] != _default(each)
    ]
    return f"{type(value).__name__}(\n" + "\n".join(lines) + f"\n{'    ' * depth})"


def _given(value: Any, name: str) -> Any:
    """What a plan says in a field; of rows without those that are as usual."""
    said = getattr(value, name)
    if not isinstance(value, BlockList) or name != "rows":
        return said
    usual = BlockList(value.attention, streams=value.streams).rows
    return {argument: held for argument, held in said.items() if usual.get(argument) != held}


def _default(each: dataclasses.Field[Any]) -> Any:
    made = each.default_factory
    return each.default if made is dataclasses.MISSING else made()


def _text(value: Any, depth: int) -> str:
    if isinstance(value, Latent):
        return _latent(value)
    if isinstance(value, Holds):
        return _holds(value)
    if isinstance(value, BlockList):
        return _object(value, depth)
    pad = "    " * (depth + 1)
    if isinstance(value, tuple) and value and isinstance(value[0], BlockList):
        return "(\n" + "".join(f"{pad}{_object(each, depth + 1)},\n" for each in value) + f"{'    ' * depth})"
    if isinstance(value, tuple):
        inner = ", ".join(_text(each, depth) for each in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {_text(each, depth)}' for key, each in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _holds(held: Holds) -> str:
    more = "" if held.dim == 1 else f", dim={held.dim}"
    return f"of({', '.join(f'{chr(34)}{name}{chr(34)}' for name in held.segments)}{more})"


def _latent(latent: Latent) -> str:
    parts = [f'"{latent.axes}"']
    if latent.cut != "h":
        parts.append(f'cut="{latent.cut}"')
    if latent.sizes is not None:
        parts.append(f"sizes={_sizes(latent.sizes)}")
    if latent.name != "hidden_states":
        parts.append(f'name="{latent.name}"')
    parts += [f"{name}=True" for name in ("listed", "references") if getattr(latent, name)]
    return f"Latent({', '.join(parts)})"


def _sizes(sizes: Any) -> str:
    """The call that made it."""
    if sizes is sizes_by_numbers:
        return "sizes_by_numbers"
    held = dict(zip(sizes.__code__.co_freevars, (cell.cell_contents for cell in sizes.__closure__ or ()), strict=True))
    if "shapes" in held:
        return f'sizes_by_shapes("{held["shapes"]}")'
    of_text = ", of_text=True" if held["of_text"] else ""
    return f'sizes_by_ids("{held["ids"]}", column={held["column"]}{of_text})'
