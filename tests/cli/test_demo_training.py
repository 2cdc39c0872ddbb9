"""The bundled model's training program: data rules, optimiser, schedule, tokenizers, restarts."""

import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from demo_training import icons
from demo_training.captions import Caption, CaptionMix, is_skin_tone, split_held_out
from demo_training.dataset import make_entries
from demo_training.ema import Average
from demo_training.latents import Shuffle
from demo_training.muon import Muon, orthogonalise
from demo_training.raster import shrink
from demo_training.stages import PLANS, Noise, Stage, find_stage
from demo_training.vocabulary import capital_copies, clip_tokenizer, t5_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CAPTIONS = [Caption(name, style) for name in ("red apple", "cat face") for style in ("noto", "flat")]


def test_captions_round_trip():
    caption = Caption.parse("bottle with popping cork, 3d style")
    assert caption == Caption("bottle with popping cork", "3d")
    assert Caption.parse(str(caption)) == caption


@pytest.mark.parametrize("line", ["red apple", "red apple, oil style", "red apple, flat"])
def test_captions_refuse_what_is_none(line):
    with pytest.raises(ValueError):
        Caption.parse(line)


def test_caption_forms_come_in_their_shares():
    rng = random.Random(0)
    count = Counter(CaptionMix().draw(Caption("red apple", "3d"), rng) for _ in range(20_000))
    assert set(count) == {
        "", "red apple", "3d style red apple", "a red apple in 3d style", "red apple, 3d style",
    }  # fmt: skip
    shares = {form: n / 20_000 for form, n in count.items()}
    assert shares[""] == pytest.approx(0.10, abs=0.01)
    assert shares["red apple, 3d style"] == pytest.approx(0.72, abs=0.015)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("waving-hand-medium-dark-skin-tone", True),
        ("backhand-index-pointing-right-dark", True),
        ("waving-hand-light", True),
        ("flashlight", False),
        ("red-apple", False),
        ("light-bulb", False),
    ],
)
def test_skin_tones_are_left_out(name, left_out):
    assert is_skin_tone(name) is left_out


def test_held_out_pairs_are_not_trained_on():
    seen, held = split_held_out(CAPTIONS, ["cat face, flat style"])
    assert [str(CAPTIONS[i]) for i in held] == ["cat face, flat style"]
    assert [str(CAPTIONS[i]) for i in seen] == [
        "red apple, noto style",
        "red apple, flat style",
        "cat face, noto style",
    ]


def test_held_out_pairs_must_exist():
    with pytest.raises(ValueError, match="without a picture: dog, flat style"):
        split_held_out(CAPTIONS, ["dog, flat style"])


def test_held_out_concepts_must_be_seen_in_another_style():
    with pytest.raises(ValueError, match="no other style"):
        split_held_out(CAPTIONS, ["cat face, flat style", "cat face, noto style"])


def test_entries_mark_core_and_held_out():
    entries = make_entries([*CAPTIONS, Caption("person", "noto")], {"cat face", "red apple"}, ["red apple, noto style"])
    assert [entry.core for entry in entries] == [True, True, True, True, False]
    assert [entry.held_out for entry in entries] == [True, False, False, False, False]
    with pytest.raises(ValueError, match="unicorn"):
        make_entries(CAPTIONS, {"unicorn"}, [])


def write_set(folder, drawings, hidden=(), chars=None):
    folder.mkdir(parents=True)
    data = {name: {"body": "<path/>"} | ({"hidden": True} if name in hidden else {}) for name in drawings}
    (folder / "icons.json").write_text(json.dumps({"icons": data, "width": 36, "height": 36}))
    (folder / "metadata.json").write_text(
        json.dumps({"categories": {"Food & Drink": ["red-apple"], "Flags": ["flag"]}})
    )
    (folder / "chars.json").write_text(json.dumps(chars or {}))
    return folder


def test_icon_sets_are_joined_by_name_and_code_point(tmp_path):
    names = ("red-apple", "flag", "hand-dark", "old")
    packages = {style: write_set(tmp_path / style, names, hidden=("old",)) for style in ("noto", "twemoji")}
    packages["flat"] = write_set(tmp_path / "flat", names, ("old",), {"1F34E": "red-apple", "1f590-fe0f": "hand-dark"})
    assets = tmp_path / "3d" / "assets"
    assets.mkdir(parents=True)
    packages["3d"] = assets.parent
    for code in ("1f34e", "1f34e-fe0f", "1f590", "ffff"):
        (assets / f"{code}.webp").touch()
    read = icons.read_icons(packages)
    drawn = [(icon.style, icon.name) for icon in read]
    svg = [(style, name) for style in ("noto", "twemoji", "flat") for name in ("red-apple", "flag")]
    assert drawn == [*svg, ("3d", "red-apple")]
    assert 'viewBox="0 0 36 36"' in read[0].svg
    assert icons.common_concepts(read) == ["red apple"]


def test_shrinking_averages_boxes_and_pads_what_is_not_square():
    checker = np.indices((8, 8)).sum(0) % 2 * 200
    picture = np.repeat(checker[..., None], 3, axis=2).astype(np.uint8)
    assert (shrink(picture, 4) == 100).all()
    wide = shrink(np.zeros((4, 8, 3), np.uint8), 4)
    assert wide[[0, -1]].min() == 255
    assert wide[1:3].max() == 0


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16), (3, 16, 48)])
def test_orthogonalise_moves_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    values = (u.mT @ result @ v.mT).diagonal(dim1=-2, dim2=-1)
    clear = s > 0.05 * s.amax(-1, keepdim=True)  # the smallest need more than five iterations
    assert values[clear].min() > 0.5
    assert values.max() < 1.3
    rest = u.mT @ result @ v.mT - torch.diag_embed(values)
    assert rest.abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon of its own")
