"""Families in which the picture attends to itself, and to a text or label that no block changes."""
