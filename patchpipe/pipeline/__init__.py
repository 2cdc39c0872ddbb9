"""Attaching the patch pipeline to a diffusers pipeline, in memory or as it is loaded, and a request's extent.

The top of what runs on a rank: it puts the hooks on and takes them off; what they do lives below.
"""
