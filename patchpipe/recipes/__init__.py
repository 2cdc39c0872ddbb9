"""What users do to a pipeline besides calling it: recipes of diffusers and torch, LoRA, saving.

Each works under a layout, is adapted to it, or is refused by name.
"""
