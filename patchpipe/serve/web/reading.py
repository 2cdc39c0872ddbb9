"""Reads a request's body, JSON or a form with files, into fields of the right types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from patchpipe.errors import did_you_mean
from patchpipe.serve.refusals import Refusal, bad

Body = TypeVar("Body", bound=BaseModel)
MOST_FILES, MOST_FIELDS = 20, 100
_NESTED = re.compile(r"(\w+)\[(\w*)\]")


@dataclass
class Sent:
    """What came in a body.

    Attributes:
        fields: Values by name.
        files: The bytes of each file, by field.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


async def read_body(request: Request, largest_text: int, *, forms: bool = False) -> Sent:
    """A request's fields and files.

    Args:
        request: The request.
        largest_text: Bytes of a form's longest text.
        forms: Whether forms are taken beside JSON.

    Raises:
        Refusal: It is neither, or broken.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if forms and kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(request, largest_text)
    if kind != "application/json":
        wanted = "application/json or multipart/form-data" if forms else "application/json"
        raise Refusal(415, f"the content type is {kind or 'missing'}: send {wanted}", code="unsupported_media_type")
    try:
        found = await request.json()
    except (ValueError, RecursionError):
        raise bad("the body is no JSON", code="invalid_json") from None
    if not isinstance(found, dict):
        raise bad("the body must be a JSON object", code="invalid_json")
    return Sent(found)


def check(sent: Sent, kind: type[Body]) -> Body:
    """The fields, each of its type.

    Raises:
        Refusal: One is unknown, missing, or of another type.
    """
    try:
        return kind.model_validate(sent.fields)
    except ValidationError as error:
        raise refused(error.errors(), kind) from None


def refused(errors: Sequence[Any], kind: type[BaseModel] | None = None) -> Refusal:
    """The first of the errors found in a body, as the client reads it."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = place[0] if place else ""
    if first["type"] == "extra_forbidden":
        near = did_you_mean(name, list(kind.model_fields)) if kind else None
        hint = f": did you mean {near!r}?" if near else ""
        return bad(f"unknown field {name[:80]!r}{hint}", name[:80], "unknown_parameter")
    if first["type"] == "missing":
        return bad(f"{name} is missing", name, "missing")
    return bad(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", name or None)


def validation_refused(error: RequestValidationError) -> Refusal:
    """What FastAPI found wrong with a path or a query."""
    return refused(error.errors())


async def _read_form(request: Request, largest_text: int) -> Sent:
    sent = Sent()
    try:
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=largest_text) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    sent.files.setdefault(name.removesuffix("[]"), []).append(await value.read())
                elif value != "":
                    _put(sent.fields, name, value)
    except HTTPException as error:
        if error.status_code == 413:
            raise
        raise bad(f"the form cannot be read: {error.detail}", code="invalid_form") from None
    return sent


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """Keeps a form's field; ``lora[name]`` is the field ``name`` in ``lora``, as OpenAI's client writes it."""
    nested = _NESTED.fullmatch(name)
    if nested is None:
        if name in fields:
            raise bad(f"{name[:80]} was sent twice", name[:80])
        fields[name] = value
        return
    outer, inner = nested.groups()
    inside = fields.setdefault(outer, {} if inner else [])
    if inner and isinstance(inside, dict):
        inside[inner] = value
    elif isinstance(inside, list):
        inside.append(value)
    else:
        raise bad(f"{name[:80]} was sent in two ways", outer)
