"""Ray, as far as a fleet needs it: the nodes, room on one, a replica's process in it, and words to and from it."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

from patchpipe.errors import PatchpipeError
from patchpipe.serve.fleet.needs import Need, Node
from patchpipe.serve.fleet.words import Spec

NAMESPACE = "patchpipe"
THREADS = 16  # of a replica, in which the service's questions are answered
CONNECT_SECONDS = 30


class Lost(PatchpipeError):
    """A replica is gone, or says nothing."""


def check_installed() -> None:
    """Makes sure that Ray is there.

    Raises:
        ValueError: It is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--ray needs Ray: pip install 'patchpipe[serve,ray]', on every node")


class Cluster:
    """A Ray cluster that this process has joined.

    Args:
        address: ``auto``, or ``HOST:PORT`` of its head node.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, address: str) -> None:
        check_installed()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        import ray

        self._ray = ray
        self._ours = not ray.is_initialized()
        if not self._ours:
            return
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            start = "start one with `ray start --head`, and join others with `ray start --address=HOST:6379`"
            raise ValueError(f"--ray {address}: there is no Ray cluster there ({_line(error)}): {start}") from error

    def nodes(self) -> list[Node]:
        """The nodes that live."""
        found = [Node(one["NodeID"], one["NodeManagerAddress"], one["Resources"]) for one in self._alive()]
        return sorted(found, key=lambda node: (node.address, node.id))

    def ask_room(self, need: Need) -> Room:
        """Asks for a replica's room on some node; it may have to wait for it."""
        return Room(need, self._alive)

    def close(self) -> None:
        """Leaves the cluster; the processes that were started in it end."""
        if self._ours:
            self._ray.shutdown()

    def _alive(self) -> list[dict[str, Any]]:
        return [one for one in self._ray.nodes() if one["Alive"]]


class Room:
    """A replica's devices on one node, reserved until it is given back.

    They are one bundle of a placement group, not a bundle for each device: Ray starts no process whose devices lie in
    several bundles, and one bundle never spans nodes, as the processes of one engine must not.

    Args:
        need: What the replica takes.
        alive: The nodes that live.
    """

    def __init__(self, need: Need, alive: Callable[[], list[dict[str, Any]]]) -> None:
        from ray.util.placement_group import placement_group

        self._need, self._alive = need, alive
        self._group = placement_group([dict(need.resources)], strategy="PACK")

    def wait(self, seconds: float) -> bool:
        """Waits until it is there; whether it is."""
        from ray.exceptions import RayError

        try:
            return bool(self._group.wait(seconds))
        except RayError as error:
            raise Lost(f"Ray failed: {_line(error)}") from error

    def enter(self, spec: Spec) -> Process:
        """Starts a replica's process there, which has nothing loaded yet."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from patchpipe.serve.fleet.replica import Replica

        resources = self._need.resources
        options = {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0.0),
            "max_concurrency": THREADS,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
        }
        return Process(ray.remote(Replica).options(**options).remote(spec))

    @property
    def node(self) -> str:
        """The address of the node it is on, once it is there."""
        from ray.util import placement_group_table

        bundles = placement_group_table(self._group).get("bundles_to_node_id", {})
        names = {one["NodeID"]: one["NodeManagerAddress"] for one in self._alive()}
        return next((names.get(node, node) for node in bundles.values()), "a node")

    def give_back(self) -> None:
        """Gives it back, and ends what runs there."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


class Process:
    """A replica's process, which may be on another machine.

    Args:
        handle: Ray's actor.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def ask(self, what: str, *given: Any, seconds: float) -> Any:
        """Asks it something and waits for the answer.

        Args:
            what: A method of ``Actor``.
            given: Its arguments.
            seconds: How long it may take.

        Raises:
            Lost: It is gone, or took longer.
            Exception: What it raised.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return ray.get(getattr(self._handle, what).remote(*given), timeout=seconds)
        except GetTimeoutError as error:
            raise Lost(f"it said nothing for {seconds:g} s") from error
        except RayTaskError as error:
            raise _own(error) from error
        except RayError as error:
            raise Lost(_line(error)) from error

    def tell(self, what: str, *given: Any) -> None:
        """Tells it something, without waiting; whether it was heard shows when it is asked."""
        getattr(self._handle, what).remote(*given)

    def kill(self) -> None:
        """Ends it at once."""
        import ray

        ray.kill(self._handle)


def _own(error: Any) -> BaseException:
    """The exception that the replica raised."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else PatchpipeError(_line(error))


def _line(error: BaseException) -> str:
    """What happened, in one line: Ray says more, for people who look for faults in Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("The actor is dead because", "The node", "The actor died"))]
    return (told[-1] if told else lines[0] if lines else type(error).__name__)[:300]
