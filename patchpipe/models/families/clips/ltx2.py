"""LTX-2 (``LTX2VideoTransformer3DModel``): clips with sound, which ask each other in every block."""

from patchpipe.models.blocks import CROSS, BlockList, of
from patchpipe.models.families.kinds import MASKED_TEXT, NUMBERS, PACKED_CLIP, variants
from patchpipe.models.plan import ModelPlan

CLIP, SOUND = ("image",), ("sound",)
CLIP_ROWS = ("temb", "temb_ca_scale_shift", "temb_ca_gate", "video_rotary_emb", "ca_video_rotary_emb")
SOUND_TIMES = ("temb_audio", "temb_ca_audio_scale_shift", "temb_ca_audio_gate")
SOUND_ROWS = (*SOUND_TIMES, "audio_rotary_emb", "ca_audio_rotary_emb")
ROWS = dict.fromkeys(CLIP_ROWS, of("image", dim=-2)) | dict.fromkeys(SOUND_ROWS, of("sound", dim=-2))
ANSWERING = {"audio_to_video_attn": SOUND, "video_to_audio_attn": CLIP}
BLOCKS = BlockList(
    streams=("hidden_states", "audio_hidden_states"),
    rows={"audio_hidden_states": of("sound"), **ROWS},
    attention={"attn1": CLIP, "attn2": CROSS, "audio_attn1": SOUND, "audio_attn2": CROSS, **ANSWERING},
    asking={"audio_to_video_attn": CLIP, "video_to_audio_attn": SOUND},
)
TIMES = ("sigma", "audio_timestep", "audio_sigma", "use_cross_timestep")
OF_SOUND = tuple(f"audio_{name}" for name in (*MASKED_TEXT, "hidden_states", "num_frames", "coords"))

LTX2 = ModelPlan(
    model="LTX2VideoTransformer3DModel",
    pipelines=variants("LTX2", "", "ImageToVideo", "Condition"),
    grid=PACKED_CLIP,
    blocks=(BLOCKS,),
    inputs=(*MASKED_TEXT, *NUMBERS, *TIMES, "fps", "video_coords", *OF_SOUND),
    apart_by=("spatio_temporal_guidance_blocks", "isolate_modalities"),
    second="sound",
    per_call=("audio_time_embed", "prompt_adaln", "audio_prompt_adaln"),
    per_request={"audio_caption_projection": ("audio_encoder_hidden_states",)},
)
