"""Finds out, before any worker starts, whether a path or hub id can hold a pipeline."""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
_CONNECT_SECONDS = 5.0
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        path: An absolute folder, or a hub id.
        offline: The hub cannot be reached, and the model comes from its local cache.
    """

    path: str
    offline: bool = False


def resolve_source(path: str | os.PathLike[str], **options: Any) -> Source:
    """Checks a model's place and returns it as workers should open it.

    Args:
        path: A local folder in diffusers' format, or a hub id such as ``"owner/name"``.
        **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for the hub.

    Raises:
        FileNotFoundError: There is no such folder or model, or the hub cannot be reached.
        ValueError: What is there is not a diffusers pipeline.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        read_index(folder)
        return Source(str(folder.resolve()))
    if folder.exists() and folder.name == INDEX:
        return resolve_source(folder.parent)
    if folder.exists():
        raise ValueError(f"{path} is a file: name the folder that holds {INDEX}")
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"there is no folder {path}, and it is no hub id such as 'owner/name' either")
    return Source(str(path), offline=_check_hub(str(path), options))


def read_index(folder: Path) -> dict[str, Any]:
    """Reads a local pipeline's ``model_index.json``.

    Raises:
        ValueError: It is missing, broken, or does not describe a pipeline.
    """
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"{folder} has no {INDEX}: it does not hold a diffusers pipeline")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{file} names no pipeline class")
    return index


def _check_hub(hub_id: str, options: dict[str, Any]) -> bool:
    """Makes sure that the model is on the hub or in its cache; returns whether the hub is out of reach."""
    from huggingface_hub import try_to_load_from_cache

    allowed = {key: options[key] for key in _HUB_OPTIONS if key in options}
    if _hub_answers():
        _download_index(hub_id, allowed)
        return False
    where = {key: allowed[key] for key in ("revision", "cache_dir") if key in allowed}
    if isinstance(try_to_load_from_cache(hub_id, INDEX, **where), str):
        return True
    raise FileNotFoundError(
        f"{hub_id} is no local folder, is not in the hub's local cache, and the hub cannot be reached"
    )


def _hub_answers() -> bool:
    """Whether the hub can be reached, found out in seconds where its client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True  # only the proxy can tell
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _download_index(hub_id: str, options: dict[str, Any]) -> None:
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(hub_id, INDEX, **options)
    except errors.GatedRepoError as error:
        text = f"{hub_id} is gated: accept its terms on https://huggingface.co/{hub_id} and log in"
        raise FileNotFoundError(text) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{hub_id} is neither a local folder nor a model on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        text = f"{hub_id} is no local folder, and the hub cannot be reached: {_first_line(error)}"
        raise FileNotFoundError(text) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{hub_id} on the hub has no {INDEX}: it is not a diffusers pipeline") from error
    except errors.HfHubHTTPError as error:
        raise FileNotFoundError(f"the hub refuses {hub_id}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
