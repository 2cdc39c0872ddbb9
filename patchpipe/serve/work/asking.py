"""From what a client asks to what a pipeline takes: checked against the model and the limits before anything starts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from patchpipe.engine.requests import guidance_name
from patchpipe.errors import did_you_mean
from patchpipe.serve.refusals import Refusal, bad
from patchpipe.serve.settings import Limits
from patchpipe.serve.work.model import Facts, Model
from patchpipe.serve.work.tickets import Kind, Work

MULTIPLE = 16  # of pixels: a token of the models there are is so wide
USUAL_FRAMES_PER_SECOND = 16
_AREA = 1024 * 1024  # pixels most models were trained on, where a model's folder says nothing
_PASSED_ON = (
    "num_inference_steps",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "strength",
    "max_sequence_length",
)


def choose_model(models: Mapping[str, Model], name: str | None, kind: Kind, edits: bool = False) -> Model:
    """The model that serves a request.

    Args:
        models: All there are.
        name: As the client calls it; ``None`` takes the first that can.
        kind: What it is to make.
        edits: Whether it is to start from a picture.

    Raises:
        Refusal: There is none, or it cannot.
    """
    named = [model for model in models.values() if name in (None, model.public)]
    if not named:
        known = sorted({model.public for model in models.values()})
        near = did_you_mean(str(name), known)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
        raise Refusal(404, f"there is no model {name!r}: {hint}", code="model_not_found", param="model")
    able = [one for one in named if one.facts.clips == (kind == "clip") and _takes(one, kind, edits)]
    if able:
        return able[0]
    whose = f"{name} makes" if name else "the models here make"
    if kind == "clip":
        raise bad(f"{whose} no clips: use /v1/images/generations", "model")
    if all(one.facts.clips for one in named):
        raise bad(f"{whose} clips: use /v1/videos", "model")
    raise bad(f"{whose} no pictures from pictures: start the service with --edits", "model")


def _takes(model: Model, kind: Kind, edits: bool) -> bool:
    if kind == "clip":
        return True
    return ("image" in model.facts.arguments) if edits else not model.for_edits


def ask(
    request_id: str,
    model: Model,
    kind: Kind,
    asked: Mapping[str, Any],
    limits: Limits,
    loras: Path | None,
    images: Mapping[str, Any] | None = None,
) -> Work:
    """A request's work.

    Args:
        request_id: Its name.
        model: Who paints it.
        kind: What it is.
        asked: The fields a client sent, each of the right type; absent ones are ``None`` or missing.
        limits: How much it may ask for.
        loras: Folder of the LoRAs there are.
        images: The pictures it starts from, by the pipeline's names.

    Raises:
        Refusal: A field is wrong, or asks for too much.
    """
    facts = model.facts
    given = {name: asked[name] for name in _PASSED_ON if asked.get(name) is not None}
    given |= size_of(asked) | _guidance(asked, facts) | dict(images or {})
    if kind == "clip":
        given |= _frames(asked)
    advised = {name: value for name, value in facts.advised.items() if name in facts.arguments}
    arguments = {**advised, **given, "prompt": _prompt(asked.get("prompt"), "prompt", limits)}
    _fit_to_picture(arguments, given, facts)
    _check_names(given, model)
    _check_sizes(arguments, kind, limits)
    _check_negative(given, arguments, model, limits)
    steps = arguments.get("num_inference_steps", facts.usual("num_inference_steps"))
    if isinstance(steps, int) and steps > limits.steps:
        raise bad(f"num_inference_steps is {steps}: {limits.steps} are allowed", "num_inference_steps")
    return Work(
        id=request_id,
        model=model.name,
        kind=kind,
        arguments=arguments,
        seeds=_seeds(asked, limits),
        steps=steps if isinstance(steps, int) else None,
        loras=read_loras(asked.get("lora"), loras),
        previews=_previews(asked, limits),
        deadline_s=asked.get("deadline_s"),
        priority=asked.get("priority") or 0,
    )


def size_of(asked: Mapping[str, Any]) -> dict[str, int]:
    """Height and width, as ``size`` has them.

    Raises:
        Refusal: It is no size, or says other than ``height`` and ``width``.
    """
    size = asked.get("size")
    if size in (None, "auto"):
        return {}
    width, cross, height = str(size).lower().partition("x")
    if not cross or not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise bad(f"size {str(size)[:40]!r} must be WIDTHxHEIGHT in pixels, such as 1024x1024, or auto", "size")
    if max(len(width), len(height)) > 6:
        raise bad(f"size {str(size)[:40]!r} is too large", "size")
    found = {"height": int(height), "width": int(width)}
    for name, value in found.items():
        if asked.get(name) not in (None, value):
            raise bad(f"size says a {name} of {value}, and {name} says {asked[name]}: leave one out", name)
    return found


def read_loras(given: Any, folder: Path | None) -> tuple[tuple[str, float], ...]:
    """The LoRAs a client names: ``{"name": …, "scale": …}``, a list of such, the same as JSON text, or a name.

    Raises:
        Refusal: It is none of these, or there is no such LoRA.
    """
    if given in (None, "", [], {}):
        return ()
    if isinstance(given, str) and given.lstrip()[:1] in ("{", "["):
        try:
            given = json.loads(given)
        except ValueError:
            raise bad("lora is text that is no JSON", "lora") from None
    found = [_read_lora(one) for one in (given if isinstance(given, list) else [given])]
    known = lora_names(folder)
    for name, _ in found:
        if name not in known:
            have = f"there are {', '.join(known)}" if known else "this service has none (--lora-folder)"
            raise bad(f"there is no LoRA {name[:80]!r}: {have}", "lora", "lora_not_found")
    if len({name for name, _ in found}) < len(found):
        raise bad("lora names the same one twice", "lora")
    return tuple(sorted(found))


def lora_names(folder: Path | None) -> list[str]:
    """Names of the LoRAs that requests may name: files of a folder; a name with a dot in it names no module."""
    files = [] if folder is None else folder.glob("*.safetensors")
    return sorted(file.stem for file in files if "." not in file.stem)


def _read_lora(one: Any) -> tuple[str, float]:
    if isinstance(one, str):
        return one, 1.0
    if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
        raise bad('lora must be {"name": NAME, "scale": 1.0}: files and addresses are not taken', "lora")
    if set(one) - {"name", "scale"}:
        raise bad(f"lora has fields beside name and scale: {', '.join(sorted(set(one) - {'name', 'scale'}))}", "lora")
    try:
        scale = float(one.get("scale", 1.0))
    except (TypeError, ValueError):
        scale = float("nan")
    if not -10 <= scale <= 10:
        raise bad("lora.scale must be a number from -10 to 10", "lora")
    return one["name"], scale


def _prompt(text: Any, name: str, limits: Limits) -> str:
    if not isinstance(text, str) or not text.strip():
        raise bad(f"{name} is missing: say what to paint", name, "missing")
    if len(text) > limits.prompt:
        raise bad(
            f"{name} has {len(text):,} characters: {limits.prompt:,} are allowed", name, "string_above_max_length"
        )
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise bad(f"{name} holds characters that are none (NUL, or half of a pair)", name)
    return text


def _guidance(asked: Mapping[str, Any], facts: Facts) -> dict[str, float]:
    """The guidance strength, under the name that the model's folder advises or the pipeline looks at."""
    advised = "true_cfg_scale" in facts.advised
    name = "true_cfg_scale" if advised else guidance_name(facts.arguments, facts.defaults)
    found = {} if asked.get("guidance_scale") is None else {name: float(asked["guidance_scale"])}
    if asked.get("true_cfg_scale") is not None:
        found["true_cfg_scale"] = float(asked["true_cfg_scale"])
    return found


