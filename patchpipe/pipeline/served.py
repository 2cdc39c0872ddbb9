"""The class a pipeline has while it is parallel: its own, with a call that is taken as one request."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch

from patchpipe.loading.choice import ORIGINAL
from patchpipe.recipes.adapters import adapter_members


def served_class(kind: type) -> type:
    """A pipeline's class with its ``__call__`` taken as one request; still an instance of the original.

    The instance's ``patchpipe`` is its attachment.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = vars(self).get("patchpipe")
        if attachment is None:  # made of parts of its own
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]
        return attachment.adopt(self).call(kind.__call__, args, kwargs)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = vars(self).get("patchpipe")
        if attachment is not None:
            _check_move(kind, attachment, args, kwargs)
            args, kwargs = (), {name: value for name, value in kwargs.items() if name != "device"}
        return kind.to(self, *args, **kwargs)  # type: ignore[attr-defined]

    def offload(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a parallel pipeline cannot be offloaded model by model: use patchpipe.from_pretrained, where a rank "
            "holds its own blocks only, or pipe.transformer.enable_group_offload() before parallelize"
        )

    def deepcopy(self: Any, _memo: dict[int, Any]) -> NoReturn:
        raise ValueError(
            f"a parallel {kind.__name__} cannot be copied with its weights: copy.copy(pipe) shares them, and so does "
            f"{kind.__name__}.from_pipe(pipe)"
        )

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = vars(self).get("patchpipe")
        if attachment is None:
            return kind.save_pretrained(self, *args, **kwargs)  # type: ignore[attr-defined]
        return attachment.refuse_saving()

    def device(self: Any) -> torch.device:
        attachment = vars(self).get("patchpipe")
        return kind.device.fget(self) if attachment is None else attachment.group.device  # type: ignore[attr-defined]

    call.__signature__ = inspect.signature(kind.__call__)  # type: ignore[attr-defined, operator]
    call.__doc__ = kind.__call__.__doc__  # type: ignore[operator]
    members = {
        "__call__": call,
        "to": to,
        "enable_model_cpu_offload": offload,
        "enable_sequential_cpu_offload": offload,
        "__deepcopy__": deepcopy,
        "save_pretrained": save_pretrained,
        "device": property(device),
        "_execution_device": property(device),
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        **adapter_members(kind),
        ORIGINAL: kind,
    }
    return type(kind.__name__, (kind,), members)


def _check_move(kind: type, attachment: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses ``to`` unless nothing would move: weights are on every rank as its layout was made for.

    ``from_pipe`` calls ``to`` with a dtype, float32 if the user gave none.

    Raises:
        ValueError: Something would.
    """
    device, dtype = _asked(args, kwargs)
    here, held = attachment.group.device, attachment.runner.dtype
    if device is not None:
        raise ValueError(
            f"a parallel pipeline cannot be moved: it is already where its rank computes, on {here}. Leave out "
            f".to(...), pass device= and dtype= to from_pretrained, or move the pipeline before parallelize"
        )
    if dtype is not None and dtype != held:
        raise ValueError(
            f"{kind.__name__} shares its weights with a parallel pipeline, and this would turn them from {held} to "
            f"{dtype}. from_pipe does so if no dtype is given: write {kind.__name__}.from_pipe(pipe, "
            f"torch_dtype={held}), or choose the dtype when the pipeline is loaded"
        )


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """What ``DiffusionPipeline.to`` was asked for: a device, a dtype, or both, in any order."""
    values = [*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("torch_dtype")]
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    devices = [torch.device(value) for value in values if isinstance(value, (str, int, torch.device))]
    return (devices or [None])[0], (dtypes or [None])[0]
