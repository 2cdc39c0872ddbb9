"""What is known of each family of diffusers transformers, as data: a file for each, and no code per pipeline."""
