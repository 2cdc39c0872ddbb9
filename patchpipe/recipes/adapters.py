"""LoRA and IP-Adapters on a parallel pipeline: diffusers' own methods, run while patchpipe's hooks are off the model.

``peft`` puts a layer of its own in the place of each layer that LoRA changes. On a parallel pipeline some blocks are
stood in for and some layers have hooks. So the hooks come off, the method does to the ordinary model what it does on
any other, and the hooks go on again. A rank that has only its own blocks in memory keeps the matrices of LoRA for those
alone: the others' are on ``meta``, and what is beside them goes there too. So it is with the processors of an
IP-Adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

from torch import nn

from patchpipe.layout.text import ON_THE_LAST
from patchpipe.models import adapters as ip_adapters
from patchpipe.models.lora import adapted_layers, adapters_of
from patchpipe.parallel.blocks import Blocks
from patchpipe.parallel.tensor import check_tensor
from patchpipe.schedule.runner import Runner

LOADING = ("load_lora_weights", "load_lora_adapter", "add_adapter")
MERGING = ("fuse_lora", "unfuse_lora")  # change a matrix by what is beside it
_OTHERS = (
    "unload_lora_weights", "unload_lora", "set_adapters", "set_adapter", "delete_adapters", "enable_lora",
    "disable_lora", "enable_adapters", "disable_adapters", "enable_lora_hotswap", "set_lora_device",
)  # fmt: skip
RESCALING = "set_ip_adapter_scale"  # changes a number alone
IP_ADAPTERS = ("load_ip_adapter", "unload_ip_adapter")
METHODS = (*LOADING, *MERGING, *_OTHERS, *IP_ADAPTERS, RESCALING)  # of pipelines, and of models
HOOKING = (
    "enable_cache", "disable_cache", "enable_layerwise_casting", "fuse_qkv_projections", "unfuse_qkv_projections",
    "set_attn_processor", "set_default_attn_processor",
)  # fmt: skip  # of models: they change layers too, and meet stand-ins otherwise


class Adapters:
    """Changes the adapters of a parallel pipeline.

    Args:
        pipe: The pipeline.
        blocks: The hooks on this rank's part of each of its transformers.
        runner: Runs the transformer's calls.
    """

    def __init__(self, pipe: Any, blocks: Sequence[Blocks], runner: Runner) -> None:
        self._pipe, self._blocks, self._runner = pipe, blocks, runner
        self._changing = False
        self.state = self._told()

    def change(self, name: str, method: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Runs one of diffusers' methods on the transformer without hooks; every rank calls it alike.

        In a callback it holds from the next call of the transformer on.

        Args:
            name: The method's name.
            method: The method, bound.
            args: Its arguments by position.
            kwargs: Its arguments by name.

        Raises:
            ValueError: LoRA that matches no layer, or that this layout cannot hold; nothing has changed then.
            ImportError: There is no ``peft``.
            RuntimeError: Several requests are in flight, which would all be changed; or an IP-Adapter comes or goes
                within a request.
        """
        if self._changing:  # one of the methods calls another
            return method(*args, **kwargs)
        self._check_idle(name)
        if name == RESCALING:
            return self._rescale(method, args, kwargs)
        modules, runner = modules_of(self._pipe), self._runner
        self._changing = True
        try:
            with ExitStack() as opened:
                for blocks in self._blocks:
                    opened.enter_context(blocks.open(merging=name in MERGING))
                try:
                    if name not in LOADING:
                        return method(*args, **kwargs)
                    return load(method, modules, args, kwargs, self._check_layout)
                finally:
                    drop_absent(modules.values())
                    for model in self._runner.models:
                        ip_adapters.drop_absent(model)
                    self.state = self._told()
        finally:
            self._changing = False
            if runner.request is not None:
                runner.request.memo.clear()  # results of layers as they were

    def _rescale(self, method: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Sets the strength of an IP-Adapter; an attention that has keys and values is not switched in a request."""
        models = self._runner.models
        before = [ip_adapters.strengths_of(model) for model in models]
        result = method(*args, **kwargs)
        switched = [on_of(was) != on_of(ip_adapters.strengths_of(now)) for was, now in zip(before, models, strict=True)]
        if self._runner.request is not None and any(switched) and any(self._runner.plan.adapters.values()):
            for model, was in zip(models, before, strict=True):
                ip_adapters.set_strengths(model, was)
            raise ValueError(
                f"{RESCALING} would switch the IP-Adapter on or off in a request, where its keys and values of the "
                f"step before are needed: use a small scale instead of 0, or change it between requests"
            )
        self.state = self._told()
        return result

    def _told(self) -> dict[str, str]:
        kinds = {"LoRA": adapters_of, "IP-Adapter": ip_adapters.told_of}
        return {kind: "; ".join(map(tell, self._runner.models)) for kind, tell in kinds.items()}

    def model_methods(self, model: nn.Module) -> dict[str, Callable[..., Any]]:
        """A transformer's own methods that change adapters or other things in its layers, to be set on it."""
        return {
            name: wraps(original)(partial(self._bound, name, original))
            for name, original in ((name, getattr(model, name, None)) for name in (*METHODS, *HOOKING))
            if callable(original)
        }

    def _bound(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.change(name, original, args, kwargs)

    def _check_idle(self, name: str) -> None:
        if self._runner.request is not None and name in IP_ADAPTERS:
            raise RuntimeError(f"{name} would change the request under way: call it before or after")
        if self._runner.request is not None and len(self._runner.stats) > 1:
            raise RuntimeError(f"{name} would change the adapters of all requests in flight together: call it before")

    def _check_layout(self) -> None:
        way = self._runner.config.text_rank
        if way in ON_THE_LAST:
            for name in loaded_adapters(encoders_of(self._pipe)):
                raise ValueError(
                    f'text_rank="{way}" has {name} as it is stored, for which LoRA cannot be loaded: use "layers" '
                    f"or a rank, or LoRA for the transformer alone"
                )
        for model in self._runner.models:
            check_tensor(model, self._runner.plan, self._runner.config.tensor)


def on_of(strengths: Mapping[str, Any]) -> dict[str, bool]:
    """Which layers an IP-Adapter has any part in."""
    return {name: strength not in (0, [0]) for name, strength in strengths.items()}


def adapter_members(kind: type) -> dict[str, Any]:
    """A pipeline class's methods that change adapters, for its parallel subclass: through ``pipe.patchpipe``."""

    def member(name: str) -> Any:
        original = getattr(kind, name)

        @wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            attachment = vars(self).get("patchpipe")
            if attachment is None:  # made of parts of its own
                return original(self, *args, **kwargs)
            return attachment.change_adapters(name, original.__get__(self), args, kwargs)

        return method

    return {name: member(name) for name in METHODS if callable(getattr(kind, name, None))}


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's models that may have adapters, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's text encoders, by name."""
    return {name: part for name, part in modules_of(pipe).items() if name.startswith("text_encoder")}


def loaded_adapters(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The names of the adapters of each model that has any."""
    found = {name: list(getattr(module, "peft_config", None) or {}) for name, module in modules.items()}
    return {name: adapters for name, adapters in found.items() if adapters}


def load(
    method: Callable[..., Any],
    modules: Mapping[str, nn.Module],
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
) -> Any:
    """Runs a method that loads adapters, and takes back what a failed one has left behind.

    Args:
        method: The method, bound.
        modules: The models it may load into.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        check: Called afterwards; what it raises takes the adapters back.

    Raises:
        ValueError: The weights match no layer of any of the models.
        ImportError: There is no ``peft``.
    """
    _check_peft()
    before = loaded_adapters(modules)
    try:
        result = method(*args, **kwargs)
        if loaded_adapters(modules) == before and not kwargs.get("hotswap"):
            raise _no_match(modules)
        check()
    except Exception as error:
        take_back(modules, before)
        if isinstance(error, ValueError) and "not found in the base model" in str(error):
            raise _no_match(modules) from error
        raise
    return result


def take_back(modules: Mapping[str, nn.Module], before: Mapping[str, list[str]]) -> None:
    """Deletes the adapters that were not there before."""
    from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers

    for part, adapters in loaded_adapters(modules).items():
        module: Any = modules[part]
        for name in set(adapters) - set(before.get(part, ())):
            delete_adapter_layers(module, name)
        if not getattr(module, "peft_config", None):
            recurse_remove_peft_layers(module)


def drop_absent(modules: Iterable[nn.Module]) -> None:
    """Frees adapters beside layers that are not in this rank's memory."""
    for module in modules:
        for layer in adapted_layers(module).values():
            base = layer.get_base_layer()
            if any(parameter.is_meta for parameter in base.parameters(recurse=False)):
                layer.to("meta")


def _check_peft() -> None:
    from diffusers.utils import USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        raise ImportError("LoRA needs the package peft: pip install 'patchpipe[lora]'")


def _no_match(modules: Mapping[str, nn.Module]) -> ValueError:
    kinds = ", ".join(type(module).__name__ for module in modules.values())
    return ValueError(
        f"the LoRA holds no weights for any layer of this pipeline ({kinds}): it was made for another model, or its "
        f"names are in a format that diffusers does not know"
    )
