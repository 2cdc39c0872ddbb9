"""What users do to a pipeline beside calling it: recipes of diffusers and torch, LoRA, saving.

Each is right under a layout, is made right, or is refused by name.
"""
