"""The engine with real worker processes: what it returns, and what it says and leaves behind when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from patchpipe import Cancelled, Engine, ParallelConfig, PatchpipeError, RankFailed, RankLost
from patchpipe.engine import Preview, Progress, devices, failures, requests
from patchpipe.engine.failures import CAUSE, CONSEQUENCE, Failure
from patchpipe.engine.messages import Call, Channel, Done, Failed
from patchpipe.engine.processes import Worker
from patchpipe.engine.watch import Outcome, Watch
from patchpipe.engine.worker.oom import out_of_memory
from patchpipe.loading.source import resolve_source
from tests import tiny

pytestmark = pytest.mark.timeout(120)

TWO = ParallelConfig(pipefusion=2, patches=2, timeout=60)
CALL = tiny.call_arguments("flux")
LONG = {**CALL, "num_inference_steps": 500}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, TWO, devices="cpu", threads=1) as running:
        yield running


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all processes vanish in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def pixels(images: Any) -> list[bytes]:
    return [image.tobytes() for image in images]


# -- a healthy engine ----------------------------------------------------------------------------


def test_pictures_follow_the_seed(engine: Engine) -> None:
    first, again, other = (pixels(engine(seed=seed, **CALL)) for seed in (1, 1, 2))
    assert first == again != other


def test_seeds_one_for_each_picture(engine: Engine) -> None:
    both = engine(seed=[1, 2], **{**CALL, "num_images_per_prompt": 2})
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert pixels(both) == pixels(engine(generator=generators, **{**CALL, "num_images_per_prompt": 2}))


def test_result_tells_how_it_came_about(engine: Engine) -> None:
    steps: list[Progress] = []
    by_name = {name: value for name, value in CALL.items() if name != "prompt"}
    result = engine.generate(tiny.PROMPT, on_progress=steps.append, **by_name)
    assert result.images[0].size == (CALL["width"], CALL["height"])
    assert [(one.step, one.total) for one in steps] == [(n, 4) for n in (1, 2, 3, 4)]
    assert result.stats["materialisations"] == 1
    assert result.seconds > 0
    assert pixels(engine(seed=result.seed, **CALL)) == pixels(result.images)


def test_tensors_travel(engine: Engine) -> None:
    latents = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    result = engine.generate(latents=latents, output_type="pt", **CALL)
    assert isinstance(result.images, torch.Tensor)
    assert result.images.shape == (1, 3, CALL["height"], CALL["width"])


def test_warnings_reach_the_caller_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine(**{**CALL, "num_inference_steps": 1})
    texts = [record.getMessage() for record in caplog.records if record.name == "patchpipe.engine"]
    assert sum("synchronously" in text for text in texts) == 1


def test_cut_prompt_is_told(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine(**{**CALL, "prompt": "red apple " * 60})
    texts = [record.getMessage() for record in caplog.records if record.name == "patchpipe.engine"]
    assert any("truncated" in text for text in texts)


def test_calls_together_give_what_each_gives_alone(engine: Engine, tmp_path: Path) -> None:
    calls = [{**CALL, "seed": 1}, {**CALL, "seed": 2, "height": 96, "num_inference_steps": 3}]
    steps: list[Progress] = []
    results = engine.generate_together(calls, on_progress=steps.append, trace=tmp_path / "both.json")
    assert [pixels(one.images) for one in results] == [pixels(engine(**call)) for call in calls]
    assert [one.seed for one in results] == [1, 2]
    assert [one.stats["steps_patched"] for one in results] == [2 * 2, 2 * 1]  # with guidance two steps warm up
    for number, total in ((0, 4), (1, 3)):
        seen = [(one.step, one.total) for one in steps if one.call == number]
        assert seen == [(step, total) for step in range(1, total + 1)]
    assert (tmp_path / "both.json").exists()
    fresh = [engine.together([CALL, CALL]) for _ in range(2)]
    assert len({pixels(images)[0] for both in fresh for images in both}) == 4


@pytest.mark.parametrize(
    ("calls", "kind", "words"),
    [
        ([CALL, {**CALL, "promt": "x"}], TypeError, "no argument 'promt': did you mean 'prompt'"),
        ([CALL, {**CALL, "prompt": 3}], ValueError, "request 2 of 2: `prompt` has to be of type"),
        ([], ValueError, "there are no calls"),
    ],
)
def test_a_wrong_call_among_several_leaves_the_engine_usable(
    engine: Engine, calls: list[dict[str, Any]], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        engine.together(calls)
    assert not engine.closed
    assert engine.together([{**CALL, "seed": 0}])


def test_description_names_every_rank(engine: Engine) -> None:
    text = engine.describe()
    assert "FluxPipeline" in text
    assert all(f"rank {rank}: cpu, 1 threads" in text for rank in (0, 1))
    assert engine.ranks[0].pid != engine.ranks[1].pid


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"promt": "x"}, TypeError, "no argument 'promt': did you mean 'prompt'"),
        ({"prompt": 3}, ValueError, "`prompt` has to be of type"),
        ({"callback_on_step_end": print}, ValueError, "callback_on_step_end holds a callable"),
        ({"seed": "one"}, TypeError, "seed='one' must be a whole number"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "leave one of them out"),
    ],
)
def test_wrong_request_leaves_the_engine_usable(
    engine: Engine, wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        engine(**{**CALL, **wrong})
    assert not engine.closed
    assert engine(seed=0, **CALL)


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.some(of=2, first=1)
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_named_in_seconds_and_nothing_is_left(model: Path, rank: int) -> None:
    struck: list[float] = []
    with Engine(model, TWO, devices="cpu", threads=1) as engine:
        pids = [one.pid for one in engine.ranks]
        folder = engine._crew.directory

        def kill(progress: Progress) -> None:
            if progress.step == 3:
                struck.append(time.monotonic())
                os.kill(pids[rank], signal.SIGKILL)

        with pytest.raises(RankLost, match=rf"^rank {rank} \(pid {pids[rank]}\) was killed by SIGKILL while painting"):
            engine.generate(on_progress=kill, **LONG)
        assert time.monotonic() - struck[0] < 5
        assert engine.closed
        with pytest.raises(PatchpipeError, match="engine is closed"):
            engine(**CALL)
    assert gone(pids, 0.2)
    assert not folder.exists()


def test_a_wrong_shape_is_told_and_leaves_the_engine_usable(engine: Engine) -> None:
    wrong = {"prompt_embeds": torch.zeros(1, 8, 7), "pooled_prompt_embeds": torch.zeros(1, 16)}
    rest = {name: CALL[name] for name in ("height", "width", "num_inference_steps")}
    before = pixels(engine(seed=1, **CALL))
    with pytest.raises(RankFailed, match="mat1 and mat2") as caught:
        engine(**wrong, **rest)
    assert "Traceback" in str(caught.value.__cause__)
    assert "rank 0" in str(caught.value.__cause__)
    assert not engine.closed
    assert pixels(engine(seed=1, **CALL)) == before


def test_a_size_nobody_has_memory_for_leaves_the_engine_usable(engine: Engine) -> None:
    with pytest.raises(RankFailed, match=r"too large|allocate|memory|storage size"):
        engine(**{**CALL, "height": 16 * 10**7, "width": 16 * 10**7})
    assert not engine.closed


@pytest.mark.some(of=2)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [TWO, "plain"], ids=["two ranks", "plain"])
def test_previews_reach_the_caller_and_change_nothing(model: Path, layout: Any) -> None:
    seen: list[Preview] = []
    with Engine(model, layout, devices="cpu", threads=1) as engine:
        call = {**CALL, "num_inference_steps": 8, "seed": 1}
        before = pixels(engine(**call))
        assert pixels(engine(on_preview=seen.append, preview_every=3, **call)) == before
        assert [one.step for one in seen] == [3, 6]
        assert all(one.images[0].size == (CALL["width"], CALL["height"]) for one in seen)
        with pytest.raises(ValueError, match="preview_every=0 must be a number of steps"):
            engine(on_preview=seen.append, preview_every=0, **call)
        with pytest.raises(LookupError):
            engine(on_preview=lambda _: complain(), preview_every=1, **{**call, "num_inference_steps": 100})
        assert pixels(engine(**call)) == before


# -- cancelling ----------------------------------------------------------------------------------


def stop_at(step: int, stop: Any) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            stop()

    return on_progress


def interrupt() -> None:
    raise KeyboardInterrupt


def complain() -> None:
    raise LookupError("enough")


@pytest.mark.parametrize(("stop", "kind"), [(interrupt, KeyboardInterrupt), (complain, LookupError)])
def test_an_interrupt_or_a_raising_on_progress_leaves_the_engine_usable(
    engine: Engine, stop: Any, kind: type[BaseException]
) -> None:
    before = pixels(engine(seed=1, **CALL))
    with pytest.raises(kind):
        engine.generate(on_progress=stop_at(3, stop), **LONG)
    assert not engine.closed
    assert pixels(engine(seed=1, **CALL)) == before


@pytest.mark.some(of=3)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [TWO, "plain", ParallelConfig(patches=2)], ids=["two ranks", "plain", "one rank"])
def test_cancel_from_another_thread(model: Path, layout: Any) -> None:
    with Engine(model, layout, devices="cpu", threads=1) as engine:
        before = pixels(engine(seed=1, **CALL))
        assert not engine.cancel()
        told: list[bool] = []
        began = time.monotonic()
        with pytest.raises(Cancelled, match="the request was cancelled"):
            engine.generate(on_progress=stop_at(3, lambda: told.append(engine.cancel())), **LONG)
        assert told == [True]
        assert time.monotonic() - began < 30
        assert pixels(engine(seed=1, **CALL)) == before
        if layout != "plain":
            threading.Timer(0.5, engine.cancel).start()
            with pytest.raises(Cancelled):
                engine.together([LONG, LONG])
            assert pixels(engine(seed=1, **CALL)) == before


def test_killed_parent_takes_its_workers_along(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain_script_without_main_guard.py"
    script.write_text(
        "import sys, patchpipe\n"
        "engine = patchpipe.Engine(sys.argv[1], patchpipe.ParallelConfig(pipefusion=2), devices='cpu')\n"
        "print(*[rank.pid for rank in engine.ranks], engine._crew.directory, flush=True)\n"
        f"engine(**{LONG!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(script), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        *pids, folder = parent.stdout.readline().split()
        time.sleep(0.5)
        assert parent.poll() is None
        parent.kill()
    assert gone([int(pid) for pid in pids])
    assert not Path(folder).exists()


def test_more_stages_than_blocks_is_one_clear_error(tmp_path: Path) -> None:
    model = tiny.save("flux", tmp_path, blocks=2)
    began = time.monotonic()
    with pytest.raises(ValueError, match="3") as caught:
        Engine(model, ParallelConfig(pipefusion=3), devices="cpu")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 60


# -- before any worker starts --------------------------------------------------------------------


def test_taken_port_is_named(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PatchpipeError, match=f"port {port} cannot be used .*: name another one"):
            Engine(model, TWO, port=port, devices="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": "gpu"}, "device 'gpu' is unknown"),
        ({"devices": ["cpu"]}, "1 devices for 2 ranks"),
        ({"devices": "cuda:99"}, "is not there: this machine has"),
        ({"devices": "cpu", "config": ParallelConfig(pipefusion=2, backend="nccl")}, "backend='nccl' needs a CUDA"),
        ({"dtype": "float8"}, "dtype='float8' is unknown: use bf16, fp16 or fp32"),
        ({"threads": 0}, "threads=0 must be"),
    ],
)
def test_wrong_options_start_nothing(model: Path, options: dict[str, Any], words: str) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ValueError, match=words):
        Engine(model, **{"config": TWO, "devices": "cpu", **options})
    assert {child.pid for child in psutil.Process().children()} <= before


def test_sources(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source(model).path == str(model.resolve())
    with pytest.raises(ValueError, match=r"has no model_index.json"):
        resolve_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve_source(tmp_path / "nothing")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve_source(tmp_path)
    monkeypatch.setattr("patchpipe.loading.source._hub_answers", lambda: False)
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        resolve_source("nobody/nothing-here")


# -- waiting, with stand-ins for the workers -----------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[tuple[Worker, Channel]]]:
    """Two idle processes as the parent sees them, each with the far end of its channel."""
    pairs = []
    for rank in (0, 1):
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(["sleep", "60"])
        worker = Worker(rank, process, Channel(ours.detach()), tmp_path / f"{rank}.log")
        pairs.append((worker, Channel(theirs.detach())))
    yield pairs
    for worker, far in pairs:
        worker.signal(signal.SIGKILL)
        worker.reap()
        far.close()


def failed(text: str, *, clean: bool = False, secondary: bool = False, kind: str = "RuntimeError") -> Failed:
    return Failed(1, kind, text, "Traceback …", clean, secondary)


def outcome(two: list[tuple[Worker, Channel]], silence: float = 30.0) -> Outcome:
    return Watch([worker for worker, _ in two], ["cpu", "cpu"], Done, 1, "painting", silence).run()


def test_silent_ranks_are_named(two: list[tuple[Worker, Channel]]) -> None:
    two[0][1].send(Done(1, None, {}, 0.0))
    failure = outcome(two, silence=0.3).failure
    assert failure is not None
    assert str(failure.error).startswith("rank 1 said nothing for 0 s while painting")


def test_consequence_waits_for_the_cause(two: list[tuple[Worker, Channel]]) -> None:
    two[0][1].send(failed("connection closed by peer", secondary=True))
    threading.Timer(0.3, two[1][1].send, [failed("boom")]).start()
    result = outcome(two)
    assert result.failure is not None
    assert str(result.failure.error) == "rank 1 on cpu: RuntimeError: boom"
    assert not result.usable


def test_lone_consequence_is_told_at_last(two: list[tuple[Worker, Channel]]) -> None:
    two[0][1].send(failed("rank 1 did not answer", secondary=True, kind="RankLost"))
    began = time.monotonic()
    result = outcome(two)
    assert result.failure is not None
    assert isinstance(result.failure.error, RankLost)
    assert time.monotonic() - began < 3


def test_failure_is_clean_only_where_every_rank_says_so(
    two: list[tuple[Worker, Channel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchpipe.engine.watch.SETTLE_CLEAN", 1.0)
    for _, far in two:
        far.send(failed("wrong height", clean=True, kind="ValueError"))
    result = outcome(two)
    assert result.usable
    assert result.failure is not None
    assert isinstance(result.failure.error, ValueError)
    two[0][1].send(failed("wrong height", clean=True, kind="ValueError"))
    assert not outcome(two).usable


# -- small parts ---------------------------------------------------------------------------------


def test_first_cause_is_not_a_consequence() -> None:
    closed = Failure(0, CONSEQUENCE, RankLost("connection closed by peer"))
    cause, late = Failure(1, CAUSE, RankFailed("boom")), Failure(2, CAUSE, RankFailed("late"))
    assert failures.first_cause([closed, cause, late]) is cause
    assert failures.first_cause([closed]) is closed


def test_out_of_memory_gives_advice() -> None:
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    text = out_of_memory(error, 3, "cpu")
    assert text is not None
    assert text.startswith("rank 3 ran out of memory on cpu: use more stages")
    assert out_of_memory(RuntimeError("boom"), 0, "cpu") is None


def test_generators_survive_the_journey() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    encoded, _ = requests.encode({"generator": [generator]}, None, ["generator"])
    (rebuilt,) = requests.decode(Call(1, 0, encoded).arguments)["generator"]
    assert torch.equal(torch.rand(4, generator=rebuilt), torch.rand(4, generator=generator))


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    assert [devices.threads_per_rank(None, ranks) for ranks in (1, 3, 16)] == [8, 2, 1]


def test_ranks_share_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_count", lambda: 2)
    assert devices.choose_devices(None, 3, "auto") == ["cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(ValueError, match="use backend='gloo'"):
        devices.choose_devices(None, 3, "nccl")
    with pytest.raises(ValueError, match="a CUDA device of its own"):
        devices.choose_devices(["cuda:0", "cuda"], 2, "nccl")
