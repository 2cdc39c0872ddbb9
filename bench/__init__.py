"""Measurements. Timed claims live here and not in the tests."""
