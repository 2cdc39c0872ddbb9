"""What ``/openapi.json`` says of bodies and answers, with this service's own limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field

from patchpipe.serve.settings import Limits, Settings
from patchpipe.serve.web.bodies import ClipAsked, EditAsked, PictureAsked
from patchpipe.serve.work.asking import MULTIPLE

# -- answers -------------------------------------------------------------------------------------


class Problem(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problems(BaseModel):
    """Every answer that is none."""

    error: Problem


class PictureGiven(BaseModel):
    """One picture."""

    b64_json: str = Field(description="The file.")
    seed: int


class Pictures(BaseModel):
    """Pictures that were painted."""

    created: int
    data: list[PictureGiven]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: str
    size: str
    seconds: float = Field(description="Of work, without waiting.")


class Video(BaseModel):
    """A clip, as far as it is."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str | None
    size: str | None
    prompt: str
    remixed_from_video_id: None
    error: dict[str, str] | None


class Videos(BaseModel):
    """Some clips."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A clip that is forgotten."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class ModelShown(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsShown(BaseModel):
    """The models there are."""

    object: Literal["list"]
    data: list[ModelShown]


class State(BaseModel):
    """Models, devices and the queue."""

    ready: bool
    draining: bool
    models: list[dict[str, Any]]
    policy: str
    running: list[dict[str, Any]]
    paused: list[dict[str, Any]]
    waiting: list[dict[str, Any]]
    limits: dict[str, int]
    loras: list[str]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Ready(BaseModel):
    """Whether it can paint, and each model, or why it cannot."""

    ready: bool
    draining: bool
    models: dict[str, str]


# -- routes --------------------------------------------------------------------------------------

REFUSALS = {
    400: "A field is wrong, unknown or asks for too much.",
    401: "No key, or a wrong one.",
    403: "A page of another origin.",
    404: "No such model, LoRA or clip.",
    413: "The body or a picture in it is too large.",
    415: "The body is of another type.",
    416: "The range lies outside the file.",
    421: "A host name that is not this machine's.",
    429: "Too many requests wait, or this one would be late; see Retry-After.",
    500: "It could not be painted.",
    503: "No worker can paint now; see Retry-After.",
}
_ALWAYS = (403, 413, 421)
_PAINTING = (400, 404, 413, 415, 429, 500, 503)
_JSON, _FORM = "application/json", "multipart/form-data"
_FILE = {"type": "string", "format": "binary"}
_FILES = {"type": "array", "items": _FILE, "minItems": 1, "maxItems": 16, "description": "One, or several as image[]."}
_MASK = {**_FILE, "description": "Painted anew where it is transparent, if the pipeline takes one."}
_REFERENCE = {**_FILE, "description": "The picture it starts from, where the model needs one."}


@dataclass(frozen=True)
class Said:
    """What is said of a route, beside its parameters.

    Attributes:
        answer: The answer's fields.
        also: Other types that it may answer with.
        refusals: Statuses of its own refusals.
        body: The body's fields.
        sent: Types of a body.
        files: Files in a form, by field.
        needed: Those that must be there.
    """

    answer: type[BaseModel] | None = None
    also: tuple[str, ...] = ()
    refusals: tuple[int, ...] = ()
    body: type[BaseModel] | None = None
    sent: tuple[str, ...] = ()
    files: Mapping[str, Any] | None = None
    needed: tuple[str, ...] = ()


_STREAM = ("text/event-stream",)
_CLIP_FILES = ("video/mp4", "image/webp", "image/jpeg")
ROUTES: Mapping[tuple[str, str], Said] = {
    ("post", "/v1/images/generations"): Said(Pictures, _STREAM, _PAINTING, PictureAsked, (_JSON,)),
    ("post", "/v1/images/edits"): Said(
        Pictures, _STREAM, _PAINTING, EditAsked, (_FORM,), {"image": _FILES, "mask": _MASK}, ("image",)
    ),
    ("post", "/v1/videos"): Said(Video, (), _PAINTING, ClipAsked, (_FORM, _JSON), {"input_reference": _REFERENCE}),
    ("get", "/v1/videos"): Said(Videos, refusals=(400, 404)),
    ("get", "/v1/videos/{video_id}"): Said(Video, refusals=(404,)),
    ("delete", "/v1/videos/{video_id}"): Said(VideoDeleted, refusals=(404,)),
    ("get", "/v1/videos/{video_id}/content"): Said(also=_CLIP_FILES, refusals=(400, 404, 416)),
    ("get", "/v1/models"): Said(ModelsShown),
    ("get", "/v1/models/{name}"): Said(ModelShown, refusals=(404,)),
    ("get", "/v1/state"): Said(State),
    ("get", "/healthz"): Said(Health),
    ("get", "/readyz"): Said(Ready),
    ("get", "/metrics"): Said(also=("text/plain",)),
}


def describe(app: FastAPI, settings: Settings) -> Callable[[], dict[str, Any]]:
    """Makes what ``app.openapi`` should be: FastAPI's description, completed."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for path, operations in found["paths"].items():
            for method, operation in operations.items():
                said = ROUTES[method, path]
                operation["responses"] = _answers(path, said, settings, schemas)
                if said.body is not None:
                    operation["requestBody"] = _body(said, settings.limits)
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422: here it is a 400
            schemas.pop(unused, None)
        if settings.api_keys:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
        return found

    return openapi


