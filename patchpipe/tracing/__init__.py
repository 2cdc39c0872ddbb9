"""The timeline of a request: recorded by every rank, written for Perfetto, drawn, and how busy the ranks were in it.

``pipeline.tracing`` gathers the ranks' events.
"""
