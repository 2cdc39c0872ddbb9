"""The dtype of a pipeline: as diffusers' users write it, else as the checkpoint stores it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAMES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "float16": "float16", "half": "float16",
    "fp32": "float32", "float32": "float32", "float": "float32",
}  # fmt: skip
HALVES = ("bfloat16", "float16")
_DENOISERS = ("transformer", "unet", "prior")  # the part whose dtype a pipeline takes


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """The full name of a dtype given as a name or a ``torch.dtype``.

    Raises:
        ValueError: It is not a floating-point type that patchpipe runs in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.").lower()
    if name not in NAMES:
        raise ValueError(f"dtype={str(dtype)!r} is unknown: use bf16, fp16 or fp32")
    return NAMES[name]


def one_dtype(dtype: Any, torch_dtype: Any) -> str | dict[str, str] | None:
    """What ``dtype`` and its older name ``torch_dtype`` ask for together.

    Args:
        dtype: A name, a ``torch.dtype``, or one for each component by name, ``"default"`` for the others.
        torch_dtype: Likewise.

    Returns:
        The full name, or one for each component.

    Raises:
        ValueError: A dtype is unknown, or the two contradict each other.
    """
    first, second = _names(dtype), _names(torch_dtype)
    if first is not None and second is not None and first != second:
        raise ValueError(
            f"dtype={dtype} and torch_dtype={torch_dtype} contradict each other: give one, they mean the same"
        )
    return second if first is None else first


def as_torch(names: str | Mapping[str, str]) -> Any:
    """The dtype, or one for each component, that diffusers takes."""
    import torch

    if isinstance(names, str):
        return getattr(torch, names)
    return {part: getattr(torch, name) for part, name in names.items()}


def dtype_of(part: str, dtype: Any) -> torch.dtype:
    """The dtype of one component, of what ``as_torch`` gives; components not named are float32, as in diffusers."""
    import torch

    return dtype.get(part, dtype.get("default", torch.float32)) if isinstance(dtype, Mapping) else dtype


def default_dtype(folder: Path, variant: str | None, devices: Iterable[str]) -> str | None:
    """The dtype of a pipeline that was not told one: as its transformer is stored.

    A CPU has no units for half precision (measured: ten times the time of float32), so that where one takes part,
    float32 stands in for it, which holds every stored value exactly.

    Args:
        folder: The pipeline's folder.
        variant: The checkpoint's variant.
        devices: Kinds of the devices, such as ``"cuda"``.

    Returns:
        Its name; ``None`` where the checkpoint does not tell.
    """
    from patchpipe.loading.checkpoint import Checkpoint

    part = next((name for name in _DENOISERS if (folder / name).is_dir()), None)
    if part is None:
        return None
    try:
        stored = str(Checkpoint(folder / part, variant).dtype()).removeprefix("torch.")
    except FileNotFoundError:
        return None
    if stored not in NAMES:  # eight bits and the like, in which nothing is computed
        stored = "bfloat16"
    return "float32" if stored in HALVES and any(kind.startswith("cpu") for kind in devices) else stored


def _names(dtype: Any) -> Any:
    if isinstance(dtype, Mapping):
        return {str(part): dtype_name(one) for part, one in dtype.items()}
    return dtype_name(dtype)
