"""Sending less than everything: only the tokens that have changed, or changes in eight bits. This changes pictures."""
