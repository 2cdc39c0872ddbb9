"""What a newcomer meets: cards by the names people use, files that are not lost, and what was probably meant."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from patchpipe.cli import app
from patchpipe.cli.commands import demo
from patchpipe.cli.job import check_negative, with_strength
from patchpipe.cli.view import View
from patchpipe.config import ParallelConfig
from patchpipe.errors import did_you_mean
from patchpipe.files import check_new, free_name, numbered
from patchpipe.planner.machine.cards import CARDS, card_found, card_named
from patchpipe.planner.machine.links import LINKS, link_named

pytestmark = pytest.mark.timeout(120)


# -- cards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "card"),
    [
        *((name, "rtx4090") for name in ("4090", "rtx 4090", "RTX4090", "NVIDIA GeForce RTX 4090")),
        *((name, "h100") for name in ("h100-sxm", "H100", "NVIDIA H100 80GB HBM3")),
        *((name, "h100-pcie") for name in ("NVIDIA H100 PCIe", "h100 pcie")),
        *((name, "a100-40gb") for name in ("NVIDIA A100-SXM4-40GB", "a100 40gb", "A100-40")),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("a6000", "rtx-a6000"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("4070 ti", "rtx4070ti"),
    ],
)
def test_a_card_has_the_names_that_people_and_drivers_give_it(name: str, card: str) -> None:
    assert card_named(name).device.name == card


def test_every_card_has_a_source_and_a_link_and_no_name_twice() -> None:
    names = [name for card in CARDS for name in card.names]
    assert len(names) == len(set(names))
    assert all(card.device.source for card in CARDS)
    assert {card.link for card in CARDS} <= {link.name for link in LINKS}
    wanted = (
        "4090 5090 5080 3090 4080 4070ti a6000 6000ada pro6000 l4 l40 l40s a10 a10g a100 h100 h200 b200 gb200 t4 v100"
    )
    assert all(card_found(name) for name in wanted.split())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtx4099", "did you mean rtx4090?"),
        ("50900", "did you mean rtx5090?"),
        ("m3 max", "use gb200, b200, h200"),
        ("GeForce RTX 4090 Laptop GPU", "is unknown"),  # a chip of its own under the desktop card's name
    ],
)
def test_an_unknown_card_gets_a_near_miss_or_the_list(name: str, words: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as caught:
        card_named(name)
    assert words in str(caught.value)


def test_links_are_found_in_any_spelling() -> None:
    assert link_named("PCIe 4") is link_named("pcie-gen4") is link_named("pcie4")
    with pytest.raises(ValueError, match="did you mean nvlink4"):
        link_named("nvlnk4")


# -- near misses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("heigth", "height"),
        ("negative", "negative_prompt"),
        ("Guidance_Scale", "guidance_scale"),
        ("steps", "num_inference_steps"),
        ("foo", None),
        ("image", None),  # five letters of "height" and "generator" are no near miss
        ("strength", None),
    ],
)
def test_suggestions_are_near_misses_or_none(given: str, meant: str | None) -> None:
    known = ["prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator"]
    assert did_you_mean(given, known) == meant


# -- files ---------------------------------------------------------------------------------------


def test_the_next_free_name_overwrites_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert free_name(out) == out
    out.touch()
    assert free_name(out).name == "out-2.png"
    assert free_name(out, 2) == out  # out-1.png and out-2.png are free
    (tmp_path / "out-2.png").touch()
    assert free_name(out).name == "out-3.png"
    assert [file.name for file in numbered(free_name(out, 2), 2)] == ["out-2-1.png", "out-2-2.png"]


def test_a_file_is_overwritten_only_when_asked_to(tmp_path: Path) -> None:
    file = tmp_path / "mine.png"
    file.write_text("precious")
    with pytest.raises(ValueError, match=r"mine\.png is already there: name another file, or add --force"):
        check_new(file, force=False)
    check_new(file, force=True)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["generate", "x", "-o", "mine.png"], "mine.png"),
        (["generate", "x", "y", "-o", "mine.png"], "mine-2.png"),
        (["generate", "x", "y", "--sheet", "-o", "mine.png"], "mine.png"),
        (["generate", "x", "--json", "mine.json"], "mine.json"),
        (["generate", "x", "y", "--pipefusion", "2", "--trace", "mine.json"], "mine-1.json"),
        (["plan", "--devices", "2", "--device", "l40", "--json", "mine.json"], "mine.json"),
        (["profile", "-o", "mine.json"], "mine.json"),
    ],
)
def test_no_command_overwrites_a_file(
    command: list[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).write_text("precious")
    assert app(args=command) == 2
    assert f"{file} is already there" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == [file]
    assert Path(file).read_text() == "precious"


# -- a layout without being asked ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--layout", "auto", "--cfg", "2"], "--layout auto chooses by itself: leave it out, or --cfg"),
        (["--layout", "plain", "--warmup", "all"], "--layout plain is diffusers alone: leave it out, or --warmup"),
        (["--layout", "plain", "--compare"], "leave out --compare, --trace and --in-flight"),
        (["--layout", "fast"], "is not one of 'auto', 'exact', 'plain'"),
    ],
)
def test_layout_options_that_contradict_each_other(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app(args=["generate", "x", *args]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1


def test_generate_takes_a_layout_and_says_which_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["generate", "red heart, flat style", "--devices", "cpu,cpu", "--steps", "1", "--json", "run.json"]
    assert app(args=args) == 0
    text = " ".join(capsys.readouterr().out.split())
    told = json.loads(Path("run.json").read_text())
    assert f"layout {ParallelConfig(**told['config']).describe()} {told['layout_reason']}" in text
    assert told["config"]["cfg"] == 2
    assert "→ out.png" in text
    assert "s in all, loading included" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"negative_prompt": "blue"},
            "with true_cfg_scale above 1, but true_cfg_scale is 1: add --set true_cfg_scale=4",
        ),
        ({"negative_prompt": "blue", "true_cfg_scale": 1.0}, "--negative would have no effect"),
        ({"negative_prompt": "blue", "true_cfg_scale": 4.0}, None),
        ({"negative_prompt": ""}, None),
        ({}, None),
    ],
)
def test_a_negative_prompt_without_effect_is_told(arguments: dict[str, Any], words: str | None) -> None:
    pipeline = SimpleNamespace(pipeline_class="FluxPipeline")
    engine: Any = SimpleNamespace(
        arguments=("negative_prompt", "true_cfg_scale"), defaults={"true_cfg_scale": 1.0}, ranks=[pipeline]
    )
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        check_negative(arguments, engine)


@pytest.mark.parametrize(
    ("defaults", "given", "expected"),
    [
        ({"true_cfg_scale": 4.0}, {"guidance_scale": 3.0}, {"true_cfg_scale": 3.0}),  # as Qwen-Image
        ({"true_cfg_scale": 4.0}, {"guidance_scale": 3.0, "true_cfg_scale": 2.0}, {"true_cfg_scale": 2.0}),
        ({"true_cfg_scale": 1.0, "guidance_scale": 3.5}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0}),  # as FLUX
        ({"true_cfg_scale": 4.0}, {}, {}),
    ],
)
def test_guidance_goes_by_the_name_that_the_pipeline_looks_at(
    defaults: dict[str, float], given: dict[str, float], expected: dict[str, float]
) -> None:
    engine: Any = SimpleNamespace(arguments=("true_cfg_scale", "guidance_scale"), defaults=defaults)
    assert with_strength(given, engine) == expected


# -- the demo ------------------------------------------------------------------------------------


def way(name: str, seconds: float, shade: int, reason: str | None = None) -> demo.Way:
    engine: Any = SimpleNamespace(devices=("cpu",) * (1 if "plain" in name else 2), layout_reason=reason)
    return demo.Way(name, engine, reason or "", [seconds, seconds], [Image.new("RGB", (128, 128), (shade,) * 3)])


def test_the_demo_shows_seconds_and_likeness_of_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    ways = [
        way("plain diffusers", 2.0, 100),
        way("cfg 2", 1.0, 100, "predicted quicker"),
        way("pipefusion 2", 4.0, 101),
    ]
    demo._show(View(), ways)
    lines = capsys.readouterr().out.splitlines()
    told = {line.split("  ")[1]: line.split() for line in lines if "×" in line}
    assert told["plain diffusers"][-2:] == ["1.00×", "–"]
    assert told["cfg 2"][-4:] == ["2", "1.00", "2.00×", "identical"]
    assert told["pipefusion 2"][-3:] == ["0.50×", "48.1", "dB"]
    text = " ".join(" ".join(lines).split())
    assert "The planner takes cfg 2: predicted quicker." in text
    assert "PipeFusion pays where links are slow (PCIe, Ethernet) or the model is too large for one card" in text
    sheet = demo._sheet(ways, ("a grey square",))
    assert sheet.width > 3 * 256


def test_the_demo_refuses_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.png").write_text("precious")
    for args, words in ((["--rounds", "0"], "--rounds 0 must be 1"), (["-o", "mine.png"], "mine.png is already there")):
        assert app(args=["demo", *args]) == 2
        assert words in capsys.readouterr().err
    assert Path("mine.png").read_text() == "precious"
