"""The table of clips, over SQLAlchemy: SQLite by default, any database it knows by URL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import JSON, Column, Float, Integer, MetaData, String, Table, Text, create_engine, event, select
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

Status = Literal["queued", "in_progress", "completed", "failed"]  # the only ones that OpenAI's client knows
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
UNFINISHED = ("queued", "in_progress")


@dataclass(frozen=True)
class Clip:
    """One row: a clip that was asked for.

    Attributes:
        id: Its name.
        number: In order of arrival.
        status: How far it is.
        progress: The same in percent.
        model: Who paints it, as the client calls it.
        prompt: What it shows.
        size: ``WIDTHxHEIGHT``, where known.
        seconds: How long it is, where known.
        frames_per_second: Its speed.
        created_at: Seconds of the Unix epoch.
        completed_at: The same.
        expires_at: When it is deleted.
        error: ``code`` and ``message`` of what ended it.
        attempts: How often it was begun.
        work: What is to be painted, as plain data.
    """

    id: str
    number: int
    status: Status
    progress: int
    model: str
    prompt: str
    size: str | None
    seconds: float | None
    frames_per_second: float
    created_at: float
    completed_at: float | None
    expires_at: float | None
    error: Mapping[str, str] | None
    attempts: int
    work: Mapping[str, Any]


_METADATA = MetaData()
_CLIPS = Table(
    "patchpipe_clips",
    _METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), unique=True, nullable=False),
    Column("status", String(16), index=True, nullable=False),
    Column("progress", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("size", String(16)),
    Column("seconds", Float),
    Column("frames_per_second", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("completed_at", Float),
    Column("expires_at", Float),
    Column("error", JSON),
    Column("attempts", Integer, nullable=False),
    Column("work", JSON, nullable=False),
)


class Store:
    """The clips there are. Every method may be called from any thread, and has happened when it returns.

    Args:
        url: The database.

    Raises:
        ValueError: It cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self._database: Database = create_engine(url, pool_pre_ping=True)
            if self._database.dialect.name == "sqlite":
                event.listen(self._database, "connect", _prepare_sqlite)
            _METADATA.create_all(self._database)
        except (SQLAlchemyError, ImportError) as error:
            place = url.split("@")[-1]  # without the password
            raise ValueError(f"the database {place} cannot be opened: {str(error).splitlines()[0]}") from error

    def add(self, **fields: Any) -> Clip:
        """Keeps a new clip."""
        with self._database.begin() as connection:
            connection.execute(_CLIPS.insert().values(**fields))
        clip = self.get(fields["id"])
        assert clip is not None
        return clip

    def get(self, clip: str) -> Clip | None:
        """One clip; ``None`` where there is none of that name."""
        if not _NAME.fullmatch(clip):
            return None  # a database may refuse to look for it: PostgreSQL takes no NUL
        with self._database.connect() as connection:
            row = connection.execute(select(_CLIPS).where(_CLIPS.c.id == clip)).mappings().first()
        return None if row is None else Clip(**row)

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Clip], bool] | None:
        """Some clips in order, and whether there are more; ``None`` where there is no clip ``after``."""
        query = select(_CLIPS).order_by(_CLIPS.c.number.desc() if newest_first else _CLIPS.c.number).limit(limit + 1)
        if after is not None:
            last = self.get(after)
            if last is None:
                return None
            query = query.where(_CLIPS.c.number < last.number if newest_first else _CLIPS.c.number > last.number)
        found = self._read(query)
        return found[:limit], len(found) > limit

    def unfinished(self) -> list[Clip]:
        """What is still to be painted, in order of arrival."""
        return self._read(select(_CLIPS).where(_CLIPS.c.status.in_(UNFINISHED)).order_by(_CLIPS.c.number))

    def expired(self, now: float) -> list[Clip]:
        """What has been kept long enough."""
        return self._read(select(_CLIPS).where(_CLIPS.c.expires_at < now))

    def change(self, clip: str, **fields: Any) -> bool:
        """Changes a clip; whether it is still there."""
        with self._database.begin() as connection:
            return connection.execute(_CLIPS.update().where(_CLIPS.c.id == clip).values(**fields)).rowcount > 0

    def delete(self, clip: str) -> bool:
        """Forgets a clip; whether it was there."""
        if not _NAME.fullmatch(clip):
            return False
        with self._database.begin() as connection:
            return connection.execute(_CLIPS.delete().where(_CLIPS.c.id == clip)).rowcount > 0

    def close(self) -> None:
        """Ends the connections."""
        self._database.dispose()

    def _read(self, query: Any) -> list[Clip]:
        with self._database.connect() as connection:
            rows: Sequence[Any] = connection.execute(query).mappings().all()
        return [Clip(**row) for row in rows]


def _prepare_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "busy_timeout=10000", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