def test_muon_steps_like_pytorchs():
    start = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    pair = (
        Muon([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for seed in range(3):
        ours.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs iterates in bfloat16


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("name", PLANS)
def test_plans_fill_the_time_and_end_slow(name):
    stages = PLANS[name]
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    assert stages[-1].rate(1.0, 10_000) <= 0.03
    assert [find_stage(stages, part / 1000)[0] for part in range(1000)] == sorted(
        find_stage(stages, part / 1000)[0] for part in range(1000)
    )
    assert find_stage(stages, 1.0) == (len(stages) - 1, pytest.approx(1.0))


def test_the_gpu_plans_rate_never_jumps():
    stages = PLANS["gpu"]
    for before, after in itertools.pairwise(stages):
        assert before.rate(1.0, 10_000) == pytest.approx(after.rate(0.0, 10_000))


def test_rates_warm_up_hold_and_fall():
    stage = Stage("x", 1.0, warmup=10, hold=0.5, decay="cosine", end=0.1)
    assert stage.rate(0.0, 0) == pytest.approx(0.1)
    assert stage.rate(0.4, 50) == 1.0
    assert stage.rate(0.75, 50) == pytest.approx(0.55)
    assert stage.rate(1.0, 50) == pytest.approx(0.1)


def test_noise_levels_follow_the_mixture():
    draw = Noise(near_one=0.5).draw(20_000, torch.Generator().manual_seed(0))
    assert draw.min() >= 0
    assert draw.max() <= 1
    assert (draw >= 0.65).float().mean() > 0.6
    plain = Noise().draw(20_000, torch.Generator().manual_seed(0))
    assert (plain == 1).float().mean() == pytest.approx(0.03, abs=0.005)
    assert Noise(high=1.0).draw(1000, torch.Generator().manual_seed(0)).min() >= 0.65


def test_shuffle_shows_every_picture_once_per_round():
    shuffle = Shuffle(10, random.Random(0))
    taken = shuffle.take(7) + shuffle.take(13)
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))


def test_average_swaps_in_and_back():
    layer = torch.nn.Linear(2, 2, bias=False)
    average = Average(layer)
    with torch.no_grad():
        layer.weight += 1
    live = layer.weight.detach().clone()
    average.update(0.75)
    with average.swapped_in():
        torch.testing.assert_close(layer.weight, live - 0.75)
    assert torch.equal(layer.weight, live)


@pytest.fixture(scope="module")
def tokenizers():
    corpus = [str(caption) for caption in CAPTIONS] * 3
    return clip_tokenizer(corpus, size=600), t5_tokenizer(corpus)


def test_tokenizers_keep_known_words_whole_and_spell_the_rest(tokenizers):
    clip, t5 = tokenizers
    assert clip.tokenize("red apple") == ["red</w>", "apple</w>"]
    assert t5.tokenize("red apple, flat style") == ["▁red", "▁apple", ",", "▁flat", "▁style"]
    assert t5.unk_token_id not in t5("zebra").input_ids
    assert clip.unk_token_id not in clip("zebra").input_ids[1:-1]


def test_capitalised_words_point_to_their_lower_case(tokenizers):
    t5 = tokenizers[1]
    pairs = {tuple(t5.convert_ids_to_tokens(pair)) for pair in capital_copies(t5)}
    assert ("▁Apple", "▁apple") in pairs


@pytest.fixture
def make_trainer(tokenizers, tmp_path):
    from demo_training.model import Shape, new_autoencoder, new_pipeline
    from demo_training.transformer import Settings, Trainer, TrainingSet

    def make():
        torch.manual_seed(0)
        pipe = new_pipeline(new_autoencoder((8, 8, 8, 8)), *tokenizers, Shape(1, 1, 1))
        latents = {size: torch.randn(2, 4, 16, size // 8, size // 8) for size in (128, 256)}
        settings = Settings(PLANS["gpu"], 1.0, torch.device("cpu"), tmp_path)
        return pipe, Trainer(pipe, TrainingSet(CAPTIONS, latents), settings)

    return make


def test_a_restart_equals_an_uninterrupted_run(make_trainer, tmp_path):
    stage = Stage("x", 1.0, batch=3, large=0.5, large_batch=2)
    _, whole = make_trainer()
    for _ in range(2):
        whole.train_step(stage, 1.0)
    whole.save()
    _, again = make_trainer()
    again.restore(tmp_path / "checkpoint.pt")
    assert whole.train_step(stage, 1.0) == again.train_step(stage, 1.0)
    pairs = zip(whole.painter.parameters(), again.painter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_training_learns_and_exports_a_pipeline(make_trainer, tmp_path):
    from demo_training.model import export, load_pipeline

    stage = Stage("x", 1.0, batch=4, warmup=0)
    pipe, trainer = make_trainer()
    first = trainer.train_step(stage, 1.0)
    for _ in range(7):
        last = trainer.train_step(stage, 1.0)
    assert last < first
    export(pipe, tmp_path / "model", [("concepts.txt", "red apple\n")])
    painted = load_pipeline(tmp_path / "model")(
        "red apple", height=64, width=64, num_inference_steps=1, max_sequence_length=16
    )
    assert painted.images[0].size == (64, 64)
    assert (tmp_path / "model" / "concepts.txt").read_text() == "red apple\n"
