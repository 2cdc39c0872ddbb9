"""The state of a request after a step, as plain data: what its pipeline needs to go on from there, on any layout.

A pipeline's loop carries the latent from step to step, its scheduler what it remembers of earlier steps, and generators
where they are. All else follows from the arguments of the call. That this is so is not known of every pipeline, and is
looked at: what the transformer is given next must be what it would have been given.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from patchpipe.lazy.latent import materialise_tree

FORMAT = 1
MARK = "patchpipe"  # of our part of a file's header
KINDS = {"tuple": tuple, "list": list, "Size": torch.Size}
LIKE = 1e-3  # of the size of an input: its elements are summed in another order elsewhere
SECOND = "old_pred_original_sample"  # what a step is given beside the latent, where the pipeline carries two tensors
SETTINGS = "_internal_dict"  # a scheduler's configuration, which its class was made with


@dataclass(frozen=True)
class Saved:
    """A request between two steps.

    Attributes:
        step: Steps that are over.
        pipeline: Its class.
        scheduler: The class of its scheduler.
        call: What the pipeline was called with, in short; see ``lockstep.inputs``.
        latent: What the last step gave.
        state: What the scheduler has beside its configuration.
        generators: The states of those the call was given.
        draws: The states of the default generators, of the host and of the device if it has one.
        texts: What the pipeline's ``encode_prompt`` gave, call by call.
        looks: What the next call of the transformer is given, as a few sums of each tensor.
    """

    step: int
    pipeline: str
    scheduler: str
    call: Mapping[str, Sequence[str]]
    latent: Tensor
    state: Mapping[str, Any]
    generators: Sequence[Tensor]
    draws: Sequence[Tensor]
    texts: Sequence[Any]
    looks: Mapping[str, Sequence[float]]

    def to_bytes(self) -> bytes:
        """The same as a safetensors file, whose header holds what is no tensor."""
        tensors: dict[str, Tensor] = {}
        own = {field.name: _flat(getattr(self, field.name), tensors) for field in fields(self)}
        header = json.dumps({"format": FORMAT, **own})
        return safetensors.torch.save(tensors, {MARK: header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Saved:
        """Reads what ``to_bytes`` gave; nothing in it is run.

        Raises:
            ValueError: It is something else.
        """
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][MARK])
            tensors = safetensors.torch.load(data)
            if header.pop("format") != FORMAT:
                raise ValueError("another version wrote it")
            return cls(**{name: _full(header[name], tensors) for name in (field.name for field in fields(cls))})
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"this is no checkpoint of a request: {error}") from error


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """What a scheduler has beside its configuration and functions made of it, on the host; gathers what is lazy.

    Raises:
        ValueError: It keeps something that is no plain data, or not all that is to be carried.
    """
    if SECOND in inspect.signature(type(scheduler).step).parameters:
        raise ValueError(
            f"a request with {type(scheduler).__name__} cannot be moved: its step() returns a second tensor that the "
            f"pipeline keeps. Resume it where it was paused, or use another scheduler"
        )
    made = (SETTINGS, *(name for name, value in vars(scheduler).items() if isinstance(value, FunctionType)))
    own = {name: value for name, value in vars(scheduler).items() if name not in made}
    return {name: _plain(value, f"{type(scheduler).__name__}.{name}") for name, value in own.items()}


def put_back(saved: Saved, scheduler: Any, generators: Sequence[torch.Generator], device: torch.device) -> None:
    """Lets a scheduler and generators go on from where they were.

    Args:
        saved: Where they were.
        scheduler: That of the request, whose time steps are set.
        generators: What its call was given.
        device: Where the latent is.
    """
    for name, value in saved.state.items():
        now = vars(scheduler).get(name)
        place = now.device if isinstance(now, Tensor) else device
        setattr(scheduler, name, placed(value, place))
    for generator, state in zip(generators, saved.generators, strict=True):
        generator.set_state(state)
    torch.set_rng_state(saved.draws[0])
    if device.type == "cuda" and len(saved.draws) > 1:
        torch.cuda.set_rng_state(saved.draws[1], device)


def draws(device: torch.device) -> list[Tensor]:
    """The states of the default generators."""
    host = [torch.get_rng_state()]
    return [*host, torch.cuda.get_rng_state(device)] if device.type == "cuda" else host


def on_host(value: Any, name: str) -> Any:
    """A copy of a tensor, or of a tree of plain data with tensors in it, on the host; gathers what is lazy.

    Raises:
        ValueError: Something in it is no plain data.
    """
    return _plain(value, name)


def looks_of(inputs: Mapping[str, Any]) -> dict[str, list[float]]:
    """A few sums of every tensor that the transformer is given."""
    found = {}
    for name, value in inputs.items():
        whole = materialise_tree(value, "a checkpoint")
        listed = whole if isinstance(whole, (list, tuple)) else [whole]
        sums = [_sums(each) for each in listed if isinstance(each, Tensor)]
        if sums:
            found[name] = [number for each in sums for number in each]
    return found


def first_unlike(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> str | None:
    """The first input that looks otherwise."""
    for name in sorted({*ours, *theirs}):
        one, two = ours.get(name, ()), theirs.get(name, ())
        if len(one) != len(two) or any(_unlike(one, two, at) for at in range(0, len(one), 4)):
            return name
    return None


def _sums(tensor: Tensor) -> list[float]:
    wide = tensor.detach().double().reshape(-1)
    waves = torch.arange(wide.numel(), dtype=torch.float64, device=wide.device).mul_(0.7).cos_()
    return [float(wide.numel()), *torch.stack([wide.abs().sum(), wide.sum(), (wide * waves).sum()]).tolist()]


def _unlike(one: Sequence[float], two: Sequence[float], at: int) -> bool:
    size = LIKE * max(abs(one[at + 1]), 1e-6)
    return one[at] != two[at] or any(abs(one[place] - two[place]) > size for place in range(at + 1, at + 4))


# -- plain data ------------------------------------------------------------------------------------------


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return materialise_tree(value, "a checkpoint").detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value.copy()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if type(value) in KINDS.values():
        return type(value)([_plain(each, name) for each in value])
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {key: _plain(each, name) for key, each in value.items()}
    raise ValueError(
        f"{name} is a {type(value).__name__}, which cannot be saved. Resume the request where it was paused, or use a "
        f"scheduler that keeps tensors and numbers only"
    )


def placed(value: Any, device: torch.device) -> Any:
    """Plain data whose tensors are on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(placed(each, device) for each in value)
    if isinstance(value, dict):
        return {key: placed(each, device) for key, each in value.items()}
    return value


def _flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain data as JSON knows it; tensors go beside it."""
    if isinstance(value, (Tensor, np.ndarray)):
        name = f"{len(tensors)}"
        tensors[name] = value.contiguous() if isinstance(value, Tensor) else torch.from_numpy(value)
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flat(each, tensors) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flat(each, tensors)] for key, each in value.items()]}
    return value


def _full(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, held)] = value.items()
    if kind in ("tensor", "array"):
        return tensors[held] if kind == "tensor" else tensors[held].numpy()
    if kind == "dtype":
        found = getattr(torch, held, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"there is no dtype {held!r}")
        return found
    if kind == "dict":
        return {key: _full(each, tensors) for key, each in held}
    return KINDS[kind]([_full(each, tensors) for each in held])
