"""Reads single modules of a text encoder from its checkpoint, for good or for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.loading.absent import tell_device
from patchpipe.loading.checkpoint import Checkpoint, parameter_of


class EncoderReader:
    """Reads modules of an encoder that was built without weights.

    Args:
        model: The encoder, of transformers: parameters on ``meta`` in the dtype they are to have, tied ones the same,
            and computed buffers real.
        checkpoint: Its weights.
        dtype: What the encoder as a whole is loaded in.
        device: Where it computes.

    Raises:
        ValueError: The checkpoint lacks a parameter, or its weights are not stored as the encoder has them.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._checkpoint, self._device = model, checkpoint, device
        self._stored = _stored(model, checkpoint.names)
        whole = [name for name, _ in model.named_parameters()]
        checkpoint.check_complete([name for name in whole if name not in self._stored])
        self._dtypes = {name: value.dtype for name, value in model.state_dict().items()}
        self._dtypes |= dict.fromkeys(_in_float32(model, dtype), torch.float32)
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)
        tell_device(model, device)
        model.eval()

    def hold(self, modules: Iterable[str], others: Sequence[str]) -> None:
        """Reads modules for good, and the parameters that belong to no module at all.

        Args:
            modules: Names of those that this rank holds.
            others: Names of all modules that can be held.
        """
        tied: dict[Any, Tensor] = {}
        for name in modules:
            self._fill(name, tied)
        loose = [name for name in self._stored if not any(name.startswith(f"{other}.") for other in others)]
        for name, value in self._read(loose, tied).items():
            _put(self._model, name, value)

    def stream(self, modules: Iterable[str]) -> None:
        """Has modules read their weights when they are called, and drop them afterwards."""
        for name in modules:
            module = self._model.get_submodule(name)
            module.forward = self._for_one_call(name, module, module.forward)

    def _for_one_call(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def streamed(*args: Any, **kwargs: Any) -> Any:
            kept = [(one, dict(one._parameters)) for one in module.modules()]
            self._fill(name, {})
            try:
                return forward(*args, **kwargs)
            finally:
                for one, parameters in kept:
                    one._parameters.update(parameters)

        return streamed

    def _fill(self, module: str, tied: dict[Any, Tensor]) -> None:
        names = [name for name in self._stored if name.startswith(f"{module}.")]
        for name, value in self._read(names, tied).items():
            _put(self._model, name, value)

    def _read(self, names: list[str], values: dict[Any, Tensor]) -> dict[str, Tensor]:
        """Tensors by name; ``values`` has those that were read before, so that what is tied stays one."""
        keys = {name: (self._stored[name], self._dtypes[name]) for name in names}
        found = self._checkpoint.read({stored for stored, _ in keys.values()} - {stored for stored, _ in values})
        shapes = self._model.state_dict()
        for name, key in keys.items():
            if key not in values:
                stored = found[self._stored[name]]
                values[key] = stored.to(self._device, self._dtypes[name] if stored.is_floating_point() else None)
            if values[key].shape != shapes[name].shape:
                raise ValueError(
                    f"{name} is {tuple(values[key].shape)} in {self._checkpoint.folder} but "
                    f"{tuple(shapes[name].shape)} by the encoder's config.json"
                )
        return {name: values[key] for name, key in keys.items()}


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = parameter_of(value)
    elif leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        raise ValueError(
            f"{name} of a text encoder has become another layer, and its weights cannot be read into it: "
            f'text_rank="disk" takes no LoRA for text encoders, use "layers" or a rank'
        )


def _in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Parameters that transformers leaves in float32 where the rest has 16 bits."""
    kept: set[str] = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return [name for name in model.state_dict() if kept & set(name.split("."))]


def _stored(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name in the checkpoint of every parameter and kept buffer that it has; tied ones have one together."""
    state = model.state_dict()
    found = {new: old for old, new in _renamed(model, names).items() if new in state}
    tied: dict[int, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        if name in found:
            tied.setdefault(id(parameter), found[name])
    return {**{name: tied[id(parameter)] for name, parameter in parameters if id(parameter) in tied}, **found}


def _renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What transformers calls the tensors of a checkpoint: some were saved under names of older versions.

    Raises:
        ValueError: A tensor is more than renamed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    found = {}
    for name in sorted(names):
        new, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, converted = rename_source_key(name, [], [], model.base_model_prefix, state)
        if new in state and converted is not None:
            raise ValueError(
                f"{type(model).__name__} converts {name} while it is read, which cannot be done layer by layer: give "
                f"text_rank a rank"
            )
        found[name] = new
    return found
