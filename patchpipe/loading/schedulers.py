"""Another scheduler for a pipeline, by its name: found, checked, and built from the pipeline's own settings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from patchpipe.errors import did_you_mean

_COLON = ":"
_ENDING = "Scheduler"
_FLOW = "FlowMatch"
_FLOW_SETTINGS = "use_flow_sigmas"
_ENDINGS = re.compile(r"flowmatch|discrete|multistep|scheduler")


def build_scheduler(name: str, settings: Mapping[str, Any], pipeline: type[Any]) -> Any:
    """A scheduler in place of the pipeline's own.

    Args:
        name: A class of diffusers, or short: ``"euler"``, ``"heun"``, ``"unipc"``, ``"dpm++"``, ``"ddim"``; with
            settings of its own after a colon where wished: ``"dpm++:use_karras_sigmas=true,solver_order=3"``.
        settings: The configuration of the pipeline's own scheduler, its class's name among them.
        pipeline: The pipeline's class.

    Raises:
        ValueError: There is no such scheduler, it has no such setting, or it cannot serve the pipeline; names those
            that can.
    """
    kind = scheduler_class(name, settings, pipeline)
    taken = inspect.signature(kind.__init__).parameters
    kept = {key: value for key, value in settings.items() if key in taken}
    if kind.__name__ != settings["_class_name"] and _flows(settings) and _FLOW_SETTINGS in taken:
        kept |= {_FLOW_SETTINGS: True, "prediction_type": "flow_prediction"}
        kept["flow_shift"] = settings.get("flow_shift", settings.get("shift", 1.0))
    return kind(**kept | _parts(name)[1])


def scheduler_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a saved pipeline's own scheduler.

    Raises:
        FileNotFoundError: It is missing.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks scheduler/{file.name}, from which another one takes its settings")
    return json.loads(file.read_text(encoding="utf-8"))


def scheduler_class(name: str, settings: Mapping[str, Any], pipeline: type[Any]) -> type[Any]:
    """The class of a scheduler that can serve a pipeline.

    Args:
        name: As for ``build_scheduler``.
        settings: Likewise.
        pipeline: Likewise.

    Raises:
        ValueError: As there.
    """
    wanted, own = _parts(name)
    settings = {**settings, **own}
    serving = {kind.__name__: kind for kind in schedulers_for(settings, pipeline)}
    short = [kind for kind in serving.values() if _short(kind.__name__) == _short(wanted)]
    kind = serving.get(wanted) or min(short, key=lambda kind: len(kind.__name__), default=None)
    if kind is None:
        raise ValueError(f"{_why_not(wanted, settings, pipeline)}: use {', '.join(sorted(serving))}")
    _check_own(own, kind)
    return kind


def full_name(name: str, kind: type[Any]) -> str:
    """A scheduler's name as asked, with its class's in place of a short one."""
    _, colon, own = name.partition(_COLON)
    return kind.__name__ + colon + own


def _parts(name: str) -> tuple[str, dict[str, Any]]:
    """A scheduler's name and the settings after the colon: ``key=value,…``, values as JSON or else text."""
    wanted, _, own = name.partition(_COLON)
    found: dict[str, Any] = {}
    for part in own.split(",") if own else ():
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign:
            raise ValueError(f"scheduler {name!r}: {part!r} must look like key=value, such as use_karras_sigmas=true")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return wanted, found


def _check_own(own: Mapping[str, Any], kind: type[Any]) -> None:
    taken = set(inspect.signature(kind.__init__).parameters) - {"self"}  # type: ignore[misc]
    for key in own.keys() - taken:
        near = did_you_mean(key, sorted(taken))
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(sorted(taken))}"
        raise ValueError(f"{kind.__name__} has no setting {key!r}: {hint}")


