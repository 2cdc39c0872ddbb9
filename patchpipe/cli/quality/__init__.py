"""``patchpipe quality``: compares a layout's pictures with one device's, and writes a page with the figures."""
