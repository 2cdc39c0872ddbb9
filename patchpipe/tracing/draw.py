"""Draws a timeline: ranks down, time across, a colour for each patch, the busy share at the right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchpipe.files import save_figure
from patchpipe.tracing.busy import Busy, Stretch, busy, steady_state, steps_stretch
from patchpipe.tracing.recorder import Event
from patchpipe.tracing.timeline import Timeline, Track

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#d4a617", "#9d755d")
WARMUP, LATENT, OTHER, HATCH, LINE, INK = "#8c8c8c", "#2f2f2f", "#c9bfae", "#b8b8b8", "#d4d4d4", "#333333"
NAMES = {"encode": "text", "decode": "VAE"}  # gathering is mostly waiting, and short
LONG = 2e9  # nanoseconds from which seconds are the better unit
WIDTH, ROW, DPI = 13.0, 0.62, 150  # inches, inches, dots per inch
BAR, PALE = 0.8, 0.62  # height of a bar, as a share of a row; opacity of further guidance branches and second halves
LEGEND = 9  # entries of the legend side by side
LETTER = 0.006  # width of a letter, as a share of the time axis


@dataclass(frozen=True)
class _Picture:
    """The axes at work and what part of the request they show, in nanoseconds."""

    axis: Any
    timeline: Timeline
    window: Stretch

    @property
    def unit(self) -> tuple[str, float]:
        """Name and nanoseconds of the unit of time."""
        return ("seconds", 1e9) if self.window[1] - self.window[0] > LONG else ("milliseconds", 1e6)

    def at(self, moment: float) -> float:
        """A moment in units of time since the request began."""
        return (moment - self.timeline.span_ns[0]) / self.unit[1]

    def fits(self, text: str, start: float, stop: float) -> bool:
        """Whether a text is no wider than a stretch."""
        return (stop - start) / (self.window[1] - self.window[0]) > LETTER * (len(text) + 1)

    def visible(self, events: Iterable[Event], *kinds: str) -> list[Event]:
        """Those of some kinds that reach into the window."""
        low, high = self.window
        return [event for event in events if event.kind in kinds and event.end_ns > low and event.start_ns < high]


def draw(timeline: Timeline, out: Path, steps: tuple[int, int] | None = None) -> None:
    """Draws a timeline to a file; its suffix names the format, such as ``.png`` or ``.svg``.

    Args:
        timeline: The request.
        out: The picture.
        steps: The first and the last step to show, from 1; ``None`` shows the whole request.

    Raises:
        ValueError: There are no such steps, matplotlib is not installed, or it knows no such format.
    """
    figure = figure_of(timeline, steps)
    save_figure(figure, out)


def figure_of(timeline: Timeline, steps: tuple[int, int] | None = None) -> Any:
    """The picture as matplotlib's ``Figure``; see ``draw``."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "drawing a trace needs matplotlib: `pip install 'patchpipe[trace]'`, or open the trace in ui.perfetto.dev"
        ) from None
    window = timeline.span_ns if steps is None else steps_stretch(timeline, *steps)
    figures = busy(timeline, None if steps is None else window)
    figure = Figure(figsize=(WIDTH, 1.75 + ROW * len(timeline.tracks)), dpi=DPI, layout="constrained")
    picture = _Picture(figure.add_subplot(), timeline, window)
    for row, (track, figures_of_rank) in enumerate(zip(timeline.tracks, figures, strict=True)):
        _draw_rank(picture, row, track)
        _tell_busy(picture, row, figures_of_rank)
    _mark_steps(picture)
    _mark_steady(picture)
    _frame(picture)
    _legend(figure, timeline)
    return figure


# -- bars ----------------------------------------------------------------------------------------


def _draw_rank(picture: _Picture, row: int, track: Track) -> None:
    """Work in full height, then the waiting inside and between it laid over."""
    for event in picture.visible(track.events, "encode", "materialise", "decode"):
        _bar(picture, row, event, OTHER, NAMES.get(event.kind, ""), ink=INK)
    for event in picture.visible(track.events, "compute"):
        pale = event.where is not None and (event.where.branch > 0 or event.where.half == 1)
        _bar(picture, row, event, *_look(event, picture.timeline.about.get("requests", 1) > 1), pale=pale)
    for event in picture.visible(track.events, "latent"):
        _bar(picture, row, event, LATENT)
    for event in picture.visible(track.events, "wait"):
        _wait(picture, row, event)


def _look(event: Event, several: bool) -> tuple[str, str]:
    """Colour and label of a run through the stage; the label tells the request where there are several in flight."""
    request = f"{event.where.request + 1}" if several and event.where is not None else ""
    if event.where is None or event.where.warmup:
        return WARMUP, f"request {request}" if request else "warm-up"
    patch = event.where.patch or 0
    return COLOURS[patch % len(COLOURS)], f"{request}·{patch + 1}" if request else str(patch + 1)


def _bar(
    picture: _Picture, row: int, event: Event, colour: str, label: str = "", ink: str = "white", pale: bool = False
) -> None:
    start, stop = picture.at(event.start_ns), picture.at(event.end_ns)
    picture.axis.barh(
        row, stop - start, left=start, height=BAR, color=colour, alpha=PALE if pale else 1, edgecolor="white",
        linewidth=0.4, zorder=2,
    )  # fmt: skip
    low, high = max(event.start_ns, picture.window[0]), min(event.end_ns, picture.window[1])
    if label and picture.fits(label, low, high):
        middle = picture.at((low + high) / 2)
        picture.axis.text(middle, row, label, ha="center", va="center", color=ink, fontsize=8, zorder=4)


