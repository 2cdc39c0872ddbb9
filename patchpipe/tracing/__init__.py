"""The timeline of a request: recorded by every rank, written for Perfetto, drawn, and how busy the ranks were in it.

What gathers the ranks' events is the pipeline's (``pipeline.tracing``), over wires of ``distributed``.
"""
