"""Answers in OpenAI's shape."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from patchpipe.serve.clips.store import Clip
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.work.model import Model


class Json(Response):
    """An answer in JSON whose text may be anything, also halves of characters."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def refuse(refusal: Refusal) -> Json:
    """An error."""
    return Json(refusal.body(), refusal.status, refusal.headers())


class File(FileResponse):
    """A file, or a range of it; what is wrong with a range is told as every error is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        refused = False

        async def shaped(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refused = True
                told = "there is no such range in the file" if message["status"] == 416 else "the range cannot be read"
                answer = refuse(Refusal(message["status"], told, code="invalid_range", param="range"))
                if within := Headers(raw=message["headers"]).get("content-range"):
                    answer.headers["content-range"] = within
                await answer(scope, receive, send)
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, shaped)


def picture_fields(asked: Mapping[str, Any], size: str) -> dict[str, Any]:
    """What every answer and event about a picture says of it."""
    return {
        "background": "opaque",
        "output_format": asked.get("output_format") or "png",
        "quality": asked.get("quality") or "auto",
        "size": size,
    }


def video(clip: Clip) -> dict[str, Any]:
    """A clip as OpenAI's client reads it."""
    return {
        "id": clip.id,
        "object": "video",
        "model": clip.model,
        "status": clip.status,
        "progress": clip.progress,
        "created_at": int(clip.created_at),
        "completed_at": None if clip.completed_at is None else int(clip.completed_at),
        "expires_at": None if clip.expires_at is None else int(clip.expires_at),
        "seconds": None if clip.seconds is None else f"{clip.seconds:g}",
        "size": clip.size,
        "prompt": clip.prompt,
        "remixed_from_video_id": None,
        "error": dict(clip.error) if clip.error else None,
    }


def model(one: Model, created: int) -> dict[str, Any]:
    """A model as OpenAI's client reads it."""
    return {"id": one.public, "object": "model", "created": created, "owned_by": "patchpipe"}


def now() -> int:
    """Seconds of the Unix epoch."""
    return int(time.time())
