"""LoRA through the engine: what a user names, checked by the parent, and what a worker does with it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from patchpipe.engine.messages import LoadLora, UnloadLora

WEIGHTS = ("*.safetensors", "*.bin")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def describe_lora(
    path: str | os.PathLike[str],
    weight_name: str | None,
    name: str | None,
    scale: float,
    loaded: Mapping[str, float],
) -> LoadLora:
    """The message that loads a LoRA, whose request is not numbered yet.

    Args:
        path: A file, a folder or a hub id.
        weight_name: The file's name in a folder or on the hub.
        name: What it is to be called; ``None`` takes the file's name.
        scale: Its strength.
        loaded: The strengths of those that are loaded already, by name.

    Raises:
        FileNotFoundError: There is no such file or folder, or no weights in it.
        ValueError: The name is taken or cannot be one, or the strength is no number.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a number: 1 is the strength the LoRA was trained with")
    place = find_lora(path, weight_name)
    if name is None:
        name = _free_name(re.sub(r"\W+", "_", Path(weight_name or place).stem).strip("_") or "lora", loaded)
    elif not name or "." in name:
        raise ValueError(f"name={name!r} cannot name a LoRA: use letters, digits and underscores")
    elif name in loaded:
        raise ValueError(f"a LoRA {name!r} is loaded already: unload_lora({name!r}) first, or give another name")
    return LoadLora(0, place, weight_name, name, {**loaded, name: float(scale)})


def find_lora(path: str | os.PathLike[str], weight_name: str | None = None) -> str:
    """Where a LoRA is, as workers should open it.

    Raises:
        FileNotFoundError: There is no such file or folder, or no weights in it.
    """
    found = Path(path).expanduser()
    if found.is_file():
        return str(found.resolve())
    if found.is_dir():
        files = sorted(file.name for pattern in WEIGHTS for file in found.glob(pattern))
        if not files or (weight_name is not None and not (found / weight_name).is_file()):
            what = "weights (.safetensors)" if weight_name is None else weight_name
            raise FileNotFoundError(f"{path} holds no {what}" + (f"; it has {', '.join(files[:4])}" if files else ""))
        return str(found.resolve())
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"there is no LoRA {path}: name a file, a folder or a hub id such as 'owner/name'")
    return str(path)


def change_loras(pipe: Any, message: LoadLora | UnloadLora) -> None:
    """Does in a worker what the parent asks for.

    Raises:
        ValueError: The pipeline takes no LoRA, or this one matches none of its layers.
    """
    from patchpipe.recipes.adapters import load, modules_of

    if isinstance(message, UnloadLora):
        if message.left:
            pipe.delete_adapters(message.name)
            _activate(pipe, message.left)
        else:
            pipe.unload_lora_weights()
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA: diffusers has no loader for it")
    arguments = {"adapter_name": message.name}
    if message.weight_name is not None:
        arguments["weight_name"] = message.weight_name
    if getattr(pipe, "patchpipe", None) is None:
        load(pipe.load_lora_weights, modules_of(pipe), (message.path,), arguments)
    else:
        pipe.load_lora_weights(message.path, **arguments)
    _activate(pipe, message.strengths)


def _activate(pipe: Any, strengths: Mapping[str, float]) -> None:
    pipe.set_adapters(list(strengths), list(strengths.values()))


def _free_name(wanted: str, taken: Collection[str]) -> str:
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name


def loras_without(loras: Mapping[str, float], name: str | None) -> dict[str, float]:
    """The strengths of those that are left without one.

    Args:
        loras: The strength of each, by name.
        name: The one; ``None`` for all.

    Raises:
        ValueError: There is none of that name.
    """
    if name is not None and name not in loras:
        have = ", ".join(map(repr, loras)) or "none"
        raise ValueError(f"there is no LoRA {name!r}: loaded are {have}")
    return {} if name is None else {each: scale for each, scale in loras.items() if each != name}
