"""What the tests ran, by transformer class: ``matrix.json``, which ``python -m tools.matrix --write`` writes.

What no test ran with a class is refused. A class that is not in the matrix, such as one whose plan a user tries, is not
refused: nothing is known of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

COLUMNS: Mapping[str, str] = {
    "synchronous": "every step synchronous, bit-equal to plain diffusers",
    "pipefusion": "patches stream through stages",
    "ulysses": "ranks share a patch by heads",
    "ring": "ranks share a patch by rows",
    "tensor": "ranks share matrices",
    "cfg": "a branch of guidance on ranks of its own",
    "data": "pictures on ranks of their own",
    "distrifusion": "ranks see each other's rows one step late",
    "forecast": "stale rows are continued",
    "streamed": "a warm-up that streams",
    "text_patches": "text spread over patches",
    "references": "pictures that follow the painted one in the latent",
    "compile": "compiled blocks",
    "offload": "weights that come and go",
    "lora": "LoRA",
    "quantised": "quantised weights",
    "together": "requests in flight together",
}


@cache
def matrix() -> Mapping[str, Any]:
    """The matrix: ``classes``, and under ``cells`` of each, by column, ``tested`` or ``refused``."""
    found: Mapping[str, Any] = json.loads(files("patchpipe.models").joinpath("matrix.json").read_text("utf-8"))
    return found


def untested(model: str, column: str) -> bool:
    """Whether it is known that no test runs a column with a class."""
    known = matrix()["classes"].get(model)
    return known is not None and "tested" not in known["cells"].get(column, {})


def check_tested(model: str, column: str, what: str, instead: str) -> None:
    """Refuses what no test runs with a class.

    Args:
        model: The transformer class.
        column: Of the matrix.
        what: What was asked for.
        instead: What to do.

    Raises:
        ValueError: No test runs it.
    """
    if untested(model, column):
        raise ValueError(f"{what} has not been tested with {model} and so is refused: {instead}")


def forecast_of(model: str, asked: bool | None) -> bool:
    """Whether stale rows of a class are forecast: as asked, and if nothing is, where a test has run it."""
    return not untested(model, "forecast") if asked is None else asked
