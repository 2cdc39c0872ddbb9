"""Ranks that talk to one another: which communicators a layout needs, and who notices that one is in trouble."""
