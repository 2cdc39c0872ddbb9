"""FLUX.1 and its relatives: dual-stream blocks, then blocks in which text and picture share their matrices."""
