"""A scenario from a file: what is asked for, and what its steps cost on the machine at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchpipe.scheduling.costs import TableCosts
from patchpipe.scheduling.simulator.arrivals import Ask
from patchpipe.scheduling.state import Shape

_WHOLE: Mapping[str, float] = {"pause": 0.001, "resume": 0.001, "change": 0.05}


def read_scenario(path: Path) -> tuple[TableCosts, list[Ask]]:
    """Costs and requests from a JSON file.

    ``{"pause": 0.001, "resume": 0.001, "change": 0.05, "requests": [{"model": "flux", "width": 1024, "height": 1024,
    "frames": 1, "steps": 28, "share": 1, "weight": 1, "starts": 0.1, "ends": 0.4, "seconds": {"1": {"1": 0.35, "2":
    0.19}, "4": {"1": 1.3}}}]}``: ``seconds`` are those of a step by batch and then by degree, ``starts`` those before
    the steps and ``ends`` those after. What may be left out: the first three, ``frames``, ``share``, ``weight``,
    ``starts`` and ``ends``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file; the message says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no scenario {path}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        asked = told["requests"]
        found = [_read(one) for one in asked]
        pause, resume, change = (float(told.get(name, usual)) for name, usual in _WHOLE.items())
        steps = {key: seconds for _, table, _ in found for key, seconds in table.items()}
        decode = {ask.shape: ends for ask, _, ends in found}
        encode = {ask.shape: float(one.get("starts", 0)) for (ask, _, _), one in zip(found, asked, strict=True)}
        costs = TableCosts(steps, pause, resume, change, decode, encode)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no scenario: {error}") from None
    return costs, [ask for ask, _, _ in found]


def _read(told: dict[str, Any]) -> tuple[Ask, dict[tuple[Shape, int, int], float], float]:
    shape = Shape(str(told["model"]), int(told["width"]), int(told["height"]), int(told.get("frames", 1)))
    table = {
        (shape, int(batch), int(degree)): float(seconds)
        for batch, row in told["seconds"].items()
        for degree, seconds in row.items()
    }
    ask = Ask(shape, int(told["steps"]), float(told.get("share", 1)), float(told.get("weight", 1)))
    return ask, table, float(told.get("ends", 0))