def _frames(asked: Mapping[str, Any]) -> dict[str, int]:
    """How many frames a clip has, where the client says: 4·k + 1, as the models' decoders give them."""
    if asked.get("num_frames") is not None or asked.get("seconds") is None:
        return {}
    frames = float(asked["seconds"]) * (asked.get("fps") or USUAL_FRAMES_PER_SECOND)
    return {"num_frames": round(frames / 4) * 4 + 1}


def _fit_to_picture(arguments: dict[str, Any], given: Mapping[str, Any], facts: Facts) -> None:
    """A picture that a request starts from gives its shape, where no size is asked for."""
    picture = arguments.get("image")
    if not isinstance(picture, Image.Image) or "height" in given or "width" in given or "width" not in facts.arguments:
        return
    area = (facts.advised.get("height") or 0) * (facts.advised.get("width") or 0) or _AREA
    scale = min(1.0, (area / (picture.width * picture.height)) ** 0.5)
    for name, side in (("width", picture.width), ("height", picture.height)):
        arguments[name] = max(MULTIPLE, int(side * scale + 1e-6) // MULTIPLE * MULTIPLE)


def _check_names(given: Mapping[str, Any], model: Model) -> None:
    for name in given:
        if name not in model.facts.arguments:
            shown = {"image": "picture to start from", "mask_image": "mask"}.get(name, name)
            param = {"mask_image": "mask"}.get(name, name)
            raise bad(f"{model.public} ({model.facts.pipeline}) takes no {shown}", param, "unsupported_parameter")


def _check_sizes(arguments: Mapping[str, Any], kind: Kind, limits: Limits) -> None:
    height, width = arguments.get("height"), arguments.get("width")
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < MULTIPLE or side % MULTIPLE):
            raise bad(f"{name} is {side}: it must be a multiple of {MULTIPLE}", name)
    if height and width and height * width > limits.pixels:
        raise bad(f"{width} × {height} are {width * height:,} pixels: {limits.pixels:,} are allowed", "size")
    for side in (height, width):
        if side is not None and side * MULTIPLE > limits.pixels:
            raise bad(f"a side of {side} pixels is too long", "size")
    frames = arguments.get("num_frames")
    if kind == "clip" and frames is not None and not 1 <= frames <= limits.frames:
        raise bad(f"{frames} frames are too many: {limits.frames} are allowed", "num_frames")


