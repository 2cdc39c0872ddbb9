"""A scenario from a file: what is asked for, and what its steps cost on the machine at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchpipe.scheduling.costs import TableCosts
from patchpipe.scheduling.simulator.arrivals import Ask
from patchpipe.scheduling.state import Shape

_WHOLE = "pause", "resume", "change"


def read_scenario(path: Path) -> tuple[TableCosts, list[Ask]]:
    """Costs and requests from a JSON file.

    ``{"pause": 0.001, "resume": 0.001, "change": 0.05, "requests": [{"model": "flux", "width": 1024, "height": 1024,
    "frames": 1, "steps": 28, "share": 1, "weight": 1, "ends": 0.4, "seconds": {"1": {"1": 0.35, "2": 0.19},
    "4": {"1": 1.3}}}]}``: ``seconds`` are those of a step by batch and then by degree, ``ends`` those beside the steps.
    What may be left out: the first three, ``frames``, ``share``, ``weight`` and ``ends``.

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
        whole = {name: float(told[name]) for name in _WHOLE if name in told}
        steps = {key: seconds for _, table, _ in found for key, seconds in table.items()}
        costs = TableCosts(steps, decode={ask.shape: ends for ask, _, ends in found}, **whole)
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
