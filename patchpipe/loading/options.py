"""The options of diffusers' ``from_pretrained``: which there are, whom each concerns, and which are refused.

Imports nothing heavy unless a name is unknown: the engine looks at its options before it starts anything.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchpipe.loading.choice import quietly

HUB = frozenset({"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"})
_CHOICE_OF_FILES = frozenset(
    {"custom_pipeline", "custom_revision", "load_connected_pipeline", "trust_remote_code", "use_safetensors"}
)
_LOADING = frozenset({"disable_mmap", "low_cpu_mem_usage", "quantization_config"})
_NAMED = frozenset(
    {"dtype", "pipeline", "task", "torch_dtype", "variant"}
)  # arguments of their own, wherever options are taken
KNOWN = HUB | _CHOICE_OF_FILES | _LOADING

_PLACES = "patchpipe places the parts itself: name the devices (devices= of Engine, device= of from_pretrained)"
_ONNX = "patchpipe runs torch models only"
_REFUSED = {
    "device_map": _PLACES,
    "max_memory": _PLACES,
    "offload_folder": _PLACES,
    "offload_state_dict": _PLACES,
    "subfolder": "diffusers takes none for a whole pipeline: give the folder that holds model_index.json itself (of a "
    "hub id, fetch it first: huggingface_hub.snapshot_download(id, allow_patterns='NAME/*'))",
    "mirror": "diffusers no longer knows it: set the environment variable HF_ENDPOINT",
    "resume_download": "downloads always go on where they stopped: leave it out",
    "use_flashpack": "patchpipe reads safetensors: save the model once with save_pretrained",
    "use_onnx": _ONNX,
    "provider": _ONNX,
    "provider_options": _ONNX,
    "sess_options": _ONNX,
}
_NEAR = 0.75  # likeness of a name that was probably meant


@dataclass(frozen=True)
class Options:
    """Checked options.

    Attributes:
        hub: What finds the files: a revision, a cache, a token and the like.
        files: What chooses among them.
        load: How they are loaded, and components given in place of the pipeline's own.
    """

    hub: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)

    @property
    def for_pipeline(self) -> dict[str, Any]:
        """What a pipeline's ``from_pretrained`` still needs when its folder is on this machine."""
        return {**self.files, **self.load}


def read_options(
    given: Mapping[str, Any], index: Mapping[str, Any], kind: type[Any] | None = None, *, parallel: bool = True
) -> Options:
    """Checks the options of a ``from_pretrained`` by their names.

    Args:
        given: The options. ``None`` is the same as left out, except for a component.
        index: What the pipeline's ``model_index.json`` says.
        kind: The class that serves it, where it is not the one it was saved as.
        parallel: Whether patchpipe reads the transformer, not diffusers.

    Raises:
        TypeError: There is no such option or component; names the one that was probably meant.
        ValueError: An option of diffusers that makes no sense here; says what to do instead.
    """
    options = {name: value for name, value in given.items() if value is not None or name not in KNOWN | {*_REFUSED}}
    for name, why in _REFUSED.items():
        if name in options and options[name] is not False:
            raise ValueError(f"{name}={options[name]!r} is not taken: {why}")
    options = {name: value for name, value in options.items() if name not in _REFUSED}
    unknown = [name for name in options if name not in KNOWN]
    if unknown and options.get("custom_pipeline") is None:
        _check_components(unknown, index, kind)
    if parallel and options.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False is not taken: ranks read single tensors, which pickled files do not allow"
        )
    return Options(
        hub={name: value for name, value in options.items() if name in HUB},
        files={name: value for name, value in options.items() if name in _CHOICE_OF_FILES},
        load={name: value for name, value in options.items() if name not in HUB | _CHOICE_OF_FILES},
    )


def _check_components(names: list[str], index: Mapping[str, Any], chosen: type[Any] | None) -> None:
    kind, taken = _components(index, chosen)
    if taken is None:
        return
    for name in names:
        if name not in taken:
            near = difflib.get_close_matches(name, [*KNOWN, *_NAMED, *taken], n=1, cutoff=_NEAR)
            hint = f"did you mean {near[0]!r}?" if near else f"its components are {', '.join(taken)}"
            raise TypeError(f"from_pretrained of {kind} takes no option {name!r}: {hint}")


def _components(index: Mapping[str, Any], chosen: type[Any] | None) -> tuple[str, list[str] | None]:
    """The pipeline's class, and what its constructor takes; ``None`` where this diffusers has no such class."""
    import diffusers

    name = index["_class_name"] if chosen is None else chosen.__name__
    with quietly():
        kind = chosen or (getattr(diffusers, name, None) if isinstance(name, str) else None)
    if kind is None:
        return str(name), None
    return name, [one for one in inspect.signature(kind.__init__).parameters if one != "self"]


def for_workers(options: Options) -> Options:
    """Refuses a transformer from the caller's memory, of which every worker would get a whole copy.

    Raises:
        ValueError: There is one.
    """
    if options.load.get("transformer") is not None:
        raise ValueError(
            "transformer= cannot be given to the engine, whose workers read their own parts of it: save it as the "
            "transformer of a folder, or call parallelize(pipe) under torchrun"
        )
    return options
