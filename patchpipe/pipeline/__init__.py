"""What concerns attaching to a diffusers pipeline and calling it: the extent of a request, as its caller sees it."""
