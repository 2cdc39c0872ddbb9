"""Ulysses that sends only the tokens that have changed: the others are forecast from what was sent before."""