def _check_negative(given: Mapping[str, Any], arguments: Mapping[str, Any], model: Model, limits: Limits) -> None:
    text = given.get("negative_prompt")
    if not text:
        return
    _prompt(text, "negative_prompt", limits)
    strength = "true_cfg_scale" if "true_cfg_scale" in model.facts.arguments else "guidance_scale"
    value = arguments.get(strength, model.facts.usual(strength))
    if isinstance(value, (int, float)) and value <= 1:
        raise bad(
            f"negative_prompt would have no effect: {model.facts.pipeline} looks at it only with {strength} above 1, "
            f"and that is {value:g}",
            "negative_prompt",
        )


def _seeds(asked: Mapping[str, Any], limits: Limits) -> tuple[int, ...]:
    count = asked.get("n") or 1
    if count > limits.pictures:
        raise bad(f"n is {count}: {limits.pictures} pictures are allowed", "n")
    first = asked.get("seed")
    first = secrets.randbits(32) if first is None else first
    return tuple(first + number for number in range(count))


def _previews(asked: Mapping[str, Any], limits: Limits) -> int:
    wanted = asked.get("partial_images") or 0
    if wanted and not asked.get("stream"):
        raise bad("partial_images needs stream: true", "partial_images")
    if wanted > limits.previews:
        raise bad(f"partial_images is {wanted}: {limits.previews} are allowed", "partial_images")
    if asked.get("stream") and (asked.get("n") or 1) > 1:
        raise bad("a stream shows one picture: n must be 1", "n")
    return wanted


def pictures_given(pictures: Sequence[Image.Image], mask: Image.Image | None, model: Model) -> dict[str, Any]:
    """The pictures a request starts from, under the pipeline's names.

    Raises:
        Refusal: There are several and the model takes one, or the mask has another size.
    """
    if len(pictures) > 1 and "strength" in model.facts.arguments:
        raise bad(f"{model.public} starts from one picture, and {len(pictures)} were sent", "image")
    found: dict[str, Any] = {"image": pictures[0] if len(pictures) == 1 else list(pictures)}
    if mask is not None:
        if mask.size != pictures[0].size:
            raise bad("the mask must have the picture's size", "mask")
        found["mask_image"] = mask
    return found
