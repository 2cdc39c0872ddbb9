"""Checks a request before any work and makes it fit to travel to another process and back."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from patchpipe.engine.messages import Call, GeneratorState, Ready
from patchpipe.errors import did_you_mean
from patchpipe.tracing.timeline import check_target

Seed = int | Sequence[int] | None
OwnSeed = int | list[int] | None  # once it was checked
NUMBERED_LATER = 0


def named(ready: Ready, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name.

    Args:
        ready: What a worker told of the pipeline.
        args: Arguments by position.
        kwargs: Arguments by name.

    Raises:
        TypeError: There are too many, or one is given twice.
    """
    found = dict(zip(ready.arguments, args, strict=False))
    if len(args) > len(found):
        raise TypeError(f"{len(args)} arguments were given, but the pipeline takes {len(found)}")
    for name in found:
        if name in kwargs:
            raise TypeError(f"{name} was given twice: by position and by name")
    return {**found, **kwargs}


def asked(ready: Ready, arguments: dict[str, Any], seed: Seed, trace: str | None = None) -> tuple[Call, OwnSeed]:
    """The message that asks for one call, whose request is not numbered yet, and the seed it uses.

    Args:
        ready: What a worker told of the pipeline.
        arguments: The call's arguments, by name.
        seed: As given; ``None`` takes a fresh one.
        trace: File for its timeline.

    Raises:
        ValueError: An argument's value is wrong.
        TypeError: The pipeline takes no such argument, or the seed is none.
    """
    check_names(arguments, ready.arguments, ready.any_argument, ready.info.pipeline_class)
    arguments = with_one_strength(arguments, ready.arguments)
    if seed is None and arguments.get("generator") is None:
        seed = fresh_seed()
    used = None if seed is None else check_seed(seed)
    encoded, global_seed = encode(arguments, used, ready.arguments)
    return Call(NUMBERED_LATER, global_seed, encoded, trace), used


def trace_place(trace: str | os.PathLike[str] | None, *, plain: bool) -> str | None:
    """Where a timeline goes, checked before any work.

    Args:
        trace: The file, as the user names it.
        plain: Whether the pipeline runs as diffusers has it.

    Raises:
        ValueError: It cannot be written to, or there is nothing to trace.
    """
    if trace is None:
        return None
    if plain:
        raise ValueError("plain diffusers is not traced: give the engine config=ParallelConfig()")
    return str(check_target(Path(trace)))


def check_names(names: Iterable[str], known: Sequence[str], any_argument: bool, pipeline: str) -> None:
    """Refuses an argument that the pipeline does not take.

    Raises:
        TypeError: Its name, with the nearest one that exists.
    """
    if any_argument:
        return
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{pipeline} takes no argument {name!r}: {hint}")


def encode(arguments: Mapping[str, Any], seed: Seed, known: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Makes arguments fit to travel.

    Args:
        arguments: The pipeline's arguments.
        seed: A seed for all pictures, one for each, or ``None`` for a fresh one.
        known: Names the pipeline takes.

    Returns:
        The encoded arguments and the number to seed every rank's global generator with, so that all ranks
        draw the same numbers.

    Raises:
        ValueError: A value cannot travel, or both a seed and a generator are given.
        TypeError: The seed is not a whole number.
    """
    encoded = {name: _encode_value(name, value) for name, value in arguments.items()}
    if encoded.get("generator") is not None:
        if seed is not None:
            raise ValueError("seed and generator were both given: leave one of them out")
        return encoded, fresh_seed()
    seeds = check_seed(fresh_seed() if seed is None else seed)
    first = seeds if isinstance(seeds, int) else seeds[0]
    if "generator" in known:
        encoded["generator"] = _seeded(seeds)
    return encoded, first


def fresh_seed() -> int:
    """A seed that nobody has chosen."""
    return secrets.randbits(32)


def decode(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes ``encode`` on the other side."""
    return {name: _map(value, _decode_leaf) for name, value in arguments.items()}


def portable(output: Any) -> Any:
    """A pipeline's output with its tensors on the CPU, ready to travel."""
    return _map(output, _to_host)


def pictures(output: Any) -> Any:
    """The part of a pipeline's output that people want: its images, frames, or first field."""
    for name in ("images", "frames"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


def check_seed(seed: Any) -> int | list[int]:
    """A seed, or one for each picture, as Python's own whole numbers.

    Raises:
        TypeError: It is neither.
    """
    if _is_whole(seed):
        return int(seed)
    if isinstance(seed, (list, tuple, np.ndarray)) and len(seed) and all(map(_is_whole, seed)):
        return [int(one) for one in seed]
    raise TypeError(f"seed={seed!r} must be a whole number or a list of them")


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _seeded(seeds: int | list[int]) -> Any:
    import torch

    def one(seed: int) -> GeneratorState:
        return GeneratorState("cpu", torch.Generator("cpu").manual_seed(seed).get_state())

    return one(seeds) if isinstance(seeds, int) else [one(seed) for seed in seeds]


def _encode_value(name: str, value: Any) -> Any:
    import torch

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Generator):
            return GeneratorState(str(item.device), item.get_state())
        if callable(item):
            raise ValueError(
                f"{name} holds a callable, which cannot travel to the worker processes: follow a request "
                "with on_progress, or call the pipeline itself under torchrun"
            )
        if isinstance(item, np.generic):
            return item.item()  # numpy's numbers are not Python's: what asks for an int would not take them
        return _to_host(item)

    return _map(value, leaf)


def _decode_leaf(item: Any) -> Any:
    if not isinstance(item, GeneratorState):
        return item
    import torch

    generator = torch.Generator(item.device.split(":")[0])
    generator.set_state(item.state)
    return generator


def _to_host(item: Any) -> Any:
    import torch

    return item.detach().cpu() if isinstance(item, torch.Tensor) else item


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_map(item, leaf) for item in value]
    if isinstance(value, tuple):
        items = [_map(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if dataclasses.is_dataclass(value) and isinstance(value, Mapping):  # diffusers' BaseOutput
        return type(value)(**{name: _map(item, leaf) for name, item in value.items()})
    if isinstance(value, dict):
        return {name: _map(item, leaf) for name, item in value.items()}
    return leaf(value)


def guidance_name(arguments: Collection[str], defaults: Mapping[str, Any]) -> str:
    """Which argument of a pipeline says how strong its guidance is.

    One that takes ``true_cfg_scale`` and has no usual ``guidance_scale``, such as Qwen-Image's, looks at the latter
    with a distilled model only.

    Args:
        arguments: Names of the arguments that its call takes.
        defaults: Their defaults, of those that have any beside ``None``.
    """
    return "true_cfg_scale" if "true_cfg_scale" in arguments and "guidance_scale" not in defaults else "guidance_scale"


def with_one_strength(arguments: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A call's arguments, where one strength of guidance takes the place of a usual one for every step.

    Ideogram's pipeline has the latter as a default, and takes no strength beside it.

    Args:
        arguments: The call's arguments.
        known: Names that the pipeline takes.
    """
    instead = arguments.get("guidance_scale") is not None and "guidance_schedule" in known
    return {**({"guidance_schedule": None} if instead else {}), **arguments}
