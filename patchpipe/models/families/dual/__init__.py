"""FLUX.1 and those that follow it: dual-stream blocks, then blocks in which text and picture share their matrices."""
