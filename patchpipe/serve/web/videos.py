"""``/v1/videos``: clips are accepted at once, painted in their turn, and loaded when they are done."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from patchpipe.serve import media
from patchpipe.serve.clips.jobs import Variant
from patchpipe.serve.clips.store import Clip
from patchpipe.serve.refusals import Refusal, bad
from patchpipe.serve.service import Service
from patchpipe.serve.web import answers
from patchpipe.serve.web.bodies import ClipAsked
from patchpipe.serve.web.reading import Sent, check, read_body
from patchpipe.serve.work.asking import USUAL_FRAMES_PER_SECOND, ask, choose_model

POLL_MILLISECONDS = 1000
router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("")
async def create(request: Request) -> Response:
    """Accept a clip; it is kept from here on, also if the service ends."""
    service: Service = request.app.state.service
    limits = service.settings.limits
    sent = await read_body(request, limits.prompt * 4, forms=True)
    asked = check(sent, ClipAsked).model_dump(exclude_none=True)
    model = choose_model(service.models, asked.get("model"), "clip")
    images = await run_in_threadpool(_read_reference, sent, limits.upload_pixels)
    work = ask(f"video_{request.state.id}", model, "clip", asked, limits, service.settings.lora_folder, images)
    work = replace(work, traceparent=request.state.traceparent)
    if model.down:
        raise Refusal(503, f"{model.public} cannot paint now: {model.cause}", code="model_down", retry_after=30)
    service.check_room()
    await run_in_threadpool(service.check_in_time, work)
    speed = asked.get("fps") or USUAL_FRAMES_PER_SECOND
    # Shielded: a client that leaves now has still been accepted.
    clip = await asyncio.shield(run_in_threadpool(service.clips.create, work, model.public, speed))
    return _answer(clip)


@router.get("")
def page(
    request: Request,
    after: Annotated[str | None, Query(description="Those that follow this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="How many at most.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="The oldest or the newest first.")] = "desc",
) -> Response:
    """Some clips, the newest first."""
    clips, more = _service(request).clips.page(after, limit, order == "desc")
    data = [answers.video(clip) for clip in clips]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return answers.Json({"object": "list", "data": data, **ends, "has_more": more})


@router.get("/{video_id}")
def get(request: Request, video_id: str) -> Response:
    """One clip; a failed one is read as well as any other."""
    return _answer(_service(request).clips.get(video_id))


@router.delete("/{video_id}")
def delete(request: Request, video_id: str) -> Response:
    """Forget a clip; one that is being painted ends at its next step."""
    _service(request).clips.delete(video_id)
    return answers.Json({"id": video_id, "deleted": True, "object": "video.deleted"})


@router.get("/{video_id}/content")
def content(
    request: Request, video_id: str, variant: Annotated[Variant, Query(description="What of it.")] = "video"
) -> Response:
    """A finished clip's file, all of it or a range."""
    path, kind = _service(request).clips.file(video_id, variant)
    return answers.File(
        path, media_type=kind, filename=f"{video_id}{path.suffix}", headers={"Cache-Control": "private"}
    )


def _read_reference(sent: Sent, most_pixels: int) -> dict[str, Any]:
    for name in set(sent.files) - {"input_reference"}:
        raise bad(f"unknown file {name[:80]!r}: send input_reference", name[:80], "unknown_parameter")
    files = sent.files.get("input_reference", [])
    if len(files) > 1:
        raise bad("send one input_reference", "input_reference")
    return {"image": media.decode_upload(files[0], most_pixels, "input_reference")} if files else {}


def _answer(clip: Clip) -> Response:
    return answers.Json(answers.video(clip), headers={"openai-poll-after-ms": str(POLL_MILLISECONDS)})


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found
