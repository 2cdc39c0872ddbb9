"""Tests of stage.root."""
