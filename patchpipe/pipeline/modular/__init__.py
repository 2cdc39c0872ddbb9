"""Support for diffusers' modular pipelines, which have steps, loops and guiders instead of methods."""
