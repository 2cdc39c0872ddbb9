"""FLUX.2 (``Flux2Transformer2DModel``): dual-stream blocks, then single-stream blocks on text and picture as one."""

from dataclasses import replace

from patchpipe.models.families.dual.lists import DUAL, IDS, MERGED, WITH_REFERENCES
from patchpipe.models.families.kinds import variants
from patchpipe.models.latent import number_of_references, sizes_by_ids
from patchpipe.models.plan import ModelPlan, Prefix

CACHE = "joint_attention_kwargs.kv_cache"
FLUX2 = ModelPlan(
    model="Flux2Transformer2DModel",
    pipelines=variants("Flux2", "", "Klein", "KleinInpaint", "KleinKV"),
    grid=replace(WITH_REFERENCES, sizes=sizes_by_ids(of_text=True), ahead=number_of_references),
    blocks=(replace(DUAL, cache=CACHE), replace(MERGED, cache=CACHE)),
    inputs=("guidance", *IDS, "kv_cache", "kv_cache_mode", "num_ref_tokens"),
    guidance="calls",
    per_call=("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
    prefix=Prefix(),
)
