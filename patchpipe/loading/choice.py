"""Which pipeline class serves a model: the one it was saved as, one that is named, or diffusers' own for a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchpipe.errors import UnsupportedModel, did_you_mean
from patchpipe.loading.schedulers import build_scheduler, full_name, scheduler_class, scheduler_settings
from patchpipe.loading.source import read_index

_ENDING = "Pipeline"
ORIGINAL = "_patchpipe_original"  # where the class of a parallel pipeline has its own
_PERTURBED = "_set_pag_attn_processor"
TASKS = ("text-to-image", "image-to-image", "inpainting")


@contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers says of optional libraries while diffusers loads classes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def choose_class(
    index: Mapping[str, Any], pipeline: str | type | None = None, task: str | None = None, given: Iterable[str] = ()
) -> type[Any]:
    """The pipeline class that is to serve a model.

    Args:
        index: What the model's ``model_index.json`` says.
        pipeline: A pipeline class of diffusers by its name, or a class; ``None`` takes the one the model was saved as.
        task: ``"text-to-image"``, ``"image-to-image"`` or ``"inpainting"``: the class that diffusers' AutoPipeline
            takes for it.
        given: Names of components that are given beside the model's own.

    Raises:
        ValueError: There is no such class or task, or the class does not fit the model.
        UnsupportedModel: This diffusers does not know the class the model was saved as.
    """
    if pipeline is not None and task is not None:
        raise ValueError(f"pipeline={_name(pipeline)!r} and task={task!r} both name a class: leave one of them out")
    saved = _saved_class(index)
    if task is not None:
        kind = _class_for_task(saved, task)
    elif pipeline is None:
        return saved
    else:
        _refuse_modular(pipeline)
        kind = pipeline if isinstance(pipeline, type) else _class_named(pipeline, saved)
    if kind is not saved:
        _check_fits(kind, index, set(given))
    return kind


def tasks_of(saved: type[Any]) -> dict[str, type[Any]]:
    """The pipeline class for each task on the weights of a class, as diffusers' AutoPipeline has them."""
    with quietly():
        from diffusers.pipelines import auto_pipeline as auto

    maps = (
        auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_INPAINT_PIPELINES_MAPPING,
    )  # fmt: skip
    found = {
        task: auto._get_task_class(mapping, saved.__name__, throw_error_if_not_exist=False)
        for task, mapping in zip(TASKS, maps, strict=True)
    }
    return {task: kind for task, kind in found.items() if kind is not None}


def _class_for_task(saved: type[Any], task: str) -> type[Any]:
    if task not in TASKS:
        raise ValueError(f"task={task!r} is none of {', '.join(TASKS)}")
    known = tasks_of(saved)
    if task not in known:
        others = f"its pipelines there do {', '.join(known)}" if known else "AutoPipeline does not know it"
        raise ValueError(f"diffusers has no pipeline for {task} on the weights of {saved.__name__}: {others}")
    return known[task]


def _saved_class(index: Mapping[str, Any]) -> type[Any]:
    import diffusers

    with quietly():
        found = getattr(diffusers, str(index["_class_name"]), None)
    if found is None:
        raise UnsupportedModel(
            f"this diffusers ({diffusers.__version__}) has no pipeline class {index['_class_name']}: upgrade it"
        )
    return found


def _refuse_modular(pipeline: str | type) -> None:
    """Refuses a modular pipeline, or blocks of one: a folder is loaded as an ordinary pipeline.

    Raises:
        ValueError: It is one; says how it comes to the parts of a parallel pipeline.
    """
    import diffusers

    name = _name(pipeline)
    with quietly():
        found = getattr(diffusers, name, None) if isinstance(pipeline, str) else pipeline
    kinds = (diffusers.ModularPipeline, diffusers.ModularPipelineBlocks)
    if isinstance(found, type) and issubclass(found, kinds):
        raise ValueError(
            f"{name} is modular, and a folder is loaded as an ordinary pipeline: under torchrun, load that one with "
            f"pipe = patchpipe.from_pretrained(path, config), and give its parts to a modular one with "
            f"modular.update_components(**pipe.components); it is then parallel too"
        )


