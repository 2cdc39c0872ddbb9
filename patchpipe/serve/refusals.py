"""Errors that a client reads, in OpenAI's shape."""

from __future__ import annotations

import math
from functools import partial
from typing import Any


class Refusal(Exception):
    """A request that ends without its picture.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do instead.
        code: One word for programs.
        param: The field at fault.
        retry_after: Seconds after which another try may do better; ``None`` tells clients not to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:  # it may have to travel between the processes of a fleet
        return partial(Refusal, code=self.code, param=self.param, retry_after=self.retry_after), (
            self.status,
            self.message,
        )

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The answer's headers; OpenAI's client reads both."""
        if self.retry_after is not None:
            return {"Retry-After": str(max(1, min(120, math.ceil(self.retry_after))))}
        return {"x-should-retry": "false"}


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A request that is wrong whenever it comes."""
    return Refusal(400, message, code=code, param=param)


def unknown(what: str, name: str) -> Refusal:
    """Something asked for that is not there."""
    return Refusal(404, f"there is no {what} {name!r}", code="not_found")


def shutting_down() -> Refusal:
    """What a request comes to when the service ends."""
    return Refusal(503, "the service is shutting down", code="shutting_down", retry_after=10)


def cancelled() -> Refusal:
    """What a request comes to that nobody wants any more; 499 is the usual status of a client that left."""
    return Refusal(499, "the request was cancelled", code="cancelled")
