"""The bundled model: what ships, what it paints, how well it fits a few real pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from patchpipe import demo

REPO = Path(__file__).resolve().parents[2]
REFERENCE = Path(__file__).parents[1] / "data" / "reference-pictures.npz"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(demo.MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reference():
    return np.load(REFERENCE)


def paint(pipe, caption, **changes):
    call = demo.call_defaults() | {"num_inference_steps": 4} | changes
    return np.asarray(pipe(caption, generator=torch.Generator().manual_seed(0), **call).images[0], dtype=float)


def test_paints_at_the_size_of_its_call_defaults(pipe):
    picture = paint(pipe, "red apple, 3d style")
    assert picture.shape == (128, 128, 3)


def test_a_red_apple_is_red_on_white(pipe):
    picture = paint(pipe, "red apple, 3d style")
    middle = picture[44:84, 44:84].mean(axis=(0, 1))
    assert middle[0] > 150
    assert middle[0] > 1.5 * middle[1:].max()
    assert picture[:8, :8].mean() > 225


def test_the_caption_decides_the_colour(pipe):
    """Of the same noise, a lemon is made yellow and a blue heart blue."""
    yellow = paint(pipe, "lemon, flat style", true_cfg_scale=1.0)[44:84, 44:84].mean(axis=(0, 1))
    blue = paint(pipe, "blue heart, flat style", true_cfg_scale=1.0)[44:84, 44:84].mean(axis=(0, 1))
    assert yellow[1] > yellow[2] + 50
    assert blue[2] > blue[0] + 50


@torch.no_grad()
def flow_loss(pipe, pixels, captions, level, draws=2):
    """Mean squared error of the model's flow at one noise level, over fixed noises, written out anew here."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = pipe.vae.config
    clean = (pipe.vae.encode(x).latent_dist.mode() - vae.shift_factor) * vae.scaling_factor
    clean = pipe._pack_latents(clean, len(clean), 16, 16, 16)
    embeds, pooled, txt_ids = pipe.encode_prompt(captions, captions, max_sequence_length=16)
    img_ids = pipe._prepare_latent_image_ids(1, 8, 8, clean.device, clean.dtype)
    total = 0.0
    for seed in range(draws):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        flow = pipe.transformer(
            (1 - level) * clean + level * noise, embeds, pooled, torch.full((len(clean),), level), img_ids, txt_ids
        ).sample
        total += (flow - (noise - clean)).square().mean().item() / draws
    return total


@pytest.mark.parametrize(("held_out", "limit"), [(False, 0.18), (True, 0.25)])
def test_flow_loss_of_real_pictures_is_small(pipe, reference, held_out, limit):
    """Predicting nothing gives about 2, an untrained text side about 0.3 at this level."""
    rows = reference["held_out"] == held_out
    assert rows.sum() == 6
    loss = flow_loss(pipe, reference["pixels"][rows], reference["captions"][rows].tolist(), 0.5)
    assert 0.02 < loss < limit


def test_captions_explain_pictures_never_seen(pipe, reference):
    """From pure noise, the right captions of held-out pictures beat captions of other pictures clearly."""
    rows = reference["held_out"]
    pixels, captions = reference["pixels"][rows], reference["captions"][rows].tolist()
    right = flow_loss(pipe, pixels, captions, 1.0)
    wrong = flow_loss(pipe, pixels, captions[1:] + captions[:1], 1.0)
    assert right < 0.6 * wrong


def test_autoencoder_reconstructs(pipe, reference):
    x = torch.from_numpy(reference["pixels"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * ((y - x) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() > 26


def test_reference_pictures_follow_the_held_out_list(reference):
    held_out = set(demo.held_out())
    assert [caption in held_out for caption in reference["captions"]] == reference["held_out"].tolist()
    assert REFERENCE.stat().st_size < 100_000


def test_call_defaults_are_those_of_the_card():
    assert demo.call_defaults() == {
        "negative_prompt": "",
        "true_cfg_scale": 3.0,
        "height": 128,
        "width": 128,
        "num_inference_steps": 20,
        "max_sequence_length": 32,
    }


def test_call_defaults_elsewhere(tmp_path):
    assert demo.call_defaults(tmp_path) == {}
    assert demo.call_defaults("some/hub-id") == {}
    (tmp_path / "call.json").write_text("[1]")
    with pytest.raises(ValueError, match="object"):
        demo.call_defaults(tmp_path)
    (tmp_path / "call.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        demo.call_defaults(tmp_path)


def test_lists_beside_the_weights():
    concepts, held_out = demo.concepts(), demo.held_out()
    assert len(set(concepts)) == 234
    assert len(set(held_out)) == 60
    assert {caption.rpartition(", ")[0] for caption in held_out} <= set(concepts)


def test_size_on_disk():
    folder = Path(demo.__file__).parent
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 45e6


def test_files_can_be_read_by_all():
    for path in demo.MODEL_DIR.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o444 == 0o444, path
            assert not path.stat().st_mode & 0o111, path


@pytest.mark.parametrize("file", [REPO / "NOTICE", demo.MODEL_DIR / "README.md"], ids=["notice", "card"])
@pytest.mark.parametrize(
    "words",
    [
        ("Noto Emoji", "Google Inc", "https://github.com/googlefonts/noto-emoji"),
        ("Twemoji", "Twitter, Inc", "jdecked", "CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/"),
        ("Fluent Emoji", "Microsoft Corporation", "MIT", "https://github.com/microsoft/fluentui-emoji"),
        ("rasterised", "composited on white", "128x128"),
    ],
    ids=["noto", "twemoji", "fluent", "changes"],
)
def test_artists_are_credited(file, words):
    text = file.read_text(encoding="utf-8")
    assert [word for word in words if word not in text] == []


def test_notice_holds_the_mit_licence():
    text = " ".join((REPO / "NOTICE").read_text(encoding="utf-8").split())
    assert "Copyright (c) Microsoft Corporation. Permission is hereby granted, free of charge" in text
    assert "Apache License Version 2.0" in " ".join((REPO / "LICENSE").read_text(encoding="utf-8").split())


def test_card_names_only_what_ships():
    text = (demo.MODEL_DIR / "README.md").read_text(encoding="utf-8")
    assert "eval/" not in text
    assert "RECIPE.md" not in text