def _class_named(name: str, saved: type[Any]) -> type[Any]:
    import diffusers

    with quietly():
        found = getattr(diffusers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        return found
    stems = [one.removesuffix(_ENDING) for one in dir(diffusers) if one.endswith(_ENDING)]
    near = did_you_mean(name.removesuffix(_ENDING), stems)
    served = list(dict.fromkeys(kind.__name__ for kind in tasks_of(saved).values()))
    others = ", ".join(served or [saved.__name__])
    hint = f"did you mean '{near}{_ENDING}'?" if near else f"on these weights there are {others}"
    raise ValueError(f"diffusers has no pipeline class {name!r}: {hint}")


def _check_fits(kind: type[Any], index: Mapping[str, Any], given: set[str]) -> None:
    """Compares what a class is made of with what the model has.

    Raises:
        ValueError: It takes no transformer or one of another class, or it needs something the model lacks.
    """
    if not hasattr(kind, "_get_signature_types"):
        raise ValueError(f"{kind.__name__} is no pipeline class of diffusers")
    check_served(kind)
    own = (index.get("transformer") or [None, None])[1]
    types = kind._get_signature_types()
    if "transformer" not in types:
        raise ValueError(f"{kind.__name__} has no transformer, and so does not run on this model's {own}")
    taken = [one.__name__ for one in types["transformer"] if isinstance(one, type)]
    if taken and own not in taken and "transformer" not in given:
        raise ValueError(f"{kind.__name__} runs on {' or '.join(taken)}, but this model's transformer is of {own}")
    expected, _ = kind._get_signature_keys(kind)
    optional = {*kind._optional_components, *_with_defaults(kind), *given}
    missing = sorted(name for name in expected if name not in optional and not (index.get(name) or [None, None])[1])
    if missing:
        raise ValueError(
            f"{kind.__name__} also needs {', '.join(missing)}, which this model does not have: give "
            f"{missing[0]}=… to from_pretrained, or use another pipeline"
        )


def check_served(pipe: Any) -> None:
    """Refuses a pipeline, or a class of such, that changes the blocks of the transformer while it runs.

    Raises:
        ValueError: It is one.
    """
    if hasattr(pipe, _PERTURBED):
        kind = (pipe if isinstance(pipe, type) else original_class(pipe)).__name__
        raise ValueError(
            f"{kind} cannot be served: perturbed attention guidance swaps attention layers of the transformer while it "
            f"runs, and a rank has only its own. Use {kind.replace('PAG', '')}, or {kind} on one device"
        )


def original_class(pipe: Any) -> type:
    """The class of a pipeline, or the one it had before it was parallel."""
    return getattr(type(pipe), ORIGINAL, type(pipe))


def _with_defaults(kind: type[Any]) -> list[str]:
    import inspect

    parameters = inspect.signature(kind.__init__).parameters.values()
    return [one.name for one in parameters if one.default is not one.empty]


def named(options: Mapping[str, Any]) -> tuple[dict[str, Any], Any, str | None]:
    """Options of ``from_pretrained`` without the choice of a class, and the choice: ``pipeline`` and ``task``."""
    rest = dict(options)
    return rest, rest.pop("pipeline", None), rest.pop("task", None)


def choose_for_engine(options: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[dict[str, Any], type[Any] | None]:
    """Options without the choice of a class, and that class, which workers can find by its name.

    Raises:
        ValueError: As for ``choose_class``; or the class is none of diffusers' own.
    """
    rest, pipeline, task = named(options)
    if pipeline is None and task is None:
        return rest, None
    if isinstance(pipeline, type):
        _check_of_diffusers(pipeline)
    return rest, choose_class(index, pipeline, task, rest)


def check_choice(
    kind: type[Any] | None, options: Mapping[str, Any], index: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Checks a scheduler that is given by name, and returns the choices as workers are to be told of them.

    Raises:
        ValueError: There is no such scheduler, or it cannot serve the pipeline.
    """
    chosen: dict[str, Any] = {} if kind is None else {"pipeline": kind.__name__}
    if isinstance(options.get("scheduler"), str):
        serving = kind or choose_class(index)
        scheduler = scheduler_class(options["scheduler"], scheduler_settings(folder), serving)
        chosen["scheduler"] = full_name(options["scheduler"], scheduler)
    return chosen


def load_chosen(pipeline: str | type[Any], folder: str, options: Mapping[str, Any]) -> Any:
    """A pipeline of plain diffusers, with the class and the scheduler that were chosen."""
    import diffusers

    kind = getattr(diffusers, pipeline) if isinstance(pipeline, str) else pipeline
    parts = dict(options)
    if isinstance(parts.get("scheduler"), str):
        saved = kind if isinstance(pipeline, str) else choose_class(read_index(Path(folder)))
        parts["scheduler"] = build_scheduler(parts["scheduler"], scheduler_settings(Path(folder)), saved)
    return kind.from_pretrained(folder, **parts)


def _check_of_diffusers(kind: type[Any]) -> None:
    import diffusers

    if getattr(diffusers, kind.__name__, None) is not kind:
        raise ValueError(
            f"{kind.__name__} is no pipeline class of diffusers, and the engine's workers would not find it: call "
            f"from_pretrained(…, pipeline={kind.__name__}) under torchrun"
        )


def _name(pipeline: str | type) -> str:
    return pipeline if isinstance(pipeline, str) else pipeline.__name__
