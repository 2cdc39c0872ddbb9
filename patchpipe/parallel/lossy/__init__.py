"""Sending less than all: the tokens that have changed alone, or changes in eight bits. Pictures then differ."""
