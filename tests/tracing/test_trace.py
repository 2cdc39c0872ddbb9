"""The timeline of a real request: complete, in order, on one clock, from every entry point."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import patchpipe
from patchpipe import Engine, ParallelConfig
from patchpipe.cli import app
from patchpipe.engine.requests import trace_place
from patchpipe.tracing import timeline as files
from tests import tiny
from tests.support.ranks import Place, run_ranks

STEPS, PATCHES = 4, 4
LAYOUTS: list[dict[str, Any]] = [
    {"pipefusion": 2, "patches": PATCHES, "warmup": 1}, {"cfg": 2}, {"ulysses": 2}, {"ring": 2}, {"tensor": 2},
    {"distrifusion": 2, "parallel_vae": True},
]  # fmt: skip


# -- real ranks ----------------------------------------------------------------------------------


def trace_all(place: Place, folder: str) -> list[int]:
    """Traces one request of every layout; gives the bytes this rank says it sent."""
    sent = []
    for number, layout in enumerate(LAYOUTS):
        config = ParallelConfig(**layout, timeout=60)
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        with pipe.patchpipe.tracing(f"{folder}/{number}.json"):
            pipe(**tiny.call_arguments("flux", steps=STEPS), generator=torch.Generator().manual_seed(0))
        assert pipe.patchpipe.group.recorder is None
        sent.append(pipe.patchpipe.last.sent_bytes)
        patchpipe.restore(pipe)
    return sent


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder with a trace of every layout, and the bytes that each rank sent in each."""
    folder = tmp_path_factory.mktemp("traces")
    return folder, run_ranks(2, trace_all, str(folder), timeout=200)


@pytest.fixture(scope="module")
def pipeline_trace(traced: tuple[Path, list[list[int]]]) -> Path:
    return traced[0] / "0.json"


def test_every_patch_of_every_step_runs_once_on_every_stage(pipeline_trace: Path) -> None:
    timeline = files.read(pipeline_trace)
    expected = [(0, branch, None) for branch in (0, 1)]
    expected += [(step, branch, patch) for step in range(1, STEPS) for branch in (0, 1) for patch in range(PATCHES)]
    assert [track.stage for track in timeline.tracks] == [0, 1]
    for track in timeline.tracks:
        ran = [where for found, _, where in timeline.computes() if found is track]
        assert [(where.step, where.branch, where.patch) for where in ran] == expected
        assert all(where.warmup == (where.step == 0) for where in ran)


def test_spans_of_a_rank_nest_or_follow_one_another(traced: tuple[Path, list[list[int]]]) -> None:
    for number in range(len(LAYOUTS)):
        for track in files.read(traced[0] / f"{number}.json").tracks:
            open_until: list[int] = []
            for event in track.events:
                assert event.start_ns <= event.end_ns
                while open_until and open_until[-1] <= event.start_ns:
                    open_until.pop()
                assert not open_until or event.end_ns <= open_until[-1], event
                open_until.append(event.end_ns)
            computes = [event for event in track.events if event.kind == "compute"]
            assert all(one.end_ns <= other.start_ns for one, other in pairwise(computes))


def test_sent_bytes_are_those_of_the_request(traced: tuple[Path, list[list[int]]]) -> None:
    folder, sent = traced
    for number in range(len(LAYOUTS)):
        for track in files.read(folder / f"{number}.json").tracks:
            sends = [event.details for event in track.events if event.kind == "send"]
            assert sum(one["bytes"] for one in sends if one["channel"] != "vae") == sent[track.rank][number] > 0
            assert track.sent_bytes == sent[track.rank][number]


def test_waits_say_what_for(traced: tuple[Path, list[list[int]]]) -> None:
    found = []
    for number in range(len(LAYOUTS)):
        tracks = files.read(traced[0] / f"{number}.json").tracks
        found.append([{e.details["channel"] for e in track.events if e.kind == "wait"} for track in tracks])
    pipe, cfg, ulysses, ring, tensor, displaced = found
    assert "prediction" in pipe[0]
    assert {"stream", "text", "latent"} <= pipe[1]
    assert "prediction" in cfg[0] & cfg[1]
    for channel, seen in {"all-to-all": ulysses, "ring": ring, "tensor": tensor, "displaced": displaced}.items():
        assert channel in seen[0] & seen[1]
    assert "vae" in displaced[0] & displaced[1]


def test_a_patch_arrives_after_it_was_sent(pipeline_trace: Path) -> None:
    """On one clock, a stage starts no patch before the stage ahead of it is done with it."""
    timeline = files.read(pipeline_trace)
    ends, starts = ({where: event for track, event, where in timeline.computes() if track.stage == s} for s in (0, 1))
    assert ends.keys() == starts.keys()
    assert all(ends[where].end_ns <= starts[where].start_ns for where in ends)


def test_what_surrounds_the_loop_is_there(pipeline_trace: Path) -> None:
    first, last = files.read(pipeline_trace).tracks
    kinds = [[event.kind for event in track.events] for track in (first, last)]
    assert kinds[0][0] == kinds[1][0] == "request"
    assert [seen.count("materialise") for seen in kinds] == [1, 1]
    assert [seen.count("decode") for seen in kinds] == [1, 0]
    assert [seen.count("encode") for seen in kinds] == [2, 2]  # the prompt and the negative prompt
    assert [seen.count("latent") > 0 for seen in kinds] == [True, False]


