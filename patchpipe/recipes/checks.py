"""What people do to a pipeline before, or after, it is made parallel: what fits a layout, and what to do instead.

Recipes of diffusers and torch leave marks: hooks in a registry on the module, attributes, a class around the model. A
recipe that is right under a layout is let through. Any other is refused by name, when the pipeline is made parallel and
again when it is called, before a rank waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.models.adapters import PROJECTIONS
from patchpipe.models.dtypes import matrix_dtype
from patchpipe.recipes.guiders import check_guiders
from patchpipe.schedule.runner import Runner

NATIVE_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
OWN_PRODUCTS = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor", "AttnProcessorNPU")
ON_ONE_DEVICE = "or run the pipeline on one device without patchpipe"


@dataclass(frozen=True)
class Seen:
    """What the marks of recipes are looked for in.

    Attributes:
        pipe: The pipeline.
        model: Its transformer, without what torch.compile puts around it.
        hooks: Modules of ``diffusers.hooks`` that have put a hook somewhere in the transformer, with one hook of each.
        processors: Attention processors of its layers, by class name, with one of each.
    """

    pipe: Any
    model: nn.Module
    hooks: dict[str, Any]
    processors: dict[str, Any]

    @classmethod
    def at(cls, pipe: Any, model: nn.Module | None = None) -> Seen:
        """Looks at a pipeline, and at its transformer or the one it is to run on."""
        model = pipe.transformer if model is None else model
        model = getattr(model, "_orig_mod", model)
        hooks: dict[str, Any] = {}
        processors: dict[str, Any] = {}
        for module in model.modules():
            registry = module.__dict__.get("_diffusers_hook")
            for hook in () if registry is None else registry.hooks.values():
                hooks.setdefault(type(hook).__module__.rpartition(".")[2], hook)
            processor = module.__dict__.get("processor")
            if processor is None:
                processor = module._modules.get("processor")  # of IP-Adapter, which has weights
            if processor is not None:
                processors.setdefault(type(processor).__name__, processor)
        return cls(pipe, model, hooks, processors)


@dataclass(frozen=True)
class Recipe:
    """Something people do to a pipeline.

    Attributes:
        name: What they write.
        found: Whether it was done.
        fits: Under which layouts the picture is right.
        reason: Why it is not under others.
        instead: What to do.
    """

    name: str
    found: Callable[[Seen], bool]
    fits: Callable[[ParallelConfig], bool]
    reason: str
    instead: str


def never(_config: ParallelConfig) -> bool:
    """Fits no layout."""
    return False


def streams(config: ParallelConfig) -> bool:
    """Whether patches or parts of the latent ever run by themselves."""
    if config.distrifusion > 1:
        return True
    cut = config.pipefusion > 1 or (config.patches or 1) > 1 or len(config.patch_rows or ()) > 1
    return cut and not config.synchronous


def shares(config: ParallelConfig) -> bool:
    """Whether ranks share a patch, and so attend together."""
    return config.ulysses * config.ring * config.distrifusion > 1


def whole_on_one_rank(config: ParallelConfig) -> bool:
    """One rank runs all blocks on the whole latent, as without patchpipe."""
    return config.world_size == 1 and not streams(config) and not config.compile


def whole_in_stages(config: ParallelConfig) -> bool:
    """Every block runs on the whole latent and batch, on whatever stage."""
    return config.world_size == config.pipefusion and not streams(config) and not config.compile


def _plain_attention(config: ParallelConfig) -> bool:
    return not streams(config) and not shares(config) and not config.compile


def _unsplit(config: ParallelConfig) -> bool:
    return config.tensor == 1 and not config.compile and config.offload is None


def _backend(seen: Seen) -> str:
    """The name of the attention backend that is not torch's own, or nothing."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = [getattr(processor, "_attention_backend", None) for processor in seen.processors.values()]
    active = _AttentionBackendRegistry.get_active_backend()[0] if None in chosen or not chosen else None
    names = [str(getattr(each, "value", each)) for each in (*chosen, active) if each is not None]
    return next((name for name in names if name not in NATIVE_BACKENDS), "")


