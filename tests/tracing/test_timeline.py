"""Clocks, figures, files and pictures of timelines, most of them made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from patchpipe import ParallelConfig
from patchpipe.cli import app
from patchpipe.distributed.clock import PINGS, align, gather
from patchpipe.tracing import timeline as files
from patchpipe.tracing.busy import busy, busy_stretches, steady_state, steps_stretch
from patchpipe.tracing.draw import draw, figure_of
from patchpipe.tracing.recorder import Event, Recorder, StreamClock, Where, span
from patchpipe.tracing.timeline import Timeline, Track
from tests.support.ranks import Place, run_ranks

# -- clocks --------------------------------------------------------------------------------------


def align_with_a_wrong_clock(place: Place, ahead: int) -> tuple[int, int, list[bytes] | None]:
    """Rank 1 counts as another host, its clock wrong by ``ahead`` and coarse enough for any round trip."""
    config = ParallelConfig(pipefusion=2, timeout=20.0)
    wire = place.join(config).control_wire()
    ticks = iter(range(0, 10**9, 1000))
    skewed = {"host": 1, "clock": lambda: next(ticks) + ahead} if place.rank else {"host": 0, "clock": lambda: 8000}
    offset = align(wire, place.rank, 2, **skewed)  # type: ignore[arg-type]
    alike = align(wire, place.rank, 2)
    assert (alike.nanoseconds, alike.uncertainty) == (0, 0)  # one host, one clock
    return offset.nanoseconds, offset.uncertainty, gather(wire, place.rank, 2, b"r%d" % place.rank, 1)


def test_clocks_of_other_hosts_are_aligned() -> None:
    """Every ping takes one tick of 1,000 there and back: rank 0's 8,000 is the middle of the first."""
    ahead = 5_000_000_000
    first, (offset, uncertainty, gathered) = run_ranks(2, align_with_a_wrong_clock, ahead, timeout=60)
    assert first == (0, 0, None)
    assert uncertainty == 500
    assert abs(offset - (8000 - ahead)) <= 2 * PINGS * 1000
    assert offset == 8000 - ahead - 500
    assert gathered == [b"r0", b"r1"]


