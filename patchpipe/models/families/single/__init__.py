"""Families in which text and picture are one sequence from the first block on."""