def _wait(picture: _Picture, row: int, event: Event) -> None:
    start, stop = picture.at(event.start_ns), picture.at(event.end_ns)
    picture.axis.barh(
        row, stop - start, left=start, height=BAR, facecolor="white", edgecolor=HATCH, hatch="//////", linewidth=0,
        zorder=3,
    )  # fmt: skip


# -- around the bars -----------------------------------------------------------------------------


def _tell_busy(picture: _Picture, row: int, figures: Busy) -> None:
    """The shares at the right of a row."""
    main, name = (figures.steady, "steady state") if figures.chosen is None else (figures.chosen, "shown here")
    if main is None:
        main, name = figures.request, "whole request"
    place = {"transform": picture.axis.get_yaxis_transform(), "va": "center", "color": INK}
    picture.axis.text(1.008, row - 0.14, f"{main:.1%} busy", fontsize=10.5, fontweight="bold", **place)
    under = name if main is figures.request else f"{name}\n{figures.request:.1%} whole request"
    picture.axis.text(1.008, row + 0.1, under, fontsize=7.5, **{**place, "va": "top"})


def _mark_steps(picture: _Picture) -> None:
    """A thin line where the first stage there is begins each step, the steps' numbers above."""
    begins: dict[int, int] = {}
    first = min(track.stage for track in picture.timeline.tracks)
    for track, event, where in picture.timeline.computes():
        if track.stage == first:
            begins[where.step] = min(event.start_ns, begins.get(where.step, event.start_ns))
    low, high = picture.window
    shown = sorted((start, step + 1) for step, start in begins.items() if low <= start < high)
    for start, _ in shown:
        picture.axis.axvline(picture.at(start), color=LINE, linewidth=0.8, zorder=0)
    _number(picture, shown)


def _number(picture: _Picture, shown: Sequence[tuple[int, int]]) -> None:
    """Steps' numbers, as many as there is room for."""
    ends = [*(start for start, _ in shown), picture.window[1]][1:]
    free = float("-inf")
    for (start, step), end in zip(shown, ends, strict=True):
        text = f"step {step}" if picture.fits(f"step {step}", start, end) else str(step)
        if start < free:
            continue
        free = start + LETTER * (len(text) + 1) * (picture.window[1] - picture.window[0])
        picture.axis.annotate(
            text, (picture.at(start), 1), xycoords=("data", "axes fraction"), xytext=(1, 3),
            textcoords="offset points", fontsize=7.5, color="#777777",
        )  # fmt: skip


def _mark_steady(picture: _Picture) -> None:
    """A line under the rows while the pipe is full, and the phases' names."""
    steady = steady_state(picture.timeline)
    if steady is None:
        return
    low, high = max(steady[0], picture.window[0]), min(steady[1], picture.window[1])
    if low >= high:
        return
    rows = len(picture.timeline.tracks)
    picture.axis.hlines(rows - 0.48, picture.at(low), picture.at(high), color=INK, linewidth=1.5, zorder=2)
    begin, end = picture.window
    look = {"va": "top", "fontsize": 8, "color": INK}
    warmup = any(where.warmup for _, _, where in picture.timeline.computes())
    for name, start, stop in (("warm-up, fill" if warmup else "fill", begin, low), ("steady state", low, high)):
        if picture.fits(name, start, stop):
            picture.axis.text(picture.at((start + stop) / 2), rows - 0.42, name, ha="center", **look)
    if high < end:  # short, but nothing stands to its right
        picture.axis.text(picture.at(high), rows - 0.42, " drain", **look)


def _frame(picture: _Picture) -> None:
    axis, tracks = picture.axis, picture.timeline.tracks
    axis.set_xlim(picture.at(picture.window[0]), picture.at(picture.window[1]))
    axis.set_ylim(len(tracks) - 0.1, -0.55)
    axis.set_yticks(range(len(tracks)), [f"stage {one.stage + 1} · rank {one.rank}\n{one.device}" for one in tracks])
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"{picture.unit[0]} since the request began")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _legend(figure: Any, timeline: Timeline) -> None:
    """The title, and the colours in use."""
    from matplotlib.patches import Patch

    about = timeline.about
    failed = " · failed" if "error" in about else ""
    figure.suptitle(
        f"{about.get('model', '')} · {about.get('layout_text', '')} · {about.get('steps', '?')} steps{failed}",
        fontsize=12, x=0.01, ha="left",
    )  # fmt: skip
    patches = sorted({where.patch or 0 for _, _, where in timeline.computes() if not where.warmup})
    handles = [Patch(color=WARMUP, label="warm-up")]
    if about.get("requests", 1) > 1:
        handles[0].set_label("warm-up; labels tell request·patch")
    for place, colour in enumerate(COLOURS):
        same = [str(patch + 1) for patch in patches if patch % len(COLOURS) == place]
        handles += [Patch(color=colour, label=f"patch {', '.join(same)}")] if same else []
    if about.get("branches", 1) > 1:
        handles.append(Patch(color=COLOURS[0], alpha=PALE, label="further guidance branches are paler"))
    if any(where.half for _, _, where in timeline.computes()):
        handles.append(Patch(color=COLOURS[0], alpha=PALE, label="the second half of a batch is paler"))
    handles += [
        Patch(color=LATENT, label="scheduler"),
        Patch(color=OTHER, label="text, gather, VAE"),
        Patch(facecolor="white", edgecolor=HATCH, hatch="//////", label="waiting"),
    ]
    columns = min(len(handles), LEGEND)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
