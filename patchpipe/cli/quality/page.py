"""The page of ``patchpipe quality``: figures, a drawing, and the farthest pictures side by side with one device's."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

from PIL import Image, ImageChops

from patchpipe.cli.quality.measure import HEADER, MEASURES, Found, told

AMPLIFIED = 8  # times, in pictures of differences
COLOURS = ("#9aa4ae", "#1f6feb", "#d1782c", "#3a9d5d", "#8a63d2", "#b0485a")
WIDTH, HEIGHT, LEFT, TOP, LEGEND = 680, 300, 48, 16, 230
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
th { border-bottom: 2px solid #ccc } tr:nth-child(even) td { background: #f6f7f8 }
figure { display: inline-block; margin: .3rem .6rem .3rem 0 } figcaption { font-size: 13px; color: #555 }
img { width: 13rem; image-rendering: auto; border: 1px solid #ddd } h2 { margin-top: 2rem }
"""


def page(
    title: str,
    about: str,
    prompts: Sequence[str],
    plain: Sequence[Image.Image],
    found: Sequence[Found],
    against_time: str = "",
) -> str:
    """The page, whole in one text.

    Args:
        title: The model.
        about: How it was painted, in a sentence.
        prompts: What was painted.
        plain: One device's pictures.
        found: What came of every setting.
        against_time: A drawing of likeness against time; see ``front``.
    """
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>Quality: {html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)} Every picture is compared with plain diffusers on one "
        f"device, with the same seed. Only DistriFusion's pictures depend on the number of devices.</p>",
        _drawing(found),
        against_time,
        _table(found),
        f"<p>{html.escape(MEASURES)}</p>",
        *(_pictures(one, prompts, plain) for one in found),
        "</html>",
    ]
    return "\n".join(parts)


def _table(found: Sequence[Found]) -> str:
    rows = ["<tr>" + "".join(f"<th>{name}" for name in HEADER) + "</tr>"]
    rows += ["<tr>" + "".join(f"<td>{cell}" for cell in one.cells) + "</tr>" for one in found]
    return f"<table>{''.join(rows)}</table>"


def _pictures(found: Found, prompts: Sequence[str], plain: Sequence[Image.Image]) -> str:
    """The picture that differs most."""
    at = found.worst
    pairs = {"one device": plain[at], found.setting.label: found.pictures[at]}
    pairs[f"difference, {AMPLIFIED} times"] = _difference(plain[at], found.pictures[at])
    figures = "".join(
        f"<figure><img alt='{html.escape(name)}' src='{_data(picture)}'><figcaption>{html.escape(name)}</figcaption>"
        f"</figure>"
        for name, picture in pairs.items()
    )
    title = f"{html.escape(found.setting.label)}: the farthest, {told(found.decibels[at])} dB"
    return f"<h2>{title}</h2><p>“{html.escape(prompts[at])}”</p>{figures}"


def _difference(one: Image.Image, other: Image.Image) -> Image.Image:
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).point(lambda value: value * AMPLIFIED)


def _data(picture: Image.Image) -> str:
    memory = io.BytesIO()
    picture.convert("RGB").save(memory, format="PNG")
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode()


def _drawing(found: Sequence[Found]) -> str:
    """Mean decibels by patches, a line for each warm-up with and without a forecast."""
    finite = [one for one in found if math.isfinite(one.mean)]
    if not finite:
        return ""
    patches = sorted({one.setting.patches for one in finite})
    low, high = math.floor(min(one.mean for one in finite)) - 1, math.ceil(max(one.mean for one in finite)) + 1
    lines: dict[str, list[Found]] = {}
    for one in finite:
        way = "DistriFusion" if one.setting.distrifusion else f"warm-up {one.setting.warmup}"
        lines.setdefault(f"{way}, {one.setting.stale}", []).append(one)

    def across(count: int) -> float:
        return LEFT + (WIDTH - LEFT - LEGEND) * patches.index(count) / max(1, len(patches) - 1)

    def up(value: float) -> float:
        return TOP + (HEIGHT - TOP - 40) * (high - value) / (high - low)

    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' font-size='12' fill='#444'>"]
    for value in range(low, high + 1, max(1, (high - low) // 6)):
        parts.append(f"<line x1='{LEFT}' x2='{WIDTH - LEGEND}' y1='{up(value)}' y2='{up(value)}' stroke='#eee'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{up(value) + 4}' text-anchor='end'>{value}</text>")
    parts += [f"<text x='{across(count)}' y='{HEIGHT - 20}' text-anchor='middle'>{count}</text>" for count in patches]
    parts.append(f"<text x='{LEFT}' y='{HEIGHT - 4}'>patches; mean dB against one device</text>")
    for index, (label, row) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = "" if row[0].setting.forecast else " stroke-dasharray='5 4'"
        points = " ".join(f"{across(one.setting.patches):.1f},{up(one.mean):.1f}" for one in row)
        parts.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2'{dash}/>")
        parts += [
            f"<circle cx='{across(one.setting.patches):.1f}' cy='{up(one.mean):.1f}' r='3.5' fill='{colour}'/>"
            for one in row
        ]
        parts.append(f"<text x='{WIDTH - LEGEND + 20}' y='{TOP + 18 * index + 8}' fill='{colour}'>{label}</text>")
    return "".join([*parts, "</svg>"])