def _compiled_call(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _accelerated(seen: Seen) -> bool:
    return any(hasattr(part, "_hf_hook") for part in seen.pipe.components.values() if isinstance(part, nn.Module))


def _ip_adapter(seen: Seen) -> set[str]:
    """Attention processors of IP-Adapters; or what else shows that there are some."""
    found = {name for name in seen.processors if "IPAdapter" in name}
    return found or {name for name in PROJECTIONS if getattr(seen.model, name, None) is not None}


def _unknown_ip_adapter(seen: Seen) -> bool:
    found = _ip_adapter(seen)
    return bool(found) and not found <= set(plan_for(seen.model).adapters)


def _by_hook(name: str, module: str, fits: Callable[[ParallelConfig], bool], reason: str, instead: str) -> Recipe:
    return Recipe(name, lambda seen: module in seen.hooks, fits, reason, instead)


_ACROSS = "keeps results from one block to the next and of the whole picture"
_WITHIN = "keeps a block's results of the whole picture"
_ONE_RANK = f"call pipe.transformer.disable_cache(), {ON_ONE_DEVICE}"
_STAGES = f"call pipe.transformer.disable_cache(), or use pipefusion alone with warmup='all', {ON_ONE_DEVICE}"
_COMPILE = "use ParallelConfig(compile=True), which compiles each stage's blocks for patches of every shape"

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "torch.compile(pipe.transformer)",
        lambda seen: hasattr(getattr(seen.pipe, "transformer", None), "_orig_mod"),
        never,
        "compiles the whole transformer, of which a rank runs a part",
        f"leave it out and {_COMPILE}; pipe.transformer._orig_mod is the model without it",
    ),
    Recipe(
        "pipe.transformer.compile()",
        lambda seen: _compiled_call(seen.model),
        never,
        "compiles the whole transformer, of which a rank runs a part",
        f"leave it out and {_COMPILE}",
    ),
    Recipe(
        "pipe.transformer.compile_repeated_blocks()",
        lambda seen: any(_compiled_call(module) for module in seen.model.modules() if module is not seen.model),
        never,
        "compiles blocks without what patches need in them",
        f"leave it out and {_COMPILE}",
    ),
    Recipe(
        "enable_model_cpu_offload(), enable_sequential_cpu_offload() or enable_auto_cpu_offload()",
        _accelerated,
        never,
        "moves whole models to and from the device, as does a pipeline loaded with device_map",
        "use patchpipe.from_pretrained, where a rank holds its own blocks only, or pipe.transformer."
        "enable_group_offload()",
    ),
    Recipe(
        "device_map",
        lambda seen: getattr(seen.pipe, "hf_device_map", None) is not None,
        never,
        "spreads the models over devices itself",
        "load the pipeline without it, or with patchpipe.from_pretrained",
    ),
    _by_hook(
        "enable_group_offload()",
        "group_offloading",
        _unsplit,
        "moves whole matrices that are split, compiled or moved here",
        "use tensor=1 and compile=False without offload, or leave it out: ParallelConfig(offload=…) does the same",
    ),
    _by_hook(
        "enable_layerwise_casting()",
        "layerwise_casting",
        _unsplit,
        "casts whole matrices that are split, compiled or moved here",
        "use tensor=1 and compile=False without offload, or leave it out",
    ),
    _by_hook("FirstBlockCache", "first_block_cache", whole_on_one_rank, _ACROSS, _ONE_RANK),
    _by_hook("MagCache", "mag_cache", whole_on_one_rank, _ACROSS, _ONE_RANK),
    _by_hook("SeaCache", "sea_cache", whole_on_one_rank, _ACROSS, _ONE_RANK),
    _by_hook("FasterCache", "faster_cache", whole_on_one_rank, _ACROSS, _ONE_RANK),
    _by_hook("PyramidAttentionBroadcast", "pyramid_attention_broadcast", whole_in_stages, _WITHIN, _STAGES),
    _by_hook("TaylorSeerCache", "taylorseer_cache", whole_in_stages, _WITHIN, _STAGES),
    _by_hook("TextKVCache", "text_kv_cache", whole_in_stages, _WITHIN, _STAGES),
    _by_hook(
        "apply_layer_skip()",
        "layer_skip",
        never,
        "leaves out blocks that a stage counts on",
        f"take its hooks off, {ON_ONE_DEVICE}",
    ),
    Recipe(
        "pipe.transformer.enable_parallelism()",
        lambda seen: (
            getattr(seen.model, "_parallel_config", None) is not None
            or not {"context_parallel", "tensor_parallel"}.isdisjoint(seen.hooks)
        ),
        never,
        "shares the model between processes itself",
        "leave it out and use ParallelConfig(ulysses=…, ring=…, tensor=…)",
    ),
    Recipe(
        "an IP-Adapter that is not tested with this class",
        _unknown_ip_adapter,
        never,
        "attends to a picture's tokens beside the text's, which its plan does not cover",
        f"call pipe.unload_ip_adapter(), {ON_ONE_DEVICE}",
    ),
    Recipe(
        "IP-Adapter",
        lambda seen: bool(_ip_adapter(seen)),
        lambda config: config.tensor == 1 and not config.compile,
        "attends more than once in a layer, and with whole matrices of its own",
        "use tensor=1 and compile=False, for example with pipefusion or ulysses instead, or call "
        "pipe.unload_ip_adapter()",
    ),
    Recipe(
        "an attention backend other than torch's own",
        lambda seen: bool(_backend(seen)),
        _plain_attention,
        "hides keys and values that patches or ranks have to share",
        "call pipe.transformer.set_attention_backend('native'), which picks flash attention by itself",
    ),
    Recipe(
        "enable_attention_slicing(), xformers or an old attention processor",
        lambda seen: not set(OWN_PRODUCTS).isdisjoint(seen.processors),
        _plain_attention,
        "hides keys and values that patches or ranks have to share",
        "call pipe.transformer.set_default_attn_processor(), which picks flash attention by itself",
    ),
)


