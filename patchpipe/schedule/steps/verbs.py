"""What can become of a request, and where its keys and values can be while it is held."""

from __future__ import annotations

from enum import IntEnum


class Verb(IntEnum):
    """What is to become of a request.

    Attributes:
        JOIN: It begins beside those in flight.
        HOLD: It is held after the step it is in; where its keys and values stay meanwhile is the order's option.
        GO_ON: It goes on.
        SAVE: Its state is written down after the step it is in, and the request ends here.
        WITHDRAW: It ends without a picture.
        END: The stream ends, once no request is left.
    """

    JOIN = 1
    HOLD = 2
    GO_ON = 3
    SAVE = 4
    WITHDRAW = 5
    END = 6


class Keys(IntEnum):
    """Where a held request's keys and values are: on the device, in the host's memory, or nowhere."""

    DEVICE = 0
    HOST = 1
    DROPPED = 2
