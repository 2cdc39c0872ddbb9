"""Quantised weights: diffusers' own quantisers, fed the parts of a transformer that a rank owns, block by block.

``quantization_config`` of a call and ``quantization_config`` in a checkpoint's ``config.json`` are both served. So what
a rank holds is what plain diffusers holds of the same recipe, while never more than one whole block is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.layout.axes import DEGREES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from patchpipe.loading.checkpoint import Checkpoint

SERVED = ("torchao", "quanto")
_BESIDE = "torchao and quanto are"
_NUNCHAKU = "its kernels are not cut into patches: use TorchAoConfig, or run it on one device"
_INSTEAD = {
    "bitsandbytes": "use TorchAoConfig(Int8WeightOnlyConfig()), which takes the same memory",
    "gguf": "load it with from_single_file and give it as from_pretrained(…, transformer=…), or use TorchAoConfig",
    "nunchaku": _NUNCHAKU,
    "nunchaku_lite": _NUNCHAKU,
}
PART = "transformer"


def check_recipe(settings: Mapping[str, Any], asked: Any, config: ParallelConfig, part: str = PART) -> str | None:
    """Refuses a quantisation that is not served, by configurations alone.

    Args:
        settings: The transformer's ``config.json``.
        asked: What was given as ``quantization_config``.
        config: The layout.
        part: The transformer's name in the pipeline.

    Returns:
        The transformer's recipe, such as ``"torchao"``; ``None`` where its weights are whole.

    Raises:
        ValueError: It is no ``PipelineQuantizationConfig``, the recipe is not served, or not in this layout.
    """
    stored, wanted = settings.get("quantization_config"), of_component(asked, part)
    recipe = _method(stored) if stored is not None else _method(wanted) if wanted is not None else None
    if recipe is not None and recipe not in SERVED:
        advice = _INSTEAD.get(recipe, "use TorchAoConfig")
        whose = "the transformer's weights are" if stored is not None else "quantization_config asks for a transformer"
        raise ValueError(f"{whose} quantised by {recipe}, which is not tested in parts ({_BESIDE}): {advice}")
    if stored is not None and recipe == "quanto":
        raise _stored_quanto()
    if recipe is not None:
        check_layout(recipe, config)
    if config.parallel_vae and of_component(asked, "vae") is not None:
        raise ValueError(
            "parallel_vae=True with a quantised VAE is not tested: name the components to quantise "
            "(components_to_quantize or quant_mapping) without vae, or leave parallel_vae out"
        )
    return recipe


def without_tensor(auto: AutoLayout) -> AutoLayout:
    """The planner's choice among the layouts that quantised weights go with."""
    methods = auto.methods if auto.methods is not None else DEGREES
    return replace(auto, methods=tuple(name for name in methods if name != "tensor"))


def check_layout(recipe: str, config: ParallelConfig) -> None:
    """Refuses the layouts that quantised matrices do not go with.

    Raises:
        ValueError: ``tensor`` splits them, or ``compile`` traces them.
    """
    if config.tensor > 1:
        raise ValueError(
            f"tensor={config.tensor} would split matrices quantised by {recipe}, whose scales belong to whole rows: "
            f"use tensor=1, for example with pipefusion={config.tensor * config.pipefusion}"
        )
    if config.compile:
        raise ValueError(f"compile=True with weights quantised by {recipe} is not tested: leave one of them out")


def check_in_memory(model: nn.Module, config: ParallelConfig) -> None:
    """Refuses a quantised model in memory where its recipe, or the layout with it, is not tested.

    Raises:
        ValueError: It is refused.
    """
    recipe = recipe_in_memory(model)
    if recipe is None:
        return
    if recipe not in (*SERVED, "gguf"):
        advice = _INSTEAD.get(recipe, "use TorchAoConfig")
        raise ValueError(f"the transformer is quantised by {recipe}, which is not tested ({_BESIDE}): {advice}")
    if recipe == "quanto" and any(parameter.is_meta for parameter in model.parameters()):
        raise _stored_quanto()
    check_layout(recipe, config)


def of_component(asked: Any, name: str) -> Any:
    """What a ``PipelineQuantizationConfig`` says of one component; ``None`` where it stays whole.

    Raises:
        ValueError: Something else was given.
    """
    if asked is None:
        return None
    from diffusers import PipelineQuantizationConfig

    if not isinstance(asked, PipelineQuantizationConfig):
        raise ValueError(
            f"quantization_config must be a diffusers.PipelineQuantizationConfig, not a {type(asked).__name__}: "
            f"PipelineQuantizationConfig(quant_mapping={{'transformer': {type(asked).__name__}(…)}})"
        )
    return asked._resolve_quant_config(is_diffusers=True, module_name=name)


