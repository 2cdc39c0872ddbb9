"""Paints a picture on two worker processes from a plain script: no launcher, no ``__main__`` guard.

Run it with ``python examples/engine.py ["a prompt"]``.
"""

import sys

import patchpipe
from patchpipe.demo import MODEL_DIR, call_defaults

prompt = sys.argv[1] if len(sys.argv) > 1 else "red heart, flat style"
config = patchpipe.ParallelConfig(pipefusion=2, patches=4, warmup=1)

with patchpipe.Engine(MODEL_DIR, config) as engine:
    print(engine.describe())
    result = engine.generate(
        prompt=prompt,
        seed=0,
        on_progress=lambda progress: print(f"\rstep {progress.step} of {progress.total}", end="", flush=True),
        **call_defaults(MODEL_DIR),
    )
    print(f"\n{result.seconds:.1f} s, gathered {result.stats['materialisations']} time(s)")
    result.images[0].save("engine.png")
    print("engine.png")