def test_device_moments_count_from_the_host_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events tell milliseconds between two of them."""

    class Mark:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at, Mark.made = float(Mark.made), Mark.made + 1

        def record(self, stream: Any) -> None:
            assert stream == "stream of cuda:1"

        def synchronize(self) -> None:
            return

        def elapsed_time(self, later: Mark) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr("patchpipe.tracing.recorder.perf_counter_ns", lambda: 10**9)
    recorder = Recorder(StreamClock(torch.device("cuda:1")))
    with span(recorder, "compute"):
        recorder.sent("stream", 8, "rank 0")
    assert [(one.kind, one.start_ns, one.end_ns) for one in recorder.events()] == [
        ("compute", 10**9 + 1_000_000, 10**9 + 3_000_000),
        ("send", 10**9 + 2_000_000, 10**9 + 2_000_000),
    ]


def test_nothing_is_made_where_nobody_records() -> None:
    assert span(None, "compute") is span(None, "wait", channel="stream")


# -- figures, of traces made by hand -------------------------------------------------------------


def work(start: int, stop: int, step: int = 1, patch: int | None = 0, warmup: bool = False) -> Event:
    return Event("compute", start, stop, Where(step, 0, warmup, patch))


def wait(start: int, stop: int) -> Event:
    return Event("wait", start, stop, None, {"channel": "stream"})


def track(rank: int, *events: Event) -> Track:
    return Track(rank, rank, "cpu", tuple(sorted(events, key=lambda event: event.start_ns)))


ENCODED, DECODED = Event("encode", 0, 10), Event("decode", 90, 100)
FILLED = Timeline(
    (
        track(0, ENCODED, work(10, 30, 0, None, True), work(50, 60), work(60, 70, patch=1), wait(70, 90)),
        track(1, work(30, 50, 0, None, True), wait(50, 60), work(60, 70), work(70, 90, patch=1), DECODED),
    ),
    {"model": "Model", "layout_text": "layout", "steps": 2, "patches": 2, "branches": 1},
)  # fmt: skip


def test_steady_state_lasts_from_the_fill_to_the_drain() -> None:
    assert steady_state(FILLED) == (60, 70)  # the second stage waits for its first patch until 60
    first, second = busy(FILLED)
    assert (first.steady, second.steady) == (1.0, 1.0)
    assert (first.request, second.request) == (0.5, 0.6)
    assert second.waited == {"stream": pytest.approx(10e-9)}
    assert first.chosen is None


def test_steady_state_without_warm_up_begins_with_the_first_patch() -> None:
    timeline = Timeline((track(0, Event("encode", 0, 7), work(7, 20), work(25, 30, patch=1)),))
    assert steady_state(timeline) == (7, 30)
    assert busy(timeline)[0].steady == pytest.approx(18 / 23)


def test_a_synchronous_request_has_no_steady_state() -> None:
    timeline = Timeline((track(0, work(0, 10, 0, None, True), work(10, 20, 1, None, True)),))
    assert steady_state(timeline) is None
    assert (busy(timeline)[0].steady, busy(timeline)[0].request) == (None, 1.0)


def test_waits_inside_work_are_not_busy_and_overlaps_count_once() -> None:
    inside = [Event("materialise", 0, 100), Event("latent", 10, 20), wait(15, 30), wait(25, 40), wait(95, 120)]
    assert busy_stretches(inside) == [(0, 15), (40, 95)]
    assert busy_stretches([wait(0, 5), work(5, 10), work(10, 12), wait(12, 13)]) == [(5, 12)]
    assert busy_stretches([Event("request", 0, 9), Event("send", 3, 3)]) == []


def test_steps_are_cut_out_by_their_first_and_last_work() -> None:
    assert steps_stretch(FILLED, 1, 1) == (10, 50)
    assert steps_stretch(FILLED, 1, 2) == (10, 90)
    assert [one.chosen for one in busy(FILLED, (10, 50))] == [0.5, 0.5]
    for wrong in ((0, 1), (2, 1), (2, 3)):
        with pytest.raises(ValueError, match="which has the steps 1-2"):
            steps_stretch(FILLED, *wrong)


# -- files and pictures --------------------------------------------------------------------------


def test_a_timeline_comes_back_as_it_was(tmp_path: Path) -> None:
    files.write(FILLED, tmp_path / "x.json")
    assert files.read(tmp_path / "x.json") == FILLED
    halves = [Event("compute", 10 * at, 10 * at + 5, Where(1, 0, False, 0, 0, half)) for at, half in enumerate((0, 1))]
    timeline = Timeline((track(0, *halves),), FILLED.about)
    files.write(timeline, tmp_path / "halves.json")
    assert files.read(tmp_path / "halves.json") == timeline
    names = [one["name"] for one in json.loads((tmp_path / "halves.json").read_text())["traceEvents"][3:]]
    assert names == ["step 2 · patch 1 · half 1", "step 2 · patch 1 · half 2"]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    unwritable = Timeline(FILLED.tracks, {("no", "name"): 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        files.write(unwritable, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: [], "is no trace of patchpipe: give a file that `patchpipe generate --trace` wrote"),
        (lambda found: {**found, "otherData": {}}, "is no trace of patchpipe"),
        (lambda found: found["otherData"].update(version=2) or found, "of version 2, but .* reads version 1"),
        (lambda found: {**found, "traceEvents": []}, "is damaged"),
        (lambda found: {"otherData": found["otherData"]}, "is damaged .* trace the request again"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    files.write(FILLED, file)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert app(args=["trace", str(file)]) == 2
    errors = capsys.readouterr().err
    assert re.search(words, errors)
    assert (errors[:7], errors.count("\n")) == ("error: ", 1)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing.json"], "there is no file nothing.json: `patchpipe generate … --trace nothing.json` writes one"),
        (["x.json", "--steps", "3-9"], "steps 3-9 are not in this trace, which has the steps 1-2"),
        (["x.json", "--steps", "all"], "--steps all must be two steps, such as 4-6"),
        (["x.json", "-o", "x.doc"], "x.doc must end in a format of pictures"),
        (["x.json", "-o", "/proc/nowhere/x.png"], "cannot be written"),
    ],
)
def test_wrong_options_are_one_line(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files.write(FILLED, tmp_path / "x.json")
    assert app(args=["trace", *args]) == 2
    assert words in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_picture_shows_what_the_timeline_holds(tmp_path: Path) -> None:
    draw(FILLED, tmp_path / "x.svg")
    draw(Timeline(FILLED.tracks[1:], {**FILLED.about, "error": "KeyError: 'boom'"}), tmp_path / "part.png")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert {"warm-up, fill", "1", "2", "step 1", "step 2", " drain", "VAE", "100.0% busy"} <= texts(FILLED)
    shown = texts(FILLED, (2, 2))  # from 50 to 90
    assert {"step 2", "50.0% busy", "75.0% busy", "shown here\n60.0% whole request"} <= shown
    assert not {"step 1", "VAE"} & shown


def texts(timeline: Timeline, steps: tuple[int, int] | None = None) -> set[str]:
    """What is written among the bars of a picture."""
    (axis,) = figure_of(timeline, steps).axes
    return {text.get_text() for text in axis.texts}
