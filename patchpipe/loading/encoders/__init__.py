"""Text encoders too large for one device: their layers on several ranks, or read one after the other."""
