"""LTX-2 (``LTX2VideoTransformer3DModel``): clips with sound, which ask each other in every block."""

from patchpipe.models.families.ltx import LTX
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

CLIP = {"image": ("temb", "temb_ca_scale_shift", "temb_ca_gate", "video_rotary_emb", "ca_video_rotary_emb")}
SOUND = {"sound": ("temb_audio", "temb_ca_audio_scale_shift", "temb_ca_audio_gate", "audio_rotary_emb",
                   "ca_audio_rotary_emb")}  # fmt: skip
STREAMS = {"hidden_states": of("image"), "audio_hidden_states": of("sound")}
TEXT = ("encoder_hidden_states", "audio_encoder_hidden_states")

LTX2 = ModelPlan(
    model="LTX2VideoTransformer3DModel", pipelines=("LTX2Pipeline",), grid=LTX.grid, frames_per_second=24,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=tuple(STREAMS),
        rows={**STREAMS, **{name: of(who, dim=-2) for who, names in {**CLIP, **SOUND}.items() for name in names}},
        attention={
            "attn1": ("image",), "attn2": CROSS, "audio_attn1": ("sound",), "audio_attn2": CROSS,
            "audio_to_video_attn": ("sound",), "video_to_audio_attn": ("image",),
        },
        asking={"audio_to_video_attn": ("image",), "video_to_audio_attn": ("sound",)},
    ),),
    inputs=(
        "audio_hidden_states", *TEXT, "timestep", "sigma", "encoder_attention_mask", "audio_encoder_attention_mask",
        "num_frames", "height", "width", "fps", "audio_num_frames", "video_coords", "audio_coords",
        "use_cross_timestep",
    ),
    ignored_inputs=("attention_kwargs",), second="sound",
    embed="proj_in", tail="proj_out", tail_dims={"timestep": 1},
    per_call=("time_embed", "audio_time_embed", "prompt_adaln", "audio_prompt_adaln"),
    per_request={"caption_projection": TEXT[:1], "audio_caption_projection": TEXT[1:]},
)  # fmt: skip
