"""Families that make clips. Wan and LTX-Video have files of their own, beside this folder."""
