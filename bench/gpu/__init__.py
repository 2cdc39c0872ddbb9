"""One command for a machine with a GPU: what only a GPU shows, in parts that each end by themselves.

python -m bench.gpu

Every part is a process of its own with a time limit. What it has found is on disk after every row, so that a part which
hangs costs its limit and nothing else.
"""
