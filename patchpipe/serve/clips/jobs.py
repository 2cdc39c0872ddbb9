"""Clips from the moment they are accepted: kept, painted, begun anew after a restart, deleted."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image

from patchpipe.clips import clips_of, write_clip
from patchpipe.serve import media
from patchpipe.serve.clips.store import Clip, Store
from patchpipe.serve.refusals import Refusal, bad, unknown
from patchpipe.serve.work.tickets import Ended, Event, Listener, Painted, Started, Stepped, Ticket, Work

logger = logging.getLogger("patchpipe.serve")

MOST_BEGINNINGS = 4  # of a clip; a clip that ends the service each time must not do so for ever
Variant = Literal["video", "thumbnail", "spritesheet"]
VARIANTS: Mapping[Variant, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.jpg", "image/jpeg"),
}
_INPUT = "input.png"

Submit = Callable[[Work, Listener], Ticket]
Cancel = Callable[[Ticket], None]


class Clips:
    """The clips of a service.

    Args:
        folder: Where their files are, owned by this process (``own``).
        database: URL of the table.
        keep_hours: Hours after which a finished clip is deleted.
        submit: Has a clip painted.
        cancel: Ends that.

    Raises:
        ValueError: The database cannot be opened.
    """

    def __init__(self, folder: Path, database: str | None, keep_hours: float, submit: Submit, cancel: Cancel) -> None:
        self._folder = folder
        self._store = Store(database or f"sqlite:///{folder / 'queue.sqlite'}")
        self._keep, self._submit, self._cancel = keep_hours * 3600, submit, cancel
        self._tickets: dict[str, Ticket] = {}
        self._encoding = ThreadPoolExecutor(1, "encode")
        self._lock = threading.Lock()
        self._closing = False

    def restore(self) -> int:
        """Goes on with what was accepted before; what was under way begins anew. Returns how many there are."""
        for place in (self._folder / "clips").glob("*"):
            if self._store.get(place.name) is None:  # of a clip that was never accepted
                shutil.rmtree(place, ignore_errors=True)
        clips = self._store.unfinished()
        for clip in clips:
            if clip.attempts >= MOST_BEGINNINGS:
                self._fail(clip.id, "gave_up", f"it was begun {clip.attempts} times, and the service ended each time")
                continue
            self._store.change(clip.id, status="queued", progress=0)
            try:
                self._begin(clip.id, _read_work(clip.work, self._place(clip.id)))
            except Refusal as refusal:
                self._fail(clip.id, refusal.code or "refused", refusal.message)
        return len(clips)

    def create(self, work: Work, model: str, frames_per_second: float) -> Clip:
        """Accepts a clip: it is kept before this returns."""
        place = self._place(work.id)
        place.mkdir(parents=True)
        arguments = dict(work.arguments)
        picture = arguments.pop("image", None)
        if picture is not None:
            media.write_whole(media.encode_picture(picture), place / _INPUT)
        height, width, frames = (arguments.get(name) for name in ("height", "width", "num_frames"))
        clip = self._store.add(
            id=work.id,
            status="queued",
            progress=0,
            model=model,
            prompt=arguments["prompt"],
            size=f"{width}x{height}" if height and width else None,
            seconds=round(frames / frames_per_second, 3) if frames else None,
            frames_per_second=frames_per_second,
            created_at=time.time(),
            attempts=0,
            work={**dataclasses.asdict(work), "arguments": arguments},
        )
        try:
            self._begin(work.id, work)
        except Refusal:
            self.delete(work.id)
            raise
        return clip

    def get(self, clip: str) -> Clip:
        """One clip.

        Raises:
            Refusal: There is none of that name.
        """
        found = self._store.get(clip)
        if found is None:
            raise unknown("video", clip[:80])
        return found

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Clip], bool]:
        """Some clips in order, and whether there are more.

        Raises:
            Refusal: There is no clip ``after``.
        """
        found = self._store.page(after, limit, newest_first)
        if found is None:
            raise unknown("video to go on after", str(after)[:80])
        return found

    def file(self, clip: str, variant: Variant) -> tuple[Path, str]:
        """A finished clip's file, and its media type.

        Raises:
            Refusal: There is no such clip, or it is not finished.
        """
        found = self.get(clip)
        if found.status != "completed":
            raise bad(f"the video is {found.status}: there is nothing to load", code="video_not_ready")
        name, kind = VARIANTS[variant]
        if not (self._place(clip) / name).is_file():
            raise Refusal(404, f"the file of {clip} is gone", code="not_found")
        return self._place(clip) / name, kind

    def delete(self, clip: str) -> None:
        """Forgets a clip and its files; one that is being painted ends at once.

        Raises:
            Refusal: There is none of that name.
        """
        if not self._store.delete(clip):
            raise unknown("video", clip[:80])
        with self._lock:
            ticket = self._tickets.pop(clip, None)
        if ticket is not None:
            self._cancel(ticket)
        shutil.rmtree(self._place(clip), ignore_errors=True)

    def sweep(self) -> None:
        """Deletes what has been kept long enough."""
        for clip in self._store.expired(time.time()):
            self.delete(clip.id)

    def stop(self) -> None:
        """From here on what ends is no failure: it is kept, and begun anew by the next service."""
        self._closing = True

    def close(self) -> None:
        """Waits for files that are being written."""
        self._encoding.shutdown(wait=True)
        self._store.close()

    def _begin(self, clip: str, work: Work) -> None:
        ticket = self._submit(work, partial(self._hear, clip))
        with self._lock:
            if not ticket.over:
                self._tickets[clip] = ticket

    def _hear(self, clip: str, event: Event) -> None:
        if isinstance(event, Started):
            found = self._store.get(clip)
            if found is not None:
                self._store.change(clip, status="in_progress", attempts=found.attempts + 1)
        elif isinstance(event, Stepped) and event.total:
            self._store.change(clip, progress=min(99, event.step * 100 // event.total))
        elif isinstance(event, Painted):
            self._encoding.submit(self._finish, clip, event.outputs[0])
        elif isinstance(event, Ended) and not self._closing:
            self._fail(clip, event.refusal.code or "failed", event.refusal.message)

    def _finish(self, clip: str, output: Any) -> None:
        """Writes a clip's files; only then it is completed."""
        found, place = self._store.get(clip), self._place(clip)
        if found is None:
            return  # deleted
        try:
            [frames] = clips_of([output])
            part = place / ".video.part.mp4"
            write_clip(frames, part, found.frames_per_second)
            media.write_whole(part.read_bytes(), place / VARIANTS["video"][0])
            part.unlink()
            media.write_whole(media.encode_picture(media.thumbnail(frames), "webp", 80), place / "thumbnail.webp")
            sheet = media.encode_picture(media.contact_sheet(frames), "jpeg", 80)
            media.write_whole(sheet, place / VARIANTS["spritesheet"][0])
        except Exception as error:
            if self._store.get(clip) is None:
                shutil.rmtree(place, ignore_errors=True)  # deleted while it was being written
                return
            logger.exception("clip not written", extra={"fields": {"request": clip}})
            self._fail(clip, "not_written", f"the clip was painted, but could not be written: {error}")
            return
        size = f"{frames[0].width}x{frames[0].height}"
        seconds = round(len(frames) / found.frames_per_second, 3)
        self._end(clip, status="completed", progress=100, size=size, seconds=seconds)

    def _fail(self, clip: str, code: str, message: str) -> None:
        self._end(clip, status="failed", error={"code": code, "message": message})

    def _end(self, clip: str, **fields: Any) -> None:
        now = time.time()
        expires = now + self._keep if self._keep else None
        if not self._store.change(clip, completed_at=now, expires_at=expires, **fields):
            shutil.rmtree(self._place(clip), ignore_errors=True)
        with self._lock:
            self._tickets.pop(clip, None)

    def _place(self, clip: str) -> Path:
        return self._folder / "clips" / clip


def own(folder: Path) -> IO[str]:
    """Takes a folder for this process alone, until the file that is returned is closed.

    Raises:
        ValueError: It cannot be written, or another service has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise ValueError(f"--folder {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"--folder {folder} belongs to a service that runs: name another folder") from None
    return file


def _read_work(fields: Mapping[str, Any], place: Path) -> Work:
    """The work of a clip that was accepted before."""
    arguments = dict(fields["arguments"])
    if (place / _INPUT).exists():
        with Image.open(place / _INPUT) as picture:
            arguments["image"] = picture.convert("RGB")
    loras = tuple((name, scale) for name, scale in fields["loras"])
    return Work(**{**fields, "arguments": arguments, "seeds": tuple(fields["seeds"]), "loras": loras})
