"""The bundled model: a small FLUX-shaped text-to-image transformer that paints emoji in a second or two.

``MODEL_DIR`` is an ordinary diffusers folder (``FluxPipeline``). Its ``README.md`` is the card: how it was
trained, on whose art, and what it can and cannot paint. ``call.json`` beside the weights holds the settings
it paints best with, read by :func:`call_defaults`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
CALL_FILE = "call.json"


def call_defaults(model: str | Path = MODEL_DIR) -> dict[str, Any]:
    """Return the call settings kept beside a model's weights.

    Args:
        model: A model folder, or a hub id (which is no local folder and so has none).

    Returns:
        Keyword arguments for the pipeline's call; empty where the folder has no ``call.json``.

    Raises:
        ValueError: The file is not a JSON object.
    """
    path = Path(model) / CALL_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object of call settings, not a {type(settings).__name__}")
    return settings


def _lines(name: str) -> list[str]:
    return (MODEL_DIR / name).read_text(encoding="utf-8").split("\n")[:-1]


def concepts() -> list[str]:
    """Return the names the bundled model was trained on, such as ``"red apple"``."""
    return _lines("concepts.txt")


def held_out() -> list[str]:
    """Return the captions (concept and style) that were kept out of its training."""
    return _lines("heldout.txt")
