"""A start on fewer tokens: which they are, and the keys of those that they stand for."""