def schedulers_for(settings: Mapping[str, Any], pipeline: type[Any]) -> list[type[Any]]:
    """The scheduler classes that can serve a pipeline: those of its kind of noise, with the methods it calls."""
    import diffusers

    own = getattr(diffusers, str(settings["_class_name"]))
    if _flows(settings):
        kinds = [own, *filter(_knows_flows, _all_schedulers())]
    else:
        kinds = [own, *(kind for kind in own._get_compatibles() if not _lacks_library(kind))]
    serving = {kind.__name__: kind for kind in kinds if kind is own or not _lacking(kind, settings, pipeline)}
    return [serving[name] for name in sorted(serving)]


def _all_schedulers() -> list[type[Any]]:
    import diffusers

    found = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    return [kind for kind in found if not _lacks_library(kind)]


def _names() -> list[str]:
    return [kind.__name__ for kind in _all_schedulers()]


def _knows_flows(kind: type[Any]) -> bool:
    name, taken = kind.__name__, inspect.signature(kind.__init__).parameters
    return name.startswith(_FLOW) or ({_FLOW_SETTINGS, "flow_shift"} <= set(taken) and "Inverse" not in name)


def _lacks_library(kind: type[Any]) -> bool:
    """Whether it stands in for a class that needs a library that is not installed."""
    return "_backends" in vars(kind)


def _flows(settings: Mapping[str, Any]) -> bool:
    """Whether the model predicts a flow, not noise."""
    return str(settings["_class_name"]).startswith(_FLOW) or settings.get("prediction_type") == "flow_prediction"


def _lacking(kind: type[Any], settings: Mapping[str, Any], pipeline: type[Any]) -> str | None:
    """What of a scheduler the pipeline's code uses that this one has not."""
    call = _code(pipeline.__call__)  # type: ignore[operator]
    taken = inspect.signature(kind.set_timesteps).parameters  # type: ignore[attr-defined]
    if "linspace" in call.co_names:  # FLUX's and Qwen-Image's work out the noise levels themselves
        leaves_them = _FLOW_SETTINGS in call.co_consts and _FLOW_SETTINGS in inspect.signature(kind.__init__).parameters
        for argument in ("mu",) if leaves_them else ("sigmas", "mu"):
            if argument not in taken:
                return f"set_timesteps({argument}=…)"
        if "sigmas" not in taken and not settings.get("use_dynamic_shifting"):
            return "set_timesteps(mu=…), here without dynamic shifting"
    methods = [method for method in vars(pipeline).values() if inspect.isfunction(inspect.unwrap(method))]
    used = {name for method in methods for name in _code(method).co_names}
    missing = [name for name in ("scale_noise", "add_noise") if name in used and not hasattr(kind, name)]
    return f"{missing[0]}()" if missing else None


def _code(function: Any) -> CodeType:
    return inspect.unwrap(function).__code__


def _why_not(name: str, settings: Mapping[str, Any], pipeline: type[Any]) -> str:
    same = [kind for kind in _all_schedulers() if name == kind.__name__ or _short(kind.__name__) == _short(name)]
    if not same:
        near = did_you_mean(name.removesuffix(_ENDING), [one.removesuffix(_ENDING) for one in _names()])
        return f"diffusers has no scheduler {name!r}" + (f" (did you mean '{near}{_ENDING}'?)" if near else "")
    kind = same[0]
    if _flows(settings) and not _knows_flows(kind):
        return f"{kind.__name__} denoises models that predict noise, but {pipeline.__name__}'s predicts a flow"
    if not _flows(settings) and kind.__name__.startswith(_FLOW):
        return f"{kind.__name__} denoises models that predict a flow, but {pipeline.__name__}'s predicts noise"
    lacking = _lacking(kind, settings, pipeline)
    return f"{kind.__name__} cannot serve {pipeline.__name__}" + (f", which calls {lacking}" if lacking else "")


def _short(name: str) -> str:
    """A scheduler's name without the words that many have: ``FlowMatchEulerDiscreteScheduler`` is ``euler``."""
    plain = re.sub(r"[^a-z0-9+]", "", name.lower()).replace("dpm++", "dpmsolver")
    return _ENDINGS.sub("", plain)