def recipe_in_memory(model: nn.Module) -> str | None:
    """How a model that is in memory was quantised, if it was."""
    from torch import nn

    method = getattr(model, "quantization_method", None) if getattr(model, "is_quantized", False) else None
    if method is not None:
        return str(getattr(method, "value", method))
    if any(type(module).__module__.split(".")[0] == "nunchaku" for module in model.modules()):
        return "nunchaku"
    for parameter in model.parameters():
        home = type(parameter).__module__.split(".")[0]
        if type(parameter) is not nn.Parameter and home in ("torchao", "optimum", "bitsandbytes"):
            return "quanto" if home == "optimum" else home
    return None


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor; those of what it is made of, where it is quantised and says the size of what it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(stored_bytes(part) for part in parts if part is not None)


class Quantiser:
    """Quantises one transformer as diffusers does, or reads one that is stored quantised.

    Args:
        settings: The transformer's ``config.json``.
        asked: The ``quantization_config`` of the call.
        dtype: Of what stays whole.

    Attributes:
        dtype: The same, as the recipe wants it.

    Raises:
        ValueError: The recipe's library is missing, or it cannot be used here.
    """

    def __init__(self, settings: Mapping[str, Any], asked: Any, dtype: torch.dtype, part: str = PART) -> None:
        from diffusers.quantizers import DiffusersAutoQuantizer

        stored, wanted = settings.get("quantization_config"), of_component(asked, part)
        recipe = wanted if stored is None else DiffusersAutoQuantizer.merge_quantization_configs(dict(stored), wanted)
        try:
            self._quantiser: Any = DiffusersAutoQuantizer.from_config(recipe, pre_quantized=stored is not None)
            self._quantiser.validate_environment(torch_dtype=dtype, device_map=None)
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"the transformer cannot be quantised here: {error}") from error
        self.dtype: torch.dtype = self._quantiser.update_torch_dtype(dtype)

    def prepare(self, model: Any, checkpoint: Checkpoint) -> None:
        """Readies a model without weights for those that are to come."""
        files = [str(file) for file in checkpoint.files]
        self._quantiser.maybe_update_loaded_keys(checkpoint.names, files)
        kept = getattr(model, "_keep_in_fp32_modules", None) or []
        self._kept = [kept] if isinstance(kept, str) else list(kept)
        self._quantiser.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=self._kept)

    def fill(
        self,
        model: Any,
        checkpoint: Checkpoint,
        needed: Callable[[str], bool],
        blocks: list[str],
        device: torch.device,
    ) -> None:
        """Reads and quantises what is needed, a block at a time.

        Args:
            model: The transformer, prepared.
            checkpoint: Its weights.
            needed: Whether this rank holds the parameter of a name.
            blocks: The names of the blocks.
            device: Where this rank computes.

        Raises:
            ValueError: The checkpoint lacks some of it.
        """
        from diffusers.models.model_loading_utils import load_model_dict_into_meta

        for names in _by_block([name for name in checkpoint.names if needed(name)], blocks):
            tensors = self._quantiser.maybe_update_state_dict(checkpoint.read(names))
            load_model_dict_into_meta(
                model,
                tensors,
                dtype=self.dtype,
                hf_quantizer=self._quantiser,
                keep_in_fp32_modules=self._kept,
                device_map={"": device},
                unexpected_keys=[],
            )
        checkpoint.check_complete([name for name, one in model.named_parameters() if one.is_meta and needed(name)])
        self._quantiser.postprocess_model(model)
        model.hf_quantizer = self._quantiser


def _stored_quanto() -> ValueError:
    """Tensors that diffusers reads from such files say that they are on ``meta``, where nothing can be computed."""
    return ValueError(
        "the transformer is stored as quantised by quanto, whose tensors tell a wrong device once they are read: load "
        "the whole weights with quantization_config=PipelineQuantizationConfig(…), or use TorchAoConfig"
    )


def _by_block(names: list[str], blocks: list[str]) -> list[list[str]]:
    """Names sorted by the block, or else the part of the model, that they belong to."""
    homes: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        home = next((block for block in (".".join(parts[:2]), ".".join(parts[:3])) if block in blocks), parts[0])
        homes.setdefault(home, []).append(name)
    return list(homes.values())


def _method(settings: Any) -> str:
    """The recipe's name in a quantisation config, be it stored as plain data."""
    found = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    if found is None and isinstance(settings, Mapping) and ({"load_in_8bit", "load_in_4bit"} & settings.keys()):
        return "bitsandbytes"
    return str(getattr(found, "value", found))
