"""Starts worker processes, reports how they died, and ends them.

A worker imports nothing of the caller's. It does not import the caller's script, which therefore needs no ``__main__``
guard, nor anything from the current folder, where a user's ``queue.py`` would replace the standard library's. Its
standard input never carries data; when it is closed, the parent is gone. (``PR_SET_PDEATHSIG`` would not do: it fires
when the *thread* that started the worker ends, which in a web server or a notebook is not the end of the parent.)
"""

from __future__ import annotations

from patchpipe.engine.processes.forkserver import warm
from patchpipe.engine.processes.worker import Worker, describe_exit
from patchpipe.engine.processes.workers import Workers

__all__ = ["Worker", "Workers", "describe_exit", "warm"]
