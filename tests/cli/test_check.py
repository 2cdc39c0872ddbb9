"""``patchpipe check``: the laws hold on a tiny copy, a wrong plan is found out, and plans are proposed."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from patchpipe.checking.laws import LAWS, Trial
from patchpipe.checking.proposal.propose import propose
from patchpipe.checking.proposal.writing import written
from patchpipe.checking.subjects import Subject, subject_of
from patchpipe.checking.threads import on_ranks
from patchpipe.checking.tiny import CannotShrink, tiny_settings
from patchpipe.cli import app
from patchpipe.config import ParallelConfig
from patchpipe.demo import MODEL_DIR
from patchpipe.models import plan_for
from tests.support.ranks import quieten

SMALL = {"SD3Transformer2DModel": {"pos_embed_max_size": 16}, "LTXVideoTransformer3DModel": {}}
TRUE_KEYS = [law for law in LAWS if law.still]


def setup_module() -> None:
    quieten()


def subject(name: str) -> Subject:
    return subject_of(name, SMALL.get(name, {}))


def test_a_tiny_copy_has_few_blocks_and_the_inputs_of_the_large_one() -> None:
    from diffusers import FluxTransformer2DModel

    settings = tiny_settings(FluxTransformer2DModel, {"in_channels": 384}, alone=False)
    kept = {name: settings[name] for name in ("in_channels", "joint_attention_dim", "attention_head_dim")}
    assert kept == {"in_channels": 384, "joint_attention_dim": 4096, "attention_head_dim": 128}
    assert (settings["num_layers"], settings["num_single_layers"], settings["num_attention_heads"]) == (3, 3, 2)


def test_the_laws_hold() -> None:
    found = subject("SD3Transformer2DModel")
    for finding in Trial(found.model, found.sample).findings():
        assert finding.outcome == "holds", finding


def test_a_plan_with_segments_in_the_wrong_order_is_found_out() -> None:
    """Every other law holds for it: ranks agree on what is wrong."""
    found, plan = subject("SD3Transformer2DModel"), plan_for("SD3Transformer2DModel")
    [listing] = plan.blocks
    wrong = replace(plan, blocks=(replace(listing, attention={"attn": ("text", "image")}),))
    [finding] = Trial(found.model, found.sample, wrong).findings(TRUE_KEYS)
    assert finding.outcome == "fails"
    assert "of the largest value" in finding.detail


@pytest.mark.parametrize("name", SMALL)
def test_plans_are_proposed_as_they_are(name: str) -> None:
    found, plan = subject(name), plan_for(name)
    proposed = propose(found.model, found.sample).plan
    assert proposed.grid.axes == plan.grid.axes
    for own, other in zip(plan.blocks, proposed.blocks, strict=True):
        assert (other.path, other.count, other.streams) == (own.path, own.count, own.streams)
        assert other.attention == {name: own.attention[name] for name in other.attention}  # attn2 is of SD3.5
    [finding] = Trial(found.model, found.sample, proposed).findings(TRUE_KEYS)
    assert finding.outcome == "holds", (finding, written(proposed))


def test_a_folder_s_own_pipeline_says_what_the_transformer_is_called_with() -> None:
    found = subject_of(str(MODEL_DIR), {})
    assert [call.name for call in found.sample.calls] == ["cond", "uncond"]
    assert len(found.model.transformer_blocks) == 3
    [finding] = Trial(found.model, found.sample).findings(TRUE_KEYS)
    assert finding.outcome == "holds", finding


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept to a core here")
def test_ranks_that_are_threads_stay_on_one_core_and_others_where_they_are() -> None:
    before = os.sched_getaffinity(0)
    first, second = on_ranks(ParallelConfig(pipefusion=2), lambda _group, _rank: os.sched_getaffinity(0), 60)
    assert first == second
    assert len(first) == 1
    assert os.sched_getaffinity(0) == before


def test_what_is_needed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["check", "FluxTransformerModel"]) == 2
    assert "did you mean FluxTransformer2DModel" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CannotShrink, match="--set NAME=VALUE"):
        subject_of("HunyuanDiT2DModel", {})
    assert app(["check", "LTX2VideoTransformer3DModel", "--set", "num_layers"]) == 2


def test_the_command_prints_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["check", "SD3Transformer2DModel", "--set", "pos_embed_max_size=16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"]
    assert {finding["outcome"] for finding in told["findings"]} == {"holds"}
    assert torch.get_num_threads() == 1
