"""A worker process, from its start until its parent is gone."""

from __future__ import annotations

import os
import shutil
import sys
import threading

from patchpipe.engine.choosing import answer
from patchpipe.engine.messages import Channel, Close, Plan, Start
from patchpipe.engine.worker.lanes import LaneServer
from patchpipe.engine.worker.serve import Server, leave


def main() -> None:
    """Serves the parent on the other end of the socket whose number is the only argument."""
    channel = Channel(int(sys.argv[1]))
    lifeline = Lifeline()
    lifeline.start()
    load_libraries()
    try:
        message = channel.receive()
        if isinstance(message, Plan):
            channel.send(answer(message))
            message = channel.receive()
        if isinstance(message, Close):
            leave(0)
        start: Start = message
        lifeline.directory = start.directory
        server = (LaneServer if start.lanes else Server)(channel, start)
        server.load()
        server.serve()
    except EOFError:
        lifeline.end()
    leave(0)


class Lifeline(threading.Thread):
    """Ends this process as soon as its parent is gone, however that happened."""

    def __init__(self) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.directory: str | None = None

    def run(self) -> None:
        """Waits for the end of the standard input, which only the parent's end can bring."""
        while os.read(0, 1024):
            continue
        self.end()

    def end(self) -> None:
        """Removes the private folder, which nobody else will, and exits."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
        os._exit(1)


def load_libraries() -> None:
    """Loads diffusers and transformers, and keeps their bars out of the log, whose last lines explain a death."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
