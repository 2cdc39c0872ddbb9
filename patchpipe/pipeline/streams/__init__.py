"""A pipeline's requests as they come and go: each a call that joins, is held, and goes on here or elsewhere."""
