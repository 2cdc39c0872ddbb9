"""Who paints what a service takes: the devices of this machine, or a fleet's. The service knows no more than this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from patchpipe.serve.metrics import Metrics
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Seen, Ticket


class Conducting(Protocol):
    """Takes requests and has them painted; any thread may ask."""

    def add(self, ticket: Ticket, *, accepted: bool = False) -> None:
        """Takes a request; refuses it if it cannot be taken, unless it was accepted before."""

    def check(self, ticket: Ticket) -> None:
        """Refuses a request that would be late, where the service turns such away."""

    def check_room(self) -> None:
        """Refuses where too many requests wait."""

    def withdraw(self, ticket: Ticket) -> None:
        """Ends a request: at once where it waits, when the step under way is over where it runs."""

    def refuse_pictures(self, model: str, refusal: Refusal) -> None:
        """Ends the pictures that wait for a model."""

    def look(self) -> None:
        """Decides anew: something has changed."""

    def drain(self, seconds: float) -> bool:
        """Begins no clip any more, and waits until no picture is left; whether it came to that."""
        raise NotImplementedError

    def close(self) -> list[Ticket]:
        """Starts nothing more, and ends all there is; gives the requests that were left."""
        raise NotImplementedError

    def snapshot(self) -> list[Seen]:
        """The requests there are, in the order of their arrival."""
        raise NotImplementedError


class Painters(Protocol):
    """The devices behind a service."""

    @property
    def models(self) -> Mapping[str, Model]:
        """The models by the service's name."""

    @property
    def metrics(self) -> Metrics:
        """The service's figures."""

    @property
    def conductor(self) -> Conducting:
        """Who takes requests."""

    @property
    def policy(self) -> str:
        """Who has which devices next."""

    def start(self) -> None:
        """Starts what is not running."""

    def ask_planner(self) -> None:
        """Asks what usual requests take, so that the first of them need not wait for the answer."""

    def look_on(self) -> None:
        """Looks for what has died; called every second."""

    def state(self) -> dict[str, Any]:
        """What the page shows of it, beside models and requests."""

    def close(self) -> None:
        """Ends the models; its conductor has been closed."""
