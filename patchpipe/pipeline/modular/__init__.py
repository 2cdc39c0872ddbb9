"""What modular pipelines of diffusers have in place of methods: steps, loops and guiders."""
