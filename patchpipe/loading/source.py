"""Finds out, before any worker starts, whether a path or hub id can hold a pipeline, and fetches it."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
_CONNECT_SECONDS = 5.0
_INDEX_OPTIONS = ("revision", "token", "cache_dir", "force_download")  # those that the hub's own client takes
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

logger = logging.getLogger("patchpipe")


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        path: An absolute folder, or a hub id.
        offline: The hub is not asked, and the model comes from its local cache.
        index: What its ``model_index.json`` says.
    """

    path: str
    offline: bool = False
    index: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        return Path(self.path) if Path(self.path).is_absolute() else None


def resolve_source(path: str | os.PathLike[str], **options: Any) -> Source:
    """Checks a model's place and returns it as workers should open it.

    Args:
        path: A local folder in diffusers' format, or a hub id such as ``"owner/name"``.
        **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like, for the hub. They mean
            nothing to a local folder, and as in diffusers are passed over; a revision is warned of.

    Raises:
        FileNotFoundError: There is no such folder or model, or the hub cannot be reached.
        ValueError: What is there is not a diffusers pipeline.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        index = read_index(folder)
        _warn_of_revision(folder, options.get("revision"))
        return Source(str(folder.resolve()), index=index)
    if folder.exists() and folder.name == INDEX:
        return resolve_source(folder.parent, **options)
    if folder.exists():
        raise ValueError(f"{path} is a file: name the folder that holds {INDEX}")
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"there is no folder {path}, and it is no hub id such as 'owner/name' either")
    return _on_hub(str(path), {name: value for name, value in options.items() if value is not None})


def fetch(source: Source, variant: str | None = None, options: Mapping[str, Any] | None = None) -> Path:
    """The folder of a model, fetched from the hub where it is a hub id.

    Args:
        source: Where the model is.
        variant: The checkpoint's variant.
        options: Further arguments of diffusers' ``download``; names of components are those not to fetch.

    Raises:
        FileNotFoundError: The hub cannot give it.
    """
    if source.folder is not None:
        return source.folder
    import diffusers

    given = {**(options or {}), "variant": variant}
    if source.offline:
        given["local_files_only"] = True
    try:
        return Path(diffusers.DiffusionPipeline.download(source.path, **given))
    except Exception as error:
        raise FileNotFoundError(
            f"{_called(source.path, given)} could not be fetched from the hub: {_first_line(error)}"
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """Reads a local pipeline's ``model_index.json``.

    Raises:
        ValueError: It is missing, broken, or does not describe a pipeline.
    """
    file = folder / INDEX
    if not file.is_file() and (folder / MODULAR_INDEX).is_file():
        raise ValueError(
            f"{folder} was saved as a modular pipeline, without a {INDEX}: under torchrun, load it on every rank with "
            f"pipe = diffusers.ModularPipeline.from_pretrained(path) and pipe.load_components(), then "
            f"patchpipe.parallelize(pipe, config)"
        )
    if not file.is_file():
        raise ValueError(f"{folder} has no {INDEX}: it does not hold a diffusers pipeline")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{file} names no pipeline class")
    return index


def _warn_of_revision(folder: Path, revision: str | None) -> None:
    if revision is not None and os.environ.get("RANK", "0") == "0":
        logger.warning("revision=%r is passed over: %s is a local folder, not a hub id", revision, folder)


def _on_hub(hub_id: str, options: dict[str, Any]) -> Source:
    """Makes sure that the model is on the hub or in its cache."""
    from huggingface_hub import try_to_load_from_cache

    asked_offline = bool(options.get("local_files_only"))
    if not asked_offline and (options.get("proxies") or _hub_answers()):
        allowed = {name: options[name] for name in _INDEX_OPTIONS if name in options}
        return Source(hub_id, index=read_index(Path(_download_index(hub_id, allowed)).parent))
    where = {name: options[name] for name in ("revision", "cache_dir") if name in options}
    cached = try_to_load_from_cache(hub_id, INDEX, **where)
    if isinstance(cached, str):
        return Source(hub_id, offline=True, index=read_index(Path(cached).parent))
    reason = "local_files_only=True asks for no more" if asked_offline else "the hub cannot be reached"
    raise FileNotFoundError(
        f"{_called(hub_id, options)} is no local folder, is not in the hub's local cache, and {reason}"
    )


def _called(hub_id: str, options: Mapping[str, Any]) -> str:
    revision = options.get("revision")
    return hub_id if revision is None else f"{hub_id} at revision {revision!r}"


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


def _download_index(hub_id: str, options: dict[str, Any]) -> str:
    from huggingface_hub import errors, hf_hub_download

    try:
        return hf_hub_download(hub_id, INDEX, **options)
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{hub_id} has no revision {options.get('revision')!r} on the hub") from error
    except errors.GatedRepoError as error:
        text = f"{hub_id} is gated: accept its terms on https://huggingface.co/{hub_id} and log in"
        raise FileNotFoundError(text) from error
    except errors.RepositoryNotFoundError as error:
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
