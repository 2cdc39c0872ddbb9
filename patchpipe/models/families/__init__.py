"""What is known of each family of diffusers transformers, as data: one file each, and no code per pipeline."""
