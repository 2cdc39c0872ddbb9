"""Families in which text and picture attend to each other in every block, each in a stream of its own."""
