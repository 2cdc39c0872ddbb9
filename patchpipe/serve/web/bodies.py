"""What clients may send: OpenAI's fields and ours, each with its type. Limits are checked later, against the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

_SWITCHES = ("stream", "progress")
_SEEDS = 2**63 - 1024  # a request's pictures count up from theirs
_SIZE = WithJsonSchema({"type": "string", "pattern": r"^([0-9]{1,6}[xX][0-9]{1,6}|auto)$"})
_ONE_LORA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "scale": {"type": "number", "minimum": -10, "maximum": 10}},
    "required": ["name"],
    "additionalProperties": False,
}
_LORA = WithJsonSchema({"anyOf": [_ONE_LORA, {"type": "array", "items": _ONE_LORA}, {"type": "string"}]})


class _Asked(BaseModel):
    """What pictures and clips have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="Which model paints; by default the first that can.")
    prompt: str = Field(description="What to paint.", json_schema_extra={"minLength": 1, "pattern": r"\S"})
    size: Annotated[str, _SIZE] | None = Field(
        None, description="WIDTHxHEIGHT in pixels, multiples of 16, or auto: the model's."
    )
    user: str | None = Field(None, description="Taken and not looked at.", deprecated=True)
    # Beyond OpenAI's API.
    seed: int | None = Field(
        None, ge=0, le=_SEEDS, description="The same seed gives the same picture; without one, one is drawn and told."
    )
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps; by default the model's.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Guidance strength, as the model takes it.")
    true_cfg_scale: float | None = Field(None, ge=0, le=100, description="Strength of guidance by two calls.")
    negative_prompt: str | None = Field(None, description="What the picture should not show.")
    height: int | None = Field(None, ge=1, description="In pixels, in place of size.")
    width: int | None = Field(None, ge=1, description="In pixels, in place of size.")
    lora: Annotated[dict[str, Any] | list[Any] | str, _LORA] | None = Field(
        None, description='{"name": NAME, "scale": 1.0}, or several; as text, its JSON.'
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Seconds by which it should be there; by default three times those alone on the idle machine.",
    )
    priority: int | None = Field(None, ge=-100, le=100, description="The higher, the sooner; 0 by default.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_numbers_from_truth(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name not in _SWITCHES:
            raise ValueError("must not be true or false")
        return value


class PictureAsked(_Asked):
    """POST /v1/images/generations."""

    n: int | None = Field(None, ge=1, description="Pictures; 1 by default. Their seeds count up.")
    stream: bool | None = Field(None, description="Send events while the picture is painted.")
    partial_images: int | None = Field(None, ge=0, description="Pictures on the way, of a stream.")
    progress: bool | None = Field(None, description="Send patchpipe.progress events too, of a stream.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="PNG by default.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP; 100 by default.")
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come in the answer.")
    background: Literal["opaque", "auto"] | None = Field(None, description="Pictures are opaque.")
    quality: str | None = Field(None, description="Taken and not looked at: see num_inference_steps.")
    style: str | None = Field(None, description="Taken and not looked at.")
    moderation: str | None = Field(None, description="Taken and not looked at.")
    safety_identifier: str | None = Field(None, description="Taken and not looked at.")


class EditAsked(PictureAsked):
    """POST /v1/images/edits, beside the files."""

    strength: float | None = Field(None, ge=0, le=1, description="How much is painted anew.")
    input_fidelity: str | None = Field(None, description="Taken and not looked at: see strength.")


class ClipAsked(_Asked):
    """POST /v1/videos, beside the file."""

    seconds: float | None = Field(
        None, gt=0, le=600, description="How long the clip is; by default as the model's num_frames."
    )
    fps: float | None = Field(None, gt=0, le=120, description="Frames a second; 16 by default.")
    num_frames: int | None = Field(None, ge=1, description="Frames, in place of seconds.")
