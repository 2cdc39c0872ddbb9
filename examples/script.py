"""A script of one's own under torchrun.

torchrun --nproc-per-node 2 examples/script.py
"""

from __future__ import annotations

import torch

import patchpipe
from patchpipe.demo import MODEL_DIR, call_defaults

config = patchpipe.ParallelConfig(pipefusion=2, warmup=1)
pipe = patchpipe.from_pretrained(MODEL_DIR, config, dtype=torch.float32)
output = pipe("red apple, 3d style", **call_defaults(), generator=torch.Generator().manual_seed(0))
if output is not None:  # the output rank; the others get None
    output.images[0].save("apple.png")
    print("apple.png:", pipe.patchpipe.last.as_dict())