def test_the_file_is_one_that_perfetto_reads(pipeline_trace: Path) -> None:
    found = json.loads(pipeline_trace.read_text())
    events = found["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "i"}
    assert {event["pid"] for event in events} == {0, 1}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")
    ends = [event["ts"] + event["dur"] for event in events if event["ph"] == "X"]
    low, high = files.read(pipeline_trace).span_ns
    assert max(ends) == pytest.approx((high - low) / 1000)  # microseconds
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == [
        "rank 0 · stage 1 · cpu",
        "rank 1 · stage 2 · cpu",
    ]
    assert "step 2 · patch 1 · branch 1" in {event["name"] for event in events}
    about = found["otherData"]
    assert (about["version"], about["steps"], about["patches"], about["branches"]) == (1, STEPS, PATCHES, 2)
    assert about["model"] == "FluxTransformer2DModel"
    used = ParallelConfig(**LAYOUTS[0], forecast=True, timeout=60)  # as it came to be
    assert ParallelConfig(**about["layout"]) == used


def trace_badly(place: Place, folder: str) -> list[str]:
    """A request that fails in its third step, one that goes well, one more; then what is refused."""
    config = ParallelConfig(pipefusion=2, patches=2, timeout=60)
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
    call = tiny.call_arguments("flux", guided=False, steps=STEPS)
    told = []
    with pipe.patchpipe.tracing(f"{folder}/good.json"):
        pipe(**call)
        pipe(**call)
        with pytest.raises(ValueError, match="traced already"), pipe.patchpipe.tracing(f"{folder}/other.json"):
            pass
    for wrong in ("picture.png", "good.json/x.json"):
        with pytest.raises(ValueError) as caught, pipe.patchpipe.tracing(f"{folder}/{wrong}"):
            pass
        told.append(str(caught.value))

    def fail(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyError("boom")
        return values

    with pipe.patchpipe.tracing(f"{folder}/failed.json"), pytest.raises(KeyError):
        pipe(**call, callback_on_step_end=fail)
    return told


def test_several_requests_and_failed_ones(tmp_path: Path) -> None:
    first, second = run_ranks(2, trace_badly, str(tmp_path), timeout=100)
    assert first == second  # the output rank looks, every rank is told
    assert "picture.png must end in .json" in first[0]
    assert "cannot be written" in first[1]
    names = ["failed.rank0.json", "failed.rank1.json", "good-2.json", "good.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for rank in (0, 1):
        timeline = files.read(tmp_path / f"failed.rank{rank}.json")
        assert [track.rank for track in timeline.tracks] == [rank]
        assert timeline.about["error"] == "KeyError: 'boom'"
        assert {where.step for _, _, where in timeline.computes()} == {0, 1, 2}


# -- the engine and the command line -------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux", tmp_path_factory.mktemp("flux"))


def test_the_engine_traces_one_request(model: Path, tmp_path: Path) -> None:
    call = tiny.call_arguments("flux", guided=False, steps=STEPS)
    with Engine(model, ParallelConfig(pipefusion=2, patches=2, timeout=60), devices="cpu", threads=1) as engine:
        with pytest.raises(ValueError, match=r"x\.txt must end in \.json"):
            engine(trace=tmp_path / "x.txt", **call)
        plain = engine(seed=0, **call)
        pictures = engine(seed=0, trace=tmp_path / "x.json", **call)
        engine(seed=0, **call)
    assert [one.tobytes() for one in plain] == [one.tobytes() for one in pictures]
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    timeline = files.read(tmp_path / "x.json")
    assert sum(1 for _ in timeline.computes()) == 2 * (1 + 2 * (STEPS - 1))


def test_plain_diffusers_is_not_traced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plain diffusers is not traced: give the engine config="):
        trace_place(tmp_path / "x.json", plain=True)


def test_generate_traces_every_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "generate",
        "red apple",
        "owl",
        "--model",
        str(model),
        "--devices",
        "cpu",
        "--height",
        "64",
        "--width",
        "48",
    ]
    out = ["-o", str(tmp_path / "x.png"), "--trace", str(tmp_path / "x.json")]
    assert app(args=[*args, "--set", "max_sequence_length=8", "--steps", "2", *out]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x-1.json", "x-1.png", "x-2.json", "x-2.png"]
    assert "x-2.json" in capsys.readouterr().out.replace("\n", "")
    assert [len(files.read(tmp_path / f"x-{number}.json").tracks) for number in (1, 2)] == [1, 1]
    picture = (tmp_path / "x-1.png").read_bytes()
    assert app(args=["trace", str(tmp_path / "x-1.json")]) == 0
    assert (tmp_path / "x-1-timeline.png").exists()
    assert (tmp_path / "x-1.png").read_bytes() == picture


def test_the_command_draws_and_tells(pipeline_trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "x.png"
    assert app(args=["trace", str(pipeline_trace), "-o", str(out), "--steps", "2-3"]) == 0
    text = capsys.readouterr().out
    assert "FluxTransformer2DModel · pipefusion 2 · patches 4 · stale keys forecast" in text
    assert "steps 2-3" in text
    assert len(re.findall(r"\d%", text)) == 6  # three shares of two ranks
    assert Image.open(out).width > 1500


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--trace", "x.png"], "x.png must end in .json"), (["--trace", "x.json", "--compare"], "leave one of them out")],
)
def test_generate_refuses_a_wrong_trace_before_any_work(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app(args=["generate", "x", *args]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
