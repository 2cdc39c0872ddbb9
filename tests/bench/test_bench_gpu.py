"""The command for a GPU machine, as far as a CPU shows: all its code runs, and nothing is lost, hidden or left over."""

from __future__ import annotations

import importlib
import json
import lzma
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu import attention, machine, pack_nccl, report, running, waits
from bench.gpu.catalogue import LIMIT, PARTS, Part, chosen
from bench.gpu.painting import Case, pipeline
from bench.gpu.ranks import Spot
from bench.gpu.results import Results
from bench.gpu.setting import NCCL_SETTINGS, Rows, Setting, Skip, read_rows, version
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
H100 = Setting("cuda", "NVIDIA H100 80GB HBM3", gpus=1, nccl=23203, memory=80 * 2**30)


def command(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    call = [sys.executable, "-m", "bench.gpu", *options]
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_what_it_skips(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "gpu.json"), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [*found["parts"]] == [part.letter for part in PARTS]
    for part in found["parts"].values():
        assert part["status"] == "skipped"
        assert "sees no CUDA device" in part["why"]
    assert done.stdout.count("sees no CUDA device") == len(PARTS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--part", "a,x"), "part x is unknown: there are a: the laws"),
        (("--nccl", "nowhere.xz"), "nowhere.xz: there is no such file"),
        (("--wheels", "nowhere"), "nowhere: there are no .whl files"),
    ],
)
def test_bad_options_are_told_before_anything_starts(options: tuple[str, ...], text: str, tmp_path: Path) -> None:
    done = command(*options, "--out", str(tmp_path / "gpu.json"), folder=tmp_path)
    assert done.returncode == 2
    assert text in done.stdout
    assert not (tmp_path / "gpu.json").exists()


def test_the_parts_fit_into_nine_minutes() -> None:
    assert sum(part.limit for part in PARTS) <= LIMIT < 9 * 60
    assert [part.letter for part in chosen("c, A")] == ["a", "c"]


