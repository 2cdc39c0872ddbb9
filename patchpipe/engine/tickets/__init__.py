"""Tickets: requests of an engine that can be paused, moved and cancelled, and what keeps track of them."""
