"""What the root ``forward`` does around the blocks: what of it is known beforehand, and what of it is left out."""