@pytest.mark.some(of=5)
@pytest.mark.timeout(600)  # ranks are processes: on a busy machine they take their time
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.letter)
def test_every_part_runs_at_tiny_size(part: Part, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows")
    importlib.import_module(part.module).run(Setting("cpu"), rows.note)
    assert rows.found == read_rows(tmp_path / "rows"), "all of it is on disk"
    assert rows.found
    assert not [row for row in rows.found if row["ok"] is False]
    if part.letter not in "c":
        assert [row for row in rows.found if row["ok"]], "nothing was decided"
    shown = report.rendered(
        {
            "machine": {"gpus": 1, "card": "X", "torch": "2", "cuda": "13", "diffusers": "0", "python": "3"},
            "parts": {part.letter: {"title": part.title, "status": "done", "seconds": 1.0, "rows": rows.found}},
        }
    )
    assert f"### {part.letter}: {part.title}" in shown


# -- a part as a process -----------------------------------------------------------------------------


def run_module(text: str, folder: Path, limit: float) -> dict[str, Any]:
    """Runs a part whose module has this text."""
    (folder / "a_part.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    part = Part("z", "a part", "a_part", limit)
    return running.run_part(part, Setting("cpu"), env, limit, folder, lambda _rows: None)


HANGS = """
import subprocess, time
def run(setting, note):
    child = subprocess.Popen(["sleep", "300"])
    note("first", True, {"child": child.pid})
    time.sleep(300)
"""


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_its_rows(tmp_path: Path) -> None:
    began = time.monotonic()
    found = run_module(HANGS, tmp_path, limit=6)
    assert time.monotonic() - began < 20
    assert found["status"] == "out of time"
    assert found["why"] == "ended after 6 s, after 'first'"
    (row,) = found["rows"]
    assert row["title"] == "first"
    for _ in range(50):
        if not _runs(row["child"]):
            break
        time.sleep(0.1)
    assert not _runs(row["child"])


WAITS = """
import os, time
def run(setting, note):
    note("first", True, {"pid": os.getpid()})
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_part(number: signal.Signals, tmp_path: Path) -> None:
    folder = str(tmp_path)
    (tmp_path / "a_part.py").write_text(WAITS)
    starts = (
        "import bench.gpu.__main__ as command, bench.gpu.catalogue as catalogue, sys\n"
        "part = catalogue.Part('z', 'a part', 'a_part', 100)\n"
        "command.chosen = lambda _text: [part]\n"
        f"command.app(['--cpu', '--out', {str(tmp_path / 'gpu.json')!r}])\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder]), "TMPDIR": folder}
    process = subprocess.Popen([sys.executable, "-c", starts], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    rows: list[dict[str, Any]] = []
    for _ in range(600):
        rows = [row for file in tmp_path.glob("*/z.jsonl") for row in read_rows(file)]
        if rows:
            break
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(20)
    pid = rows[0]["pid"]
    for _ in range(100):
        if not _runs(pid):
            break
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("text", "status", "why"),
    [
        ("def run(setting, note):\n    raise ArithmeticError('on fire')", "failed", "ArithmeticError: on fire"),
        ("from bench.gpu.setting import Skip\ndef run(*_):\n    raise Skip('no card')", "skipped", "no card"),
        ("def run(setting, note):\n    note('x', False, {})\n    note('y', True, {})", "wrong", "not as it must be: x"),
        ("import os, signal\ndef run(*_):\n    os.kill(os.getpid(), signal.SIGKILL)", "failed", "exit status -9"),
    ],
)
def test_how_a_part_went(text: str, status: str, why: str, tmp_path: Path) -> None:
    found = run_module(text, tmp_path, limit=60)
    assert (found["status"], found["why"]) == (status, why)


# -- results -----------------------------------------------------------------------------------------


def test_results_grow_and_stay_with_their_machine(tmp_path: Path) -> None:
    path, machine_a = tmp_path / "results" / "gpu.json", {"card": "A", "torch": "2", "cuda": "13"}
    Results(path, machine_a, "one").put("b", {"status": "done"})
    Results(path, machine_a, "two").put("a", {"status": "done"})
    assert [*json.loads(path.read_text())["parts"]] == ["a", "b"]
    Results(path, {**machine_a, "card": "B"}, "three").put("a", {"status": "done"})
    assert [*json.loads(path.read_text())["parts"]] == ["a"]
    assert [entry.name for entry in path.parent.iterdir()] == ["gpu.json"]


def test_the_page_says_plainly_that_there_are_no_figures() -> None:
    assert "There are no figures yet" in report.rendered(None)
    skipped = {"title": "x", "status": "skipped", "why": "no GPU", "seconds": 0.0, "rows": []}
    assert "There are no figures yet" in report.rendered({"machine": {}, "parts": {"a": skipped}})


def test_the_page_is_that_of_the_results() -> None:
    results = json.loads(report.RESULTS.read_text()) if report.RESULTS.exists() else None
    assert report.rendered(results) in report.PAGE.read_text(), "run `python -m bench.gpu.report`"


# -- what a GPU decides ------------------------------------------------------------------------------


def test_ranks_share_a_card_from_nccl_2_30_on() -> None:
    assert H100.why_no_nccl(2) is None
    old = Setting("cuda", "H100", gpus=1, nccl=22809, memory=80)
    assert "which NCCL 2.28.9 does not let them: bring 2.30" in str(old.why_no_nccl(2))
    assert Setting("cuda", "H100", gpus=4, nccl=22809).why_no_nccl(4) is None
    assert Setting("cuda", "H100", gpus=1).why_no_nccl(2) == "no NCCL was found"
    assert version(23203) == "2.32.3"


def test_ranks_have_cards_of_their_own_where_there_are_enough() -> None:
    four = Setting("cuda", gpus=4)
    assert four.places(4, own=True) == [f"cuda:{rank}" for rank in range(4)]
    assert four.places(2, own=False) == ["cuda:0", "cuda:0"]
    assert H100.places(2, own=True) == ["cuda:0", "cuda:0"]


def test_a_small_card_skips_what_does_not_fit() -> None:
    H100.needs(32)
    with pytest.raises(Skip, match="needs 32 GiB on one card, and L4 has 22"):
        Setting("cuda", "L4", memory=22 * 2**30).needs(32)


def test_nccl_is_loaded_in_place_of_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "libnccl.so.2.xz"
    packed.write_bytes(lzma.compress(b"a library"))
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    monkeypatch.setenv("NCCL_MAX_CTAS", "8")
    env = machine.environment(packed, tmp_path / "site", tmp_path)
    first, second = env["LD_PRELOAD"].split(":")
    assert (Path(first).read_bytes(), second) == (b"a library", "/other.so")
    assert env["NCCL_MAX_CTAS"] == "8"  # the user knows better
    assert {name for name in NCCL_SETTINGS if name in env} == set(NCCL_SETTINGS)
    assert str(tmp_path / "site") in env["PYTHONPATH"]
    packed.write_bytes(b"not packed")
    with pytest.raises(ValueError, match=r"not an \.xz file"):
        machine.environment(packed, None, tmp_path / "new")


def test_what_is_missing_is_named_with_what_to_do() -> None:
    from bench.gpu.__main__ import _why_none

    about = {"torch": "2.11", "gpus": 1, "missing": ["diffusers"]}
    with pytest.raises(ValueError, match=r"not installed here: diffusers\. Give --wheels DIR"):
        _why_none(about, cpu=False)
    with pytest.raises(ValueError, match="torch is not installed here"):
        _why_none({**about, "torch": None}, cpu=False)


# -- the parts can tell ------------------------------------------------------------------------------


def test_the_slow_kernel_is_seen() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        found = attention.kernels(Spot(0, 1, None, "cpu"), Case("flux", "fp32", None))
    title, fine, figures = attention._row("flux", "fp32", "plain", [found])
    assert not fine
    assert figures["kernels"]["math"] > 0
    assert title == "flux fp32, plain"


def test_a_wait_in_the_steady_state_is_seen_and_one_before_it_is_not() -> None:
    pipe, call = pipeline("flux", "fp32", "cpu", 4)
    forward, calls = pipe.transformer.forward, 0

    def reading(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (1, 9):  # two calls a step: in the first step, and in the fifth
            kwargs["timestep"].sum().item()
        return forward(*args, **kwargs)

    pipe.transformer.forward = reading
    try:
        with waits.steady(pipe, waits.CpuWatch()) as found:
            waits.request(pipe, call, num_inference_steps=waits.STEPS)
    finally:
        del pipe.transformer.forward
        pipeline.cache_clear()
    assert sum(found.values()) == 1
    assert waits._row("x", [dict(found)], {})[1] is False


def test_the_sizes_of_flux_are_its_own() -> None:
    """What `flux-real` makes on a card, with a block of each kind and on no device."""
    from bench.shapes import flux_real

    pipe, call = flux_real(1, 1, device="meta")
    model = pipe.transformer
    assert (model.inner_dim, model.config.num_attention_heads, model.config.attention_head_dim) == (3072, 24, 128)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (call["height"], call["max_sequence_length"]) == (1024, 512)


def test_a_prompt_of_512_tokens_fits_the_tiny_encoders() -> None:
    pipe = tiny.pipeline("flux")
    embeds, _, _ = pipe.encode_prompt(tiny.PROMPT, None, max_sequence_length=512)
    assert embeds.shape[1] == 512


# -- NCCL, packed ------------------------------------------------------------------------------------


def fat(codes: dict[int, bytes]) -> bytes:
    """A fat binary with code for these cards."""
    entries = b""
    for card, code in codes.items():
        header = struct.pack("<HHIQ", 2, 0x101, 64, len(code)).ljust(pack_nccl.ARCHITECTURE, b"\0")
        entries += (header + struct.pack("<I", card)).ljust(64, b"\0") + code
    return struct.pack(pack_nccl.HEADER, pack_nccl.MAGIC, 1, 16, len(entries)) + entries


def elf(parts: dict[str, bytes]) -> bytes:
    """An ELF file with these sections and nothing else."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*parts, ".shstrtab"))
    body, table, at = b"", b"", 64
    for name, data in {**parts, ".shstrtab": names}.items():
        table += struct.pack("<IIQQQQ", names.index(name.encode() + b"\0"), 1, 0, 0, at, len(data)).ljust(64, b"\0")
        body, at = body + data, at + len(data)
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 0x28, at)
    struct.pack_into("<HHH", header, 0x3A, 64, len(parts) + 1, len(parts))
    return bytes(header) + body + table


def test_the_code_of_one_card_is_kept_and_all_else_of_the_library(tmp_path: Path) -> None:
    codes = [{80: b"a" * 24, 90: b"b" * 40}, {90: b"c" * 8, 120: b"d" * 16}]
    library = elf({".text": b"host", ".nv_fatbin": bytes(16).join(map(fat, codes)), "__nv_relfatbin": b"r" * 32})
    packed = pack_nccl.slimmed(library, 90)
    assert (packed.kept, packed.blanked) == (48, 24 + 16 + 32)
    expected = library
    for gone in (b"a" * 24, b"d" * 16, b"r" * 32):
        expected = expected.replace(gone, bytes(len(gone)))
    assert packed.data == expected
    with pytest.raises(ValueError, match="no code for sm_75 is in it, only for sm_80, sm_90, sm_120"):
        pack_nccl.slimmed(library, 75)

    wheel = tmp_path / "nccl.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pack_nccl.LIBRARY, library)
    pack_nccl.main(wheel, tmp_path / "out" / "libnccl.so.2.xz", 90)
    assert machine.unpacked(tmp_path / "out" / "libnccl.so.2.xz", tmp_path).read_bytes() == expected


@pytest.mark.parametrize(
    ("library", "text"), [(b"text", "no 64-bit ELF"), (elf({".text": b"x"}), "no section .nv_fatbin")]
)
def test_what_is_no_such_library_is_refused(library: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pack_nccl.slimmed(library, 90)
