"""The families that make clips, but for Wan and LTX-Video, which came first."""
