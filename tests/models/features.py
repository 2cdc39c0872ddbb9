"""What diffusers' pipelines can do, by family: where each is tested, or why it is refused or not offered.

``python -m tests.models.features`` writes the table into docs/pipelines.md; ``test_features.py`` checks every cell.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tests import tiny

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
MARKS = ("<!-- features: written by `python -m tests.models.features` -->\n", "<!-- end of features -->\n")


def picture(shade: int = 0, width: int = 48, height: int = 64) -> Image.Image:
    """A gradient, turned so that pictures differ."""
    return Image.linear_gradient("L").rotate(90 * shade).convert("RGB").resize((width, height))


def mask() -> Image.Image:
    """White, which is to change, in its lower half."""
    return Image.linear_gradient("L").resize((48, 64)).point(lambda value: 255 if value > 127 else 0)


def _end_guidance(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback as diffusers' guide has it: no guidance after the second step."""
    if step == 1:
        pipe._guidance_scale = 1.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
    return tensors


@dataclass(frozen=True)
class Call:
    """A call that is painted by the suite: synchronous steps as plain diffusers, patches on two ranks as on one.

    Attributes:
        model: The tiny pipeline.
        pipeline: The class that is called; its own, if not given.
        changes: Arguments beside those that suit the tiny pipeline.
        schedule: Patches.
        scheduler: Its class, where it is not the tiny pipeline's.
    """

    model: str
    pipeline: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"patch_rows": (1, 3), "warmup": 1})
    scheduler: str = ""


