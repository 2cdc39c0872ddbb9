"""The picture attends to itself and to a text, or a label, that no block changes."""
