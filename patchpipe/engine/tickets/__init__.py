"""Requests of an engine that come and go: what the caller holds of each, and who keeps count of them."""
