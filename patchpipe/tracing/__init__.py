"""The timeline of a request: recorded by every rank, gathered, written for Perfetto, drawn."""
