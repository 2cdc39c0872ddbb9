"""Attaches the patch pipeline to a diffusers pipeline, in memory or while it is loaded; begins and ends requests.

The top of what runs on a rank: it puts hooks on and takes them off. What the hooks do is in the folders below.
"""