def _answers(path: str, said: Said, settings: Settings, schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": _FILE} for kind in said.also}
    if said.answer is not None:
        content[_JSON] = {"schema": _reference(said.answer, schemas)}
    found = {"200": {"description": "It is there.", "content": content}}
    if path.endswith("/content"):
        found["206"] = {"description": "A range of it.", "content": content}
    if path == "/readyz":
        found["503"] = {"description": "It cannot paint now.", "content": content}
    guarded = (401,) if settings.api_keys else ()
    for status in sorted({*said.refusals, *_ALWAYS, *guarded}):
        schema = _reference(Problems, schemas)
        found[str(status)] = {"description": REFUSALS[status], "content": {_JSON: {"schema": schema}}}
    return found


def _reference(kind: type[BaseModel], schemas: dict[str, Any]) -> dict[str, str]:
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    schemas[kind.__name__] = schema
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _body(said: Said, limits: Limits) -> dict[str, Any]:
    assert said.body is not None
    content = {}
    for kind in said.sent:
        schema = said.body.model_json_schema()
        _limit(schema["properties"], limits)
        if kind == _FORM:
            schema["properties"] = {name: _in_form(field) for name, field in schema["properties"].items()}
            schema["properties"] |= said.files or {}
            schema["required"] = [*schema.get("required", ()), *said.needed]
        content[kind] = {"schema": schema}
    return {"required": True, "content": content}


def _in_form(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field of a form, which has no ``null``: what is not sent is left out."""
    rest = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    return {**rest, **kinds[0]} if len(kinds) == 1 else {**rest, "anyOf": kinds} if kinds else rest


def _limit(fields: Mapping[str, Any], limits: Limits) -> None:
    """Writes this service's limits beside the types."""
    side = {"minimum": MULTIPLE, "multipleOf": MULTIPLE, "maximum": limits.pixels // MULTIPLE}
    told: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": limits.prompt},
        "negative_prompt": {"maxLength": limits.prompt},
        "num_inference_steps": {"maximum": limits.steps},
        "height": side,
        "width": side,
        "n": {"maximum": limits.pictures},
        "partial_images": {"maximum": limits.previews},
        "num_frames": {"maximum": limits.frames},
    }
    for name, more in told.items():
        if name in fields:
            (fields[name]["anyOf"][0] if "anyOf" in fields[name] else fields[name]).update(more)
