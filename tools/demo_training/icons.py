"""The four icon sets: fetched with npm, read into one list of icons with names, styles and drawings."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import Caption, concept_of, is_skin_tone

PACKAGES: dict[str, str] = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
SVG_STYLES = ("noto", "twemoji", "flat")
CATEGORIES_FROM = "noto"
NOT_OBJECTS = frozenset({"People & Body", "Flags", "Symbols"})


@dataclass(frozen=True)
class Icon:
    """One drawing. Exactly one of ``svg`` and ``file`` is set."""

    name: str
    style: str
    category: str
    svg: str | None = None
    file: Path | None = None

    @property
    def caption(self) -> Caption:
        """What the drawing shows, in words."""
        return Caption(concept_of(self.name), self.style)


def fetch(cache: Path) -> dict[str, Path]:
    """Return the unpacked folder of each package, downloading with ``npm pack`` what is not there yet.

    Raises:
        RuntimeError: npm is absent or a download fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return {style: _fetch_one(package, cache) for style, package in PACKAGES.items()}


def _fetch_one(package: str, cache: Path) -> Path:
    folder = cache / package.lstrip("@").replace("/", "-").replace("@", "-")
    if (folder / "package").is_dir():
        return folder / "package"
    archive = cache / f"{folder.name}.tgz"
    if not archive.is_file():
        _npm_pack(package, cache)
    partial = folder.with_suffix(".part")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    partial.rename(folder)
    return folder / "package"


def _npm_pack(package: str, cache: Path) -> None:
    command = ["npm", "pack", package, "--silent"]
    try:
        subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        raise RuntimeError("npm is not installed; it fetches the icon packages (Debian: apt install npm)") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error


def read_icons(packages: dict[str, Path]) -> list[Icon]:
    """Read every icon of the four sets, skin-tone variants and hidden (superseded) drawings left out."""
    categories = _categories(packages[CATEGORIES_FROM])
    icons = [icon for style in SVG_STYLES for icon in _read_svg_set(packages[style], style, categories)]
    names = code_point_names([packages[style] for style in SVG_STYLES])
    return icons + list(_read_3d_set(packages["3d"], names, categories))


def _load(folder: Path, file: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
    return data


def _categories(folder: Path) -> dict[str, str]:
    table = _load(folder, "metadata.json")["categories"]
    return {name: category for category, names in table.items() for name in names}


def _read_svg_set(folder: Path, style: str, categories: dict[str, str]) -> Iterator[Icon]:
    data = _load(folder, "icons.json")
    for name, icon in data["icons"].items():
        if is_skin_tone(name) or icon.get("hidden"):
            continue
        yield Icon(name, style, categories.get(name, ""), svg=svg_document(icon, data))


def svg_document(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Wrap an icon's body in an ``<svg>`` element with the set's or its own view box."""
    box = {key: icon.get(key, defaults.get(key, default)) for key, default in _BOX.items()}
    view = f"{box['left']} {box['top']} {box['width']} {box['height']}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{view}">{icon["body"]}</svg>'


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def plain_code_point(text: str) -> str:
    """Normalise a code point sequence: lower case, variation selectors removed."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def code_point_names(folders: list[Path]) -> dict[str, str]:
    """Merge the sets' code-point tables; the first set that knows a sequence names it."""
    names: dict[str, str] = {}
    for folder in folders:
        for code, name in _load(folder, "chars.json").items():
            names.setdefault(plain_code_point(code), name)
    return names


def _read_3d_set(folder: Path, names: dict[str, str], categories: dict[str, str]) -> Iterator[Icon]:
    seen: set[str] = set()
    for file in sorted((folder / "assets").glob("*.webp")):
        name = names.get(plain_code_point(file.stem))
        if name is None or name in seen or is_skin_tone(name):
            continue
        seen.add(name)
        yield Icon(name, "3d", categories.get(name, ""), file=file)


def common_concepts(icons: list[Icon]) -> list[str]:
    """Concepts drawn in all four styles, without people, flags and abstract signs."""
    by_style: dict[str, set[str]] = {}
    for icon in icons:
        if icon.category not in NOT_OBJECTS:
            by_style.setdefault(icon.style, set()).add(icon.caption.concept)
    return sorted(set.intersection(*by_style.values())) if len(by_style) == len(PACKAGES) else []