TWO = [tiny.PROMPT, tiny.OTHER_PROMPT]  # in length
TURNED = [tiny.OTHER_PROMPT, tiny.PROMPT]
SIGMAS = [1.0, 0.7, 0.5, 0.2]
FRAMES = {"patch_rows": (2, 3), "warmup": 1}
CUT_EMBEDS = {"callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"]}
CALLS = {
    "FLUX prompts": Call("flux", "", {"prompt": TWO, "negative_prompt": TURNED, "num_images_per_prompt": 2}),
    "FLUX sigmas": Call("flux-guided", "", {"sigmas": SIGMAS, "guidance_scale": 2.0}),
    "FLUX inpainting": Call("flux", "FluxInpaintPipeline", {"image": picture(), "mask_image": mask(), "strength": 0.8}),
    "SD3 prompts": Call("sd3", "", {"prompt": TWO, "negative_prompt": TURNED, "num_images_per_prompt": 2}),
    "SD3 sigmas": Call("sd35", "", {"sigmas": SIGMAS}),
    "SD3 inpainting": Call(
        "sd3-16", "StableDiffusion3InpaintPipeline", {"image": picture(), "mask_image": mask(), "strength": 0.8}
    ),
    "SD3 interval": Call("sd3", "", {"callback_on_step_end": _end_guidance, **CUT_EMBEDS}),
    "Qwen prompts": Call("qwen", "", {"prompt": TWO, "negative_prompt": TURNED, "num_images_per_prompt": 2}),
    "Qwen sigmas": Call("qwen", "", {"sigmas": SIGMAS}),
    "Qwen inpainting": Call(
        "qwen", "QwenImageInpaintPipeline", {"image": picture(), "mask_image": mask(), "strength": 0.8}
    ),
    "Wan prompts": Call(
        "wan", "", {"prompt": TWO, "negative_prompt": TURNED, "num_videos_per_prompt": 2}, FRAMES,
    ),
    "Wan interval": Call("wan", "", {"callback_on_step_end": _end_guidance, "callback_on_step_end_tensor_inputs": []},
                         FRAMES),
    "Wan video": Call(
        "wan", "WanVideoToVideoPipeline",
        {"video": [picture(at) for at in range(17)], "timesteps": [900, 700, 400, 100], "strength": 0.8}, FRAMES,
        "FlowMatchEulerDiscreteScheduler",  # UniPC takes no timesteps
    ),
    "Wan mask": Call(
        "wan-vace", "",
        {"video": [picture(at) for at in range(17)], "mask": [mask()] * 17, "reference_images": [picture(2)]},
        {"patch_rows": (2, 4), "warmup": 1},  # the reference picture is a frame more
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Here:
    """Tested by the suite itself, by one of its calls."""

    call: str
    note: str = ""


@dataclass(frozen=True)
class There:
    """Tested elsewhere, by name of the test."""

    test: str
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """Refused at once, with the reason and what to do instead; a test elsewhere shows it."""

    test: str
    note: str


@dataclass(frozen=True)
class Not:
    """Not offered by diffusers: no pipeline of the family has the argument, or there is no class of such a name."""

    argument: str = ""
    named: str = ""
    note: str = ""


Cell = Here | There | Refused | Not
FAMILIES = {"FLUX.1": "Flux", "Stable Diffusion 3": "StableDiffusion3", "Qwen-Image": "QwenImage", "Wan": "Wan"}
LAW_1, LAW_2 = (
    "laws/test_laws.py::test_law_1_synchronous_is_exact",
    "laws/test_laws.py::test_law_2_the_schedule_never_shows",
)
FROM_PIPE = "pipeline/test_pipelines.py::test_pipelines_on_the_same_weights_are_served_in_turn"
CONTROL = "pipeline/test_controlnet.py::test_a_control_net_is_exact_and_streams_as_it_should"
STEADY = "schedule/test_request.py::test_every_scheduler_streams_and_equals_one_process"
VIDEO = "models/test_video.py::test_every_family_streams_as_the_oracle_does"
RELATIVES = "laws/test_laws.py::test_law_1_synchronous_is_exact_for_relatives"
IP_ADAPTER = "pipeline/test_ip_adapter.py::test_an_ip_adapter_is_exact_and_streams_as_it_should"
LAYER = "`apply_layer_skip()` is refused"
LORA = "pipeline/test_lora.py::test_lora_loaded_before_or_after_is_bit_equal_to_plain_diffusers"
LORA_WAN = "models/test_family_features.py::test_pictures_apart_with_lora_and_weights_that_come_and_go"
CACHES = "recipes/test_recipes.py::test_step_caches_of_other_families_are_right_where_every_step_is_whole"
WHOLE = "where every step is whole; [refused](recipes.md#step-caches) elsewhere"
QUANTISED = "loading/test_quantised.py::test_a_quantised_pipeline_is_that_of_diffusers"
QUANTISED_WAN = "models/test_family_features.py::test_requests_in_flight_together_with_quantised_weights"
NUNCHAKU = Refused("recipes/test_recipes.py::test_weights_of_nunchaku_are_refused_by_name", "use TorchAoConfig")
ONE_FILE = "recipes/test_recipes.py::test_a_transformer_from_one_file_is_served"
COMPILED = "stage/test_compile.py::test_graphs_are_few_and_paint_the_same"
ONCE = "guidance is read before the steps"
FEATURES: dict[str, tuple[Cell, Cell, Cell, Cell]] = {
    "from text": (There(LAW_1), There(LAW_1), There(LAW_1), There(RELATIVES)),
    "from a picture or clip": (
        There(FROM_PIPE), There(FROM_PIPE), There(FROM_PIPE), Here("Wan video", "and from a picture"),
    ),
    "inpainting": (
        Here("FLUX inpainting"), Here("SD3 inpainting"), Here("Qwen inpainting"), Here("Wan mask", "VACE"),
    ),
    "editing with references": (
        There("models/test_flux_relatives.py::test_they_are_exact_and_stream_as_they_should", "Kontext"),
        Not(named="Edit|Kontext|Reference"),
        There("models/test_images.py::test_every_family_paints_what_one_device_paints", "Edit, Edit-Plus"),
        Here("Wan mask", "VACE"),
    ),
    "ControlNet": (There(CONTROL), There(CONTROL), There(CONTROL), There(VIDEO, "VACE")),
    "IP-Adapter": (There(IP_ADAPTER), There(IP_ADAPTER), Not("ip_adapter_image"), Not("ip_adapter_image")),
    "several pictures or clips per prompt": (
        Here("FLUX prompts"), Here("SD3 prompts"), Here("Qwen prompts"), Here("Wan prompts"),
    ),
    "negative prompts": (Here("FLUX prompts"), Here("SD3 prompts"), Here("Qwen prompts"), Here("Wan prompts")),
    "prompts of different length in a batch": (
        Here("FLUX prompts"), Here("SD3 prompts"), Here("Qwen prompts"), Here("Wan prompts"),
    ),
    "guidance: as an input (distilled)": (
        Here("FLUX sigmas"), Not(named="Distilled"),
        Refused("stage/test_masks.py::test_configurations_nothing_tests_are_refused", "no published model has it"),
        Not(named="GuidanceDistilled"),
    ),
    "guidance: CFG in one batch": (
        Not(note="two calls"), There(LAW_2), Not(note="two calls"), Not(note="two calls"),
    ),
    "guidance: CFG in two calls (true CFG)": (
        There(LAW_2), Not("true_cfg_scale", note="one batch"), There(LAW_2), There(RELATIVES),
    ),
    "guidance: two strengths": (
        Not("guidance_scale_2"), Not("guidance_scale_2"), Not("guidance_scale_2"),
        There("models/test_families.py::test_the_second_transformer_warms_up_with_keys_and_values_of_its_own", "A14B"),
    ),
    "guidance: rescale": (
        Not("guidance_rescale"), Not("guidance_rescale"), There(LAW_2, "the norm, in every guided call"),
        Not("guidance_rescale"),
    ),
    "guidance: skip-layer": (
        Not("skip_guidance_layers", note=LAYER),
        There("pipeline/test_skip_layers.py::test_blocks_that_a_call_leaves_out_hand_their_streams_through"),
        Not("skip_guidance_layers", note=LAYER), Not("skip_guidance_layers", note=LAYER),
    ),
    "guidance: perturbed attention (PAG)": (
        Not("pag_scale"),
        Refused(
            "pipeline/test_pipelines.py::test_what_cannot_be_served_is_refused_by_name", "use the class without PAG"
        ),
        Not("pag_scale"), Not("pag_scale"),
    ),
    "guidance: in some steps only, by a callback": (
        Not("guidance_interval", note=ONCE), Here("SD3 interval"), Not("guidance_interval", note=ONCE),
        Here("Wan interval"),
    ),
    "custom sigmas": (Here("FLUX sigmas"), Here("SD3 sigmas"), Here("Qwen sigmas"), Not("sigmas")),
    "custom timesteps": (
        Not("timesteps"), Not("timesteps"), Not("timesteps"), Here("Wan video", "`WanVideoToVideoPipeline`"),
    ),
    "LoRA": (
        There(LORA), There(LORA), There(LORA), There(LORA_WAN),
    ),
    "step caches": (
        There("recipes/test_recipes.py::test_step_caches_are_right_where_every_step_is_whole", WHOLE),
        Not(note="the class has no `enable_cache`"), There(CACHES, WHOLE), There(CACHES, WHOLE),
    ),
    "quantised weights": (There(QUANTISED), There(QUANTISED), There(QUANTISED), There(QUANTISED_WAN)),
    "weights of Nunchaku": (NUNCHAKU,) * 4,
    "a transformer of one file": (There(ONE_FILE),) * 4,
    "compiled blocks": (
        There(COMPILED), There(COMPILED), There(COMPILED),
        Refused("recipes/test_recipes.py::test_compiled_blocks_of_a_clip_are_refused", "use `compile=False`"),
    ),
    "schedulers": (
        There(STEADY), There(STEADY), There(STEADY),
        There("lazy/test_schedulers.py::test_steps_as_a_plain_tensor_and_as_documented"),
    ),
}  # fmt: skip


def parameters_of(kind: type) -> Mapping[str, Any]:
    """What a pipeline class may be called with."""
    return inspect.signature(kind.__call__).parameters  # type: ignore[operator]


WORDS = {Here: "tested", There: "tested", Refused: "refused", Not: "not offered"}


def text_of(cell: Cell) -> str:
    """A cell in words."""
    note = f": {cell.note}" if isinstance(cell, Refused) else f" ({cell.note})" if cell.note else ""
    return f"{WORDS[type(cell)]}{note}"


def table() -> str:
    """The whole in Markdown."""
    lines = [f"| feature | {' | '.join(FAMILIES)} |", f"| --- |{' --- |' * len(FAMILIES)}"]
    lines += [f"| {feature} | {' | '.join(map(text_of, cells))} |" for feature, cells in FEATURES.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/pipelines.md with the table as it should be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