def check_recipes(pipe: Any, config: ParallelConfig, model: nn.Module | None = None) -> None:
    """Refuses what was done to a pipeline if its pictures would not be right under a layout.

    Args:
        pipe: The pipeline.
        config: The layout.
        model: The transformer; ``None`` takes the pipeline's.

    Raises:
        ValueError: Names the recipe and what to do instead.
    """
    seen = Seen.at(pipe, model)
    check_guiders(pipe, seen.model, config)
    for recipe in RECIPES:
        if recipe.found(seen) and not recipe.fits(config):
            layout = "" if recipe.fits is never else f", which is not right with {config.describe()}"
            raise ValueError(f"{recipe.name} {recipe.reason}{layout}: {recipe.instead}")


def check_surroundings(pipe: Any, runner: Runner, *, own: bool) -> None:
    """Refuses a call if something was done to the pipeline since it was made parallel, or is done around the call.

    Args:
        pipe: The pipeline.
        runner: Runs the transformer's calls.
        own: Whether it is the pipeline that was made parallel, not another one on its weights.

    Raises:
        ValueError: Names what was done, and what to do instead.
    """
    for model in runner.models:
        check_recipes(pipe, runner.config, model)
    if own and not all(any(part is model for part in vars(pipe).values()) for model in runner.models):
        raise ValueError(
            "pipe.transformer is another model than when the pipeline was made parallel: call patchpipe.restore(pipe) "
            "first, then replace the transformer, then call parallelize again"
        )
    now = next((dtype for dtype in map(matrix_dtype, runner.models) if dtype != runner.dtype), runner.dtype)
    if now != runner.dtype:
        raise ValueError(
            f"the transformer was {runner.dtype} when the pipeline was made parallel, and is {now} now: change its "
            f"dtype before parallelize, or give from_pretrained dtype="
        )
    if any(torch.is_autocast_enabled(kind) for kind in {"cpu", runner.group.device.type}):
        raise ValueError(
            "torch.autocast around the call changes the dtype of data that stages and patches exchange: load the "
            "pipeline in that dtype instead, with from_pretrained(…, dtype=…), or before parallelize"
        )
