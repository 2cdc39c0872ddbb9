"""``/v1/images``: pictures from prompts, and from pictures, at once or as a stream of events."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from PIL import Image
from starlette.responses import Response, StreamingResponse

from patchpipe.serve import media
from patchpipe.serve.refusals import Refusal, bad
from patchpipe.serve.service import Service
from patchpipe.serve.web import answers
from patchpipe.serve.web.bodies import EditAsked, PictureAsked
from patchpipe.serve.web.follow import BEAT, Following
from patchpipe.serve.web.reading import Sent, check, read_body
from patchpipe.serve.work.asking import ask, choose_model, pictures_given
from patchpipe.serve.work.tickets import Ended, Event, Painted, Partial, Stepped, Work

KEEP_ALIVE = 15.0  # seconds of silence after which a proxy may give up
MOST_PICTURES = 16  # to start from
router = APIRouter(prefix="/v1/images", tags=["images"])


@router.post("/generations")
async def generate(request: Request) -> Response:
    """Paint pictures from a prompt."""
    service: Service = request.app.state.service
    limits = service.settings.limits
    asked = check(await read_body(request, limits.prompt * 4), PictureAsked).model_dump(exclude_none=True)
    model = choose_model(service.models, asked.get("model"), "picture")
    work = ask(request.state.id, model, "picture", asked, limits, service.settings.lora_folder)
    return await _answer(service, work, asked, request, "image_generation")


@router.post("/edits")
async def edit(request: Request) -> Response:
    """Paint a picture anew, all of it or where a mask is transparent."""
    service: Service = request.app.state.service
    limits = service.settings.limits
    sent = await read_body(request, limits.prompt * 4, forms=True)
    asked = check(sent, EditAsked).model_dump(exclude_none=True)
    model = choose_model(service.models, asked.get("model"), "picture", edits=True)
    pictures, mask = await run_in_threadpool(_read_pictures, sent, limits.upload_pixels)
    given = pictures_given(pictures, mask, model)
    work = ask(request.state.id, model, "picture", asked, limits, service.settings.lora_folder, given)
    return await _answer(service, work, asked, request, "image_edit")


def _read_pictures(sent: Sent, most_pixels: int) -> tuple[list[Image.Image], Image.Image | None]:
    files = sent.files
    for name in set(files) - {"image", "mask"}:
        raise bad(f"unknown file {name[:80]!r}: send image, image[] and mask", name[:80], "unknown_parameter")
    if not files.get("image"):
        raise bad("image is missing: send a file", "image", "missing")
    if len(files["image"]) > MOST_PICTURES or len(files.get("mask", [])) > 1:
        raise bad(f"send up to {MOST_PICTURES} pictures and one mask", "image")
    pictures = [media.decode_upload(data, most_pixels, "image") for data in files["image"]]
    if "mask" not in files:
        return pictures, None
    mask = media.decode_upload(files["mask"][0], most_pixels, "mask", "RGBA")
    return pictures, mask.getchannel("A").point(lambda alpha: 255 - alpha)  # diffusers paints where it is white


# -- answers -------------------------------------------------------------------------------------


async def _answer(service: Service, work: Work, asked: Mapping[str, Any], request: Request, name: str) -> Response:
    work = replace(work, traceparent=request.state.traceparent)
    following = await Following.begin(service, work, request)
    if asked.get("stream"):
        events = _stream(following, work, asked, name)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    end = await following.end()
    if end is None:
        return Response(status_code=499)
    if isinstance(end, Ended):
        raise end.refusal
    return answers.Json(await run_in_threadpool(_whole, end, work, asked))


def _whole(painted: Painted, work: Work, asked: Mapping[str, Any]) -> dict[str, Any]:
    data = [{"b64_json": _encode(one, asked), "seed": seed} for one, seed in _pairs(painted, work)]
    fields = answers.picture_fields(asked, _size(painted.outputs[0]))
    return {"created": answers.now(), "data": data, **fields, "seconds": round(painted.seconds, 3)}


async def _stream(following: Following, work: Work, asked: Mapping[str, Any], name: str) -> AsyncIterator[bytes]:
    silent = 0.0
    async for event in following.events():
        frames = b"" if event is None else await run_in_threadpool(_events, event, work, asked, name)
        if frames:
            silent = 0.0
            yield frames
            continue
        silent += BEAT
        if silent >= KEEP_ALIVE:
            silent = 0.0
            yield KEEPALIVE_COMMENT


def _events(event: Event, work: Work, asked: Mapping[str, Any], name: str) -> bytes:
    """What a client is sent of an event; nothing of most."""
    if isinstance(event, Partial):
        shown = {"b64_json": _encode(event.image, asked), "partial_image_index": event.index}
        return _event(f"{name}.partial_image", event.image, asked, shown)
    if isinstance(event, Painted):
        [(picture, seed)] = _pairs(event, work)
        shown = {"b64_json": _encode(picture, asked), "seed": seed, "seconds": round(event.seconds, 3)}
        return _event(f"{name}.completed", picture, asked, shown)
    if isinstance(event, Ended):
        return format_sse_event(event="error", data_str=json.dumps(event.refusal.body()))
    if isinstance(event, Stepped) and asked.get("progress"):
        told = {"type": "patchpipe.progress", "step": event.step, "total": event.total}
        return format_sse_event(event="patchpipe.progress", data_str=json.dumps(told))
    return b""


def _event(name: str, picture: Image.Image, asked: Mapping[str, Any], shown: Mapping[str, Any]) -> bytes:
    fields = {"type": name, "created_at": answers.now(), **answers.picture_fields(asked, _size(picture)), **shown}
    return format_sse_event(event=name, data_str=json.dumps(fields))


def _pairs(painted: Painted, work: Work) -> list[tuple[Image.Image, int]]:
    if not all(isinstance(one, Image.Image) for one in painted.outputs):
        raise Refusal(500, f"{work.model} gave no pictures", code="no_pictures")
    return list(zip(painted.outputs, work.seeds, strict=True))


def _encode(picture: Image.Image, asked: Mapping[str, Any]) -> str:
    quality = asked.get("output_compression")
    data = media.encode_picture(picture, asked.get("output_format") or "png", 100 if quality is None else quality)
    return base64.b64encode(data).decode()


def _size(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"
